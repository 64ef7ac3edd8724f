"""Names of metrics, what they mean, and the labels and formats under which they are shown: the only tables of them.

A new metric of log-probabilities is an entry of `objectives.metrics.preference_metrics`, and a line here where it is to
be explained or shown.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

T = TypeVar("T")


class Metric(NamedTuple):
    """What a metric is, and its unit; a log-probability is a natural logarithm, so that its unit is the nat."""

    means: str
    unit: str


METRICS: dict[str, Metric] = {
    "loss": Metric("mean objective of the step's pairs", "as the objective"),
    "grad_norm": Metric("global norm of the gradient, before clipping", "loss per unit of weight"),
    "learning_rate": Metric("rate of this step", "none"),
    "epoch": Metric("passes over the data so far", "passes"),
    "rewards/chosen": Metric("mean of beta x (policy - reference) log-probability of chosen completions", "nats"),
    "rewards/rejected": Metric("the same of rejected completions", "nats"),
    "rewards/accuracies": Metric(
        "share of pairs whose chosen reward is greater; of single answers (kto), whose label is all that is known, the "
        "share on the right side of KTO's baseline: desirable ones whose reward is above beta x baseline, and others "
        "whose reward is below it. Shown as tied while the mean margin is below 1e-4 nats, as before the first step, "
        "where only rounding decides",
        "0 to 1",
    ),
    "rewards/margins": Metric(
        "mean of chosen reward - rejected reward; of single answers mean reward of desirable ones - that of others, "
        "which may be negative beside an accuracy above one half: a few answers far on the wrong side outweigh many",
        "nats",
    ),
    "rewards/margins_p10": Metric("10th percentile of the pairs' margins", "nats"),
    "rewards/margins_p50": Metric("their median", "nats"),
    "rewards/margins_p90": Metric("their 90th percentile", "nats"),
    "unrounded/rewards/margins": Metric(
        "held-out margin of the weights as trained, before they are rounded for the folder", "nats"
    ),
    "logps/chosen": Metric("mean summed log-probability of chosen completions", "nats"),
    "logps/rejected": Metric("the same of rejected completions", "nats"),
    "logps/accuracies": Metric("share of pairs whose chosen completion is the more likely one", "0 to 1"),
    "drift/chosen": Metric("mean of policy - reference log-probability of chosen completions", "nats"),
    "drift/rejected": Metric("the same of rejected completions", "nats"),
    "gradient_weight": Metric(
        "mean weight that DPO's gradient gives a pair: 0.5 at the start, 0 for pairs that are learned", "0 to 1"
    ),
    "objective/NAME": Metric(
        "mean loss of one term of the objective, before its weight in the sum", "as the objective"
    ),
    "objective/NAME_margin": Metric("mean of what that term makes grow", "as the objective"),
    "objective/kto_baseline": Metric("KTO's baseline: how far the policy has moved from the reference", "nats"),
    "beta": Metric("beta of this step, where it is scheduled", "none"),
    "aux_loss": Metric("load-balancing loss of the experts, before its weight", "none"),
    "skipped_steps": Metric("steps so far that were not finite and changed nothing", "steps"),
    "loss_scale": Metric("in float16, what the loss is multiplied by before it is differentiated", "none"),
    "logits/chosen": Metric("mean logit over chosen completion tokens and the vocabulary", "none"),
    "logits/rejected": Metric("the same over rejected completion tokens", "none"),
    "entropy": Metric("mean entropy of the next token, over completion tokens", "nats per token"),
    "mean_token_accuracy": Metric("share of chosen completion tokens that are the most likely token", "0 to 1"),
    "num_tokens": Metric("tokens seen so far", "tokens"),
    "lengths/chosen": Metric("mean tokens of a chosen completion", "tokens"),
    "lengths/rejected": Metric("mean tokens of a rejected completion", "tokens"),
    "kl": Metric("estimated divergence of the policy from the reference", "nats per token"),
    "truncated": Metric("pairs of the step of which a part was cut", "pairs"),
    "dropped": Metric("rows of the data that could not be used", "rows"),
    "eval/NAME/METRIC": Metric(
        "a metric of one set of held-out data, where these have names (`data.eval`)", "the metric's"
    ),
    "pass_rate": Metric("share of held-out questions that were answered well", "0 to 1"),
    "win_rate": Metric(
        "share of those answers that `evaluation.judge` prefers to the model's at the start; ties are half", "0 to 1"
    ),
    "win_rate/JUDGE": Metric(
        "the same by another judge of a list: its kind, and from the second of a kind on its number", "0 to 1"
    ),
    "win_rate_low": Metric("lower end of its 95 % interval (Wilson)", "0 to 1"),
    "win_rate_high": Metric("its upper end", "0 to 1"),
    "tie_rate": Metric(
        "share of those answers that are no better and no worse, or of which both orders say different things", "0 to 1"
    ),
    "unjudged": Metric("questions of which the judge said nothing that can be understood", "questions"),
    "step_seconds": Metric("wall time of the step", "seconds"),
    "input_wait": Metric("share of the step's wall time that went into waiting for the next batch", "0 to 1"),
    "hosts/slowest": Metric("of several processes, the one with the most time of its own between two steps", "none"),
    "hosts/own_seconds": Metric("its time of its own, in which the devices may have waited for it", "seconds"),
    "hosts/input_wait": Metric("longest wait of a process for its next batch", "seconds"),
    "hosts/memory_bytes": Metric("most memory in use of a process", "bytes"),
    "time_to_first_step": Metric("seconds from the start of the command to the end of its first step, once", "seconds"),
    "pairs_per_second": Metric("pairs per second of wall time", "pairs per second"),
    "tokens_per_second": Metric("token slots per second of wall time", "tokens per second"),
    "memory_bytes": Metric("most bytes in use on one device", "bytes"),
}
"""Every metric, what it is and in what unit; `python tools/pages.py` writes configs/METRICS.md of it."""

TIME_FIELDS = (
    *"step_seconds input_wait time_to_first_step pairs_per_second tokens_per_second memory_bytes".split(),
    *"hosts/slowest hosts/own_seconds hosts/input_wait hosts/memory_bytes".split(),
)
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
    ("pass_rate", "pass rate", "{:.1%}"),
    ("win_rate", "win rate over start", "{:.1%}"),
)
"""Rows of the summary at the end of a run."""

OF_BASELINE = "of single answers, by KTO's baseline"
"""What is said beside an accuracy that is no share of pairs, so that a negative margin may stand beside a high one."""

OF_A_SET = (
    ("rewards/accuracies", "accuracy", "{:.1%}"),
    ("rewards/margins", "margin", "{:+z.3f}"),
    ("loss", "loss", "{:.4f}"),
)
"""Further rows, for each set of held-out data that has a name."""

OLD_NAMES = {"good_answers": "pass_rate"}
"""What metrics were called in the records of earlier versions, and are called now."""

BETTER: dict[str, Literal["lower", "higher"]] = {
    "loss": "lower",
    "rewards/accuracies": "higher",
    "rewards/margins": "higher",
    "rewards/margins_p10": "higher",
    "rewards/margins_p50": "higher",
    "logps/accuracies": "higher",
    "logps/chosen": "higher",
    "mean_token_accuracy": "higher",
    "kl": "lower",
    "pass_rate": "higher",
    "win_rate": "higher",
}
"""What a run can choose its best checkpoint by, and which way is better."""
OF_ANSWERS = ("pass_rate", "win_rate")
"""Those of them that are measured on what the model answers, and not on pairs."""
AGAINST_REFERENCE = ("loss", "rewards/", "kl")
"""How the names begin of those that cannot be compared between steps where the reference, or beta, moves."""

EVALUATED = (
    ("rewards/accuracies", "preference accuracy", "{:.1%}"),
    ("rewards/margins", "reward margin", "{:+.4f}"),
    ("logps/accuracies", "chosen more likely", "{:.1%}"),
    ("loss", "loss", "{:.4f}"),
    ("kl", "kl", "{:.5f}"),
)
"""What `dpo_jax.evaluate` prints."""

PREFIX = "eval_"
"""Before the name of what was measured on held-out data, in a record."""
MEASURED = (PREFIX, "eval/")
"""How the names begin of all that was measured on held-out data: of all sets together, and of each that has a name."""


def evaluations_in(records: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """What was measured on held-out data, by step, of the records of a run."""
    found: dict[int, dict[str, Any]] = {}
    for record in records:
        if named := {name: value for name, value in record.items() if name.startswith(MEASURED)}:
            found[record["step"]] = {**found.get(record["step"], {}), **named}
    return found


def before_and_after(found: Mapping[int, T], step: int | None = None) -> tuple[T | None, T | None]:
    """Of evaluations by step that of the start, and that after `step`, or the newest; None where it is not among them.

    >>> before_and_after({0: "tied", 3: "better"}), before_and_after({3: "better"}), before_and_after({0: "tied"}, 2)
    (('tied', 'better'), (None, 'better'), ('tied', None))
    """
    return found.get(0), found.get(max(found, default=0) if step is None else step)


def recorded(metric: str, held_out: str = "") -> str:
    """The name that a metric of a set of held-out data has in a record: `eval_loss`, `eval/helpful/loss`.

    >>> recorded("loss"), recorded("loss", "helpful"), recorded("eval_loss"), recorded("eval/helpful/loss")
    ('eval_loss', 'eval/helpful/loss', 'eval_loss', 'eval/helpful/loss')
    """
    if held_out:
        return f"eval/{held_out}/{metric}"
    return metric if metric.startswith(MEASURED) else PREFIX + metric


def of_judge(metric: str, label: str) -> str:
    """The name of a metric of answers by a judge; the first of a run's judges has no label.

    >>> of_judge("win_rate", ""), of_judge("win_rate_low", "reward")
    ('win_rate', 'win_rate_low/reward')
    """
    return f"{metric}/{label}" if label else metric


def judges_in(metrics: Iterable[str]) -> list[str]:
    """The labels of the judges of whom there are win rates, by the names of metrics, with or without `PREFIX`.

    >>> judges_in(["eval_loss", "eval_win_rate", "eval_win_rate/reward", "eval_win_rate_low/reward"])
    ['', 'reward']
    """
    names = [metric.removeprefix(PREFIX).partition("/") for metric in metrics]
    return [label for name, _, label in names if name == "win_rate"]


def held_out_of(name: str) -> tuple[str, str]:
    """The set (empty for all of them together) and the metric that a name in a record is of.

    >>> held_out_of("eval_rewards/margins"), held_out_of("eval/helpful/rewards/margins"), held_out_of("pass_rate")
    (('', 'rewards/margins'), ('helpful', 'rewards/margins'), ('', 'pass_rate'))
    """
    if name.startswith("eval/"):
        _, held_out, metric = (*name.split("/", 2), "", "")[:3]
        return held_out, metric
    return "", name.removeprefix(PREFIX)


def goodness(name: str, value: float) -> float:
    """A value of a metric as a number of which more is better.

    >>> goodness("eval_loss", 0.5), goodness("eval/helpful/rewards/accuracies", 0.5)
    (-0.5, 0.5)
    """
    return value if BETTER[held_out_of(name)[1]] == "higher" else -value


def by_set(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """An evaluation's metrics by the set that they are of; those of all sets, which has no name, come first."""
    found: dict[str, dict[str, Any]] = {"": {}}
    for name, value in record.items():
        held_out, metric = held_out_of(name)
        found.setdefault(held_out, {})[metric] = value
    return found


