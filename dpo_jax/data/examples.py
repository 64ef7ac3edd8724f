"""Examples of a training step: the same encoded data as pairs, as rankings, as desirable or not, or as chosen alone.

Letters, as in encoded.py: U units, C completions, P examples. Nothing here copies or moves a token.
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Int, Int32

from dpo_jax.data.encoded import Encoded, firsts
from dpo_jax.errors import UserError

_BY_COMPLETION = (
    "completion_unit",
    "completion_start",
    "completion_length",
    "completion_skip",
    "truncated",
    "rank",
)
_BY_EXAMPLE = ("pair_unit", "chosen", "rejected", "weight", "margin", "label")


def as_examples(encoded: Encoded, kind: str, *, objective: str, max_length: int) -> Encoded:
    """The data with the examples that an objective wants, from data as `encode` made it.

    pairs      the data itself.
    rankings   one example per unit, its best completion against its worst; `rank` tells how the others lie between.
    unpaired   one example per single completion and two per pair, (chosen, label) and (rejected, 1 - label). Each unit
               has one more completion, its last: the first of the next unit with another prompt, whose tokens stay
               where they are, shortened to fit `max_length`. All examples of the unit have it as `rejected`.
    chosen     the completions that an example prefers, each example with `rejected` = `chosen`.

    Args:
      encoded: the data.
      kind: one of the four.
      objective: its name, for what is refused.
      max_length: most tokens of a prompt and a completion together.

    Raises:
      UserError: pairs or rankings with single completions, unpaired with one prompt only, or chosen with completions
        that are undesirable.
    """
    match kind:
        case "pairs":
            return _paired(encoded, objective)
        case "rankings":
            return _rankings(_paired(encoded, objective))
        case "unpaired":
            return _unpaired(encoded, objective, max_length)
        case "chosen":
            return _chosen(encoded, objective)
    raise ValueError(f"kind={kind!r}; one of pairs, rankings, unpaired, chosen")


def ranks(encoded: Encoded) -> Int32[np.ndarray, " C"]:
    """How many completions of its unit are preferred to each completion, by the pairs and what follows from them.

    A pair's chosen always ranks before its rejected, also where a > c is missing beside a > b and b > c, as it is when
    a and c are the same tokens. For data whose examples are still those that were read; `Encoded.rank` keeps the
    result.
    """
    first, pairs = first_completions(encoded), np.flatnonzero(~encoded.single)
    sizes = np.diff(first)
    found = np.zeros(encoded.num_completions, np.int32)
    for size in np.unique(sizes[encoded.pair_unit[pairs]]).tolist():
        units = np.flatnonzero(sizes == size)
        mine = pairs[sizes[encoded.pair_unit[pairs]] == size]
        unit = encoded.pair_unit[mine]
        better = np.zeros((len(units), size, size), bool)
        places = encoded.chosen[mine] - first[unit], encoded.rejected[mine] - first[unit]
        better[np.searchsorted(units, unit), *places] = True
        for between in range(size):
            better |= better[:, :, between, None] & better[:, None, between, :]
        found[first[units][:, None] + np.arange(size)] = better.sum(axis=1)
    return found


def first_completions(encoded: Encoded) -> Int[np.ndarray, " _"]:
    """Number of each unit's first completion, and at the end the number of completions: U + 1 numbers."""
    return firsts(encoded.completion_unit, encoded.num_units)


def _paired(encoded: Encoded, objective: str) -> Encoded:
    single = encoded.single
    if single.any():
        where, name = (
            encoded.first_origin(np.flatnonzero(single)),
            "kto" if (encoded.label[single] == 0).any() else "sft",
        )
        raise UserError(
            f"objective.name={objective} compares two completions and {where} has one; use objective.name={name}"
        )
    return encoded


def _rankings(encoded: Encoded) -> Encoded:
    first, place = first_completions(encoded), np.arange(encoded.num_completions, dtype=np.int32)
    order = place[np.lexsort((place, encoded.rank, encoded.completion_unit))]
    example = np.searchsorted(encoded.pair_unit, np.arange(encoded.num_units))
    return replace(_with_examples(encoded, example), chosen=order[first[:-1]], rejected=order[first[1:] - 1])


