"""What is measured on held-out data while a run goes on, and after it."""

import functools
import json
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax import sharding
from dpo_jax.data.batch import Batch
from dpo_jax.data.batches import Batches
from dpo_jax.data.templates import Codec
from dpo_jax.data.tokenizer import Tokenizer
from dpo_jax.evaluation import winrate
from dpo_jax.evaluation.settings import EvaluationSettings
from dpo_jax.files import write_whole
from dpo_jax.intervals import is_at
from dpo_jax.model.decoder import cast
from dpo_jax.model.weights import Weights
from dpo_jax.objectives.mixture import as_measured
from dpo_jax.preference import heldout
from dpo_jax.preference.loss import TrainingObjective, evaluate_batch
from dpo_jax.processes.here import here
from dpo_jax.reporting.metrics import recorded
from dpo_jax.run.judging import AgainstStart
from dpo_jax.run.seen import keep_rewards
from dpo_jax.run.written import UNROUNDED, Merging, Rounding
from dpo_jax.trees import Params


class EvaluationPrompts(NamedTuple):
    """Prompts for the model, how they become tokens, what ends its answers, and how long these may be, in tokens."""

    questions: list[winrate.Asked | winrate.Question]
    coder: Codec
    stop: tuple[int, ...]
    max_new_tokens: int
    judge: AgainstStart | None = None


def read_prompts(
    settings: EvaluationSettings,
    folder: Path,
    tokenizer: Tokenizer,
    arguments: Mapping[str, Any] | None,
    judge: AgainstStart | None = None,
) -> EvaluationPrompts | None:
    """The questions of `evaluation.answers`, if there are any to ask; `folder` is the policy's, `arguments` are for the
    chat template, and `judge` has the answers compared."""
    if settings.answers is None:
        return None
    stop = winrate.stop_tokens(folder, tokenizer)
    questions = winrate.read_answered(settings.answers)
    coder = winrate.prompt_codec(tokenizer, arguments=arguments)
    return EvaluationPrompts(questions, coder, stop, settings.max_new_tokens, judge)


class Evaluator:
    """Everything that is measured on held-out data, compiled once."""

    def __init__(
        self,
        objective: TrainingObjective,
        mesh: jax.sharding.Mesh,
        *,
        held_out: Mapping[str, Batches],
        reference: Params | None = None,
        prompts: EvaluationPrompts | None = None,
        every: Fraction | None = None,
        rounding: Rounding | Merging | None = None,
    ):
        """Set up; compiles at its first use. `held_out` are sweeps by the set's name, which is empty where there is one
        alone, `reference` the weights of a live one, `every` counts steps, and `rounding` is that of the folder that
        the run will leave."""
        self._objective, self._mesh, self._held_out, self._reference = objective, mesh, held_out, reference
        self._prompts, self._every, self._rounding = prompts, every, rounding
        self._collect = sharding.Compiled(
            lambda weights, live, batch: evaluate_batch(objective, weights, batch, live), mesh
        )
        self._measure = heldout.measurement(as_measured(objective.terms))
        self._rewards = heldout.rewards_of(as_measured(objective.terms))

    def due(self, step: int, last: int) -> bool:
        """Whether to evaluate after this many steps."""
        wanted = bool(self._held_out) or self._prompts is not None
        return wanted and (step in (0, last) or (self._every is not None and is_at(step, self._every)))

    def __call__(
        self,
        weights: Weights,
        folder: Path,
        step: int,
        *,
        progress: float = 0.0,
        moved: Params | None = None,
        as_written: bool = False,
    ) -> dict[str, float]:
        """Metrics of these weights after this many steps, or of these weights as an export would write them; answers go
        to `answers/STEP.jsonl`, rewards to `evaluations/STEP.npz`.

        `progress` is the share of the run that is done, `moved` the weights of a reference that moves.
        """
        if as_written and self._rounding is not None and self._rounding.digits:
            weights = self._rounding(weights)
        seen = self._look(weights, moved)
        found = self._on_pairs(seen, progress)
        keep_rewards(folder, step, {name: self._rewards(pairs, progress) for name, pairs in seen.items()})
        if self._prompts is not None:
            found |= self._answer(self._prompts, weights.params, folder, step)
        return found

    def unrounded(self, weights: Weights, *, progress: float = 0.0, moved: Params | None = None) -> dict[str, float]:
        """The margin of the weights as they were trained, to stand beside that of the same weights as written; none
        where writing rounds nothing."""
        if self._rounding is None or not self._rounding.digits:
            return {}
        found = self.on_pairs(weights, progress=progress, moved=moved)
        return {UNROUNDED + name: value for name, value in found.items() if name == "rewards/margins"}

    def on_pairs(self, weights: Weights, *, progress: float = 0.0, moved: Params | None = None) -> dict[str, float]:
        """Metrics of these weights on all held-out pairs, and on those of each set that has a name; none where there
        are no pairs."""
        return self._on_pairs(self._look(weights, moved), progress)

    def _look(self, weights: Weights, moved: Params | None) -> dict[str, heldout.SeenPairs]:
        live = self._reference if moved is None else moved
        collect = functools.partial(_collected, self._collect, live)
        place = functools.partial(sharding.place, mesh=self._mesh)
        return {name: heldout.look(collect, weights, batches, place) for name, batches in self._held_out.items()}

    def _on_pairs(self, seen: Mapping[str, heldout.SeenPairs], progress: float) -> dict[str, float]:
        if not seen:
            return {}
        whole = functools.reduce(heldout.SeenPairs.__add__, seen.values())
        found = self._measured(whole, progress)
        for name, pairs in seen.items():
            if name:
                metrics = self._measured(pairs, progress)
                found |= {recorded(metric, name): value for metric, value in metrics.items()}
        return found

    def _measured(self, pairs: heldout.SeenPairs, progress: float) -> dict[str, float]:
        return counted(self._objective, heldout.measured(pairs, self._measure, progress))

    def told(self) -> list[str]:
        """What is to be said of the last evaluation."""
        judge = self._prompts.judge if self._prompts is not None else None
        if judge is None:
            return []
        lines, judge.faults = judge.faults, []
        return lines

    def _answer(self, prompts: EvaluationPrompts, params: Params, folder: Path, step: int) -> dict[str, float]:
        answers = winrate.answer(
            self._objective.spec,
            cast(params, jnp.dtype(self._objective.compute_dtype)),
            prompts.questions,
            prompts.coder,
            stop=prompts.stop,
            max_new_tokens=prompts.max_new_tokens,
            mesh=self._mesh,
        )
        path = folder / "answers" / f"{step}.jsonl"
        if here().owns:
            path.parent.mkdir(exist_ok=True)
            write_whole(path, "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
        judged = {} if prompts.judge is None else prompts.judge(prompts.questions, answers, folder, step)
        return {**winrate.rated(answers), **judged}


def _collected(collect: Callable, live: Params | None, weights: Weights, batch: Batch) -> Any:
    return collect(weights, live, batch)


def counted(objective: TrainingObjective, metrics: dict[str, float]) -> dict[str, float]:
    """The metrics, less those that are nan because a step of single completions has none that is (un)desirable."""
    if objective.data != "unpaired" or not math.isfinite(metrics["loss"]):
        return metrics
    return {name: value for name, value in metrics.items() if not math.isnan(value)}
