"""The folder that keeps encoded data by content: a file for each column, which is written as the rows come and, if it
is large, read where it lies, so that neither tokenising nor packing needs memory for it."""

import contextlib
import errno
import importlib.metadata
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.data.encoded import Encoded
from dpo_jax.data.ranges import DIFFER
from dpo_jax.data.report import Report, clean
from dpo_jax.data.settings import DataSettings
from dpo_jax.data.sources import SourceTable
from dpo_jax.data.templates import template_source
from dpo_jax.data.tokenizer import Tokenizer
from dpo_jax.data.units import COLUMNS, Following
from dpo_jax.errors import UserError, redacted
from dpo_jax.files import digest_of, file_digest, held, naming, sweep_unheld, sync_folder, write_whole
from dpo_jax.processes.here import Here, here

VERSION = 10
"""Part of the cache's key. Raise it with every change of this package that changes token ids, the report or a file."""
SETTINGS = ("layout", "columns", "as_chat", "max_length", "truncation", "ending", "chat_template_kwargs")
SETTINGS += ("control_tokens", "score_tool_results", "max_characters")
"""Settings that change the result. The template counts by content, sources by name and content; max_bad_fraction only
decides whether a result is accepted."""
ABOUT = "about.json"
"""The report, the names of the data's files, and the digest of each column's file."""

IN_MEMORY = 2**30
"""Bytes of a result up to which it is read into memory, where nothing that happens to its files matters any more. The
files of a larger one are mapped: processes of a host share it, and it takes as much memory as there is."""


