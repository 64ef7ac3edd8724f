"""The small experiment's parts: its world, its estimates and PPO's arithmetic against loops and exact sums."""

import itertools
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.hf.configs import read_spec
from dpo_jax.model.decoder import Model, init_params, logits
from tools import frontier
from tools.fronts import figure, measure, ppo, world
from tools.fronts.measure import Sample, Texts


@pytest.fixture(scope="module")
def two_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blank")
    world.write_blank_model(folder, width=32, layers=1)
    spec = read_spec(folder)
    return [Model(spec, init_params(spec, jax.random.key(seed))) for seed in (0, 1)]


def test_the_reward_is_a_rule_over_words():
    assert world.reward("the film was great . i loved the plot .") == 1.0
    assert world.reward("a dull film , a dull plot . what a great cast !") == -0.5
    assert world.reward("") == world.reward("the film was long .") == 0.0


def test_labels_are_drawn_by_bradley_terry():
    rng, better, worse = random.Random(0), " a great film", " a dull film"
    drawn = [world.preferred((better, worse), rng)[0] == better for _ in range(4000)]
    assert abs(np.mean(drawn) - 1 / (1 + math.exp(-1.0))) < 4 * 0.5 / 4000**0.5  # four standard errors


def test_every_word_of_the_world_is_a_token_of_its_own():
    made, rng = world.tokenizer(), random.Random(0)
    for _ in range(200):
        for text in world.review(rng):
            found = made.encode(text)
            assert found.tokens == text.split() and made.token_to_id(world.PAD) not in found.ids


def test_nothing_that_is_measured_on_is_trained_on():
    held_out = set(frontier.held_out_prompts(frontier.SMALL))
    assert len(held_out) == frontier.SMALL.held_out
    assert not held_out & set(frontier.training_prompts(frontier.SMALL, 0))


def test_the_divergence_is_that_of_whole_answers(two_models):
    """Answers of two tokens of a vocabulary that is cut to eight: the mean of the estimate over all of them, each with
    its chance, is the divergence itself."""
    ours, theirs = two_models
    prompt = [3, 4, 5]
    scores = [np.asarray(logits(m.spec, m.params, jnp.asarray([prompt])))[0, -1] for m in (ours, theirs)]
    first = [np.exp(np.float64(s) - np.logaddexp.reduce(np.float64(s))) for s in scores]
    second = [
        np.asarray(logits(m.spec, m.params, jnp.asarray([[*prompt, token] for token in range(ours.spec.vocab_size)])))
        for m in (ours, theirs)
    ]
    second = [
        np.exp(np.float64(s[:, -1]) - np.logaddexp.reduce(np.float64(s[:, -1]), -1, keepdims=True)) for s in second
    ]
    joint = [f[:, None] * s for f, s in zip(first, second, strict=True)]
    exact = (joint[0] * np.log(joint[0] / joint[1])).sum()
    every = [Sample(prompt, [token, 0], "") for token in range(ours.spec.vocab_size)]
    estimate = np.asarray(measure.divergences(ours, theirs, every))
    np.testing.assert_allclose((first[0] * estimate).sum(), exact, rtol=1e-4)  # float32 logits
    assert measure.divergences(ours, ours, every) == [0.0] * len(every)


