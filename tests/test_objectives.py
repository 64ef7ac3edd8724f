"""Every objective of the table against its paper's formula in float64, and the laws that objectives obey.

A step here is a dict of float32 arrays, one entry per pair; `evaluate` gives it to the objective and brings back losses
and gradients, `exact` gives the same numbers to the formula.
"""

import functools
import inspect
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import group_losses, losses
from dpo_jax.losses import Outcome, Ranking, Sums, make_pairs
from dpo_jax.objectives import KNOWN_AS, MODIFIERS, OBJECTIVES, RECIPES, SCHEDULED, Setting
from dpo_jax.terms import data_of, make_terms, names, takes, with_defaults
from tests import formulas
from tests.formulas import FORMULAS, PAIR_FIELDS, RECIPE_FORMULAS

PAIRS, WIDTH = 12, 5
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
RANKED = ("ranking_policy", "ranking_reference")
UNIT = 2.0**-24  # largest relative error of one rounding to float32

# Two other choices for each number that an objective takes, beside its default.
OTHERS = {
    "beta": (0.5, 0.03),
    "label_smoothing": (0.1, 0.4),
    "divergence_alpha": (0.0, 0.9),
    "tau": (0.5, 1.0),
    "length_penalty": (0.05, 0.0),
    "calibration_weight": (0.5, 0.0),
    "adapt": (0.05, 0.0),
    "keep_fraction": (0.4, 1.0),
    "momentum": (0.5, 0.0),
    "gamma": (0.3, 0.0),
    "desirable_weight": (1.33, 0.7),
    "undesirable_weight": (0.8, 1.5),
    "center": (0.01, 0.5),
}
by_name = pytest.mark.parametrize("name", OBJECTIVES)


def divergences(name):
    return DIVERGENCES if "divergence" in OBJECTIVES[name].settings else (None,)


by_divergence = pytest.mark.parametrize(
    ("name", "divergence"), [(name, divergence) for name in OBJECTIVES for divergence in divergences(name)]
)
step_wide = pytest.mark.parametrize("name", [name for name, row in OBJECTIVES.items() if row.scope == "step"])


def numbers(name, choice=0, **given):
    """The objective's numeric settings: the defaults (choice 0), or others (1, 2)."""
    settings = {key: setting.default for key, setting in OBJECTIVES[name].settings.items() if key != "divergence"}
    if choice:
        settings = {key: OTHERS[key][choice - 1] for key in settings}
    return settings | given


def random_step(name="sigmoid", seed=0):
    """Pairs of realistic size: log-probabilities of -5 to -300 nats, log-ratios of a few nats, 1 to 60 tokens."""
    rng = np.random.default_rng(seed)
    policy = -rng.uniform(5, 300, (2, PAIRS))
    if name == "aot":  # log-odds of a few nats, so that policy and reference order the pairs differently
        policy[1] = policy[0] + rng.normal(0, 2, PAIRS)
    reference = policy - np.clip(rng.normal(0.3, 1.5, (2, PAIRS)), -5, 5)
    if OBJECTIVES[name].model == "reward":
        policy = rng.normal(0, 2, (2, PAIRS))
    label = rng.permutation(PAIRS) % 2 if name == "kto" else rng.uniform(0, 1, PAIRS)
    step = dict(zip(PAIR_FIELDS, (*policy, *reference), strict=True))
    step |= dict(zip(("chosen_length", "rejected_length"), rng.integers(1, 61, (2, PAIRS)), strict=True))
    step |= {"margin": rng.uniform(0, 2, PAIRS), "label": label, "noise": rng.uniform(0.01, 0.99, PAIRS)}
    step = {key: np.asarray(value, np.float32) for key, value in step.items()} | {"real": np.ones(PAIRS, bool)}
    return step | random_rankings(rng) if OBJECTIVES[name].data == "rankings" else step


def random_rankings(rng):
    """Up to five completions each, with ties, and with places that are empty."""
    policy = -rng.uniform(5, 300, (PAIRS, WIDTH))
    reference = policy - np.clip(rng.normal(0.3, 1.5, (PAIRS, WIDTH)), -5, 5)
    ranking = {"ranking_policy": policy.astype(np.float32), "ranking_reference": reference.astype(np.float32)}
    return ranking | {"ranking_rank": rng.integers(-1, 4, (PAIRS, WIDTH)).astype(np.int32)}