@dataclass(frozen=True)
class Entry:
    """Where one result is kept: the folder `data-KEY`, with `COLUMN.npy` for each array and `about.json`."""

    folder: Path

    @classmethod
    def of(
        cls,
        folder: str | Path,
        sources: Sequence[SourceTable],
        tokenizer: Tokenizer,
        settings: DataSettings,
        template: str | None,
        first: int | None,
        place: Here,
    ) -> "Entry":
        """The entry for these sources, by a digest of all that the result depends on.

        Raises:
          UserError: the processes of `place` have other sources.
        """
        place.same(DIFFER, {"files of the data": [table.name for table in sources]})
        parts = {
            "version": VERSION,
            "packages": {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")},
            "sources": [(table.name, table.digest(place)) for table in sources],
            "tokenizer": _tokenizer_parts(tokenizer),
            "template": template_source(tokenizer, template) or "",
            "settings": {name: getattr(settings, name) for name in SETTINGS},
            "first": first,
        }
        key = digest_of(json.dumps(parts, sort_keys=True, default=str))[:32]
        return cls(Path(folder).expanduser() / f"data-{key}")

    def read(self, *, check: bool = True) -> tuple[Encoded, Report] | None:
        """What was kept; None when there is nothing, or when it is damaged, which is not looked for without `check`."""
        try:
            about = json.loads((self.folder / ABOUT).read_text("utf-8"))
            if about["itself"] != _digest_of_about(about):
                return None
            if check and any(_digest(self.folder / f"{name}.npy") != about["sha256"][name] for name in COLUMNS):
                return None
            encoded, report = _opened(self.folder, about["files"]), Report.from_dict(about["report"])
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            return None
        report.cache = f"read from {self.folder}"
        return encoded, report

    def write(self, parts: Iterable[Encoded], report: Report, finish: Callable[[Encoded, Report], None]) -> Encoded:
        """Keep the parts of a result as they come, and return the whole, as `read` does.

        Args:
          parts: of the whole, in their order; numbers of each begin at 0.
          report: of the rows; `cache` is said in it. It is complete when the last part has come.
          finish: writes into the report what is known of the whole.

        Raises:
          UserError: the folder cannot be written; or what making the parts raises.
        """
        damaged = os.path.lexists(self.folder)
        with self._staged(damaged) as staging:
            files, digests = self._write_columns(staging, parts)
            encoded = _opened(staging, files)
            finish(encoded, report)
            about: dict[str, Any] = {"files": files, "sha256": digests, "report": report.to_dict()}
            about = json.loads(redacted(json.dumps(about)))
            about["itself"] = _digest_of_about(about)
            with refused(self.folder.parent):
                write_whole(staging / ABOUT, json.dumps(about, indent=1))
        made = "made again, the one kept in {} was damaged" if damaged else "made, kept in {}"
        report.cache = made.format(self.folder)
        return _opened(self.folder, files)

    def staging(self) -> Path:
        """A name beside the entry that nobody has."""
        return self.folder.with_name(f".{self.folder.name}.{uuid.uuid4().hex}.tmp")

    def _write_columns(self, folder: Path, parts: Iterable[Encoded]) -> tuple[list[str], dict[str, str]]:
        """Names of the data's files, and the digest of each column's."""
        following, paths = Following(), {name: folder / f"{name}.npy" for name in COLUMNS}
        columns: dict[str, _Column] = {}
        with contextlib.ExitStack() as open_files:
            with refused(self.folder.parent):
                for name, path in paths.items():
                    columns[name] = _Column(path, COLUMNS[name])
                    open_files.callback(columns[name].close)
            for part in parts:
                with refused(self.folder.parent):
                    for name, array in following.take(part).items():
                        columns[name].add(array)
            with refused(self.folder.parent):
                for column in columns.values():
                    column.end()
        return following.files, {name: _digest(path) for name, path in paths.items()}

    @contextlib.contextmanager
    def _staged(self, damaged: bool) -> Iterator[Path]:
        """A folder that becomes the entry in one move, once all is in it. What was `damaged` before gives way; what
        another process has made in the meantime stays, and this one's goes."""
        staging, old = self.staging(), self.staging()
        try:
            with refused(self.folder.parent):
                self.folder.parent.mkdir(parents=True, exist_ok=True)
                sweep_unheld(self.folder.parent)
                staging.mkdir()
            with held(staging):
                yield staging
            with refused(self.folder.parent):
                sync_folder(staging)
                if damaged:
                    with contextlib.suppress(FileNotFoundError):
                        os.rename(self.folder, old)
                _move(staging, self.folder)
                sync_folder(self.folder.parent)
        finally:
            for left in (staging, old):
                shutil.rmtree(left, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    """Rename a folder, unless there is one of that name."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


@contextlib.contextmanager
def refused(folder: Path) -> Iterator[None]:
    """What the machine refuses to write into a cache's folder, in one line."""
    try:
        yield
    except OSError as error:
        where = clean(str(folder))
        raise UserError(f"data.cache={where}: cannot be written: {clean(str(error))}; give another") from error


class _Column:
    """A NumPy file that grows; its header, which says how long it is, has room for any length."""

    def __init__(self, path: Path, kind: np.dtype):
        self._path, self._kind, self._length = path, kind, 0
        self._file = path.open("wb")
        self._room = self._write_header()

    def add(self, array: np.ndarray) -> None:
        """Write more values behind those that are there."""
        assert array.dtype == self._kind, (array.dtype, self._kind)
        with naming(self._path):
            self._file.write(np.ascontiguousarray(array).data)
        self._length += len(array)

    def end(self) -> None:
        """Say how long it has become, and bring it down to the disk."""
        with naming(self._path):
            self._file.seek(0)
            assert self._write_header() == self._room
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let the file go, whatever has become of it."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _write_header(self) -> int:
        header = {"descr": np.lib.format.dtype_to_descr(self._kind), "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()


def _digest(path: Path) -> str:
    here().moved()  # which may take minutes
    return file_digest(path)


def _opened(folder: Path, files: Sequence[str]) -> Encoded:
    """The arrays of a folder.

    Raises:
      OSError, ValueError: one is not there, or is no array.
    """
    paths = {name: folder / f"{name}.npy" for name in COLUMNS}
    how = "r" if sum(path.stat().st_size for path in paths.values()) > IN_MEMORY else None
    columns = {name: np.load(path, mmap_mode=how, allow_pickle=False) for name, path in paths.items()}
    return Encoded(files=tuple(files), **{name: np.asarray(array) for name, array in columns.items()})


def _digest_of_about(about: dict[str, Any]) -> str:
    return digest_of(json.dumps({name: value for name, value in about.items() if name != "itself"}, sort_keys=True))


def _tokenizer_parts(tokenizer: Tokenizer) -> dict[str, Any]:
    table = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # of the last call, not of the tokenizer
        table.pop(state, None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    control = sorted(map(str, getattr(tokenizer, "chat_control_tokens", None) or ()))
    return {"class": type(tokenizer).__name__, "backend": table, "special": special, "control": control}
