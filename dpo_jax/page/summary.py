"""What a run came to, in a table and in sentences: what was measured before and after."""

from typing import Any

from dpo_jax.page.evidence import Evidence, answered_better, by_the_metric, of_set
from dpo_jax.page.folder import RunFolder, lines_of
from dpo_jax.reporting.metrics import before_and_after, by_set, judges_in, of_judge, shown, table

MORE = (("kl", "divergence, nats a token", "{:.4f}"),)
"""Rows of the page's table beside those of the summary on the terminal."""


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
    found = run.measured.evaluations
    before, after = before_and_after(found, run.best if run.best in found else None)
    return (before or {}) if before is not after else {}, after or {}


def evidence(run: RunFolder) -> list[Evidence]:
    """All that was measured of whether the new model is better; nothing until the second evaluation."""
    found: list[Evidence] = []
    before, after = map(by_set, measured(run))
    for which, new in after.items():
        name = f" of {which}" if which else ""
        if before.get(which):
            found += of_set(run, before[which], new, which)
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
    if found and (chosen := by_the_metric(run)):
        found.append(chosen)
    return found + [Evidence(None, line) for line in lines_of(run, "shared")] if found else found
