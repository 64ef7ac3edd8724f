"""Which figures a page has: one table for the page of a run, one for pages that compare runs."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.page.curves import Thin, thin
from dpo_jax.page.drawing import Bars, Line, Plot
from dpo_jax.page.evidence import called, kind_of
from dpo_jax.page.folder import Curve, Rewards, RunFolder
from dpo_jax.reporting.metrics import TIED, judges_in, of_judge

PALETTE = ("c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8")
"""Colours of runs and of named held-out sets, which people who see few colours tell apart too."""
TRAINING = "training"
BINS = 30
FLAT = 1e-5
"""Spread of rewards, in nats, below which they are all the same but for rounding."""


class Series(NamedTuple):
    """A metric in a figure: its name, its label, and its colour (`""` is that of training or held-out data)."""

    metric: str
    label: str = ""
    colour: str = ""


class Panel(NamedTuple):
    """A figure of curves.

    Attributes:
      series: what is drawn of it, where it was measured.
      band: metrics of the edges of what is shaded around its only series.
      scale: what the values are multiplied by.
      least: not drawn where it never is above this.
      unless: not drawn where there is this metric, which says the same.
      compared: whether it is also in a page that compares runs.
    """

    title: str
    unit: str
    series: tuple[Series, ...]
    rules: tuple[float, ...] = ()
    bounds: tuple[float, float] | None = None
    band: tuple[str, str] | None = None
    scale: float = 1.0
    least: float = -math.inf
    unless: str = ""
    about: str = ""
    compared: bool = True


def _sides(family: str) -> tuple[Series, ...]:
    return Series(f"{family}/chosen", "chosen", "chosen"), Series(f"{family}/rejected", "rejected", "rejected")


PANELS = (
    Panel("Loss", "mean of the pairs", (Series("loss"),), about="The dotted line is the loss at the start."),
    Panel(
        "Reward margin",
        "nats",
        (Series("rewards/margins"),),
        (0.0,),
        band=("rewards/margins_p10", "rewards/margins_p90"),
        about="Chosen reward minus rejected reward; shaded from the 10th to the 90th percentile of a step's pairs.",
    ),
    Panel("Pairs told apart", "share of pairs", (Series("rewards/accuracies"),), (0.5,), (-0.02, 1.02)),
    Panel(
        "Drift from the reference",
        "nats a completion",
        _sides("drift"),
        (0.0,),
        about="Log-probability under the policy minus that under the reference.",
    ),
    Panel("Rewards", "nats", _sides("rewards"), (0.0,), unless="drift/chosen"),
    Panel("Log-probability", "nats a completion", _sides("logps"), unless="drift/chosen"),
    Panel(
        "Divergence from the reference", "nats a token", (Series("kl"),), about="Estimated on the answers of the data."
    ),
    Panel("Weight of a pair in the gradient", "0 to 0.5", (Series("gradient_weight"),), compared=False),
    Panel("Pass rate", "share of answers", (Series("pass_rate"),), bounds=(-0.02, 1.02)),
    Panel("Win rate", "share", (Series("win_rate"),), (0.5,), (-0.02, 1.02), band=("win_rate_low", "win_rate_high")),
    Panel("Entropy of the next token", "nats", (Series("entropy"),)),
    Panel("Norm of the gradient", "before clipping", (Series("grad_norm"),)),
    Panel("Learning rate", "of the step", (Series("learning_rate"),), compared=False),
    Panel("Lengths of the data's answers", "tokens", _sides("lengths"), compared=False),
    Panel("Speed", "pairs a second", (Series("pairs_per_second"),)),
    Panel(
        "Waiting for data",
        "share of the time",
        (Series("input_wait"),),
        bounds=(-0.02, 1.02),
        least=0.1,
        compared=False,
    ),
    Panel("Load balance of the experts", "loss", (Series("aux_loss"),), compared=False),
    Panel("Beta", "of the step", (Series("beta"),), compared=False),
    Panel("Scale of the loss in float16", "factor", (Series("loss_scale"),), compared=False),
)
"""The figures of curves, in their order."""
SLOW = ("pairs_per_second",)
"""Metrics whose first record includes compiling."""


def plots(run: RunFolder, metrics: Sequence[str] = ()) -> list[Plot]:
    """The curves of a run, training beside held-out: those of some metrics, or all."""
    found = []
    for panel in dict.fromkeys(map(_panel_of, metrics)) or (*PANELS, *_judges(run), *_terms(run)):
        parts = [] if panel.unless and run.curve(panel.unless) else list(_lines(run, panel))
        if any(np.nanmax(part.curve.high) > panel.least for part in parts):
            start = run.held_out("loss").first if panel.title == "Loss" else math.nan
            start = run.curve("loss").first if panel.title == "Loss" and math.isnan(start) else start
            rules = panel.rules + ((start,) if math.isfinite(start) else ())
            title, unit, about = (_called(text, run) for text in (panel.title, panel.unit, panel.about))
            found.append(Plot(title, unit, parts, rules, bounds=panel.bounds, about=about))
    return found


def _called(text: str, run: RunFolder) -> str:
    """Words of a figure, which are of pairs, for what a run trains on."""
    if kind_of(run) == "unpaired" and text == "Pairs told apart":
        return "On the right side of the baseline"
    return re.sub("pairs|Pairs", called(run), text) if kind_of(run) in ("unpaired", "chosen") else text


def _panel_of(metric: str) -> Panel:
    """The figure that a metric is in; one of its own if it is in none."""
    found = (panel for panel in PANELS if any(series.metric == metric for series in panel.series))
    return next(found, Panel(metric, "", (Series(metric),)))._replace(unless="", least=-math.inf)


def _judges(run: RunFolder) -> Iterator[Panel]:
    """A figure for each judge of answers beside the first."""
    for judge in filter(None, judges_in(run.metrics)):
        rate, low, high = (of_judge(name, judge) for name in ("win_rate", "win_rate_low", "win_rate_high"))
        yield Panel(f"Win rate by the {judge} judge", "share", (Series(rate),), (0.5,), (-0.02, 1.02), band=(low, high))


def _terms(run: RunFolder) -> Iterator[Panel]:
    """A figure for each term of an objective of several."""
    names = [name for name in run.metrics if name.startswith("objective/") and not name.endswith("_margin")]
    if len(names) > 1:
        for name in names:
            yield Panel("Term of the loss", name.removeprefix("objective/"), (Series(name),), compared=False)


def _lines(run: RunFolder, panel: Panel) -> Iterator[Line]:
    for series in panel.series:
        training = _told(series.metric, run.curve(series.metric), run.curve("rewards/margins"))
        if training:
            band = _band(panel, training, run.curve)
            yield Line(
                thin(training),
                series.colour or "train",
                False,
                band,
                _label(series, TRAINING),
                _recent(training.values),
            )
    # a figure with two sides has room for one set: all of them together, or the first
    for number, which in enumerate(run.sets if len(panel.series) < 2 else run.sets[:1]):
        for series in panel.series:
            margins = run.held_out("rewards/margins", which)
            if found := _told(series.metric, run.held_out(series.metric, which), margins):
                several = len(run.sets) > 1
                colour = series.colour or (PALETTE[number % len(PALETTE)] if several else "held")
                label = _label(series, which or ("all held-out" if several else "held-out"))
                yield Line(thin(found), colour, True, _marked_band(panel, found, run, which), label, found.last, number)


def _told(metric: str, curve: Curve, margins: Curve) -> Curve:
    """The curve without what it does not tell: a first step that compiled, an accuracy of margins that are all 0."""
    if metric in SLOW and len(curve.steps) > 2:
        return Curve(*(part[1:] for part in curve))
    if metric == "rewards/accuracies" and len(margins.steps) == len(curve.steps):
        return Curve(curve.steps, np.where(np.abs(margins.values) < TIED, np.nan, curve.values))
    return curve


def _label(series: Series, side: str) -> str:
    return side if not series.label else series.label if side == TRAINING else f"{series.label}, {side}"


def _recent(values: np.ndarray) -> float:
    """What a noisy curve has come to: the mean of its last tenth."""
    last = values[-max(1, len(values) // 10) :]
    return float(np.nanmean(last)) if np.isfinite(last).any() else math.nan


def _band(panel: Panel, curve: Curve, get: Callable[[str], Curve]) -> tuple[np.ndarray, np.ndarray] | None:
    """What is shaded around a curve, where its edges are known at all of its steps."""
    if panel.band is None or not all(np.array_equal(get(name).steps, curve.steps) for name in panel.band):
        return None
    low, high = (thin(get(name)).mean for name in panel.band)
    return low, high


def _marked_band(panel: Panel, curve: Curve, run: RunFolder, which: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Of held-out curves, that of an interval; not that of quantiles, which training has already."""
    if panel.band is None or "_low" not in panel.band[0]:
        return None
    return _band(panel, curve, lambda name: run.held_out(name, which))


