"""Rows for tokens that were added: the mean of the old ones, tied or not, back in PyTorch; and never unasked."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dpo_jax import sharding
from dpo_jax.errors import UserError
from dpo_jax.hf import resize
from dpo_jax.hf.checkpoint import load_hf, save_hf
from dpo_jax.hf.configs import read_spec
from dpo_jax.hf.verify import our_logits, token_rows
from dpo_jax.model.decoder import Model, abstract_params
from tests.support.tiny_folders import write_folder

OLD, NEW = 96, 101


def grown_model(folder, **options) -> Model:
    return load_hf(folder, spec=resize.with_rows(read_spec(folder), folder, NEW), **options)


@pytest.fixture(params=["tied", "own head", "reward"])
def folder(request, tmp_path):
    return write_folder(
        tmp_path / "m", num_hidden_layers=1, tie_word_embeddings=request.param == "tied", dtype="bfloat16", shards=2
    )


def test_new_rows_are_the_mean_of_the_old_ones(folder):
    old, new = load_hf(folder), grown_model(folder)
    assert new.spec == dataclasses.replace(old.spec, vocab_size=NEW)
    for part in {"embed", "head"} & old.params.keys():
        before, after = old.params[part]["embedding"], new.params[part]["embedding"]
        np.testing.assert_array_equal(after[:OLD], before)
        wanted = np.tile(np.asarray(before).mean(0), (NEW - OLD, 1))
        np.testing.assert_allclose(after[OLD:], wanted, rtol=1e-5, atol=1e-7)


def test_on_several_devices_they_are_the_same(folder):
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    spec = resize.with_rows(read_spec(folder), folder, NEW)
    placed = grown_model(folder, shardings=sharding.param_shardings(abstract_params(spec), mesh))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), placed.params, grown_model(folder).params
    )


def test_the_export_keeps_them_and_pytorch_reads_it(folder, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = grown_model(folder)
    moved = Model(model.spec, jax.tree.map(lambda leaf: leaf + 1 / 64, model.params))
    save_hf(moved, tmp_path / "export", folder)
    assert json.loads((tmp_path / "export" / "config.json").read_text())["vocab_size"] == NEW
    again = load_hf(tmp_path / "export")
    for ours, theirs in zip(jax.tree.leaves(moved.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(jnp.asarray(ours, jnp.bfloat16), jnp.asarray(theirs, jnp.bfloat16))
    found, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    rows = token_rows(NEW)
    rows[:, -3:] = NEW - 1
    with torch.no_grad():
        wanted = found(torch.tensor(rows)).logits.numpy()
    np.testing.assert_allclose(our_logits(again, rows), wanted, atol=2e-4)


def test_what_did_not_change_comes_back_bit_for_bit(folder, tmp_path):
    save_hf(grown_model(folder), tmp_path / "export", folder)
    for file in folder.glob("*.safetensors"):
        before, after = load_file(file), load_file(tmp_path / "export" / file.name)
        assert before.keys() == after.keys()
        assert all(before[name].tobytes() == after[name][: len(before[name])].tobytes() for name in before)


def test_a_bias_of_the_head_grows_too(tmp_path):
    folder = write_folder(
        tmp_path / "m",
        "phi",
        num_hidden_layers=1,
        num_key_value_heads=4,
        rms_norm_eps=...,
        layer_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    old, new = load_hf(folder), grown_model(folder)
    bias = new.params["head"]["bias"]
    assert bias.shape == (NEW,)
    np.testing.assert_allclose(bias[OLD:], np.asarray(old.params["head"]["bias"]).mean(), rtol=1e-5)


def test_nothing_is_resized_that_has_its_rows_or_is_not_asked(folder):
    spec = read_spec(folder)
    assert all(resize.with_rows(spec, folder, rows) == spec for rows in (None, 1, OLD))


def test_what_cannot_be_resized_is_refused_by_name(folder, monkeypatch):
    spec = read_spec(folder)
    with pytest.raises(UserError, match=f"model.resize_embedding: {folder} .*200 tokens are more than 2 for each"):
        resize.with_rows(spec, folder, 200)
    with pytest.raises(UserError, match="a second table of tokens"):
        resize.with_rows(dataclasses.replace(spec, inputs_vocab=OLD), folder, NEW)
    monkeypatch.setattr(resize, "is_wrapper", lambda _: True)
    with pytest.raises(UserError, match="a part of a larger model"):
        resize.with_rows(spec, folder, NEW)
