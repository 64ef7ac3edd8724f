"""The loop: a compiled step, what is recorded of it, and when to measure, to save and to stop."""

import functools
import json
import math
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import sharding
from dpo_jax.config import run as config
from dpo_jax.config.run import Run
from dpo_jax.data.batches import Batches, Made, pair_tokens, prefetch
from dpo_jax.data.workers import processes
from dpo_jax.evaluation import winrate
from dpo_jax.model.decoder import Model, cast
from dpo_jax.objectives.mixture import as_measured
from dpo_jax.preference import heldout as preference
from dpo_jax.preference.loss import Problem, evaluate_batch
from dpo_jax.reporting.health import Alarms
from dpo_jax.reporting.journal import Journal, read_records
from dpo_jax.run.first_step import check_start, known_start, preference_loss
from dpo_jax.run.folder import Data, Reference, sweep
from dpo_jax.run.models import shares
from dpo_jax.run.sources import Sources
from dpo_jax.settings import UserError
from dpo_jax.training.checkpoints import Checkpoints
from dpo_jax.training.optimizer import make_optimizer, schedule, state_shardings, warmup_steps, wide
from dpo_jax.training.step import MovingReference, State, fresh_state, make_step

CORES_A_PROGRAM = 4
"""Cores for each program that is compiled at a time, as XLA itself uses several. A guess: more than two were not at
hand, and on two busy ones the quickstart's four shapes side by side took 19 % longer, and half as much memory again."""


