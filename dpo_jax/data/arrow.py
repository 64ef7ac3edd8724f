"""Tables of Parquet and Arrow, row by row. A row is decoded where it is wanted first, which may be another process: the
one that goes through a file need not decode it, and of Parquet it need not even read it."""

import contextlib
import functools
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.data.messages import BadRow
from dpo_jax.data.report import clean
from dpo_jax.errors import UserError, one_line
from dpo_jax.files import state_of

DECODED = 256
"""Rows that are decoded together."""
SMALL = 8192
"""Rows up to which a row group of Parquet is read where its rows are wanted; a larger one is read on the way, once."""


@dataclass(eq=False)
class Part:
    """Successive rows of a table; another process gets what they are loaded from."""

    load: Callable[[], Any]
    count: int

    @functools.cached_property
    def values(self) -> list[Any]:
        """What they hold."""
        return _values(self.load())

    def __reduce__(self) -> tuple[Any, ...]:
        """Without what was decoded."""
        return Part, (self.load, self.count)


class Undecoded(NamedTuple):
    """A row of a table."""

    part: Part
    index: int

    def value(self) -> Any:
        """What it holds, or the BadRow that says why it cannot be read."""
        return self.part.values[self.index]


def rows_of(parts: Iterable[Part]) -> Iterator[Undecoded]:
    """The rows of all parts."""
    return (Undecoded(part, index) for part in parts for index in range(part.count))


def parts_of(tables: Iterable[Any]) -> Iterator[Part]:
    """Tables or record batches, each of at most DECODED rows."""
    return (Part(_Held(table), table.num_rows) for table in tables)


class _Held(NamedTuple):
    """Rows that are in memory, or in a file that is mapped."""

    table: Any

    def __call__(self) -> Any:
        return self.table

    def __reduce__(self) -> tuple[Any, ...]:
        import pyarrow

        stream = io.BytesIO()
        with pyarrow.ipc.new_stream(stream, self.table.schema) as writer:
            writer.write(self.table)
        return _received, (stream.getvalue(),)


def _received(stream: bytes) -> _Held:
    import pyarrow

    return _Held(pyarrow.ipc.open_stream(stream).read_all())


def _values(table: Any) -> list[Any]:
    """Rows of a table. Arrow does not check its texts, so one that is not UTF-8 fails here, and only its row is bad."""
    try:
        return table.to_pylist()
    except UnicodeDecodeError as error:
        if table.num_rows == 1:
            return [BadRow("invalid UTF-8", error.reason)]
        return [value for index in range(table.num_rows) for value in _values(table.slice(index, 1))]


@contextlib.contextmanager
def _readable(name: str, kind: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{clean(name)}: not {kind} file that can be read: {clean(str(error))}") from error


# ------------------------------------------------------------------------------------------------ Parquet


HUB = "hf://"
"""What an address on the Hub begins with; one with a commit, as datasets gives them, always means the same bytes."""


class _ParquetFile(NamedTuple):
    """A file of this machine or of the Hub."""

    path: str
    name: str
    """In messages."""
    state: tuple[int, int, int] | None
    """Of a file of this machine, when it was first looked at."""


def parquet_parts(path: str, name: str) -> Iterator[Part]:
    """A Parquet file of this machine or of the Hub, which goes by `name` in messages.

    Raises:
      UserError: it cannot be read; also from a part.
    """
    with _readable(name, "a Parquet"):
        file = _ParquetFile(path, name, None if path.startswith(HUB) else state_of(path))
    metadata = _metadata(file)
    for number in range(metadata.num_row_groups):
        count = metadata.row_group(number).num_rows
        if count > SMALL:
            with _opened(file, metadata) as opened:
                yield from parts_of(opened.iter_batches(DECODED, row_groups=[number]))
            continue
        group = _RowGroup(file, number)
        for start in range(0, count, DECODED):
            size = min(DECODED, count - start)
            yield Part(functools.partial(group.rows, start, size), size)


@dataclass(eq=False)
class _RowGroup:
    """A row group of a file, which is read when rows of it are wanted."""

    file: _ParquetFile
    number: int

    def rows(self, start: int, count: int) -> Any:
        """Some of its rows, as a table."""
        return self._table.slice(start, count)

    @functools.cached_property
    def _table(self) -> Any:
        with _opened(self.file, _metadata(self.file)) as opened:
            return opened.read_row_group(self.number)

    def __reduce__(self) -> tuple[Any, ...]:
        return _RowGroup, (self.file, self.number)


@functools.lru_cache(maxsize=16)
def _metadata(file: _ParquetFile) -> Any:
    """What the end of a file says of its row groups."""
    with _opened(file) as opened:
        return opened.metadata


@contextlib.contextmanager
def _opened(file: _ParquetFile, metadata: Any = None) -> Iterator[Any]:
    """An open file, of which the metadata may be known."""
    from pyarrow import parquet

    if not file.path.startswith(HUB):
        with _readable(file.name, "a Parquet"), parquet.ParquetFile(file.path, metadata=metadata) as opened:
            check_unchanged(file.path, file.name, file.state)
            yield opened
        return
    from huggingface_hub import HfFileSystem

    try:
        with HfFileSystem().open(file.path, "rb") as data, parquet.ParquetFile(data, metadata=metadata) as opened:
            yield opened
    # Network and Hub each have errors of their own; the user needs the file and the cause.
    except Exception as error:
        raise UserError(f"{clean(file.name)}: cannot be fetched: {clean(one_line(error))}; start again") from error


def check_unchanged(path: str, name: str, known: tuple[int, int, int] | None) -> None:
    """Refuse a file of another size or time than when it was first looked at; mounted buckets number files anew."""
    if known is not None and state_of(path)[:2] != known[:2]:
        raise UserError(f"{clean(name, 400)}: was changed while it was read; start again")


# ------------------------------------------------------------------------------------------------ Arrow


def arrow_parts(path: Path, name: str) -> Iterator[Part]:
    """An Arrow file of either kind: a stream (as datasets writes them) or a file with a footer.

    Raises:
      UserError: it cannot be read.
    """
    import pyarrow

    with _readable(name, "an Arrow"), pyarrow.memory_map(str(path)) as file:
        for batch in _batches(file):
            yield from parts_of(batch.slice(start, DECODED) for start in range(0, batch.num_rows, DECODED))


def _batches(file: Any) -> Iterator[Any]:
    import pyarrow

    try:
        reader = pyarrow.ipc.open_file(file)
    except pyarrow.ArrowInvalid:
        file.seek(0)
        yield from pyarrow.ipc.open_stream(file)
    else:
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)
