"""A run in float16 is the run in float32, but for rounding: its slopes neither vanish nor overflow for good."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import sharding
from dpo_jax.data.batches import Batches
from dpo_jax.errors import UserError
from dpo_jax.model import spec as specs
from dpo_jax.model.decoder import init_params
from dpo_jax.model.layers import ACTIVATIONS
from dpo_jax.model.weights import Weights
from dpo_jax.objectives.terms import make_terms
from dpo_jax.preference.loss import TrainingObjective, loss_and_gradient
from dpo_jax.training import loss_scale
from dpo_jax.training.checkpoints import Checkpoints
from dpo_jax.training.loss_scale import INTERVAL, NAMES, START, LossScale
from dpo_jax.training.optimizer import make_optimizer
from dpo_jax.training.settings import CheckpointSettings, OptimizerSettings
from dpo_jax.training.step import as_saved, fresh_state, from_saved, make_step
from tests.support.forests import SPEC, random_encoded, settled
from tests.support.tiers import by_pairs

ENCODED = random_encoded(units=12, completions=(2, 2), seed=3)
OBJECTIVES = {"one pass": {"name": "sigmoid"}, "two passes": {"name": "aot", "beta": 0.3}}
LAYOUTS = {"one micro-batch": {"micro_tokens": 4096}, "several": {"micro_tokens": 64}}


@functools.cache
def drawn(seed: int):
    """Weights that are large enough for a gradient to see all of them."""
    return jax.tree.map(lambda leaf: 3 * leaf, jax.jit(functools.partial(init_params, SPEC))(jax.random.key(seed)))


def objective(name="one pass", dtype="float16", **more) -> TrainingObjective:
    return TrainingObjective(SPEC, make_terms([OBJECTIVES[name] | more]), compute_dtype=dtype)


@functools.cache
def compiled(name, dtype, weight):
    return jax.jit(functools.partial(loss_and_gradient, objective(name, dtype, weight=weight)))


@functools.cache
def gradient(name="one pass", dtype="float16", scale=1.0, layout="one micro-batch", weight=1.0):
    """Loss, metrics and gradient of one step of all pairs."""
    batch = Batches(ENCODED, 12, 1, 1, **LAYOUTS[layout]).at(0)
    assert (int(batch.micro_batches) > 1) == (layout == "several")
    loss, metrics, slope, _ = compiled(name, dtype, weight)(
        Weights(drawn(0)), batch, drawn(1), scale=jnp.float32(scale)
    )
    return float(loss), jax.device_get(metrics), jax.device_get(slope)


def difference(a, b) -> float:
    """Norm of the difference of two trees, as a part of the second's."""
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, a, b)) / optax.tree.norm(b))


# ---------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    ("name", "layout"), by_pairs(list(itertools.product(OBJECTIVES, LAYOUTS)), [("one pass", "several")])
)
def test_a_scale_is_invisible_to_the_bit_where_nothing_overflows(name, layout):
    """In float32, in which a power of two rounds nothing: loss, metrics and every slope."""
    plain, scaled = (gradient(name, "float32", scale, layout) for scale in (1.0, 2.0**13))
    assert plain[0] == scaled[0]
    jax.tree.map(np.testing.assert_array_equal, plain[1:], scaled[1:])


@pytest.mark.nightly
def test_the_balance_of_experts_is_scaled_too():
    """Their part of the loss has its own way into the gradient, in one pass and in two."""
    mixed = dataclasses.replace(SPEC.layers[0], mlp=None, experts=specs.Experts(count=4, chosen=2, width=8))
    sparse = dataclasses.replace(SPEC, layers=(mixed,))
    params = init_params(sparse, jax.random.key(0))
    problem = TrainingObjective(sparse, router_aux=0.5, statistics=False)
    run = jax.jit(functools.partial(loss_and_gradient, problem))
    for layout in LAYOUTS.values():
        batch = Batches(ENCODED, 12, 1, 1, **layout).at(0)
        slopes = [run(Weights(params), batch, params, scale=jnp.float32(s))[2] for s in (1.0, 2.0**13)]
        jax.tree.map(np.testing.assert_array_equal, *slopes)


@pytest.mark.parametrize(
    ("name", "layout"),
    by_pairs(list(itertools.product(OBJECTIVES, LAYOUTS)), [("one pass", "several")]),
)
def test_the_gradient_in_float16_is_that_in_float32(name, layout):
    """To the 11 digits of a float16, some of which each layer takes."""
    loss, metrics, slope = gradient(name, "float16", START / 16, layout)
    expected = gradient(name, "float32")
    assert loss == pytest.approx(expected[0], rel=2e-3)
    assert metrics["kl"] == pytest.approx(expected[1]["kl"], rel=2e-2)
    assert difference(slope, expected[2]) < 5e-3
    assert {leaf.dtype.name for leaf in jax.tree.leaves(slope)} == {"float32"}