def as_pairs(step):
    step = dict(step)
    ranking = [step.pop(key, None) for key in (*RANKED, "ranking_rank")]
    return make_pairs(**step, ranking=None if ranking[0] is None else Ranking(*ranking))


def exact(step):
    """The same numbers in float64, real entries alone, as the formulas take them."""
    kept = {key: value[step["real"]] for key, value in step.items() if key != "real"}
    kept = {key: value if key == "ranking_rank" else np.float64(value) for key, value in kept.items()}
    ranking = {key.removeprefix("ranking_"): kept.pop(key) for key in list(kept) if key.startswith("ranking_")}
    return SimpleNamespace(**kept, ranking=SimpleNamespace(**ranking))


def gradient_fields(step):
    return [key for key in (*PAIR_FIELDS, *RANKED) if key in step]


@functools.cache
def compiled(name, divergence):
    """Outcome, and gradient of the summed losses with respect to everything that is a log-probability."""
    static = {} if divergence is None else {"divergence": divergence}

    def total(inputs, others, settings):
        pairs = as_pairs(inputs | others)
        outcome = OBJECTIVES[name].function(pairs, **static, **settings)
        return jnp.where(pairs.real, outcome.losses, 0.0).sum(), outcome

    return jax.jit(jax.grad(total, has_aux=True))


def evaluate(name, step, *, divergence=None, **settings):
    """The objective's outcome and gradients in float32; divergence is the first of its list if not given."""
    inputs = {key: step[key] for key in gradient_fields(step)}
    others = {key: value for key, value in step.items() if key not in inputs}
    divergence = divergence or divergences(name)[0]
    gradients, outcome = compiled(name, divergence)(inputs, others, numbers(name) | settings)
    return jax.tree.map(np.asarray, outcome), {key: np.asarray(value) for key, value in gradients.items()}


def formula(name, step, *, divergence=None, **settings):
    """The formula of a name as a function of (pairs, fixed), and the pairs of a step in float64."""
    divergence = divergence or divergences(name)[0]
    settings = numbers(name) | settings | ({"divergence": divergence} if divergence else {})
    pairs = exact(step)

    def value(changed):
        held = {"fixed": pairs} if name in ("kto", "beta_dpo") else {}
        return FORMULAS[name](changed, **settings, **held)

    return value, pairs


def read(pairs, field):
    return getattr(pairs.ranking, field.removeprefix("ranking_")) if field in RANKED else getattr(pairs, field)


def shifted(pairs, field, by):
    moved = SimpleNamespace(**vars(pairs))
    if field in RANKED:
        key = field.removeprefix("ranking_")
        moved.ranking = SimpleNamespace(**{**vars(pairs.ranking), key: read(pairs, field) + by})
    else:
        setattr(moved, field, read(pairs, field) + by)
    return moved


def jacobian(value, pairs, field, step=1e-5):
    """Central differences of each loss (first axis) by each entry of a field (last axis, flattened)."""
    columns = []
    for place in np.ndindex(read(pairs, field).shape):
        by = np.zeros(read(pairs, field).shape)
        by[place] = step
        columns.append((value(shifted(pairs, field, by)) - value(shifted(pairs, field, -by))) / (2 * step))
    return np.stack(columns, axis=-1)


def rounding(value, pairs, fields):
    """What four roundings of each log-probability to float32 can do to each loss."""
    return sum(np.abs(jacobian(value, pairs, key)) @ np.abs(read(pairs, key)).ravel() for key in fields) * 4 * UNIT


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


def losses_of(name, step):
    return evaluate(name, step)[0].losses


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
    *((name, (None,)) for name in ("simpo", "odds_ratio", "reward")),
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
    normalised, plain = (evaluate(name, step, divergence=divergence)[0] for name in ("sigmoid_norm", "sigmoid"))
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


# ---------------------------------------------------------------------------------------------------------- the table


