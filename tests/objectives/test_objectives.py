"""Every objective of the table against its paper's formula in float64: values, gradients, limits, the table's word."""

import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dpo_jax.objectives import pairwise as losses
from dpo_jax.objectives.table import OBJECTIVES, RECIPES
from tests.support import formulas
from tests.support.formulas import FORMULAS, PAIR_FIELDS, RECIPE_FORMULAS
from tests.support.steps import (
    DIVERGENCES,
    PAIRS,
    WIDTH,
    as_pairs,
    by_divergence,
    by_name,
    evaluate,
    exact,
    formula,
    gradient_fields,
    jacobian,
    losses_of,
    numbers,
    random_step,
    rounding,
    step_wide,
)

# ------------------------------------------------------------------------------------------------- value and gradient


def test_every_objective_and_recipe_has_a_formula():
    assert set(FORMULAS) == set(OBJECTIVES) and set(RECIPE_FORMULAS) == set(RECIPES)


@by_divergence
@pytest.mark.parametrize("choice", range(3))
def test_the_value_is_the_papers(name, divergence, choice):
    step, settings = random_step(name, seed=choice), numbers(name, choice)
    value, pairs = formula(name, step, divergence=divergence, **settings)
    wanted, found = value(pairs), evaluate(name, step, divergence=divergence, **settings)[0].losses
    slack = rounding(value, pairs, gradient_fields(step))
    if name.startswith("aot"):  # a value of the formula belongs to a place of the sorted step
        np.testing.assert_allclose(found.sum(), wanted.sum(), rtol=1e-5)
        found, wanted, slack = np.sort(found), np.sort(wanted), slack.max()
    # Beside the rounding of the log-probabilities: a few roundings of the loss itself, and 1e-6 (16 units in the last
    # place of 1) where losses are differences of logarithms of order 1 (exo_pair, robust).
    assert np.all(np.abs(found - wanted) <= 5e-6 * np.abs(wanted) + 1e-6 + slack)


@by_divergence
@pytest.mark.parametrize("choice", range(3))
def test_the_gradient_is_the_slope_of_the_papers_value(name, divergence, choice):
    step, settings = random_step(name, seed=10 + choice), numbers(name, choice)
    value, pairs = formula(name, step, divergence=divergence, **settings)
    gradients = evaluate(name, step, divergence=divergence, **settings)[1]
    for field, found in gradients.items():
        if "reference" in field:
            assert not found.any(), f"{field} gets a gradient"
            continue
        wanted = jacobian(value, pairs, field).sum(axis=0).reshape(found.shape)
        # 2e-5 of the largest: log-odds of 600 nats are rounded by 6e-5 (aot), and move a slope by a quarter of that at
        # most; 1e-4 of each: phi of the forward KL multiplies the rounding of u by up to exp(5)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5 * np.abs(wanted).max() + 1e-7, err_msg=field)


@pytest.mark.parametrize("alpha", [0.5, 0.99, 0.9999, 0.99999])
def test_alpha_divergences_near_the_reverse_kl_keep_their_digits(alpha):
    step = random_step()
    found = losses.log_ratios(as_pairs(step), "alpha_divergence", alpha)
    wanted = formulas.mapped(exact(step), "alpha_divergence", float(np.float32(alpha)))
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- limits

FAR = (0.0, 1e4, -1e4)
EXTREMES = {
    "beta": (0.1, 10.0, 0.001),
    "label_smoothing": (0.001, 0.499, 0.1),
    "divergence_alpha": (0.99, 0.0, 1.0),
    "tau": (0.05, 1.0, 0.001),
    "keep_fraction": (0.8, 0.01, 1.0),
}


def far_step(name):
    """Log-ratios of 0 and +-1e4 nats in every combination, and the three most lopsided of them at 60 tokens."""
    corners = [(won, lost) for won in FAR for lost in FAR] + [(-1e4, 1e4), (1e4, -1e4), (-1e4, -1e4)]
    won, lost = np.asarray(corners, np.float32).T
    length = np.repeat(np.float32([1, 60]), [9, 3])
    step = random_step(name) | {"chosen_length": length, "rejected_length": length}
    step |= {"policy_chosen": won, "policy_rejected": lost}
    step |= {"reference_chosen": np.zeros_like(won), "reference_rejected": np.zeros_like(won)}
    if name == "plackett_luce":
        far = np.resize(won, (PAIRS, WIDTH))
        step |= {"ranking_policy": far, "ranking_reference": np.zeros_like(far)}
    return step


def assert_all_finite(tree):
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)), tree