def _with_examples(encoded: Encoded, examples: np.ndarray) -> Encoded:
    """The data with these of its examples."""
    return replace(encoded, **{name: getattr(encoded, name)[examples] for name in _BY_EXAMPLE})


def _unpaired(encoded: Encoded, objective: str, max_length: int) -> Encoded:
    partners = _mismatched_units(encoded)
    if partners is None:
        raise UserError(
            f"objective.name={objective} compares with the completion of another prompt, and all "
            f"{encoded.num_units} rows have the same; give rows with at least 2 prompts"
        )
    first, units = first_completions(encoded), np.arange(encoded.num_units)
    own = np.arange(encoded.num_completions, dtype=np.int32) + encoded.completion_unit
    foreign = (first[1:] + units).astype(np.int32)
    mismatched = _mismatched(encoded, first, partners, max_length)
    example = np.repeat(np.arange(encoded.num_pairs), np.where(encoded.single, 1, 2))
    is_rejected = np.concatenate([[False], example[1:] == example[:-1]])
    examples = _with_examples(encoded, example)
    return replace(
        examples,
        chosen=own[np.where(is_rejected, examples.rejected, examples.chosen)],
        rejected=foreign[examples.pair_unit],
        label=np.where(is_rejected, 1 - examples.label, examples.label),
        **{name: _merged(getattr(encoded, name), own, values, foreign) for name, values in mismatched.items()},
    )


def _mismatched_units(encoded: Encoded) -> np.ndarray | None:
    """For each unit the next one, round in a circle, whose prompt is another; None where there is no other prompt."""
    spans = zip(encoded.prompt_start.tolist(), encoded.prompt_length.tolist(), strict=True)
    texts = [encoded.tokens[start : start + length].tobytes() for start, length in spans]
    changes = np.asarray([one != other for one, other in zip(texts[1:], texts, strict=False)], bool)
    starts = np.flatnonzero(np.concatenate([[True], changes]))  # of stretches of one prompt
    if len(starts) < 2:
        return None
    after = np.concatenate([starts[1:], starts[1:2] if texts[0] == texts[-1] else starts[:1]])
    return np.repeat(after, np.diff(np.concatenate([starts, [len(texts)]])))


def _mismatched(encoded: Encoded, first: np.ndarray, partners: np.ndarray, max_length: int) -> dict[str, np.ndarray]:
    """Each unit's completion of another unit, by column. It counts as truncated where it is so there, too."""
    units = np.arange(encoded.num_units)
    source = first[partners]
    skip = np.minimum(encoded.completion_skip[first[:-1]], encoded.prompt_length - 1)
    room = np.maximum(max_length - (encoded.prompt_length - skip), 1)
    length = np.minimum(encoded.completion_length[source], room)
    return {
        "completion_unit": units,
        "completion_start": encoded.completion_start[source],
        "completion_length": length,
        "completion_skip": skip,
        "truncated": (skip > 0) | (length < encoded.completion_length[source]) | encoded.truncated[source],
        "rank": np.zeros(len(units)),
    }


def _merged(one: np.ndarray, places: np.ndarray, other: np.ndarray, other_places: np.ndarray) -> np.ndarray:
    """Both arrays in one, with the first one's type."""
    merged = np.empty(len(one) + len(other), one.dtype)
    merged[places], merged[other_places] = one, other
    return merged


def _chosen(encoded: Encoded, objective: str) -> Encoded:
    undesirable = encoded.single & (encoded.label == 0)
    if undesirable.any():
        where = encoded.first_origin(np.flatnonzero(undesirable))
        raise UserError(
            f"objective.name={objective} learns every completion and that of {where} is undesirable; use "
            "objective.name=kto, or leave such rows out"
        )
    kept = np.zeros(encoded.num_completions, bool)
    kept[encoded.chosen] = True
    chosen = (np.cumsum(kept, dtype=np.int32) - 1)[encoded.chosen]
    columns = {name: getattr(encoded, name)[kept] for name in _BY_COMPLETION}
    return replace(encoded, chosen=chosen, rejected=chosen, **columns)
