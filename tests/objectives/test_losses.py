"""Laws of the DPO loss, and the paper's and tutorials' worked numbers."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax import dpo_loss, dpo_loss_from_indices
from dpo_jax.errors import UserError
from dpo_jax.objectives.mixture import objective_loss
from dpo_jax.objectives.pairs import make_pairs
from dpo_jax.objectives.table import OBJECTIVES, Objective

nats = st.floats(-50, 50, width=32)


def f32(*values):
    return jnp.asarray(values, jnp.float32)


def numpy_dpo(pw, pl, rw, rl, beta, eps):
    """The paper's equation 7 (with smoothing) in float64."""
    h = beta * ((np.float64(pw) - rw) - (np.float64(pl) - rl))
    return (1 - eps) * np.logaddexp(0, -h) + eps * np.logaddexp(0, h)


@settings(deadline=None, max_examples=60)
@given(nats, nats, nats, nats, st.floats(0.01, 2), st.floats(0, 0.49))
def test_the_loss_is_the_papers_formula(pw, pl, rw, rl, beta, eps):
    loss = dpo_loss(f32(pw), f32(pl), f32(rw), f32(rl), beta=beta, label_smoothing=eps)
    # float32 of differences of numbers up to 50: 1e-5 absolute is 2 units in the last place of 100
    np.testing.assert_allclose(loss.losses[0], numpy_dpo(pw, pl, rw, rl, beta, eps), rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(loss.chosen_rewards[0], beta * (pw - rw), rtol=1e-5, atol=2e-5)


def test_policy_equal_to_reference_costs_ln_2_whatever_the_smoothing():
    logps = f32(-3.0, -70.0)
    for eps in (0.0, 0.3):
        loss = dpo_loss(logps, logps - 1, logps, logps - 1, label_smoothing=eps)
        np.testing.assert_allclose(loss.losses, np.log(2), rtol=1e-6)
        assert OBJECTIVES["sigmoid"].at_start(label_smoothing=eps) == pytest.approx(np.log(2))


@settings(deadline=None, max_examples=40)
@given(st.floats(0, 0.5), st.floats(-20, 20, width=32))
def test_smoothing_is_the_chance_that_the_pair_is_swapped(eps, gap):
    right = dpo_loss(f32(gap), f32(0), f32(0), f32(0), beta=0.5).losses
    wrong = dpo_loss(f32(0), f32(gap), f32(0), f32(0), beta=0.5).losses
    both = dpo_loss(f32(gap), f32(0), f32(0), f32(0), beta=0.5, label_smoothing=eps).losses
    np.testing.assert_allclose(both, (1 - eps) * right + eps * wrong, rtol=1e-5, atol=1e-6)


def test_the_gradient_pulls_the_pair_apart_and_never_reaches_the_reference():
    def total(pw, pl, rw, rl):
        return dpo_loss(pw, pl, rw, rl, beta=0.1).losses.sum()

    pw, pl, rw, rl = f32(-1.0), f32(-2.0), f32(-1.5), f32(-1.5)
    grads = jax.grad(total, argnums=(0, 1, 2, 3))(pw, pl, rw, rl)
    weight = 0.1 / (1 + np.exp(0.1))  # beta * sigmoid(-h), the paper's implicit-reward weight; h = 0.1
    np.testing.assert_allclose([g[0] for g in grads], [-weight, weight, 0, 0], rtol=1e-6)


def test_rewards_carry_no_gradient():
    grad = jax.grad(lambda x: dpo_loss(x, f32(0), f32(0), f32(0)).chosen_rewards.sum())(f32(1))
    assert grad[0] == 0


def test_extreme_log_ratios_stay_finite():
    loss, grad = jax.value_and_grad(lambda x: dpo_loss(x, f32(0), f32(0), f32(0), beta=1.0).losses.sum())(f32(-1e4))
    assert loss == 1e4 and grad[0] == -1.0


def test_the_worked_example_of_a_tutorial_in_nats():
    """Policy 0.7/0.3, reference 0.3/0.7: the reward gap is 2 ln(7/3) = 1.6946 nats (a tutorial prints 1.20)."""
    loss = dpo_loss(f32(np.log(0.7)), f32(np.log(0.3)), f32(np.log(0.3)), f32(np.log(0.7)), beta=1.0)
    np.testing.assert_allclose(loss.chosen_rewards - loss.rejected_rewards, [1.6946], atol=5e-5)


FOUR = np.array([-1.0, -2.0, -3.0, -4.0])


@pytest.mark.parametrize(
    ("better", "worse", "says"),
    [
        ([0, 1], [2, 9], r"yl_idxs: 9: there are 4 completions, 0 to 3"),
        (np.array([-1, 1]), [2, 3], r"yw_idxs: -1: there are 4"),
        ([0, 1], [2], r"yl_idxs: has the shape \(1,\) beside \(2,\)"),
        ([0.0, 1.0], [2, 3], r"yw_idxs: is of float32; give the numbers of completions"),
        ("ab", [2, 3], r"yw_idxs: ab: must be numbers"),
    ],
)
def test_an_index_of_no_completion_is_refused(better, worse, says):
    """JAX would take the last one; PyTorch, whose users come with such indices, raises an IndexError, but for -1, which
    often fills up what has no partner."""
    with pytest.raises(UserError, match=says):
        dpo_loss_from_indices(FOUR, FOUR, better, worse)


def test_an_index_of_no_completion_that_cannot_be_looked_at_gives_nan():
    found = jax.jit(dpo_loss_from_indices)(FOUR, FOUR, jnp.array([0, 1, 0, -5]), jnp.array([2, 4, -1, 1])).losses
    np.testing.assert_array_equal(np.isnan(found), [False, True, True, True])


def test_indices_of_any_width_are_taken_and_there_may_be_none():
    many = jnp.arange(300.0)
    better, worse = jnp.array([100], jnp.int8), jnp.array([1], jnp.int8)
    wanted = dpo_loss(many[100:101], many[1:2], 0.0, 0.0).losses
    np.testing.assert_array_equal(dpo_loss_from_indices(many, jnp.zeros(300), better, worse).losses, wanted)
    assert dpo_loss_from_indices(FOUR, FOUR, [], []).losses.shape == (0,)


@pytest.mark.parametrize("sizes", [(3, 2, 3, 3), (3, 3, 1, 3), (1, 3, 3, 3), (3, 3, 3, 4)])
def test_sums_of_other_pairs_are_refused(sizes):
    with pytest.raises(UserError, match=r"_logps: has the shape \(\d,\) beside \(\d,\) of what comes first"):
        dpo_loss(*map(jnp.zeros, sizes))
    with pytest.raises(UserError, match=r"(policy|reference)_\w+: has the shape"):
        make_pairs(*map(jnp.zeros, sizes))
    with pytest.raises(UserError, match=r"chosen_length: has the shape \(2,\) beside \(3,\)"):
        make_pairs(jnp.zeros(3), jnp.zeros(3), chosen_length=jnp.ones(2))
    with pytest.raises(UserError, match="policy_chosen_logps: a: must be numbers"):
        dpo_loss("a", 0.0, 0.0, 0.0)


def test_index_form_is_the_pair_form():
    pi, ref = f32(-1, -2, -3, -4), f32(-2, -2, -2, -2)
    better, worse = jnp.asarray([0, 0, 1]), jnp.asarray([1, 3, 2])
    by_index = dpo_loss_from_indices(pi, ref, better, worse, beta=0.3, label_smoothing=0.1)
    by_pair = dpo_loss(pi[better], pi[worse], ref[better], ref[worse], beta=0.3, label_smoothing=0.1)
    for one, other in zip(by_index, by_pair, strict=True):
        np.testing.assert_array_equal(one, other)


def test_low_precision_goes_in_and_float32_comes_out():
    half = jnp.asarray([-1.0], jnp.bfloat16)
    assert dpo_loss(half, half, half, half).losses.dtype == jnp.float32


def test_a_margin_shifts_the_decision():
    pairs = make_pairs(f32(3), f32(0), margin=0.3)
    np.testing.assert_allclose(objective_loss("sigmoid", pairs, beta=0.1).losses, np.log(2), rtol=1e-6)


def test_sft_looks_at_the_chosen_completion_alone():
    def loss(sums):
        return objective_loss("sft", make_pairs(*sums)).losses.sum()

    grads = jax.grad(loss)([f32(-2.0)] * 4)
    assert [float(grad[0]) for grad in grads] == [-1, 0, 0, 0]


def test_an_objective_is_had_by_name_and_refuses_what_it_does_not_take():
    pairs = make_pairs(f32(-10), f32(-30), chosen_length=f32(10), rejected_length=f32(10))
    found = objective_loss("simpo", pairs, beta=2.0, gamma=1.0)  # 2 (-1 - -3) - 1 = 3
    np.testing.assert_allclose([found.margins[0], found.losses[0]], [3.0, np.log1p(np.exp(-3.0))], rtol=1e-6)
    with pytest.raises(ValueError, match="tau: objective simpo does not use it; it takes beta, gamma"):
        objective_loss("simpo", pairs, tau=0.1)
    for name, words in {
        "rpo": "a sum .* sigmoid [+] sft_weight [*] sft; take .*'sigmoid'.*'sft'.* objective.name=rpo",
        "orpo": "sft [+] odds_weight [*] odds_ratio; .*'sft'.*'odds_ratio'.*",
        "dpo": "sigmoid is DPO",
        "SimPO": "did you mean simpo[?]",
    }.items():
        with pytest.raises(UserError, match=f"'{name}' is not an objective of the table.*{words}"):
            objective_loss(name, pairs)


PLAIN = make_pairs([-10.0], [-30.0])


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        *((name, {}, "chosen_length=") for name in ("ipo", "simpo", "sigmoid_norm", "rdpo", "odds_ratio")),
        ("sigmoid", {"ld_alpha": 0.5}, "shared="),
        ("sigmoid", {"weighting": "wpo"}, "alignment="),
        ("plackett_luce", {}, "ranking="),
    ],
)
def test_pairs_without_what_an_objective_looks_at_are_refused(name, settings, said):
    with pytest.raises(UserError, match=f"objective {name}: .*give make_pairs {said}"):
        objective_loss(name, PLAIN, **settings)
    with pytest.raises(UserError, match=said):
        jax.jit(lambda pairs: objective_loss(name, pairs, **settings).losses)(PLAIN)


