"""What verdicts add up to: rates with intervals, a paired test, the rate at equal length, bias and agreement.

What of SciPy is needed is imported where it is: it takes a second, and every training run imports this module.

An outcome is the share that the first answer has in a contest: FIRST (1), TIE (0.5) or SECOND (0). Ties are half a win.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from dpo_jax.evaluation.judging import FIRST, SECOND, TIE, Verdict

Z = NormalDist().inv_cdf(0.975)
"""Standard deviations to either side of a normal distribution's mean that hold 95 % of it."""


class Rate(NamedTuple):
    """A share from 0 to 1, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


class Counts(NamedTuple):
    """How contests ended for the first answer."""

    wins: int
    ties: int
    losses: int

    @property
    def total(self) -> int:
        """All that were judged."""
        return self.wins + self.ties + self.losses


class Summary(NamedTuple):
    """What a judge's verdicts of a set of contests say.

    Attributes:
      counts: wins (both orders prefer the first answer), losses (both prefer the second), ties (all else).
      unjudged: contests without a verdict, which nothing here counts.
      win_rate: (wins + ties / 2) / contests, with Wilson's interval.
      decided: wins / (wins + losses), ties left out, with its interval.
      p_value: of the exact sign test.
      at_equal_length: the win rate that is left where both answers are of one length; None where it has no estimate.
      position_bias: share of contests in which the answer that is shown first is preferred in both orders, less the
        share in which the one shown second is: 1 for a judge that always says A, 0 for one that sees no order.
      consistency: share of contests whose two orders say the same.
      lengths: mean characters of the first answers, and of the second ones.
    """

    counts: Counts
    unjudged: int
    win_rate: Rate
    decided: Rate
    p_value: float
    at_equal_length: Rate | None
    position_bias: float
    consistency: float
    lengths: tuple[float, float]

    @property
    def numbers(self) -> dict[str, Any]:
        """As plain JSON; a number that there is none of is null."""
        counts, n, equal = self.counts, max(self.counts.total, 1), self.at_equal_length
        found = {
            "contests": counts.total,
            "unjudged": self.unjudged,
            "wins": counts.wins,
            "ties": counts.ties,
            "losses": counts.losses,
            "win_rate": self.win_rate.value,
            "win_rate_low": self.win_rate.low,
            "win_rate_high": self.win_rate.high,
            "tie_rate": counts.ties / n,
            "loss_rate": counts.losses / n,
            "decided_win_rate": self.decided.value,
            "decided_low": self.decided.low,
            "decided_high": self.decided.high,
            "p_value": self.p_value,
            "position_bias": self.position_bias,
            "consistency": self.consistency,
            "length_first": self.lengths[0],
            "length_second": self.lengths[1],
        }
        names = ("length_controlled_win_rate", "length_controlled_low", "length_controlled_high")
        found |= zip(names, equal or (None, None, None), strict=True)
        return {name: None if value is None or not math.isfinite(value) else value for name, value in found.items()}


def summary(verdicts: Sequence[Verdict], lengths: Sequence[tuple[int, int]]) -> Summary:
    """What the verdicts of contests say; `lengths` are characters of each contest's two answers."""
    pairs = [(verdict, size) for verdict, size in zip(verdicts, lengths, strict=True) if verdict.given]
    given, sizes = [verdict for verdict, _ in pairs], np.asarray([size for _, size in pairs], float).reshape(-1, 2)
    outcomes = [verdict.outcome for verdict in given]
    counts = Counts(*(outcomes.count(end) for end in (FIRST, TIE, SECOND)))
    means = sizes.mean(axis=0) if given else (math.nan, math.nan)
    return Summary(
        counts=counts,
        unjudged=len(verdicts) - len(given),
        win_rate=wilson(counts.wins + counts.ties / 2, counts.total),
        decided=wilson(counts.wins, counts.wins + counts.losses),
        p_value=sign_test(counts.wins, counts.losses),
        at_equal_length=at_equal_length(outcomes, sizes[:, 0] - sizes[:, 1]),
        position_bias=position_bias(given),
        consistency=_mean([verdict.shown == verdict.swapped for verdict in given]),
        lengths=(float(means[0]), float(means[1])),
    )


def wilson(successes: int | float, trials: int) -> Rate:
    """The share of successes, with Wilson's score interval; (nan, 0, 1) of no trials.

    Ties that count as half make the true variance less than a binomial's, so the interval is then too wide, never too
    narrow. Wilson, Journal of the American Statistical Association 22 (1927).
    """
    if not trials:
        return Rate(math.nan, 0.0, 1.0)
    share, spread = successes / trials, Z * Z / trials
    middle = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    return Rate(share, max(low, 0.0), min(high, 1.0))


