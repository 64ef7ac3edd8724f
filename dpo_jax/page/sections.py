"""The parts of a page that are lists and tables: what was trained, on what, where, and how that went."""

import datetime
from collections.abc import Mapping
from typing import Any

import numpy as np

from dpo_jax.config import run as config
from dpo_jax.data.report import BAD, KINDS, NOTED, TOO_LONG, UNRANKED
from dpo_jax.files import size_text
from dpo_jax.page.evidence import called
from dpo_jax.page.folder import RunFolder
from dpo_jax.page.texts import count, duration, number, published
from dpo_jax.reporting.notes import ALARM

Rows = list[tuple[str, ...]]
NONE = "-"
LENGTHS = ("min", "median", "p90", "p99", "max", "mean")


def title_of(run: RunFolder) -> str:
    """What was trained, in a few words."""
    settings = config.flat(run.settings) if run.settings else {}
    objective = settings.get("objective.name") or ("a mixture" if settings.get("objective.mixture") else "")
    beta = settings.get("objective.beta")
    rank = settings.get("adapter.rank")
    parts = [published(settings.get("model.path", "a model"))]
    parts += [f"adapter of rank {rank}"] if rank else []
    parts += (
        [f"{objective}, beta {number(beta)}" if isinstance(beta, int | float) else f"{objective}"] if objective else []
    )
    return " · ".join(parts)


def status(run: RunFolder) -> str:
    """How far the run is, or was when something was last written."""
    steps = f"{run.step:,} of {run.steps:,} steps" if run.steps else f"{run.step:,} steps"
    if run.finished:
        return f"finished after {steps}"
    ended = next(
        (note["note"] for note in reversed(run.notes) if note["note"].startswith(("ended by", "stopped"))), None
    )
    if ended is not None and run.notes[-1]["note"] == ended and run.notes[-1]["step"] >= run.step:
        return f"not finished, {steps} are made: {ended}"
    return f"going on, {steps} are made"


def what(run: RunFolder) -> Rows:
    """The model, the data, the length and the objective, a line each."""
    settings, facts = config.flat(run.settings) if run.settings else {}, run.facts
    word = called(run)
    pairs, per_step = facts.get("number of pairs"), settings.get("batch.pairs")
    rows = [("model", published(settings.get("model.path", "not known")))]
    if settings.get("adapter.rank") or settings.get("adapter.path"):
        rows.append(("trained", f"an adapter of rank {settings.get('adapter.rank') or 'that of its folder'}"))
    else:
        frozen = settings.get("model.freeze")
        rows.append(("trained", f"all weights but {published(frozen)}" if frozen else "all weights"))
    if objective := settings.get("objective.name") or settings.get("objective.mixture"):
        rows.append(("objective", published(objective)))
    files = settings.get("data.train")
    named = ", ".join(map(published, files)) if isinstance(files, list) else published(files)
    rows.append(("data", f"{count(pairs)} {word} of {named}" if isinstance(pairs, int) else named))
    if run.steps and isinstance(per_step, int):
        passes = f": {run.steps * per_step / pairs:.2f} passes" if isinstance(pairs, int) and pairs else ""
        rows.append(("length", f"{run.steps:,} steps of {per_step:,} {word}{passes}"))
    rows.append(("held out", _held_out(settings)))
    if run.best is not None:
        chosen = settings.get("checkpoint.best")
        by = f", by {published(chosen)}" if chosen else ""
        rows.append(("exported", f"the best step, {run.best:,} of {run.step:,}{by}"))
    if isinstance(run.known.get("stopped"), int):
        rows.append(("ended early", "nothing better came for long (evaluation.patience)"))
    return rows


def _held_out(settings: Mapping[str, Any]) -> str:
    if (share := settings.get("data.eval_fraction")) is not None:
        return f"{share:.4g} of the prompts of data.train"
    held = settings.get("data.eval")
    sets = {name.removeprefix("data.eval."): value for name, value in settings.items() if name.startswith("data.eval.")}
    sets |= held if isinstance(held, Mapping) else {}
    if sets:
        return ", ".join(f"{name}: {published(value)}" for name, value in sets.items())
    return published(held) if held else "nothing (data.eval)"


def differing(run: RunFolder) -> Rows:
    """Settings that are not the defaults: name, value, default. All of them where this version does not know them."""
    try:
        found = config.differing(run.settings)
    except ValueError:  # of another version
        found = {name: (value, ...) for name, value in config.flat(run.settings).items()}
    return [
        (name, published(value), NONE if usual is ... else published(usual)) for name, (value, usual) in found.items()
    ]


def every(run: RunFolder) -> Rows:
    """All settings."""
    return [(name, published(value)) for name, value in config.flat(run.settings).items()]


def data_tables(run: RunFolder) -> list[dict[str, Any]]:
    """What became of the rows of each data set."""
    return [_data_table(name, report) for name, report in run.data.items() if isinstance(report, Mapping)]


