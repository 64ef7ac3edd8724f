"""Packing: which slot of which row each tree of tokens takes, and which few row shapes a run needs.

A *bundle* is what must stay together: all trees (prompt with completions) of one data row, since its pairs are
compared with each other. A *micro-batch* of a device is `rows` rows of `length` slots; a bundle's trees may lie in
different rows of it. Everything here is about lengths; no token is looked at.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MICRO_OVERHEAD = 256
"""Cost of one more micro-batch (reading weights, adding gradients), in token slots."""
DEFAULT_MICRO_TOKENS = 8192


class Bundle(NamedTuple):
    """Lengths of one bundle: slots of each of its trees, and how many tokens of them are scored."""

    trees: tuple[int, ...]
    scored: int


@dataclasses.dataclass(frozen=True)
class Shape:
    """One compiled shape of a device's micro-batch: rows x length slots, of which `scored` may be predicted from."""

    rows: int
    length: int
    scored: int

    def cost(self, micro_batches: int, attention_length: int) -> float:
        """Time of that many micro-batches, in slots of a short row.

        At rows of `attention_length` slots, attention costs as much per slot as everything else.
        """
        return micro_batches * (self.rows * self.length * (1 + self.length / attention_length) + MICRO_OVERHEAD)


class Place(NamedTuple):
    """Where one tree lies: bundle and tree number, micro-batch, row and first slot."""

    bundle: int
    tree: int
    micro: int
    row: int
    start: int


def balance(bundles: Sequence[Bundle], shards: int) -> list[list[int]]:
    """Bundle numbers per shard: longest first, always to the shard with the fewest slots so far."""
    loads = np.zeros(shards, np.int64)
    parts: list[list[int]] = [[] for _ in range(shards)]
    for number in _longest_first(bundles):
        shard = int(loads.argmin())
        parts[shard].append(number)
        loads[shard] += sum(bundles[number].trees)
    return parts


def pack(bundles: Sequence[Bundle], numbers: Sequence[int], shape: Shape) -> list[Place]:
    """Places of the trees of the numbered bundles, first fit, longest first, in as many micro-batches as it takes.

    Raises:
      ValueError: a bundle does not fit into an empty micro-batch (the caller chose too small a shape).
    """
    micros: list[_Open] = []
    places: list[Place] = []
    for number in numbers:
        bundle = bundles[number]
        micro, rows = _first_room(bundle, micros, shape)
        micros[micro].scored -= bundle.scored
        for tree, row in enumerate(rows):
            places.append(Place(number, tree, micro, row, shape.length - micros[micro].free[row]))
            micros[micro].free[row] -= bundle.trees[tree]
    return places


def micro_batches(bundles: Sequence[Bundle], parts: Sequence[Sequence[int]], shape: Shape) -> int:
    """Micro-batches that the fullest shard needs."""
    return max((max((p.micro for p in pack(bundles, part, shape)), default=-1) + 1 for part in parts), default=0)


def fits(bundle: Bundle, shape: Shape) -> bool:
    """Whether the bundle goes into an empty micro-batch."""
    return bundle.scored <= shape.scored and _fit(bundle.trees, [shape.length] * shape.rows) is not None


def choose_shapes(
    samples: Sequence[Sequence[Bundle]],
    largest: Bundle,
    shards: int,
    *,
    micro_tokens: int | None,
    attention_length: int,
    most: int,
) -> tuple[Shape, ...]:
    """The few shapes (at most `most`) under which the sample steps cost least; the first one fits every bundle.

    Args:
      samples: the bundles of some steps.
      largest: a bundle as long in every tree, and with as many scored tokens, as any that will come.
      shards: devices that share a step.
      micro_tokens: slots of a micro-batch; None tries several sizes up to DEFAULT_MICRO_TOKENS.
      attention_length: see `Shape.cost`.
      most: shapes to choose at most.
    """
    parts = [balance(step, shards) for step in samples]
    candidates = [_with_budget(shape, samples, parts, largest) for shape in _candidates(samples, largest, micro_tokens)]
    costs = np.full((len(candidates), len(samples)), np.inf)
    for i, shape in enumerate(candidates):
        for j, step in enumerate(samples):
            if all(fits(bundle, shape) for bundle in step):
                costs[i, j] = shape.cost(micro_batches(step, parts[j], shape), attention_length)
    general = [i for i, shape in enumerate(candidates) if fits(largest, shape)]
    chosen = [min(general, key=lambda i: costs[i].sum())]
    while len(chosen) < most:
        best = costs[chosen].min(axis=0)
        gains = (best - np.minimum(costs, best)).sum(axis=1)
        if gains.max() < 0.03 * best.sum():
            break
        chosen.append(int(gains.argmax()))
    return tuple(candidates[i] for i in chosen)


