"""Frontiers of reward against divergence: their envelopes, intervals over seeds, comparison, and the figure."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

GRID = 40
"""Divergences at which envelopes are compared."""
FIRST = ("DPO", "PPO", "IPO", "KTO", "SimPO", "Best of N", "Preferred-FT", "Unlikelihood")
COLOURS = ("#0b5fa5", "#c2410c", "#15803d", "#7e22ce", "#0e7490", "#57534e", "#eab308", "#be123c")


class Interval(NamedTuple):
    """A mean over seeds, and half of its 95 % interval by Student's t."""

    mean: float
    half: float


def interval(values: Sequence[float]) -> Interval:
    """That of values that are drawn independently; infinitely wide for a single one."""
    if len(values) < 2:
        return Interval(float(values[0]), math.inf)
    wide = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return Interval(statistics.fmean(values), float(wide))


def envelope(points: Sequence[tuple[float, float]], start: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """The best reward that is had for at most a divergence: (kl, reward), both not falling, from the start to the
    largest divergence that was measured."""
    kls, best = [start[0]], [start[1]]
    for kl, reward in sorted(points):
        if reward > best[-1]:
            kls.append(kl)
            best.append(reward)
    if (most := max(kl for kl, _ in points)) > kls[-1]:
        kls.append(most)
        best.append(best[-1])
    return np.asarray(kls), np.asarray(best)


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, tuple[np.ndarray, np.ndarray]]]:
    """By method and seed, the envelope over its settings and steps."""
    found: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for row in rows:
        found.setdefault(row["method"], {}).setdefault(row["seed"], []).append((row["kl"], row["reward"]))
    starts = {seed: points[0] for seed, points in found.pop("SFT", {}).items()}
    return {
        method: {seed: envelope(points, (0.0, starts[seed][1])) for seed, points in seeds.items()}
        for method, seeds in found.items()
    }


def reach(seeds: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> float:
    """The divergence up to which every seed has an envelope."""
    return min(float(kls[-1]) for kls, _ in seeds.values())


def at(seeds: Mapping[int, tuple[np.ndarray, np.ndarray]], kl: float) -> list[float]:
    """Each seed's envelope at a divergence, between its points on straight lines."""
    return [float(np.interp(kl, *curve)) for curve in seeds.values()]


class Comparison(NamedTuple):
    """One method against another over the divergences that both reach: differences by seed."""

    method: str
    other: str
    grid: list[float]
    differences: list[Interval]

    @property
    def apart(self) -> float:
        """Share of the grid at which the interval of the difference is above 0."""
        return sum(one.mean - one.half > 0 for one in self.differences) / len(self.differences)


def compare(found: Mapping[str, Mapping[int, Any]], method: str, other: str) -> Comparison:
    """By seed, what one envelope is above the other, over the range that they share (its upper nine tenths: both begin
    at the same point)."""
    most = min(reach(found[method]), reach(found[other]))
    grid = [float(kl) for kl in np.linspace(0.1 * most, most, GRID)]
    differences = []
    for kl in grid:
        ours, theirs = at(found[method], kl), at(found[other], kl)
        differences.append(interval([a - b for a, b in zip(ours, theirs, strict=True)]))
    return Comparison(method, other, grid, differences)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The figure as SVG: every measurement, and each method's envelope with its interval over seeds."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "frontier", "svg.fonttype": "none", "font.family": "sans-serif"})
    found = curves(rows)
    figure, axes = pyplot.subplots(figsize=(7.6, 4.8), layout="constrained")
    for method, colour in zip(FIRST, COLOURS, strict=True):
        if method not in found:
            continue
        mine = [row for row in rows if row["method"] == method]
        axes.scatter([r["kl"] for r in mine], [r["reward"] for r in mine], s=9, alpha=0.35, color=colour, linewidths=0)
        grid = np.linspace(0, reach(found[method]), GRID)
        middle = [interval(at(found[method], float(kl))) for kl in grid]
        mean, half = np.asarray([m for m, _ in middle]), np.asarray([h for _, h in middle])
        axes.plot(grid, mean, color=colour, label=method, linewidth=1.8)
        if np.isfinite(half).all():
            axes.fill_between(grid, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("KL(policy || reference), nats an answer")
    axes.set_ylabel("expected true reward")
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
