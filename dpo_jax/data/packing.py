"""Packing: which slot of which row each tree of tokens takes, and which few row shapes a run needs.

A *bundle* is what must stay together: all trees (prompt with completions) of one data row, since its pairs are
compared with each other. A *micro-batch* of a device is `rows` rows of `length` slots; a bundle's trees may lie in
different rows of it. Everything here is about lengths; no token is looked at.

A device's part of a step is a *problem*. Many problems are solved side by side: the loops below are over the bundles of
one problem, and each of their rounds is done for all problems at once.

Letters: U bundles of the data, S steps, N bundles of a step, D devices, Q problems (S x D), n bundles of a problem,
K trees of a bundle, M micro-batches, R rows. Where there are fewer, the rest is -1 (of numbers) or 0 (of lengths).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64

MICRO_OVERHEAD = 256
"""Cost of one more micro-batch (reading weights, adding gradients), in token slots."""
DEFAULT_MICRO_TOKENS = 8192


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Lengths of all bundles of a data set; those of bundle u are `trees[first[u] : first[u + 1]]`.

    Attributes:
      trees: slots of each tree.
      first: number of each bundle's first tree, and at the end the number of trees.
      scored: tokens of each bundle that are scored.
    """

    trees: Int32[np.ndarray, " _"]
    first: Int[np.ndarray, " _"]
    scored: Int[np.ndarray, " U"]

    @functools.cached_property
    def slots(self) -> Int32[np.ndarray, " U"]:
        """Slots of each bundle."""
        one_each = len(self.trees) == len(self.scored)
        return self.trees if one_each else np.add.reduceat(self.trees, self.first[:-1], dtype=np.int32)

    def trees_of(self, bundles: Int[np.ndarray, "..."]) -> Int32[np.ndarray, "... K"]:
        """Slots of the trees of bundles, in their order."""
        there = bundles >= 0
        first, count = self.first[bundles], np.where(there, self.first[bundles + 1] - self.first[bundles], 0)
        places = np.arange(max(int(count.max(initial=0)), 1))
        inside = places < count[..., None]
        return np.where(inside, self.trees[np.where(inside, first[..., None] + places, 0)], 0)

    def scored_of(self, bundles: Int[np.ndarray, "..."]) -> Int32[np.ndarray, "..."]:
        """Scored tokens of bundles."""
        return np.where(bundles >= 0, self.scored[bundles], 0).astype(np.int32)


class RowGroups(NamedTuple):
    """Lengths of one bundle: slots of each of its trees, and how many tokens of them are scored."""

    trees: tuple[int, ...]
    scored: int


@dataclasses.dataclass(frozen=True)
class RowShape:
    """One compiled shape of a device's micro-batch: rows x length slots, of which `scored` may be predicted from."""

    rows: int
    length: int
    scored: int

    def cost(self, micro_batches: int, attention_length: int) -> float:
        """Time of that many micro-batches, in slots of a short row.

        At rows of `attention_length` slots, attention costs as much per slot as everything else.
        """
        return micro_batches * (self.rows * self.length * (1 + self.length / attention_length) + MICRO_OVERHEAD)


@dataclasses.dataclass(frozen=True)
class Split:
    """The bundles of steps on their devices, each device's with the longest first."""

    bundles: Int64[np.ndarray, "S D n"]
    trees: Int32[np.ndarray, "S D n K"]
    scored: Int32[np.ndarray, "S D n"]


class Packed(NamedTuple):
    """Where the bundles of a `Split` lie under a shape.

    Attributes:
      micro: micro-batch of each bundle.
      row: row of each tree.
      start: first slot of each tree.
      micro_batches: how many the fullest device of a step needs.
      scored: most scored tokens of a micro-batch of a step.
      fits: whether all bundles of a step go into the shape; else the other numbers of that step mean nothing.
    """

    micro: Int32[np.ndarray, "S D n"]
    row: Int32[np.ndarray, "S D n K"]
    start: Int32[np.ndarray, "S D n K"]
    micro_batches: Int64[np.ndarray, " S"]
    scored: Int64[np.ndarray, " S"]
    fits: Bool[np.ndarray, " S"]


class PackingPlan(NamedTuple):
    """One step: its shape, and place by place (device by device, longest bundle first) what lies where."""

    shape: RowShape
    bundle: Int64[np.ndarray, " N"]
    shard: Int64[np.ndarray, " N"]
    micro: Int32[np.ndarray, " N"]
    row: Int32[np.ndarray, "N K"]
    start: Int32[np.ndarray, "N K"]


