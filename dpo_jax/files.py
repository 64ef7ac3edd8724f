"""Files written whole or not at all, their digests, JSON without repeated keys, and sizes in words."""

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dpo_jax.errors import UserError

GIB = 2**30
LOCK = ".lock"
"""The file of a folder by which a process holds it."""
LEFT_OVER = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
"""Names of files before they are moved into place."""

REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room within the quota",
    errno.EFBIG: "choose a file system that takes larger files",
    errno.EIO: "check the disk",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "correct its permissions",
    errno.EPERM: "correct its permissions",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "put it back, or choose another folder",
    errno.ENOTDIR: "choose a folder that is not below a file",
    errno.EISDIR: "move the folder of this name away",
    errno.EEXIST: "move what is there away",
    errno.ENOTEMPTY: "move the folder of this name away",
    errno.ELOOP: "correct the link",
    errno.ESTALE: "mount the file system again",
    errno.EMFILE: "allow more open files (ulimit -n)",
}
"""What to do about what a machine refuses to do with a file."""


def configs_folder() -> Path:
    """`configs/`, with recipes and templates: inside the installed package, or beside the package in a checkout."""
    here = Path(__file__).resolve().parent
    installed = here / "configs"
    return installed if installed.is_dir() else here.parent / "configs"


def refusal(error: OSError) -> str | None:
    """The line that a user gets for an error of the machine and not of the program; None for any other."""
    if error.errno not in REMEDIES:
        return None
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    return f"{where}{error.strerror}; {REMEDIES[error.errno]}, then run the same command again"


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in errors that do not, such as those of writing: `[Errno 28] No space left on device: 'FILE'`."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file whole or not at all, down to the disk, even when several processes write it at once.

    Raises:
      OSError: it cannot be written. What stood there is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with naming(path):
            with temporary.open("wb") as file:
                file.write(data.encode("utf-8") if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # the folder itself may be gone
            temporary.unlink()


class Holder(NamedTuple):
    """The process that holds a folder, or did when it was killed; `since` is a time of UTC."""

    process: int
    host: str
    since: str


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Iterator[Holder | None]:
    """Holds a folder, which is made if need be, for this process alone.

    Yields the process that held it before, if that one ended without giving it back: killed, say.

    Raises:
      UserError: another process holds it; the line begins with `what`, the setting that names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+b", buffering=0) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{what}: {folder} is in use by another run; wait for it or name another folder") from None
        before = _holder(lock)
        with contextlib.suppress(OSError):  # a full disk is told of by what is written next
            lock.truncate(0)
            lock.write(json.dumps(Holder(os.getpid(), socket.gethostname(), utc_now())).encode())
        try:
            yield before
        finally:
            with contextlib.suppress(OSError):
                lock.truncate(0)


def _holder(lock: BinaryIO) -> Holder | None:
    """Who is written in a lock's file, if anybody is."""
    lock.seek(0)
    try:
        process, host, since = json.loads(lock.read(1000))
        return Holder(int(process), str(host), str(since))
    except (ValueError, TypeError, RecursionError):
        return None


def give_back(folder: Path) -> None:
    """The process that has locked a folder ends with a word, and without leaving `locked`."""
    with contextlib.suppress(OSError), (folder / LOCK).open("r+b") as lock:
        lock.truncate(0)


def utc_now() -> str:
    """The time, to the second."""
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"


def sweep(folder: Path, names: re.Pattern[str] = LEFT_OVER) -> None:
    """Remove what had been begun when its process was killed, by `write_whole` or under other `names`; the folder is
    held by this process."""
    for entry in list(folder.iterdir()) if folder.is_dir() else []:
        if names.fullmatch(entry.name):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Mark a folder as in use by this process, for `sweep_unheld`, where the file system can; nothing is left of it."""
    mark, unseen = folder / LOCK, folder / f"{LOCK}.new"
    with unseen.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unseen.rename(mark)  # which nobody ever sees without its lock
        except OSError:  # a file system without locks: such a folder is never swept
            unseen.unlink()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                mark.unlink()


def sweep_unheld(folder: Path) -> None:
    """Remove the folders in another one that were `held` by processes which are gone."""
    for mark in list(folder.glob(f"*/{LOCK}")):
        if not LEFT_OVER.fullmatch(mark.parent.name):
            continue
        with contextlib.suppress(OSError), mark.open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock.fileno()).st_nlink:  # else its holder has just ended, and goes on with the folder
                shutil.rmtree(mark.parent, ignore_errors=True)


def move_aside(path: Path, why: str) -> Path:
    """Rename what stands in the way to `NAME.WHY-<time>`, which is free, and return where it is now."""
    aside = path.with_name(f"{path.name}.{why}-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09d}")
    path.rename(aside)
    return aside


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


def piece_digest(path: Path, start: int, size: int) -> str:
    """SHA-256 of so many bytes of a file, or of what there is of them, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while size > 0 and (part := file.read(min(size, 1 << 20))):
            digest.update(part)
            size -= len(part)
    return digest.hexdigest()


def state_of(path: Path | str) -> tuple[int, int, int]:
    """Size, time and number of a file: by these a change is seen, and two hosts know that they see the same one."""
    found = Path(path).stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


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
