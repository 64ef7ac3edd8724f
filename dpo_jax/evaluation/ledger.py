"""What has been asked and answered: a file that only grows, of which a kill loses nothing that was in it."""

import contextlib
import fcntl
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.files import naming, sync_folder


class Ledger:
    """Rows of JSON, one a line, in the order in which they came; each is on the disk before `add` returns.

    A last line that was cut by a kill is taken off when the file is opened again. One process at a time may open it.
    Without a path, rows are kept in memory.
    """

    _file: io.FileIO | None = None

    def __init__(self, path: Path | None):
        """Open the file, which is made if need be.

        Raises:
          UserError: another process has it open, or a line in it is no row of JSON.
        """
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        self._file = io.FileIO(path, "a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise UserError(f"{path}: another process is writing to it; wait for its end, or stop it") from error
        try:
            self.rows = self._read(path)
        except BaseException:
            self._file.close()
            raise
        if is_new:
            sync_folder(path.parent)

    def _read(self, path: Path) -> list[dict[str, Any]]:
        assert self._file is not None
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            self._file.truncate(len(whole))
        return list(_rows(whole, path))

    def add(self, row: Mapping[str, Any]) -> None:
        """Put a row at the end.

        Raises:
          OSError: it cannot be written; the row is then not there.
        """
        if self._file is not None:
            assert self.path is not None
            with naming(self.path):
                self._write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self.rows.append(dict(row))

    def _write(self, line: bytes) -> None:
        """All of a line, or nothing."""
        assert self._file is not None
        end = self._file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise

    def close(self) -> None:
        """Let others have the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def __del__(self) -> None:
        """One that nobody closed is closed with the judge that has it."""
        self.close()

    def __enter__(self) -> "Ledger":
        """Itself."""
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close it."""
        self.close()


def _rows(data: bytes, path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: is no JSON; delete that line, or move the file away") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: is no object; delete that line, or move the file away")
        yield row
