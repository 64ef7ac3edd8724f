"""Preference objectives: pure functions of log-probabilities to one value per pair. Nothing here knows a model.

Letters: P pairs, C completions. All log-probabilities are sums over a completion's tokens, in nats.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Scalar = float | Float[Array, ""]


class DPOLoss(NamedTuple):
    """One value per pair, unreduced; the rewards carry no gradient."""

    losses: Float[Array, "*P"]
    chosen_rewards: Float[Array, "*P"]
    rejected_rewards: Float[Array, "*P"]


class Pairs(NamedTuple):
    """What an objective may look at, one value per pair. Lengths are scored tokens; margin is the pair's own offset."""

    policy_chosen: Float[Array, "*P"]
    policy_rejected: Float[Array, "*P"]
    reference_chosen: Float[Array, "*P"]
    reference_rejected: Float[Array, "*P"]
    chosen_length: Float[Array, "*P"]
    rejected_length: Float[Array, "*P"]
    margin: Float[Array, "*P"]


@jax.jit
def dpo_loss(
    policy_chosen_logps: Float[Array, "*P"],
    policy_rejected_logps: Float[Array, "*P"],
    reference_chosen_logps: Float[Array, "*P"],
    reference_rejected_logps: Float[Array, "*P"],
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
) -> DPOLoss:
    """Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290, equation 7), per pair.

        reward(y) = beta * (log pi(y | x) - log pi_ref(y | x))                           (equation 5, up to a constant)
        h         = reward(chosen) - reward(rejected)
        loss      = -(1 - label_smoothing) * log sigmoid(h) - label_smoothing * log sigmoid(-h)

    With label_smoothing = 0 this is the paper's loss, ln 2 where policy and reference agree; otherwise it is
    conservative DPO, for labels that are the wrong way round with that chance. Reference log-probabilities are data:
    no gradient reaches them. Any floating dtype goes in, float32 comes out.

        policy    = [-1.0, -3.0]  reference = [-2.0, -2.0]  beta = 0.5
        h         = 0.5 * (1.0 - (-1.0)) = 1.0              loss = log(1 + exp(-1)) = 0.3133
    """
    pairs = _as_pairs(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    chosen, rejected = rewards(pairs, beta)
    return DPOLoss(
        sigmoid(pairs, beta, label_smoothing), jax.lax.stop_gradient(chosen), jax.lax.stop_gradient(rejected)
    )


@jax.jit
def dpo_loss_from_indices(
    pi_logps: Float[Array, " C"],
    ref_logps: Float[Array, " C"],
    yw_idxs: Int[Array, " P"],
    yl_idxs: Int[Array, " P"],
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
) -> DPOLoss:
    """`dpo_loss` in the paper's index form (its appendix B): pair p prefers completion yw_idxs[p] to yl_idxs[p].

    A completion may take part in any number of pairs, so one prompt with four ranked answers is four log-probabilities
    and six pairs.
    """
    return dpo_loss(
        pi_logps[yw_idxs],
        pi_logps[yl_idxs],
        ref_logps[yw_idxs],
        ref_logps[yl_idxs],
        beta=beta,
        label_smoothing=label_smoothing,
    )


def rewards(pairs: Pairs, beta: Scalar) -> tuple[Float[Array, "*P"], Float[Array, "*P"]]:
    """Implicit rewards of the chosen and of the rejected completions, `beta * log(pi / pi_ref)`, in nats."""
    return (
        beta * (pairs.policy_chosen - pairs.reference_chosen),
        beta * (pairs.policy_rejected - pairs.reference_rejected),
    )


def sigmoid(pairs: Pairs, beta: Scalar, label_smoothing: Scalar) -> Float[Array, "*P"]:
    """DPO as in `dpo_loss` with the pair's margin m: `h = reward difference - m` (Amini et al., arXiv:2402.10571)."""
    chosen, rejected = rewards(pairs, beta)
    h = chosen - rejected - pairs.margin
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(h) - label_smoothing * jax.nn.log_sigmoid(-h)


def sft(pairs: Pairs, beta: Scalar, label_smoothing: Scalar) -> Float[Array, "*P"]:
    """Negative log-likelihood of the chosen completion, summed over its tokens; the rejected one is not looked at."""
    del beta, label_smoothing
    return -pairs.policy_chosen


class Objective(NamedTuple):
    """A row of the table of objectives.

    `loss(pairs, beta, label_smoothing)` gives one value per pair. A step's loss is the sum of `weight * loss` over all
    its pairs, divided by their number (`per="pairs"`) or by all their chosen tokens (`per="chosen_tokens"`).
    `at_start(label_smoothing)` is the value where policy and reference agree and margins are 0, if it is a constant.
    """

    loss: Callable[[Pairs, Scalar, Scalar], Float[Array, "*P"]]
    per: Literal["pairs", "chosen_tokens"]
    uses_reference: bool
    at_start: Callable[[float], float] | None


OBJECTIVES: dict[str, Objective] = {
    "sigmoid": Objective(sigmoid, "pairs", True, lambda label_smoothing: 0.6931471805599453),
    "sft": Objective(sft, "chosen_tokens", False, None),
}
"""Every objective by the name that `objective.name` takes."""


def _as_pairs(policy_chosen: Any, policy_rejected: Any, reference_chosen: Any, reference_rejected: Any) -> Pairs:
    """Pairs in float32 without margins, the reference cut off from gradients."""
    policy_chosen, policy_rejected = policy_chosen.astype(jnp.float32), policy_rejected.astype(jnp.float32)
    reference = (reference_chosen.astype(jnp.float32), reference_rejected.astype(jnp.float32))
    nothing = jnp.zeros_like(policy_chosen)
    return Pairs(policy_chosen, policy_rejected, *jax.lax.stop_gradient(reference), nothing, nothing, nothing)