class Trainer:
    """The compiled step, the state it moves, and the batches it takes."""

    def __init__(
        self, run: Run, policy: Model, problem: Problem, batches: Batches, reference: Reference, mesh: jax.sharding.Mesh
    ):
        """Set up; nothing is compiled yet and the state is only described. A reference that moves becomes state."""
        self.run, self.problem, self.batches, self.mesh = run, problem, batches, mesh
        self.moving = (
            MovingReference(run.reference.update_every, run.reference.update_rate)
            if run.reference.update_every
            else None
        )
        self._start = reference.weights if self.moving else None
        self.reference = None if self.moving else reference.weights
        self.optimizer = make_optimizer(run.optimizer)
        self.abstract = jax.eval_shape(
            self._fresh, policy.params, jax.eval_shape(wide, policy.params) if self.moving else None
        )
        self.shardings = self._state_shardings()
        rate = schedule(run.optimizer, batches.steps)
        step = make_step(problem, self.optimizer, rate, steps=batches.steps, moving=self.moving, seed=run.seed)
        self._step = sharding.Compiled(step, out_shardings=(self.shardings, None), donate=(0,))

    def step(self, state: State, batch: Any) -> tuple[State, dict[str, jax.Array]]:
        """One optimizer step; the old state is consumed."""
        return self._step(state, self.reference, batch)

    @property
    def late_compilations(self) -> int:
        """Compilations since `compile`; 0 is what a run wants."""
        return self._step.late

    def fresh(self, params: Any) -> State:
        """The state before the first step; parameters and a moving reference are the given arrays themselves."""
        given = {"params": params} | ({"reference": self._start} if self.moving else {})
        rest = jax.jit(
            lambda p: {k: v for k, v in self._fresh(p, None).items() if k not in given},
            out_shardings={k: v for k, v in self.shardings.items() if k not in given},
        )(params)
        self._start = None
        return {**given, **rest}

    def _fresh(self, params: Any, reference: Any) -> State:
        return fresh_state(params, self.optimizer, reference=reference, remembers=self.problem.remembers)

    def target(self) -> Any:
        """Shapes, dtypes and shardings of the state, for restoring it."""
        return sharding.shape_of(self.abstract, self.shardings)

    def compile(self, journal: Journal) -> None:
        """Compile the step for each shape of the run, one at a time for every `CORES_A_PROGRAM` cores."""
        blanks = self.batches.blanks()
        kinds = [self._arguments(blank) for blank in blanks]
        journal.phase(f"compiling 1/{len(kinds)}")
        for done in self._step.prepare(kinds, workers=max(1, processes(None) // CORES_A_PROGRAM)):
            journal.phase(f"compiling {min(done + 1, len(kinds))}/{len(kinds)}")

    def lower(self, blank: Any) -> jax.stages.Lowered:
        """The step for batches of this shape, lowered but not compiled."""
        return self._step.lower(*self._arguments(blank))

    def _arguments(self, blank: Any) -> tuple[Any, Any, Any]:
        """Shapes, dtypes and shardings of what the step takes."""
        return self.target(), self.reference, sharding.shape_of(blank, sharding.batch_shardings(blank, self.mesh))

    def placed_batches(self, first: int) -> Iterator[Made]:
        """Batches from a step on, on their devices, made ahead by a thread."""
        return prefetch(lambda step: sharding.place(self.batches.at(step), self.mesh), range(first, self.batches.steps))

    def _state_shardings(self) -> Any:
        whole = sharding.replicated(self.mesh)
        params = sharding.param_shardings(self.abstract["params"], self.mesh)
        moments = state_shardings(self.abstract["optimizer"], self.abstract["params"], params, whole)
        found = {name: whole for name in self.abstract}
        return found | {"params": params, "optimizer": moments} | ({"reference": params} if self.moving else {})


class Evaluator:
    """Everything that is measured on held-out data, compiled once."""

    def __init__(
        self,
        run: Run,
        problem: Problem,
        data: Data,
        reference: Reference,
        tokenizer: Any,
        mesh: jax.sharding.Mesh,
        exam: "Exam | None",
    ):
        """Set up; compiles at its first use."""
        self.run, self.problem, self.reference, self.tokenizer, self.mesh = run, problem, reference, tokenizer, mesh
        self._collect = sharding.Compiled(lambda params, live, batch: evaluate_batch(problem, params, batch, live))
        self._measure = preference.measurement(as_measured(problem.terms))
        shards = sharding.batch_shards(mesh)
        held_out = data.held_out
        self._pairs = (
            None if held_out is None else sweep(run, held_out, shards, shares(run, problem.spec), reference.held_out)
        )
        self._exam = exam

    def due(self, step: int, last: int) -> bool:
        """Whether to evaluate after this many steps."""
        every = self.run.evaluation.every
        wanted = self._pairs is not None or self._exam is not None
        return wanted and (step in (0, last) or (every is not None and step % every == 0))

    def __call__(
        self, params: Any, folder: Path, step: int, *, progress: float = 0.0, moved: Any = None
    ) -> dict[str, float]:
        """Metrics of these weights after this many steps; answers go to `answers/STEP.jsonl`.

        `progress` is the share of the run that is done, `moved` the weights of a reference that moves.
        """
        found: dict[str, float] = {}
        if self._pairs is not None:
            live = self.reference.weights if moved is None else moved
            collect = functools.partial(_three, self._collect, live)
            place = functools.partial(sharding.place, mesh=self.mesh)
            measured = preference.evaluate(collect, params, self._pairs, place, self._measure, progress)
            found |= counted(self.problem, measured)
        if self._exam is not None:
            found["good_answers"] = self._answer(self._exam, params, folder / "answers" / f"{step}.jsonl")
        return found

    def _answer(self, exam: "Exam", params: Any, path: Path) -> float:
        weights = cast(params, jnp.dtype(self.problem.compute_dtype))
        answers = winrate.answer(
            self.problem.spec,
            weights,
            exam.questions,
            self.tokenizer,
            stop=exam.stop,
            max_new_tokens=self.run.evaluation.max_new_tokens,
            mesh=self.mesh,
        )
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
        return winrate.share_of_good_answers(answers)


def _three(collect: Callable, live: Any, params: Any, batch: Any) -> Any:
    return collect(params, live, batch)


def counted(problem: Problem, metrics: dict[str, float]) -> dict[str, float]:
    """The metrics, less those that are nan because a step of single completions has none that is (un)desirable."""
    if problem.data != "unpaired" or not math.isfinite(metrics["loss"]):
        return metrics
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


class Exam(NamedTuple):
    """Questions for the model, and the tokens that end its answers."""

    questions: list[winrate.Question]
    stop: tuple[int, ...]


def read_exam(run: Run, sources: Sources, tokenizer: Any) -> Exam | None:
    """The questions of `evaluation.answers`, if there are any to ask."""
    if run.evaluation.answers is None:
        return None
    return Exam(winrate.read_questions(run.evaluation.answers), winrate.stop_tokens(sources.policy, tokenizer))


class Recorder:
    """Writes each step's metrics to the journal once the device has them, one step late, so that it never waits."""

    def __init__(self, run: Run, trainer: Trainer, data: Data, journal: Journal, start: int, alarms: Alarms | None):
        """Go on after step `start`."""
        self.run, self.batches, self.data, self.journal, self.alarms = run, trainer.batches, data, journal, alarms
        self.problem = trainer.problem
        train = data.train
        self._lengths = pair_tokens(train)
        # A single completion's `rejected` is itself, or for KTO one of another prompt, cut to fit.
        single = trainer.problem.data in ("unpaired", "chosen")
        self._cut = train.truncated[train.chosen] | (not single and train.truncated[train.rejected])
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._seen = self.batches.total_before(start, self._lengths)
        self._is_first, self._once = True, {}
        self.restart_clock()

    def take(self, step: int, metrics: dict[str, jax.Array], *, waited: float) -> None:
        """Take over the metrics of step (from 1), which `waited` for its batch; those before are written now."""
        self._waited += waited
        self.flush()
        self._pending = (step, metrics)
        if self._is_first:
            jax.block_until_ready(metrics)
            self._once = {"time_to_first_step": time.perf_counter() - self.journal.began}
            self.journal.note(f"first step done {self._once['time_to_first_step']:.1f} s after the start")
            self._is_first = False

    def flush(self) -> None:
        """Write what is pending.

        Raises:
          UserError: too many steps in a row were not finite.
        """
        if self._pending is None:
            return
        step, metrics = self._pending[0], {k: float(v) for k, v in jax.device_get(self._pending[1]).items()}
        self._pending = None
        seconds, waited = time.perf_counter() - self._clock, self._waited
        self.restart_clock()
        streak = metrics.pop("nonfinite_streak")
        metrics = counted(self.problem, metrics)
        tokens = self._tokens(step - 1)
        self._seen += int(tokens.sum())
        pairs = self.batches.pairs_of(step - 1)
        if self.journal.due(step):
            self.journal.step(
                step,
                metrics
                | {
                    "epoch": step * self.run.batch.pairs / self.data.train.num_pairs,
                    "num_tokens": self._seen,
                    "truncated": int(self._cut[pairs].sum()),
                    "dropped": self.data.dropped,
                    "step_seconds": seconds,
                    "input_wait": waited / seconds,
                    **self._once,
                    "pairs_per_second": len(pairs) / seconds,
                    "tokens_per_second": float(tokens.sum()) / seconds,
                    "memory_bytes": memory_in_use(),
                },
            )
            self._once = {}
            plain = metrics | {"loss": preference_loss(self.problem, metrics)}
            for line in self.alarms.take(step, plain) if self.alarms else ():
                self.journal.note(line)
        if streak > self.run.log.max_nonfinite:
            raise UserError(self._diverged(step, int(streak), pairs))

    def restart_clock(self) -> None:
        """Time the next step from now."""
        self._clock, self._waited = time.perf_counter(), 0.0

    def _tokens(self, step: int) -> np.ndarray:
        """Tokens of each pair of a step, as TRL counts them: the prompt once for each completion."""
        return self._lengths[self.batches.pairs_of(step)]

    def _diverged(self, step: int, streak: int, pairs: np.ndarray) -> str:
        rows = [self.data.train.origin(int(pair)) for pair in pairs[:8]]
        return (
            f"step {step}: the loss or gradient was not finite for {streak} steps in a row; the last checkpoint stays;"
            f" lower optimizer.learning_rate or look at the rows of this step: {', '.join(rows)}"
        )


def memory_in_use() -> int:
    """Bytes: the most on one accelerator so far; on a CPU, the most of the whole process."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [found["peak_bytes_in_use"] for found in stats if found and "peak_bytes_in_use" in found]
    return max(peaks) if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_alarms(run: Run, trainer: Trainer, data: Data, folder: Path) -> Alarms | None:
    """What watches the metrics, having seen the records of the steps that were already made."""
    if not run.alarms.enabled:
        return None
    steps = trainer.batches.steps
    alarms = Alarms(
        start=None if trainer.moving else known_start(run, trainer.problem, data),  # a move brings the loss back to it
        warmup_steps=warmup_steps(run.optimizer, steps),
        total_steps=steps,
        pairs=run.batch.pairs,
        chosen_drift=run.alarms.chosen_drift,
        kl=run.alarms.kl,
        every=run.log.every,
    )
    records = read_records(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    alarms.replay(record for record in records if "loss" in record)
    return alarms


class Interrupts:
    """Ctrl-C and SIGTERM ask the loop to stop after the step it is in; a second Ctrl-C stops at once."""

    def __init__(self):
        """Nothing has been asked yet."""
        self.asked: int | None = None

    def __enter__(self) -> "Interrupts":
        """Listen."""
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        """Listen no more."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number


def start_or_resume(
    trainer: Trainer,
    policy: Model,
    checkpoints: Checkpoints,
    start: int | None,
    evaluator: Evaluator,
    folder: Path,
    journal: Journal,
) -> State:
    """The state after the newest checkpoint; or the state before the first step, which is measured first."""
    if start is not None:
        for leaf in jax.tree.leaves(policy.params):  # or they would stand beside those that are restored
            leaf.delete()
        journal.phase(f"resuming after step {start}")
        state, _ = checkpoints.restore(start, trainer.target())
        journal.note(f"resumed after step {start}")
        return state
    if evaluator.due(0, trainer.batches.steps):
        journal.phase("evaluating")
        journal.evaluation(0, evaluator(policy.params, folder, 0))
    return trainer.fresh(policy.params)


def loop(
    run: Run,
    trainer: Trainer,
    state: State,
    evaluator: Evaluator,
    checkpoints: Checkpoints,
    data: Data,
    folder: Path,
    journal: Journal,
) -> tuple[State, int | None]:
    """Every step that is left. Returns the last state, and the signal that stopped it early, if one did."""
    first, last = int(state["step"]), trainer.batches.steps
    if first < last:
        trainer.compile(journal)
    journal.phase("training")
    recorder = Recorder(run, trainer, data, journal, first, make_alarms(run, trainer, data, folder))
    with Interrupts() as interrupts:
        for made in trainer.placed_batches(first):
            state, metrics = trainer.step(state, made.value)
            step = made.step + 1
            recorder.take(step, metrics, waited=made.waited)
            if step == 1:
                check_start(run, trainer.problem, data, metrics)
            if evaluator.due(step, last):
                recorder.flush()
                progress = (step - 1) / max(last - 1, 1)
                found = evaluator(state["params"], folder, step, progress=progress, moved=state.get("reference"))
                journal.evaluation(step, found)
                recorder.restart_clock()
            if step % run.checkpoint.every == 0 or step == last or interrupts.asked:
                recorder.flush()
                checkpoints.save(step, state, {"settings": config.dump(run)})
                recorder.restart_clock()
            if interrupts.asked and step < last:
                return state, interrupts.asked
    if trainer.late_compilations:
        journal.note(f"{trainer.late_compilations} compilations happened after warm-up")
    return state, None
