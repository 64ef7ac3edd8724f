"""One optimizer step: loss, gradient and update over exactly the pairs of a batch, compiled as one program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from dpo_jax.objectives.mixture import Moment
from dpo_jax.preference.loss import Problem, loss_and_gradient
from dpo_jax.training.optimizer import descend, wide

State = dict[str, Any]
"""`params` (float32, or bfloat16 but for small leaves), `optimizer` (float32, its first moment maybe bfloat16), `step`,
and `skipped` and `streak`: non-finite steps, all and in a row. Where the reference moves also its weights, `reference`
(float32); where an objective remembers earlier steps also `memory`."""


class MovingReference(NamedTuple):
    """TR-DPO (Gorbatovski et al. 2024, arXiv:2404.09656): every so many steps the reference moves to the policy.

    reference <- rate * policy + (1 - rate) * reference            (equation 5; rate 1 is the hard update, equation 6)
    """

    every: int
    rate: float


def fresh_state(
    params: Any, optimizer: optax.GradientTransformation, *, reference: Any = None, remembers: int = 0
) -> State:
    """The state before the first step; `reference` are the starting weights of one that will move."""
    zero = jnp.zeros((), jnp.int32)
    state = {
        "params": params,
        "optimizer": optimizer.init(wide(params)),
        "step": zero,
        "skipped": zero,
        "streak": zero,
    }
    state |= {} if reference is None else {"reference": reference}
    return state | ({"memory": jnp.zeros(remembers, jnp.float32)} if remembers else {})


def make_step(
    problem: Problem,
    optimizer: optax.GradientTransformationExtraArgs,
    learning_rate: optax.Schedule,
    *,
    steps: int = 1,
    moving: MovingReference | None = None,
    seed: int = 0,
) -> Callable[[State, Any, Any], tuple[State, dict[str, jax.Array]]]:
    """The step function `(state, reference, batch) -> (state, metrics)`, to be jitted with the state donated.

    `reference` holds the frozen weights of a live reference, or is None where the batch brings its log-probabilities
    or where it moves and is part of the state. `steps` is the length of the run, for a beta that is scheduled. `seed`
    and the step's number decide how updates of bfloat16 parameters are rounded.

    A step whose loss or gradient is not finite changes neither weights nor moments; it is counted, and the step number
    goes on, so that the data do too. The gradient's norm says so, and where that is finite all updates are.
    """

    def step(state: State, reference: Any, batch: Any) -> tuple[State, dict[str, jax.Array]]:
        moment = moment_of(state, steps)
        reference = state.get("reference", reference)
        loss, metrics, gradient, memory = loss_and_gradient(problem, state["params"], batch, reference, moment)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        rate = jnp.asarray(learning_rate(state["step"]), jnp.float32)
        key = jax.random.fold_in(jax.random.key(seed), state["step"])

        def update(kept: State) -> State:
            with jax.numpy_dtype_promotion("standard"):  # optax takes powers of floats by integer counts
                directions, moments = optimizer.update(gradient, kept["optimizer"], wide(kept["params"]), norm=norm)
            updated = {"params": descend(kept["params"], directions, rate, key), "optimizer": moments}
            return updated | ({} if "memory" not in kept else {"memory": memory})

        # A branch, not a choice between new and old arrays: XLA then writes the new ones over the old ones.
        kept = {name: state[name] for name in ("params", "optimizer", "memory") if name in state}
        updated = lax.cond(finite, update, lambda kept: kept, kept)
        missed = 1 - finite.astype(jnp.int32)
        state = {
            **state,
            **updated,
            "step": state["step"] + 1,
            "skipped": state["skipped"] + missed,
            "streak": (state["streak"] + missed) * missed,
        }
        if moving is not None:
            state["reference"] = moved(state["reference"], state["params"], state["step"], moving)
        extra = {"loss": loss, "grad_norm": norm, "learning_rate": rate, "skipped_steps": state["skipped"]}
        return state, {**extra, **metrics, "nonfinite_streak": state["streak"]}

    return step


def moment_of(state: State, steps: int) -> Moment:
    """Where in a run of so many steps the state stands: share 0 at the first step, 1 at the last."""
    return Moment(state["step"].astype(jnp.float32) / max(steps - 1, 1), state.get("memory"))


def moved(reference: Any, params: Any, step: jax.Array, moving: MovingReference) -> Any:
    """The reference after so many steps: nearer to the policy if a move is due."""
    rate = moving.rate
    return lax.cond(
        step % moving.every == 0,
        lambda: jax.tree.map(lambda old, new: rate * new.astype(old.dtype) + (1.0 - rate) * old, reference, params),
        lambda: reference,
    )
