"""Files of rows: JSON Lines and JSON arrays, packed or not, Parquet and Arrow; each row with its line.

Parquet and Arrow are known by their names. All else is looked into: it is unpacked as its first bytes say (gzip, bzip2,
xz, Zstandard), and is then an array or one value per line as its first character says, whatever its name.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import re
import shlex
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.data.arrow import Part, Undecoded, arrow_parts, parquet_parts, rows_of
from dpo_jax.data.messages import BadRow
from dpo_jax.data.report import clean
from dpo_jax.errors import UserError
from dpo_jax.files import repeated_key

BOM = b"\xef\xbb\xbf"
LINES = (".jsonl", ".ndjson")
PACKED = (".gz", ".bz2", ".xz", ".zst")
SUFFIXES = (*LINES, ".json", ".parquet", ".arrow")
"""Names of files of rows; those of JSON may have one of PACKED behind."""
TABLES = (".csv", ".tsv", ".xls", ".xlsx")


class Row(NamedTuple):
    """One row as it was read. `line` counts from 1; in Parquet, Arrow and Hub data it is the row's number plus 1."""

    file: str
    line: int
    value: object
    """What the row holds, or the BadRow that says why it cannot be read. Bytes are JSON that was not parsed yet, and an
    Undecoded is a row that was not decoded, or even read, yet."""
    notes: tuple[tuple[str, str], ...] = ()
    count: int = 1
    """Rows of the file that it is made of (see gathering.py)."""


Reader = Callable[[Path, str], Iterator[Row]]


def value_of(row: Row) -> object:
    """What a row holds, or the BadRow that says why it cannot be read."""
    value = row.value.value() if isinstance(row.value, Undecoded) else row.value
    return _parse(value) if isinstance(value, bytes) else value


def is_named_as_rows(name: str) -> bool:
    """Whether a file's name says that it holds rows: `a.jsonl`, `a.json.gz`, `a.parquet`."""
    path = Path(name.lower())
    return (Path(path.stem) if path.suffix in PACKED else path).suffix in SUFFIXES


def reader_of(path: Path, name: str) -> Reader:
    """The function that reads a file, which goes by `name` in messages.

    Raises:
      UserError: the file holds no rows of a known kind.
    """
    suffix = path.suffix.lower()
    if suffix in TABLES:
        raise UserError(f"{clean(name, 400)}: {_how_to_convert(path)}")
    if suffix in (".parquet", ".arrow"):
        return _read_parquet if suffix == ".parquet" else _read_arrow
    inner = Path(path.stem).suffix.lower() if suffix in PACKED else suffix
    if inner in LINES:
        return read_lines
    with _unpacked(path, name) as file:
        number, line = next(((n, line) for n, line in enumerate(file, 1) if line.removeprefix(BOM).strip()), (1, b""))
    line = line.removeprefix(BOM).strip()
    if line.startswith(b"["):
        return _read_array
    problem = _parse(line) if line else None
    if line.startswith(b"{") and not isinstance(problem, BadRow):
        return read_lines
    if inner == ".json" and not line:
        return read_lines  # no rows, which is said with what else the data hold
    what = f" ({problem.reason})" if isinstance(problem, BadRow) and line.startswith(b"{") else ""
    raise UserError(
        f"{clean(name, 400)}:{number}: neither a JSON array nor one JSON object per line{what}; files that can be read "
        f"are {', '.join(SUFFIXES)}; convert this one"
    )


def _how_to_convert(path: Path) -> str:
    """The command that makes rows of a table of texts without types."""
    name, into, suffix = str(path), str(path.with_suffix(".jsonl")), path.suffix.lower()
    read = "read_excel" if suffix.startswith(".xls") else "read_csv"
    tabs = r", sep='\t'" if suffix == ".tsv" else ""
    code = f"import pandas; pandas.{read}({name!r}{tabs}).to_json({into!r}, orient='records', lines=True)"
    quoted = shlex.quote(code) if set(code) & set('"$`') else f'"{code}"'
    return (
        f"a table of texts without types cannot be read; convert it: python -c {clean(quoted, 1000)}, and give {into}"
    )


# ------------------------------------------------------------------------------------------------ packed


def _unzstd(path: Path) -> io.BufferedIOBase:
    import pyarrow

    stream: Any = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    return io.BufferedReader(stream)


_OPENERS: tuple[tuple[bytes, Callable[[Path], Any]], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ\0", lzma.open),
    (b"\x28\xb5\x2f\xfd", _unzstd),
)
"""The first bytes of packed files, and what unpacks them."""


def _opener(path: Path) -> Callable[[Path], Any] | None:
    """What unpacks a file, by its first bytes."""
    with path.open("rb") as file:
        start = file.read(8)
    return next((opener for magic, opener in _OPENERS if start.startswith(magic)), None)


def are_plain_lines(path: Path, reader: Reader) -> bool:
    """Whether a file's lines, which that reader reads, are lines of the file as it lies there."""
    with path.open("rb") as file:
        return reader is read_lines and not file.read(len(BOM)).startswith(BOM) and _opener(path) is None


@contextlib.contextmanager
def _unpacked(path: Path, name: str) -> Iterator[io.BufferedIOBase]:
    """The bytes of a file, unpacked if its first bytes are those of a packed one."""
    if (opener := _opener(path)) is None:
        with path.open("rb") as file:
            yield file
        return
    try:
        with opener(path) as file:
            yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(
            f"{clean(name, 400)}: cannot be unpacked ({clean(str(error))}); fetch the file again"
        ) from error


# ------------------------------------------------------------------------------------------------ JSON


def read_lines(path: Path, name: str) -> Iterator[Row]:
    """JSON Lines: one value per line; empty lines are skipped, CR LF and a byte-order mark are tolerated."""
    with _unpacked(path, name) as file:
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
        return BadRow("not JSON", f"{error.msg.removesuffix(' at')} at character {error.colno}")
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
    with _unpacked(path, name) as file:
        data = file.read()
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
        raise UserError(f"{clean(name)}:{line}: not a JSON array")
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
        raise UserError(
            f"{where}: not JSON: {error.msg.removesuffix(' at')} (line {error.lineno}); correct the file"
        ) from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{where}: an element cannot be read ({clean(str(error))}); correct the file") from None


# ------------------------------------------------------------------------------------------------ tables


def _read_parquet(path: Path, name: str) -> Iterator[Row]:
    return table_rows(parquet_parts(str(path), name), name)


def _read_arrow(path: Path, name: str) -> Iterator[Row]:
    return table_rows(arrow_parts(path, name), name)


def table_rows(parts: Iterable[Part], name: str) -> Iterator[Row]:
    """The rows of a table, numbered from 1."""
    return (Row(name, number, value) for number, value in enumerate(rows_of(parts), 1))
