"""Alarms for a policy that is ruined: it is nothing like its reference any more, or nothing in it can be learned now.

What grows or falls is watched in health.py; here is what stays, once it has happened in a few steps.
"""

import collections
import math
import statistics
from collections.abc import Mapping
from typing import Any

IN_A_ROW = 8
"""Records, each of which must show it. One batch may have any divergence."""
FAR = 30.0
"""How many times `alarms.kl` is far. At 30 nats a token of the data's answers is exp(3.5), 33 times less likely than to
the reference; a policy that a rate of 1e3 had made to answer at random, from a vocabulary of 768, was at 520 to 590."""


class Ruined:
    """The divergence from the reference is far above its bound in each record, whether it grows or not."""

    def __init__(self, bound: float, *, starts_at_reference: bool):
        """Start watching; the bound is in nats per token. A policy that does not start at its reference is held against
        its own first record too."""
        self._bound, self._first = bound, 0.0 if starts_at_reference else None
        self._last: collections.deque[float] = collections.deque(maxlen=IN_A_ROW)
        self._rate = 0.0

    def take(self, step: int, metrics: Mapping[str, Any]) -> str | None:
        """Speak after the last of so many records.

        The estimate overflows in float32 where an answer's tokens have lost 89 nats each; it is not finite then, though
        the loss is, and counts as large.
        """
        self._rate = max(self._rate, _finite(metrics.get("learning_rate")) or 0.0)
        if "kl" not in metrics or _finite(metrics.get("loss")) is None:
            return None
        value = _finite(metrics["kl"])
        value = math.inf if value is None else value
        self._first = value if self._first is None else self._first
        self._last.append(value)
        if len(self._last) < IN_A_ROW or min(self._last) <= FAR * max(self._bound, self._first):
            return None
        now = statistics.median_low(self._last)
        rate = float(f"{self._rate / 10:.1g}")
        seen = f"{now:.3g} nats per token" if math.isfinite(now) else "too large for float32"
        return (
            f"kl is {seen} in the median of {IN_A_ROW} records (alarms.kl is {self._bound:g}): the policy has left the"
            f" reference altogether; train from the start with optimizer.learning_rate={rate:g} or less"
        )


class Still:
    """The gradient is exactly 0 though the loss is not, and weights could move."""

    def __init__(self):
        """Start watching."""
        self._count, self._since = 0, 0

    def take(self, step: int, metrics: Mapping[str, Any]) -> str | None:
        """Speak after the last of so many records.

        Passed over is what may be so in health: a learning rate of 0, and a loss that has reached 0 (a hinge, or pairs
        told apart so far that nothing is left in float32).
        """
        norm, loss, rate = (_finite(metrics.get(name)) for name in ("grad_norm", "loss", "learning_rate"))
        if norm is None or loss is None or rate == 0 or (norm == 0 and abs(loss) == 0):
            return None
        if norm > 0:
            self._count = 0
            return None
        self._since = self._since if self._count else step
        self._count += 1
        if self._count < IN_A_ROW:
            return None
        return (
            f"grad_norm is exactly 0 since step {self._since}, the loss {loss:.4g}: nothing more is learned; weights"
            " may be so large that outputs no longer vary; lower optimizer.learning_rate and train from the start"
        )


def _finite(value: float | None) -> float | None:
    """A metric, if it is there and finite."""
    return float(value) if value is not None and math.isfinite(value) else None
