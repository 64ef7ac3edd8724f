"""Preference data as arrays of token ids.

Letters: N tokens, U units (a prompt with its completions), C completions, P pairs (or single completions), S spans of
completions that are not scored.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, Int64

from dpo_jax.data.report import clean

SCANNED = 2**20
"""Tokens that are looked through at a time where all are: they may lie in a file, and need not fit into memory."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """Prompts, completions and pairs as a structure of arrays.

    A unit is one prompt with its completions and the pairs among them; completions of a unit, and pairs, are in unit
    order. `tokens` holds every prompt and completion whole; what truncation cuts is there but not referred to, so that
    a preview can show it: before a prompt, also what was cut out of its middle, behind BOS and the system turn. Every
    token of a completion is read, and scored unless it lies in one of the spans `unscored_start` to `unscored_end`:
    what tools and users say inside it. Spans are in their order, are not empty, lie in one text each, and do not meet
    inside it.

    Completion c is read after `prompt_span(c)`: its unit's prompt without the first `completion_skip[c]` tokens. The
    skip is the same for all completions of a unit, except where data.truncation is keep_end. There it may reach
    `prompt_length`: then nothing is left of the prompt, and the token before the completion (the completion's own
    first kept token, which TRL keeps and does not score) is the span.

    An entry of P is a pair of completions, or one completion that is both chosen and rejected (`single`). What an entry
    must be for an objective is arranged in examples.py.

    Attributes:
      label: of a pair, the chance that chosen is the better one; of a single completion, 1 desirable or 0 undesirable.
      rank: how many completions of its unit are preferred to a completion, by the pairs that were read; 0 is best.
      line: row in its file, from 1.
      content_key: digest of a unit's prompt as its row has it; `ids_key` of its token ids before any was cut.
      truncated: the prompt's head or the completion's tail (keep_end: its head) was cut.
      files: names that `file` points to.
    """

    tokens: Int32[np.ndarray, " N"]
    unscored_start: Int64[np.ndarray, " S"]
    unscored_end: Int64[np.ndarray, " S"]
    prompt_start: Int64[np.ndarray, " U"]
    prompt_length: Int32[np.ndarray, " U"]
    completion_unit: Int32[np.ndarray, " C"]
    completion_start: Int64[np.ndarray, " C"]
    completion_length: Int32[np.ndarray, " C"]
    completion_skip: Int32[np.ndarray, " C"]
    pair_unit: Int32[np.ndarray, " P"]
    chosen: Int32[np.ndarray, " P"]
    rejected: Int32[np.ndarray, " P"]
    weight: Float32[np.ndarray, " P"]
    margin: Float32[np.ndarray, " P"]
    label: Float32[np.ndarray, " P"]
    file: Int32[np.ndarray, " U"]
    line: Int32[np.ndarray, " U"]
    content_key: Int64[np.ndarray, " U"]
    ids_key: Int64[np.ndarray, " U"]
    truncated: Bool[np.ndarray, " C"]
    rank: Int32[np.ndarray, " C"]
    files: tuple[str, ...]

    @property
    def num_units(self) -> int:
        """Prompts."""
        return len(self.prompt_start)

    @property
    def num_completions(self) -> int:
        """Completions of all prompts."""
        return len(self.completion_start)

    @property
    def num_pairs(self) -> int:
        """Pairs of completions, and single completions."""
        return len(self.chosen)

    @property
    def num_scored(self) -> int:
        """Scored tokens of all completions."""
        return int(self.scored_length.sum(dtype=np.int64))

    @property
    def single(self) -> Bool[np.ndarray, " P"]:
        """Which examples are one completion and not two."""
        return self.chosen == self.rejected

    @functools.cached_property
    def scored_length(self) -> Int32[np.ndarray, " C"]:
        """Scored tokens of each completion."""
        return self.scored_lengths(slice(None))

    def scored_lengths(self, completions: Int[np.ndarray, " X"] | slice) -> Int32[np.ndarray, " X"]:
        """Scored tokens of some completions, where nothing is known of the others."""
        start, length = self.completion_start[completions], self.completion_length[completions]
        if not len(self.unscored_start):
            return np.array(length, np.int32)
        return (length - (self._unscored_before(start + length) - self._unscored_before(start))).astype(np.int32)

    def _unscored_before(self, places: Int64[np.ndarray, " X"]) -> Int64[np.ndarray, " X"]:
        """How many tokens before these places are not scored."""
        spans = np.searchsorted(self.unscored_start, places)
        beyond = np.maximum(self.unscored_end[spans - 1] - places, 0)  # of the last span, if one begins before
        return self._unscored_ending[spans] - np.where(spans, beyond, 0)

    @functools.cached_property
    def _unscored_ending(self) -> Int64[np.ndarray, " _"]:
        """Tokens of the first spans, of none to all of them."""
        return np.concatenate([[0], np.cumsum(self.unscored_end - self.unscored_start)])

    def scored_at(self, places: Int64[np.ndarray, " X"]) -> Bool[np.ndarray, " X"]:
        """Whether these tokens are scored, all of which are of completions."""
        if not len(self.unscored_start):
            return np.ones(len(places), bool)
        spans = np.searchsorted(self.unscored_start, places, side="right")
        return (spans == 0) | (places >= self.unscored_end[spans - 1])

    @functools.cached_property
    def scored_start(self) -> Int64[np.ndarray, " C"]:
        """Where each completion's tokens begin in one list of all scored tokens, which has `num_scored` of them."""
        ends = np.cumsum(self.scored_length, dtype=np.int64)
        return ends - self.scored_length

    def origin(self, pair: int) -> str:
        """Where a pair came from: `file:line`."""
        unit = self.pair_unit[pair]
        return f"{clean(self.files[self.file[unit]], 400)}:{self.line[unit]}"

    def first_origin(self, examples: Int[np.ndarray, " X"]) -> str:
        """Where the first of these examples stands in the files as they are read, whatever order they have here."""
        units = self.pair_unit[examples]
        return self.origin(int(examples[np.lexsort((self.line[units], self.file[units]))[0]]))

    def prompt_span(self, completion: int) -> tuple[int, int]:
        """Start and length, in `tokens`, of what a completion is read after: never empty, and never scored."""
        unit = self.completion_unit[completion]
        skip, length = int(self.completion_skip[completion]), int(self.prompt_length[unit])
        if skip == length:
            return int(self.completion_start[completion]) - 1, 1
        return int(self.prompt_start[unit]) + skip, length - skip

    def prompt(self, completion: int) -> Int32[np.ndarray, " _"]:
        """Ids that a completion is read after."""
        start, length = self.prompt_span(completion)
        return self.tokens[start : start + length]

    def completion(self, completion: int) -> Int32[np.ndarray, " _"]:
        """Ids of a completion."""
        start = int(self.completion_start[completion])
        return self.tokens[start : start + int(self.completion_length[completion])]

    def scored_of(self, completion: int) -> Bool[np.ndarray, " _"]:
        """Which ids of a completion are scored."""
        return self.scored_at(int(self.completion_start[completion]) + np.arange(self._length(completion)))

    def cut(self, completion: int) -> tuple[Int32[np.ndarray, " _"], Int32[np.ndarray, " _"]]:
        """Ids that truncation took before what is read, and after it.

        Read off the order in which `encode` stores its texts; examples.py may leave texts out or borrow them.
        """
        unit = int(self.completion_unit[completion])
        start, after = int(self.prompt_start[unit]), int(self.completion_start[completion] + self._length(completion))
        read_from, _ = self.prompt_span(completion)
        if not self._stands_alone(completion):
            return self.tokens[start:read_from], self.tokens[after : self._next_start(completion, after)]
        siblings = completion > 0 and self.completion_unit[completion - 1] == unit
        before = completion - 1
        own = self.completion_start[before] + self._length(before) if siblings else start + self.prompt_length[unit]
        prompt = self.tokens[start : start + self.prompt_length[unit]]
        return np.concatenate([prompt, self.tokens[int(own) : read_from]]), self.tokens[:0]

    def _length(self, completion: int) -> int:
        return int(self.completion_length[completion])

    def _stands_alone(self, completion: int) -> bool:
        """Nothing is left of its prompt. Only under keep_end, where no tail is cut."""
        return bool(self.completion_skip[completion] == self.prompt_length[self.completion_unit[completion]])

    def _next_start(self, completion: int, after: int) -> int:
        """Where what is stored after a completion begins."""
        unit, following = int(self.completion_unit[completion]), completion + 1
        if following < self.num_completions and self.completion_unit[following] == unit:
            return after if self._stands_alone(following) else int(self.completion_start[following])
        return int(self.prompt_start[unit + 1]) if unit + 1 < self.num_units else len(self.tokens)

    def sequence_lengths(self) -> Int32[np.ndarray, " C"]:
        """Tokens that a model reads for each completion, its prompt included."""
        prompts = self.prompt_length[self.completion_unit] - self.completion_skip
        return np.maximum(prompts, 1).astype(np.int32) + self.completion_length

    def pair_lengths(self) -> Int32[np.ndarray, "P 2"]:
        """Tokens of the sequences of chosen and rejected."""
        lengths = self.sequence_lengths()
        return np.stack([lengths[self.chosen], lengths[self.rejected]], axis=1)