def _data_table(name: str, report: Mapping[str, Any]) -> dict[str, Any]:
    names = ("rows", "kept", "pairs", "singles", "bad", "too_long", "unranked", "joined")
    numbers = {key: report[key] for key in names if key in report}
    for part, inner in report.items():
        if isinstance(inner, Mapping) and part in ("train", "held_out"):  # of data.eval_fraction
            numbers |= {
                f"{key} {'held out' if part == 'held_out' else 'trained on'}": value for key, value in inner.items()
            }
    counts, examples = report.get("counts") or {}, report.get("examples") or {}
    left_out = {effect: f"left out: {effect}" for effect in (BAD, TOO_LONG, UNRANKED)}
    effects = {**left_out, NOTED: "used, and noted"}
    classes = [
        (effects.get(KINDS.get(kind, NOTED), ""), kind, count(many), [published(row) for row in examples.get(kind, ())])
        for kind, many in counts.items()
    ]
    lengths = [
        (part, *(number(found.get(key), "{:,.0f}") for key in LENGTHS))
        for part, found in (report.get("lengths") or {}).items()
    ]
    files = [
        (published(file), count(about.get("rows", 0)), published(about.get("layout")))
        for file, about in (report.get("files") or {}).items()
    ]
    said = {key.replace("_", " "): count(value) for key, value in numbers.items() if value or key in ("rows", "kept")}
    return {"name": name, "numbers": said, "classes": classes, "lengths": lengths, "files": files}


def costs(run: RunFolder) -> Rows:
    """Time, speed and memory, as measured."""
    rows: Rows = []
    seconds, speed = run.curve("step_seconds").values, run.curve("pairs_per_second").values
    if len(seconds):
        whole = float(np.nanmean(seconds)) * run.step
        rows.append(("time in steps", duration(whole)))
        rows.append(("a step", f"{number(float(np.nanmedian(seconds)))} s in the median"))
        rows.append(("speed", f"{number(float(np.nanmedian(speed)))} {called(run)} a second in the median"))
    if tokens := run.curve("tokens_per_second"):
        rows.append(("tokens", f"{count(float(np.nanmedian(tokens.values)))} a second in the median"))
    if first := run.curve("time_to_first_step"):
        rows.append(("to the end of the first step", duration(first.first)))
    if waited := run.curve("input_wait"):
        rows.append(("waiting for data", f"{float(np.nanmean(waited.values)):.1%} of the time"))
    if memory := run.curve("memory_bytes"):
        rows.append(("most memory in use, measured", size_text(float(np.nanmax(memory.values)))))
    predicted = run.known.get("memory")
    if isinstance(predicted, Mapping) and predicted:
        whole = sum(value for value in predicted.values() if isinstance(value, int | float))
        rows.append(("memory of a step on one device, predicted", size_text(whole)))
    return rows


def origin(run: RunFolder) -> Rows:
    """What the run can be told apart by: digests, commits, versions, devices."""
    rows = [(name, published(value)) for name, value in {**run.facts, **machine(run)}.items()]
    commits = run.export.get("commits")
    rows += [(f"commit of {part}.path", published(value)) for part, value in commits.items()] if commits else []
    if digest := run.export.get("settings_sha256"):
        rows.append(("SHA-256 of the settings", published(digest)))
    if isinstance(moved := run.known.get("moved"), list) and len(moved) == 2 and moved[1]:
        rows.append(("weights that moved", f"{moved[0] / moved[1]:.1%} of {moved[1]:,}"))
    pushed = run.known.get("pushed")
    rows += [("pushed to", published(url)) for url in pushed.values()] if isinstance(pushed, Mapping) else []
    return rows


def machine(run: RunFolder) -> Mapping[str, Any]:
    """What the run ran on: versions and devices."""
    found = run.known.get("machine")
    return found if isinstance(found, Mapping) else {}


def health(run: RunFolder) -> dict[str, Any]:
    """Alarms, notes, and what else ought not to have happened."""
    alarms = [(note["step"], note["note"].removeprefix(ALARM)) for note in run.notes if note["note"].startswith(ALARM)]
    others = [(note["step"], note["note"]) for note in run.notes if not note["note"].startswith(ALARM)]
    watched = run.settings.get("alarms", {}).get("enabled", True) is not False
    losses_and_gradients = (run.curve(name) for name in ("loss", "grad_norm"))
    broken = {int(step) for steps, values in losses_and_gradients for step in steps[np.isnan(values)]}
    told = run.export.get("notes")
    said = [published(line) for line in told] if isinstance(told, list) else []
    return {
        "alarms": alarms,
        "notes": others,
        "watched": watched,
        "broken": sorted(broken),
        "damaged": run.damaged,
        "said": said,
    }


def written_at(run: RunFolder) -> str:
    """When something was last recorded, in UTC."""
    when = datetime.datetime.fromtimestamp(run.written, datetime.UTC)
    return when.strftime("%Y-%m-%d %H:%M UTC")
