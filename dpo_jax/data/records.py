"""Rows from JSON Lines, JSON arrays, Parquet, Arrow, saved data sets and the Hub, each with its file and line.

A source is a file, a folder of such files, a folder that `datasets` saved (`FOLDER[:SPLIT]`), or a data set of the Hub:
`NAME`, `NAME:SPLIT` or `NAME:CONFIGURATION:SPLIT` (SPLIT is `train` unless given, and may be a slice: `train[:100]`).
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.data.layouts import LAYOUTS, Record, RowLayout, detect, to_record, unused_columns
from dpo_jax.data.messages import BadRow, texts_of
from dpo_jax.data.report import Report, clean
from dpo_jax.errors import UserError, nearest
from dpo_jax.files import file_digest, repeated_key

BOM = b"\xef\xbb\xbf"
_CONTROL = re.compile(r"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]")
_BIDIRECTIONAL = re.compile("[\u202a-\u202e\u2066-\u2069]")
_HUB = re.compile(
    r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<configuration>[\w.+-]+)(?=:))?(?::(?P<split>[\w.\[\]:%+-]+))?"
)


class Row(NamedTuple):
    """One row as it was read. `line` counts from 1; in Parquet, Arrow and Hub data it is the row's number plus 1."""

    file: str
    line: int
    value: object
    """What the row holds, or the BadRow that says why it cannot be read; bytes are JSON that was not parsed yet."""
    notes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class SourceTable:
    """A file or data set that is ready to be read."""

    name: str
    digest: Callable[[], str]
    rows: Callable[[], Iterator[Row]]


def tables(sources: str | Sequence[str]) -> list[SourceTable]:
    """What the sources name, opened in order.

    Raises:
      UserError: a source is neither a file, a folder nor a data set of the Hub.
    """
    return [table for source in ([sources] if isinstance(sources, str) else sources) for table in _open(source)]


def read_rows(source: str) -> Iterator[Row]:
    """All rows of a source, good and bad."""
    for table in tables(source):
        yield from (row._replace(value=value_of(row)) for row in table.rows())


def value_of(row: Row) -> object:
    """What a row holds, or the BadRow that says why it cannot be read."""
    return _parse(row.value) if isinstance(row.value, bytes) else row.value


def _open(source: str) -> list[SourceTable]:
    path = Path(source).expanduser()
    if path.is_file():
        return [_file(path, source)]
    if path.is_dir():
        return _folder(path, source, None)
    folder, colon, split = source.rpartition(":")
    if colon and Path(folder).expanduser().is_dir():
        return _folder(Path(folder).expanduser(), source, split)
    found = _HUB.fullmatch(source)
    if not found or path.suffix in READERS or source.startswith((".", "~")):
        raise UserError(f"{clean(source)}: no such file or folder{_near(path)}")
    return [_hub(source, found["name"], found["configuration"], found["split"] or "train")]


def _near(path: Path) -> str:
    """A file beside the missing one whose name is like it."""
    try:
        names = sorted(entry.name for entry in path.parent.iterdir())
    except OSError:
        return ""
    close = nearest(path.name, names)
    return f"; did you mean {clean(str(path.parent / close))}?" if close else ""


def _file(path: Path, name: str) -> SourceTable:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{clean(name)}: files that can be read are {', '.join(READERS)}; unpack or convert this one")
    return SourceTable(name, lambda: file_digest(path), lambda: reader(path, name))


def _folder(path: Path, source: str, split: str | None) -> list[SourceTable]:
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return [_saved(path, source, split)]
    if split is not None:
        raise UserError(f"{clean(source)}: {clean(str(path))} was not saved by datasets, so it has no splits")
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in READERS and file.is_file())
    if not files:
        raise UserError(f"{clean(source)}: the folder holds no {', '.join(READERS)} file; name the right folder")
    return [_file(file, str(file)) for file in files]


def _saved(path: Path, source: str, split: str | None) -> SourceTable:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    # datasets raises whatever its readers raise; to the user all of it means that the folder cannot be read.
    except Exception as error:
        raise UserError(f"{clean(source)}: not a folder that datasets can read: {clean(str(error))}") from error
    if isinstance(found, datasets.Dataset):
        return _dataset(found, source)
    if (split or "train") not in found:
        raise UserError(
            f"{clean(source)}: no split {clean(split or 'train')!r}; give one of {', '.join(map(str, found))}"
        )
    return _dataset(found[split or "train"], source)