@pytest.mark.nightly
def test_without_a_scale_small_slopes_vanish():
    """What the scale is for: a term of weight 1e-5 has slopes that no float16 can say."""
    weak = functools.partial(gradient, weight=1e-5)
    expected = weak(dtype="float32")[2]
    assert difference(weak(scale=START)[2], expected) < 1e-2
    assert difference(weak()[2], expected) > 0.5


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_no_slope_of_an_activation_is_nan(name):
    """JAX's own cube of 200 is infinite in float16, and the slope of its GELU there zero times that."""
    x = jnp.asarray([-6e4, -300.0, -150.0, -12.0, 0.0, 12.0, 150.0, 250.0], jnp.float16)
    value, slope = jax.vmap(jax.value_and_grad(ACTIVATIONS[name]))(x)
    wide = x.astype(jnp.float32)
    expected, expected_slope = jax.vmap(jax.value_and_grad(ACTIVATIONS[name]))(wide)
    assert value.dtype == jnp.float16
    np.testing.assert_allclose(value.astype(jnp.float32), expected, rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(slope.astype(jnp.float32), expected_slope, rtol=2e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------------- the scale itself


def scale_after(steps, scale=START, good=0) -> LossScale:
    """The scale after steps that were finite, or were not."""
    found = LossScale(jnp.float32(scale), jnp.int32(good))
    for finite in steps:
        found = jax.jit(LossScale.after)(found, jnp.bool_(finite))
    return found


def test_the_scale_is_halved_at_once_and_doubled_in_time():
    assert (float(loss_scale.fresh().scale), int(loss_scale.fresh().good_steps)) == (2.0**16, 0)
    for steps, good, expected in (
        ([False], 0, (START / 2, 0)),
        ([False, False], 7, (START / 4, 0)),
        ([True], 0, (START, 1)),
        ([True], INTERVAL - 1, (2 * START, 0)),
        ([False], INTERVAL - 1, (START / 2, 0)),
        ([True, True], INTERVAL - 1, (2 * START, 1)),
        ([False, True], INTERVAL - 1, (START / 2, 1)),
    ):
        found = scale_after(steps, good=good)
        assert (float(found.scale), int(found.good_steps)) == expected
    assert float(scale_after([True], scale=2.0**127, good=INTERVAL - 1).scale) == 2.0**127


def test_the_scale_is_that_of_torch():
    torch = pytest.importorskip("torch")
    scaler = torch.amp.GradScaler("cpu", growth_interval=INTERVAL)
    assert (scaler._init_scale, scaler.get_growth_factor(), scaler.get_backoff_factor()) == (START, 2.0, 0.5)
    assert torch.amp.GradScaler("cpu").get_growth_interval() == INTERVAL


# ---------------------------------------------------------------------------------------------- steps


@functools.cache
def run_of(dtype="float16"):
    """The state before the first step, and what takes a state through steps; also the metrics of the last."""
    optimizer = make_optimizer(OptimizerSettings())
    step = jax.jit(make_step(objective(dtype=dtype), optimizer, lambda step: 1e-3, steps=6))
    batches = Batches(ENCODED, 4, 1, 6)

    def go(state, first, last):
        metrics = {}
        for number in range(first, last):
            state, metrics = step(state, Weights({}), drawn(1), batches.at(number))
        return state, metrics

    return settled(fresh_state(drawn(0), optimizer, scaled=dtype == "float16")), go


def scaled_by(state, scale: float, good: int = 0):
    return state | {"loss_scale": jnp.float32(scale), "good_steps": jnp.int32(good)}


def counts(state) -> tuple[int, int, int]:
    return tuple(int(state[name]) for name in ("step", "skipped", "consecutive_nonfinite"))


def test_steps_in_float16_are_those_in_float32():
    (half, go), (single, go_single) = run_of(), run_of("float32")
    found, metrics = go(half, 0, 6)
    expected, expected_metrics = go_single(single, 0, 6)
    moved, expected_moved = (jax.tree.map(jnp.subtract, state["trained"], drawn(0)) for state in (found, expected))
    # Adam takes the sign of slopes that are near zero, and those are what float16 says least of
    assert difference(moved, expected_moved) < 0.1
    assert metrics["loss"] == pytest.approx(float(expected_metrics["loss"]), rel=5e-3)
    assert metrics["grad_norm"] == pytest.approx(float(expected_metrics["grad_norm"]), rel=2e-2)
    assert set(found) - set(expected) == set(NAMES)
    assert set(metrics) - set(expected_metrics) == {"loss_scale"}


def test_an_overflow_skips_that_step_and_halves_the_scale():
    """However often it takes, without a row of non-finite steps: a smaller scale is all the remedy that it needs."""
    state, go = run_of()
    first, _ = go(state, 0, 1)
    scale, skipped = 2.0**40, 0
    state = scaled_by(first, scale, good=5)
    while True:
        after, metrics = go(state, 1, 2)
        assert float(metrics["loss_scale"]) == scale and math.isfinite(metrics["loss"])
        if math.isfinite(metrics["grad_norm"]):
            break
        skipped, scale = skipped + 1, scale / 2
        for name in ("trained", "optimizer"):
            jax.tree.map(np.testing.assert_array_equal, after[name], first[name])
        assert (float(after["loss_scale"]), int(after["good_steps"])) == (scale, 0)
        assert counts(after) == (1 + skipped, skipped, 0)
        assert float(metrics["nonfinite_streak"]) == 0
        state = after | {"step": first["step"], "skipped": jnp.int32(skipped)} | {"step": state["step"] + 1}
    assert skipped >= 10
    assert (float(after["loss_scale"]), int(after["good_steps"])) == (scale, 1)
    assert counts(after)[1:] == (skipped, 0)


def test_what_no_smaller_scale_can_mend_is_counted():
    """A loss that is not finite itself; and an overflow at a scale of one, or less."""
    state, go = run_of()
    broken = state | {"trained": jax.tree.map(lambda leaf: leaf * jnp.float32(np.nan), state["trained"])}
    after, metrics = go(broken, 0, 2)
    assert counts(after) == (2, 2, 2) and float(after["loss_scale"]) == START / 4
    assert not math.isfinite(metrics["loss"])
    for scale, consecutive in ((2.0, 0), (1.0, 1), (0.5, 1)):
        scaling = LossScale(jnp.float32(scale), jnp.int32(0))
        assert int(scaling.blamed(jnp.float32(0.7))) == 1 - consecutive
        assert not scaling.blamed(jnp.float32(np.inf))


def test_the_scale_grows_in_a_run():
    state, go = run_of()
    after, _ = go(scaled_by(state, 2.0**8, good=INTERVAL - 2), 0, 3)
    assert (float(after["loss_scale"]), int(after["good_steps"])) == (2.0**9, 1)


def test_stopping_and_going_on_is_never_having_stopped(tmp_path):
    """Through a checkpoint, with the scale on its way down and back: to the bit."""
    start, go = run_of()
    start = scaled_by(start, 2.0**24, good=7)
    whole, _ = go(start, 0, 6)
    half, _ = go(start, 0, 3)
    assert 0 < int(half["skipped"]) and float(half["loss_scale"]) < 2.0**24
    again = restored(tmp_path, half, target(start))
    jax.tree.map(np.testing.assert_array_equal, again, half)
    jax.tree.map(np.testing.assert_array_equal, go(again, 3, 6)[0], whole)


def target(state):
    whole = sharding.replicated(sharding.make_mesh(devices=jax.devices()[:1]))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), state)


