"""The policy of a run: divided and held as its settings say, and described as it will be."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from dpo_jax import sharding, trees
from dpo_jax.evaluation.models import open_model
from dpo_jax.hf.configs import read_spec
from dpo_jax.model.settings import AdapterSettings, MeshSettings, ModelSettings
from dpo_jax.model.weights import Weights
from dpo_jax.objectives.terms import make_terms
from dpo_jax.preference.loss import TrainingObjective
from dpo_jax.run import models, recorder, reference
from dpo_jax.run.policy import Policy
from dpo_jax.run.sources import Sources
from dpo_jax.training import reference as references
from tests.support.forests import SPEC, random_encoded
from tests.support.threads import everywhere
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


ADAPTERS = {
    "lora": {"rank": 4, "layers": (1, 2), "rank_pattern": {"q_proj": 2}, "dropout": 0.1},
    "dora": {"rank": 4, "targets": ("q_proj", "down_proj"), "dora": True, "modules_to_save": (".*norm/scale",)},
}


def policy(folder, freeze=(), dtype="float32", *, compute="float32", **adapter):
    sources = Sources(folder, folder, {}, True)
    settings = ModelSettings(path=str(folder), freeze=freeze), AdapterSettings(**adapter)
    return Policy.of(sources, *settings, compute_dtype=compute, param_dtype=dtype, scalar_head=False)


def loaded(folder, freeze, dtype="float32", mesh=None):
    found = policy(folder, freeze, dtype)
    return found.spec, found.load(mesh or mesh_of(1, 1, 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FREEZES)
def test_what_is_described_is_what_is_loaded(folder, name, dtype):
    weights = check_described(policy(folder, FREEZES[name], dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves(weights.frozen)} <= {jnp.dtype("float32")}
    assert trees.num_parameters(weights) == trees.num_parameters(loaded(folder, ())[1])


def check_described(found):
    mesh = mesh_of(1, 2, 2)
    weights, described = found.load(mesh), found.abstract(mesh)
    assert jax.tree.structure(weights) == jax.tree.structure(described)
    for leaf, shape in zip(*map(jax.tree.leaves, (weights, described)), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
    return weights


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_trained_in_float32_beside_a_base_in_the_dtype_of_computation(folder, name, compute):
    found = policy(folder, compute=compute, **ADAPTERS[name])
    weights = check_described(found)
    assert {leaf.dtype for leaf in jax.tree.leaves(weights.trained)} == {jnp.dtype("float32")}
    kernels = {path: leaf for path, leaf in trees.paths(weights.frozen).items() if path.endswith("kernel")}
    assert {leaf.dtype for leaf in kernels.values()} == {jnp.dtype(compute)}
    whole = {path for path in trees.paths(weights.trained) if "/lora/" not in path}
    assert whole == ({path for path in trees.paths(weights.params) if path.endswith("norm/scale")} if whole else set())
    again, other = jax.device_get((found.load(mesh_of(1, 1, 1), 0), found.load(mesh_of(1, 1, 1), 1)))
    weights = jax.device_get(weights)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=3e-7), weights, again)  # norms: order of a sum
    drawn = [leaf for path, leaf in trees.paths(other.trained).items() if path.endswith("/a")]
    assert not any(
        (one == leaf).all()
        for one, leaf in zip(
            (leaf for path, leaf in trees.paths(weights.trained).items() if path.endswith("/a")), drawn, strict=True
        )
    )


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
    copied = reference._copied(weights.params, {}, "float32")

    def buffers(tree):
        return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}

    assert not buffers(copied) & buffers(weights)
    jax.tree.map(np.testing.assert_array_equal, copied, weights.params)


def test_the_reference_of_an_adapter_is_its_base_and_no_copy_of_it(folder):
    found = policy(folder, **ADAPTERS["lora"])
    weights = found.load(mesh_of(1, 1, 1))
    params = found.reference(weights, "start")
    assert not any("/lora/" in path for path in trees.paths(params))
    held = trees.paths(reference._copied(params, weights.frozen, "float32"))
    assert all(leaf is held[path] for path, leaf in trees.paths(params).items())


def test_the_digest_of_weights_is_of_those_that_are_there_now(tmp_path):
    """Also in one process, which has seen other weights under the same path."""
    one = models.weights_digest(write_folder(tmp_path / "model", "llama", "float32"))
    assert models.weights_digest(tmp_path / "model") == one
    shutil.rmtree(tmp_path / "model")
    assert models.weights_digest(write_folder(tmp_path / "model", "llama", "bfloat16")) != one


def test_the_cached_reference_has_a_name_by_what_changes_its_numbers():
    """The margin of a pair does not; what it is computed by does."""
    encoded = random_encoded(3, seed=0)
    other = dataclasses.replace(encoded, margin=encoded.margin + 1, weight=2 * encoded.weight, label=1 - encoded.label)
    tokens = dataclasses.replace(encoded, tokens=encoded.tokens + 1)
    key = references.cache_key("weights", encoded, "bfloat16 gpu cudnn")
    assert references.cache_key("weights", other, "bfloat16 gpu cudnn") == key
    assert references.data_digest(other) != references.data_digest(encoded)  # a run's facts have the pairs' numbers
    others = [("more", encoded, "bfloat16 gpu cudnn"), ("weights", tokens, "bfloat16 gpu cudnn")]
    others += [("weights", encoded, computed) for computed in ("bfloat16 gpu xla", "bfloat16 cpu cudnn", "float32 gpu")]
    assert key not in {references.cache_key(*each) for each in others}


def test_the_precision_of_products_is_that_of_the_run_and_not_of_the_one_before():
    before = jax.config.jax_default_matmul_precision
    try:
        for dtype, precision in (("float32", "highest"), ("bfloat16", None), ("float16", None), ("float32", "highest")):
            models.make_mesh(MeshSettings(), ModelSettings(path="m", compute_dtype=dtype))
            assert jax.config.jax_default_matmul_precision == precision
    finally:
        jax.config.update("jax_default_matmul_precision", before)


def test_alarms_see_of_a_record_what_they_saw_of_the_step():
    """The part that balances experts is no preference; what was not finite is null in a record."""
    balanced = TrainingObjective(SPEC, router_aux=0.5)
    metrics = {"loss": 0.9, "aux_loss": 0.4, "kl": 0.1}
    assert recorder._watched(balanced, metrics) == {"loss": pytest.approx(0.7), "aux_loss": 0.4, "kl": 0.1}
    assert recorder._watched(balanced, {"loss": None, "aux_loss": None}) == {"loss": None, "aux_loss": None}


def test_an_answer_is_computed_with_the_weights_that_training_computes_with(folder):
    """In bfloat16 norm scales stay in float32."""
    model = open_model(str(folder), dtype="bfloat16")
    kinds = {path: str(leaf.dtype) for path, leaf in trees.paths(model.params).items()}
    assert kinds["final_norm/scale"] == "float32" and kinds["embed/embedding"] == "bfloat16"


@pytest.mark.parametrize("together", [True, False])
def test_the_digest_of_weights_is_that_of_one_process_and_a_piece_that_all_see_is_read_by_one(
    tmp_path, monkeypatch, together
):
    read, names = [], [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    for process in "0", "1":
        (tmp_path / process).mkdir()
        for number, name in enumerate(names):
            save_file({f"part{number}": np.full(3, number, np.float32)}, tmp_path / process / name)
        parts = {f"part{number}": name for number, name in enumerate(names)}
        (tmp_path / process / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    monkeypatch.setattr(models, "PIECE", 40)
    alone = models.weights_digest(tmp_path / "0")
    digest = models._digest_of.__wrapped__  # what one thread has kept, another finds: processes do not
    monkeypatch.setattr(models, "_digest_of", lambda *piece: read.append(piece) or digest(*piece))

    def looks(place):
        return models.weights_digest(tmp_path / ("0" if together else str(place.process)), place)

    assert everywhere(looks, 2) == [alone] * 2
    pieces = sum(-(-(tmp_path / "0" / name).stat().st_size // 40) for name in names)
    assert len(read) == len(set(read)) == pieces * (1 if together else 2)
    (tmp_path / "0" / names[0]).write_bytes((tmp_path / "0" / names[1]).read_bytes())
    assert everywhere(looks, 2)[0] != alone