def found_where(array: np.ndarray, holds: Callable[[np.ndarray], np.ndarray]) -> Int64[np.ndarray, " _"]:
    """Places of a long array where something holds, which is looked for piece by piece."""
    found = [np.zeros(0, np.int64)]
    for first in range(0, len(array), SCANNED):
        hits = holds(array[first : first + SCANNED])
        if hits.any():
            found.append(first + np.flatnonzero(hits))
    return np.concatenate(found)


def firsts(owner: Int32[np.ndarray, " X"], owners: int) -> Int[np.ndarray, " _"]:
    """Place of the first thing of each of so many owners, and at the end how many things there are: they are in the
    order of their owners, and some may have none."""
    found = np.empty(owners + 1, narrowest(len(owner)))
    for begin in range(0, owners + 1, SCANNED):  # numbers of the owners' own kind, or all of these would be converted
        some = np.arange(begin, min(begin + SCANNED, owners + 1), dtype=owner.dtype)
        found[begin : begin + SCANNED] = np.searchsorted(owner, some)
    return found


def narrowest(most: int) -> type[np.signedinteger]:
    """The integers that count to `most` in the least memory: int32, or int64."""
    return np.int32 if most <= np.iinfo(np.int32).max else np.int64


def head(encoded: Encoded, pairs: int) -> Encoded:
    """The first `pairs` pairs (at least 1), with all of their units: the same data, before rows were added behind."""
    units = int(encoded.pair_unit[pairs - 1]) + 1
    completions = int(np.searchsorted(encoded.completion_unit, units))
    tokens = int(encoded.prompt_start[units]) if units < encoded.num_units else len(encoded.tokens)
    spans = int(np.searchsorted(encoded.unscored_start, tokens))
    of = {"N": tokens, "U": units, "C": completions, "P": pairs, "S": spans}
    axes = {field.name: getattr(field.type, "dim_str", "") for field in fields(encoded)}
    return replace(encoded, **{name: getattr(encoded, name)[: of[axis]] for name, axis in axes.items() if axis in of})


