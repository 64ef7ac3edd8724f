"""Which checkpoint of a run is the best by what was measured on held-out data, and when no better one is waited for."""

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.config import run as config
from dpo_jax.config.run import Run
from dpo_jax.errors import UserError, nearest, redacted_values
from dpo_jax.processes.here import here
from dpo_jax.reporting.journal import METRICS_FILE, read_records
from dpo_jax.reporting.metrics import BETTER, goodness, held_out_of, recorded

WATCHED = "watched"
"""What a checkpoint's record calls the evaluations so far."""


class Best(NamedTuple):
    """The best evaluation of a run, of those with a checkpoint: the metric's name in the records, and its value."""

    metric: str
    step: int
    value: float


class MetricWatch:
    """One metric of all evaluations after the start. All that it says follows from them, so that a run which goes on
    says the same as one that was never stopped.

    Attributes:
      metric: its name in the records.
      patience: evaluations in a row without a better one, after which the run ends; None waits to the end.
      evaluations: value by step; None for one that is not finite.
    """

    def __init__(self, metric: str, patience: int | None = None, evaluations: Mapping[int, float | None] | None = None):
        """Watch this metric from here on."""
        self.metric, self.patience = recorded(metric), patience
        self.evaluations = {step: _finite(value) for step, value in sorted((evaluations or {}).items())}

    def take(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Take over an evaluation; whether it is better than all before it. That of the start is only looked at.

        Raises:
          UserError: the metric is not among those measured.
        """
        known = {recorded(name): value for name, value in metrics.items()}
        if self.metric not in known:
            usable = [name for name in known if held_out_of(name)[1] in BETTER]
            near = nearest(self.metric, usable, 0.8)
            raise UserError(
                f"checkpoint.best: {self.metric}: is not measured by this run; "
                + (f"did you mean {near}?" if near else f"choose one of {', '.join(usable)}")
            )
        if step > 0:
            self.evaluations[step] = _finite(known[self.metric])
        return self.best is not None and self.best.step == step

    @property
    def best(self) -> Best | None:
        """The best evaluation so far, of equals the earliest; None before the first."""
        found = [Best(self.metric, step, value) for step, value in self.evaluations.items() if value is not None]
        return max(found, key=lambda one: (goodness(one.metric, one.value), -one.step), default=None)

    @property
    def waited(self) -> int:
        """Evaluations since the best one."""
        after = self.best.step if self.best else 0
        return sum(step > after for step in self.evaluations)

    @property
    def gave_up(self) -> bool:
        """Whether patience is at its end."""
        return self.patience is not None and self.waited >= self.patience

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {WATCHED: {"metric": self.metric, "evaluations": {str(s): v for s, v in self.evaluations.items()}}}


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def watch_of(
    run: Run, folder: Path, record: Mapping[str, Any], kept: Collection[int], say: Callable[[str], None]
) -> MetricWatch | None:
    """What a run watches, with what was measured up to its newest checkpoint; None where it is to export the last.

    Args:
      run: its settings.
      folder: its output folder.
      record: that of its newest checkpoint; empty where there is none. Where it watched another metric, or none, what
        was measured is read in the records, and of that only what was measured at steps with a checkpoint can be best.
      kept: steps with a checkpoint.
      say: told where a better checkpoint than those is gone.
    """
    if run.checkpoint.best is None:
        return None
    name, known = recorded(run.checkpoint.best), record.get(WATCHED, {})
    if (other := _measured_otherwise(run, record)) is not None:
        say(f"{name} was of another {other} until now; only what is measured from here on is compared")
        return MetricWatch(name, run.evaluation.patience)
    if known.get("metric") == name:
        return MetricWatch(name, run.evaluation.patience, {int(step): v for step, v in known["evaluations"].items()})
    path = folder / METRICS_FILE
    rows = here().decide("records", lambda: read_records(path) if record and path.exists() else [])
    found = {row["step"]: row[name] for row in rows if name in row and row["step"] > 0}
    watch = MetricWatch(name, run.evaluation.patience, found)
    if watch.best is None or watch.best.step in kept:
        return watch
    say(
        f"the checkpoint of step {watch.best.step}, the best by {name}, is not there; the best is one of those that are"
    )
    return MetricWatch(name, run.evaluation.patience, {step: value for step, value in found.items() if step in kept})


MEASURED_BY = (
    *("objective.", "reference.", "data.eval", "data.max_length", "data.template"),
    *("evaluation.answers", "evaluation.judge", "evaluation.max_new_tokens"),
)
"""How the names of settings begin that decide what an evaluation measures."""


def _measured_otherwise(run: Run, record: Mapping[str, Any]) -> str | None:
    """A setting by which the evaluations up to a checkpoint with this record measured something else; None if none."""
    if not record.get("settings"):
        return None
    before, now = config.flat(record["settings"]), config.flat(redacted_values(config.dump(run)))
    keys = (key for key in {**before, **now} if key.startswith(MEASURED_BY))
    return next((key for key in keys if (before.get(key) or None) != (now.get(key) or None)), None)


def best_lines(best: Best | None, stopped: int | None, evaluations: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """What is said at the end of a run that exports its best step: why it ended early, if it did, what the best has,
    the last has and the start had.

    Args:
      best: the step that is exported; None says nothing.
      stopped: the last step that was made, where there were to be more.
      evaluations: the metrics of all evaluations by step.
    """
    if best is None:
        return []
    values = {step: metrics.get(best.metric) for step, metrics in evaluations.items()}
    last = max(values, default=best.step)
    said = f"exported: step {best.step}, the best by {best.metric} ({best.value:.4g})"
    if last != best.step and (value := values[last]) is not None:
        said += f"; the last, step {last}, has {value:.4g}"
    early = f"stopped after step {stopped}: no better {best.metric} since step {best.step} (evaluation.patience)"
    lines = [said] if stopped is None else [early, said]
    start = values.get(0)
    if start is not None and goodness(best.metric, best.value) <= goodness(best.metric, start):
        lines.append(f"no step was better than the start, which has {start:.4g}")
    return lines
