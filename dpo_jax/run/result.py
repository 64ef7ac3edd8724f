"""What a run leaves: the exported folder, the table of before and after, and how to go on."""

import contextlib
import functools
import json
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.config import run as config
from dpo_jax.config.run import Run
from dpo_jax.data.sources import hub_name
from dpo_jax.errors import UserError, public
from dpo_jax.files import file_digest, move_aside
from dpo_jax.hf import checkpoint, peft, tensors
from dpo_jax.hf.ending import Ending, aligned
from dpo_jax.hf.tokenizer import read_template
from dpo_jax.model.decoder import Model
from dpo_jax.model.weights import Weights
from dpo_jax.page.render import PAGE
from dpo_jax.processes.here import here
from dpo_jax.reporting import metrics
from dpo_jax.reporting.journal import METRICS_FILE, Journal, read_records
from dpo_jax.reporting.terminal import summary
from dpo_jax.run import adapted, continuing, output, sources, written
from dpo_jax.run.best import Best, MetricWatch, best_lines
from dpo_jax.run.continuing import Past
from dpo_jax.run.data import Data
from dpo_jax.run.models import notes, weights_digest
from dpo_jax.run.policy import Policy
from dpo_jax.run.sources import Sources
from dpo_jax.training import reference
from dpo_jax.training.step import State

RECORD = "dpo_jax.json"
TEMPLATE = "chat_template.jinja"
"""File of a folder in which transformers and servers look for the chat template first."""
"""The file of an exported folder that says how it was trained."""
CARD = "README.md"
"""The file of an exported folder that is there for people to write on."""
STAMPS = "weights"
"""Key of what `run.json` says of the files of weights beside their digest."""


def facts(found: Sources, data: Data, steps: int) -> dict[str, object]:
    """What a run depends on beside its settings: when one of these changes, it is another run. All processes call."""
    train, other = data.train, found.reference != found.policy
    return {
        **({output.DATE: data.date} if data.date else {}),
        **found.facts(),
        continuing.STEPS: steps,
        continuing.PAIRS: train.num_pairs,
        continuing.DATA: reference.data_digest(train),
        continuing.WEIGHTS: weights_digest(found.policy, here()),
        **({continuing.REFERENCE: weights_digest(found.reference, here())} if other else {}),
        **({} if found.adapter is None else {continuing.ADAPTER: file_digest(found.adapter / peft.FILE)}),
    }


def stamps(found: Sources) -> dict[str, list[list[str | int]]]:
    """Names, sizes and times of the files of weights that a run starts from or is held against, by part."""
    files = {"model": tensors.stamps(found.policy)}
    if found.reference != found.policy:
        files["reference"] = tensors.stamps(found.reference)
    if found.adapter is not None:
        files["adapter"] = tensors.stamps(found.adapter, [peft.FILE])
    return {part: [list(one) for one in some] for part, some in files.items()}


def _check_weights(run: Run, past: Past) -> None:
    """Refuse to take a finished run for this one where the weights that it starts from have become others since. Their
    bytes are read only where the files have other sizes or times than the run has written down.

    Raises:
      UserError: a digest is another.
    """
    known = output.recorded(past.folder).get(STAMPS, {})
    seen = dict(known)
    parts = (
        ("model", run.model.path, continuing.WEIGHTS, (), weights_digest),
        ("reference", run.reference.path, continuing.REFERENCE, (), weights_digest),
        ("adapter", run.adapter.path, continuing.ADAPTER, (peft.FILE,), lambda folder: file_digest(folder / peft.FILE)),
    )
    for part, path, fact, files, digest in parts:
        folder = Path(path or "").expanduser()
        if path is None or part not in known or fact not in past.facts or not folder.is_dir():
            continue
        with contextlib.suppress(OSError, UserError):  # they are gone, and not others
            seen[part] = [list(one) for one in tensors.stamps(folder, files)]
        if seen[part] != known[part]:
            past.check_fact(fact, digest(folder))
    if seen != known:
        output.mark(past.folder, **{STAMPS: seen})


