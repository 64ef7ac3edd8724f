"""Which prompts are held out of the training data, and which of the held-out data are in it all the same."""

import hashlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from dpo_jax.data.encoded import Encoded, of_units
from dpo_jax.errors import UserError


class DataSplit(NamedTuple):
    """Training data in two parts that have no prompt in common."""

    train: Encoded
    held_out: Encoded

    def counts(self) -> dict[str, dict[str, int]]:
        """Prompts, pairs and single completions of each part; the last where there are any."""
        return {name: _counts(part) for name, part in self._asdict().items()}

    def line(self) -> str:
        """What went where, in words."""
        stay, held = map(_in_words, self.counts().values())
        return f"held out by prompt: {held}; for training: {stay}"


def _counts(part: Encoded) -> dict[str, int]:
    singles = int(part.single.sum())
    found = {"prompts": len(np.unique(prompts(part))), "pairs": part.num_pairs - singles}
    return found | ({"singles": singles} if singles else {})


def _in_words(counts: dict[str, int]) -> str:
    pairs, singles = counts["pairs"], counts.get("singles", 0)
    parts = [f"{pairs:,} pairs"] if pairs or not singles else []
    parts += [f"{singles:,} single completions"] if singles else []
    return f"{counts['prompts']:,} prompts ({', '.join(parts)})"


def prompts(encoded: Encoded) -> Int64[np.ndarray, " U"]:
    """A number for each unit's prompt: the same for units whose prompts have their content or their token ids in
    common, with each other or by way of further units. The least content key among them, so that no other prompt has a
    say in it."""
    groups = [np.unique(keys, return_inverse=True)[1] for keys in (encoded.content_key, encoded.ids_key)]
    found, before = encoded.content_key, None
    while before is None or (found != before).any():
        before = found
        for group in groups:
            least = np.full(group.max(initial=-1) + 1, np.iinfo(np.int64).max)
            np.minimum.at(least, group, found)
            found = least[group]
    return found


def held_out_units(encoded: Encoded, fraction: float, seed: int) -> Bool[np.ndarray, " U"]:
    """Whether a unit's prompt is held out, which it is with the chance `fraction`, by its digest with the seed."""
    numbers, places = np.unique(prompts(encoded), return_inverse=True)
    salt = seed.to_bytes(8, "little")
    digests = (hashlib.blake2b(number.tobytes(), digest_size=8, salt=salt).digest() for number in numbers)
    drawn = np.fromiter((int.from_bytes(digest, "little") / 2**64 for digest in digests), float, len(numbers))
    return (drawn < fraction)[places]


def split(encoded: Encoded, fraction: float, seed: int) -> DataSplit:
    """The data in two: about this share of the prompts, with all that was read of them, is held out.

    Raises:
      UserError: there are so few prompts that one part is empty.
    """
    held = held_out_units(encoded, fraction, seed)
    if held.all() or not held.any():
        number, (some, change) = len(np.unique(prompts(encoded))), ("all", "lower") if held.all() else ("none", "raise")
        raise UserError(
            f"data.eval_fraction: {fraction:g}: holds out {some} of the {number:,} prompts of data.train; {change} it, "
            "or name held-out data with data.eval"
        )
    return DataSplit(of_units(encoded, ~held), of_units(encoded, held))


def set_name(name: str) -> str:
    """What a held-out set is called by its setting: `data.eval`, or `data.eval.NAME`."""
    return f"data.eval.{name}" if name else "data.eval"


def shared_line(name: str, held_out: Encoded, train: Encoded) -> str | None:
    """How many prompts of held-out data are among those of the training data, in words; None where none is."""
    known = np.isin(held_out.content_key, train.content_key) | np.isin(held_out.ids_key, train.ids_key)
    if not known.any():
        return None
    numbers = prompts(held_out)
    shared, number = len(np.unique(numbers[known])), len(np.unique(numbers))
    return (
        f"{name}: {shared:,} of {number:,} prompts are also in data.train, so what is measured on them is not of "
        "prompts that the model has not seen; take them out of one of the two"
    )
