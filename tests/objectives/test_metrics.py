"""Metrics are of all pairs of a step at once; padding counts for nothing; names mean what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.objectives.metrics import Mean, means, merge, quantile, seen_rewards
from dpo_jax.objectives.mixture import START, Progress, beta_of, labels_of, outcomes, start_constant
from dpo_jax.objectives.pairs import Pairs
from dpo_jax.objectives.terms import make_terms
from dpo_jax.preference.loss import measure

SIGMOID = make_terms([{"name": "sigmoid", "beta": 0.2}])


def some_pairs(count, seed=0, **changes):
    sums = (jax.random.normal(key, (count,)) * 3 for key in jax.random.split(jax.random.key(seed), 4))
    ones = jnp.ones((count,))
    lengths = jnp.arange(count, dtype=jnp.float32) + 2, 5 * ones
    pairs = Pairs(*sums, *lengths, margin=0 * ones, label=ones, weight=ones, real=jnp.ones(count, bool))
    return pairs._replace(**changes)


def metrics_of(pairs, terms=SIGMOID, moment=START):
    return {name: float(value) for name, value in measure(terms, pairs, moment)[1].items()}


@pytest.mark.parametrize(
    "blocks",
    [
        [{"name": "sigmoid"}],
        [{"name": "simpo"}],
        [{"name": "kto"}],
        [{"name": "reward"}],
        [{"name": "sft"}],
        [{"name": "aot"}, {"name": "ipo", "weight": 0.5}],
    ],
    ids=lambda blocks: blocks[0]["name"],
)
def test_padding_counts_for_nothing_even_when_it_is_nan(blocks):
    terms = make_terms(blocks)
    pairs = some_pairs(5, label=jnp.asarray([1.0, 0.0, 1.0, 0.0, 1.0]))
    real = jnp.asarray([True, True, False, True, True])
    spoiled = jax.tree.map(lambda x: x.at[2].set(jnp.nan) if x.dtype == jnp.float32 else x, pairs)._replace(real=real)
    kept = jax.tree.map(lambda x: x[real], pairs)
    for name, value in metrics_of(spoiled, terms).items():
        np.testing.assert_allclose(value, metrics_of(kept, terms)[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "simpo", "kto", "reward", "sft"])
def test_rewards_one_by_one_have_the_means_that_are_reported(name):
    terms = make_terms([{"name": name}])
    pairs = some_pairs(7, label=jnp.asarray([1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0]))
    found, reported = seen_rewards(terms, pairs, START), metrics_of(pairs, terms)
    if found is None:
        assert not any(metric.startswith("rewards/") for metric in reported)
        return
    for side, values in zip(("chosen", "rejected"), found, strict=True):
        assert values.shape == (7,)
        np.testing.assert_allclose(np.nanmean(values), reported[f"rewards/{side}"], rtol=1e-5, atol=1e-6)
    if name != "kto":
        np.testing.assert_allclose(np.mean(found[0] > found[1]), reported["rewards/accuracies"], rtol=1e-6)


def test_quantiles_are_numpys_over_the_real_pairs():
    values, real = jnp.asarray([3.0, -1.0, 7.0, 99.0, 2.0]), jnp.asarray([True, True, True, False, True])
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        expected = np.quantile(np.asarray([3.0, -1.0, 7.0, 2.0]), share)
        np.testing.assert_allclose(quantile(values, real, share), expected, rtol=1e-6)
    pairs = some_pairs(40)
    margins = 0.2 * np.asarray(
        pairs.policy_chosen - pairs.reference_chosen - pairs.policy_rejected + pairs.reference_rejected
    )
    np.testing.assert_allclose(metrics_of(pairs)["rewards/margins_p90"], np.quantile(margins, 0.9), rtol=1e-5)


def test_equal_rewards_are_not_accurate():
    same = some_pairs(1)
    same = same._replace(**{name: jnp.asarray([-1.0]) for name in same._fields[:4]})
    found = metrics_of(same)
    assert found["rewards/accuracies"] == 0 and found["gradient_weight"] == 0.5 and found["drift/chosen"] == 0


def test_kl_is_zero_at_the_reference_and_positive_elsewhere():
    pairs = some_pairs(5)
    at_home = pairs._replace(reference_chosen=pairs.policy_chosen, reference_rejected=pairs.policy_rejected)
    assert metrics_of(pairs)["kl"] > 0 and metrics_of(at_home)["kl"] == 0


def test_the_gradient_weight_is_what_the_gradient_of_dpo_is_multiplied_by():
    pairs = some_pairs(6)
    slope = jax.grad(lambda chosen: measure(SIGMOID, pairs._replace(policy_chosen=chosen), START)[0])
    weight = -slope(pairs.policy_chosen).sum() / 0.2  # d loss / d logp = -beta S(-h) / P
    np.testing.assert_allclose(metrics_of(pairs)["gradient_weight"], weight, rtol=1e-5)


def test_a_mixture_tells_each_of_its_losses_and_their_sum():
    terms = make_terms([{"name": "sigmoid"}, {"name": "sft", "weight": 0.3}, {"name": "sigmoid", "beta": 0.5}])
    pairs = some_pairs(7)
    loss, found, _ = measure(terms, pairs, START)
    assert labels_of(terms) == ["sigmoid", "sft", "sigmoid_2"]
    parts = found["objective/sigmoid"] + 0.3 * found["objective/sft"] + found["objective/sigmoid_2"]
    np.testing.assert_allclose(loss, parts, rtol=1e-6)
    np.testing.assert_allclose(
        found["objective/sft"], -pairs.policy_chosen.sum() / pairs.chosen_length.sum(), rtol=1e-6
    )


def test_what_has_no_reference_says_nothing_of_it():
    silent = {"kl", "drift/chosen", "drift/rejected", "gradient_weight"}
    for blocks in ([{"name": "simpo"}], [{"name": "cpo"}], [{"name": "sft"}], [{"name": "reward"}]):
        assert not silent & set(metrics_of(some_pairs(3), make_terms(blocks)))
    assert silent <= set(metrics_of(some_pairs(3)))


def test_single_completions_are_counted_by_what_they_are():
    terms = make_terms([{"name": "kto", "beta": 0.5}])
    pairs = some_pairs(4, label=jnp.asarray([1.0, 1.0, 0.0, 1.0]))
    found = metrics_of(pairs, terms)
    u = np.asarray(pairs.policy_chosen - pairs.reference_chosen)
    np.testing.assert_allclose(found["rewards/chosen"], 0.5 * u[[0, 1, 3]].mean(), rtol=1e-5)
    np.testing.assert_allclose(found["rewards/rejected"], 0.5 * u[2], rtol=1e-5)
    baseline = max(float((pairs.policy_rejected - pairs.reference_rejected).mean()), 0.0)
    np.testing.assert_allclose(found["objective/kto_baseline"], baseline, rtol=1e-5)


def test_beta_goes_where_it_is_sent():
    (linear,) = make_terms([{"name": "sigmoid", "beta": 0.1, "beta_end": 0.5}])
    (cosine,) = make_terms([{"name": "ipo", "beta": 0.1, "beta_end": 0.5, "beta_schedule": "cosine"}])
    np.testing.assert_allclose([beta_of(linear, p) for p in (0, 0.25, 1, 2)], [0.1, 0.2, 0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose([beta_of(cosine, p) for p in (0, 0.5, 1)], [0.1, 0.3, 0.5], rtol=1e-6)
    assert metrics_of(some_pairs(3), (linear,), Progress(0.5))["beta"] == pytest.approx(0.3)


def test_the_constant_of_a_mixture_is_the_sum_of_its_parts_if_all_have_one():
    assert start_constant(make_terms([{"name": "mpo"}])) is None
    both = make_terms([{"name": "sigmoid"}, {"name": "ipo", "weight": 0.5, "beta": 0.5}])
    assert start_constant(both) == pytest.approx(np.log(2) + 0.5)


def test_merged_means_are_the_whole():
    parts = [
        {"entropy": Mean(jnp.asarray(2.0), jnp.asarray(3.0))},
        {"entropy": Mean(jnp.asarray(4.0), jnp.asarray(1.0))},
    ]
    assert float(means(merge(*parts))["entropy"]) == 1.5


def test_a_pair_counts_by_its_weight_in_the_sum_and_not_in_the_number():
    pairs = some_pairs(4)
    each = outcomes(SIGMOID, pairs)[0].losses
    weight = jnp.asarray([2.0, 0.0, 1.0, 0.5])
    loss, _, _ = measure(SIGMOID, pairs._replace(weight=weight), START)
    np.testing.assert_allclose(loss, (weight * each).sum() / 4, rtol=1e-6)


@pytest.mark.parametrize("weighting", ["wpo", "wpo_clamped"])
def test_wpo_weighs_a_pair_by_how_likely_the_policy_is_to_say_it(weighting):
    pairs = some_pairs(3, alignment=(jnp.asarray([-0.5, 0.2, 0.4]), jnp.asarray([-0.3, 0.1, -0.6])))
    weights = np.exp([-0.8, 0.3, -0.2])
    if weighting == "wpo_clamped":
        weights = np.minimum(weights, 1)
    (plain,), (weighed,) = (outcomes(make_terms([block]), pairs) for block in ({}, {"weighting": weighting}))
    np.testing.assert_allclose(weighed.losses, weights * plain.losses, rtol=1e-6)


def test_a_term_without_reference_sees_none_beside_one_that_has():
    terms = make_terms([{"name": "sigmoid"}, {"name": "sigmoid", "reference_free": True}, {"name": "simpo"}])
    pairs = some_pairs(4)
    moved = pairs._replace(reference_chosen=pairs.reference_chosen + 3.0)
    changed = [
        bool((a.losses != b.losses).any()) for a, b in zip(outcomes(terms, pairs), outcomes(terms, moved), strict=True)
    ]
    assert changed == [True, False, False]
