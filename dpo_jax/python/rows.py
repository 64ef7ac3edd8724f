"""Rows that are in memory, kept as a file: what is trained on has a name, and the same run can be had again.

The file lies in the run's folder and is called after its content: `rows/train-0f3a….jsonl`. So a run over rows is the
run over that file, from Python and from the command line: it goes on where it stopped, its messages name a row by file
and line, and nothing of the way from rows to tokens is another.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpo_jax.errors import UserError, one_line, short
from dpo_jax.files import naming, sync_folder

DIGITS = 16
"""Of the digest in a file's name."""


def are_rows(source: object) -> bool:
    """Whether this is rows, and not a path, or several, or nothing that either could be."""
    if source is None or isinstance(source, str | os.PathLike | bool | int | float):
        return False
    named = isinstance(source, list | tuple) and all(isinstance(item, str | os.PathLike) for item in source)
    return not (named and source)


def keep(rows: object, folder: Path, what: str) -> Path:
    """Write rows as JSON Lines into a folder, and return the file.

    Args:
      rows: mappings from column to value: dicts, a `datasets.Dataset`, an iterator, which is read once; or lists by
        column, as `Dataset.from_dict` takes them.
      folder: where to; it is made if need be.
      what: how the file's name begins, and what the messages say that the rows are.

    Raises:
      UserError: a row is no mapping, or holds what JSON does not have; or there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary, digest, count = folder / f".{what}.{uuid.uuid4().hex}.tmp", hashlib.sha256(), 0
    try:
        with naming(temporary), temporary.open("wb") as file:
            for line in _lines(rows, what):
                digest.update(line)
                file.write(line)
                count += 1
            file.flush()
            os.fsync(file.fileno())
        if not count:
            raise UserError(f"{what}: holds no row; give at least one")
        path = folder / f"{what}-{digest.hexdigest()[:DIGITS]}.jsonl"
        os.replace(temporary, path)
        sync_folder(folder)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _lines(rows: object, what: str) -> Iterator[bytes]:
    for number, row in enumerate(_each(rows, what), 1):
        if not isinstance(row, Mapping):
            raise UserError(
                f"{what}: row {number} is of type {type(row).__name__}, not a dict of columns such as "
                '{"prompt": ..., "chosen": ..., "rejected": ...}; of a DataFrame give frame.to_dict("records")'
            )
        try:
            text = json.dumps(dict(row), ensure_ascii=False, default=_plain)
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{what}: row {number} cannot be written as JSON ({short(one_line(error))})") from error
        try:
            yield text.encode() + b"\n"
        except UnicodeEncodeError:  # half of a character, which the reader will name by its line
            yield json.dumps(dict(row), default=_plain).encode() + b"\n"


def _each(rows: Any, what: str) -> Iterator[Any]:
    if isinstance(rows, Mapping):
        return _of_columns(rows, what)
    try:
        return iter(rows)
    except TypeError:
        raise UserError(
            f"{what}: is of type {type(rows).__name__}; give a path, or rows: dicts, a datasets.Dataset, an iterator"
        ) from None


def _of_columns(columns: Mapping[str, Any], what: str) -> Iterator[dict[str, Any]]:
    """Rows of lists by column, as `Dataset.from_dict` takes them."""
    lengths = {name: len(values) if isinstance(values, list | tuple) else None for name, values in columns.items()}
    if None in lengths.values():
        raise UserError(
            f"{what}: is a {type(columns).__name__} whose {short(next(iter(columns)))!r} is no list; give rows, lists "
            "by column, or of a DatasetDict one of its splits"
        )
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise UserError(f"{what}: columns must be of the same length: {short(said)}")
    return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def _plain(value: object) -> Any:
    """Arrays of NumPy, JAX and PyTorch as lists, and their numbers as numbers; a conversation's mapping as a dict."""
    if isinstance(value, Mapping):
        return dict(value)
    if (listed := getattr(value, "tolist", None)) is None:
        raise TypeError(f"{type(value).__name__} is neither text, a number, a list nor a dict")
    return listed()
