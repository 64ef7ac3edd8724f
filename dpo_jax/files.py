"""Files written whole or not at all, their digests, JSON without repeated keys, and sizes in words."""

import hashlib
import os
import uuid
from pathlib import Path
from typing import Any

GIB = 2**30


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file whole or not at all, down to the disk, even when several processes write it at once.

    Raises:
      OSError: it cannot be written. What stood there is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder down to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(data: bytes | str) -> str:
    """SHA-256 of bytes or of a text in UTF-8, in hexadecimal."""
    return hashlib.sha256(data.encode("utf-8") if isinstance(data, str) else data).hexdigest()


def repeated_key(pairs: list[tuple[str, Any]]) -> str | None:
    """The first key that a JSON object has twice, if any; for an `object_pairs_hook`, as `dict` keeps the last one."""
    seen: set[str] = set()
    return next((key for key, _ in pairs if key in seen or seen.add(key)), None)


UNITS = ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def size_text(count: int | float) -> str:
    """Bytes as GiB; below a tenth of one as MiB, and below a tenth of that as KiB.

    >>> size_text(3 * 2**30), size_text(2**20)
    ('3.00 GiB', '1.00 MiB')
    """
    unit, name = next((unit, name) for unit, name in UNITS if count >= unit / 10 or unit == UNITS[-1][0])
    return f"{count / unit:,.2f} {name}"
