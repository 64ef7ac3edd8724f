"""Preference metrics as sums and counts that can be merged over micro-batches, devices and steps, and divided once.

Names are TRL's where TRL has the metric. Letters: P pairs.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dpo_jax.losses import Pairs, Scalar, rewards


class Mean(NamedTuple):
    """A weighted mean that is not divided yet."""

    total: Float[Array, ""]
    count: Float[Array, ""]


Metrics = dict[str, Mean]
OF_THE_REFERENCE = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "kl")
"""Metrics that mean nothing without a reference."""


def preference_metrics(pairs: Pairs, real: Bool[Array, "*P"], beta: Scalar) -> Metrics:
    """Sums over the real pairs (padding is left out) of everything that can be said from log-probabilities alone.

    `rewards/*` are `beta * log(pi / pi_ref)` in nats; `rewards/accuracies` counts strictly larger chosen rewards, so it
    is 0 where policy and reference agree; `logps/*` are sums per completion in nats and `logps/accuracies` the share of
    pairs whose chosen completion is the likelier one; `lengths/*` are scored tokens.
    `kl` estimates the divergence from the reference in nats per token: `exp(-r) - 1 + r` with r the mean log-ratio of
    a completion's tokens (Schulman's k3 estimator), over chosen and rejected completions. These were not drawn from
    the policy, so it tells how far the policy has moved on this data, not the true divergence.
    """
    chosen, rejected = rewards(pairs, beta)
    ratio_chosen = (pairs.policy_chosen - pairs.reference_chosen) / jnp.maximum(pairs.chosen_length, 1)
    ratio_rejected = (pairs.policy_rejected - pairs.reference_rejected) / jnp.maximum(pairs.rejected_length, 1)
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
        "rewards/margins": chosen - rejected,
        "logps/chosen": pairs.policy_chosen,
        "logps/rejected": pairs.policy_rejected,
        "logps/accuracies": (pairs.policy_chosen > pairs.policy_rejected).astype(jnp.float32),
        "lengths/chosen": pairs.chosen_length,
        "lengths/rejected": pairs.rejected_length,
        "kl": (_k3(ratio_chosen) + _k3(ratio_rejected)) / 2,
    }
    return {name: mean_of(jax.lax.stop_gradient(value), real) for name, value in values.items()}


def mean_of(values: Float[Array, "*P"], real: Bool[Array, "*P"]) -> Mean:
    """Sum and count of the real values; what is not real may be anything, also nan."""
    return Mean(jnp.where(real, values, 0.0).sum(), real.sum().astype(jnp.float32))


def merge(a: Metrics, b: Metrics) -> Metrics:
    """The metrics of both parts together."""
    return {name: Mean(a[name].total + b[name].total, a[name].count + b[name].count) for name in a}


def means(metrics: Mapping[str, Mean]) -> dict[str, Float[Array, ""]]:
    """Each mean, divided; nan where nothing was counted."""
    return {name: mean.total / mean.count for name, mean in metrics.items()}


def _k3(ratio: Float[Array, "*P"]) -> Float[Array, "*P"]:
    return jnp.expm1(-ratio) + ratio
