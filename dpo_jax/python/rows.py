"""Rows that are in memory, kept as a file: what is trained on has a name, and the same run can be had again.

The file lies in the run's folder and is called after its content: `rows/train-0f3a….jsonl`. So a run over rows is the
run over that file, from Python and from the command line: it goes on where it stopped, its messages name a row by file
and line, and nothing of the way from rows to tokens is another.
"""

import contextlib
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


def keep(rows: object, folder: Path, what: str, left: dict[str, str] | None = None) -> Path:
    """Write rows as JSON Lines into a folder, and return the file. What JSON does not have, such as a date, is left out
    of its row, as most columns are read by nobody.

    Args:
      rows: mappings from column to value: dicts, a `datasets.Dataset`, an iterator, which is read once; or lists or
        arrays by column, as `Dataset.from_dict` takes them.
      folder: where to; it is made if need be.
      what: how the file's name begins, and what the messages say that the rows are.
      left: is told of each column that was left out somewhere, with the first row and what it had (see `explained`).

    Raises:
      UserError: a row is no mapping, or nothing is left of it; or there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary, digest, count = folder / f".{what}.{uuid.uuid4().hex}.tmp", hashlib.sha256(), 0
    try:
        with naming(temporary), temporary.open("wb") as file:
            for line in _lines(rows, what, {} if left is None else left):
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


@contextlib.contextmanager
def explained(left: Mapping[str, str]) -> Iterator[None]:
    """An error about a column that `keep` has left out says so."""
    try:
        yield
    except UserError as error:
        text = str(error)
        said = [f"{place} {why}" for place, why in left.items() if "fit no layout" in text or _misses(text, place)]
        if said:
            error.args = (f"{text}; left out as JSON has no such value: {'; '.join(said)}", *error.args[1:])
        raise


def _misses(text: str, place: str) -> bool:
    """Whether a message is about this column, or this part of one, not being there."""
    outer, _, _ = place.rpartition(".")
    return f"no {place!r} " in text or bool(outer and f"{outer} has no " in text)


def _lines(rows: object, what: str, left: dict[str, str]) -> Iterator[bytes]:
    for number, row in enumerate(_each(rows, what), 1):
        if not isinstance(row, Mapping):
            raise UserError(
                f"{what}: row {number} is of type {type(row).__name__}, not a dict of columns such as "
                '{"prompt": ..., "chosen": ..., "rejected": ...}; of a DataFrame give frame.to_dict("records")'
            )
        row = dict(row)
        try:
            text = json.dumps(row, ensure_ascii=False, default=_plain)
        except (TypeError, ValueError, RecursionError) as error:
            try:
                row, lost = _held_of(row, "")
            except RecursionError:  # it holds itself
                row, lost = {}, {}
            if not row:
                raise UserError(f"{what}: row {number} cannot be written as JSON ({short(one_line(error))})") from error
            for place, kind in lost.items():
                left.setdefault(place, f"(first in row {number}, of type {kind})")
            text = json.dumps(row, ensure_ascii=False)
        try:
            yield text.encode() + b"\n"
        except UnicodeEncodeError:  # half of a character, which the reader will name by its line
            yield json.dumps(row, default=_plain).encode() + b"\n"


class _Unheld(Exception):
    """JSON has no value of this type."""


def _held_of(table: Mapping[Any, Any], inside: str) -> tuple[dict[Any, Any], dict[str, str]]:
    """What JSON can hold of a mapping, and the type of each thing that was left out by its place."""
    held: dict[Any, Any] = {}
    lost: dict[str, str] = {}
    for name, value in table.items():
        place = f"{inside}.{name}" if inside else str(name)
        if not isinstance(name, str | int | float | bool | None):
            lost[place] = f"{type(name).__name__}, which names no column"
            continue
        try:
            held[name] = _held(value, place, lost)
        except _Unheld as error:
            lost[place] = str(error)
    return held, lost


def _held(value: object, place: str, lost: dict[str, str]) -> Any:
    """A value as JSON can hold it; a list with what it cannot hold is left out whole.

    Raises:
      _Unheld: it cannot.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        held, inner = _held_of(value, place)
        lost |= inner
        return held
    if isinstance(value, list | tuple):
        return [_held(item, f"{place}[{index}]", lost) for index, item in enumerate(value)]
    if (listed := getattr(value, "tolist", None)) is None:
        raise _Unheld(type(value).__name__)
    return _held(listed(), place, lost)


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
    """Rows of lists by column, as `Dataset.from_dict` takes them, or of arrays."""
    columns = {name: getattr(values, "tolist", lambda values=values: values)() for name, values in columns.items()}
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