def balance(lengths: Lengths, bundles: Int64[np.ndarray, "S N"], shards: int) -> Split:
    """Steps on devices: longest bundle first, always to the device with the fewest slots so far."""
    steps = np.arange(len(bundles))
    slots = np.where(bundles >= 0, lengths.slots[bundles], -1)
    order = np.argsort(-slots, axis=1, kind="stable")
    sizes = np.take_along_axis(slots, order, axis=1)
    loads, counts = (np.zeros((len(bundles), shards), np.int64) for _ in range(2))
    shard, place = (np.zeros(bundles.shape, np.int64) for _ in range(2))
    for number in range(bundles.shape[1]):
        emptiest = loads.argmin(axis=1)
        shard[:, number], place[:, number] = emptiest, counts[steps, emptiest]
        there = sizes[:, number] >= 0
        loads[steps, emptiest] += np.where(there, sizes[:, number], 0)
        counts[steps, emptiest] += there
    parts = np.full((len(bundles), shards, max(int(counts.max(initial=0)), 1)), -1, np.int64)
    step, number = np.nonzero(sizes >= 0)
    parts[step, shard[step, number], place[step, number]] = bundles[step, order[step, number]]
    return Split(parts, lengths.trees_of(parts), lengths.scored_of(parts))


def pack(split: Split, shape: RowShape) -> Packed:
    """Places of all trees, first fit, longest bundle first, in as many micro-batches as it takes.

    A bundle goes into the first micro-batch that has room for all of it: its trees, longest first, each into the first
    row with room for it, and its scored tokens.
    """
    steps, shards, most, width = split.trees.shape
    count = steps * shards
    trees, scored = split.trees.reshape(count, most, width), split.scored.reshape(count, most)
    longest = np.argsort(-trees, axis=2, kind="stable")
    every = np.arange(count)
    free = np.full((count, 2, shape.rows), shape.length, np.int32)
    left = np.full((count, 2), shape.scored, np.int32)
    micro = np.zeros((count, most), np.int32)
    row, start = np.zeros_like(trees), np.zeros_like(trees)
    fits = np.ones(count, bool)
    for number in range(most):
        found, rows = _room(free, left, trees[:, number], scored[:, number], longest[:, number])
        where = found.argmax(axis=1)
        placed = found[every, where]
        fits &= placed
        left[every, where] -= np.where(placed, scored[:, number], 0)
        micro[:, number] = where
        row[:, number] = rows[every, where]
        for tree in range(width):
            at = (every, where, row[:, number, tree])
            start[:, number, tree] = shape.length - free[at]
            free[at] -= np.where(placed, trees[:, number, tree], 0)
        if where.max(initial=0) == free.shape[1] - 1:  # one stays empty, so that what fits nowhere fits into none
            free = np.concatenate([free, np.full_like(free, shape.length)], axis=1)
            left = np.concatenate([left, np.full_like(left, shape.scored)], axis=1)
    present = (split.bundles >= 0).reshape(count, most)
    needed = np.where(present, micro + 1, 0).max(axis=1)

    def most_of(values: np.ndarray) -> np.ndarray:
        return values.reshape(steps, -1).max(axis=1).astype(np.int64)

    return Packed(
        micro.reshape(split.bundles.shape),
        row.reshape(split.trees.shape),
        start.reshape(split.trees.shape),
        most_of(needed),
        most_of(shape.scored - left.min(axis=1)),
        np.logical_and.reduce(fits.reshape(steps, shards), axis=1),
    )


def _room(
    free: Int32[np.ndarray, "Q M R"],
    left: Int32[np.ndarray, "Q M"],
    trees: Int32[np.ndarray, "Q K"],
    scored: Int32[np.ndarray, " Q"],
    longest: Int64[np.ndarray, "Q K"],
) -> tuple[Bool[np.ndarray, "Q M"], Int64[np.ndarray, "Q M K"]]:
    """In which micro-batches there is room for the next bundle of each problem, and the rows of its trees there."""
    able = left >= scored[:, None]
    rows = np.zeros((*able.shape, trees.shape[1]), np.int64)
    problem, micro = np.ogrid[: able.shape[0], : able.shape[1]]
    for turn in range(trees.shape[1]):
        which = longest[:, turn]
        size = trees[problem[:, 0], which][:, None, None]
        room = free >= size
        row = room.argmax(axis=2)
        able &= room[problem, micro, row]
        rows[problem, micro, which[:, None]] = row
        if turn + 1 < trees.shape[1]:
            free = free.copy() if turn == 0 else free
            free[problem, micro, row] -= size[:, :, 0]
    return able, rows


def fits(bundle: RowGroups, shape: RowShape) -> bool:
    """Whether the bundle goes into an empty micro-batch."""
    if bundle.scored > shape.scored or max(bundle.trees) > shape.length:
        return False
    return _rows_needed(bundle, shape.length) <= shape.rows


def plan(
    lengths: Lengths,
    bundles: Int64[np.ndarray, "S N"],
    shards: int,
    shapes: Sequence[RowShape],
    attention_length: int,
) -> list[PackingPlan]:
    """Each step in the shape under which it costs least, among those that every bundle of it fits.

    Raises:
      ValueError: a bundle of a step fits into none of the shapes.
    """
    split = balance(lengths, bundles, shards)
    packed = [pack(split, shape) for shape in shapes]
    costs = np.asarray(
        [_costs(shape, found, attention_length) for shape, found in zip(shapes, packed, strict=True)], np.float64
    )
    best = costs.argmin(axis=0)
    if not np.isfinite(costs.min(axis=0)).all():
        raise ValueError(f"step {int(np.argmax(costs.min(axis=0)))}: a bundle does not fit into any of {shapes}")
    plans = []
    for step, choice in enumerate(best.tolist()):
        shard, place = np.nonzero(split.bundles[step] >= 0)
        found, at = packed[choice], (step, shard, place)
        plans.append(
            PackingPlan(shapes[choice], split.bundles[at], shard, found.micro[at], found.row[at], found.start[at])
        )
    return plans


