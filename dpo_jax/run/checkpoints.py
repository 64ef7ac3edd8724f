"""When a run saves, and how it goes on from what it saved."""

import contextlib
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax

from dpo_jax.config.run import Run
from dpo_jax.errors import UserError
from dpo_jax.intervals import is_at, steps_between
from dpo_jax.model.weights import Weights
from dpo_jax.processes.here import here
from dpo_jax.reporting.journal import METRICS_FILE, Journal
from dpo_jax.run import continuing
from dpo_jax.run.best import Best
from dpo_jax.run.output import CHECKPOINTS, RECORDS, record_of
from dpo_jax.run.recorder import Recorder
from dpo_jax.run.trainer import Trainer
from dpo_jax.training.checkpoints import Checkpoints, read_part
from dpo_jax.training.loss_scale import completed, fitted
from dpo_jax.training.step import ON_DISK, State, as_saved, from_saved, with_trained
from dpo_jax.training.steps import Steps
from dpo_jax.trees import Params


class Saver:
    """The checkpoints of a run, and every how many steps there is one.

    Attributes:
      start: step of the newest checkpoint, or None.
      past: the record of that checkpoint; empty where there is none.
    """

    def __init__(self, checkpoints: Checkpoints, *, every: Fraction, record: dict[str, Any]):
        """Look for the newest checkpoint; `record` is kept in each that is saved, every so many steps."""
        self._checkpoints, self._every, self._record = checkpoints, every, record
        self.start = checkpoints.latest()
        self.past = {} if self.start is None else checkpoints.read_record(self.start)

    def restored(self, trainer: Trainer, weights: Weights, journal: Journal) -> State | None:
        """The state after the newest checkpoint; the trained weights that were read are given up for it."""
        if self.start is None:
            return None
        for leaf in jax.tree.leaves(weights.trained):  # or they would stand beside those that are restored
            leaf.delete()
        journal.phase(f"resuming after step {self.start}")
        target = trainer.target()
        there = fitted(target, self._checkpoints.entries(self.start))
        saved, record = self._checkpoints.restore(self.start, as_saved(there))
        journal.note(f"resumed after step {self.start}")
        had, has = record.get("records", 0), journal.found
        if has < had:
            journal.note(
                f"{METRICS_FILE} has lost {had - has} of the {had} records that it had up to step {self.start}; the "
                "weights do not depend on it"
            )
        return completed(from_saved(saved), target)

    @property
    def kept(self) -> list[int]:
        """Steps with a checkpoint."""
        return self._checkpoints.kept()

    def save(self, step: int, state: State, recorder: Recorder, *, at_once: bool) -> bool:
        """Save the state after this step if that is due, or `at_once`; what it measured first.

        The best checkpoint so far is kept, however old. Returns whether it was saved.
        """
        due = is_at(step, self._every) or at_once
        self._checkpoints.check()
        if due:
            recorder.flush()
            here().doing(f"saving after step {step}")
            recorder.journal.sync()
            watch = recorder.watch
            watched = {} if watch is None else watch.record()
            record = {**self._record, "records": recorder.journal.records, **watched}
            best = watch and watch.best
            self._checkpoints.save(step, as_saved(state), record, best.step if best else None)
            recorder.journal.show()
            recorder.restart_clock()
        return due

    def weights(self, best: Best | None, trainer: Trainer, state: State) -> Weights:
        """The whole model's after the best step, or where there is none after the last; the state is given up for it.

        Raises:
          UserError: the checkpoint of the best step is gone or damaged.
        """
        last = trainer.weights(state)
        if best is None or best.step == int(state["step"]):
            return last
        self._checkpoints.wait()
        try:
            return with_trained(last, trained_at(self._checkpoints.place, best.step, last))
        except UserError as error:
            raise UserError(
                f"checkpoint.best: step {best.step} is the best by {best.metric}, and its weights are lost: {error}; "
                "put the checkpoint back, or set checkpoint.best=null to export the last step"
            ) from error


def trained_at(place: Steps, step: int, weights: Weights) -> Params:
    """The trained weights of a step, read to where those of `weights` are, which are given up for them; no other part
    of its state is read.

    Raises:
      UserError: the step is not there, is damaged, or is of another model.
    """
    name = ON_DISK["trained"]
    wanted = {
        name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), weights.trained)
    }
    for leaf in jax.tree.leaves(weights.trained):  # or they would stand beside those that are read
        leaf.delete()
    return read_part(place, step, wanted)[name]


@contextlib.contextmanager
def opened(run: Run, folder: Path, facts: Mapping[str, Any]) -> Iterator[Saver]:
    """The checkpoints in a run's folder, each with the run's settings and `facts`; what is still being written when
    this ends is waited for."""
    every = steps_between(run.checkpoint.every, facts[continuing.PAIRS], run.batch.pairs)
    with Checkpoints(folder / CHECKPOINTS, run.checkpoint, records=RECORDS) as checkpoints:
        yield Saver(checkpoints, every=every, record=record_of(run, facts))
