"""One optimizer step: loss, gradient and update over exactly the pairs of a batch, compiled as one program.

Letters: M micro-batches, D shards, P pairs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpo_jax.metrics import Metrics, means, merge
from dpo_jax.model.decoder import cast
from dpo_jax.model.preference import Problem, denominator, micro_loss, no_metrics
from dpo_jax.model.scoring import fold
from dpo_jax.training.optimizer import descend

State = dict[str, Any]
"""`params` and `optimizer` (float32), `step`, and `skipped` and `streak`: non-finite steps, all and in a row."""


def fresh_state(params: Any, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step."""
    zero = jnp.zeros((), jnp.int32)
    return {
        "params": params,
        "optimizer": optimizer.init(params),
        "step": zero,
        "skipped": zero,
        "streak": zero,
    }


def make_step(
    problem: Problem, optimizer: optax.GradientTransformation, learning_rate: optax.Schedule
) -> Callable[[State, Any, Any], tuple[State, dict[str, jax.Array]]]:
    """The step function `(state, reference, batch) -> (state, metrics)`, to be jitted with the state donated.

    `reference` holds the frozen weights of a live reference, or is None where the batch brings its log-probabilities.

    A step whose loss or gradient is not finite changes neither weights nor moments; it is counted, and the step number
    goes on, so that the data do too.
    """

    def step(state: State, reference: Any, batch: Any) -> tuple[State, dict[str, jax.Array]]:
        loss, metrics, gradient = loss_and_gradient(problem, state["params"], batch, reference)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        with jax.numpy_dtype_promotion("standard"):  # optax takes powers of floats by integer counts
            directions, moments = optimizer.update(gradient, state["optimizer"], state["params"])
            rate = jnp.asarray(learning_rate(state["step"]), jnp.float32)
        updated = {"params": descend(state["params"], directions, rate), "optimizer": moments}
        kept = {name: state[name] for name in updated}
        missed = 1 - finite.astype(jnp.int32)
        state = {
            **state,
            **jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, kept),
            "step": state["step"] + 1,
            "skipped": state["skipped"] + missed,
            "streak": (state["streak"] + missed) * missed,
        }
        extra = {"loss": loss, "grad_norm": norm, "learning_rate": rate, "skipped_steps": state["skipped"]}
        return state, {**extra, **means(metrics), "nonfinite_streak": state["streak"]}

    return step


def loss_and_gradient(problem: Problem, params: Any, batch: Any, reference: Any = None) -> tuple[Any, Metrics, Any]:
    """Loss, metrics and float32 gradient over the whole batch, summed micro-batch by micro-batch.

    The denominators are those of the whole batch, so neither micro-batches nor devices change the value.
    """
    compute = cast(params, jnp.dtype(problem.compute_dtype))
    total = denominator(problem.row, batch)

    def micro(weights, forest):
        loss, metrics = micro_loss(problem, weights, forest, reference)
        return loss / total, metrics

    def visit(sums, forest, _):
        loss, metrics, gradient = sums
        (part, measured), slope = jax.value_and_grad(micro, has_aux=True)(compute, forest)
        gradient = jax.tree.map(lambda total, leaf: total + leaf.astype(total.dtype), gradient, slope)
        return loss + part, merge(metrics, measured), gradient

    nothing = (jnp.zeros(()), no_metrics(problem, batch), jax.tree.map(jnp.zeros_like, params))
    return fold(visit, nothing, batch)
