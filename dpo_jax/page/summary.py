"""What a run came to, in a table and a sentence: what was measured before and after, and whether that may be chance."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dpo_jax.page.folder import Answers, RunFolder
from dpo_jax.reporting.metrics import SUMMARY, shown

SURE = 1.96
"""Standard errors of an interval that holds in 95 of 100 cases."""
LIKELY = 0.05
"""Chance of as large a difference between equals, above which it says nothing."""
MORE = (
    ("pass_rate", "good answers", "{:.1%}"),
    ("win_rate", "win rate against the start", "{:.1%}"),
    ("kl", "divergence, nats a token", "{:.4f}"),
    ("lengths/answers", "tokens of an answer", "{:.1f}"),
)
"""Rows of the page's table beside those of the summary on the terminal."""


class Result(NamedTuple):
    """A row of the table of results."""

    label: str
    before: str
    after: str


class Evidence(NamedTuple):
    """Something that was measured and bears on whether the new model is better: +1, -1, or 0 where it may be chance."""

    says: int
    text: str


def results(run: RunFolder) -> list[Result]:
    """What was measured before and after, by set."""
    rows = []
    for which in run.sets:
        before, after = (_measured(run, which, end) for end in ("first", "last"))
        known = {name: (label, form) for name, label, form in (*SUMMARY, *MORE)}
        for name, (label, form) in known.items():
            if name in after:
                old = shown(before, name, form) if name in before else "-"
                rows.append(Result(f"{label}, {which}" if which else label, old, shown(after, name, form)))
    return rows


def _measured(run: RunFolder, which: str, end: str) -> dict[str, float | None]:
    prefix = f"eval/{which}/" if which else "eval_"
    steps = [record["step"] for record in run.records if any(name.startswith(prefix) for name in record)]
    if not steps:
        return {}
    step = min(steps) if end == "first" else run.best if run.best in steps else max(steps)
    if end == "first" and step == max(steps):
        return {}  # nothing to compare with yet
    found: dict[str, Any] = {}
    for record in run.records:
        if record["step"] == step:
            found |= {name[len(prefix) :]: value for name, value in record.items() if name.startswith(prefix)}
    return found


def evidence(run: RunFolder) -> list[Evidence]:
    """All that was measured of whether the new model is better; nothing until the second evaluation."""
    found = []
    for which in run.sets:
        before, after = (_measured(run, which, end) for end in ("first", "last"))
        name = f" of {which}" if which else ""
        if before and after:
            found += _told_apart(run, before, after, name)
        low, high = after.get("win_rate_low"), after.get("win_rate_high")
        if low is not None and high is not None and after.get("win_rate") is not None:
            says = 1 if low > 0.5 else -1 if high < 0.5 else 0
            found.append(
                Evidence(
                    says, f"it wins {after['win_rate']:.1%} (95 % interval {low:.1%} to {high:.1%}) against the start"
                )
            )
    if len(run.answers) > 1 and (passed := answered_better(*run.answers)):
        found.append(passed)
    return found


def _told_apart(run: RunFolder, before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> Iterator[Evidence]:
    """Held-out pairs of which the chosen answer gained more than the rejected one, where half is chance."""
    rate, count = after.get("rewards/accuracies"), pairs_held_out(run, name.removeprefix(" of "))
    if rate is None or not count or "drift/chosen" not in after or shown(after, "rewards/accuracies", "{}") == "tied":
        return
    low, high = interval(rate, count)
    says = 1 if low > 0.5 else -1 if high < 0.5 else 0
    text = f"it prefers the chosen answer more than before in {rate:.1%} of {count:,} held-out pairs{name} "
    yield Evidence(says, f"{text}(95 % interval {low:.1%} to {high:.1%})")


def pairs_held_out(run: RunFolder, which: str = "") -> int:
    """How many held-out pairs (or single answers) there are, if that is known."""
    report = run.data.get(f"data.eval.{which}" if which else "data.eval", {})
    count = report.get("pairs") or report.get("singles") if isinstance(report, Mapping) else None
    return count if isinstance(count, int) else 0


def interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's interval of a share of so many (E. B. Wilson, 1927), which holds in 95 of 100 cases.

    >>> [round(bound, 4) for bound in interval(0.96875, 128)]
    [0.9224, 0.9878]
    """
    wide = SURE**2 / count
    middle = (share + wide / 2) / (1 + wide)
    half = SURE * math.sqrt(share * (1 - share) / count + wide / (4 * count)) / (1 + wide)
    return middle - half, middle + half


def answered_better(first: Answers, last: Answers) -> Evidence | None:
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


def sign_test(gained: int, lost: int) -> float:
    """Chance that of so many changes at least as many go the same way, were both ways alike; two-sided.

    >>> sign_test(8, 1), sign_test(0, 0)
    (0.0390625, 1.0)
    """
    count = gained + lost
    tail = sum(math.comb(count, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**count)


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
