"""When a run saves, and how it goes on from what it saved."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from dpo_jax.config.run import Run
from dpo_jax.model.weights import Weights
from dpo_jax.reporting.journal import METRICS_FILE, Journal
from dpo_jax.run.output import CHECKPOINTS, record_of
from dpo_jax.run.recorder import Recorder
from dpo_jax.run.trainer import Trainer
from dpo_jax.training.checkpoints import Checkpoints
from dpo_jax.training.loss_scale import completed, fitted
from dpo_jax.training.step import State, as_saved, from_saved


class Saver:
    """The checkpoints of a run, and every how many steps there is one.

    Attributes:
      start: step of the newest checkpoint, or None.
    """

    def __init__(self, checkpoints: Checkpoints, *, every: int, record: dict[str, Any]):
        """Look for the newest checkpoint; `record` is kept in each that is saved."""
        self._checkpoints, self._every, self._record = checkpoints, every, record
        self.start = checkpoints.latest()

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

    def save(self, step: int, state: State, recorder: Recorder, *, last: int, at_once: bool) -> bool:
        """Save the state after this step if that is due, at the `last` step, or `at_once`; what it measured first.

        Returns whether it was saved.
        """
        due = step % self._every == 0 or step == last or at_once
        if due:
            recorder.flush()
            recorder.journal.sync()
            record = {**self._record, "records": recorder.journal.records}
            self._checkpoints.save(step, as_saved(state), record)
            recorder.journal.show()
            recorder.restart_clock()
        return due


@contextlib.contextmanager
def opened(run: Run, folder: Path, facts: Mapping[str, Any]) -> Iterator[Saver]:
    """The checkpoints in a run's folder, each with the run's settings and `facts`; what is still being written when
    this ends is waited for."""
    with Checkpoints(folder / CHECKPOINTS, run.checkpoint) as checkpoints:
        yield Saver(checkpoints, every=run.checkpoint.every, record=record_of(run, facts))
