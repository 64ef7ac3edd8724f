"""What a run writes down of each step, and what it measures, checks and saves between steps."""

import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax.data.batches import pair_tokens
from dpo_jax.errors import UserError
from dpo_jax.model.weights import Weights
from dpo_jax.preference.loss import TrainingObjective
from dpo_jax.processes.here import here
from dpo_jax.reporting.health import Alarms
from dpo_jax.reporting.hosts import SlowHost, host_metrics
from dpo_jax.reporting.journal import Journal, read_records
from dpo_jax.reporting.metrics import recorded
from dpo_jax.reporting.overfitting import HELD_OUT
from dpo_jax.reporting.settings import AlarmSettings
from dpo_jax.run.best import MetricWatch
from dpo_jax.run.data import Data
from dpo_jax.run.evaluator import Evaluator, counted
from dpo_jax.run.first_step import FirstStep, preference_loss
from dpo_jax.run.trainer import Trainer
from dpo_jax.training.loss_scale import LossScale
from dpo_jax.training.optimizer import warmup_steps
from dpo_jax.training.settings import OptimizerSettings
from dpo_jax.training.step import State


class Checks(NamedTuple):
    """What a run's steps are held against: what is known of the first, what is said of the others, and how many in a
    row that are not finite end it."""

    first_step: FirstStep
    alarms: Alarms | None
    max_nonfinite: int


class Listener(NamedTuple):
    """Whoever called, from Python, who wants to hear of each step and of each evaluation; what it raises ends the run.

    Every process of a run calls it: `on_step(step, metrics)` with the metrics of a record, whether it is written or
    not, and `on_evaluation(step, metrics)` after that of the same step, by the names that `metrics.recorded` gives.
    """

    on_step: Callable[[int, dict[str, float]], object] | None = None
    on_evaluation: Callable[[int, dict[str, float]], object] | None = None
    lines: int | None = None
    """Steps that are shown at most, where each is a line."""


NOBODY = Listener()


