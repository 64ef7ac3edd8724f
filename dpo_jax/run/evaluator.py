"""What is measured on held-out data while a run goes on, and after it."""

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax import sharding
from dpo_jax.data.batches import Batches
from dpo_jax.data.templates import Codec
from dpo_jax.evaluation import winrate
from dpo_jax.evaluation.settings import EvaluationSettings
from dpo_jax.model.decoder import cast
from dpo_jax.model.weights import Weights
from dpo_jax.objectives.mixture import as_measured
from dpo_jax.objectives.pairs import Pairs
from dpo_jax.preference import heldout
from dpo_jax.preference.loss import TrainingObjective, evaluate_batch
from dpo_jax.run.seen import keep_rewards
from dpo_jax.run.written import UNROUNDED, Merging, Rounding


class EvaluationPrompts(NamedTuple):
    """Questions for the model, how they become tokens, what ends its answers, and how long these may be, in tokens."""

    questions: list[winrate.Question]
    coder: Codec
    stop: tuple[int, ...]
    max_new_tokens: int


def read_prompts(
    settings: EvaluationSettings, folder: Path, tokenizer: Any, arguments: Mapping[str, Any] | None
) -> EvaluationPrompts | None:
    """The questions of `evaluation.answers`, if there are any to ask; `folder` is the policy's, `arguments` are for the
    chat template."""
    if settings.answers is None:
        return None
    stop = winrate.stop_tokens(folder, tokenizer)
    questions = winrate.read_questions(settings.answers)
    coder = winrate.prompt_codec(tokenizer, arguments=arguments)
    return EvaluationPrompts(questions, coder, stop, settings.max_new_tokens)


class Evaluator:
    """Everything that is measured on held-out data, compiled once."""

    def __init__(
        self,
        objective: TrainingObjective,
        mesh: jax.sharding.Mesh,
        *,
        held_out: Batches | None,
        reference: Any = None,
        prompts: EvaluationPrompts | None = None,
        every: int | None = None,
        rounding: Rounding | Merging | None = None,
    ):
        """Set up; compiles at its first use. `reference` are the weights of a live one, `every` counts steps, and
        `rounding` is that of the folder that the run will leave."""
        self._objective, self._mesh, self._held_out, self._reference = objective, mesh, held_out, reference
        self._prompts, self._every, self._rounding = prompts, every, rounding
        self._collect = sharding.Compiled(
            lambda weights, live, batch: evaluate_batch(objective, weights, batch, live), mesh
        )
        self._measure = heldout.measurement(as_measured(objective.terms))
        self._rewards, self._seen = heldout.rewards_of(as_measured(objective.terms)), {}

    def due(self, step: int, last: int) -> bool:
        """Whether to evaluate after this many steps."""
        wanted = self._held_out is not None or self._prompts is not None
        return wanted and (step in (0, last) or (self._every is not None and step % self._every == 0))

    def __call__(
        self,
        weights: Weights,
        folder: Path,
        step: int,
        *,
        progress: float = 0.0,
        moved: Any = None,
        is_last: bool = False,
    ) -> dict[str, float]:
        """Metrics of these weights after this many steps; answers go to `answers/STEP.jsonl`.

        After the last step these are the metrics of the weights as they will be written, and the margin that they had
        before is beside them. `progress` is the share of the run that is done, `moved` the weights of a reference that
        moves.
        """
        unrounded: dict[str, float] = {}
        if is_last and self._rounding is not None and self._rounding.digits:
            unrounded = self.on_pairs(weights, progress=progress, moved=moved)
            weights = self._rounding(weights)
        found = self.on_pairs(weights, progress=progress, moved=moved)
        found |= {UNROUNDED + name: value for name, value in unrounded.items() if name == "rewards/margins"}
        if jax.process_index() == 0:
            keep_rewards(folder, step, self._seen)
        if self._prompts is not None:
            found["good_answers"] = self._answer(self._prompts, weights.params, folder / "answers" / f"{step}.jsonl")
        return found

    def on_pairs(self, weights: Weights, *, progress: float = 0.0, moved: Any = None) -> dict[str, float]:
        """Metrics of these weights on the held-out pairs alone; none where there are no pairs."""
        if self._held_out is None:
            return {}
        live = self._reference if moved is None else moved
        collect = functools.partial(_collected, self._collect, live)
        place = functools.partial(sharding.place, mesh=self._mesh)
        self._seen = {}

        def keep(pairs: Pairs) -> None:
            self._seen |= self._rewards(pairs, progress)

        measured = heldout.evaluate(collect, weights, self._held_out, place, self._measure, progress, keep)
        return counted(self._objective, measured)

    def _answer(self, prompts: EvaluationPrompts, params: Any, path: Path) -> float:
        answers = winrate.answer(
            self._objective.spec,
            cast(params, jnp.dtype(self._objective.compute_dtype)),
            prompts.questions,
            prompts.coder,
            stop=prompts.stop,
            max_new_tokens=prompts.max_new_tokens,
            mesh=self._mesh,
        )
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
        return winrate.pass_rate(answers)


def _collected(collect: Callable, live: Any, weights: Weights, batch: Any) -> Any:
    return collect(weights, live, batch)


def counted(objective: TrainingObjective, metrics: dict[str, float]) -> dict[str, float]:
    """The metrics, less those that are nan because a step of single completions has none that is (un)desirable."""
    if objective.data != "unpaired" or not math.isfinite(metrics["loss"]):
        return metrics
    return {name: value for name, value in metrics.items() if not math.isnan(value)}
