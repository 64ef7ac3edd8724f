"""The policy of a run: divided and held as its settings say, and described as it will be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import sharding, trees
from dpo_jax.hf.configs import read_spec
from dpo_jax.model.settings import ModelSettings
from dpo_jax.model.weights import Weights
from dpo_jax.objectives.terms import make_terms
from dpo_jax.run import models, reference
from tests.support.tiny_folders import write_folder

FREEZES = {
    "nothing": (),
    "half a stack": ("layers/[01]/.*",),
    "all but the head": ("embed/.*", "layers/.*", "final_norm/.*"),
    "the head": ("head/.*",),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy") / "model"
    write_folder(folder, "llama", "bfloat16", tie_word_embeddings=False)
    return folder


def mesh_of(data, fsdp, tensor):
    return sharding.make_mesh(data, fsdp, tensor, devices=jax.devices()[: data * fsdp * tensor])


def loaded(folder, freeze, dtype="float32", mesh=None):
    settings = ModelSettings(path=str(folder), freeze=freeze)
    return models.load_policy(settings, folder, mesh or mesh_of(1, 1, 1), dtype, scalar_head=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FREEZES)
def test_what_is_described_is_what_is_loaded(folder, name, dtype):
    mesh = mesh_of(1, 2, 2)
    spec, weights = loaded(folder, FREEZES[name], dtype, mesh)
    described = models.abstract_policy(spec, FREEZES[name], mesh, dtype)
    assert jax.tree.structure(weights) == jax.tree.structure(described)
    for leaf, shape in zip(*map(jax.tree.leaves, (weights, described)), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
    assert {leaf.dtype for leaf in jax.tree.leaves(weights.frozen)} <= {jnp.dtype("float32")}
    assert trees.num_parameters(weights) == trees.num_parameters(loaded(folder, ())[1])


@pytest.mark.parametrize("name", FREEZES)
def test_a_frozen_head_takes_the_head_that_has_no_gradient(folder, name):
    spec, weights = loaded(folder, FREEZES[name])
    settings = ModelSettings(path=str(folder))
    objective = models.make_objective(settings, make_terms([{"name": "sigmoid"}]), spec, weights, mesh_of(1, 1, 1))
    assert objective.execution.frozen_head is (name == "the head")


def test_a_head_whose_bias_alone_is_trained_is_not_frozen(folder):
    head = {"embedding": jnp.zeros(1), "bias": jnp.zeros(1)}
    apart = Weights({"head": {"bias": head["bias"]}}, {"head": {"embedding": head["embedding"]}})
    assert not models.head_is_frozen(read_spec(folder), apart)
    assert models.head_is_frozen(read_spec(folder), Weights({}, {"head": head}))


def test_log_probabilities_of_other_weights_have_other_names(folder):
    """In float32, of weights kept in bfloat16, it matters which are frozen, as those are kept in float32."""

    def kind(freeze, dtype, compute_dtype="float32"):
        spec, weights = loaded(folder, freeze, dtype)
        settings = ModelSettings(path=str(folder), compute_dtype=compute_dtype)
        terms = make_terms([{"name": "sigmoid"}])
        return reference._computed_in(weights, models.make_objective(settings, terms, spec, weights, mesh_of(1, 1, 1)))

    assert {kind(freeze, "float32") for freeze in FREEZES.values()} == {"float32"}
    assert {kind(freeze, "bfloat16", "bfloat16") for freeze in FREEZES.values()} == {"bfloat16"}
    assert kind((), "bfloat16") == "float32 of bfloat16"
    assert len({kind(freeze, "bfloat16") for freeze in FREEZES.values()}) == len(FREEZES)


@pytest.mark.parametrize("name", FREEZES)
def test_a_live_copy_of_the_policy_shares_no_buffer_with_it(folder, name):
    """Those of a reference that moves are given away with the state, so frozen ones must not be among them."""
    _, weights = loaded(folder, FREEZES[name])
    copied = reference._copied(weights, "float32")

    def buffers(tree):
        return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}

    assert not buffers(copied) & buffers(weights)
    jax.tree.map(np.testing.assert_array_equal, copied, weights.params)
