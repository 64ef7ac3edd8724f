"""Long curves made short: what a figure can show of them, without losing their extremes."""

from typing import NamedTuple

import numpy as np

from dpo_jax.page.folder import Curve

COLUMNS = 150
"""Points of a drawn curve; a figure is about twice as many pixels wide."""


class Thin(NamedTuple):
    """A curve of at most COLUMNS points: means over equal stretches of steps, and the least and greatest value of each.

    nan where a stretch has no finite value, so that the line is broken there.
    """

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def is_thinned(self) -> bool:
        """Whether any point stands for several."""
        return bool(np.nansum(self.high - self.low) > 0)


def thin(curve: Curve, columns: int = COLUMNS) -> Thin:
    """The curve as a figure shows it; a short one as it is.

    >>> short = thin(Curve(np.arange(6), np.array([0.0, 1, 5, 1, np.nan, np.nan])), columns=3)
    >>> short.mean.tolist(), short.high.tolist()
    ([0.5, 3.0, nan], [1.0, 5.0, nan])
    """
    steps, values = curve
    if len(steps) <= columns:
        return Thin(steps.astype(np.float64), values, values, values)
    edges = np.linspace(steps[0], steps[-1] + 1, columns + 1)
    column = np.clip(np.searchsorted(edges, steps, side="right") - 1, 0, columns - 1)
    finite = np.isfinite(values)
    count = np.bincount(column[finite], minlength=columns).astype(np.float64)
    there = np.bincount(column, minlength=columns) > 0
    with np.errstate(invalid="ignore"):
        mean = np.bincount(column[finite], weights=values[finite], minlength=columns) / count
        middle = np.bincount(column, weights=steps, minlength=columns) / np.bincount(column, minlength=columns)
    low, high = np.full(columns, np.inf), np.full(columns, -np.inf)
    np.minimum.at(low, column[finite], values[finite])
    np.maximum.at(high, column[finite], values[finite])
    low, high = (np.where(count > 0, bound, np.nan) for bound in (low, high))
    return Thin(middle[there], mean[there], low[there], high[there])
