"""Laws that objectives and their modifiers obey."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.objectives import pairwise as losses
from dpo_jax.objectives import stepwise as group_losses
from dpo_jax.objectives.pairs import Sums, make_pairs
from dpo_jax.objectives.table import OBJECTIVES
from tests.support import formulas
from tests.support.formulas import PAIR_FIELDS
from tests.support.steps import (
    DIVERGENCES,
    PAIRS,
    UNIT,
    WIDTH,
    as_pairs,
    evaluate,
    exact,
    formula,
    losses_of,
    numbers,
    random_step,
)

# --------------------------------------------------------------------------------------------------------------- laws


def test_two_ranked_completions_are_dpo():
    step = random_step("plackett_luce") | {"label": np.ones(PAIRS, np.float32), "margin": np.zeros(PAIRS, np.float32)}
    nobody = np.full((PAIRS, 3), -1)
    for rank, best in (([0, 1], 0), ([3, 1], 1)):
        step["ranking_rank"] = np.concatenate([np.tile(rank, (PAIRS, 1)), nobody], axis=1).astype(np.int32)
        of = {
            f"{model}_{place}": step[f"ranking_{model}"][:, column]
            for model in ("policy", "reference")
            for place, column in (("chosen", best), ("rejected", 1 - best))
        }
        ranked, ranked_gradient = evaluate("plackett_luce", step, beta=0.5)
        pair = {key: value for key, value in step.items() if not key.startswith("ranking")} | of
        plain, gradient = evaluate("sigmoid", pair, beta=0.5)
        np.testing.assert_allclose(ranked.losses, plain.losses, rtol=2e-6, atol=1e-7)
        np.testing.assert_allclose(
            ranked_gradient["ranking_policy"][:, best], gradient["policy_chosen"], rtol=1e-5, atol=1e-7
        )
        bare, bare_gradient = evaluate("plackett_luce", pair, beta=0.5)  # without a ranking the pair is one
        np.testing.assert_allclose(bare.losses, plain.losses, rtol=2e-6, atol=1e-7)
        np.testing.assert_allclose(bare_gradient["policy_rejected"], gradient["policy_rejected"], rtol=1e-5, atol=1e-7)


def test_equals_never_compete_with_each_other():
    step = random_step("plackett_luce")
    step["ranking_rank"] = np.zeros((PAIRS, WIDTH), np.int32)
    found, gradients = evaluate("plackett_luce", step)
    assert not found.losses.any() and not gradients["ranking_policy"].any()


def test_a_label_is_the_chance_of_this_order():
    step = random_step("sigmoid") | {"margin": np.zeros(PAIRS, np.float32)}
    turned = step | {key: step[key.replace("chosen", "x").replace("rejected", "chosen").replace("x", "rejected")]
                     for key in PAIR_FIELDS}  # fmt: skip
    label, sure = step["label"], {"label": np.ones(PAIRS, np.float32)}
    mixture = label * losses_of("sigmoid", step | sure) + (1 - label) * losses_of("sigmoid", turned | sure)
    np.testing.assert_allclose(losses_of("sigmoid", step), mixture, rtol=1e-6)


@pytest.mark.parametrize("name", ["sigmoid", "rdpo", "simpo", "reward"])
def test_smoothing_is_a_label_that_is_sometimes_wrong(name):
    step = random_step(name) | {"label": np.full(PAIRS, 0.8, np.float32)}
    smoothed = evaluate(name, step, label_smoothing=0.1)[0].losses
    step["label"] = np.full(PAIRS, 0.8 * 0.9 + 0.2 * 0.1, np.float32)
    np.testing.assert_allclose(smoothed, losses_of(name, step), rtol=1e-6)


def test_robust_without_noise_is_dpo_and_is_unbiased_with_it():
    step = random_step("robust") | {"label": np.ones(PAIRS, np.float32), "margin": np.zeros(PAIRS, np.float32)}
    plain = losses_of("sigmoid", step)
    np.testing.assert_allclose(losses_of("robust", step), plain, rtol=1e-6)
    turned = step | {key: -step[key] for key in PAIR_FIELDS}  # the gap changes its sign
    right, wrong = (evaluate("robust", each, label_smoothing=0.3)[0].losses for each in (step, turned))
    np.testing.assert_allclose(0.7 * right + 0.3 * wrong, plain, rtol=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_completions_of_one_token_are_not_normalised(divergence):
    step = random_step("sigmoid_norm") | dict.fromkeys(("chosen_length", "rejected_length"), np.ones(PAIRS, np.float32))
    normalised, plain = (
        evaluate(name, step, beta=0.1, divergence=divergence)[0] for name in ("sigmoid_norm", "sigmoid")
    )
    np.testing.assert_allclose(normalised.losses, plain.losses, rtol=1e-6)


@pytest.mark.parametrize("name", ["ipo", "sigmoid_norm", "simpo", "odds_ratio"])
def test_a_completion_without_tokens_counts_as_one_token(name):
    step = random_step(name)
    none, one = (step | {"chosen_length": np.full(PAIRS, n, np.float32)} for n in (0, 1))
    np.testing.assert_array_equal(losses_of(name, none), losses_of(name, one))


def test_alpha_divergences_end_in_the_forward_and_the_reverse_kl():
    step = random_step("ipo")
    for alpha, name in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        found = evaluate("ipo", step, divergence="alpha_divergence", divergence_alpha=alpha)[0].losses
        np.testing.assert_allclose(found, evaluate("ipo", step, divergence=name)[0].losses, rtol=1e-5)


def test_beta_dpo_that_keeps_all_and_does_not_adapt_is_dpo():
    step = random_step("beta_dpo") | {"label": np.ones(PAIRS, np.float32), "margin": np.zeros(PAIRS, np.float32)}
    (found, gradients), (plain, wanted) = (
        evaluate("beta_dpo", step, adapt=0.0, keep_fraction=1.0),
        evaluate("sigmoid", step),
    )
    np.testing.assert_allclose(found.losses, plain.losses, rtol=1e-6)
    np.testing.assert_allclose(gradients["policy_chosen"], wanted["policy_chosen"], rtol=1e-5)


def test_beta_dpo_remembers_as_its_authors_do():
    memory, wanted = None, (0.0, 0.0)
    for seed in range(3):
        step, settings = random_step("beta_dpo", seed), numbers("beta_dpo", momentum=0.6)
        outcome = group_losses.beta_dpo(as_pairs(step), **settings, memory=memory)
        value = formulas.beta_dpo(exact(step), **settings, memory=wanted)
        np.testing.assert_allclose(outcome.losses, value, rtol=2e-5)
        memory, wanted = outcome.memory, formulas.beta_dpo_state(exact(step), momentum=0.6, memory=wanted)
        np.testing.assert_allclose(memory, wanted, rtol=1e-5)
    assert memory.shape == (OBJECTIVES["beta_dpo"].remembers,)


@pytest.mark.parametrize(("share", "drawn"), [(0.05, 1), (0.49, 5), (0.5, 6), (0.75, 9), (0.99, 11)])
def test_beta_dpo_draws_the_share_rounded_down_but_one_at_least(share, drawn):
    assert (evaluate("beta_dpo", random_step("beta_dpo"), keep_fraction=share)[0].losses > 0).sum() == drawn


def test_beta_dpo_draws_by_the_noise():
    step = random_step("beta_dpo")
    lucky = np.full(PAIRS, 1e-6, np.float32)
    lucky[[2, 7]] = 1 - 1e-6  # Gumbel noise of 13.8 against -2.6
    # momentum 0: the mean and spread are the step's own, so that weights differ by a factor of some tens at most
    found = evaluate("beta_dpo", step | {"noise": lucky}, keep_fraction=0.2, momentum=0.0)[0].losses
    np.testing.assert_array_equal(np.flatnonzero(found), [2, 7])


def test_beta_of_beta_dpo_has_a_floor():
    step = random_step("beta_dpo")
    found = evaluate("beta_dpo", step, adapt=1e4, keep_fraction=0.5, beta=0.1)[0]
    ratio = (step["policy_chosen"] - step["reference_chosen"]) - (step["policy_rejected"] - step["reference_rejected"])
    used = found.margins / ratio
    gap = ratio[found.losses > 0].mean() - found.memory[0]
    assert gap < 0  # else this step tests nothing
    np.testing.assert_allclose(used, group_losses.SMALLEST_BETA, rtol=1e-5)


def test_kto_is_the_same_seen_from_the_other_side():
    """Undesirable completions with all ratios turned around are desirable ones, where the estimate of the KL is 0."""
    step = random_step("kto")
    step |= {"reference_rejected": step["policy_rejected"], "label": np.ones(PAIRS, np.float32)}
    turned = step | {key: -step[key] for key in PAIR_FIELDS} | {"label": np.zeros(PAIRS, np.float32)}
    one, gradient = evaluate("kto", step, desirable_weight=1.3)
    other, turned_gradient = evaluate("kto", turned, undesirable_weight=1.3)
    np.testing.assert_allclose(other.losses, one.losses, rtol=1e-6)
    np.testing.assert_allclose(other.margins, one.margins, rtol=1e-6)
    np.testing.assert_allclose(turned_gradient["policy_chosen"], -gradient["policy_chosen"], rtol=1e-6)


@pytest.mark.parametrize("shift", [-4.0, 4.0])
def test_ktos_estimate_of_the_kl_is_that_of_the_real_and_never_negative(shift):
    step = random_step("kto") | {"real": np.arange(PAIRS) % 3 > 0}
    step["reference_rejected"] = step["policy_rejected"] - np.float32(shift)
    plain = step | {"reference_rejected": step["policy_rejected"]}
    value, pairs = formula("kto", step)
    # the mean of differences of up to 300 is rounded by 2e-5, times beta / 4
    np.testing.assert_allclose(losses_of("kto", step)[step["real"]], value(pairs), rtol=1e-5)
    assert (losses_of("kto", step) == losses_of("kto", plain)).all() == (shift < 0)


# ---------------------------------------------------------------------------------------------------------- modifiers


def random_tokens(seed=0):
    """Log-probabilities of each token: `tokens[model][pair] = (chosen, rejected)`."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 61, (PAIRS, 2))
    lengths[0] = lengths[0, 0]  # one pair of equal lengths
    return [[tuple(np.float32(-rng.exponential(2.0, n)) for n in pair) for pair in lengths] for _ in range(2)]