def test_names_are_used_once():
    assert len(set(names())) == len(names()) == len(OBJECTIVES) + len(RECIPES)


@by_name
def test_a_row_says_where_it_comes_from_and_its_defaults_are_allowed(name):
    row = OBJECTIVES[name]
    assert row.equation and row.when and (re.search(r"arXiv:\d{4}\.\d{5}", row.paper) or name == "sft")
    assert set(row.modifiers) <= set(MODIFIERS) and set(row.uses) <= {"margin", "label"}
    assert row.measured_as is None or (row.measured_as in OBJECTIVES and not OBJECTIVES[row.measured_as].remembers)
    for key, setting in row.takes.items():
        assert setting.accepts(setting.default), key
    for key in ("name", "weight", *SCHEDULED):  # these mean something else in a block of settings
        assert key not in row.takes


@by_name
def test_a_function_takes_exactly_the_settings_of_its_row(name):
    row = OBJECTIVES[name]
    first, *rest = inspect.signature(row.function).parameters.values()
    assert first.name == "pairs" and all(each.kind is each.KEYWORD_ONLY for each in rest)
    assert {each.name for each in rest} == {*row.settings, *(("memory",) if row.remembers else ())}
    for each in rest:
        assert each.default in (inspect.Parameter.empty, None) or each.default == row.settings[each.name].default
    assert (evaluate(name, random_step(name))[0].memory is not None) == bool(row.remembers)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_made_of_rows_and_names_its_weights(name):
    recipe = RECIPES[name]
    assert recipe.equation and recipe.when and "arXiv:" in recipe.paper
    for part, weight, fixed in recipe.parts:
        assert set(fixed) <= set(OBJECTIVES[part].takes)
        assert weight in recipe.settings if isinstance(weight, str) else weight > 0
    for key, setting in takes(name).items():
        assert setting.accepts(setting.default), key


ALLOWED = {
    ("sigmoid", "beta"): ([1e-6, 5, 100.0], [0, -0.1, "0.1", True, math.nan, math.inf]),
    ("sigmoid", "label_smoothing"): ([0, 0.49], [0.5, -0.01]),
    ("sigmoid", "divergence"): (["reverse_kl", "js_divergence"], ["kl", 1]),
    ("sigmoid", "divergence_alpha"): ([0, 1], [-0.1, 1.1]),
    ("sigmoid", "ld_alpha"): ([0, 1], [-0.1, 1.1]),
    ("sigmoid", "weighting"): (["none", "wpo", "wpo_clamped"], ["WPO", True]),
    ("sigmoid", "reference_free"): ([True, False], [1, "yes"]),
    ("exo_pair", "label_smoothing"): ([1e-3, 0.49], [0, 0.5]),
    ("discopop", "tau"): ([0.01, 1], [0, 1.1]),
    ("rdpo", "length_penalty"): ([0, 1], [-0.1]),
    ("cal_dpo", "calibration_weight"): ([0, 2], [-0.1]),
    ("beta_dpo", "adapt"): ([0, 2], [-0.1]),
    ("beta_dpo", "keep_fraction"): ([0.01, 1], [0, 1.1]),
    ("beta_dpo", "momentum"): ([0, 0.99], [1, -0.1]),
    ("simpo", "gamma"): ([0, 2], [-0.1]),
    ("kto", "desirable_weight"): ([0, 2], [-0.1]),
    ("reward", "center"): ([0, 2], [-0.1]),
    ("orpo", "odds_weight"): ([0, 2], [-0.1]),
    ("rpo", "beta_end"): ([0.01], [0]),
}


@pytest.mark.parametrize(("name", "key"), ALLOWED)
def test_what_a_setting_may_be(name, key):
    good, bad = ALLOWED[name, key]
    assert all(takes(name)[key].accepts(value) for value in good)
    assert not any(takes(name)[key].accepts(value) for value in bad)


def test_a_setting_says_what_it_may_be():
    assert Setting(0.1, above=0, most=1).allowed() == "a number > 0 and <= 1"
    assert Setting(0.1, least=0, below=0.5).allowed() == "a number >= 0 and < 0.5"
    assert Setting("a", choices=("a", "b")).allowed() == "one of a, b"
    assert Setting(False).allowed() == "true or false"


