"""A reward model: the trunk of a language model and one score per text, in and out as transformers keeps it."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpo_jax import sample, sharding, trees
from dpo_jax.errors import UserError
from dpo_jax.hf import mapping
from dpo_jax.hf.checkpoint import load_hf, save_hf
from dpo_jax.hf.configs import read_spec
from dpo_jax.hf.names import LLAMA
from dpo_jax.hf.tensors import changed_files
from dpo_jax.model.decoder import Model, abstract_params, head_logits, head_of, init_params, logits, scalar_scores
from dpo_jax.training.optimizer import decay_mask
from tests.support.reward_folders import (
    ONE_LABEL,
    PAD,
    SUMS,
    TEXTS,
    all_tensors,
    causal_folder,
    config_of,
    moved,
    reward,
    scores,
    torch_folder,
    torch_scores,
)
from tests.support.tiny_folders import write_config, write_folder
from tests.support.tiny_rows import byte_tokenizer

# ------------------------------------------------------------------------------------------------ the model


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return read_spec(write_config(tmp_path_factory.mktemp("m") / "m", "llama"), scalar_head=True)


@pytest.mark.parametrize("tied", [False, True])
def test_a_scalar_head_stands_in_the_place_of_the_other(spec, tied):
    spec = dataclasses.replace(spec, tied=tied)
    leaves = trees.paths(abstract_params(spec))
    language_model = trees.paths(abstract_params(dataclasses.replace(spec, scalar_head=False, tied=True)))
    assert {name: leaf.shape for name, leaf in leaves.items()} == {
        **{name: leaf.shape for name, leaf in language_model.items()},
        "score/kernel": (spec.width, 1),
    }


def test_a_new_reward_model_gives_every_text_zero(spec):
    params = init_params(spec, jax.random.key(0))
    assert not params["score"]["kernel"].any()
    assert not scores(Model(spec, params)).any()
    # The trunk is that of the language model of the same key.
    other = init_params(dataclasses.replace(spec, scalar_head=False), jax.random.key(0))
    np.testing.assert_array_equal(params["embed"]["embedding"], other["embed"]["embedding"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_score_is_a_float32_sum(spec, dtype):
    states, kernel = (jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate([(7, 32), (32, 1)]))
    found = scalar_scores(spec, {"score": {"kernel": kernel}}, states)
    assert found.shape == (7,) and found.dtype == jnp.float32
    wanted = np.asarray(states, np.float64) @ np.asarray(kernel, np.float64)[:, 0]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)  # a sum in bfloat16 would be off by 1e-2


def test_each_head_is_asked_for_what_it_can_say(spec):
    params, states = init_params(spec, jax.random.key(0)), jnp.zeros((1, spec.width))
    for ask in (lambda: head_of(spec, params), lambda: head_logits(spec, params, states)):
        with pytest.raises(ValueError, match="has no head over the vocabulary; use scalar_scores"):
            ask()
    with pytest.raises(ValueError, match="no head over the vocabulary"):
        logits(spec, params, jnp.ones((1, 3), jnp.int32))
    with pytest.raises(ValueError, match="scores no texts; use head_logits"):
        scalar_scores(dataclasses.replace(spec, scalar_head=False), params, states)


@pytest.mark.parametrize("tied", [False, True])
def test_every_leaf_is_claimed_by_every_table(spec, tied):
    spec = dataclasses.replace(spec, tied=tied)
    params = abstract_params(spec)
    names = {part.leaf: entry.name for entry in mapping.names(spec, LLAMA) for part in entry.parts}
    assert names.keys() == trees.paths(params).keys() and names["score/kernel"] == "score.weight"
    assert not mapping.aliases(spec, LLAMA)
    assert trees.paths(decay_mask(params))["score/kernel"] is True
    if 32 % len(jax.devices()):
        return
    places = trees.paths(sharding.param_shardings(params, sharding.make_mesh(fsdp=-1)))
    assert places["score/kernel"].spec == jax.P("fsdp", None)


# ------------------------------------------------------------------------------------------------ config.json


def classifier(folder: Path, **changes) -> Path:
    return write_config(folder, "llama", **{"architectures": ["LlamaForSequenceClassification"], **changes})


@pytest.mark.parametrize(
    "labels",
    [
        {"id2label": {"0": "LABEL_0"}},
        {"id2label": {"0": "good"}, "label2id": {"good": 0}},
        {"num_labels": 1},
        {"id2label": None, "num_labels": 1},
        {"id2label": {"0": "LABEL_0"}, "num_labels": 1, "problem_type": "regression"},
    ],
)
def test_one_label_is_a_reward_model(labels, tmp_path):
    found = read_spec(classifier(tmp_path / "r", **labels))
    plain = read_spec(write_config(tmp_path / "p", "llama"))
    assert found == dataclasses.replace(plain, scalar_head=True) and not plain.scalar_head
    assert read_spec(tmp_path / "p", scalar_head=True) == read_spec(tmp_path / "r", scalar_head=True) == found
    assert read_spec(tmp_path / "p", scalar_head=False) == plain


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({}, "id2label = null: makes 2 labels, and a reward model has one; give"),
        ({"num_labels": 2}, "num_labels = 2: makes 2 labels"),
        ({"num_labels": 0}, "num_labels = 0: makes 0 labels"),
        ({"num_labels": True}, "num_labels = true: a whole number is wanted"),
        ({"num_labels": "1"}, 'num_labels = "1": a whole number is wanted'),
        ({"num_labels": None}, "num_labels = null: a whole number is wanted"),
        ({"id2label": {}}, "id2label = {}: makes 0 labels"),
        ({"id2label": {"0": "a", "1": "b"}}, r'id2label = {"0": "a", "1": "b"}: makes 2 labels'),
        ({"id2label": {"0": "a"}, "num_labels": 2}, "num_labels = 2: differs from the 1 entries of id2label"),
        ({"id2label": {"0": "a", "1": "b"}, "num_labels": 1}, "num_labels = 1: differs from the 2 entries of id2label"),
        ({"id2label": ["a"]}, "id2label = .*: a table of labels by number is wanted"),
        ({"num_labels": 1, "problem_type": "single_label_classification"}, "problem_type"),
        ({"architectures": ["LlamaForTokenClassification"]}, "architectures = .*ForTokenClassification.*one label"),
        ({"architectures": ["LlamaForCausalLM", "LlamaForSequenceClassification"]}, "architectures = "),
        ({"architectures": "LlamaForSequenceClassification"}, "architectures"),
    ],
)
@pytest.mark.parametrize("asked", [None, True])
def test_other_labels_and_classes_are_refused_by_name(labels, message, asked, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        read_spec(classifier(tmp_path / "m", **labels), scalar_head=asked)
    assert "\n" not in str(caught.value) and "config.json" in str(caught.value)


def test_labels_of_a_language_model_mean_nothing(tmp_path):
    folder = write_config(tmp_path / "m", "llama", num_labels=3, architectures=["LlamaForCausalLM"])
    assert not read_spec(folder).scalar_head


# ------------------------------------------------------------------------------------------------ against PyTorch


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
        ("mistral", {"sliding_window": 3}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 8}),
    ],
)
def test_scores_are_those_of_pytorch_and_its_folder_comes_back(family, changes, tmp_path):
    source = torch_folder(tmp_path / "source", family, **changes)
    model = load_hf(source)
    assert model.spec.scalar_head and "head" not in model.params
    wanted = torch_scores(source)
    assert np.abs(wanted).min() > 0.01 and len(set(wanted)) == len(TEXTS)
    np.testing.assert_allclose(scores(model), wanted, **SUMS)
    save_hf(model, tmp_path / "export", source)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "export" / name).read_bytes() == (source / name).read_bytes()
    assert np.abs(torch_scores(tmp_path / "export") - wanted).max() == 0.0


def test_two_labels_of_pytorch_are_refused(tmp_path):
    source = torch_folder(tmp_path / "source", "llama", num_labels=2)
    with pytest.raises(UserError, match="id2label = null: makes 2 labels"):
        load_hf(source)


@pytest.mark.parametrize(
    ("family", "dtype", "shards", "changes"),
    [
        ("llama", "float32", 1, {"tie_word_embeddings": True}),
        ("llama", "float32", 3, {}),
        ("mistral", "bfloat16", 1, {}),
        ("qwen2", "float16", 2, {"tie_word_embeddings": True}),
        ("qwen3", "float32", 1, {"head_dim": 8, "architectures": ...}),
    ],
)
def test_a_language_model_becomes_a_reward_model_that_pytorch_loads(family, dtype, shards, changes, tmp_path):
    source = causal_folder(tmp_path / "source", family, dtype, shards, **changes)
    assert not scores(reward(source)).any()
    model = moved(reward(source))
    save_hf(model, tmp_path / "export", source)
    assert changed_files(tmp_path / "export") == []
    again = load_hf(tmp_path / "export")
    assert again.spec == model.spec
    if dtype == "float32":
        assert np.abs(scores(again) - scores(model)).max() == 0.0
    np.testing.assert_allclose(scores(again), torch_scores(tmp_path / "export"), **SUMS)
    save_hf(again, tmp_path / "again", tmp_path / "export")
    for path in (tmp_path / "export").iterdir():
        if path.suffix == ".safetensors" or path.name in ("config.json", "model.safetensors.index.json"):
            assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_a_text_that_ends_in_the_padding_token_is_read_too_early_by_pytorch(tmp_path):
    """The reason for the order in which a padding token is looked for, and for what the model card says."""
    source = causal_folder(tmp_path / "source", pad_token_id=2)
    model = moved(reward(source))
    save_hf(model, tmp_path / "export", source)
    found = torch_scores(tmp_path / "export")
    ends = np.array([text[-1] == 2 for text in TEXTS])
    np.testing.assert_allclose(found, np.where(ends, scores(model, back=2), scores(model)), **SUMS)
    assert np.abs(found - scores(model))[ends].min() > 1e-2
    text = (tmp_path / "export/README.md").read_text()
    assert "Token 2 pads and may also end a text" in text
    config = config_of(tmp_path / "export")
    (tmp_path / "export/config.json").write_text(json.dumps({**config, "pad_token_id": PAD}))
    np.testing.assert_allclose(torch_scores(tmp_path / "export"), scores(model), **SUMS)


# ------------------------------------------------------------------------------------------------ loading


def test_the_trunk_of_a_language_model_is_taken_whole(tmp_path):
    source = causal_folder(tmp_path / "source", "qwen3", head_dim=8)
    plain, model = load_hf(source), reward(source)
    leaves = trees.paths(model.params)
    assert not leaves.pop("score/kernel").any()
    wanted = {name: leaf for name, leaf in trees.paths(plain.params).items() if not name.startswith("head/")}
    assert leaves.keys() == wanted.keys()
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, wanted[name])
    replaced = load_hf(source, spec=dataclasses.replace(plain.spec, scalar_head=True), dtype="bfloat16")
    assert replaced.spec == model.spec
    assert {leaf.dtype for leaf in jax.tree.leaves(replaced.params)} == {jnp.dtype("bfloat16")}


def test_a_new_head_and_one_that_is_read_go_to_their_places(tmp_path):
    count = len(jax.devices())
    if count < 2 or 32 % count:
        pytest.skip("needs several devices, a divisor of 32")
    source = causal_folder(tmp_path / "source")
    spec = read_spec(source, scalar_head=True)
    places = sharding.param_shardings(abstract_params(spec), sharding.make_mesh(fsdp=-1))
    fresh = load_hf(source, spec=spec, shardings=places)
    assert {n: leaf.sharding for n, leaf in trees.paths(fresh.params).items()} == trees.paths(places)
    kernel = jax.device_put(jnp.arange(32, dtype=jnp.float32)[:, None], places["score"]["kernel"])
    save_hf(Model(spec, {**fresh.params, "score": {"kernel": kernel}}), tmp_path / "export", source)
    read = load_hf(tmp_path / "export", shardings=places).params["score"]["kernel"]
    assert read.sharding == places["score"]["kernel"]
    np.testing.assert_array_equal(read, kernel)


def test_an_embedding_that_is_kept_under_the_heads_name_gets_its_own(tmp_path):
    source = causal_folder(tmp_path / "source", tie_word_embeddings=True)
    arrays = load_file(source / "model.safetensors")
    embedding = arrays["model.embed_tokens.weight"]
    save_file({**arrays, "lm_head.weight": embedding}, source / "model.safetensors")
    both = reward(source)
    save_file({**arrays, "lm_head.weight": embedding + 1}, source / "model.safetensors")
    with pytest.raises(UserError, match="differs from"):
        load_hf(source)
    reward(source)  # the head that differs is left out
    del arrays["model.embed_tokens.weight"]
    save_file({**arrays, "lm_head.weight": embedding}, source / "model.safetensors")
    model = reward(source)
    np.testing.assert_array_equal(model.params["embed"]["embedding"], both.params["embed"]["embedding"])
    save_hf(model, tmp_path / "export", source)
    found = all_tensors(tmp_path / "export")
    assert found.keys() == arrays.keys() | {"model.embed_tokens.weight", "score.weight"}
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], embedding)


@pytest.mark.parametrize("tied", [False, True])
def test_a_reward_model_is_not_read_as_a_language_model(tied, tmp_path):
    labelled = {**ONE_LABEL, "architectures": ["LlamaForSequenceClassification"], "tie_word_embeddings": tied}
    folder = write_folder(tmp_path / "m", **labelled)
    said = "'score.weight' is the head of a reward model, .* name a ...ForSequenceClassification in architectures"
    with pytest.raises(UserError, match=said):
        load_hf(folder, spec=dataclasses.replace(read_spec(folder), scalar_head=False))
    with pytest.raises(UserError, match="architectures = .*a reward model, which scores texts and writes none; give a"):
        read_spec(folder, scalar_head=False)
    for name in (["LlamaForCausalLM"], None):
        (folder / "config.json").write_text(json.dumps({**config_of(folder), "architectures": name}))
        with pytest.raises(UserError, match=said) as caught:
            load_hf(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", ["missing", "labels", "bias", "head", "trunk"])
def test_tensors_must_be_those_of_a_reward_model(change, tmp_path):
    labelled = {**ONE_LABEL, "architectures": ["LlamaForSequenceClassification"], "tie_word_embeddings": True}
    folder = write_folder(tmp_path / "m", **labelled)
    arrays = load_file(folder / "model.safetensors")
    match change:
        case "missing":
            del arrays["score.weight"]
            said = "'score.weight' is missing"
        case "labels":
            arrays["score.weight"] = np.zeros((2, 32), np.float32)
            said = r"'score.weight' has shape \[2, 32\], config.json asks for \[1, 32\]"
        case "bias":
            arrays["score.bias"] = np.zeros(1, np.float32)
            said = "'score.bias' .* belongs to nothing"
        case "head":
            arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
            said = "'lm_head.weight' .* belongs to nothing"
        case "trunk":
            del arrays["model.norm.weight"]
            said = "'model.norm.weight' is missing"
    save_file(arrays, folder / "model.safetensors")
    for spec in (None, read_spec(folder, scalar_head=True)):
        with pytest.raises(UserError, match=said):
            load_hf(folder, spec=spec)


def test_a_language_model_that_is_not_whole_gives_no_trunk(tmp_path):
    source = causal_folder(tmp_path / "source")
    arrays = load_file(source / "model.safetensors")
    for name in ("lm_head.weight", "model.layers.1.mlp.up_proj.weight"):
        save_file({n: array for n, array in arrays.items() if n != name}, source / "model.safetensors")
        with pytest.raises(UserError, match=f"'{name}' is missing"):
            reward(source)


def test_sample_asks_no_reward_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    labelled = {**ONE_LABEL, "architectures": ["LlamaForSequenceClassification"], "vocab_size": 264}
    folder = write_folder(tmp_path / "m", **labelled)
    (folder / "chat_template.jinja").unlink()
    byte_tokenizer().save_pretrained(folder)
    assert sample.main([str(folder), "--prompt", "Hi"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "a reward model, which scores texts and writes none" in err