def _hub(source: str, name: str, configuration: str | None, split: str) -> SourceTable:
    import datasets

    try:
        found = datasets.load_dataset(name, configuration, split=split)
    # Network, Hub and parser each have errors of their own; the user needs the source and the cause.
    except Exception as error:
        cause = clean((str(error).splitlines() or [type(error).__name__])[0])
        raise UserError(
            f"{clean(source)}: no such file, and not a data set that the Hub gives: {cause}{_near(Path(source))}"
        ) from error
    return _dataset(found, source)


def _dataset(found: Any, name: str) -> SourceTable:
    fingerprint = found._fingerprint
    return SourceTable(name, lambda: fingerprint, lambda: _arrow_rows(found.with_format("arrow").iter(1000), name))


# ------------------------------------------------------------------------------------------------ formats


def _read_lines(path: Path, name: str) -> Iterator[Row]:
    """JSON Lines: one value per line; empty lines are skipped, CR LF and a byte-order mark are tolerated."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            marked = number == 1 and line.startswith(BOM)
            line = line.removeprefix(BOM) if marked else line
            if line.strip():
                yield Row(name, number, line, _BOM_NOTE if marked else ())


_BOM_NOTE = (("byte-order mark", "the file begins with one; it was removed"),)


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        return BadRow("invalid UTF-8", f"byte {error.start + 1} of the line: {error.reason}")
    except json.JSONDecodeError as error:
        return BadRow("not JSON", f"{error.msg} at character {error.colno}")
    except RecursionError:
        return BadRow("nested too deep", "brackets inside brackets, more than a row can need")
    except ValueError as error:  # a number of thousands of digits
        return BadRow("not JSON", str(error))
    except BadRow as error:
        return error


def _no_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
    if (twice := repeated_key(items)) is not None:
        raise BadRow("duplicate key", f"{twice!r} is given more than once")
    return dict(items)


def _no_constant(name: str) -> Any:
    raise BadRow("not JSON", f"{name} is not a JSON number")


def _read_array(path: Path, name: str) -> Iterator[Row]:
    """A JSON array, element by element; `line` is the line on which an element begins."""
    data = path.read_bytes()
    try:
        text = data.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{clean(name)}:{line}: invalid UTF-8 ({error.reason}); save the file as UTF-8") from None
    notes = _BOM_NOTE if data.startswith(BOM) else ()
    for position, value in _elements(text, name):
        yield Row(name, position, value, notes)
        notes = ()


_SPACE = re.compile(r"[ \t\r\n]*")


def _elements(text: str, name: str) -> Iterator[tuple[int, Any]]:
    """Line and value of each element. The next element cannot be found after one that is not JSON, so that ends it."""
    at, line = _skip(text, 0), 1 + text.count("\n", 0, _skip(text, 0))
    if text[at : at + 1] != "[":
        raise UserError(f"{clean(name)}:{line}: not a JSON array; a file of one JSON object per line is named .jsonl")
    after, closing = at + 1, True
    while True:
        start = _skip(text, after)
        line += text.count("\n", at, start)
        at = start
        if text[start : start + 1] == "]" and closing:
            break
        value, end = _element(text, start, f"{clean(name)}:{line}")
        yield line, value
        after = _skip(text, end)
        closing = text[after : after + 1] == "]"
        if not closing and text[after : after + 1] != ",":
            where = line + text.count("\n", start, after)
            raise UserError(
                f"{clean(name)}:{where}: not JSON: expected a comma or ] after an element; correct the file"
            )
        after += not closing
    if rest := text[at + 1 :].strip():
        raise UserError(f"{clean(name)}:{line}: not JSON: {clean(rest, 20)!r} after the array; correct the file")


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


_STRICT = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
_LENIENT = json.JSONDecoder()


def _element(text: str, start: int, where: str) -> tuple[Any, int]:
    try:
        return _STRICT.raw_decode(text, start)
    except BadRow as error:
        return error, _LENIENT.raw_decode(text, start)[1]
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error.msg} (line {error.lineno}); correct the file") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{where}: an element cannot be read ({clean(str(error))}); correct the file") from None


def _read_parquet(path: Path, name: str) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield from _arrow_rows(file.iter_batches(1000), name)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{clean(name)}: not a Parquet file that can be read: {clean(str(error))}") from error


def _read_arrow(path: Path, name: str) -> Iterator[Row]:
    """An Arrow file of either kind: a stream (as datasets writes them) or a file with a footer."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as file:
            yield from _arrow_rows(_arrow_batches(file), name)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{clean(name)}: not an Arrow file that can be read: {clean(str(error))}") from error


def _arrow_batches(file: Any) -> Iterator[Any]:
    import pyarrow

    try:
        reader = pyarrow.ipc.open_file(file)
    except pyarrow.ArrowInvalid:
        file.seek(0)
        yield from pyarrow.ipc.open_stream(file)
    else:
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)


