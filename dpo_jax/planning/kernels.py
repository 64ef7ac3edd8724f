"""What each kernel of an optimized program multiplies, reads and writes.

Bytes are those of a kernel's arguments and results, each once: what a cache keeps from one kernel to the next is not
known, and neither is what a kernel reads twice. Of an array that a fusion takes a slice of, the slice counts; of one
that it changes in place, the change.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from dpo_jax.planning.hlo import PRODUCTS, Computation, Instruction, Program, bytes_of, flops_of, maker, shape_of

SLICES = frozenset({"dynamic-slice", "slice", "gather"})
LIBRARY = re.compile(r'custom_call_target="__cublas.*"lhs_contracting_dimensions":\[([^\]]*)\]')
"""A product by a library, and the dimensions that it adds up."""
FLOATS = frozenset({"bf16", "f16", "f32"})
SAME = frozenset({"bitcast", "reshape", "get-tuple-element"})


class CompiledKernel(NamedTuple):
    """One that runs `times` in a step; operations by dtype of what is multiplied, and bytes moved, of one run."""

    times: float
    flops: dict[str, float]
    moved: int


def kernel_of(one: Instruction, inside: Computation, times: float, program: Program) -> CompiledKernel:
    """What one launched instruction does."""
    callee = next((name for name in one.called("calls") if name in program.computations), None)
    if callee is None:
        flops = _custom(one, inside) if one.opcode == "custom-call" else _flops({one.name: one}, inside)
        return CompiledKernel(times, flops, _given(one, inside) + one.num_bytes)
    fused = program.computations[callee]
    return CompiledKernel(times, _flops(fused, fused), _read(fused) + _written(fused))


def _flops(counted: Computation, inside: Computation) -> dict[str, float]:
    found: dict[str, float] = {}
    for one in counted.values():
        if one.opcode in PRODUCTS:
            dtype = shape_of(one.operands[0], inside)[0]
            found[dtype] = found.get(dtype, 0.0) + flops_of(one, inside)
    return found


def _custom(one: Instruction, inside: Computation) -> dict[str, float]:
    """Operations of a product that XLA leaves to a library, or of a kernel of grouped products."""
    found = LIBRARY.search(one.rest)
    if found is None:
        return _grouped(one, inside)
    dtype, left = shape_of(one.operands[0], inside)
    contracted = math.prod(left[int(axis)] for axis in re.findall(r"\d+", found[1]))
    return {dtype: 2.0 * math.prod(one.results[0][1]) * contracted}


def _grouped(one: Instruction, inside: Computation) -> dict[str, float]:
    """Operations of a kernel of grouped products, which is told by what it takes and gives: rows and a matrix for each
    group to rows, or rows and rows to a matrix for each group. None of another kernel."""
    given = [shape_of(name, inside) for name in one.operands if maker(name, inside) is not None]
    wide = [(dtype, shape) for dtype, shape in given if dtype in FLOATS]
    ranks = sorted(len(shape) for _, shape in wide)
    if len(one.results) != 1 or (ranks, len(one.results[0][1])) not in (([2, 3], 2), ([2, 2], 3)):
        return {}
    dtype, (rows, inputs) = next((dtype, shape) for dtype, shape in wide if len(shape) == 2)
    return {dtype: 2.0 * rows * inputs * one.results[0][1][-1]}


def _given(one: Instruction, inside: Computation) -> int:
    """Bytes of all operands; of one that slices, of its result."""
    if one.opcode in SLICES:
        return one.num_bytes
    return sum(bytes_of([shape_of(name, inside)]) for name in one.operands if maker(name, inside) is not None)


def _read(fused: Computation) -> int:
    users: dict[str, list[Instruction]] = {}
    for one in fused.values():
        for name in one.operands:
            users.setdefault(name.partition("#")[0], []).append(one)
    return sum(_read_of(one, users) for one in fused.values() if one.opcode == "parameter")


def _read_of(one: Instruction, users: dict[str, list[Instruction]]) -> int:
    """Bytes that a fusion reads of an array: as much as is sliced off it, or all of it."""
    total = 0
    for user in _uses(one, users):
        first = user.operands[0].partition("#")[0] if user.operands else ""
        if user.opcode in SLICES and _is(first, one, users):
            total += user.num_bytes
        elif user.opcode == "dynamic-update-slice" and _is(first, one, users):
            continue  # in place; what is written counts with the results
        else:
            return one.num_bytes
    return min(total, one.num_bytes)


def _uses(one: Instruction, users: dict[str, list[Instruction]]) -> Iterator[Instruction]:
    """What uses a value, looked at through views of it."""
    for user in users.get(one.name, []):
        if user.opcode in SAME:
            yield from _uses(user, users)
        else:
            yield user


def _is(name: str, one: Instruction, users: dict[str, list[Instruction]]) -> bool:
    """Whether a name is a value or a view of it."""
    return name == one.name or any(user.opcode in SAME and _is(name, user, users) for user in users.get(one.name, []))


def _written(fused: Computation) -> int:
    root = next(one for one in fused.values() if one.root)
    return sum(_written_by(maker(name, fused), fused) for name in _results(root))


def _results(root: Instruction) -> tuple[str, ...]:
    return root.operands if root.opcode == "tuple" else (root.name,)


def _written_by(one: Instruction | None, fused: Computation) -> int:
    """Bytes of a result; where an array is changed in place, of the change, which is read and written."""
    while one is not None and one.opcode in SAME and one.operands:
        one = maker(one.operands[0], fused)
    if one is None:
        return 0
    if one.opcode == "dynamic-update-slice":
        return bytes_of([shape_of(one.operands[1], fused)])
    return one.num_bytes