class Ended(NamedTuple):
    """How a run came to its end: the step that is exported, if not the last, and the step that it stopped after, if it
    was to have more."""

    best: Best | None
    stopped: int | None

    @classmethod
    def of(cls, state: State, steps: int, watch: MetricWatch | None) -> "Ended":
        """From the state after the last step that was made, of so many."""
        made = int(state["step"])
        return cls(watch and watch.best, made if made < steps else None)

    def record(self) -> dict[str, Any]:
        """As `run.json` and `dpo_jax.json` have it."""
        best = {} if self.best is None else {"best": self.best._asdict()}
        return best | ({} if self.stopped is None else {"stopped": self.stopped})

    @classmethod
    def recorded(cls, known: Mapping[str, Any]) -> "Ended":
        """What `record` gave."""
        best = known.get("best")
        return cls(None if best is None else Best(**best), known.get("stopped"))


def evaluations(folder: Path) -> dict[int, dict[str, float]]:
    """The evaluations of a run by step, from its records."""
    path = folder / METRICS_FILE
    return metrics.evaluations_in(read_records(path)) if here().owns or path.exists() else {}


def before_and_after(folder: Path, best: Best | None = None) -> tuple[dict[str, float], dict[str, float]]:
    """The evaluation of a run's start, and that of what it exports: of the best step, or else the last. Empty where it
    was not made, or its record is gone."""
    before, after = metrics.before_and_after(evaluations(folder), None if best is None else best.step)
    return before or {}, after or ({} if best is None else {best.metric: best.value})


def export(
    run: Run, found: Sources, policy: Policy, weights: Weights, journal: Journal, end: Ending | None, ended: Ended
) -> None:
    """What was trained as Hugging Face folders like the one it came from, written beside and verified first.

    One that stands there and is not as it was exported is renamed, never replaced.
    """
    folder, said = journal.folder, ended.record()
    journal.phase("exporting")
    _, measured = before_and_after(folder, ended.best)
    changed = output.recorded(folder).get("changed", [])
    card, files = described(run, found, end, changed, metrics=measured, **said)
    card["notes"] = [*card["notes"], *best_lines(ended.best, ended.stopped, evaluations(folder))]
    for kind in run.export_kinds:
        target = folder / output.EXPORTS[kind]
        here().decide("a place for the export", functools.partial(_make_way, target, journal))
        said |= write(kind, run, policy, weights, target, adapted.Text(card, files, run.model.path), replace=True)
    output.mark(folder, finished=True, exported=exported_as(run), **said)


def write(
    kind: str, run: Run, policy: Policy, weights: Weights, target: Path, text: adapted.Text, **how: Any
) -> dict[str, Any]:
    """One folder of what a run has trained; what is to be said of it at the end."""
    dtype = how.pop("dtype", None) or written.KEEP[run.export.dtype]
    if kind == "adapter":
        adapted.write_adapter(policy, weights, target, text, **how)
        return {}
    if policy.adapter is not None:
        return {"merged": adapted.write_merged(policy, weights, target, text, dtype=dtype, **how)}
    asked = run.export.model_copy(update={"dtype": "same" if dtype == "keep" else dtype})
    rounding = written.Rounding.of(asked, policy.spec, policy.folder, weights.trained, run.seed)
    model, how = Model(policy.spec, rounding.at_random(weights).params), {**how, "dtype": dtype}
    return {"moved": checkpoint.save_hf(model, target, policy.folder, card=text.card, extra_files=text.files, **how)}


def described(
    run: Run, found: Sources, end: Ending | None, changed: Sequence[str] = (), **more: Any
) -> tuple[dict[str, Any], dict[str, str]]:
    """What the card of an export says of its run, and the files beside its weights that are written for it.

    What was `changed` on the way is said beside the settings, which are those of the end.
    What is `more` is said in the card if it is its `metrics`, and in `dpo_jax.json` whatever it is.
    """
    names = [run.data.train] if isinstance(run.data.train, str) else list(run.data.train)
    datasets = list(dict.fromkeys(name for name in map(hub_name, names) if name))
    settings = config.dump(run)
    pinned = {part: {**settings[part], "revision": commit} for part, commit in found.commits.items()}
    card = {"datasets": datasets, "config": {**settings, **pinned}}
    card["objectives"] = {term.name: term.row.paper for term in run.objective.terms}
    more["notes"] = card["notes"] = [*notes(found, end, run.export), *changed]
    record = {"settings": settings, "settings_sha256": config.digest(run), "commits": found.commits, **more}
    files = {RECORD: json.dumps(public(record), indent=2, ensure_ascii=False) + "\n"}
    card |= {"metrics": more["metrics"]} if "metrics" in more else {}
    if run.data.template is not None:  # or whoever talks to the model would not use the one that it knows
        files[TEMPLATE] = read_template(run.data.template)
    return card, files | (aligned(found.policy, end) if run.export.align_eos else {})


