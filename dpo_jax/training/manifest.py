"""The manifest of a checkpoint: which files a step has, and the digest of each, so that any damage is noticed."""

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dpo_jax.errors import one_line
from dpo_jax.files import digest_of, sync_folder, write_whole

MANIFEST = "manifest.json"
_HASHERS = 4


def seal(folder: Path) -> None:
    """Write a committed step's number (its folder's name) and each file's size and digest, once all are on the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_HASHERS) as pool:
        below = [path for path in folder.rglob("*") if path.is_dir()]
        list(pool.map(sync_folder, [*files, *below, folder, folder.parent]))
        digests = list(pool.map(_digest, files))
    table = {str(f.relative_to(folder)): [f.stat().st_size, d] for f, d in zip(files, digests, strict=True)}
    write_whole(folder / MANIFEST, _text(int(folder.name), table))


def damage_of(folder: Path, under: str = "") -> str | None:
    """What is wrong with a step's manifest, or with those of its files whose names begin with `under`; None if nothing.

    A manifest counts under the name of the step that it was written for, and says of itself that nothing was taken out.
    """
    try:
        text = (folder / MANIFEST).read_text()
        manifest = json.loads(text)
        step, table = manifest["step"], manifest["files"]
        if text != _text(step, table) or not table:
            return f"{MANIFEST} was changed"
        claims = [(name, size, digest) for name, (size, digest) in table.items() if name.startswith(under)]
    except OSError as error:
        return f"{MANIFEST}: {error.strerror}"
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return f"{MANIFEST} was changed"
    if str(step) != folder.name:
        return f"it is of step {step}"
    with ThreadPoolExecutor(_HASHERS) as pool:
        return next(filter(None, pool.map(lambda claim: _file_damage(folder, *claim), claims)), None)


def steps_of(folder: Path) -> list[tuple[int, Path]]:
    """Real folders whose name is a step number, newest first."""
    names = (path for path in folder.iterdir() if re.fullmatch(r"0|[1-9][0-9]*", path.name))
    return sorted(((int(p.name), p) for p in names if p.is_dir() and not p.is_symlink()), reverse=True)


def newest_record(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """The newest step of a folder of checkpoints whose record verifies, and its record; None where there is none.

    Nothing is opened, moved or removed.
    """
    for step, path in steps_of(folder) if folder.is_dir() else ():
        if damage_of(path, "record/") is None:
            return step, json.loads((path / "record" / "metadata").read_text("utf-8"))
    return None


def _text(step: Any, table: object) -> str:
    """The manifest's own digest is in it: one that lacks an entry is noticed as well as a file that does."""
    body = json.dumps({"files": table, "step": step}, sort_keys=True)
    return json.dumps({"digest": digest_of(body), "files": table, "step": step}, indent=1, sort_keys=True) + "\n"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _file_damage(folder: Path, name: str, size: int, digest: str) -> str | None:
    try:
        found = (folder / name).stat().st_size
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
        return None if _digest(folder / name) == digest else f"{name} has other bytes than were saved"
    except (OSError, ValueError) as error:
        return f"{name}: {one_line(error)}"