def of_units(encoded: Encoded, kept: Bool[np.ndarray, " U"]) -> Encoded:
    """The data of these units alone, in their order, as if no other had been read."""
    sizes = np.diff(encoded.prompt_start, append=len(encoded.tokens))
    completions, pairs = kept[encoded.completion_unit], kept[encoded.pair_unit]
    owner = np.searchsorted(encoded.prompt_start, encoded.unscored_start, side="right") - 1
    masks = {"N": np.repeat(kept, sizes), "U": kept, "C": completions, "P": pairs, "S": kept[owner]}
    axes = {field.name: getattr(field.type, "dim_str", "") for field in fields(encoded)}
    found = {name: getattr(encoded, name)[masks[axis]] for name, axis in axes.items() if axis in masks}
    moved = np.cumsum(np.where(kept, 0, sizes))  # tokens left out before a unit that is kept
    unit, completion = (np.cumsum(mask, dtype=np.int32) - 1 for mask in (kept, completions))
    found["prompt_start"] = found["prompt_start"] - moved[kept]
    found["completion_start"] = found["completion_start"] - moved[found["completion_unit"]]
    found |= {name: found[name] - moved[owner[kept[owner]]] for name in ("unscored_start", "unscored_end")}
    found |= {name: unit[found[name]] for name in ("completion_unit", "pair_unit")}
    found |= {name: completion[found[name]] for name in ("chosen", "rejected")}
    return replace(encoded, **found)


def length_tables(encoded: Encoded) -> dict[str, dict[str, float]]:
    """Tokens of prompts, completions and whole sequences: min, median, p90, p99, max, mean."""
    sequences = encoded.sequence_lengths()
    prompts = (sequences - encoded.completion_length)[encoded.chosen]
    lengths, single = encoded.completion_length, encoded.single
    parts = {
        "prompt": prompts,
        "chosen": lengths[encoded.chosen[~single]],
        "rejected": lengths[encoded.rejected[~single]],
        "completion": lengths[encoded.chosen[single]],
        "prompt + completion": sequences,
    }
    return {name: _summary(values) for name, values in parts.items() if len(values)}


def _summary(values: np.ndarray) -> dict[str, float]:
    names = {"min": 0, "median": 50, "p90": 90, "p99": 99, "max": 100}
    table = {name: float(np.percentile(values, share)) for name, share in names.items()}
    return {**table, "mean": float(values.mean())}