@by_divergence
@pytest.mark.parametrize("choice", range(3))
def test_log_ratios_of_ten_thousand_nats_stay_finite(name, divergence, choice):
    extremes = {key: EXTREMES[key][choice] for key in numbers(name) if key in EXTREMES}
    assert_all_finite(evaluate(name, far_step(name), divergence=divergence, **extremes))


@pytest.mark.parametrize("alpha", [0.5, 0.9, 0.996, 0.9999])
def test_no_alpha_divergence_is_too_large_to_be_squared(alpha):
    found = evaluate("ipo", far_step("ipo"), divergence="alpha_divergence", divergence_alpha=alpha)
    assert_all_finite(found)


@pytest.mark.parametrize("name", ["odds_ratio", "simpo", "sft"])
def test_certain_and_impossible_completions_stay_finite(name):
    """Mean log-probabilities of exactly 0, of next to nothing, and of -1e4 nats per token, in every combination."""
    logps = np.asarray([0.0, -1e-8, -1e4], np.float32)
    chosen, rejected = (np.resize(grid, PAIRS) for grid in np.meshgrid(logps, logps))
    step = random_step(name) | {"policy_chosen": chosen, "policy_rejected": rejected}
    assert_all_finite(evaluate(name, step | {"chosen_length": np.ones(PAIRS, np.float32)}))


def test_odds_of_nearly_certain_completions_keep_their_digits():
    step = random_step("odds_ratio") | dict.fromkeys(("chosen_length", "rejected_length"), np.ones(PAIRS, np.float32))
    step |= {
        "policy_chosen": -np.geomspace(1e-5, 3, PAIRS, dtype=np.float32),
        "policy_rejected": np.full(PAIRS, -0.1, np.float32),
    }
    value, pairs = formula("odds_ratio", step)
    # -log S is 1e-6 where the chosen one is all but certain, and as exact there as the log-odds of 11 are: 1e-6
    np.testing.assert_allclose(losses_of("odds_ratio", step), value(pairs), rtol=5e-6)


def test_one_pair_alone_stays_finite():
    for name in OBJECTIVES:
        step = random_step(name)
        assert_all_finite(evaluate(name, step | {"real": np.arange(PAIRS) == 5}))
        assert_all_finite(evaluate(name, step | {"real": np.zeros(PAIRS, bool)})[1])


# -------------------------------------------------------------------------------------------------------------- start


def at_the_reference(name, seed=0):
    step = random_step(name, seed) | {"margin": np.zeros(PAIRS, np.float32)}
    return step | {key: step[key.replace("policy", "reference")] for key in gradient_fields(step) if "policy" in key}


@by_divergence
@pytest.mark.parametrize("choice", range(3))
def test_where_policy_and_reference_agree_the_loss_is_the_tables_constant(name, divergence, choice):
    row, settings = OBJECTIVES[name], numbers(name, choice)
    found = evaluate(name, at_the_reference(name), divergence=divergence, **settings)[0].losses
    if row.at_start is None:
        assert found.std() > 1e-3 or choice  # R-DPO without a penalty is DPO
    elif not math.isnan(row.at_start(**settings)):
        each = found[found > 0] / (PAIRS / (found > 0).sum()) if row.remembers else found
        # log 2 + log S(0) of the JS divergence is 0 up to a rounding of 0.7, which ipo adds to 1 / (2 beta)
        np.testing.assert_allclose(each, row.at_start(**settings), rtol=1e-6)
        np.testing.assert_allclose(found.mean(), row.at_start(**settings), rtol=1e-6)


@by_divergence
def test_the_first_gradient_is_the_slope_of_the_papers_value(name, divergence):
    """Where policy and reference agree h is exactly 0, a special place for whatever takes an absolute value."""
    if name == "beta_dpo":
        return  # all gaps are 0, and so is their spread: the paper's weights are 0 / 0
    step = at_the_reference(name)
    value, pairs = formula(name, step, divergence=divergence)
    for field, found in evaluate(name, step, divergence=divergence)[1].items():
        wanted = jacobian(value, pairs, field).sum(axis=0).reshape(found.shape) if "policy" in field else 0 * found
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max(), err_msg=field)


def test_kto_starts_at_half_its_weight_if_both_are_the_same():
    at_start = OBJECTIVES["kto"].at_start
    assert math.isnan(at_start(desirable_weight=1.0, undesirable_weight=2.0))
    found = evaluate("kto", at_the_reference("kto"), desirable_weight=3.0, undesirable_weight=3.0)[0].losses
    np.testing.assert_allclose(found, at_start(desirable_weight=3.0, undesirable_weight=3.0), rtol=1e-6)


# -------------------------------------------------------------------------------------- what the table says of each row


def with_noise(step, *fields):
    rng = np.random.default_rng(77)
    return step | {key: (step[key] + rng.uniform(0.1, 0.9, step[key].shape)).astype(np.float32) for key in fields}


