"""What the devices of a partitioned program send each other in a step.

In a text that the partitioner leaves, what later passes of an accelerator do is counted as done where it is certain:
the partitioner writes a reduce-scatter as an all-reduce of which each device keeps its own slice, and GPU and TPU make
one of it, as XLA's CPU backend does not. In a text that a device's compiler leaves, exchanges are what they are.
"""

import dataclasses
import functools
import math
import re

import numpy as np

from dpo_jax.planning.hlo import Computation, Instruction, Program, bytes_of, dimensions, maker, shape_of

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
THROUGH = frozenset({"bitcast", "convert", "copy", "reshape", "transpose"})
"""Operations that may stand between an all-reduce and the slice of it that is kept."""

WORK = frozenset({"fusion", "custom-call", "dot", "convolution", "while", "call", "conditional"})
"""Operations that an exchange may hide behind."""

_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


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
      hides: whether the device works while it goes on, as a device's compiler has scheduled it.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    groups: np.ndarray
    times: float
    source: str
    hides: bool = False

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
    results = _results(one, inside)
    dtype, shape = max(results, key=lambda result: math.prod(result[1]))
    return Collective(kind, dtype, shape, bytes_of(results) * factor, groups, times, one.source, _hides(one, inside))


def _results(one: Instruction, inside: Computation) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """What is received: a start's results have what is sent before it, and numbers of its own behind it."""
    given = tuple(shape_of(name, inside) for name in one.operands if maker(name, inside) is not None)
    starts = one.opcode.endswith("-start") and 0 < len(given) < len(one.results)
    if starts and one.results[: len(given)] == given:
        return one.results[len(given) : 2 * len(given)]
    return one.results


def _hides(one: Instruction, inside: Computation) -> bool:
    """Whether the device multiplies while the exchange goes on; instructions stand in the order they are run in."""
    if not one.opcode.endswith("-start") or '"is_sync":true' in one.rest:
        return False
    names = list(inside)
    for other in names[names.index(one.name) + 1 :]:
        between = inside[other]
        if between.opcode.endswith("-done") and any(maker(name, inside) is one for name in between.operands):
            return False
        if between.opcode in WORK:
            return True
    return False


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
        shape, source, order = (dimensions(part or "") for part in found.groups())
        numbers = _numbers(source, order)
        return numbers.reshape(-1, shape[-1])
    if found := re.search(r"replica_groups=(?:@?\w+)?\[?mesh\[?|replica_groups=mesh\[", text):
        return _along_mesh(text)
    found = re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", text)
    if found is None:
        raise ValueError(f"an exchange between unknown devices: {text[:200]}")
    groups = [dimensions(group) for group in re.findall(r"\{([\d,]*)\}", found[1])]
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
        _numbers(dimensions(found[2]), dimensions(found[3] or "")) if found[2] else np.arange(math.prod(sizes.values()))
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