# ---------------------------------------------------------------------------------------------- histograms


def histograms(rewards: Sequence[Rewards]) -> list[Plot]:
    """Held-out margins and rewards, before and after."""
    if not rewards:
        return []
    found, after = [], rewards[-1]
    for which in after.sets:
        name = f" ({which})" if len(after.sets) > 1 else ""
        sides = [(step, sets[which]) for step, sets in rewards if which in sets]
        margins = [(step, chosen - rejected) for step, (chosen, rejected) in sides if len(chosen) == len(rejected)]
        if margins:
            found.append(_before_and_after("Margins" + name, margins))
        _, (chosen, rejected) = sides[-1]
        parts = _histogram([("chosen", "chosen", chosen), ("rejected", "rejected", rejected)])
        title = f"Rewards after step {after.step:,}{name}"
        if parts:
            found.append(Plot(title, "answers", parts, across="reward, nats"))
    return [plot for plot in found if plot.parts]


def _before_and_after(title: str, margins: Sequence[tuple[int, np.ndarray]]) -> Plot:
    first, last = margins[0], margins[-1]
    about, parts = "", []
    if len(margins) > 1 and np.ptp(first[1]) < FLAT:
        about = f"Before training every margin was {0 if abs(np.mean(first[1])) < FLAT else np.mean(first[1]):.3g}."
    elif len(margins) > 1:
        parts = [("before", "muted", first[1])]
    values = [*parts, (f"after step {last[0]:,}", "held", last[1])]
    return Plot(title, "pairs", _histogram(values), across="margin, nats", about=about)