def table(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of label, before and after, of two evaluations; a row that neither has is left out."""
    sides = by_set(before), by_set(after)
    rows: list[tuple[str, str, str]] = []
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        old, new = (side.get(name, {}) for side in sides)
        found = {**old, **new}
        for metric, label, form in as_labelled(OF_A_SET, found) if name else summary_of(found):
            if metric in old or metric in new:
                rows.append((f"{name}: {label}" if name else label, shown(old, metric, form), shown(new, metric, form)))
    return rows


def summary_of(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The rows of `SUMMARY`, with that of the win rate once for each judge of an evaluation's metrics."""
    *rows, (name, label, form) = as_labelled(SUMMARY, found)
    others = [judge for judge in judges_in(found) if judge]
    first = f"{label} (first judge)" if others else label
    return [*rows, (name, first, form), *((of_judge(name, one), f"{label} ({one})", form) for one in others)]


def as_labelled(rows: Iterable[tuple[str, str, str]], found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of name, label and format, where the label of an accuracy says so if it is one of single answers.

    >>> as_labelled([("rewards/accuracies", "accuracy", "")], {"objective/kto_baseline": 0.1})
    [('rewards/accuracies', "accuracy (of single answers, by KTO's baseline)", '')]
    """
    more = f" ({OF_BASELINE})" if "objective/kto_baseline" in found else ""
    return [(name, label + more if name == "rewards/accuracies" else label, form) for name, label, form in rows]


def in_a_line(record: Mapping[str, Any]) -> str:
    """An evaluation in one line: what a summary has, and of each set that has a name the first of its rows."""
    found = by_set(record)
    parts = [
        f"{label} {shown(found[''], name, form)}" for name, label, form in summary_of(found[""]) if name in found[""]
    ]
    for held_out, metrics in found.items():
        first = next(((name, form) for name, _, form in OF_A_SET if held_out and name in metrics), None)
        parts += [f"{held_out} {shown(metrics, *first)}"] if first else []
    return "  ".join(parts)


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