def sums_of(tokens, upto=None):
    """The four sums over the first `upto` tokens of each pair, or over all."""
    columns = [[side[: None if upto is None else upto[i]].sum() for i, pair in enumerate(model) for side in pair]
               for model in tokens]  # fmt: skip
    (pc, pr), (rc, rr) = (np.float32(column).reshape(-1, 2).T for column in columns)
    return {"policy_chosen": pc, "policy_rejected": pr, "reference_chosen": rc, "reference_rejected": rr}


def test_ld_dpo_weighs_what_only_one_completion_has():
    tokens = random_tokens()
    public = [min(map(len, pair)) for pair in tokens[0]]
    pairs = make_pairs(**sums_of(tokens), shared=Sums(**sums_of(tokens, public)))
    for alpha in (0.0, 0.3, 1.0):
        found = losses.desensitized(pairs, alpha)
        for i, (policy, reference) in enumerate(zip(*tokens, strict=True)):
            wanted = formulas.desensitized(policy, reference, alpha)
            for field in PAIR_FIELDS:  # sums of 60 float32 numbers: 60 roundings at most
                np.testing.assert_allclose(getattr(found, field)[i], getattr(wanted, field), rtol=60 * UNIT)
    for field in PAIR_FIELDS:
        np.testing.assert_allclose(getattr(losses.desensitized(pairs, 1.0), field), getattr(pairs, field), rtol=1e-6)
        np.testing.assert_array_equal(getattr(losses.desensitized(pairs, 0.0), field), getattr(pairs.shared, field))


