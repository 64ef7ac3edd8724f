"""What was measured on held-out data of whether a model is better, in sentences: by what kind of data was trained on.

Pairs are told apart, by a reference or without one; single answers became more or less likely; answers that are learned
as they are have a loss.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.evaluation.statistics import exact_test, sign_test, wilson
from dpo_jax.objectives.rows import Kind
from dpo_jax.objectives.settings import as_written
from dpo_jax.objectives.terms import CALLED, data_of
from dpo_jax.page.folder import AnsweredStep, RunFolder
from dpo_jax.reporting.metrics import goodness, shown

LIKELY = 0.05
"""Chance of as large a difference between equals, above which it says nothing."""
SAME_LOSS = 0.005
"""Share of a held-out loss by which it must change before it says anything, as for the alarm of a flat loss."""


class Evidence(NamedTuple):
    """Something that was measured and bears on whether the new model is better: +1, -1, or 0 where it may be chance;
    None where it is worth knowing and does not tell. `metric` is the one that chose the step, if it is of that."""

    says: int | None
    text: str
    metric: str = ""


def kind_of(run: RunFolder) -> Kind:
    """What an entry of a step is; pairs where the settings do not say, or are of another version."""
    try:
        found = as_written(run.settings.get("objective"))
        return data_of(found.terms) if found is not None else "pairs"
    except ValueError:
        return "pairs"


def called(run: RunFolder) -> str:
    """What the entries of a step are called: `pairs`, `single answers`."""
    return CALLED[kind_of(run)]


def of_set(run: RunFolder, before: Mapping[str, Any], after: Mapping[str, Any], which: str) -> Iterator[Evidence]:
    """What the metrics and the rewards of a held-out set say, measured twice; of all sets where `which` is empty."""
    if kind_of(run) == "unpaired":
        found = list(_of_single_answers(run, which))
    elif "drift/chosen" in after:
        found = list(_preferred_more(run, after, which))
    else:
        found = list(_told_apart(run, before, after, which))
    found += _of_mean_margin(found, after, which)
    loss = list(_of_loss(run, before, after, which))
    yield from found + [one for one in loss if one.says == -1] if found else loss


def _of_mean_margin(found: Sequence[Evidence], after: Mapping[str, Any], which: str) -> Iterator[Evidence]:
    """The mean margin beyond the reference, where it says the opposite of what was counted: a few answers decide it."""
    mean = after.get("rewards/margins")
    counted = {one.says for one in found}
    if "drift/chosen" not in after or not isinstance(mean, int | float) or -_sign(mean) not in counted - {0, None}:
        return
    yield Evidence(_sign(mean), f"but the mean held-out margin{_of(which)} is {mean:+.3g}: a few answers moved far")


def by_the_metric(run: RunFolder) -> Evidence | None:
    """What the metric that chose the exported step was there, against the start, if one did."""
    best = run.known.get("best")
    if not isinstance(best, Mapping) or not isinstance(name := best.get("metric"), str):
        return None
    steps, values = run.curve(name)
    at = {int(step): float(value) for step, value in zip(steps, values, strict=True) if np.isfinite(value)}
    if run.best not in at or 0 not in at:
        return None
    old, new = at[0], at[run.best]
    says = _sign(goodness(name, new) - goodness(name, old))
    if says > 0:
        return Evidence(None, f"{name}, which chose step {run.best:,}, went from {old:.4g} to {new:.4g}")
    return Evidence(
        says,
        f"by {name}, which chose step {run.best:,}, no step was better than the start ({old:.4g}, then {new:.4g})",
        name,
    )


def _preferred_more(run: RunFolder, after: Mapping[str, Any], which: str) -> Iterator[Evidence]:
    """Held-out pairs of which the chosen answer gained more than the rejected one, where half is chance."""
    yield from _beyond_half(run, after, which, "it prefers the chosen answer more than before in")


def _told_apart(run: RunFolder, before: Mapping[str, Any], after: Mapping[str, Any], which: str) -> Iterator[Evidence]:
    """Held-out pairs of which the chosen answer has the greater reward, without a reference.

    A reward model that starts with equal scores is held against a half; else the same pairs are counted before and
    after.
    """
    if shown(before, "rewards/accuracies", "{}") == "tied":
        yield from _beyond_half(run, after, which, "the chosen answer has the greater reward in")
    elif len(sides := _rewards(run, which)) > 1:
        right = [chosen > rejected for chosen, rejected in sides]
        gained, lost = int((~right[0] & right[1]).sum()), int((right[0] & ~right[1]).sum())
        text = (
            f"the chosen answer has the greater reward in {right[1].sum():,} of {len(right[1]):,} held-out pairs"
            f"{_of(which)}, and had it in {right[0].sum():,} before ({gained:,} became so, {lost:,} are so no more)"
        )
        yield Evidence(_sign(gained - lost) if sign_test(gained, lost) < LIKELY else 0, text)


def _beyond_half(run: RunFolder, after: Mapping[str, Any], which: str, words: str) -> Iterator[Evidence]:
    rate, count = after.get("rewards/accuracies"), pairs_held_out(run, which)
    if rate is None or not count or shown(after, "rewards/accuracies", "{}") == "tied":
        return
    _, low, high = wilson(rate * count, count)
    text = f"{words} {rate:.1%} of {count:,} held-out pairs{_of(which)} (95 % interval {low:.1%} to {high:.1%})"
    yield Evidence(_beyond(low, high), text)


def _of_single_answers(run: RunFolder, which: str) -> Iterator[Evidence]:
    """How many desirable answers became more likely, and how many undesirable ones less likely.

    Both kinds may become likelier together, which tells nothing; so what says something is that shares of them differ.
    One kind alone cannot say that.
    """
    if len(sides := _rewards(run, which)) < 2:
        return
    moves = [after - before for before, after in zip(*sides, strict=True)]
    good, bad = (move[np.isfinite(move)] for move in moves)
    up, down = int((good > 0).sum()), int((bad < 0).sum())
    parts = [f"{up:,} of {len(good):,} desirable ones became more likely"] if len(good) else []
    parts += [f"{down:,} of {len(bad):,} undesirable ones became less likely"] if len(bad) else []
    if not parts:
        return
    text = f"of {len(good) + len(bad):,} held-out single answers{_of(which)}, {' and '.join(parts)}"
    if len(good) and len(bad):
        chance = exact_test((up, len(good) - up), (len(bad) - down, down))
        yield Evidence(_sign(up / len(good) + down / len(bad) - 1) if chance < LIKELY else 0, text)
    else:
        yield Evidence(
            None, f"{text}; there are no {'undesirable' if len(good) else 'desirable'} ones to tell them from"
        )


def _of_loss(run: RunFolder, before: Mapping[str, Any], after: Mapping[str, Any], which: str) -> Iterator[Evidence]:
    """The held-out loss, where it is of the same thing before and after: neither beta nor the reference moved."""
    old, new = before.get("loss"), after.get("loss")
    settings = run.settings.get("reference"), run.settings.get("objective")
    moves = any(isinstance(one, Mapping) and (one.get("update_every") or one.get("beta_end")) for one in settings)
    if not isinstance(old, int | float) or not isinstance(new, int | float) or moves:
        return
    says = 0 if abs(new - old) <= SAME_LOSS * abs(old) else _sign(old - new)
    word = {1: "fell", -1: "rose", 0: "hardly changed,"}[says]
    yield Evidence(says, f"the held-out loss{_of(which)} {word} from {old:.4f} to {new:.4f}")


def _of(which: str) -> str:
    return f" of {which}" if which else ""


def _beyond(low: float, high: float) -> int:
    """Which side of a half an interval is on; 0 where it holds that."""
    return 1 if low > 0.5 else -1 if high < 0.5 else 0


def _sign(value: int | float) -> int:
    return (value > 0) - (value < 0)


def _rewards(run: RunFolder, which: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rewards of chosen and of rejected answers of a set, or of all of them, at the start and after; as many as were
    kept of the same answers."""
    found = []
    for _, sets in run.rewards:
        mine = [sides for name, sides in sets.items() if which in ("", name)]
        found += [(np.concatenate([one for one, _ in mine]), np.concatenate([one for _, one in mine]))] if mine else []
    sizes = {len(side) for sides in found for side in sides}
    return found if len(sizes) == 1 else []


