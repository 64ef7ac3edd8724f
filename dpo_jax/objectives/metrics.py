"""Preference metrics over all pairs of a step or of a held-out set at once, and token statistics as mergeable sums.

Names are TRL's where TRL has the metric. Letters: P pairs.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dpo_jax.objectives.mixture import Progress, beta_of, counts_of, labels_of, leading, modified
from dpo_jax.objectives.pairs import LossOutput, Pairs, Scalar
from dpo_jax.objectives.pairwise import per_token, rewards
from dpo_jax.objectives.terms import Term, data_of

Values = dict[str, Float[Array, ""]]
QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}


class Mean(NamedTuple):
    """A weighted mean that is not divided yet."""

    total: Float[Array, ""]
    count: Float[Array, ""]


Means = dict[str, Mean]


def merge(a: Means, b: Means) -> Means:
    """The means of both parts together."""
    return {name: Mean(a[name].total + b[name].total, a[name].count + b[name].count) for name in a}


def means(metrics: Mapping[str, Mean]) -> Values:
    """Each mean, divided; nan where nothing was counted."""
    return {name: mean.total / mean.count for name, mean in metrics.items()}


def preference_metrics(terms: Sequence[Term], pairs: Pairs, found: Sequence[LossOutput], progress: Progress) -> Values:
    """Everything that can be said from log-probabilities alone, over the real pairs; padding may hold anything.

    `objective/NAME` is each term's own loss (before its weight in the sum), `objective/NAME_margin` the mean of the
    quantity that it makes grow. The others follow the leading term's beta and modifiers.

    `rewards/*` are `beta * log(pi / pi_ref)` in nats (of a reward model: its scores); `rewards/accuracies` counts
    strictly larger chosen rewards, so it is 0 where policy and reference agree; `rewards/margins_p10` and so on are
    quantiles over the pairs. `logps/*` are sums per completion in nats, `logps/accuracies` the share of pairs whose
    chosen completion is the likelier one; `lengths/*` are scored tokens. `drift/*` is `log(pi / pi_ref)` per
    completion, in nats. `gradient_weight` is the mean of `S(reward of rejected - reward of chosen)`, by which the
    gradient of DPO weighs a pair (arXiv:2305.18290, section 4).
    `kl` estimates the divergence from the reference in nats per token: `exp(-r) - 1 + r` with r the mean log-ratio of
    a completion's tokens (Schulman's k3 estimator), over chosen and rejected completions. These were not drawn from
    the policy, so it tells how far the policy has moved on this data, not the true divergence.
    """
    kind, lead = data_of(terms), leading(terms)
    seen, beta = modified(lead, pairs), beta_of(lead, progress.share)
    values = of_terms(terms, pairs, found)
    if lead.settings.get("beta_end") is not None:
        values["beta"] = jnp.asarray(beta, jnp.float32)
    if kind == "unpaired":
        values |= of_examples(seen, beta, found[0])
    elif kind == "chosen":
        values |= {
            "logps/chosen": mean(seen.policy_chosen, seen.real),
            "lengths/chosen": mean(seen.chosen_length, seen.real),
        }
    else:
        values |= of_pairs(lead, seen, beta)
    return jax.lax.stop_gradient(values)


def seen_rewards(
    terms: Sequence[Term], pairs: Pairs, progress: Progress
) -> tuple[Float[Array, "*P"], Float[Array, "*P"]] | None:
    """The rewards that `rewards/chosen` and `rewards/rejected` are the means of: for single completions all of them,
    and nan on the side where they do not belong; None of an objective that has none."""
    kind, lead = data_of(terms), leading(terms)
    seen, beta = modified(lead, pairs), beta_of(lead, progress.share)
    if kind == "chosen":
        return None
    if kind == "unpaired":
        reward, good = beta * (seen.policy_chosen - seen.reference_chosen), seen.label > 0.5
        return jnp.where(good, reward, jnp.nan), jnp.where(good, jnp.nan, reward)
    return rewards(seen, beta, average=lead.row.reward == "average")


def of_terms(terms: Sequence[Term], pairs: Pairs, found: Sequence[LossOutput]) -> Values:
    """Loss of each term and mean of what it makes grow."""
    values, counts = {}, counts_of(pairs.real, pairs.chosen_length)
    for label, term, outcome in zip(labels_of(terms), terms, found, strict=True):
        values[f"objective/{label}"] = outcome.losses.sum() / counts[term.row.per]
        values[f"objective/{label}_margin"] = mean(outcome.margins, pairs.real)
    return values


def of_pairs(lead: Term, pairs: Pairs, beta: Scalar) -> Values:
    """Rewards, log-probabilities, lengths and distance from the reference of pairs."""
    real = pairs.real
    chosen, rejected = rewards(pairs, beta, average=lead.row.reward == "average")
    margins = chosen - rejected
    values = {
        "rewards/chosen": mean(chosen, real),
        "rewards/rejected": mean(rejected, real),
        "rewards/accuracies": mean((chosen > rejected).astype(jnp.float32), real),
        "rewards/margins": mean(margins, real),
        **{f"rewards/margins_{name}": quantile(margins, real, share) for name, share in QUANTILES.items()},
        "lengths/chosen": mean(pairs.chosen_length, real),
        "lengths/rejected": mean(pairs.rejected_length, real),
    }
    if lead.row.model == "reward":
        return values
    likelier = (pairs.policy_chosen > pairs.policy_rejected).astype(jnp.float32)
    values |= {
        "logps/chosen": mean(pairs.policy_chosen, real),
        "logps/rejected": mean(pairs.policy_rejected, real),
        "logps/accuracies": mean(likelier, real),
    }
    return values | of_reference(pairs, margins) if lead.uses_reference else values


def of_reference(pairs: Pairs, margins: Float[Array, "*P"]) -> Values:
    """How far the policy has gone from the reference, and how much the gradient still weighs the pairs."""
    real = pairs.real
    drift = pairs.policy_chosen - pairs.reference_chosen, pairs.policy_rejected - pairs.reference_rejected
    ratios = per_token(drift[0], pairs.chosen_length), per_token(drift[1], pairs.rejected_length)
    return {
        "drift/chosen": mean(drift[0], real),
        "drift/rejected": mean(drift[1], real),
        "gradient_weight": mean(jax.nn.sigmoid(-margins), real),
        "kl": mean((_k3(ratios[0]) + _k3(ratios[1])) / 2, real),
    }


def of_examples(pairs: Pairs, beta: Scalar, found: LossOutput) -> Values:
    """The same for single completions: `chosen` are the desirable ones, `rejected` the others (nan where none is).

    `rewards/accuracies` is the share on the right side of KTO's baseline; `objective/kto_baseline` is that, in nats.
    """
    good, bad = pairs.real & (pairs.label > 0.5), pairs.real & (pairs.label <= 0.5)
    u = pairs.policy_chosen - pairs.reference_chosen
    elsewhere = mean(pairs.policy_rejected - pairs.reference_rejected, pairs.real)
    values = {}
    for name, part in (("chosen", good), ("rejected", bad)):
        values[f"rewards/{name}"] = mean(beta * u, part)
        values[f"logps/{name}"] = mean(pairs.policy_chosen, part)
        values[f"lengths/{name}"] = mean(pairs.chosen_length, part)
        values[f"drift/{name}"] = mean(u, part)
    return values | {
        "rewards/margins": values["rewards/chosen"] - values["rewards/rejected"],
        "rewards/accuracies": mean((found.margins > 0).astype(jnp.float32), pairs.real),
        "objective/kto_baseline": jnp.maximum(elsewhere, 0.0),
        "kl": mean(_k3(per_token(u, pairs.chosen_length)), pairs.real),
    }


def mean(values: Float[Array, "*P"], real: Bool[Array, "*P"]) -> Float[Array, ""]:
    """Mean of the real values; what is not real may be anything, also nan. nan where nothing is real."""
    return jnp.where(real, values, 0.0).sum() / real.sum().astype(jnp.float32)


def quantile(values: Float[Array, "*P"], real: Bool[Array, "*P"], share: float) -> Float[Array, ""]:
    """The quantile of the real values, linear between neighbours as numpy.quantile."""
    ordered = jnp.sort(jnp.where(real, values, jnp.inf).reshape(-1))
    place = share * jnp.maximum(real.sum() - 1, 0).astype(jnp.float32)
    below = jnp.floor(place).astype(jnp.int32)
    above = jnp.minimum(below + 1, jnp.maximum(real.sum() - 1, 0))
    return ordered[below] + (place - jnp.floor(place)) * (ordered[above] - ordered[below])


def _k3(ratio: Float[Array, "*P"]) -> Float[Array, "*P"]:
    return jnp.expm1(-ratio) + ratio
