"""One optimizer step: loss, gradient and update over exactly the pairs of a batch, compiled as one program."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from dpo_jax.data.batch import Batch
from dpo_jax.model.weights import Weights
from dpo_jax.objectives.mixture import Progress
from dpo_jax.preference.loss import TrainingObjective, loss_and_gradient
from dpo_jax.training import loss_scale
from dpo_jax.training.loss_scale import LossScale
from dpo_jax.training.optimizer import apply_updates, to_float32
from dpo_jax.trees import Params

State = dict[str, Any]
"""`trained` (the trained weights: float32, or bfloat16 but for small leaves), `optimizer` (float32, its first moment
maybe bfloat16), `step`, and `skipped` and `consecutive_nonfinite`: non-finite steps, all and in a row. Where the
reference moves also its weights, `reference` (float32); where an objective remembers earlier steps also `memory`; in
float16 also `loss_scale` and `good_steps`, see `loss_scale`."""

ON_DISK = {"trained": "params", "consecutive_nonfinite": "streak"}
"""Names in checkpoints, of those entries that have others there."""


def as_saved(state: State) -> State:
    """The state under the names of checkpoints."""
    return {ON_DISK.get(name, name): value for name, value in state.items()}


def from_saved(saved: State) -> State:
    """The state of a checkpoint."""
    names = {on_disk: name for name, on_disk in ON_DISK.items()}
    return {names.get(name, name): value for name, value in saved.items()}


class MovingReference(NamedTuple):
    """TR-DPO (Gorbatovski et al. 2024, arXiv:2404.09656): every so many steps the reference moves to the policy.

    reference <- rate * policy + (1 - rate) * reference            (equation 5; rate 1 is the hard update, equation 6)
    """

    every: int
    rate: float


def fresh_state(
    trained: Params,
    optimizer: optax.GradientTransformation,
    *,
    reference: Params | None = None,
    remembers: int = 0,
    scaled: bool = False,
) -> State:
    """The state before the first step.

    Args:
      trained: the starting weights.
      optimizer: whose moments begin.
      reference: the starting weights of one that will move.
      remembers: numbers that are carried from step to step.
      scaled: whether the loss is scaled, as float16 wants it.
    """
    zero = jnp.zeros((), jnp.int32)
    state = {
        "trained": trained,
        "optimizer": optimizer.init(to_float32(trained)),
        "step": zero,
        "skipped": zero,
        "consecutive_nonfinite": zero,
    }
    state |= {} if reference is None else {"reference": reference}
    state |= loss_scale.fresh().entries() if scaled else {}
    return state | ({"memory": jnp.zeros(remembers, jnp.float32)} if remembers else {})


def make_step(
    objective: TrainingObjective,
    optimizer: optax.GradientTransformationExtraArgs,
    learning_rate: optax.Schedule,
    *,
    steps: int = 1,
    moving: MovingReference | None = None,
    seed: int = 0,
) -> Callable[[State, Weights, Params | None, Batch], tuple[State, dict[str, jax.Array]]]:
    """The step function `(state, frozen, reference, batch) -> (state, metrics)`, to be jitted with the state donated.

    `frozen` are the weights that are not trained: a `Weights` whose trained tree is empty. `reference` holds the
    weights of a live reference that stays, or is None where the batch brings its log-probabilities or where it moves
    and is part of the state. `steps` is the length of the run, for a beta that is scheduled. `seed` and the step's
    number decide how updates of bfloat16 parameters are rounded.

    A step whose loss or gradient is not finite changes neither weights nor moments; it is counted, and the step number
    goes on, so that the data do too. The gradient's norm says so, and where that is finite all updates are. Where the
    state has a loss scale, and a smaller one is the remedy, such a step is skipped but not one of a row of non-finite
    steps.
    """

    def step(
        state: State, frozen: Weights, reference: Params | None, batch: Batch
    ) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        progress = progress_of(state, steps)._replace(key=jax.random.bits(key, dtype=jnp.uint32))
        reference, scaling = state.get("reference", reference), LossScale.of(state)
        scale = None if scaling is None else scaling.scale
        loss, metrics, gradient, memory = loss_and_gradient(
            objective, with_trained(frozen, state["trained"]), batch, reference, progress, scale
        )
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        rate = jnp.asarray(learning_rate(state["step"]), jnp.float32)

        def update(kept: State) -> State:
            with jax.numpy_dtype_promotion("standard"):  # optax takes powers of floats by integer counts
                directions, moments = optimizer.update(
                    gradient, kept["optimizer"], to_float32(kept["trained"]), norm=norm
                )
            updated = {"trained": apply_updates(kept["trained"], directions, rate, key), "optimizer": moments}
            return updated | ({} if "memory" not in kept else {"memory": memory})

        # A branch, not a choice between new and old arrays: XLA then writes the new ones over the old ones.
        kept = {name: state[name] for name in ("trained", "optimizer", "memory") if name in state}
        updated = lax.cond(finite, update, lambda kept: kept, kept)
        counts = jnp.int32(1)
        if scaling is not None:
            counts = 1 - scaling.blamed(loss).astype(jnp.int32)
            updated |= scaling.after(finite).entries()
            metrics = {**metrics, "loss_scale": scaling.scale}
        state = {**state, **updated, **counted(state, finite, counts)}
        if moving is not None:
            policy = with_trained(frozen, state["trained"]).params
            state["reference"] = moved(state["reference"], policy, state["step"], moving)
        extra = {"loss": loss, "grad_norm": norm, "learning_rate": rate, "skipped_steps": state["skipped"]}
        return state, {**extra, **metrics, "nonfinite_streak": state["consecutive_nonfinite"]}

    return step


def counted(state: State, finite: jax.Array, counts: jax.Array) -> State:
    """The numbers of steps after one more; `counts` is what it adds to a row of steps that are not finite."""
    missed = 1 - finite.astype(jnp.int32)
    return {
        "step": state["step"] + 1,
        "skipped": state["skipped"] + missed,
        "consecutive_nonfinite": (state["consecutive_nonfinite"] + counts) * missed,
    }


def with_trained(frozen: Weights, trained: Params) -> Weights:
    """The whole model's weights."""
    return dataclasses.replace(frozen, trained=trained)


def progress_of(state: State, steps: int) -> Progress:
    """Where in a run of so many steps the state stands: share 0 at the first step, 1 at the last."""
    return Progress(state["step"].astype(jnp.float32) / max(steps - 1, 1), state.get("memory"))


def moved(reference: Params, params: Params, step: jax.Array, moving: MovingReference) -> Params:
    """The reference after so many steps: nearer to the policy if a move is due."""
    rate = moving.rate
    return lax.cond(
        step % moving.every == 0,
        lambda: jax.tree.map(lambda old, new: rate * new.astype(old.dtype) + (1.0 - rate) * old, reference, params),
        lambda: reference,
    )