def pairs_held_out(run: RunFolder, which: str = "") -> int:
    """How many held-out pairs of a set, or of all of them, there are: as many as rewards were kept of, or as were read;
    0 where neither is known."""
    if run.rewards:
        sets = run.rewards[-1].sets
        return sum(len(chosen) for name, (chosen, _) in sets.items() if which in ("", name))
    counts = [
        report.get("pairs") or 0
        for name, report in run.data.items()
        if isinstance(report, Mapping) and re.fullmatch(rf"data\.eval(\.{re.escape(which) if which else '.*'})?", name)
    ]
    return sum(count for count in counts if isinstance(count, int))


def answered_better(first: AnsweredStep, last: AnsweredStep) -> Evidence | None:
    """The share of good answers before and after, by the exact test of paired shares (McNemar, 1947)."""
    both = [(one.get("good"), other.get("good")) for one, other in zip(first.rows, last.rows, strict=False)]
    judged = [(one, other) for one, other in both if isinstance(one, bool) and isinstance(other, bool)]
    if not judged:
        return None
    gained, lost = judged.count((False, True)), judged.count((True, False))
    sure = sign_test(gained, lost) < LIKELY
    says = (1 if gained > lost else -1) if sure else 0
    old, new = (sum(side) for side in zip(*judged, strict=True))
    text = f"of {len(judged):,} questions it answers {new:,} well, and {old:,} before"
    return Evidence(says, f"{text} ({gained:,} became good, {lost:,} bad)")