def restored(folder, state, wanted):
    """A state through a checkpoint, into a run that wants these entries, as a run does it."""
    with Checkpoints(folder, CheckpointSettings(), say=print) as checkpoints:
        checkpoints.save(1, as_saved(state), {})
        there = loss_scale.fitted(wanted, checkpoints.entries(1))
        found, _ = checkpoints.restore(1, as_saved(there))
    return loss_scale.completed(from_saved(found), wanted)


def test_a_run_goes_on_in_float16_and_back(tmp_path):
    """Which checkpoint.allow_change may accept: the scale begins, or is gone; all else is as it was."""
    (half, go), (single, _) = run_of(), run_of("float32")
    half, _ = go(scaled_by(half, 8.0), 0, 1)
    back = restored(tmp_path / "back", half, target(single))
    assert set(back) == set(single)
    jax.tree.map(np.testing.assert_array_equal, back, {name: half[name] for name in single})
    onward = restored(tmp_path / "onward", single, target(half))
    assert (float(onward["loss_scale"]), int(onward["good_steps"])) == (START, 0)
    jax.tree.map(np.testing.assert_array_equal, {name: onward[name] for name in single}, single)
    go(onward, 0, 1)


def test_a_checkpoint_that_lacks_anything_else_is_refused(tmp_path):
    state, _ = run_of()
    less = {name: leaf for name, leaf in state.items() if name != "skipped"}
    with pytest.raises(UserError, match="leaf skipped is missing there"):
        restored(tmp_path, less, target(state))