@by_name
def test_margins_and_labels_matter_exactly_where_the_table_says(name):
    step = random_step(name) | {"label": np.ones(PAIRS, np.float32)}
    changed = {"margin": with_noise(step, "margin"), "label": step | {"label": np.zeros(PAIRS, np.float32)}}
    for field, other in changed.items():
        assert (losses_of(name, step) != losses_of(name, other)).any() == (field in OBJECTIVES[name].uses), field


@by_name
def test_the_reference_matters_exactly_where_the_table_says(name):
    step = random_step(name)
    other = with_noise(step, *[key for key in gradient_fields(step) if "reference" in key])
    assert (losses_of(name, step) != losses_of(name, other)).any() == (OBJECTIVES[name].reference != "unused")


@by_name
def test_other_pairs_matter_exactly_where_the_table_says(name):
    step, mine = random_step(name), np.arange(PAIRS) < 6
    other = random_step(name, seed=1)
    other = {key: np.where(mine.reshape(-1, *[1] * (value.ndim - 1)), value, other[key]) for key, value in step.items()}
    changed = losses_of(name, step)[mine] != losses_of(name, other)[mine]
    assert changed.any() == (OBJECTIVES[name].scope == "step")


@by_name
def test_only_what_is_said_to_be_looked_at_is_looked_at(name):
    step = random_step(name)
    pairwise = with_noise(step, *PAIR_FIELDS)
    if OBJECTIVES[name].data == "rankings":
        np.testing.assert_array_equal(losses_of(name, step), losses_of(name, pairwise))
    rejected = with_noise(step, "policy_rejected", "reference_rejected", "rejected_length")
    looked = OBJECTIVES[name].data not in ("chosen", "rankings")
    assert (losses_of(name, step) != losses_of(name, rejected)).any() == looked


@by_name
def test_losses_follow_their_pairs_when_the_step_is_shuffled(name):
    step = random_step(name)
    order = np.random.default_rng(4).permutation(PAIRS)
    shuffled = {key: value[order] for key, value in step.items()}
    (before, before_grads), (after, after_grads) = evaluate(name, step), evaluate(name, shuffled)
    # means over the step add up in another order: 1e-6
    np.testing.assert_allclose(after.losses, before.losses[order], rtol=1e-6)
    for key, gradient in before_grads.items():
        np.testing.assert_allclose(after_grads[key], gradient[order], rtol=1e-5, atol=1e-9)


@step_wide
def test_a_step_of_several_rows_is_one_step(name):
    step = random_step(name)
    flat, gradients = evaluate(name, step)
    rows, row_gradients = evaluate(name, {key: value.reshape(3, 4) for key, value in step.items()})
    np.testing.assert_allclose(rows.losses.ravel(), flat.losses, rtol=1e-6)
    np.testing.assert_allclose(row_gradients["policy_chosen"].ravel(), gradients["policy_chosen"], rtol=1e-6)


@by_name
@pytest.mark.parametrize("garbage", [1e6, -1e6, np.nan])
def test_padding_influences_nothing(name, garbage):
    real = np.random.default_rng(5).permutation(PAIRS) < 8
    step = random_step(name) | {"real": real}
    clean, clean_grads = evaluate(name, step)
    fields = [*gradient_fields(step), "margin", "label", "noise", "chosen_length", "rejected_length"]
    masks = {key: real.reshape(-1, *[1] * (step[key].ndim - 1)) for key in fields}
    dirty = step | {key: np.where(masks[key], step[key], np.float32(garbage)) for key in fields}
    found, found_grads = evaluate(name, dirty)
    np.testing.assert_array_equal(found.losses[real], clean.losses[real])
    np.testing.assert_array_equal(found.margins[real], clean.margins[real])
    if clean.memory is not None:
        np.testing.assert_array_equal(found.memory, clean.memory)
    for key, gradient in found_grads.items():
        np.testing.assert_array_equal(gradient[real], clean_grads[key][real])
        # nan * 0 is nan: padding has to be finite (as it is) for its own gradient to be 0
        assert np.isnan(garbage) or not gradient[~real].any()
    if name in ("aot", "aot_unpaired", "beta_dpo", "kto"):
        wanted = formula(name, step)[0](exact(step))
        np.testing.assert_allclose(found.losses[real].sum(), wanted.sum(), rtol=1e-5)


# Objectives that push each chosen completion up and each rejected one down, wherever they are, if labels are right.
CONTRASTIVE = [
    ("sigmoid", DIVERGENCES),
    ("hinge", DIVERGENCES),
    ("robust", DIVERGENCES),
    ("sigmoid_norm", DIVERGENCES),
    *((name, (None,)) for name in ("bco_pair", "aot", "aot_unpaired", "apo_zero", "rdpo", "beta_dpo")),
    *((name, (None,)) for name in ("simpo", "odds_ratio", "unlikelihood", "reward")),
]