def verdict(
    found: Sequence[Evidence],
    *,
    finished: bool,
    measured: bool = False,
    seen: bool = False,
    alarms: Sequence[tuple[int, str]] = (),
) -> tuple[str, str]:
    """In a few words whether the new model is better, and a class for its colour; not without an alarm that fired.

    Args:
      found: what bears on it.
      finished: whether the run is.
      measured: whether anything held-out was measured twice.
      seen: whether prompts that are held out were trained on.
      alarms: step and text of each.
    """
    text, colour = _without_alarms(found, finished=finished, measured=measured)
    if seen and colour == "good":
        text, colour = f"{text}, on prompts of which it was trained on some", "mixed"
    if not alarms:
        return text, colour
    first = re.sub(r"^step \d+: ", "", alarms[0][1]).partition(": ")[0]
    fired = f"an alarm fired: {first}" if len(alarms) == 1 else f"{len(alarms)} alarms fired, the first: {first}"
    if colour == "good":
        return f"{text} by these measures, but {fired}", "mixed"
    return f"{text}, and {fired}", colour


def _without_alarms(found: Sequence[Evidence], *, finished: bool, measured: bool) -> tuple[str, str]:
    said = {one.says for one in found if one.says is not None}
    if not said:
        later = "what was measured twice does not tell" if measured else "nothing held-out was measured twice"
        return f"Not known: {later}" + ("" if measured or finished else " yet"), "unknown"
    if {1, -1} <= said:
        return "Mixed: better in one way, worse in another", "mixed"
    if said == {0}:
        return "No difference that chance would not explain", "unknown"
    if 1 in said and (metric := next((one.metric for one in found if one.metric and one.says == 0), None)):
        return f"Better than where it started, but not by {metric}", "mixed"
    return ("Better than where it started", "good") if 1 in said else ("Worse than where it started", "bad")
