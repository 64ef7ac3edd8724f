"""The steps of a folder on a disk: sealed with the digests of their files, looked through, moved aside, removed."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from dpo_jax.errors import one_line
from dpo_jax.files import LEFT_OVER, REMEDIES, move_aside, sweep, sync_folder, write_whole
from dpo_jax.processes.here import Here
from dpo_jax.training.manifest import MANIFEST, Claim, Damaged, claims_of, difference, text_of

REMEDY = "free some space or correct the folder's permissions"
_LEFT_OVER = re.compile(r"[0-9]+\.(removed|orbax-checkpoint-tmp.*)")
_SEALED = "sealed"
_HASHERS = 4


class Folder:
    """The steps of a folder. A sealed step is one with a manifest."""

    remedy = REMEDY

    def __init__(self, root: Path):
        """Of a folder that need not be there."""
        self.root, self.shared = root.absolute(), True

    def open(self, place: Here) -> None:
        """Make the folder, find out whether it is one for all processes, and remove what a killed run left half-written
        in it: process 0, or each process in its own."""
        self.root.mkdir(parents=True, exist_ok=True)
        self.shared = place.shares("checkpoints", self.root)
        if self.shared and not place.owns:
            return
        sweep(self.root, LEFT_OVER)
        for path in self.root.iterdir():
            if _LEFT_OVER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)

    def at(self, step: int) -> Path:
        """Where a step lies."""
        return self.root / str(step)

    def numbers(self) -> list[int]:
        """Real folders whose name is a step number, newest first."""
        entries = self.root.iterdir() if self.root.is_dir() else ()
        names = (path for path in entries if re.fullmatch(r"0|[1-9][0-9]*", path.name))
        return sorted((int(path.name) for path in names if path.is_dir() and not path.is_symlink()), reverse=True)

    def is_empty(self) -> bool:
        """Whether nothing is there at all."""
        return not any(self.root.glob("*"))

    def is_there(self, step: int) -> bool:
        """Whether anything has the step's name."""
        return os.path.lexists(self.at(step))

    def is_sealed(self, step: int) -> bool:
        """Whether the step was finished; what is in it now is not looked at."""
        return (self.at(step) / MANIFEST).exists()

    def is_unfinished(self, step: int) -> bool:
        """Whether this is a step that Orbax committed and nothing sealed."""
        path = self.at(step)
        committed = (path / "_CHECKPOINT_METADATA").exists() or (path / "commit_success.txt").exists()
        return committed and not path.is_symlink() and not self.is_sealed(step)

    def looked_at(self, step: int, place: Here) -> dict[str, tuple[int, str]]:
        """Size and digest of each file of a committed step, on process 0; every process of `place` looks at its share.

        For a thread beside the main one. What a host does not see yet, process 0 looks at.
        """
        folder, place = self.at(step), place if self.shared else Here()
        sizes = {str(f.relative_to(folder)): f.stat().st_size for f in _files(folder)} if place.owns else {}
        sizes = place.everyone("files of a checkpoint", sizes, beside=True)[0]
        names = sorted(sizes, key=lambda name: -sizes[name])
        told = place.by_turns("digests of a checkpoint", names, lambda share: _digests(folder, share), beside=True)
        digests = dict(zip(names, told, strict=True))
        unseen = [name for name in names if digests[name] is None] if place.owns else []
        digests |= zip(unseen, _digests(folder, unseen), strict=True)
        return {name: (sizes[name], digest) for name, digest in digests.items()}

    def seal(self, step: int, table: Mapping[str, tuple[int, str]]) -> None:
        """Write a committed step's number and each file's size and digest, once all are on the disk."""
        folder = self.at(step)
        with ThreadPoolExecutor(_HASHERS) as pool:
            below = [path for path in folder.rglob("*") if path.is_dir()]
            list(pool.map(sync_folder, [*_files(folder), *below, folder, folder.parent]))
        write_whole(folder / MANIFEST, text_of(step, {name: list(table[name]) for name in sorted(table)}))

    def mark(self, step: int) -> None:
        """Write down that a sealed step is the newest."""
        write_whole(self.root / _SEALED, f"{step}\n")

    def unseal(self, step: int) -> None:
        """Make of a step that not every process has sealed one that was never finished."""
        (self.at(step) / MANIFEST).unlink(missing_ok=True)

    def newest_ever(self) -> int | None:
        """The newest step that was ever sealed here."""
        with suppress(OSError, ValueError):
            return int((self.root / _SEALED).read_text())
        return None

    def lost(self, step: int | None = None) -> bool:
        """Whether a step, or any, was found damaged and moved aside."""
        return any(self.root.glob(f"{'*' if step is None else step}.bad-*"))

    def damage(self, step: int, under: str = "", *, process: int = 0, processes: int = 1) -> str | None:
        """What is wrong with a sealed step's manifest, or with those of its files whose names begin with `under`; of
        several processes each looks at its share of them."""
        folder = self.at(step)
        try:
            claims = claims_of((folder / MANIFEST).read_text(), folder.name, under)
            claims = sorted(claims, key=lambda claim: -claim.size)[process::processes]
        except OSError as error:
            return f"{MANIFEST}: {error.strerror}"
        except (Damaged, ValueError) as error:
            return str(error)
        with ThreadPoolExecutor(_HASHERS) as pool:
            return next(filter(None, pool.map(lambda claim: _file_damage(folder, claim), claims)), None)

    def read(self, step: int, item: str) -> dict[str, Any]:
        """What was saved as JSON beside the arrays: `record` or `leaves`."""
        return json.loads((self.at(step) / item / "metadata").read_text("utf-8"))

    def move_aside(self, step: int, why: str) -> str:
        """Rename a step to `STEP.WHY-<time>`, and say how it is called now."""
        return move_aside(self.at(step), why).name

    def remove(self, step: int) -> None:
        """Delete a step; the rename comes first, so that a kill on the way leaves nothing that looks like a step."""
        doomed = self.root / f"{step}.removed"
        shutil.rmtree(doomed, ignore_errors=True)
        self.at(step).rename(doomed)
        shutil.rmtree(doomed)

    def clear(self, step: int) -> None:
        """Remove what a failed save has left: Orbax leaves it to the next run, and a full disk needs it now."""
        for partial in self.root.glob(f"{step}.orbax-checkpoint-tmp*"):
            shutil.rmtree(partial, ignore_errors=True)

    def keep_records(self, run: Path, names: Iterable[str]) -> None:
        """Nothing: a run's records lie on the same disk."""

    def bring_records(self, run: Path) -> None:
        """Nothing: none were kept."""

    def reason(self, error: Exception) -> str | None:
        """The operating system's words, also where Orbax and TensorStore wrap them in errors of their own."""
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        return next((reason for reason in map(os.strerror, REMEDIES) if reason in str(error)), None)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digests(folder: Path, names: Iterable[str]) -> list[str | None]:
    """The digest of each file, None of one that is not seen."""
    with ThreadPoolExecutor(_HASHERS) as pool:
        return list(pool.map(lambda name: _digest(folder / name) if (folder / name).is_file() else None, names))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _file_damage(folder: Path, claim: Claim) -> str | None:
    path = folder / claim.name
    try:
        return difference(claim, path.stat().st_size, None) or difference(claim, claim.size, _digest(path))
    except (OSError, ValueError) as error:
        return f"{claim.name}: {one_line(error)}"