def test_advantages_are_gae_as_a_loop_has_it(two_models):
    ours, theirs = two_models
    rng = np.random.default_rng(0)
    found = [Sample([3, 4], rng.integers(3, 40, size=length).tolist(), "") for length in (1, 5, 9)]
    texts, weights = (
        Texts.of(found, rows=4),
        {"policy": ours.params, "value": jnp.asarray(rng.normal(size=32), jnp.float32)},
    )
    scores, kl = jnp.asarray([1.0, -2.0, 0.5, 9.0]), 0.3
    rollout = ppo.roll(ours.spec, weights, theirs.params, texts, scores, jnp.float32(kl))
    logps, values = (np.float64(x) for x in ppo._outputs(ours.spec, weights, jnp.asarray(texts.tokens)))
    before = np.float64(ppo._outputs(ours.spec, {**weights, "policy": theirs.params}, jnp.asarray(texts.tokens))[0])
    wanted, returns = [], []
    for row, sample in enumerate(found):
        places = range(1, 1 + len(sample.written))  # place t predicts the token at t + 1
        rewards = [-kl * (logps[row, t] - before[row, t]) for t in places]
        rewards[-1] += float(scores[row])
        carry, mine = 0.0, []
        for t, reward in reversed(list(zip(places, rewards, strict=True))):
            after = values[row, t + 1] if t + 1 in places else 0.0
            carry = reward + after - values[row, t] + ppo.LAMBDA * carry
            mine.append(carry)
        wanted += mine[::-1]
        returns += [a + values[row, t] for a, t in zip(mine[::-1], places, strict=True)]
    real = texts.answered[:, 1:]
    flat = np.asarray(wanted)
    np.testing.assert_allclose(np.asarray(rollout.returns)[real], returns, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        np.asarray(rollout.advantages)[real], (flat - flat.mean()) / flat.std(), rtol=1e-3, atol=1e-3
    )


@pytest.mark.nightly
def test_an_update_makes_better_answers_likelier_and_worse_ones_less(two_models):
    ours, _ = two_models
    state, optimizer = ppo.start(ours, 1e-3)
    found = [Sample([3, 4], [10, 11], ""), Sample([3, 4], [12, 13], "")]
    texts = Texts.of(found, rows=2)
    rollout = ppo.roll(ours.spec, state.weights, ours.params, texts, jnp.asarray([1.0, -1.0]), jnp.float32(0.0))
    with jax.numpy_dtype_promotion("standard"):  # optax counts its steps in int32
        after = ppo.update(ours.spec, optimizer, state, rollout)
    logps = [np.asarray(ppo._outputs(ours.spec, each.weights, jnp.asarray(texts.tokens))[0]) for each in (state, after)]
    change = np.where(texts.answered[:, 1:], logps[1] - logps[0], 0).sum(1)
    assert change[0] > 0 > change[1]


def test_best_of_n_by_a_perfect_judge_is_the_mean_of_the_best():
    worth = np.random.default_rng(0).normal(size=(8, 5))
    exact = worth.reshape(2, 4, 5).max(1).mean()
    found = frontier.best(worth, worth, 4)
    assert found["reward"] == pytest.approx(exact) and found["kl"] == pytest.approx(math.log(4) - 0.75)
    blind = frontier.best(np.zeros_like(worth), worth, 4)
    assert blind["reward"] == pytest.approx(worth[[0, 4]].mean())


def test_an_envelope_is_the_best_that_a_divergence_buys():
    kls, rewards = figure.envelope([(3, 1.0), (1, 0.5), (2, 0.2), (4, 0.9)], (0.0, 0.0))
    assert kls.tolist() == [0, 1, 3, 4] and rewards.tolist() == [0, 0.5, 1.0, 1.0]
    kls, rewards = figure.envelope([(2, -1.0)], (0.0, 0.0))  # what only loses reward has it for nothing
    assert kls.tolist() == [0, 2] and rewards.tolist() == [0, 0]


def test_methods_are_compared_where_both_reach_and_seed_by_seed():
    rows = [{"method": "SFT", "seed": seed, "kl": 0.0, "reward": 0.1 * seed} for seed in range(3)]
    for seed, (kl, lift) in itertools.product(range(3), [(1.0, 1.0), (4.0, 2.0)]):
        rows.append({"method": "DPO", "seed": seed, "kl": kl, "reward": 0.1 * seed + lift + 0.01 * seed})
        rows.append({"method": "X", "seed": seed, "kl": kl / 2, "reward": 0.1 * seed + lift / 4})
    compared = figure.compare(figure.curves(rows), "DPO", "X")
    assert max(compared.grid) == 2.0 and min(compared.grid) == pytest.approx(0.2)
    assert compared.apart == 1.0 and all(one.mean > 0.05 for one in compared.differences)
    assert figure.interval([1.0, 2.0, 3.0]).half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert figure.interval([1.0]).half == math.inf
