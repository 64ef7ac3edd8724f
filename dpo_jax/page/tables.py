"""Tables of several runs: the settings in which they differ, and what they came to."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.config import run as config
from dpo_jax.objectives.rows import MODIFIERS
from dpo_jax.page.evidence import kind_of
from dpo_jax.page.folder import RunFolder
from dpo_jax.page.sections import NONE, differing, machine
from dpo_jax.page.texts import number, published
from dpo_jax.reporting.metrics import BETTER

COMPARED = ("loss", "rewards/accuracies", "rewards/margins", "logps/accuracies", "pass_rate", "win_rate")
COMPARED += ("drift/chosen", "drift/rejected")
"""Held-out metrics of which there is a line."""
OTHER_UNITS = (
    "Losses and margins cannot be compared here, and none is in bold: the runs have different objectives, or the same "
    "with other settings, so that the numbers have other units."
)
OTHER_SHARES = (
    "The values of rewards/accuracies cannot be compared: of single answers it is the share on the right side of the "
    "baseline, of pairs the share whose chosen answer has the greater reward."
)
"""Why metrics of several runs cannot be compared."""
UPRIGHT = 5
"""Runs that have a column each; of more, each has a row."""


class Cell(NamedTuple):
    """A value, and whether it is the best of its metric."""

    text: str
    best: bool = False


class Table(NamedTuple):
    """Heads of columns, and rows that begin with their own head; what is to be said of them stands below."""

    heads: list[str]
    rows: list[tuple[Any, ...]]
    note: str = ""


def settings(runs: Sequence[RunFolder], names: Sequence[str]) -> Table:
    """Settings, facts and versions in which runs differ."""
    given = [config.flat(run.settings) if run.settings else {} for run in runs]
    odd = dict.fromkeys(name for run in runs for name, _, _ in differing(run))
    odd |= dict.fromkeys(name for table in given for name, value in table.items() if _counts(name, value))
    rows = [(name, [_value(table, name) for table in given]) for name in odd if name != "output"]
    others = [{**run.facts, **machine(run)} for run in runs]
    known = dict.fromkeys(name for table in others for name in table)
    rows += [(name, [_value(table, name) for table in others]) for name in known]
    return _table(names, [(name, [Cell(value) for value in values]) for name, values in rows if len(set(values)) > 1])


def _counts(name: str, value: object) -> bool:
    """Whether a setting is a number of the objective that does something, so that it is told also where it is the
    objective's default: another objective has another default, or no such setting."""
    section, _, key = name.partition(".")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return section == "objective" and is_number and value != 0 and key not in MODIFIERS


def metrics(runs: Sequence[RunFolder], names: Sequence[str]) -> Table:
    """The newest value of each metric of each run, the best of them marked where they can be compared, and said where
    they cannot."""
    rows = list(_last(runs))
    apart = {name: why for name, values, _ in rows if (why := _told_apart_by(name, values, runs))}
    cells = [(name, _marked(values, None if name in apart else more)) for name, values, more in rows]
    return _table(names, cells)._replace(note=" ".join(dict.fromkeys(apart.values())))


def _told_apart_by(name: str, values: Sequence[float | None], runs: Sequence[RunFolder]) -> str:
    """Why the values of a metric, of the runs that have it, cannot be compared; empty where they can."""
    known = [run for run, value in zip(runs, values, strict=True) if value is not None and run.settings]
    if re.search("loss|margins", name) and len({str(run.settings.get("objective")) for run in known}) > 1:
        return OTHER_UNITS
    if name.endswith("rewards/accuracies") and len({kind_of(run) == "unpaired" for run in known}) > 1:
        return OTHER_SHARES
    return ""


def _table(names: Sequence[str], rows: list[tuple[str, list[Cell]]]) -> Table:
    if len(names) <= UPRIGHT:
        return Table(["", *names], [(name, *values) for name, values in rows])
    lines = zip(names, zip(*(values for _, values in rows), strict=True), strict=True) if rows else ()
    return Table(["run", *(name for name, _ in rows)], [(name, *values) for name, values in lines])


def _value(table: Mapping[str, Any], name: str) -> str:
    """A value among those of other runs; of a digest, enough to tell it from others."""
    value = published(table[name]) if table.get(name) is not None else NONE
    return f"{value[:12]}..." if re.fullmatch("[0-9a-f]{40,64}", value) else value


def _marked(values: Sequence[float | None], more: bool | None) -> list[Cell]:
    known = [value for value in values if value is not None and math.isfinite(value)]
    best = None if more is None or len(set(known)) < 2 else max(known) if more else min(known)
    return [Cell(number(value), value is not None and value == best) for value in values]


def _last(runs: Sequence[RunFolder]) -> Iterator[tuple[str, list[float | None], bool | None]]:
    """The newest value of each metric for each run, and whether more of it is better, if it is one of these."""
    better = {name: BETTER[name] == "higher" for name in COMPARED if name in BETTER}
    also = {name: None for name in COMPARED if name not in BETTER}
    for which in dict.fromkeys(which for run in runs for which in run.sets):
        for name, more in {**better, **also}.items():
            values = [curve.last if (curve := run.held_out(name, which)) else None for run in runs]
            if any(value is not None for value in values):
                yield f"{which or 'held-out'} {name}", values, more
    for name in ("loss", "grad_norm", "pairs_per_second"):
        values = [float(np.nanmedian(curve.values[-20:])) if (curve := run.curve(name)) else None for run in runs]
        if any(value is not None for value in values):
            yield f"training {name}, median of the last 20", values, None
