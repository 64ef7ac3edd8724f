"""The alarm for what training loss alone cannot show: it still falls while the loss of held-out pairs rises."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

HELD_OUT = "eval_loss"
"""The held-out loss, as a record has it."""
RISES = 3
"""Evaluations in a row, each with a greater loss than the one before, after the one with the least."""
RISEN = 0.02
"""Share by which the last is then greater than the least; for DPO 0.014 nats at the start. The pairs are the same at
each evaluation, so that no chance of the draw is in it; but the weights swing from step to step, so that it must be
greater than such a swing as well."""
FEWEST = 8
"""Records that a mean of training losses rests on."""
SURE = 3.0
"""Standard errors by which the training loss has fallen."""


class Overfitting:
    """Held-out loss rises from evaluation to evaluation while the training loss falls.

    Takes the records of steps and of evaluations, in their order.
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._losses: list[float] = []
        self._evaluations: list[tuple[int, float, int]] = []  # step, loss, training losses before it

    def take(self, step: int, metrics: Mapping[str, Any]) -> str | None:
        """Speak after an evaluation, if the last ones all rose and the training loss surely fell meanwhile."""
        if HELD_OUT not in metrics:
            if (loss := _finite(metrics.get("loss"))) is not None:
                self._losses.append(loss)
            return None
        if (loss := _finite(metrics[HELD_OUT])) is None:
            return None
        self._evaluations.append((step, loss, len(self._losses)))
        best, *rest = self._evaluations[-1 - RISES :]
        least = min(loss for _, loss, _ in self._evaluations)
        values = [best[1], *(loss for _, loss, _ in rest)]
        rises = len(rest) == RISES and all(one < other for one, other in zip(values, values[1:], strict=False))
        enough = max(RISEN * abs(least), SURE * math.sqrt(2) * _swing([loss for _, loss, _ in self._evaluations]))
        if not rises or best[1] > least or values[-1] - least < enough:
            return None
        since = self._losses[best[2] :]
        before = self._losses[max(0, best[2] - len(since)) : best[2]]
        if not _fell(before, since):
            return None
        falls = f"{statistics.fmean(before):.4f} to {statistics.fmean(since):.4f}"
        return (
            f"eval_loss rose from {least:.4f} after step {best[0]}, which was the best, to {values[-1]:.4f}, in each of"
            f" {RISES} evaluations, while the training loss fell from {falls}: pairs are learned by heart;"
            " checkpoint.best=eval_loss exports the best step; try fewer epochs, lower optimizer.learning_rate"
        )


def _swing(values: Sequence[float]) -> float:
    """Standard deviation of a series about its course, from its second differences, which a straight course has none
    of."""
    bends = [one - 2 * two + three for one, two, three in zip(values, values[1:], values[2:], strict=False)]
    return math.sqrt(sum(bend**2 for bend in bends) / (6 * len(bends))) if bends else math.inf


def _fell(before: Sequence[float], since: Sequence[float]) -> bool:
    """Whether a mean surely is less than the one before (Welch)."""
    if min(len(before), len(since)) < FEWEST:
        return False
    error = math.sqrt(sum(statistics.variance(part) / len(part) for part in (before, since)))
    return statistics.fmean(since) + SURE * error < statistics.fmean(before)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