class Recorder:
    """Writes each step's metrics to the journal once the device has them, one step late, so that it never waits; and
    measures held-out data where that is due."""

    def __init__(
        self,
        trainer: Trainer,
        evaluator: Evaluator,
        data: Data,
        journal: Journal,
        *,
        after: int,
        checks: Checks,
        watch: MetricWatch | None = None,
    ):
        """Go on `after` so many steps; `watch` says which of them is the best."""
        self._trainer, self._evaluator, self._data, self.journal = trainer, evaluator, data, journal
        self._first_step, self._alarms, self._max_nonfinite = checks
        self.watch = watch
        self._objective, self._batches = trainer.objective, trainer.batches
        train = data.train
        self._lengths = pair_tokens(train)
        # A single completion's `rejected` is itself, or for KTO one of another prompt, cut to fit.
        single = self._objective.data in ("unpaired", "chosen")
        self._cut = train.truncated[train.chosen] | (not single and train.truncated[train.rejected])
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._seen = self._batches.total_before(after, self._lengths)
        self._is_first, self._once, self._listener, self._slow = True, {}, NOBODY, SlowHost()
        self.restart_clock()

    def tell(self, listener: Listener) -> None:
        """Tell somebody of each step and evaluation from now on."""
        self._listener = listener
        if listener.lines is not None:
            self.journal.at_most(listener.lines)

    def begin(self, weights: Weights) -> State:
        """The state before the first step, whose weights are measured if there is anything to measure."""
        if self._evaluator.due(0, self._batches.steps):
            self.journal.phase("compiling the evaluation, and evaluating")
            found = self._evaluator(weights, self.journal.folder, 0)
            if self.watch is not None:
                self.watch.take(0, found)
            self._write_evaluation(0, found)
        self.journal.show()
        return self._trainer.fresh(weights.trained)

    def start(self) -> None:
        """Say that training begins, and time it from now."""
        self.journal.phase("training")
        self.restart_clock()

    def end(self, state: State) -> None:
        """Write what is pending, and say what ought not to have happened.

        Raises:
          UserError: the last step was not finite, so the weights are not those of a training that went well; or no step
        moved them at all.
        """
        self.flush()
        last, (skipped, in_a_row) = int(state["step"]), (int(state[k]) for k in ("skipped", "consecutive_nonfinite"))
        if in_a_row:
            raise UserError(
                f"the last {in_a_row} of {last} steps were not finite, so nothing is exported; checkpoints and metrics "
                "stay; begin again in another output folder with a lower optimizer.learning_rate"
            )
        if skipped and skipped == last:
            raise UserError(
                f"none of {last} steps changed anything{_scale_of(state)}; so nothing is exported; checkpoints and "
                "metrics stay: give more steps, and the same command goes on"
            )
        if skipped:
            self.journal.note(f"{skipped} of {last} steps were not finite and changed nothing{_scale_of(state)}")
        if self._trainer.recompilations:
            self.journal.note(f"{self._trainer.recompilations} compilations happened after warm-up")

    def take(self, step: int, metrics: dict[str, jax.Array], *, waited: float) -> None:
        """Take over the metrics of step (from 1), which `waited` for its batch; those before are written now."""
        here().doing(f"step {step}", step=True)
        self._waited += waited
        self.flush()
        self._pending = (step, metrics)
        if self._is_first:
            jax.block_until_ready(metrics)
            self._once = {"time_to_first_step": time.perf_counter() - self.journal.began}
            self.journal.note(f"first step done {self._once['time_to_first_step']:.1f} s after the start")
            self._is_first = False
        if step == 1:
            self._first_step.check(metrics)

    @property
    def gave_up(self) -> bool:
        """Whether the run ends here, since nothing better came for long."""
        return self.watch is not None and self.watch.gave_up

    def evaluate(self, step: int, state: State) -> bool:
        """Measure the weights after this step, if that is due; whether they are the best so far.

        After the last step, and wherever the best is looked for, these are measured as they will be written; beside it
        stands what they had before, after the last step and where they are the best.
        """
        last = self._batches.steps
        if not self._evaluator.due(step, last):
            return False
        self.flush()
        here().doing(f"evaluating after step {step}")
        weights = self._trainer.weights(state)
        when = {"progress": (step - 1) / max(last - 1, 1), "moved": state.get("reference")}
        as_written = step == last or self.watch is not None
        found = self._evaluator(weights, self.journal.folder, step, as_written=as_written, **when)
        better = self.watch is not None and self.watch.take(step, found)
        if step == last or better:
            found |= self._evaluator.unrounded(weights, **when)
        self._write_evaluation(step, found)
        self.journal.show()
        self.restart_clock()
        return better

    def _write_evaluation(self, step: int, found: dict[str, float]) -> None:
        self.journal.evaluation(step, found)
        if self._listener.on_evaluation is not None:
            self._listener.on_evaluation(step, {recorded(name): float(value) for name, value in found.items()})
        for line in self._evaluator.told():
            self.journal.note(line)
        for line in self._alarms.take(step, {HELD_OUT: found.get("loss")}) if self._alarms else ():
            self.journal.note(line)

    def flush(self) -> None:
        """Write what is pending.

        Raises:
          UserError: too many steps in a row were not finite.
        """
        if self._pending is None:
            return
        own = time.perf_counter() - self._clock
        step, metrics = self._pending[0], {k: float(v) for k, v in jax.device_get(self._pending[1]).items()}
        self._pending = None
        seconds, waited = time.perf_counter() - self._clock, self._waited
        here().numbers = {"own": own, "waited": waited, "memory": memory_in_use()}
        self.restart_clock()
        consecutive_nonfinite = metrics.pop("nonfinite_streak")
        metrics = counted(self._objective, metrics)
        pairs = self._batches.pairs_of(step - 1)
        tokens = int(self._lengths[pairs].sum())  # as TRL counts them: the prompt once for each completion
        self._seen += tokens
        record = metrics | {
            "epoch": step * self._batches.pairs / self._data.train.num_pairs,
            "num_tokens": self._seen,
            "truncated": int(self._cut[pairs].sum()),
            "dropped": self._data.dropped,
            "step_seconds": seconds,
            "input_wait": waited / seconds,
            **self._once,
            "pairs_per_second": len(pairs) / seconds,
            "tokens_per_second": tokens / seconds,
            "memory_bytes": memory_in_use(),
            **host_metrics(here().heard),
        }
        if self._listener.on_step is not None:
            self._listener.on_step(step, dict(record))
        if self.journal.due(step):
            self.journal.step(step, record)
            if (line := self._slow.line(here().heard, seconds)) is not None:
                self.journal.note(line)
            self._once = {}
            for line in self._alarms.take(step, _watched(self._objective, metrics)) if self._alarms else ():
                self.journal.note(line)
        if consecutive_nonfinite > self._max_nonfinite:
            raise UserError(self._diverged(step, int(consecutive_nonfinite), pairs))

    def restart_clock(self) -> None:
        """Time the next step from now."""
        self._clock, self._waited = time.perf_counter(), 0.0

    def _diverged(self, step: int, count: int, pairs: np.ndarray) -> str:
        rows = [self._data.train.origin(int(pair)) for pair in pairs[:8]]
        return (
            f"step {step}: the loss or gradient was not finite for {count} steps in a row; the last checkpoint stays;"
            f" lower optimizer.learning_rate or look at the rows of this step: {', '.join(rows)}"
        )


def memory_in_use() -> int:
    """Bytes: the most on one accelerator so far; on a CPU, the most of the whole process."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [found["peak_bytes_in_use"] for found in stats if found and "peak_bytes_in_use" in found]
    return max(peaks) if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _scale_of(state: State) -> str:
    """What a note on skipped steps says of the loss scale, where there is one."""
    if (scaling := LossScale.of(state)) is None:
        return ""
    return f", as happens in float16 while the loss scale finds its size; it is {float(scaling.scale):g} now"


def _watched(objective: TrainingObjective, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What the alarms see of a step, live and when its record is read again (which has null for what is not finite)."""
    known = metrics["loss"] is not None and metrics.get("aux_loss", 0.0) is not None
    return {**metrics, "loss": preference_loss(objective, metrics) if known else None}


def make_alarms(
    settings: AlarmSettings,
    trainer: Trainer,
    folder: Path,
    *,
    known_loss: float | None,
    optimizer: OptimizerSettings,
    every: int,
) -> Alarms | None:
    """What watches the metrics, having seen the records of the steps that were already made.

    `known_loss` is the first loss where it is known, `every` the number of steps from record to record.
    """
    if not settings.enabled:
        return None
    steps = trainer.batches.steps
    alarms = Alarms(
        start=None if trainer.moving else known_loss,  # a move brings the loss back to it
        warmup_steps=warmup_steps(optimizer, steps),
        total_steps=steps,
        pairs=trainer.batches.pairs,
        chosen_drift=settings.chosen_drift,
        kl=settings.kl,
        every=every,
    )
    records = read_records(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    alarms.replay(_watched(trainer.objective, record) if "loss" in record else record for record in records)
    return alarms