def part(whole: PackingPlan, shards: Sequence[int]) -> PackingPlan:
    """What these shards (ascending) have of a step; they are numbered from 0 in it."""
    place = np.searchsorted(shards, whole.shard)
    mine = np.asarray([*shards, -1])[place] == whole.shard
    return PackingPlan(
        whole.shape, whole.bundle[mine], place[mine], whole.micro[mine], whole.row[mine], whole.start[mine]
    )


def _costs(shape: RowShape, packed: Packed, attention_length: int) -> np.ndarray:
    """Cost of each step, infinite where a bundle does not fit."""
    costs = [shape.cost(micros, attention_length) for micros in packed.micro_batches.tolist()]
    return np.where(packed.fits, costs, np.inf)


def choose_shapes(
    lengths: Lengths,
    samples: Int64[np.ndarray, "S N"],
    largest: RowGroups,
    shards: int,
    *,
    micro_tokens: int | None,
    attention_length: int,
    most: int,
    worth: float = 0.03,
) -> tuple[RowShape, ...]:
    """The few shapes (at most `most`) under which the sample steps cost least; the first one fits every bundle.

    Args:
      lengths: of all bundles.
      samples: the bundles of some steps.
      largest: a bundle as long in every tree, and with as many scored tokens, as any that will come.
      shards: devices that share a step.
      micro_tokens: slots of a micro-batch; None tries several sizes up to DEFAULT_MICRO_TOKENS.
      attention_length: see `Shape.cost`.
      most: shapes to choose at most.
      worth: share of the time that a further shape must save, as it has to be compiled too.
    """
    split = balance(lengths, samples, shards)
    candidates, rows = [], []
    for shape in _candidates(split, largest, micro_tokens):
        packed = pack(split, shape)
        # With room for as many scored tokens as the fullest micro-batch has, all lies as it did with room for more.
        candidates.append(_with_budget(shape, packed, largest))
        rows.append(_costs(shape, packed, attention_length))
    costs = np.asarray(rows)
    general = [i for i, shape in enumerate(candidates) if fits(largest, shape)]
    chosen = [min(general, key=lambda i: costs[i].sum())]
    while len(chosen) < most:
        best = costs[chosen].min(axis=0)
        gains = (best - np.minimum(costs, best)).sum(axis=1)
        if gains.max() < worth * best.sum():
            break
        chosen.append(int(gains.argmax()))
    return tuple(candidates[i] for i in chosen)


def row_lengths(longest: int, limit: int) -> list[int]:
    """Row lengths worth trying from `longest` to `limit`: multiples of 32, then of an eighth of their power of two."""
    lengths, length = [], 32
    while length < max(2 * longest, limit + 1, 33):
        lengths.append(length)
        length += max(32, 1 << max(length.bit_length() - 3, 0))
    return [length for length in lengths if longest <= length <= max(limit, _first_at_least(lengths, longest))]


def _candidates(split: Split, largest: RowGroups, micro_tokens: int | None) -> list[RowShape]:
    """Shapes worth trying for the sample steps; some of them fit the largest bundle."""
    longest = split.trees.max(axis=(1, 2, 3))
    usual, smallest = int(longest.max()), int(longest.min())
    limit = micro_tokens or DEFAULT_MICRO_TOKENS
    shapes = []
    for length in sorted(
        {*row_lengths(smallest, min(4 * usual, limit)), *row_lengths(max(largest.trees), max(largest.trees))}
    ):
        needed = _rows_needed(largest, length)
        most = max(limit // length, needed, 1)
        counts = (
            [most]
            if micro_tokens
            else sorted({r for r in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, needed) if needed <= r <= most})
        )
        shapes += [RowShape(rows, length, rows * length) for rows in counts]
    return shapes


def _with_budget(shape: RowShape, packed: Packed, largest: RowGroups) -> RowShape:
    """The shape with room for as many scored tokens as the fullest micro-batch of the sample steps has."""
    most = max(largest.scored, int(packed.scored[packed.fits].max(initial=0)))
    return dataclasses.replace(shape, scored=min(-(-most // 64) * 64, shape.rows * shape.length))


def _rows_needed(bundle: RowGroups, length: int) -> int:
    """Rows of this length that hold the bundle by itself (1 where a tree is too long for any)."""
    free: list[int] = []
    for tree in sorted(bundle.trees, reverse=True):
        if tree > length:
            return 1
        row = next((i for i, room in enumerate(free) if room >= tree), None)
        if row is None:
            free.append(length - tree)
        else:
            free[row] -= tree
    return len(free)


def _first_at_least(lengths: Sequence[int], value: int) -> int:
    return next(length for length in lengths if length >= value)
