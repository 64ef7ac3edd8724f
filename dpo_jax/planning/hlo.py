"""A partitioned program's text: what it multiplies, and what its devices send each other, loops counted.

The text is that of HLO as the partitioner leaves it, before a backend rewrites it. There the dtypes are those that the
program was written with (a CPU's backend turns bfloat16 into float32, also in collectives), every loop still stands,
and shapes are one device's. What later passes of an accelerator do is counted as done where it is certain: the
partitioner writes a reduce-scatter as an all-reduce of which each device keeps its own slice, and GPU and TPU make
one of it, as XLA's CPU backend does not.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

ITEM_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2} | {
    f"{kind}{bits}": bits // 8 for kind in "sufc" for bits in (8, 16, 32, 64, 128)
}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
PRODUCTS = ("dot", "ragged-dot")
THROUGH = frozenset({"bitcast", "convert", "copy", "reshape", "transpose"})
"""Operations that may stand between an all-reduce and the slice of it that is kept."""

_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+(?:#\d+)?)")
_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: name, opcode, `(dtype, dimensions)` of each result, the operands, and the rest of the line.

    An operand is the name of an instruction, with `#k` behind it where it is element k of a tuple.
    """

    name: str
    opcode: str
    results: tuple[tuple[str, tuple[int, ...]], ...]
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of all results."""
        return int(sum(ITEM_BYTES.get(dtype, 0) * math.prod(shape) for dtype, shape in self.results))

    def called(self, attribute: str) -> list[str]:
        """Names of the computations behind an attribute such as `body=`."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.rest)
        return [] if found is None else re.findall(r"[\w.\-]+", found[1].replace("%", ""))

    @property
    def source(self) -> str:
        """Where in the program it comes from (JAX's name stack)."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


Computation = dict[str, Instruction]


def maker(operand: str, inside: Computation) -> Instruction | None:
    """The instruction that makes an operand; None if it stands elsewhere."""
    return inside.get(operand.partition("#")[0])


def shape_of(operand: str, inside: Computation) -> tuple[str, tuple[int, ...]]:
    """dtype and dimensions of an operand."""
    name, _, element = operand.partition("#")
    return inside[name].results[int(element or 0)]


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, and how often each of their instructions runs in one step.

    Attributes:
      uncounted: loops that are inside one of unknown length and of unknown length themselves: they are counted once.
      fused: computations that run inside of a fusion, whose instructions are no kernels of their own.
      waits: how often the condition of a loop of unknown length is asked for.
    """

    computations: dict[str, Computation]
    times: dict[str, float]
    uncounted: int = 0
    fused: frozenset[str] = frozenset()
    waits: float = 0.0

    def launched(self) -> Iterator[tuple[Instruction, float]]:
        """Instructions that are in no fusion, and how often they run."""
        for name, times in self.times.items():
            if name not in self.fused:
                yield from ((one, times) for one in self.computations[name].values())

    def instructions(self, *opcodes: str) -> Iterator[tuple[Instruction, Computation, float]]:
        """Instructions of these kinds, with the computation they stand in and how often they run."""
        for name, times in self.times.items():
            inside = self.computations[name]
            yield from ((one, inside, times) for one in inside.values() if one.opcode in opcodes)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
      kind: one of KINDS; an all-reduce of which each device keeps its slice is a reduce-scatter.
      dtype: of what is exchanged.
      shape: the whole array: what is gathered, reduced or scattered.
      num_bytes: of the whole array.
      groups: numbers of the devices that exchange with each other, int [groups, size], in the mesh's order.
      times: how often it runs in a step.
      source: where in the program it comes from.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    groups: np.ndarray
    times: float
    source: str

    @property
    def size(self) -> int:
        """Devices of a group."""
        return self.groups.shape[1]

    @property
    def sent(self) -> float:
        """Bytes that leave (and as many enter) a device in a step, in rings: `b (g - 1) / g`, all-reduce twice that."""
        share = (self.size - 1) / self.size
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.num_bytes * factor * self.times

    def across(self, per_host: int) -> float:
        """The part of `sent` that leaves a device's host, if its host's members of the group share the work.

        A ring goes through the members on one host before it leaves that host, and there is one ring for each of them,
        so that what leaves the host is split evenly over their network cards.
        """
        hosts = {len(set((group // per_host).tolist())) for group in self.groups}
        if max(hosts) == 1:
            return 0.0
        members = self.size / max(hosts)
        if self.kind == "collective-permute":
            return self.sent
        return self.sent * self.size / (self.size - 1) * (max(hosts) - 1) / max(hosts) / members


def parse(text: str, *, unknown: float = 1.0) -> Program:
    """The program of an HLO module's text.

    Loops whose bound is a value, not a constant, run `unknown` times; but once where they are inside another such loop.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            current = computations.setdefault(found[1], {})
            entry = found[1] if line.startswith("ENTRY") else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            name, results, opcode, rest = found.groups()
            shapes = tuple((dtype, _dimensions(sizes)) for dtype, sizes in _SHAPE.findall(results))
            operands, rest = _split(rest)
            current[name] = Instruction(name, opcode, shapes, operands, rest, line.lstrip().startswith("ROOT "))
    if entry is None:
        raise ValueError("the text has no ENTRY computation; it is not an HLO module")
    count = _Count(computations, unknown)
    count.visit(entry, 1.0, depth=0)
    return Program(computations, count.times, count.uncounted, frozenset(count.fused), count.waits)


def _dimensions(sizes: str) -> tuple[int, ...]:
    return tuple(int(size) for size in sizes.split(",") if size)


def _split(rest: str) -> tuple[tuple[str, ...], str]:
    """Operands, and the whole rest of the line (a constant's value stands before its closing bracket)."""
    depth = 1
    for place, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return _names(rest[:place]), rest
    return _names(rest), rest


def _names(operands: str) -> tuple[str, ...]:
    """Names of operands, with a % and maybe their shapes before them, or bare."""
    return tuple(_NAME.findall(operands) if "%" in operands else re.findall(r"[\w.\-]+(?:#\d+)?", operands))


CALLS = ("to_apply", "calls", "branch_computations", "true_computation", "false_computation")
CALLING = ("call", "fusion", "conditional", "async-start", "call-start", "fusion-start")


class _Count:
    """Adds up how often each computation runs."""

    def __init__(self, computations: dict[str, Computation], unknown: float):
        self.computations, self.unknown = computations, unknown
        self.times: dict[str, float] = {}
        self.uncounted = 0
        self.fused: set[str] = set()
        self.waits = 0.0

    def visit(self, name: str, by: float, depth: int, fused: bool = False) -> None:
        """`by` more runs of a computation and of all that it calls, inside `depth` loops of unknown length."""
        self.times[name] = self.times.get(name, 0.0) + by
        if fused:
            self.fused.add(name)
        for one in self.computations[name].values():
            if one.opcode == "while":
                self.loop(one, by, depth)
            elif one.opcode in CALLING:
                for callee in (callee for attribute in CALLS for callee in one.called(attribute)):
                    self.visit(callee, by, depth, fused or one.opcode.startswith("fusion"))

    def loop(self, one: Instruction, by: float, depth: int) -> None:
        """`by` more runs of a loop."""
        (body,), (condition,) = one.called("body"), one.called("condition")
        trips = _known_trips(one) or _trips(self.computations[condition])
        if trips is not None:
            self.visit(body, by * trips, depth)
            return
        self.uncounted += depth > 0
        turns = 1.0 if depth else self.unknown
        self.waits += by * (turns + 1)
        self.visit(body, by * turns, depth + 1)


def _known_trips(loop: Instruction) -> int | None:
    """Runs of a loop that the compiler has written down."""
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    return int(found[1]) if found else None


def _trips(condition: Computation) -> int | None:
    """Runs of a loop that counts from 0 while `counter < constant`; None if the bound is no constant."""
    root = next(one for one in condition.values() if one.root)
    if root.opcode != "compare" or "direction=LT" not in root.rest:
        return None
    bound = maker(root.operands[-1], condition)
    while bound is not None and bound.opcode in ("copy", "bitcast"):
        bound = maker(bound.operands[0], condition)
    if bound is None or bound.opcode != "constant":
        return None
    found = re.match(r"(\d+)\)", bound.rest)
    return int(found[1]) if found else None


# ---------------------------------------------------------------------------------------------- products


def product_flops(program: Program) -> float:
    """Operations of one device's matrix products in a step: two for each multiplication, useful or not."""
    return sum(times * _flops(one, inside) for one, inside, times in program.instructions(*PRODUCTS))


def _flops(one: Instruction, inside: Computation) -> float:
    _, left = shape_of(one.operands[0], inside)
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
    contracted = math.prod(left[axis] for axis in _dimensions(found[1])) if found else 1
    return 2.0 * math.prod(one.results[0][1]) * contracted


# ---------------------------------------------------------------------------------------------- collectives


def collectives(program: Program, devices: int) -> list[Collective]:
    """Every exchange of a step between that many devices; groups of one are left out."""
    opcodes = [*KINDS, *(f"{kind}-start" for kind in KINDS)]
    found = [_collective(one, inside, times, devices) for one, inside, times in program.instructions(*opcodes)]
    return [one for one in found if one.size > 1]


def _collective(one: Instruction, inside: Computation, times: float, devices: int) -> Collective:
    kind = one.opcode.removesuffix("-start")
    groups = groups_of(one.rest, devices)
    if kind == "all-reduce" and _is_sliced(one, inside, groups.shape[1]):
        kind, factor = "reduce-scatter", 1
    else:
        factor = groups.shape[1] if kind == "reduce-scatter" else 1
    dtype, shape = max(one.results, key=lambda result: math.prod(result[1]))
    return Collective(kind, dtype, shape, one.num_bytes * factor, groups, times, one.source)


def _is_sliced(one: Instruction, inside: Computation, size: int) -> bool:
    """Whether all that is done with the result is that each device takes its own part, one of `size`."""
    users = [user for user in inside.values() if any(maker(name, inside) is one for name in user.operands)]
    if not users or one.root:
        return False
    for user in users:
        if user.opcode in THROUGH:
            if not _is_sliced(user, inside, size):
                return False
        elif user.opcode != "dynamic-slice" or user.operands[0].partition("#")[0] != one.name:
            return False
        elif math.prod(user.results[0][1]) * size != math.prod(one.results[0][1]):
            return False
        elif not any(_knows_device(name, inside) for name in user.operands[1:]):
            return False
    return True


def _knows_device(name: str, inside: Computation, depth: int = 24) -> bool:
    """Whether a value is computed from the device's own number."""
    one = maker(name, inside)
    if one is None or depth == 0:
        return False
    return one.opcode == "partition-id" or any(_knows_device(operand, inside, depth - 1) for operand in one.operands)


def groups_of(text: str, devices: int) -> np.ndarray:
    """Device numbers of each group, int [groups, size], from `replica_groups=` in any of XLA's forms.

        {{0,1},{2,3}}                                    as listed; {} is all devices
        [2,4]<=[4,2]T(1,0)                               numbers counted up, transposed, reshaped
        mesh['a'=2,'b'=4] {'b'}                          along the named axes of a mesh (its order may be transposed)
        source_target_pairs={{0,1},{1,0}}                of a collective-permute: who sends to whom

    Raises:
      ValueError: another form, or groups of unequal sizes.
    """
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, source, order = (_dimensions(part or "") for part in found.groups())
        numbers = _numbers(source, order)
        return numbers.reshape(-1, shape[-1])
    if found := re.search(r"replica_groups=(?:@?\w+)?\[?mesh\[?|replica_groups=mesh\[", text):
        return _along_mesh(text)
    found = re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", text)
    if found is None:
        raise ValueError(f"an exchange between unknown devices: {text[:200]}")
    groups = [_dimensions(group) for group in re.findall(r"\{([\d,]*)\}", found[1])]
    if not groups:
        return np.arange(devices)[None]
    if len({len(group) for group in groups}) != 1:
        raise ValueError(f"groups of unequal sizes: {found[0][:200]}")
    return np.asarray(groups)


@functools.lru_cache
def _numbers(source: tuple[int, ...], order: tuple[int, ...]) -> np.ndarray:
    numbers = np.arange(math.prod(source)).reshape(source)
    return numbers.transpose(order) if order else numbers


def _along_mesh(text: str) -> np.ndarray:
    found = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", text
    )
    if found is None:
        raise ValueError(f"a mesh that is not understood: {text[:200]}")
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
    numbers = (
        _numbers(_dimensions(found[2]), _dimensions(found[3] or ""))
        if found[2]
        else np.arange(math.prod(sizes.values()))
    )
    parts = {name: [(size, False)] for name, size in sizes.items()}
    for name, before, size in _AXIS.findall(found[4]):
        whole, before, size = sizes[name], int(before or 1), int(size or sizes[name])
        if len(parts[name]) > 1:
            raise ValueError(f"an axis of the mesh that is taken apart twice: {text[:200]}")
        parts[name] = [(before, False), (size, True), (whole // before // size, False)]
    flat = [part for name in sizes for part in parts[name]]
    kept, grouped = ([axis for axis, (_, inside) in enumerate(flat) if inside is want] for want in (False, True))
    size = math.prod(flat[axis][0] for axis in grouped)
    return numbers.reshape([size for size, _ in flat]).transpose(kept + grouped).reshape(-1, size)