# ---------------------------------------------------------------------------------------------------- blocks to terms


def refusal(*blocks):
    with pytest.raises(ValueError) as refused:
        make_terms(blocks)
    return str(refused.value)


def test_nothing_given_is_dpo_with_every_default():
    (term,) = make_terms([{"beta": None}])
    assert (term.name, term.weight, term.row) == ("sigmoid", 1.0, OBJECTIVES["sigmoid"])
    assert term.settings == {key: setting.default for key, setting in OBJECTIVES["sigmoid"].takes.items()}
    assert term.uses_reference and not term.desensitizes and term.weighting == "none"


@by_name
def test_defaults_are_filled_in_and_what_is_given_is_kept(name):
    (term,) = make_terms([{"name": name, "weight": 2.0}])
    assert (term.name, term.weight) == (name, 2.0)
    assert term.settings == {key: setting.default for key, setting in OBJECTIVES[name].takes.items()}
    for key, setting in OBJECTIVES[name].settings.items():
        if isinstance(setting.default, float) and key != "divergence_alpha":
            (given,) = make_terms([{"name": name, key: 0.25}])
            assert given.settings == {**term.settings, key: 0.25}
    assert data_of([term]) == OBJECTIVES[name].data


def test_an_unknown_name_is_told_the_near_one():
    assert refusal({"name": "sigmiod"}) == "name: no objective 'sigmiod'; did you mean sigmoid?"
    assert refusal({"name": "plackett-luce"}).endswith("did you mean plackett_luce?")
    assert refusal({"name": "zzz"}).endswith(f"one of {', '.join(names())}")


def test_names_that_others_use_are_told_ours():
    assert refusal({"name": "dpo"}) == "name: no objective 'dpo'; sigmoid is DPO"
    assert refusal({"name": "R-DPO"}).endswith("it is rdpo")
    for name, answer in KNOWN_AS.items():
        assert name not in names() and any(re.search(rf"\b{ours}\b", answer) for ours in names())


@pytest.mark.parametrize("name", names())
def test_filling_in_the_defaults_changes_nothing(name):
    for block in ({"name": name}, {"name": name, "weight": 2.0, "weighting": None}):
        filled = with_defaults(block)
        assert make_terms([filled]) == make_terms([block]) and with_defaults(filled) == filled
        unset = {"divergence_alpha"} | set(SCHEDULED)  # these are refused unless something uses them
        assert set(filled) - {"name", "weight"} == set(takes(name)) - unset
    assert with_defaults({"name": "zzz", "beta": None}) == {"name": "zzz"}


def test_a_setting_that_would_be_ignored_is_refused_with_what_is_taken():
    assert refusal({"name": "bco_pair", "label_smoothing": 0.1}) == (
        "label_smoothing: objective bco_pair does not use it; "
        "it takes beta, ld_alpha, weighting, beta_end, beta_schedule"
    )
    assert "reference_free: objective cpo does not use it" in refusal({"name": "cpo", "reference_free": False})
    assert "reference_free: objective kto does not use it" in refusal({"name": "kto", "reference_free": True})
    assert "beta_end: objective sft does not use it; it takes weighting" in refusal({"name": "sft", "beta_end": 0.2})
    assert refusal({"divergence_alpha": 0.3}).startswith("divergence_alpha: only divergence alpha_divergence uses it")
    assert refusal({"beta_schedule": "cosine"}).startswith("beta_schedule: nothing is scheduled without beta_end")


def test_a_value_out_of_range_is_refused_with_the_range():
    assert refusal({"beta": 0}) == "beta: must be a number > 0 for objective sigmoid"
    assert refusal({"weight": -1}) == "weight: must be a number >= 0"
    assert refusal({"label_smoothing": 0.5}).startswith("label_smoothing: must be a number >= 0 and < 0.5")
    assert refusal({"weighting": "WPO"}).startswith("weighting: must be one of none, wpo, wpo_clamped")
    assert refusal({"reference_free": "no"}).startswith("reference_free: must be true or false")


