"""Where the steps of a run lie: in a folder on a disk, or in a bucket of an object store."""

from pathlib import Path
from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.files import write_whole
from dpo_jax.training.bucket import Bucket
from dpo_jax.training.folder import Folder

ELSEWHERE = "elsewhere"
"""File in a run's folder of checkpoints, if they lie in a bucket: it names that."""
Steps = Folder | Bucket
"""The steps of one run. Orbax writes them, into `at(step)`; all else that is done with them are these two's methods."""


def at(folder: str | Path) -> Steps:
    """The steps of a folder: its own, or those of the bucket that it names, if it does; nothing is opened.

    Raises:
      UserError: what it takes to reach the bucket is not installed.
    """
    address = str(folder) if "://" in str(folder) else _named(Path(folder))
    return Folder(Path(folder)) if address is None else Bucket(address)


def keep_in(folder: Path, address: str | None) -> None:
    """Have the steps of a folder lie at an address of an object store; None: in the folder itself.

    Raises:
      UserError: it has steps elsewhere.
    """
    before = _named(folder)
    if before == address:
        return
    if before is not None:
        raise UserError(f"checkpoint.folder: those of this run are in {before}; set it to that, or name another output")
    if Folder(folder).numbers():
        raise UserError(
            f"checkpoint.folder: this run has checkpoints in {folder}; leave it out, or name another output"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / ELSEWHERE, f"{address}\n")


def kept(steps: Steps) -> list[int]:
    """The steps that were sealed, in order; whether they verify is not looked at."""
    return sorted(step for step in steps.numbers() if steps.is_sealed(step))


def newest_record(steps: Steps) -> tuple[int, dict[str, Any]] | None:
    """The newest step whose record verifies, and its record; None where there is none. Nothing is touched."""
    for step in steps.numbers():
        if steps.damage(step, "record/") is None:
            return step, steps.read(step, "record")
    return None


def _named(folder: Path) -> str | None:
    named = folder / ELSEWHERE
    return named.read_text("utf-8").strip() if named.is_file() else None