def cheapest(bundles: Sequence[Bundle], shards: int, shapes: Sequence[Shape], attention_length: int) -> Shape:
    """The shape under which one step costs least, among those that every bundle of it fits."""
    parts = balance(bundles, shards)
    able = [shape for shape in shapes if all(fits(bundle, shape) for bundle in bundles)]
    return min(able, key=lambda shape: shape.cost(micro_batches(bundles, parts, shape), attention_length))


def row_lengths(longest: int, limit: int) -> list[int]:
    """Row lengths worth trying from `longest` to `limit`: multiples of 32, then of an eighth of their power of two."""
    lengths, length = [], 32
    while length < max(2 * longest, limit + 1):
        lengths.append(length)
        length += max(32, 1 << max(length.bit_length() - 3, 0))
    return [length for length in lengths if longest <= length <= max(limit, _first_at_least(lengths, longest))]


def _candidates(samples, largest: Bundle, micro_tokens: int | None) -> list[Shape]:
    """Shapes worth trying for the sample steps; some of them fit the largest bundle."""
    usual = max(max(bundle.trees) for step in samples for bundle in step)
    smallest = min(max(max(bundle.trees) for bundle in step) for step in samples)
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
        shapes += [Shape(rows, length, rows * length) for rows in counts]
    return shapes


def _with_budget(shape: Shape, samples, parts, largest: Bundle) -> Shape:
    """The shape with room for as many scored tokens as the fullest micro-batch of the sample steps has."""
    most = largest.scored
    for step, split in zip(samples, parts, strict=True):
        if all(fits(bundle, shape) for bundle in step):
            for part in split:
                scored: dict[int, int] = {}
                for bundle, micro in {(place.bundle, place.micro) for place in pack(step, part, shape)}:
                    scored[micro] = scored.get(micro, 0) + step[bundle].scored
                most = max(most, *scored.values(), 0)
    return dataclasses.replace(shape, scored=min(-(-most // 64) * 64, shape.rows * shape.length))


def _rows_needed(bundle: Bundle, length: int) -> int:
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


@dataclasses.dataclass
class _Open:
    """What is left of a micro-batch: slots of each row, and scored tokens."""

    free: list[int]
    scored: int


def _first_room(bundle: Bundle, micros: list[_Open], shape: Shape) -> tuple[int, list[int]]:
    """The first micro-batch with room for the bundle (a new one if need be), and the row of each of its trees."""
    for number, micro in enumerate(micros):
        rows = _fit(bundle.trees, micro.free) if bundle.scored <= micro.scored else None
        if rows is not None:
            return number, rows
    micros.append(_Open([shape.length] * shape.rows, shape.scored))
    rows = _fit(bundle.trees, micros[-1].free)
    if rows is None or bundle.scored > shape.scored:
        raise ValueError(f"{bundle} does not fit into {shape}")
    return len(micros) - 1, rows


def _fit(trees: Sequence[int], free: Sequence[int]) -> list[int] | None:
    """A row for each tree, first fit, longest first; None if one finds no room."""
    free = list(free)
    rows = [0] * len(trees)
    for tree in sorted(range(len(trees)), key=lambda t: -trees[t]):
        row = next((i for i, room in enumerate(free) if room >= trees[tree]), None)
        if row is None:
            return None
        free[row] -= trees[tree]
        rows[tree] = row
    return rows


def _longest_first(bundles: Sequence[Bundle]) -> list[int]:
    return sorted(range(len(bundles)), key=lambda number: (-sum(bundles[number].trees), number))


def _first_at_least(lengths: Sequence[int], value: int) -> int:
    return next(length for length in lengths if length >= value)
