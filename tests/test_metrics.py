"""Metrics are sums and counts: merging parts is measuring the whole."""

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.losses import Pairs
from dpo_jax.metrics import means, merge, preference_metrics


def some_pairs(count, seed=0):
    return Pairs(
        *(jax.random.normal(key, (count,)) * 3 for key in jax.random.split(jax.random.key(seed), 4)),
        *[jnp.full((count,), 5.0)] * 2,
        jnp.zeros((count,)),
    )


def test_merged_parts_are_the_whole():
    pairs, real = some_pairs(7), jnp.ones(7, bool)
    whole = means(preference_metrics(pairs, real, 0.2))
    head, tail = (jax.tree.map(lambda x, part=part: x[part], pairs) for part in (slice(0, 2), slice(2, 7)))
    parts = merge(preference_metrics(head, real[:2], 0.2), preference_metrics(tail, real[2:], 0.2))
    for name, value in means(parts).items():
        np.testing.assert_allclose(value, whole[name], rtol=1e-5, err_msg=name)


def test_padding_counts_for_nothing_even_when_it_is_nan():
    pairs, real = some_pairs(4), jnp.asarray([True, True, True, False])
    spoiled = jax.tree.map(lambda x: x.at[3].set(jnp.nan), pairs)
    for name, value in means(preference_metrics(spoiled, real, 0.1)).items():
        kept = jax.tree.map(lambda x: x[:3], pairs)
        np.testing.assert_allclose(value, means(preference_metrics(kept, real[:3], 0.1))[name], rtol=1e-5, err_msg=name)


def test_equal_rewards_are_not_accurate():
    same = Pairs(*[jnp.asarray([-1.0])] * 7)
    assert means(preference_metrics(same, jnp.ones(1, bool), 0.1))["rewards/accuracies"] == 0


def test_kl_is_zero_at_the_reference_and_positive_elsewhere():
    values = means(preference_metrics(some_pairs(5), jnp.ones(5, bool), 0.1))
    at_home = some_pairs(5)._replace(
        reference_chosen=some_pairs(5).policy_chosen, reference_rejected=some_pairs(5).policy_rejected
    )
    assert values["kl"] > 0 and means(preference_metrics(at_home, jnp.ones(5, bool), 0.1))["kl"] == 0
