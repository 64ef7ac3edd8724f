"""The output folder of a run: locked, held against its record, and what the record says."""

import contextlib
import fcntl
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_jax.config import run as config
from dpo_jax.config.run import Run
from dpo_jax.data.settings import DataSettings
from dpo_jax.errors import UserError
from dpo_jax.files import write_whole

RUN_FILE = "run.json"
OURS = frozenset(
    {".lock", RUN_FILE, "metrics.jsonl", "checkpoints", "model", "cache", "data.json", "answers"}
    | {"tensorboard", "wandb", "wandb_run", "trackio"}
)
"""What a run's folder holds."""
LEFT_OVER = re.compile(r"\..+\.[0-9a-f]{32}\.tmp|\.model\.(tmp|old)-\d+")
"""Names of what a run was writing when it was killed: files before they are moved into place, and the export."""


@contextlib.contextmanager
def opened(run: Run) -> Iterator[Path]:
    """The output folder, made if need be and locked while the run lasts.

    Raises:
      UserError: it belongs to something else, to a run with other mathematics, or to one that is still going on.
    """
    folder = Path(run.output)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output: {folder} is a file; name a folder")
    names = [entry.name for entry in folder.iterdir()] if folder.exists() else []
    strangers = [name for name in names if name not in OURS and not LEFT_OVER.fullmatch(name)]
    if strangers and not (folder / RUN_FILE).exists():
        raise UserError(
            f"output: {folder} holds other things ({sorted(strangers)[0]}, ...); name a new or empty folder"
        )
    _refuse_changes(run, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"output: {folder} is in use by another run; wait for it or name another folder") from None
        _sweep(folder)
        _sweep(folder / "cache")
        yield folder


def _sweep(folder: Path) -> None:
    """Remove what a run that was killed left half-written; the folder is locked."""
    for entry in list(folder.iterdir()) if folder.is_dir() else []:
        if LEFT_OVER.fullmatch(entry.name):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _refuse_changes(run: Run, folder: Path) -> None:
    """Stop if the folder's run has learned something, and would lead to another model than this one."""
    path = folder / RUN_FILE
    if not path.exists() or not _has_learned(folder):
        return
    try:
        old = json.loads(path.read_text())["settings"]
    except (ValueError, KeyError):
        raise UserError(f"{path} is damaged; name another output folder") from None
    changes = [
        c
        for c in config.changed_mathematics(old, config.dump(run))
        if c.split(":")[0] not in run.checkpoint.allow_change
    ]
    if changes:
        raise UserError(
            "\n".join(
                f"output: {folder} holds a run with another setting, {change}; change it back, name another output, or "
                f"accept it with checkpoint.allow_change=[{change.split(':')[0]}]"
                for change in changes
            )
        )


def _has_learned(folder: Path) -> bool:
    """Whether there is a step or a model to lose. A run that was refused in the middle of its start has neither, and
    may be begun again with other settings, data or weights."""
    return (folder / "model").exists() or any((folder / "checkpoints").glob("*"))


def recorded(folder: Path) -> dict[str, Any]:
    """What the folder's run has written down: `settings`, `facts`, whether it is `finished`; empty before it began."""
    path = folder / RUN_FILE
    return json.loads(path.read_text()) if path.exists() else {}


DATE = "date that the chat template writes"
"""Fact of a run whose template may write the day."""


def template_date(folder: Path) -> str | None:
    """The day (YYYY-MM-DD) that the template of the folder's run writes: that of its beginning, once it has begun."""
    return recorded(folder).get("facts", {}).get(DATE)


def record_run(run: Run, folder: Path, facts: dict[str, Any]) -> None:
    """Write down what this run is; refuse if the same settings now mean other data or other weights."""
    known = recorded(folder).get("facts", {}) if _has_learned(folder) else {}
    for name, value in facts.items():
        if known.get(name, value) != value:
            raise UserError(
                f"output: {folder} holds a run whose {name} was {known[name]} and is now {value}; restore it, or "
                "name another output"
            )
    write_json(folder / RUN_FILE, {"settings": config.dump(run), "facts": facts})


def write_json(path: Path, value: Any) -> None:
    """Write a file in one move."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def mark(folder: Path, **more: Any) -> None:
    """Add to what the folder's run has written down."""
    write_json(folder / RUN_FILE, {**recorded(folder), **more})


def cache_folder(data: DataSettings, output: Path) -> Path:
    """Where tokenised data and reference log-probabilities are kept."""
    return Path(data.cache) if data.cache else output / "cache"
