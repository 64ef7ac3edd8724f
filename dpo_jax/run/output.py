"""The output folder of a run: locked and swept, and the record of what the run is."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dpo_jax.config import run as config
from dpo_jax.config.run import Run
from dpo_jax.data.settings import DataSettings
from dpo_jax.errors import UserError, printable, redacted, redacted_values
from dpo_jax.files import LEFT_OVER as HALF_WRITTEN
from dpo_jax.files import LOCK, give_back, locked, sweep, utc_now, write_whole
from dpo_jax.processes.here import Failure, here
from dpo_jax.training import steps

RUN_FILE, MODEL, ADAPTER, CHECKPOINTS = "run.json", "model", "adapter", "checkpoints"
COLLECTED = "collected"
"""Folder of the data that a round was trained on (`python -m dpo_jax.rounds`)."""
ROWS = "rows"
"""Folder of the rows that `fit` was given in memory."""
RECORDS = (RUN_FILE, "metrics.jsonl", "notes.jsonl", "data.json", "answers/*.jsonl", "verdicts/**/*.jsonl")
"""What a bucket keeps of a run beside its checkpoints, for a disk that does not last."""
EXPORTS = {"merged": MODEL, "adapter": ADAPTER}
"""Folder of each kind of result (`Run.export_kinds`)."""
ENDS_KEPT = 50
"""How many of the starts that did not end by themselves `run.json` keeps."""
OURS = frozenset(
    {LOCK, RUN_FILE, "metrics.jsonl", CHECKPOINTS, MODEL, ADAPTER, "cache", "data.json", "answers", "verdicts"}
    | {"evaluations", "report.html", "notes.jsonl"}
    | {"tensorboard", "wandb", "wandb_run", "trackio", "trackio_run", "mlflow_run", COLLECTED, ROWS}
)
"""What a run's folder holds."""
LEFT_OVER = re.compile(rf"{HALF_WRITTEN.pattern}|\.(model|adapter)\.(tmp|old)-\d+")
"""Names of what a run was writing when it was killed: files before they are moved into place, and the export."""


@contextlib.contextmanager
def opened(run: Run) -> Iterator[Path]:
    """The output folder, made if need be and locked while the run lasts.

    Raises:
      UserError: it belongs to something else, or to a run that is still going on.
    """
    folder, place = Path(run.output), here()
    with contextlib.ExitStack() as held:
        place.decide("output", lambda: _hold(folder, held))
        if not place.shares("output folder", folder):
            if not place.owns:
                _hold(folder, held)
            print(
                f"output: each host has a {folder} of its own; the result will be on {place.host}"
                + (", and checkpoints on each what its devices hold" if run.checkpoint.folder is None else "")
            )
        place.in_turn("checkpoint.folder", lambda: _reach(folder, run.checkpoint.folder))
        place.on_failure = lambda failure: _mark_failed(folder, failure)
        yield folder
        place.on_failure = None  # of an error it is still to be told


def _mark_failed(folder: Path, failure: Failure) -> None:
    """Write down in `run.json` why the run of several processes ended, which is about to leave the folder."""
    _mark_end(folder, time=utc_now(), **failure._asdict())
    give_back(folder)


def _mark_end(folder: Path, **end: Any) -> None:
    """Add to how the starts of the folder's run have ended, where it had begun and its record can be read."""
    if (known := _record_in(folder / RUN_FILE)) is not None:
        write_json(folder / RUN_FILE, {**known, "ends": [*_ends(known), end][-ENDS_KEPT:]})


def _ends(known: Mapping[str, Any]) -> list[Any]:
    """How the starts of a run have ended that did not end by themselves, by its record."""
    ends = known.get("ends", [])
    return ends if isinstance(ends, list) else []


def _hold(folder: Path, held: contextlib.ExitStack) -> None:
    """Lock the output folder for as long as `held`, and sweep it; raises as `opened`."""
    check(folder)
    before = held.enter_context(locked(folder, "output"))
    for held_too in (folder, folder / "cache", folder / ROWS):
        sweep(held_too, LEFT_OVER)
    if before is not None:
        why = "ended without a word: it was killed (for want of memory, perhaps), or its machine went down"
        who = printable(f"process {before.process} of {before.host}, begun {before.since}")
        print(f"output: the last start in {folder} ({who}) {why}")
        _mark_end(folder, time=before.since, process=0, host=before.host, code=None, why=f"process 0 {why}")


