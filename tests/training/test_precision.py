"""Weights in bfloat16, smaller moments and other optimizers: what each keeps, and that it does what it says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import sharding, trees
from dpo_jax.config import run as config
from dpo_jax.data.batches import Batches
from dpo_jax.errors import UserError
from dpo_jax.model.decoder import cast, init_params
from dpo_jax.model.weights import Weights
from dpo_jax.preference.loss import TrainingObjective
from dpo_jax.training.optimizer import (
    apply_updates,
    make_optimizer,
    state_shardings,
    stochastically_rounded,
    to_float32,
)
from dpo_jax.training.settings import OptimizerSettings
from dpo_jax.training.step import MovingReference, fresh_state, make_step
from tests.support.forests import SPEC, random_encoded, settled

KEY = jax.random.key(7)
KINDS = {
    "bfloat16 weights": {"param_dtype": "bfloat16"},
    "bfloat16 weights and moment": {"param_dtype": "bfloat16", "moment_dtype": "bfloat16"},
    "lion": {"name": "lion", "moment_dtype": "bfloat16"},
    "adafactor": {"name": "adafactor", "param_dtype": "bfloat16"},
}


def test_the_mean_of_random_rounding_is_the_number():
    """Fixed key; the mean of n draws of a number p of the way between two neighbours is within 5 standard errors."""
    n, low = 40_000, np.float32(1.0)
    gap = np.float32(2.0**-7)
    for share in (0.01, 0.25, 0.5, 0.9):
        for sign in (1.0, -1.0):
            x = jnp.full((n,), sign * (low + share * gap), jnp.float32)
            drawn = np.asarray(stochastically_rounded(x, KEY), np.float64)
            assert set(np.abs(drawn)) == {low, low + gap}
            error = 5 * float(gap) * np.sqrt(share * (1 - share) / n)
            assert abs(drawn.mean() - float(x[0])) < error + 2.0**-24


def test_what_bfloat16_can_say_is_not_rounded():
    exact = jax.random.normal(KEY, (1000,)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(stochastically_rounded(exact.astype(jnp.float32), KEY), exact)


def test_small_updates_hold_on_average_where_rounding_to_nearest_loses_them():
    """100 steps of 5e-7 on weights of size 0.02, whose bfloat16 neighbours are 1e-4 apart."""
    start = (0.02 * jax.random.normal(KEY, (20_000,))).astype(jnp.bfloat16)
    rate, steps = jnp.float32(5e-7), 100
    direction = {"w": jnp.ones(start.shape)}

    def step(number, params):
        return apply_updates(params, direction, rate, jax.random.fold_in(KEY, number))

    moved = jax.lax.fori_loop(0, steps, step, {"w": start})["w"].astype(jnp.float32)
    nearest = start
    for _ in range(steps):
        nearest = (nearest.astype(jnp.float32) - rate).astype(jnp.bfloat16)
    asked, base = float(rate) * steps, start.astype(jnp.float32)
    assert float((base - moved).mean()) == pytest.approx(asked, rel=0.05)  # standard error 1 %: 20,000 x sqrt(2e-9)
    # of 1 % of the weights, those next to zero, nearest moves any at all
    assert float((nearest != start).mean()) < 0.05 and float((nearest == start).mean()) > 0.9


def quadratic(optimizer, key, steps=5):
    params = {"kernel": jax.random.normal(key, (160, 130)), "other": jnp.ones(3)}
    state = optimizer.init(params)
    for number in range(steps):
        gradient = jax.tree.map(lambda leaf, n=number: jnp.sin(leaf * (n + 1)), params)
        with jax.numpy_dtype_promotion("standard"):
            direction, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(lambda leaf, d: leaf - jnp.float32(1e-2) * d, params, direction)
    return params


@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        ({"name": "adafactor"}, optax.adafactor(None, multiply_by_parameter_scale=False)),
        ({"moment_dtype": "bfloat16"}, optax.adamw(-1.0, mu_dtype=jnp.bfloat16, weight_decay=0.0)),
        ({"name": "lion"}, optax.lion(-1.0, weight_decay=0.0)),
    ],
)
def test_each_optimizer_is_optaxs(settings, theirs):
    ours = make_optimizer(OptimizerSettings.model_validate({"clip_norm": None, **settings}))
    if settings.get("name") == "adafactor":  # which turns the sign, where a learning rate of -1 turns it back
        theirs = optax.chain(theirs, optax.scale(-1.0))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), quadratic(ours, KEY), quadratic(theirs, KEY))


@pytest.mark.parametrize("kind", ["adamw", "lion", "adafactor"])
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-30, 1.0, 1e17])
def test_an_update_is_finite_where_the_norm_of_gradients_is(kind, size):
    """Which is all that a step asks; also for the least gradients that float32 can say, and almost the largest."""
    settings = OptimizerSettings.model_validate({"name": kind, "weight_decay": 0.1, "clip_norm": None})
    if kind == "adamw":
        settings = settings.model_copy(update={"epsilon": 1e-30})
    params = {"mlp": {"kernel": jax.random.normal(KEY, (160, 130))}, "norm": {"scale": jnp.ones(3)}}
    optimizer = make_optimizer(settings)
    state = optimizer.init(params)
    for number in range(3):
        gradient = jax.tree.map(lambda leaf, n=number: jnp.cos(leaf * n) * jnp.float32(size), params)
        norm = optax.tree.norm(gradient)
        assert jnp.isfinite(norm)
        with jax.numpy_dtype_promotion("standard"):
            direction, state = optimizer.update(gradient, state, params, norm=norm)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((direction, state)))


@functools.cache
def fresh(seed):
    return jax.jit(functools.partial(init_params, SPEC))(jax.random.key(seed))


def run_of(kind, moving):
    """The state before the first step, and what takes a state through the steps of a run from one to another."""
    settings = OptimizerSettings.model_validate(KINDS[kind])
    optimizer = make_optimizer(settings)
    step = jax.jit(make_step(TrainingObjective(SPEC), optimizer, lambda step: 1e-3, steps=4, moving=moving, seed=3))
    batches = Batches(random_encoded(units=9, completions=(2, 2), seed=3), 4, 1, 4)

    def go(state, first, last):
        for number in range(first, last):
            state, _ = step(state, Weights({}), None if moving else fresh(1), batches.at(number))
        return state

    params = cast(fresh(0), jnp.dtype(settings.param_dtype))
    return settled(fresh_state(params, optimizer, reference=fresh(1) if moving else None)), go


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_stopping_and_going_on_is_never_having_stopped(kind):
    """The state is all there is: also with a reference that moves, and what random rounding draws."""
    moving = MovingReference(2, 0.5) if kind == "bfloat16 weights and moment" else None
    state, go = run_of(kind, moving)
    whole, half = go(state, 0, 4), jax.device_get(go(state, 0, 2))
    again = go(jax.tree.map(jnp.asarray, half), 2, 4)
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(whole["trained"])}
    assert dtypes == {"float32", KINDS[kind].get("param_dtype", "float32")}
    assert moving is None or {leaf.dtype.name for leaf in jax.tree.leaves(whole["reference"])} == {"float32"}


def test_moments_have_the_dtype_that_is_asked_for_and_the_second_is_float32():
    params = cast(init_params(SPEC, KEY), jnp.bfloat16)
    settings = OptimizerSettings(moment_dtype="bfloat16", param_dtype="bfloat16")
    found = fresh_state(params, make_optimizer(settings))["optimizer"]
    (adam,) = [part for part in found if hasattr(part, "mu")]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(adam.mu)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(adam.nu)} == {"float32"}


def test_rounding_is_alike_on_every_device():
    """The same numbers are drawn however weights are split; only the sums of gradients differ, by reassociation."""
    mesh = sharding.make_mesh(1, 2, 2, jax.devices()[:4])
    x = jax.random.normal(KEY, (64, 32))
    split = jax.device_put(x, jax.NamedSharding(mesh, jax.P("fsdp", "tensor")))
    rounded = jax.jit(stochastically_rounded)
    np.testing.assert_array_equal(rounded(split, KEY), rounded(x, KEY))


def test_factored_moments_are_split_like_the_axes_they_have_left():
    spec = dataclasses.replace(SPEC, width=256, vocab_size=512)
    params = jax.eval_shape(lambda: init_params(spec, KEY))
    mesh = sharding.make_mesh(1, 2, 2, jax.devices()[:4])
    state = jax.eval_shape(make_optimizer(OptimizerSettings(name="adafactor")).init, params)
    whole = sharding.replicated(mesh)
    places = state_shardings(state, params, sharding.param_shardings(params, mesh), whole)
    factored = next(part for part in places if hasattr(part, "v_row"))
    (shapes,) = [part for part in state if hasattr(part, "v_row")]
    assert trees.paths(shapes.v_row)["embed/embedding"].shape == (256,)
    assert trees.paths(factored.v_row)["embed/embedding"].spec == jax.P("fsdp")
    assert trees.paths(factored.v_col)["embed/embedding"].spec == jax.P("tensor")
    assert trees.paths(factored.v)["embed/embedding"] == whole  # a placeholder of one number
    jax.tree.map(lambda leaf, place: place.shard_shape(leaf.shape), state, places)  # every part is a whole number


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["optimizer.name=adafactor", "optimizer.moment_dtype=bfloat16"], "only adamw and lion would use it"),
        (["optimizer.name=adafactor", "optimizer.beta1=0.8"], "only adamw and lion would use it"),
        (["optimizer.name=lion", "optimizer.epsilon=1e-6"], "only adamw would use it"),
    ],
)
def test_a_setting_that_the_optimizer_would_ignore_is_refused(given, line):
    base = ["model.path=m", "data.train=d", "output=o"]
    with pytest.raises(UserError, match=line):
        config.load([*base, *given])
    run = config.load([*base, given[0]])
    assert config.Run.model_validate(config.dump(run)) == run
    assert config.load([*base, "optimizer.name=lion"]).optimizer.beta2 == 0.99


def test_wide_is_float32():
    assert {leaf.dtype.name for leaf in jax.tree.leaves(to_float32(cast(init_params(SPEC, KEY), jnp.bfloat16)))} == {
        "float32"
    }
