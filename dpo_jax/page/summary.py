"""What a run came to, in a table and a sentence: what was measured before and after, and whether that may be chance."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dpo_jax.evaluation.statistics import sign_test, wilson
from dpo_jax.page.folder import AnsweredStep, RunFolder
from dpo_jax.reporting.metrics import before_and_after, by_set, evaluations_in, judges_in, of_judge, shown, table

LIKELY = 0.05
"""Chance of as large a difference between equals, above which it says nothing."""
MORE = (("kl", "divergence, nats a token", "{:.4f}"),)
"""Rows of the page's table beside those of the summary on the terminal."""


class Evidence(NamedTuple):
    """Something that was measured and bears on whether the new model is better: +1, -1, or 0 where it may be chance."""

    says: int
    text: str


def results(run: RunFolder) -> list[tuple[str, str, str]]:
    """Label, before and after: as on the terminal at the end of a run, and a little more."""
    before, after = measured(run)
    rows = table(before, after) if after else []
    old, new = by_set(before)[""], by_set(after)[""]
    known = {label for label, _, _ in rows}
    rows += [
        (label, shown(old, name, form), shown(new, name, form))
        for name, label, form in MORE
        if label not in known and name in new
    ]
    return rows


def measured(run: RunFolder) -> tuple[dict[str, Any], dict[str, Any]]:
    """The evaluation of the start, and that of what is exported: of the best step, or of the newest. The first is empty
    where it is not there, or is the only one."""
    found = evaluations_in(run.records)
    before, after = before_and_after(found, run.best if run.best in found else None)
    return (before or {}) if before is not after else {}, after or {}


def evidence(run: RunFolder) -> list[Evidence]:
    """All that was measured of whether the new model is better; nothing until the second evaluation."""
    found: list[Evidence] = []
    before, after = map(by_set, measured(run))
    for which, new in after.items():
        name = f" of {which}" if which else ""
        if before.get(which):
            found += _told_apart(run, new, which)
        judges = judges_in(new)
        for judge in judges:
            rate, low, high = (new.get(of_judge(key, judge)) for key in ("win_rate", "win_rate_low", "win_rate_high"))
            if rate is not None and low is not None and high is not None:
                says = 1 if low > 0.5 else -1 if high < 0.5 else 0
                by = f", by the {judge or 'first'} judge" if len(judges) > 1 else ""
                text = f"it wins {rate:.1%} of its contests{name} against the start{by}"
                found.append(Evidence(says, f"{text} (95 % interval {low:.1%} to {high:.1%})"))
    if len(run.answers) > 1 and (passed := answered_better(*run.answers)):
        found.append(passed)
    return found


def _told_apart(run: RunFolder, after: Mapping[str, Any], which: str) -> Iterator[Evidence]:
    """Held-out pairs of which the chosen answer gained more than the rejected one, where half is chance."""
    rate, count = after.get("rewards/accuracies"), pairs_held_out(run, which)
    if rate is None or not count or "drift/chosen" not in after or shown(after, "rewards/accuracies", "{}") == "tied":
        return
    _, low, high = wilson(rate * count, count)
    says = 1 if low > 0.5 else -1 if high < 0.5 else 0
    text = f"it prefers the chosen answer more than before in {rate:.1%} of {count:,} held-out pairs"
    name = f" of {which}" if which else ""
    yield Evidence(says, f"{text}{name} (95 % interval {low:.1%} to {high:.1%})")


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


def verdict(found: Sequence[Evidence], *, finished: bool) -> tuple[str, str]:
    """In a few words whether the new model is better, and a class for its colour."""
    said = {one.says for one in found}
    if not found:
        later = "nothing held-out was measured twice" if finished else "nothing held-out was measured twice yet"
        return f"Not known: {later}", "unknown"
    if {1, -1} <= said:
        return "Mixed: better in one way, worse in another", "mixed"
    if said == {0}:
        return "No difference that chance would not explain", "unknown"
    return ("Better than where it started", "good") if 1 in said else ("Worse than where it started", "bad")