def test_lengths_that_are_given_are_taken_and_what_needs_none_runs_without():
    assert objective_loss("ipo", make_pairs([-10.0], [-30.0], chosen_length=2, rejected_length=3)).losses.shape == (1,)
    assert objective_loss("sigmoid", PLAIN).losses.shape == (1,)
    with pytest.raises(UserError, match="chosen_length="):
        objective_loss("ipo", make_pairs([-10.0], [-30.0], chosen_length=2))


def test_lists_are_taken_like_arrays():
    sums = [-1.0, -4.0], [-2.0, -3.0], [-1.0, -1.0], [-1, -1]
    for one, other in zip(dpo_loss(*sums, beta=0.1), dpo_loss(*(f32(*part) for part in sums), beta=0.1), strict=True):
        np.testing.assert_array_equal(one, other)
    by_index = dpo_loss_from_indices([-1.0, -2.0, -3.0], [-2.0] * 3, [0, 0], [1, 2])
    wanted = dpo_loss_from_indices(f32(-1, -2, -3), f32(-2, -2, -2), jnp.array([0, 0]), jnp.array([1, 2]))
    np.testing.assert_array_equal(by_index.losses, wanted.losses)


@pytest.mark.parametrize(
    "wrong",
    [{"beta": -1.0}, {"beta": 0.0}, {"beta": np.float64(-0.1)}, {"beta": np.inf}, {"label_smoothing": 1.5}],
)
def test_numbers_out_of_range_are_refused_where_they_can_be_seen(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"{name}: .*: must be a"):
        dpo_loss(*[f32(-1.0)] * 4, **wrong)
    with pytest.raises(UserError, match=f"{name}: "):
        dpo_loss_from_indices(f32(-1, -2), f32(-1, -2), jnp.array([0]), jnp.array([1]), **wrong)
    slope = jax.grad(lambda beta: dpo_loss(f32(-1), f32(-2), f32(0), f32(0), beta=beta).losses.sum())(0.1)
    assert np.isfinite(slope)


