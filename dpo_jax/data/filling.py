"""The arrays of a batch, filled by a plan: whole arrays at a time, never tree by tree.

Letters: U units, C completions, V trees (a prompt with its completions), as numbered in the data set. What is written
where is listed first, one entry for each tree, completion or pair in the order of the plan's places, and then written
at once.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int32, Int64

from dpo_jax.data.batch import Batch
from dpo_jax.data.encoded import Encoded
from dpo_jax.data.packing import Lengths, PackingPlan


@dataclass(frozen=True)
class PromptGroups:
    """How a data set is laid out as trees; tree v has the completions `first[v]` to `first[v + 1] - 1`.

    Attributes:
      lengths: slots of each tree and scored tokens, by unit.
      first: number of each tree's first completion, and at the end the number of completions.
      prompt_start: where its prompt begins in the tokens.
      prompt_length: tokens of its prompt.
    """

    lengths: Lengths
    first: Int64[np.ndarray, " _"]
    prompt_start: Int64[np.ndarray, " V"]
    prompt_length: Int32[np.ndarray, " V"]


def trees_of(encoded: Encoded, first: Int64[np.ndarray, " _"], *, share_prompts: bool) -> PromptGroups:
    """Trees of a data set: one for all completions of a unit that see the same tokens of its prompt, if that is wanted.

    Args:
      encoded: the data.
      first: number of each unit's first completion, and at the end the number of completions.
      share_prompts: whether completions may share a prompt.
    """
    unit = encoded.completion_unit
    stands_alone = encoded.completion_skip == encoded.prompt_length[unit]
    start = np.where(stands_alone, encoded.completion_start - 1, encoded.prompt_start[unit] + encoded.completion_skip)
    length = np.where(stands_alone, 1, encoded.prompt_length[unit] - encoded.completion_skip).astype(np.int32)
    head = first[:-1][unit]  # the unit's first completion
    same = (start == start[head]) & (length == length[head])
    shared = np.logical_and.reduceat(same, first[:-1]) & share_prompts
    begins = ~shared[unit] | (np.arange(len(unit)) == head)
    firsts = np.flatnonzero(begins)
    slots = length[firsts] + np.add.reduceat(encoded.completion_length, firsts, dtype=np.int32)
    lengths = Lengths(
        trees=slots,
        first=np.concatenate([[0], np.cumsum(np.add.reduceat(begins, first[:-1], dtype=np.int64))]),
        scored=np.add.reduceat(encoded.scored_length, first[:-1], dtype=np.int64),
    )
    return PromptGroups(lengths, np.append(firsts, len(unit)), start[firsts], length[firsts])


def fill(
    batch: Batch,
    plan: PackingPlan,
    trees: PromptGroups,
    encoded: Encoded,
    pairs: Int64[np.ndarray, " P"],
    noise: np.ndarray,
    *,
    reference: np.ndarray | None,
    first: Int64[np.ndarray, " _"],
) -> None:
    """Write a step's trees and pairs into a dummy batch.

    Args:
      batch: of the plan's shape.
      plan: where everything lies.
      trees: of the data set.
      encoded: the data.
      pairs: the step's pairs.
      noise: a number for each of them.
      reference: log-probability of every scored token of the data set, if there are any.
      first: number of each unit's first completion, and at the end the number of completions.
    """
    shards = batch.tokens.shape[1]
    room = plan.micro.astype(np.int64) * shards + plan.shard  # of each place: micro-batch and shard in one
    local = _fill_trees(batch, plan, room, trees, encoded, reference)
    # Pairs come in the order of the places, those of a unit in the order of the step.
    by_unit = np.argsort(encoded.pair_unit[pairs], kind="stable")
    units = encoded.pair_unit[pairs][by_unit]
    count = np.searchsorted(units, plan.bundle, "right") - np.searchsorted(units, plan.bundle)
    which = by_unit[_ranges(np.searchsorted(units, plan.bundle), count)]
    into, mine = np.repeat(room, count), pairs[which]
    _fill_pairs(batch, into, _before(into), mine, noise[which], encoded, local)
    if batch.ranked.shape[-1]:
        _fill_rankings(batch, into, _before(into), mine, encoded, local, first)


def _fill_trees(
    batch: Batch,
    plan: PackingPlan,
    room: np.ndarray,
    trees: PromptGroups,
    encoded: Encoded,
    reference: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Write tokens and scores. Returns the completions, ascending, and the number of each within its micro-batch."""
    _, _, rows, length = batch.tokens.shape
    firsts = trees.lengths.first
    count = firsts[plan.bundle + 1] - firsts[plan.bundle]
    tree, place = _ranges(firsts[plan.bundle], count), np.repeat(np.arange(len(count)), count)
    inside = tree - firsts[plan.bundle][place]
    row, start = plan.row[place, inside].astype(np.int64), plan.start[place, inside].astype(np.int64)
    micro = room[place]
    group = 1 + _before(micro * rows + row)
    prompt = trees.prompt_length[tree].astype(np.int64)

    branches = trees.first[tree + 1] - trees.first[tree]
    text, owner = _ranges(trees.first[tree], branches), np.repeat(np.arange(len(tree)), branches)
    size = encoded.completion_length[text].astype(np.int64)
    begin = start[owner] + prompt[owner] + _before(owner, size)
    _write(batch, (micro * rows + row) * length + start, trees.prompt_start[tree], prompt, group, 0, 0, encoded)
    line = (micro[owner] * rows + row[owner]) * length
    branch = 1 + _before(owner)
    _write(batch, line + begin, encoded.completion_start[text], size, group[owner], branch, prompt[owner], encoded)

    into = micro[owner]
    number = _before(into)
    slot = row[owner] * length
    scored = batch.source.shape[-1]
    source = _ranges(slot + begin - 1, size)
    source[np.cumsum(size) - size] = slot + start[owner] + prompt[owner] - 1  # the first one's is the prompt's last
    places, count = _ranges(encoded.completion_start[text], size), encoded.scored_length[text].astype(np.int64)
    chosen = encoded.scored[places]
    where = _ranges(into * scored + _before(into, count), count)
    _flat(batch.source)[where] = source[chosen]
    _flat(batch.target)[where] = encoded.tokens[places[chosen]]
    _flat(batch.completion)[where] = np.repeat(number, count)
    if reference is not None:
        _flat(batch.reference)[where] = reference[_ranges(encoded.scored_start[text], count)]
    at = into * batch.ids.shape[-1] + number
    _flat(batch.ids)[at], _flat(batch.prompts)[at] = text, encoded.completion_unit[text]
    _flat(batch.lengths)[at], _flat(batch.last)[at] = count, slot + begin + size - 1
    order = np.argsort(text)
    return text[order], number[order]