def test_ld_dpo_trains_the_policy_by_what_its_tokens_weigh():
    def total(sums, shared):
        return losses.sigmoid(losses.desensitized(make_pairs(**sums, shared=Sums(**shared)), 0.25)).losses.sum()

    tokens = random_tokens()
    whole, part = jax.grad(total, argnums=(0, 1))(sums_of(tokens), sums_of(tokens, [1] * PAIRS))
    np.testing.assert_allclose(part["policy_chosen"], 3 * whole["policy_chosen"], rtol=1e-6)
    assert whole["policy_chosen"].all() and not whole["reference_chosen"].any()


def test_ld_dpo_gives_the_reference_no_gradient():
    def total(shared):
        pairs = make_pairs(**sums_of(tokens), shared=Sums(**shared))
        return losses.sigmoid(losses.desensitized(pairs, 0.25)).losses.sum()

    tokens = random_tokens()
    gradients = jax.grad(total)(sums_of(tokens, [1] * PAIRS))
    assert not gradients["reference_chosen"].any() and not gradients["reference_rejected"].any()


def random_answers(seed):
    """(distributions T V, tokens T) of a completion for each pair."""
    rng = np.random.default_rng(seed)
    answers = []
    for _ in range(PAIRS):
        logits = rng.normal(0, 1, (rng.integers(1, 10), 7))
        distributions = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        answers.append((distributions, np.array([rng.choice(7, p=p) for p in distributions])))
    return answers