def exported_as(run: Run) -> dict[str, Any]:
    """The settings that decide what the exported folder holds."""
    chosen = {"best": run.checkpoint.best, "patience": run.evaluation.patience}
    given = {name: value for name, value in chosen.items() if value is not None}
    return run.export.model_dump(mode="json", exclude={"push", "private"}, exclude_none=True) | given


def _make_way(model: Path, journal: Journal) -> None:
    whole = model.is_dir() and not model.is_symlink() and not (any(model.iterdir()) and tensors.changed_files(model))
    if os.path.lexists(model) and not whole:
        journal.note(f"{model} is not as it was exported; renamed to {move_aside(model, 'changed').name}")


def is_finished(run: Run, past: Past) -> bool:
    """Whether this very run has been trained to its end, and the folder that it exported is whole.

    Says why a finished run is gone on with all the same.

    Raises:
      UserError: it would have to go on, and its checkpoints are gone; or its starting weights have changed since.
    """
    changes = past.changes(run)
    damaged = next(filter(None, (_damaged(past.folder / output.EXPORTS[kind]) for kind in run.export_kinds)), None)
    damaged = damaged if past.finished else None
    if past.finished and not changes and damaged is None and past.exported in ({}, exported_as(run)):
        _check_weights(run, past)
        return True
    if past.finished and past.step is None:
        raise UserError(
            f"output: {past.folder} holds a finished run and none of its checkpoints, so it can neither go on nor be "
            f"exported again; put {past.folder / output.CHECKPOINTS} back, or name another output"
        )
    other = past.exported not in ({}, exported_as(run))
    if past.finished and damaged is not None and not (other and not damaged.parent.exists()):
        print(f"{damaged} is missing or was changed since the export; the model is exported again")
    elif past.finished and not changes:
        print(f"the model is exported again, by {exported_as(run)} in place of {dict(past.exported)}")
    return False


def _damaged(model: Path) -> Path | None:
    """A file of an export that is gone or has changed, other than its card."""
    listed = tensors.listed_files(model)
    changed = [name for name in tensors.changed_files(model) if name in listed and name != CARD]
    name = (changed or [None])[0] if listed else tensors.SUMS
    return None if name is None else model / name


def show(run: Run, folder: Path, word: str) -> int:
    """Print what was measured before and after, and where the model is; push it, if that is wanted and not done yet.

    Raises:
      UserError: it was not pushed. The run is finished all the same.
    """
    known, kinds = here().decide("result", lambda: output.recorded(folder)), run.export_kinds
    ended = Ended.recorded(known)
    before, after = before_and_after(folder, ended.best)
    summary(before, after)
    said = [
        *best_lines(*ended, evaluations(folder)),
        written.moved_line(known.get("moved")),
        known.get("merged"),
        written.margin_line(after, run.export.dtype),
    ]
    print("\n".join(line for line in said if line), end="\n" if any(said) else "")
    names = {"merged": "model", "adapter": "adapter"}
    where = " and ".join(f"the {names[kind]} is in {folder / output.EXPORTS[kind]}" for kind in kinds)
    page = f", the page in {folder / PAGE}" if (folder / PAGE).is_file() else ""
    print(f"{word}: {where}, the record in {folder / 'metrics.jsonl'}{page}", flush=True)
    pushed = known.get("pushed", {})
    if run.export.push is not None and run.export.push not in pushed:
        url = here().decide("push", lambda: sources.send(run.export, folder / output.EXPORTS[kinds[0]]))
        output.mark(folder, pushed={**pushed, run.export.push: url})
        print(f"pushed: {url}")
    return 0


def say_stopped(number: int, state: State, journal: Journal) -> int:
    """Tell how to go on; exit code 75 (try again) after SIGTERM, 130 after Ctrl-C."""
    journal.note(f"stopped and saved after step {int(state['step'])}; run the same command again to go on")
    return 130 if number == signal.SIGINT else 75
