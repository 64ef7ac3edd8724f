"""A preference problem: the loss and the metrics of packed pairs under an objective, as a function of the weights."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dpo_jax.losses import OBJECTIVES, Objective, Pairs
from dpo_jax.metrics import OF_THE_REFERENCE, Mean, Metrics, merge, preference_metrics
from dpo_jax.model.decoder import DEFAULT_EXECUTION, Execution, cast
from dpo_jax.model.scoring import CompletionScores, fold, pairs_of, score, token_metrics
from dpo_jax.model.spec import DecoderSpec


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is minimised, and how it is computed: everything static that a step, or an evaluation, needs."""

    spec: DecoderSpec
    objective: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    compute_dtype: str = "float32"
    execution: Execution = DEFAULT_EXECUTION
    statistics: bool = True

    @property
    def row(self) -> Objective:
        """The objective's row of the table."""
        return OBJECTIVES[self.objective]


def evaluate_batch(problem: Problem, params: Any, batch: Any, reference: Any = None) -> Metrics:
    """Metrics of a batch, `loss` among them, as sums and counts; no gradient."""
    compute = cast(params, jnp.dtype(problem.compute_dtype))

    def visit(metrics, forest, _):
        loss, measured = micro_loss(problem, compute, forest, reference)
        return merge(metrics, {**measured, "loss": Mean(loss, denominator(problem.row, forest))})

    nothing = {**no_metrics(problem, batch), "loss": Mean(jnp.zeros(()), jnp.zeros(()))}
    return fold(visit, nothing, batch)


def denominator(objective: Objective, batch: Any) -> jax.Array:
    """What the summed loss is divided by: real pairs, or the tokens of their chosen completions."""
    real = batch.real.astype(jnp.float32)
    if objective.per == "pairs":
        return jnp.maximum(real.sum(), 1.0)
    lengths = jnp.take_along_axis(batch.lengths, batch.chosen, axis=-1)
    return jnp.maximum((real * lengths).sum(), 1.0)


def micro_loss(problem: Problem, compute: Any, forest: Any, reference: Any) -> tuple[jax.Array, Metrics]:
    """Summed weighted loss and metrics of one micro-batch."""
    scores = score(problem.spec, compute, forest, execution=problem.execution, statistics=problem.statistics)
    pairs = pairs_of(scores, _reference_logps(problem, reference, forest, scores), forest)
    values = problem.row.loss(pairs, problem.beta, problem.label_smoothing)
    loss = jnp.where(forest.real, forest.weight * values, 0.0).sum()
    return loss, _metrics(problem, pairs, lax.stop_gradient(scores), forest)


def _reference_logps(problem: Problem, reference: Any, forest: Any, scores: CompletionScores) -> jax.Array:
    """The reference's log-probabilities: from its weights where it is live, else from the batch.

    An objective that uses none is given the policy's own.
    """
    if not problem.row.uses_reference:
        return scores.logps
    if reference is None:
        return forest.reference
    return score(problem.spec, lax.stop_gradient(reference), forest, execution=problem.execution).logps


def no_metrics(problem: Problem, batch: Any) -> Metrics:
    """Zeros in the shape of `micro_loss`'s metrics."""

    def named(batch):
        forest = batch._replace(**{name: leaf[0] for name, leaf in batch._asdict().items() if leaf.ndim})
        scores = CompletionScores(*(jnp.zeros(forest.ids.shape),) * 5)
        return _metrics(problem, pairs_of(scores, scores.logps, forest), scores, forest)

    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(named, batch))


def _metrics(problem: Problem, pairs: Pairs, scores: CompletionScores, forest: Any) -> Metrics:
    metrics = preference_metrics(pairs, forest.real, problem.beta)
    if not problem.row.uses_reference:
        metrics = {name: mean for name, mean in metrics.items() if name not in OF_THE_REFERENCE}
    return metrics | token_metrics(scores, forest) if problem.statistics else metrics