def _histogram(values: Sequence[tuple[str, str, np.ndarray]]) -> list[Bars]:
    sides = [(label, colour, side[np.isfinite(side)]) for label, colour, side in values]
    finite = [one for one in sides if len(one[2])]  # of single answers there may be none of a kind
    every = np.concatenate([side for _, _, side in finite]) if finite else np.zeros(0)
    if not len(every):
        return []
    low, high = every.min(), every.max()
    edges = np.linspace(low, high, BINS + 1) if high - low > FLAT else np.linspace(low - 0.5, low + 0.5, BINS + 1)
    last = len(finite) - 1
    return [
        Bars(
            edges, np.histogram(side, edges)[0], colour, number == last or colour == "chosen", label, float(side.mean())
        )
        for number, (label, colour, side) in enumerate(finite)
    ]


# ---------------------------------------------------------------------------------------------- several runs


def compared(runs: Sequence[RunFolder], names: Sequence[str]) -> list[Plot]:
    """The curves of several runs, a metric in each figure: of training, and where it was measured of held-out data."""
    found = []
    for panel in (panel for panel in PANELS if panel.compared):
        for series in panel.series:
            title = f"{panel.title}, {series.label}" if series.label else panel.title
            for which, side, marked in _sources(runs):
                curves = [
                    run.held_out(series.metric, which or "") if marked else run.curve(series.metric) for run in runs
                ]
                parts = [
                    _of_run(number, thin(curve), marked, name, curve.last if marked else _recent(curve.values))
                    for number, (curve, name) in enumerate(zip(curves, names, strict=True))
                    if curve
                ]
                if parts:
                    found.append(Plot(f"{title}, {side}", panel.unit, parts, panel.rules, bounds=panel.bounds))
    return found


def _of_run(number: int, curve: Thin, marked: bool, name: str, last: float) -> Line:
    """Without a band, as many would lie over each other."""
    mean = curve.mean
    colour, dash = PALETTE[number % len(PALETTE)], number // len(PALETTE)
    return Line(curve._replace(low=mean, high=mean), colour, marked, None, name, last, dash)


def _sources(runs: Sequence[RunFolder]) -> list[tuple[str | None, str, bool]]:
    """Where a metric may come from: a held-out set, or the training steps."""
    sets = dict.fromkeys(which for run in runs for which in run.sets)
    return [*((which, which or "held-out", True) for which in sets), (None, TRAINING, False)]