def test_everything_that_is_wrong_is_said_and_where():
    found = refusal({"beta": -1, "tau": 1}, {"name": "sft"}, {"name": "ipo", "divergence": "none"}).splitlines()
    assert [line.split(":")[0] for line in found] == ["0.beta", "0.tau", "2.divergence"]


@pytest.mark.parametrize(
    ("blocks", "why"),
    [
        (["sigmoid", "kto"], "kto and sigmoid want different data"),
        (["plackett_luce", "simpo"], "want different data"),
        (["plackett_luce", "kto"], "want different data"),
        (["sft", "kto"], "sft looks at chosen answers"),
        (["plackett_luce", "sft"], "sft looks at chosen answers"),
        (["reward", "sigmoid"], "reward trains a scalar head"),
        (["reward", "sft"], "reward trains a scalar head"),
        (["beta_dpo", "beta_dpo"], "only one objective of a mixture may remember"),
    ],
)
def test_what_cannot_be_added_up_is_refused(blocks, why):
    assert why in refusal(*({"name": name} for name in blocks))


def test_what_can_be_added_up_is():
    terms = make_terms([{"name": "beta_dpo"}, {"name": "rpo", "weight": 0.5}, {"name": "sft", "weight": 0}])
    assert [(term.name, term.weight) for term in terms] == [
        ("beta_dpo", 1.0), ("sigmoid", 0.5), ("sft", 0.5), ("sft", 0),
    ]  # fmt: skip
    assert data_of(terms) == "pairs" and data_of(make_terms([{"name": "sft"}])) == "chosen"


def test_a_term_knows_its_start():
    def start(**block):
        (term,) = make_terms([block])
        return term.at_start()

    assert start() == start(beta=0.7) == pytest.approx(math.log(2))
    assert start(name="ipo", beta=0.5, weight=3) == pytest.approx(3.0)
    assert start(name="kto") == 0.5 and start(name="kto", desirable_weight=1.5) is None
    assert start(name="rdpo") is start(reference_free=True) is start(weighting="wpo") is start(name="sft") is None


EXPANDED = {
    "rpo": [("sigmoid", 1.0), ("sft", 1.0)],
    "mpo": [("sigmoid", 0.8), ("bco_pair", 0.2), ("sft", 1.0)],
    "cpo": [("sigmoid", 1.0), ("sft", 1.0)],
    "orpo": [("sft", 1.0), ("odds_ratio", 0.1)],
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_expands_to_its_sum(name):
    assert [(term.name, term.weight) for term in make_terms([{"name": name}])] == EXPANDED[name]
    doubled = make_terms([{"name": name, "weight": 2, "weighting": "wpo"}])
    assert [(term.name, term.weight) for term in doubled] == [(part, 2 * weight) for part, weight in EXPANDED[name]]
    assert all(term.weighting == "wpo" for term in doubled)


RECIPE_SETTINGS = {
    "rpo": {"beta": 0.3, "sft_weight": 0.25},
    "mpo": {"beta": 0.3},
    "cpo": {"beta": 0.3, "sft_weight": 0.25},
    "orpo": {"odds_weight": 0.4},
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("given", [True, False])
def test_a_recipe_is_its_papers_sum(name, given):
    """Each term is divided by what the table takes it per: pairs, or the chosen completions' tokens."""
    settings = RECIPE_SETTINGS[name] if given else {}
    step = random_step() | {"label": np.ones(PAIRS, np.float32), "margin": np.zeros(PAIRS, np.float32)}
    alone = step | dict.fromkeys(("reference_chosen", "reference_rejected"), np.zeros(PAIRS, np.float32))
    counts = {"pairs": PAIRS, "chosen_tokens": step["chosen_length"].sum()}
    total = 0.0
    for term in make_terms([{"name": name, **settings}]):
        own = {key: term.settings[key] for key in numbers(term.name)}
        outcome: Outcome = evaluate(term.name, step if term.uses_reference else alone, **own)[0]
        total += term.weight * outcome.losses.sum() / counts[term.row.per]
    defaults = {key: takes(name)[key].default for key in RECIPE_SETTINGS[name]}
    np.testing.assert_allclose(total, RECIPE_FORMULAS[name](exact(step), **(defaults | settings)), rtol=1e-5)
