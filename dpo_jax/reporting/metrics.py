"""Names of metrics, what they mean, and the labels and formats under which they are shown: the only tables of them.

A new metric of log-probabilities is an entry of `objectives.metrics.preference_metrics`, and a line here where it is to
be explained or shown.
"""

import math
from collections.abc import Mapping
from typing import Any

METRICS: dict[str, str] = {
    "loss": "mean objective of the step's pairs",
    "grad_norm": "global norm of the gradient, before clipping",
    "learning_rate": "rate of this step",
    "epoch": "passes over the data so far",
    "rewards/chosen": "mean of beta x (policy - reference) log-probability of chosen completions",
    "rewards/rejected": "the same of rejected completions",
    "rewards/accuracies": "share of pairs whose chosen reward is greater",
    "rewards/margins": "mean of chosen reward - rejected reward",
    "rewards/margins_p10": "10th percentile of the pairs' margins",
    "rewards/margins_p50": "their median",
    "rewards/margins_p90": "their 90th percentile",
    "unrounded/rewards/margins": "held-out margin of the weights as trained, before they are rounded for the folder",
    "logps/chosen": "mean summed log-probability of chosen completions",
    "logps/rejected": "the same of rejected completions",
    "logps/accuracies": "share of pairs whose chosen completion is the more likely one",
    "drift/chosen": "mean of policy - reference log-probability of chosen completions, in nats",
    "drift/rejected": "the same of rejected completions",
    "gradient_weight": "mean weight that DPO's gradient gives a pair: 0.5 at the start, 0 for pairs that are learned",
    "objective/NAME": "mean loss of one term of the objective, before its weight in the sum",
    "objective/NAME_margin": "mean of what that term makes grow",
    "objective/kto_baseline": "KTO's baseline: how far the policy has moved from the reference, in nats",
    "beta": "beta of this step, where it is scheduled",
    "aux_loss": "load-balancing loss of the experts, before its weight",
    "skipped_steps": "steps so far that were not finite and changed nothing",
    "loss_scale": "in float16, what the loss is multiplied by before it is differentiated",
    "logits/chosen": "mean logit over chosen completion tokens and the vocabulary",
    "logits/rejected": "the same over rejected completion tokens",
    "entropy": "mean entropy of the next token, over completion tokens",
    "mean_token_accuracy": "share of chosen completion tokens that are the most likely token",
    "num_tokens": "tokens seen so far",
    "lengths/chosen": "mean tokens of a chosen completion",
    "lengths/rejected": "mean tokens of a rejected completion",
    "kl": "estimated divergence of the policy from the reference, in nats per token",
    "truncated": "pairs of the step of which a part was cut",
    "dropped": "rows of the data that could not be used",
    "good_answers": "share of held-out questions that were answered well",
    "step_seconds": "wall time of the step",
    "input_wait": "share of the step's wall time that went into waiting for the next batch",
    "time_to_first_step": "seconds from the start of the command to the end of its first step, once",
    "pairs_per_second": "pairs per second of wall time",
    "tokens_per_second": "token slots per second of wall time",
    "memory_bytes": "most bytes in use on one device",
}
"""Every metric and what it is."""

TIME_FIELDS = (*"step_seconds input_wait time_to_first_step pairs_per_second tokens_per_second memory_bytes".split(),)
"""What two runs of the same mathematics may differ in (`eval_` forms too); everything else in a record is the same."""

TERMINAL = (
    ("loss", "loss", "{:.4f}"),
    ("rewards/accuracies", "accuracy", "{:.3f}"),
    ("rewards/margins", "margin", "{:+z.3f}"),
    ("grad_norm", "grad", "{:.2f}"),
    ("pairs_per_second", "pairs/s", "{:.1f}"),
)
"""What a line of the terminal shows: name, label, format."""

SUMMARY = (
    ("rewards/accuracies", "held-out accuracy", "{:.1%}"),
    ("logps/accuracies", "chosen more likely", "{:.1%}"),
    ("rewards/margins", "held-out margin", "{:+z.3f}"),
    ("loss", "held-out loss", "{:.4f}"),
    ("good_answers", "good answers", "{:.1%}"),
)
"""Rows of the summary at the end of a run."""

EVALUATED = (
    ("rewards/accuracies", "preference accuracy", "{:.1%}"),
    ("rewards/margins", "reward margin", "{:+.4f}"),
    ("logps/accuracies", "chosen more likely", "{:.1%}"),
    ("loss", "loss", "{:.4f}"),
    ("kl", "kl", "{:.5f}"),
)
"""What `dpo_jax.evaluate` prints."""

TIED = 1e-4
"""Mean margin, in nats, below which policy and reference are the same but for rounding."""


def shown(found: Mapping[str, Any], name: str, form: str) -> str:
    """A metric as it is shown, of metrics by name: `-` for none, and `tied` for an accuracy without any margin.

    Where no margin is left but rounding, whose reward is greater means nothing.
    """
    if name not in found:
        return "-"
    if not _is_finite(found[name]):
        return "not finite"
    margin = found.get("rewards/margins", 1.0)
    tied = name == "rewards/accuracies" and _is_finite(margin) and abs(margin) < TIED
    return "tied" if tied else form.format(found[name])


def _is_finite(value: float | None) -> bool:
    """A record has null in the place of a number that is not finite."""
    return value is not None and math.isfinite(value)
