"""What is trained and what is not: two trees that are the model together, and a step that moves one of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import trees
from dpo_jax.data.batches import Batches
from dpo_jax.errors import UserError
from dpo_jax.model.decoder import init_params
from dpo_jax.model.weights import Weights, divided, layer_paths, what_is_trained
from dpo_jax.objectives.terms import make_terms
from dpo_jax.preference.loss import TrainingObjective, loss_and_gradient
from dpo_jax.training.optimizer import apply_updates, make_optimizer
from dpo_jax.training.settings import OptimizerSettings
from dpo_jax.training.step import fresh_state, make_step
from tests.support.forests import SPEC as MIXED
from tests.support.forests import random_encoded
from tests.support.tiers import night

SPEC = dataclasses.replace(MIXED, layers=(MIXED.layers[0],) * 4)  # one stack of four layers
ENCODED = random_encoded(units=4)
LAST = len(SPEC.layers) - 1
FREEZES = {
    "all but the head": (r"embed/.*", r"layers/.*", r"final_norm/.*"),
    "the first half of the layers": (rf"layers/[0-{(LAST - 1) // 2}]/.*",),
    "the last layer": (rf"layers/{LAST}/.*",),
    "every second leaf of a layer": (r"layers/\d+/mlp/.*", r"layers/0/attention/query/kernel"),
}


@pytest.fixture(scope="module")
def params():
    return init_params(SPEC, jax.random.key(0))


def zeroed(tree, trained):
    """The tree with zeros where nothing is trained."""
    table = {}
    for path, leaf in trees.paths(tree).items():
        which = np.asarray(trained[path], np.float32)
        table[path] = leaf * which.reshape(-1, *(1,) * (leaf.ndim - 1)) if which.ndim else leaf * which
    return trees.from_paths(table)


@pytest.mark.parametrize("name", FREEZES)
def test_the_two_trees_are_the_model(params, name):
    weights = divided(params, what_is_trained(SPEC, FREEZES[name]))
    jax.tree.map(np.testing.assert_array_equal, weights.params, params)
    assert trees.num_parameters(weights.trained) + trees.num_parameters(weights.frozen) == trees.num_parameters(params)
    shapes = jax.eval_shape(lambda tree: tree, params)
    described = jax.eval_shape(lambda tree: divided(tree, what_is_trained(SPEC, FREEZES[name])), shapes)
    assert jax.tree.map(jnp.shape, weights) == jax.tree.map(lambda leaf: leaf.shape, described)


def test_where_nothing_is_frozen_the_trained_tree_is_the_model(params):
    weights = divided(params, what_is_trained(SPEC, ()))
    assert weights.frozen == {} and weights.rows == ()
    assert all(one is other for one, other in zip(*map(jax.tree.leaves, (weights.params, params)), strict=True))


def objective_of(name):
    return TrainingObjective(SPEC, make_terms([{"name": name}]), statistics=False)


@functools.cache
def solving(objective):
    return jax.jit(functools.partial(loss_and_gradient, objective_of(objective)))


@pytest.mark.parametrize(
    ("name", "objective"), [*((name, "sigmoid") for name in FREEZES), night("the first half of the layers", "aot")]
)
def test_trained_leaves_move_as_in_a_full_run_with_the_other_gradients_zeroed(params, name, objective):
    """To 1e-6 of steps of 1e-2: only the order of sums differs, and what Adam makes of it.

    Weight decay would move what has no gradient in the full run; there is none here.
    """
    trained = what_is_trained(SPEC, FREEZES[name])
    optimizer = make_optimizer(OptimizerSettings(clip_norm=0.5, epsilon=1e-3))
    batch, reference = Batches(ENCODED, 4, 1, 1, micro_tokens=128).at(0), init_params(SPEC, jax.random.key(1))
    weights = divided(params, trained)
    step = jax.jit(make_step(objective_of(objective), optimizer, lambda step: 1e-2, steps=2))
    state = fresh_state(weights.trained, optimizer)
    whole, moments = params, optimizer.init(params)
    for _ in range(2):
        state, metrics = step(state, Weights({}, weights.frozen, weights.rows), reference, batch)
        loss, _, gradient, _ = solving(objective)(Weights(whole), batch, reference)
        gradient = zeroed(gradient, trained)
        assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-6)
        with jax.numpy_dtype_promotion("standard"):
            directions, moments = optimizer.update(gradient, moments, whole, norm=optax.tree.norm(gradient))
        whole = zeroed_update(whole, directions, trained)
    found = Weights(state["trained"], weights.frozen, weights.rows).params
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6), found, whole)
    jax.tree.map(np.testing.assert_array_equal, divided(found, trained).frozen, weights.frozen)
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (state["trained"], weights.trained)), strict=True))


def zeroed_update(params, directions, trained):
    return apply_updates(params, zeroed(directions, trained), jnp.float32(1e-2), jax.random.key(0))


def test_moments_are_those_of_what_is_trained(params):
    weights = divided(params, what_is_trained(SPEC, FREEZES["all but the head"]))
    state = fresh_state(weights.trained, make_optimizer(OptimizerSettings()))
    kept = trees.num_parameters(weights.trained)
    assert kept == trees.num_parameters(params["head"]) < trees.num_parameters(params)
    assert 2 * kept <= trees.num_parameters(state["optimizer"]) <= 2 * kept + 2


def test_names_are_those_of_layers():
    names = layer_paths(SPEC)
    assert names["embed/embedding"] == ["embed/embedding"]
    assert names["blocks/0/mlp/up/kernel"] == [f"layers/{n}/mlp/up/kernel" for n in range(4)]


@pytest.mark.parametrize(
    ("freeze", "words"),
    [
        (("layers/9/.*",), ("layers/9/.*", "matches no leaf", "layers/N/mlp/up/kernel")),
        (("layers/(",), ("layers/(", "no regular expression")),
        ((".*",), ("freezes all of the model",)),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused(freeze, words):
    with pytest.raises(UserError, match="^model.freeze: ") as caught:
        what_is_trained(SPEC, freeze)
    assert all(word in str(caught.value) for word in words)
