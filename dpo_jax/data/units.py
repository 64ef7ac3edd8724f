"""Units, which are records in token ids, and the arrays that they are put together to."""

import hashlib
import json
from collections.abc import Sequence
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
        self.scored: list[np.ndarray] = []
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
        self.scored.append(np.ones(len(ids), bool))
        for start, end in unscored:
            self.scored[-1][start:end] = False
        self.size += len(ids)
        return self.size - len(ids)

    def build(self) -> Encoded:
        """The arrays, without ranks."""
        columns = {name: np.asarray(values, _DTYPES.get(name, np.int32)) for name, values in self.columns.items()}
        tokens = np.concatenate(self.tokens) if self.tokens else np.zeros(0, np.int32)
        scored = np.concatenate(self.scored) if self.scored else np.zeros(0, bool)
        unranked = np.zeros(len(columns["completion_unit"]), np.int32)
        files = (self.file,) if self.tokens else ()
        return Encoded(tokens=tokens, scored=scored, files=files, rank=unranked, **columns)


_WHOLE = ("tokens", "scored", "files", "rank")
_DTYPES = {
    "scored": np.bool_,
    "prompt_start": np.int64,
    "completion_start": np.int64,
    "content_key": np.int64,
    "ids_key": np.int64,
    "weight": np.float32,
    "margin": np.float32,
    "label": np.float32,
    "truncated": np.bool_,
}
_COUNTED = {
    "prompt_start": "tokens",
    "completion_start": "tokens",
    "completion_unit": "prompt_start",
    "pair_unit": "prompt_start",
    "chosen": "completion_start",
    "rejected": "completion_start",
}
"""Columns that are places in another one, and that one."""


def joined(parts: Sequence[Encoded]) -> Encoded:
    """The data of all parts, one after another, with ranks."""
    files = tuple(dict.fromkeys(file for part in parts for file in part.files))
    columns: dict[str, np.ndarray] = {}
    for name in (field.name for field in fields(Encoded) if field.name != "files"):
        arrays = [getattr(part, name) for part in parts] or [np.zeros(0, _DTYPES.get(name, np.int32))]
        columns[name] = np.concatenate(arrays)
        if of := _COUNTED.get(name):
            sizes = [len(getattr(part, of)) for part in parts]
            before = np.cumsum([0, *sizes[:-1]], dtype=columns[name].dtype)
            columns[name] += np.repeat(before[: len(parts)], [len(array) for array in arrays][: len(parts)])
    numbers = [files.index(part.files[0]) if part.files else 0 for part in parts]
    columns["file"] += np.repeat(np.asarray(numbers, np.int32), [part.num_units for part in parts])
    encoded = Encoded(files=files, **columns)
    return replace(encoded, rank=ranks(encoded))