def _arrow_rows(batches: Iterable[Any], name: str) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for value in _values(batch):
            number += 1
            yield Row(name, number, value)


def _values(batch: Any) -> list[Any]:
    """Rows of a batch. Arrow does not check its texts, so one that is not UTF-8 fails here, and only its row is bad."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [BadRow("invalid UTF-8", error.reason)]
        return [value for index in range(batch.num_rows) for value in _values(batch.slice(index, 1))]


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_array,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}

# ------------------------------------------------------------------------------------------------ records


class Stretch(NamedTuple):
    """Successive rows of one file, and the name of their layout; None where no row so far had one."""

    layout: str | None
    rows: list[Row]


def stretches(
    sources: Iterable[SourceTable], *, layout: str, first: int | None, report: Report, size: int
) -> Iterator[Stretch]:
    """All rows, up to `size` of a file at a time; each is counted in the report when it is read.

    With layout "auto", the first row of a file whose columns fit a layout decides for the whole file.

    Args:
      sources: files and data sets, in order.
      layout: one of LAYOUTS, or "auto".
      first: read no more rows than this.
      report: where rows and files are counted.
      size: rows of a stretch.
    """
    for table in sources:
        about = report.files.setdefault(table.name, {"layout": None, "rows": 0, "unused": []})
        found = None if layout == "auto" else layout
        about["layout"], rows = found, []
        for row in table.rows():
            if first is not None and report.rows >= first:
                break
            report.rows += 1
            about["rows"] += 1
            known = found
            if about["rows"] == 1 or found is None:
                found = _look(row, found, about)
            if rows and (len(rows) == size or found != known):
                yield Stretch(known, rows)
                rows = []
            rows.append(row)
        if rows:
            yield Stretch(found, rows)
        if first is not None and report.rows >= first:
            return


def _look(row: Row, found: str | None, about: dict[str, Any]) -> str | None:
    """The layout of a row, with what is to be said about its file; `found` where the row tells nothing."""
    try:
        value = _object(value_of(row))
        layout = LAYOUTS[found] if found else detect(value)
        about.update(layout=layout.name, unused=unused_columns(value, layout))
        return layout.name
    except (BadRow, RecursionError):
        return found


def read_record(row: Row, layout: str | None, max_characters: int) -> Record | BadRow:
    """A row in normal form, or why it is of no use.

    Args:
      row: one of a stretch.
      layout: of the stretch.
      max_characters: longest text of a prompt with one completion; a longer row is bad, before it costs any work.
    """
    try:
        value = _object(value_of(row))
        return _checked(row, value, LAYOUTS[layout] if layout else detect(value), max_characters)
    except BadRow as error:
        return error
    except RecursionError:
        return BadRow("nested too deep", "objects inside objects")


def _object(value: object) -> dict[str, Any]:
    if isinstance(value, BadRow):
        raise value
    if not isinstance(value, dict):
        raise BadRow("not an object", f"a row is {clean(json.dumps(value), 40)}, not an object with columns")
    return value


def _checked(row: Row, value: dict[str, Any], layout: RowLayout, max_characters: int) -> Record:
    """The row in normal form, when its texts are such that a tokenizer can take them."""
    record = to_record(value, layout, file=row.file, line=row.line)
    sizes = [sum(map(len, texts_of(part))) for part in (record.prompt, *record.completions)]
    if (most := sizes[0] + max(sizes[1:])) > max_characters:
        raise BadRow("too many characters", f"{most:,} characters, at most {max_characters:,} (data.max_characters)")
    parts = (record.prompt, record.completions, record.tools, record.chat_template_kwargs)
    notes = text_notes([text for part in parts for text in texts_of(part)])
    return record if not notes else _with_notes(record, notes)


def _with_notes(record: Record, notes: tuple[tuple[str, str], ...]) -> Record:
    return Record(**{**record.__dict__, "notes": record.notes + notes})


def text_notes(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """What is unusual about texts that can be used.

    Raises:
      BadRow: a text holds what no tokenizer takes: a lone surrogate, or a NUL.
    """
    found: dict[str, str] = {}
    for text in texts:
        if "\0" in text:
            raise BadRow("NUL character", f"at character {text.index(chr(0)) + 1} of a text")
        if not text.isascii():
            _encodable(text)
            if match := _BIDIRECTIONAL.search(text):
                found["bidirectional controls"] = f"U+{ord(match[0]):04X} changes the order of what is shown"
        if match := _CONTROL.search(text):
            found["control characters"] = f"U+{ord(match[0]):04X} in a text"
    return tuple(found.items())


def _encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("lone surrogate", f"\\u{ord(text[error.start]):04x} at character {error.start + 1}") from None