def sign_test(wins: int, losses: int) -> float:
    """The chance of a difference at least as large where neither side is better: exact, two-sided, ties left out.

    The same as McNemar's exact test of two paired yes-or-no answers, of which these are the discordant ones.
    """
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def exact_test(one: tuple[int, int], other: tuple[int, int]) -> float:
    """The chance of shares at least as different in two separate groups where both are alike: Fisher's exact test,
    two-sided. A group is how many of it are counted, and how many are not.

    >>> round(exact_test((3, 1), (1, 3)), 3), exact_test((0, 0), (2, 3))
    (0.486, 1.0)
    """
    from scipy.stats import fisher_exact

    if not sum(one) or not sum(other):
        return 1.0
    _, chance = np.asarray(fisher_exact([one, other]), float)
    return float(chance)


def at_equal_length(outcomes: Sequence[float] | np.ndarray, differences: Float[np.ndarray, " N"]) -> Rate | None:
    """The win rate that is left at equal length, with a 95 % interval (Wald's, on the scale of log-odds).

    Fitted by maximum likelihood, a tie being half a win: `log-odds of winning = a + b tanh(difference / s)`, where s is
    the standard deviation of the differences in length. The answer is S(a). This is the length term of AlpacaEval 2's
    length-controlled win rate (Dubois et al., arXiv:2404.04475); their term for the difficulty of an instruction needs
    many models.

    All won gives 1, and all lost 0, with nan for an interval. None: there are no contests, or length alone tells those
    that were won from those that were lost, or all differ by the same length, so that nothing can be estimated.
    """
    ends = np.asarray(outcomes, float)
    if not len(ends):
        return None
    if (ends == ends[0]).all() and ends[0] in (FIRST, SECOND):
        return Rate(float(ends[0]), math.nan, math.nan)
    if not differences.any():
        return _at_zero(np.ones((len(ends), 1)), ends)
    x = np.tanh(differences / differences.std()) if np.ptp(differences) else np.zeros(len(ends))
    return None if _separated(ends, x) else _at_zero(np.stack([np.ones_like(x), x], axis=1), ends)


def _at_zero(columns: np.ndarray, ends: np.ndarray) -> Rate:
    """The fitted win rate where all columns but the first are 0."""
    from scipy.optimize import minimize
    from scipy.special import expit

    fit = minimize(_loss, np.zeros(columns.shape[1]), (columns, ends), "trust-exact", _slope, _curvature, tol=1e-6)
    found = np.asarray(fit.x)
    for _ in range(3):  # from there, each of Newton's steps squares what is left
        found = found - np.linalg.solve(_curvature(found, columns, ends), _slope(found, columns, ends))
    error = math.sqrt(np.linalg.inv(_curvature(found, columns, ends))[0, 0])
    return Rate(*(float(expit(found[0] + step * error)) for step in (0, -Z, Z)))


def _loss(parameters: np.ndarray, columns: np.ndarray, ends: np.ndarray) -> float:
    odds = columns @ parameters
    return float((np.logaddexp(0, odds) - ends * odds).sum())


def _slope(parameters: np.ndarray, columns: np.ndarray, ends: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    return columns.T @ (expit(columns @ parameters) - ends)


def _curvature(parameters: np.ndarray, columns: np.ndarray, ends: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    share = expit(columns @ parameters)
    return (columns.T * (share * (1 - share))) @ columns


def _separated(ends: np.ndarray, x: np.ndarray) -> bool:
    """Whether a threshold on x tells what was won, in part or whole, from what was lost: no finite fit is best then."""
    won, lost = x[ends > SECOND], x[ends < FIRST]
    return not np.ptp(x) or bool(won.min() >= lost.max() or lost.min() >= won.max())


def position_bias(verdicts: Sequence[Verdict]) -> float:
    """Share of contests in which the answer shown first wins in both orders, less that of the one shown second."""
    return _mean([_place(verdict) for verdict in verdicts])


def _place(verdict: Verdict) -> int:
    """1 where what is shown first is preferred in both orders, -1 where what is shown second is, and else 0."""
    return {(FIRST, SECOND): 1, (SECOND, FIRST): -1}.get((verdict.shown, verdict.swapped), 0)


class Agreement(NamedTuple):
    """Of two judges on the contests that both judged: how many, the share with one outcome, and Cohen's kappa."""

    contests: int
    share: float
    kappa: float

    @property
    def numbers(self) -> dict[str, Any]:
        """As plain JSON; a number that there is none of is null."""
        return {name: value if math.isfinite(value) else None for name, value in self._asdict().items()}


def agreement(one: Sequence[Verdict], other: Sequence[Verdict]) -> Agreement:
    """How far two judges agree on the same contests: win, tie or loss.

    Kappa is the share of agreement beyond what their own rates would give by chance, of what is beyond it at most
    (Cohen, Educational and Psychological Measurement 20, 1960); nan where chance alone makes them agree.
    """
    both = [(a.outcome, b.outcome) for a, b in zip(one, other, strict=True) if a.given and b.given]
    if not both:
        return Agreement(0, math.nan, math.nan)
    share = _mean([a == b for a, b in both])
    rates = [[_mean([pair[side] == end for pair in both]) for end in (FIRST, TIE, SECOND)] for side in (0, 1)]
    chance = math.fsum(a * b for a, b in zip(*rates, strict=True))
    return Agreement(len(both), share, (share - chance) / (1 - chance) if chance < 1 else math.nan)


def _mean(values: Sequence[int | float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
