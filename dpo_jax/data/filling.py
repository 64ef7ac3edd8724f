"""The arrays of a batch, filled by a plan: whole arrays at a time, never tree by tree.

Letters: U units, C completions, V trees (a prompt with its completions). What is written where is listed first, one
entry for each tree, completion or pair in the order of the plan's places, and then written at once.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int32, Int64

from dpo_jax.data.batch import Batch
from dpo_jax.data.encoded import Encoded, narrowest
from dpo_jax.data.packing import Lengths, PackingPlan

PLANNED = 2**14
"""Units whose lengths are found at a time: what is computed on the way stays in a processor's cache."""


@dataclass(frozen=True)
class PromptGroups:
    """How some units are laid out as trees, V in all, in the order of the units.

    Attributes:
      lengths: slots of each tree and scored tokens, by unit.
      first: number of each tree's first completion in the data set.
      branches: completions of each tree.
      prompt_start: where its prompt begins in the tokens.
      prompt_length: tokens of its prompt.
    """

    lengths: Lengths
    first: Int64[np.ndarray, " V"]
    branches: Int64[np.ndarray, " V"]
    prompt_start: Int64[np.ndarray, " V"]
    prompt_length: Int32[np.ndarray, " V"]


def trees_of(
    encoded: Encoded, first: Int[np.ndarray, " _"], units: Int[np.ndarray, " X"], *, share_prompts: bool
) -> PromptGroups:
    """Trees of these units: one for all completions of a unit that see the same tokens of its prompt, if that is
    wanted.

    Args:
      encoded: the data.
      first: number of each unit's first completion, and at the end the number of completions.
      units: whose trees; each has completions.
      share_prompts: whether completions may share a prompt.
    """
    size = (first[units + 1] - first[units]).astype(np.int64)
    head = np.cumsum(size) - size  # of each unit, the place of its first completion among those of all these units
    text, of = ranges(first[units], size), np.repeat(np.arange(len(units)), size)
    skip, prompt, own = encoded.completion_skip[text], encoded.prompt_length[units][of], encoded.completion_length[text]
    alone = skip == prompt
    start = np.where(alone, encoded.completion_start[text] - 1, encoded.prompt_start[units][of] + skip)
    length = np.where(alone, 1, prompt - skip).astype(np.int32)
    shared = np.logical_and.reduceat((start == start[head][of]) & (length == length[head][of]), head) & share_prompts
    begins = ~shared[of]
    begins[head] = True
    firsts = np.flatnonzero(begins)
    lengths = Lengths(
        trees=length[firsts] + np.add.reduceat(own, firsts, dtype=np.int32),
        first=np.concatenate([[0], np.cumsum(np.add.reduceat(begins, head, dtype=np.int64))]),
        scored=np.add.reduceat(encoded.scored_lengths(text), head, dtype=np.int64),
    )
    branches = np.diff(firsts, append=len(text))
    return PromptGroups(lengths, text[firsts], branches, start[firsts], length[firsts])


def lengths_of(encoded: Encoded, first: Int[np.ndarray, " _"], *, share_prompts: bool) -> Lengths:
    """Lengths of the trees of all units, which may be too many for everything about them to fit into memory.

    Args as of `trees_of`.
    """
    units, columns = len(first) - 1, ([], [], [])
    for begin in range(0, units, PLANNED):
        some = trees_of(encoded, first, np.arange(begin, min(begin + PLANNED, units)), share_prompts=share_prompts)
        numbers = some.lengths.trees, np.diff(some.lengths.first), some.lengths.scored
        for column, array in zip(columns, numbers, strict=True):
            column.append(array.astype(np.int32))
    trees, counts, scored = (np.concatenate(column) for column in columns)
    ends = np.cumsum(counts, dtype=narrowest(len(trees)))
    return Lengths(trees, np.concatenate([np.zeros(1, ends.dtype), ends]), scored)


def fill(
    batch: Batch,
    plan: PackingPlan,
    trees: PromptGroups,
    encoded: Encoded,
    pairs: Int64[np.ndarray, " P"],
    noise: np.ndarray,
    *,
    reference: np.ndarray | None,
    first: Int[np.ndarray, " _"],
) -> None:
    """Write a step's trees and pairs into a dummy batch.

    Args:
      batch: of the plan's shape.
      plan: where everything lies.
      trees: of the plan's bundles.
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
    which = by_unit[ranges(np.searchsorted(units, plan.bundle), count)]
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
    tree, place = np.arange(firsts[-1]), np.repeat(np.arange(len(plan.bundle)), np.diff(firsts))
    inside = tree - firsts[place]
    row, start = plan.row[place, inside].astype(np.int64), plan.start[place, inside].astype(np.int64)
    micro = room[place]
    group = 1 + _before(micro * rows + row)
    prompt = trees.prompt_length.astype(np.int64)

    text, owner = ranges(trees.first, trees.branches), np.repeat(tree, trees.branches)
    size = encoded.completion_length[text].astype(np.int64)
    begin = start[owner] + prompt[owner] + _before(owner, size)
    _write(batch, (micro * rows + row) * length + start, trees.prompt_start, prompt, group, 0, 0, encoded)
    line = (micro[owner] * rows + row[owner]) * length
    branch = 1 + _before(owner)
    _write(batch, line + begin, encoded.completion_start[text], size, group[owner], branch, prompt[owner], encoded)

    into = micro[owner]
    number = _before(into)
    slot = row[owner] * length
    scored = batch.source.shape[-1]
    source = ranges(slot + begin - 1, size)
    source[np.cumsum(size) - size] = slot + start[owner] + prompt[owner] - 1  # the first one's is the prompt's last
    places, count = ranges(encoded.completion_start[text], size), encoded.scored_lengths(text).astype(np.int64)
    chosen = encoded.scored_at(places)
    where = ranges(into * scored + _before(into, count), count)
    _flat(batch.source)[where] = source[chosen]
    _flat(batch.target)[where] = encoded.tokens[places[chosen]]
    _flat(batch.completion)[where] = np.repeat(number, count)
    if reference is not None:
        _flat(batch.reference)[where] = reference[ranges(encoded.scored_start[text], count)]
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
    slots = ranges(where, size)
    _flat(batch.tokens)[slots] = encoded.tokens[ranges(text, size)]
    _flat(batch.group)[slots] = np.repeat(group, size)
    _flat(batch.branch)[slots] = np.repeat(np.broadcast_to(branch, size.shape), size)
    _flat(batch.position)[slots] = ranges(np.broadcast_to(position, size.shape).astype(np.int64), size)


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
    first: Int[np.ndarray, " _"],
) -> None:
    most, width = batch.ranked.shape[-2:]
    unit = encoded.pair_unit[pairs]
    size = first[unit + 1] - first[unit]
    ranked = ranges(first[unit], size)
    where = ranges((into * most + number) * width, size)
    _flat(batch.ranked)[where] = _local(ranked, local)
    _flat(batch.rank)[where] = encoded.rank[ranked]


def _local(completions: np.ndarray, local: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    known, numbers = local
    return numbers[np.searchsorted(known, completions)]


def _flat(array: np.ndarray) -> np.ndarray:
    """The array's own elements in one row; to be written to, so the array must lie in one piece."""
    assert array.flags.c_contiguous
    return array.reshape(-1)


def ranges(start: Int[np.ndarray, " X"], size: Int[np.ndarray, " X"]) -> Int64[np.ndarray, " Y"]:
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