NUMBERS = """
from dpo_jax import dpo_loss, make_pairs
for call in (
    lambda: dpo_loss(-1.0, -2.0, 0.0, 0.0, beta="0.1"),
    lambda: dpo_loss(-1.0, -2.0, 0.0, 0.0, beta=None),
    lambda: dpo_loss(-1.0 + 2j, -2.0, 0.0, 0.0),
    lambda: make_pairs(-1.0, -2.0, chosen_lengths=3),
):
    try:
        call()
    except ValueError as error:
        print(error)
"""


def test_what_is_no_number_or_no_field_is_refused_by_name():
    """In a process where annotations are not checked, as a user's."""
    done = subprocess.run([sys.executable, "-c", NUMBERS], capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines() == [
        "beta: '0.1': must be a number > 0, such as 0.1",
        "beta: None: must be a number > 0, such as 0.1",
        "policy_chosen_logps: is of complex64: must be real numbers, one for each pair",
        "chosen_lengths: is no field of Pairs; did you mean chosen_length?",
    ], done.stderr


def test_settings_of_a_new_objective_must_say_what_they_may_be():
    made = object.__new__(Objective)  # as the tests' own check of types looks at what a call is given
    object.__setattr__(made, "settings", {"beta": 0.1})
    with pytest.raises(UserError, match=r"settings: beta: 0.1: .*Setting\(0.1\)"):
        made.__post_init__()


def test_settings_may_be_traced():
    pairs = make_pairs(f32(-10), f32(-12))
    slope = jax.jit(jax.grad(lambda beta: objective_loss("sigmoid", pairs, beta=beta).losses.sum()))(jnp.float32(0.1))
    np.testing.assert_allclose(slope, -2 / (1 + np.exp(0.2)), rtol=1e-6)  # -gap S(-beta gap)
    with pytest.raises(ValueError, match="tau"):
        objective_loss("sigmoid", pairs, tau=jnp.float32(0.1))


def test_what_beta_dpo_draws_is_not_decided_by_rounding():
    """Where policy and reference agree, gaps are what float32 makes of 0: other devices must draw the same pairs."""
    noise = jax.random.uniform(jax.random.key(0), (64,))
    kept = []
    for seed in range(2):
        rounding = 1e-6 * jax.random.normal(jax.random.key(seed), (64,))
        pairs = make_pairs(rounding - 50.0, jnp.full(64, -60.0), -50.0, -60.0, noise=noise)
        kept.append(objective_loss("beta_dpo", pairs, keep_fraction=0.5).losses > 0)
    np.testing.assert_array_equal(*kept)
    assert kept[0].sum() == 32