def alignment_of(answers):
    """What `Pairs.alignment` asks for: mean over the tokens of log p(token) - log sum_v p(v)^2."""
    means = [np.mean(np.log(p[np.arange(len(t)), t]) - np.log((p**2).sum(axis=1))) for p, t in answers]
    return jnp.asarray(means, jnp.float32)


def test_wpo_weights_are_the_papers_and_clamped_ones_at_most_1():
    chosen, rejected = random_answers(1), random_answers(2)
    zeros = np.zeros(PAIRS, np.float32)
    pairs = make_pairs(zeros, zeros, alignment=(alignment_of(chosen), alignment_of(rejected)))
    wanted = np.array([formulas.wpo_weight(*both) for both in zip(chosen, rejected, strict=True)])
    assert (wanted > 1).any() and (wanted < 1).any()
    np.testing.assert_allclose(losses.policy_weights(pairs, clamped=False), wanted, rtol=1e-5)
    np.testing.assert_allclose(losses.policy_weights(pairs, clamped=True), np.minimum(wanted, 1), rtol=1e-5)


def test_wpo_weights_have_no_gradient():
    def total(alignment):
        pairs = make_pairs(jnp.zeros(PAIRS), jnp.zeros(PAIRS), alignment=alignment)
        return sum(losses.policy_weights(pairs, clamped=clamped).sum() for clamped in (False, True))

    gradients = jax.grad(total)((jnp.full(PAIRS, -0.5), jnp.full(PAIRS, 0.2)))
    assert not any(gradient.any() for gradient in gradients)


def test_rewards_are_beta_times_the_log_ratio():
    step = random_step()
    pairs, (won, lost) = as_pairs(step), formulas.ratios(exact(step))
    for average, lengths in ((False, (1, 1)), (True, (step["chosen_length"], step["rejected_length"]))):
        for found, ratio, length in zip(losses.rewards(pairs, 0.3, average=average), (won, lost), lengths, strict=True):
            np.testing.assert_allclose(found, 0.3 * ratio / length, rtol=1e-6)
