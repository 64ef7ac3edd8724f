"""A partitioned program's text: its instructions, how often each runs, and what it multiplies; loops counted.

The text is that of HLO as a device's compiler leaves it in the end, or as the partitioner does, before a backend
rewrites it. There the dtypes are those that the program was written with (a CPU's backend turns bfloat16 into float32,
also in collectives), every loop still stands, and shapes are one device's.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

from dpo_jax.model.experts import RARE

ITEM_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2} | {
    f"{kind}{bits}": bits // 8 for kind in "sufc" for bits in (8, 16, 32, 64, 128)
}
PRODUCTS = ("dot", "ragged-dot")

_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+(?:#\d+)?)")


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
        return bytes_of(self.results)

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


def bytes_of(results: Iterable[tuple[str, tuple[int, ...]]]) -> int:
    """Bytes of arrays of these dtypes and dimensions."""
    return int(sum(ITEM_BYTES.get(dtype, 0) * math.prod(shape) for dtype, shape in results))


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

    def launched(self) -> Iterator[tuple[Instruction, Computation, float]]:
        """Instructions that are in no fusion, with the computation they stand in and how often they run."""
        for name, times in self.times.items():
            if name not in self.fused:
                inside = self.computations[name]
                yield from ((one, inside, times) for one in inside.values())

    def instructions(self, *opcodes: str) -> Iterator[tuple[Instruction, Computation, float]]:
        """Instructions of these kinds, with the computation they stand in and how often they run."""
        for name, times in self.times.items():
            inside = self.computations[name]
            yield from ((one, inside, times) for one in inside.values() if one.opcode in opcodes)


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
            shapes = tuple((dtype, dimensions(sizes)) for dtype, sizes in _SHAPE.findall(results))
            operands, rest = _split(rest)
            current[name] = Instruction(name, opcode, shapes, operands, rest, line.lstrip().startswith("ROOT "))
    if entry is None:
        raise ValueError("the text has no ENTRY computation; it is not an HLO module")
    count = _Count(computations, unknown)
    count.visit(entry, 1.0, depth=0)
    return Program(computations, count.times, count.uncounted, frozenset(count.fused), count.waits)


def dimensions(sizes: str) -> tuple[int, ...]:
    """Numbers that stand with commas between them."""
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
    """Adds up how often each computation runs; what is rarely done at all is counted as never."""

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
            elif one.opcode in CALLING and not (one.opcode == "conditional" and RARE in one.source):
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
    return sum((times * flops_of(one, inside) for one, inside, times in program.instructions(*PRODUCTS)), 0.0)


def flops_of(one: Instruction, inside: Computation) -> float:
    """Operations of a matrix product that runs once."""
    _, left = shape_of(one.operands[0], inside)
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
    contracted = math.prod(left[axis] for axis in dimensions(found[1])) if found else 1
    return 2.0 * math.prod(one.results[0][1]) * contracted