@pytest.mark.parametrize(("name", "divergence"), [(name, each) for name, several in CONTRASTIVE for each in several])
def test_chosen_completions_go_up_and_rejected_ones_down(name, divergence):
    step = random_step(name) | {"label": np.ones(PAIRS, np.float32)}
    outcome, gradients = evaluate(name, step, divergence=divergence)
    awake = outcome.losses != 0  # hinge within its margin, pairs that beta-DPO drew
    assert awake.sum() > 3
    assert (gradients["policy_chosen"][awake] < 0).all() and (gradients["policy_rejected"][awake] > 0).all()
    assert not gradients["policy_chosen"][~awake].any() and not gradients["policy_rejected"][~awake].any()


@pytest.mark.parametrize("name", ["ipo", "exo_pair", "nca_pair", "sppo_hard", "cal_dpo"])
def test_the_first_step_goes_towards_the_chosen_completion(name):
    gradients = evaluate(name, at_the_reference(name))[1]
    assert (gradients["policy_chosen"] < 0).all() and (gradients["policy_rejected"] > 0).all()


def test_apo_down_takes_rejected_completions_down_and_chosen_ones_that_lead_too():
    step = random_step("apo_down")
    step |= {"policy_chosen": step["reference_chosen"] + 1, "policy_rejected": step["reference_rejected"] - 9}
    gradients = evaluate("apo_down", step)[1]
    assert (gradients["policy_chosen"] > 0).all() and (gradients["policy_rejected"] > 0).all()


def test_sft_looks_at_the_chosen_completion_alone():
    gradients = evaluate("sft", random_step("sft"))[1]
    assert (gradients["policy_chosen"] == -1).all() and not gradients["policy_rejected"].any()


def test_the_best_goes_up_and_the_worst_down():
    step = random_step("plackett_luce")
    step["ranking_rank"] = np.tile(np.arange(WIDTH, dtype=np.int32), (PAIRS, 1))
    gradient = evaluate("plackett_luce", step)[1]["ranking_policy"]
    assert (gradient[:, 0] < 0).all() and (gradient[:, -1] > 0).all()
    np.testing.assert_allclose(gradient.sum(axis=1), 0, atol=1e-6)


def test_kto_pushes_desirable_completions_up_and_undesirable_ones_down():
    step = random_step("kto")
    gradients = evaluate("kto", step)[1]
    np.testing.assert_array_equal(np.sign(gradients["policy_chosen"]), np.where(step["label"] == 1, -1, 1))
    assert not gradients["policy_rejected"].any()


@by_name
def test_margins_grow_with_the_chosen_completion_and_fall_with_the_rejected_one(name):
    step, settings = random_step(name), {"adapt": 0.0} if name == "beta_dpo" else {}
    raised = ({}, *({key: step[key] + np.float32(0.25)} for key in ("policy_chosen", "policy_rejected")))
    margins, higher, lower = (evaluate(name, step | change, **settings)[0].margins for change in raised)
    if name == "kto":  # the other completion counts by the estimate of the KL alone
        sign = 2 * step["label"] - 1
        assert (sign * higher > sign * margins).all() and (sign * lower <= sign * margins).all()
    else:
        assert (higher > margins).all() and ((lower < margins).all() or name == "sft")


# Objectives whose loss is a function of one number alone: what they are for beta 1 of a log-ratio that is that number.
OF_ITS_MARGIN = {
    **dict.fromkeys(("sigmoid", "sigmoid_norm", "rdpo", "simpo", "reward"), "sigmoid"),
    **dict.fromkeys(("odds_ratio", "aot", "aot_unpaired", "robust"), "robust"),
    **{name: name for name in ("hinge", "exo_pair", "discopop")},
}


@pytest.mark.parametrize("name", OF_ITS_MARGIN)
def test_the_loss_is_a_function_of_the_margin_that_is_reported(name):
    step = random_step(name)
    outcome = evaluate(name, step)[0]
    nothing = np.zeros(PAIRS)
    alone = SimpleNamespace(**dict.fromkeys(PAIR_FIELDS, nothing), margin=nothing, label=np.float64(step["label"]))
    alone.policy_chosen = np.float64(outcome.margins)
    divergence = {"divergence": "reverse_kl", "divergence_alpha": 0.5}
    wanted = FORMULAS[OF_ITS_MARGIN[name]](alone, **numbers(OF_ITS_MARGIN[name]) | divergence | {"beta": 1.0})
    np.testing.assert_allclose(outcome.losses, wanted, rtol=2e-6, atol=2e-6)