def _reach(folder: Path, address: str | None) -> None:
    """Have checkpoints where they are to be; a folder that has lost the run's records gets them back from there."""
    steps.keep_in(folder / CHECKPOINTS, address)
    if here().owns:
        steps.at(folder / CHECKPOINTS).bring_records(folder)


def check(folder: Path) -> None:
    """Whether a run may write there.

    Raises:
      UserError: it belongs to something else.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output: {folder} is a file; name a folder")
    names = [entry.name for entry in folder.iterdir()] if folder.exists() else []
    strangers = [name for name in names if name not in OURS and not LEFT_OVER.fullmatch(name)]
    if strangers and not (folder / RUN_FILE).exists() and newest_step(folder) is None:
        raise UserError(
            f"output: {folder} holds other things ({sorted(strangers)[0]}, ...); name a new or empty folder"
        )


def has_steps(folder: Path) -> bool:
    """Whether there is anything among the folder's checkpoints, usable or not."""
    return not steps.at(folder / CHECKPOINTS).is_empty()


def has_exports(folder: Path) -> bool:
    """Whether there is a result of training, whole or not."""
    return any((folder / name).exists() for name in EXPORTS.values())


def newest_step(folder: Path) -> int | None:
    """The newest checkpoint whose record verifies."""
    found = steps.newest_record(steps.at(folder / CHECKPOINTS))
    return found[0] if found else None


def recorded(folder: Path, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """What the folder's run has written down: `settings`, `facts`, whether it is `finished`; empty before it began.

    Where `run.json` is gone or damaged, what the newest checkpoint has of it, which is said.

    Raises:
      UserError: there is a model, and nothing that says what it was made by.
    """
    path = folder / RUN_FILE
    known = _record_in(path)
    if known is not None:
        return known
    state = "is damaged" if path.exists() else "is missing"
    found = steps.newest_record(steps.at(folder / CHECKPOINTS))
    if found is not None and _is_record(found[1]):
        if say is not None:
            say(f"{path} {state}; what it said is taken from checkpoint {found[0]}")
        return {name: found[1][name] for name in ("settings", "facts")}
    if path.exists() and (has_steps(folder) or has_exports(folder)):
        raise UserError(f"{path} is damaged, and no checkpoint has what it said; restore it, or name another output")
    return {}


def _record_in(path: Path) -> dict[str, Any] | None:
    """What a `run.json` says; None where it is missing or damaged."""
    try:
        known = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return known if _is_record(known) else None


def _is_record(known: Any) -> bool:
    """Whether this is what `record_run` writes, as far as it will be looked at."""
    named = isinstance(known, dict) and isinstance(known.get("facts"), dict) and isinstance(known.get("settings"), dict)
    if not named or not isinstance(known.get("exported", {}), dict):
        return False
    try:
        config.changed_mathematics(known["settings"], known["settings"])
    except (AttributeError, TypeError, ValueError, KeyError, RecursionError):
        return False
    return True


DATE = "date that the chat template writes"
"""Fact of a run whose template may write the day."""


def template_date(folder: Path) -> str | None:
    """The day (YYYY-MM-DD) that the template of the folder's run writes: that of its beginning, once it has begun."""
    return recorded(folder).get("facts", {}).get(DATE)


def record_run(run: Run, folder: Path, facts: dict[str, Any], **more: Any) -> None:
    """Write down what this run is, before what costs anything, and what `more` there is to say of it; how its starts
    have ended stays."""
    if ends := _ends(_record_in(folder / RUN_FILE) or {}):
        more["ends"] = ends
    write_json(folder / RUN_FILE, {**record_of(run, facts), **more})


def record_of(run: Run, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a run is, as `run.json` and every checkpoint have it: no secret stands in it."""
    return redacted_values({"settings": config.dump(run), "facts": dict(facts)})


def write_json(path: Path, value: object) -> None:
    """Write a file in one move, if this process is the one that writes; no secret stands in it."""
    if here().owns:
        write_whole(path, redacted(json.dumps(value, indent=2, ensure_ascii=False)) + "\n")


def mark(folder: Path, **more: Any) -> None:
    """Add to what the folder's run has written down."""
    write_json(folder / RUN_FILE, {**recorded(folder), **more})


def cache_folder(data: DataSettings, output: Path) -> Path:
    """Where tokenised data and reference log-probabilities are kept."""
    return Path(data.cache).expanduser() if data.cache else output / "cache"