def _write(
    batch: Batch,
    where: Int64[np.ndarray, " X"],
    text: Int64[np.ndarray, " X"],
    size: Int64[np.ndarray, " X"],
    group: Int64[np.ndarray, " X"],
    branch: Int[np.ndarray, " X"] | int,
    position: Int[np.ndarray, " X"] | int,
    encoded: Encoded,
) -> None:
    """Write X runs of tokens into the slots that begin at `where`."""
    slots = _ranges(where, size)
    _flat(batch.tokens)[slots] = encoded.tokens[_ranges(text, size)]
    _flat(batch.group)[slots] = np.repeat(group, size)
    _flat(batch.branch)[slots] = np.repeat(np.broadcast_to(branch, size.shape), size)
    _flat(batch.position)[slots] = _ranges(np.broadcast_to(position, size.shape).astype(np.int64), size)


def _fill_pairs(
    batch: Batch,
    into: np.ndarray,
    number: np.ndarray,
    pairs: np.ndarray,
    noise: np.ndarray,
    encoded: Encoded,
    local: tuple[np.ndarray, np.ndarray],
) -> None:
    where = into * batch.real.shape[-1] + number
    _flat(batch.chosen)[where] = _local(encoded.chosen[pairs], local)
    _flat(batch.rejected)[where] = _local(encoded.rejected[pairs], local)
    for name in ("weight", "margin", "label"):
        _flat(getattr(batch, name))[where] = getattr(encoded, name)[pairs]
    _flat(batch.noise)[where] = noise
    _flat(batch.real)[where] = True


def _fill_rankings(
    batch: Batch,
    into: np.ndarray,
    number: np.ndarray,
    pairs: np.ndarray,
    encoded: Encoded,
    local: tuple[np.ndarray, np.ndarray],
    first: Int64[np.ndarray, " _"],
) -> None:
    most, width = batch.ranked.shape[-2:]
    unit = encoded.pair_unit[pairs]
    size = first[unit + 1] - first[unit]
    ranked = _ranges(first[unit], size)
    where = _ranges((into * most + number) * width, size)
    _flat(batch.ranked)[where] = _local(ranked, local)
    _flat(batch.rank)[where] = encoded.rank[ranked]


def _local(completions: np.ndarray, local: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    known, numbers = local
    return numbers[np.searchsorted(known, completions)]


def _flat(array: np.ndarray) -> np.ndarray:
    """The array's own elements in one row; to be written to, so the array must lie in one piece."""
    assert array.flags.c_contiguous
    return array.reshape(-1)


def _ranges(start: Int[np.ndarray, " X"], size: Int[np.ndarray, " X"]) -> Int64[np.ndarray, " Y"]:
    """The numbers from each start on, `size` of them:  [5, 20], [3, 2]  ->  [5 6 7 20 21]."""
    ends = np.cumsum(size, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(start - (ends - size), size)


def _before(key: Int[np.ndarray, " X"], size: Int[np.ndarray, " X"] | None = None) -> Int64[np.ndarray, " X"]:
    """How many entries before each have the same key, or what their sizes come to:  [7 3 7 7]  ->  [0 0 1 2]."""
    order = np.argsort(key, kind="stable")
    sizes = np.ones(len(key), np.int64) if size is None else size[order].astype(np.int64)
    sums = np.cumsum(sizes) - sizes
    inner = key[order]
    starts = np.concatenate([[True], inner[1:] != inner[:-1]]) if len(key) else np.zeros(0, bool)
    found = np.empty(len(key), np.int64)
    found[order] = sums - sums[starts][np.cumsum(starts) - 1]
    return found
