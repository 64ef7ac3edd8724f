"""`python -m dpo_jax.train CONFIG [key=value ...]`: from a folder and preferences to a folder, as it happens."""

import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpo_jax.config import command as commands
from dpo_jax.config import run as config
from dpo_jax.processes import places, starting
from dpo_jax.processes.here import here

if TYPE_CHECKING:
    from dpo_jax.run.checkpoints import Saver
    from dpo_jax.run.recorder import Listener, Recorder
    from dpo_jax.run.trainer import Trainer
    from dpo_jax.training.step import State

DRY_RUN = "--dry-run"
FOR_MANY = "start one of them; what all hosts take is said by python -m dpo_jax.plan --devices N --hosts M"


@commands.command_of_hosts
def main(argv: Sequence[str]) -> int:
    """Read the settings, then train; nothing heavy is imported before they are known to be right."""
    words = [word for word in argv if word != DRY_RUN]
    run = config.load(words, options=[f"  {DRY_RUN}  only say what the run would find and take: data, memory, hours"])
    commands.quiet_libraries()
    if len(words) == len(argv):
        starting.begin(run.distributed, config.same_everywhere(run))
        return train(run)
    places.check_alone(os.environ, f"train {DRY_RUN}", FOR_MANY)
    from dpo_jax.run.dry_run import dry_run

    return dry_run(run)


def train(run: config.Run, listener: "Listener | None" = None) -> int:
    """The whole job. Running it again goes on where it stopped; exit code 0 when done, 75 or 130 when stopped early.

    The `listener` hears of each step and evaluation.
    """
    began = time.perf_counter()
    from dpo_jax.run import checkpoints, compile_cache, output, result, sources
    from dpo_jax.run.continuing import Past
    from dpo_jax.run.prepare import Job, check_new

    here().decide("a new run", lambda: check_new(run))
    with output.opened(run) as folder:
        past = Past.of(folder)
        past.check_settings(run)
        if here().decide("whether the run is finished", lambda: result.is_finished(run, past)):
            return result.show(run, folder, "this run is finished already")
        sources.check_export(run.export)
        compile_cache.use(run.model.compile_cache)
        job = Job.read(run, folder)
        facts = job.record(past)
        spec, weights = job.load_policy()
        objective = job.objective(spec, weights)
        with checkpoints.opened(run, folder, facts) as saver, job.journal(saver.start, began) as journal:
            reference = job.reference(objective, weights, journal, resumes=saver.start is not None)
            trainer = job.trainer(objective, weights, reference)
            evaluator = job.evaluator(objective, weights, reference)
            watch = job.watch(saver, journal)
            recorder = job.recorder(trainer, evaluator, journal, after=saver.start or 0, watch=watch)
            if listener is not None:
                recorder.tell(listener)
            state = saver.restored(trainer, weights, journal) or recorder.begin(weights)
            del weights
            state, stopped = advance(trainer, state, recorder, saver)
            if stopped:
                return result.say_stopped(stopped, state, journal)
            ended = result.Ended.of(state, trainer.batches.steps, recorder.watch)
            weights = saver.weights(ended.best, trainer, state)
            result.export(run, job.sources, job.policy, weights, journal, job.ending, ended)
        return result.show(run, folder, "done")


def advance(trainer: "Trainer", state: "State", recorder: "Recorder", saver: "Saver") -> tuple["State", int | None]:
    """Every step that is left, or as many as are worth while. Returns the last state, and the signal that stopped it
    early, if one did."""
    from dpo_jax.run.interrupts import Interrupts

    first, last = int(state["step"]), trainer.batches.steps
    until = first if recorder.gave_up else last
    if first < until:
        trainer.compile(recorder.journal)
    elif first == last:
        recorder.evaluate(last, state)
    recorder.start()
    with Interrupts(trainer.mesh) as interrupts:
        for made in trainer.placed_batches(first, until):
            state, metrics = trainer.step(state, made.value)
            step = made.step + 1
            recorder.take(step, metrics, waited=made.waited)
            better = recorder.evaluate(step, state)
            ends = step == last or recorder.gave_up
            interrupts.agree()
            saved = saver.save(step, state, recorder, at_once=bool(better or ends or interrupts.stop))
            if ends:
                break
            if saved and interrupts.stop:
                return state, interrupts.stop
    recorder.end(state)
    return state, None


if __name__ == "__main__":
    sys.exit(main())
