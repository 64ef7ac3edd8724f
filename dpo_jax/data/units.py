"""Units, which are records in token ids, and the arrays that they are put together to."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from dpo_jax.data.encoded import Encoded
from dpo_jax.data.examples import ranks
from dpo_jax.data.layouts import Pair
from dpo_jax.data.messages import Part
from dpo_jax.data.truncation import Cut


@dataclass(frozen=True)
class Unit:
    """A record in token ids, before truncation."""

    prompt: list[int]
    completions: list[list[int]]
    unscored: list[list[tuple[int, int]]]
    pairs: tuple[Pair, ...]
    file: str
    line: int
    keys: tuple[int, int]
    """As of `prompt_keys`."""
    head: int = 0
    """Tokens at the prompt's beginning (BOS) that keep_completion leaves there."""
    gone: int = 0
    """Tokens before the prompt that whole turns were and beginnings of turns: cut already, and kept for a preview."""
    turns: int = 0
    """How many messages they were, of those that went whole."""

    def with_pairs(self, pairs: Sequence[Pair]) -> "Unit":
        """The unit with these of its pairs, and the completions that they need."""
        used = sorted({index for pair in pairs for index in (pair.chosen, pair.rejected)})
        again = [pair._replace(chosen=used.index(pair.chosen), rejected=used.index(pair.rejected)) for pair in pairs]
        completions, unscored = ([part[index] for index in used] for part in (self.completions, self.unscored))
        return replace(self, completions=completions, unscored=unscored, pairs=tuple(again))


def prompt_keys(prompt: Part, ids: Sequence[int]) -> tuple[int, int]:
    """Digests (int64) of a prompt as its row has it, and of its token ids before any is cut: two rows with either in
    common ask the same. The ids alone do not tell: of a text, the last token of a prompt may reach into the answer."""
    text = json.dumps(prompt, sort_keys=True, separators=(",", ":"))
    return _key(text.encode()), _key(np.asarray(ids, np.int32).tobytes())


def _key(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


class Builder:
    """Grows the arrays of an `Encoded` of one file, unit by unit."""

    def __init__(self, file: str):
        """Nothing is there yet."""
        self.file = file
        self.tokens: list[np.ndarray] = []
        self.size = 0
        self.columns: dict[str, list] = {field.name: [] for field in fields(Encoded) if field.name not in _WHOLE}

    def add(self, unit: Unit, cut: Cut) -> None:
        """Append a unit: the prompt, then each completion."""
        into, number = self.columns, len(self.columns["prompt_start"])
        first = len(into["completion_start"])
        prompt = {"prompt_start": self._append(unit.prompt), "prompt_length": len(unit.prompt)}
        content, ids = unit.keys
        self._row(**prompt, file=0, line=unit.line, content_key=content, ids_key=ids)
        for ids, unscored, skip, start, length in zip(unit.completions, unit.unscored, *cut, strict=True):
            self._row(
                completion_unit=number,
                completion_start=self._append(ids, unscored) + start,
                completion_length=length,
                completion_skip=skip,
                truncated=bool(skip) or length < len(ids),
            )
        for pair in unit.pairs:
            where = {"chosen": first + pair.chosen, "rejected": first + pair.rejected}
            self._row(pair_unit=number, **where, weight=pair.weight, margin=pair.margin, label=pair.label)

    def _row(self, **values: object) -> None:
        for name, value in values.items():
            self.columns[name].append(value)

    def _append(self, ids: list[int], unscored: Sequence[tuple[int, int]] = ()) -> int:
        self.tokens.append(np.asarray(ids, np.int32))
        for start, end in _apart(unscored, len(ids)):
            self._row(unscored_start=self.size + start, unscored_end=self.size + end)
        self.size += len(ids)
        return self.size - len(ids)

    def build(self) -> Encoded:
        """The arrays."""
        columns = {name: np.asarray(values, COLUMNS[name]) for name, values in self.columns.items()}
        tokens = np.concatenate(self.tokens) if self.tokens else np.zeros(0, np.int32)
        unranked = np.zeros(len(columns["completion_unit"]), np.int32)
        files = (self.file,) if self.tokens else ()
        encoded = Encoded(tokens=tokens, files=files, rank=unranked, **columns)
        return replace(encoded, rank=ranks(encoded))


def _apart(ranges: Iterable[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """The same tokens of a text of that length in as few spans as there can be, in their order."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if found and start <= found[-1][1]:
            start, end = found[-1][0], max(end, found.pop()[1])
        if start < min(end, length):
            found.append((start, min(end, length)))
    return found


_WHOLE = ("tokens", "files", "rank")
_KINDS = {
    "unscored_start": np.int64,
    "unscored_end": np.int64,
    "prompt_start": np.int64,
    "completion_start": np.int64,
    "content_key": np.int64,
    "ids_key": np.int64,
    "weight": np.float32,
    "margin": np.float32,
    "label": np.float32,
    "truncated": np.bool_,
}
COLUMNS: dict[str, np.dtype] = {
    field.name: np.dtype(_KINDS.get(field.name, np.int32)) for field in fields(Encoded) if field.name != "files"
}
"""The arrays of an `Encoded`, and what each holds."""
_COUNTED = {
    "unscored_start": "tokens",
    "unscored_end": "tokens",
    "prompt_start": "tokens",
    "completion_start": "tokens",
    "completion_unit": "prompt_start",
    "pair_unit": "prompt_start",
    "chosen": "completion_start",
    "rejected": "completion_start",
}
"""Columns that are places in another one, and that one."""


class Following:
    """Makes the columns of one part after another those of a whole: what is counted from a part's beginning is counted
    from the whole's."""

    def __init__(self):
        """No part has come yet."""
        self.files: list[str] = []
        self._before = dict.fromkeys(_COUNTED.values(), 0)

    def take(self, part: Encoded) -> dict[str, np.ndarray]:
        """The columns of the next part, behind those that were taken."""
        self.files += [file for file in part.files if file not in self.files]
        columns = {name: getattr(part, name) for name in COLUMNS}
        for name, of in _COUNTED.items():
            columns[name] = columns[name] + np.asarray(self._before[of], columns[name].dtype)
        number = self.files.index(part.files[0]) if part.files else 0
        columns["file"] = columns["file"] + np.int32(number)
        for name in self._before:
            self._before[name] += len(columns[name])
        return columns


def joined(parts: Iterable[Encoded]) -> Encoded:
    """The data of all parts, one after another, in memory."""
    following = Following()
    taken = [following.take(part) for part in parts]
    columns = {name: [part[name] for part in taken] or [np.zeros(0, kind)] for name, kind in COLUMNS.items()}
    return Encoded(files=tuple(following.files), **{name: np.concatenate(arrays) for name, arrays in columns.items()})
