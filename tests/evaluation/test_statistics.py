"""What verdicts add up to: held against scipy and statsmodels, and against judges whose faults are known."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpo_jax.evaluation.judging import FIRST, SECOND, TIE, UNJUDGED, Verdict
from dpo_jax.evaluation.statistics import (
    agreement,
    at_equal_length,
    position_bias,
    sign_test,
    summary,
    wilson,
)

EQUAL = dict(rel=1e-9, abs=1e-9)
"""What the issue asks for; both sides compute in float64."""
ENDS = (FIRST, TIE, SECOND)
outcomes = st.lists(st.sampled_from(ENDS), min_size=1, max_size=60)
proportion = pytest.importorskip("statsmodels.stats.proportion")


def sure(end):
    """A verdict in which both orders say the same."""
    return Verdict(end, end)


def drawn(seed, n=120):
    """Outcomes that depend on length, and the differences in length."""
    rng = np.random.default_rng(seed)
    differences = rng.normal(20, 80, n).round()
    won = rng.random(n) < 1 / (1 + np.exp(-(0.4 + 0.9 * np.tanh(differences / 80))))
    return np.where(rng.random(n) < 0.15, TIE, won.astype(float)), differences


# ---------------------------------------------------------------------------------------------- rates and tests


@given(st.integers(1, 500), st.data())
def test_wilsons_interval_is_scipys_and_statsmodels(trials, data):
    wins = data.draw(st.integers(0, trials))
    found, theirs = wilson(wins, trials), stats.binomtest(wins, trials).proportion_ci(method="wilson")
    assert found == pytest.approx((wins / trials, theirs.low, theirs.high), **EQUAL)
    half = wins / 2
    low, high = proportion.proportion_confint(half, trials, method="wilson")
    assert wilson(half, trials) == pytest.approx((half / trials, low, high), **EQUAL)


@given(st.integers(0, 200), st.integers(0, 200))
def test_the_paired_test_is_mcnemars_exact_one(wins, losses):
    from statsmodels.stats.contingency_tables import mcnemar

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # statsmodels divides by zero where nothing is discordant
        theirs = mcnemar([[7, wins], [losses, 11]], exact=True).pvalue if wins + losses else 1.0
    assert sign_test(wins, losses) == pytest.approx(theirs, **EQUAL)


@pytest.mark.parametrize("seed", range(6))
def test_the_rate_at_equal_length_is_statsmodels_logistic_fit(seed):
    import statsmodels.api as sm

    ends, differences = drawn(seed)
    columns = sm.add_constant(np.tanh(differences / differences.std()))
    fit = sm.GLM(ends, columns, family=sm.families.Binomial()).fit(tol=1e-14, maxiter=200)
    error = np.sqrt(fit.cov_params()[0, 0])
    middle = fit.params[0] + np.asarray([0, -1, 1]) * stats.norm.ppf(0.975) * error
    assert at_equal_length(ends, differences) == pytest.approx(1 / (1 + np.exp(-middle)), **EQUAL)


def test_a_preference_for_length_is_taken_out():
    """Two equal models, of which one writes longer, before a judge that likes what is long."""
    rng = np.random.default_rng(0)
    differences = rng.normal(60, 80, 4000)
    ends = (rng.random(4000) < 1 / (1 + np.exp(-2 * np.tanh(differences / 80)))).astype(float)
    rate = at_equal_length(ends, differences)
    assert ends.mean() > 0.65 and rate.low < 0.5 < rate.high and rate.high - rate.low < 0.1


@settings(max_examples=200)
@given(outcomes, st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_there_is_an_estimate_exactly_where_the_fit_is_finite(ends, seed, kinds):
    """There is none where length alone tells what was won from what was lost, with ties on both sides."""
    differences = np.random.default_rng(seed).integers(-kinds, kinds + 1, len(ends)).astype(float)
    rate = at_equal_length(ends, differences)
    if rate is None:
        won, lost = ([d for d, end in zip(differences, ends, strict=True) if end != no] for no in (SECOND, FIRST))
        constant = len(set(differences)) == 1 and differences[0] != 0
        assert constant or min(won) >= max(lost) or min(lost) >= max(won)
    elif set(ends) in ({FIRST}, {SECOND}):
        assert rate.value == ends[0] and math.isnan(rate.low)
    else:
        assert 0 <= rate.low <= rate.value <= rate.high <= 1


def test_swapping_the_answers_swaps_all():
    ends, differences = drawn(3)
    rate, swapped = at_equal_length(ends, differences), at_equal_length(1 - ends, -differences)
    assert swapped == pytest.approx((1 - rate.value, 1 - rate.high, 1 - rate.low), **EQUAL)


# ---------------------------------------------------------------------------------------------- judges


@given(outcomes, outcomes)
def test_kappa_is_statsmodels(one, other):
    from statsmodels.stats.inter_rater import cohens_kappa

    pairs = list(zip(one, other, strict=False))
    table = np.asarray([[sum(pair == (a, b) for pair in pairs) for b in ENDS] for a in ENDS])
    found = agreement([sure(a) for a, _ in pairs], [sure(b) for _, b in pairs])
    assert found.share == pytest.approx(np.trace(table) / len(pairs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # 0 / 0 where both always say the same
        theirs = cohens_kappa(table, return_results=False)
    assert found.kappa == pytest.approx(theirs, nan_ok=True, **EQUAL)


def test_a_judge_that_always_says_a():
    """It prefers the first answer in one order, and the second in the other."""
    said = summary([Verdict(FIRST, SECOND)] * 50, [(10, 12)] * 50)
    assert said.win_rate.value == 0.5 and said.position_bias == 1.0 and said.consistency == 0.0
    assert said.counts == (0, 50, 0) and said.p_value == 1.0
    assert position_bias([Verdict(SECOND, FIRST)] * 3) == -1.0
    assert position_bias([sure(FIRST), sure(SECOND), Verdict(TIE, FIRST)]) == 0.0


def test_what_was_not_judged_is_no_tie():
    said = summary([sure(FIRST), Verdict(UNJUDGED, FIRST), sure(FIRST), sure(SECOND)], [(1, 2)] * 4)
    assert said.unjudged == 1 and said.counts.total == 3 and said.win_rate.value == pytest.approx(2 / 3)
    assert agreement([sure(FIRST), Verdict(UNJUDGED, FIRST)], [sure(FIRST)] * 2).contests == 1


def test_no_contest_is_no_number():
    said = summary([], []).numbers
    assert (
        said["win_rate"] is None and said["contests"] == 0 and (said["win_rate_low"], said["win_rate_high"]) == (0, 1)
    )


@given(outcomes)
def test_a_summary_counts_each_contest_once(ends):
    said = summary([sure(end) for end in ends], [(3, 3)] * len(ends))
    assert said.counts == tuple(ends.count(end) for end in ENDS) and said.position_bias == 0 and said.consistency == 1
    assert said.win_rate.value == pytest.approx(sum(ends) / len(ends))
    if said.at_equal_length is not None:  # all are of equal length
        assert said.at_equal_length.value == pytest.approx(said.win_rate.value)
