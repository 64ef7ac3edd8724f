"""Export inverts import: what was not trained comes back bit for bit, and nothing that stood at the target is lost."""

import dataclasses
import errno
import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dpo_jax import trees
from dpo_jax.errors import UserError
from dpo_jax.hf import shards, tensors
from dpo_jax.hf.card import HUB_ID, base_name, model_card
from dpo_jax.hf.checkpoint import load_hf, save_hf
from dpo_jax.hf.tensors import Tensors, changed_files, weights_digest
from dpo_jax.model.decoder import Model, logits
from tests.support.tiny_folders import random_tensors, write_config, write_folder

ADDED = {"README.md", "dpo_jax.json", "SHA256SUMS"}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def all_tensors(folder: Path) -> dict[str, np.ndarray]:
    source = Tensors(folder)
    return {name: source.read(name) for name in source.infos}


def bits(array: np.ndarray) -> tuple:
    return array.dtype, array.shape, array.tobytes()


def trained(model: Model) -> Model:
    """Every weight moved a little."""
    return Model(model.spec, jax.tree.map(lambda leaf: leaf + 0.01, model.params))


# ------------------------------------------------------------------------------------------------ bit for bit


@pytest.mark.parametrize(
    ("family", "dtype", "shards", "changes"),
    [
        ("llama", "float32", 1, {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
        ("llama", "float16", 3, {"attention_bias": True, "mlp_bias": True}),
        ("mistral", "bfloat16", 2, {"sliding_window": 4}),
        ("qwen2", "bfloat16", 1, {"tie_word_embeddings": True}),
        ("qwen3", "float16", 1, {"head_dim": 8}),
    ],
)
def test_a_folder_comes_back_byte_for_byte(family, dtype, shards, changes, tmp_path):
    source = write_folder(tmp_path / "source", family, dtype, shards, **changes)
    save_hf(load_hf(source), tmp_path / "export", source)
    before, after = files(source), files(tmp_path / "export")
    assert before.keys() - {"pytorch_model.bin"} == (after.keys() - ADDED) | {"README.md"}
    for name in after.keys() - ADDED:
        assert after[name] == before[name], name
    assert changed_files(tmp_path / "export") == []


@pytest.mark.parametrize("family", ["llama", "llama_bias", "mistral", "qwen2", "qwen3"])
def test_a_folder_that_pytorch_wrote_comes_back_byte_for_byte(family, shared, tmp_path):
    source = shared / "families" / family
    save_hf(load_hf(source), tmp_path / "export", source)
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "export" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@given(st.integers(0, 2**16 - 1))
@settings(max_examples=300, deadline=None)
def test_float32_keeps_every_half_precision_number(dtype, pattern):
    number = np.array([pattern], np.uint16).view(tensors.DTYPES[{"float16": "F16", "bfloat16": "BF16"}[dtype]])
    if tensors.non_finite(number):
        return
    assert bits(np.asarray(number.astype(np.float32)).astype(number.dtype)) == bits(number)


def test_non_finite_numbers_are_counted_in_every_dtype():
    for dtype in tensors.DTYPES.values():
        values = np.array([0.0, -1.0, np.inf, -np.inf, np.nan, 3e4], np.float32).astype(dtype)
        assert tensors.non_finite(values) == 3


def test_what_was_trained_is_rounded_to_nearest_even(tmp_path):
    source = write_folder(tmp_path / "source", dtype="bfloat16")
    model = load_hf(source)
    # Halfway between two neighbours of 1.0 in bfloat16: the one with the even last bit is 1.0, then 1.015625.
    scale = model.params["final_norm"]["scale"]
    halfway = scale.at[:3].set(jnp.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-16], jnp.float32))
    model = Model(model.spec, {**model.params, "final_norm": {"scale": halfway}})
    save_hf(model, tmp_path / "export", source)
    found = all_tensors(tmp_path / "export")["model.norm.weight"]
    np.testing.assert_array_equal(found[:3].astype(np.float32), [1.0, 1.015625, 1.0078125])
    np.testing.assert_array_equal(found[3:], all_tensors(source)["model.norm.weight"][3:])


def test_every_leaf_goes_back_to_the_tensor_it_came_from(tmp_path):
    """Each element has a number of its own, so a mix-up of layers, names or axes shows."""
    source = write_config(tmp_path / "source", "qwen3", head_dim=8, attention_bias=True)
    start, arrays = 0, {}
    for name, array in random_tensors(source).items():
        arrays[name] = np.arange(start, start + array.size, dtype=np.float32).reshape(array.shape)
        start += array.size
    save_file(arrays, source / "model.safetensors", metadata={"format": "pt"})
    model = load_hf(source)
    blocks = model.params["blocks"]["0"]
    wanted = arrays["model.layers.2.self_attn.k_proj.weight"].T
    np.testing.assert_array_equal(blocks["attention"]["key"]["kernel"][2], wanted)
    np.testing.assert_array_equal(blocks["mlp"]["down"]["kernel"][3], arrays["model.layers.3.mlp.down_proj.weight"].T)
    np.testing.assert_array_equal(model.params["head"]["embedding"], arrays["lm_head.weight"])
    save_hf(Model(model.spec, jax.tree.map(lambda leaf: leaf + 1, model.params)), tmp_path / "export", source)
    found = load_file(tmp_path / "export" / "model.safetensors")
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array + 1)


@pytest.mark.parametrize(("dtype", "shards", "tied"), [("float32", 1, True), ("bfloat16", 3, False)])
def test_pytorch_reloads_an_export_without_a_difference(dtype, shards, tied, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    def run(folder):
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            return model(torch.arange(24).reshape(2, 12)).logits.numpy()

    source = write_folder(tmp_path / "s", "llama", dtype, shards, tie_word_embeddings=tied, rope_parameters=LLAMA3)
    (source / "pytorch_model.bin").unlink()
    model = load_hf(source)
    save_hf(model, tmp_path / "same", source)
    assert np.abs(run(tmp_path / "same") - run(source)).max() == 0.0
    if dtype == "float32":
        moved = trained(model)
        save_hf(moved, tmp_path / "moved", source)
        ours = logits(moved.spec, moved.params, jnp.arange(24).reshape(2, 12))
        np.testing.assert_allclose(run(tmp_path / "moved"), ours, rtol=0, atol=2e-4)


# ------------------------------------------------------------------------------------------------ files and shards


def test_names_files_dtypes_and_order_are_the_sources(tmp_path):
    """One float32 tensor among bfloat16 ones, odd file names, a buffer that holds no weights: all come back."""
    source = write_config(tmp_path / "source", "llama", tie_word_embeddings=True)
    arrays = random_tensors(source, "bfloat16")
    arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(np.float32) * np.float32(1.001)
    arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.full(4, 0.25, np.float32)
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    weight_map = {name: f"part.{i % 2}.safetensors" for i, name in enumerate(arrays)}
    for file in set(weight_map.values()):
        part = {name: arrays[name] for name in arrays if weight_map[name] == file}
        save_file(part, source / file, metadata={"format": "pt"})
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model = load_hf(source)
    save_hf(model, tmp_path / "export", source)
    before, after = files(source), files(tmp_path / "export")
    assert {name: data for name, data in after.items() if name not in ADDED} == before
    moved = trained(model)
    save_hf(moved, tmp_path / "moved", source)
    found = all_tensors(tmp_path / "moved")
    assert {name: array.dtype for name, array in found.items()} == {n: a.dtype for n, a in arrays.items()}
    assert bits(found["lm_head.weight"]) == bits(found["model.embed_tokens.weight"])
    assert bits(found["model.layers.0.self_attn.rotary_emb.inv_freq"]) == bits(np.full(4, 0.25, np.float32))
    assert bits(found["model.norm.weight"]) == bits(arrays["model.norm.weight"] + np.float32(0.01))


def test_a_tied_folder_may_keep_the_head_only(tmp_path):
    source = write_config(tmp_path / "source", "llama", tie_word_embeddings=True)
    arrays = random_tensors(source)
    arrays["lm_head.weight"] = arrays.pop("model.embed_tokens.weight")
    save_file(arrays, source / "model.safetensors")
    model = load_hf(source)
    np.testing.assert_array_equal(model.params["embed"]["embedding"], arrays["lm_head.weight"])
    save_hf(model, tmp_path / "export", source)
    assert {n: bits(a) for n, a in all_tensors(tmp_path / "export").items()} == {n: bits(a) for n, a in arrays.items()}


@pytest.mark.parametrize("limit", [1, 7_000, 30_000, 10**9])
def test_shards_stay_below_their_limit_and_lose_nothing(limit, tmp_path):
    source = write_folder(tmp_path / "source", shards=2)
    save_hf(load_hf(source), tmp_path / "export", source, max_shard_bytes=limit)
    written = sorted((tmp_path / "export").glob("*.safetensors"))
    for path in written:
        part = load_file(path)
        assert sum(array.nbytes for array in part.values()) <= limit or len(part) == 1
        with safe_open(path, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
    index = tmp_path / "export" / "model.safetensors.index.json"
    if len(written) == 1:
        assert written[0].name == "model.safetensors" and not index.exists()
    else:
        assert written[0].name == f"model-00001-of-{len(written):05d}.safetensors"
        total = sum(array.nbytes for array in all_tensors(source).values())
        assert json.loads(index.read_text())["metadata"]["total_size"] == total
    wanted = {name: bits(array) for name, array in all_tensors(source).items()}
    assert {name: bits(array) for name, array in all_tensors(tmp_path / "export").items()} == wanted


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 20))
@settings(deadline=None)
def test_splitting_keeps_order_and_fills_files(sizes, limit):
    infos = {f"t{i}": tensors.TensorInfo("x", "F16", (size,)) for i, size in enumerate(sizes)}
    found = shards.split(infos, limit)
    assert list(found) == list(infos) and [i.file for i in found.values()] == sorted(i.file for i in found.values())
    totals = {}
    for info in found.values():
        totals.setdefault(info.file, []).append(2 * info.shape[0])
    assert all(sum(part) <= limit or len([size for size in part if size]) == 1 for part in totals.values())


def test_another_dtype_is_that_of_weights_and_of_nothing_else():
    infos = {name: tensors.TensorInfo("x", dtype, (2,)) for name, dtype in (("weight", "F32"), ("ids", "I64"))}
    found = shards.laid_out(infos, {"weight"}, "bfloat16", None)
    assert {name: info.dtype for name, info in found.items()} == {"weight": "BF16", "ids": "I64"}


def test_a_sharded_model_is_gathered(tmp_path):
    count = len(jax.devices())
    if 32 % count:
        pytest.skip("needs a number of devices that divides 32")
    mesh = jax.make_mesh((count,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    source = write_folder(tmp_path / "source", "qwen3", head_dim=8)
    model = load_hf(source)
    by_last = jax.tree.map(lambda leaf: jax.NamedSharding(mesh, jax.P(*[None] * (leaf.ndim - 1), "fsdp")), model.params)
    spread = {
        p: leaf for p, leaf in trees.paths(by_last).items() if trees.paths(model.params)[p].shape[-1] % count == 0
    }
    params = {p: jax.device_put(leaf, spread.get(p)) for p, leaf in trees.paths(model.params).items()}
    save_hf(Model(model.spec, trees.from_paths(params)), tmp_path / "export", source)
    assert (tmp_path / "export/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_the_digest_is_of_the_weights_alone(tmp_path):
    source = write_folder(tmp_path / "source", shards=2)
    before = weights_digest(source)
    (source / "README.md").write_text("other")
    assert weights_digest(source) == before
    path = source / "model-00002-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert weights_digest(source) != before


# ------------------------------------------------------------------------------------------------ the card


CARD = {
    "datasets": ["trl-lib/ultrafeedback", "/home/someone/secret/pairs.jsonl"],
    "metrics": {"rewards/accuracies": 0.734321, "loss": 0.5},
    "config": {"model": {"path": "/mnt/machine/models/Tiny"}, "optimizer": {"learning_rate": 5e-7}},
}


def test_the_card_says_what_was_done_and_not_where(tmp_path):
    source = write_folder(tmp_path / "Tiny-1")
    save_hf(load_hf(source), tmp_path / "export", source, card=CARD, extra_files={"dpo_jax.json": '{"a": 1}\n'})
    text = (tmp_path / "export/README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == "Tiny-1" and front["tags"] == ["dpo", "dpo_jax", "jax"]
    assert front["license"] == "apache-2.0" and front["language"] == ["en"] and "model-index" not in front
    assert front["datasets"] == ["trl-lib/ultrafeedback"]
    assert "| rewards/accuracies | 0.734321 |" in text and "path: Tiny\n" in text and "rafailov2023direct" in text
    assert "/home" not in text and "/mnt" not in text and str(tmp_path) not in text
    assert (tmp_path / "export/dpo_jax.json").read_text() == '{"a": 1}\n'


@given(st.text(max_size=20), st.text(max_size=20))
@settings(deadline=None)
def test_front_matter_survives_any_text(base, license_name):
    text = model_card(base, {"license": license_name}, {"base_model": base, "datasets": [base]})
    front = yaml.safe_load(re.match(r"---\n(.*?\n)---\n\n# ", text, re.DOTALL).group(1))
    assert front.get("base_model") == (base if HUB_ID.fullmatch(base) else None) and front["license"] == license_name


def test_the_card_names_what_the_model_was_trained_with():
    dpo = model_card("org/base", {}, {"objectives": {"sigmoid": "DPO"}})
    assert "Direct Preference Optimization (DPO) by" in dpo and "# base (DPO)" in dpo
    other = model_card("org/base", {}, {"objectives": {"simpo": "SimPO, arXiv:2405.14734", "sft": "likelihood"}})
    assert "with `simpo` (SimPO, arXiv:2405.14734), `sft` (likelihood)" in other and "# base (simpo + sft)" in other
    assert "- simpo" in other and "Direct Preference" not in other


def test_a_metric_that_is_not_finite_is_said_in_the_card():
    """A record has null in its place."""
    card = model_card("org/base", {}, {"metrics": {"kl": None, "loss": 0.5}})
    assert "| kl | not finite |" in card and "| loss | 0.5 |" in card


def test_an_unknown_part_of_the_card_is_refused():
    with pytest.raises(ValueError, match="no part 'metric'"):
        model_card("x", {}, {"metric": {}})


@pytest.mark.parametrize(
    "readme", ["", "---\nlicense: [", "---\nlicense: {a: 1}\n---\n", "---\n- x\n---\n", "\xff---\n"]
)
def test_a_card_that_cannot_be_read_costs_only_the_licence(readme, tmp_path):
    source = write_folder(tmp_path / "source")
    (source / "README.md").write_text(readme)
    save_hf(load_hf(source), tmp_path / "export", source)
    assert "license" not in (tmp_path / "export/README.md").read_text()


def test_a_hub_snapshot_is_called_by_its_hub_id(tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    assert base_name(snapshot) == "org/name" and base_name("org/other") == "org/other"


# ------------------------------------------------------------------------------------------------ nothing is lost


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    source = write_folder(tmp_path_factory.mktemp("small") / "source", "llama", "float16")
    return source, load_hf(source)


def refused(match, *args, **kwargs):
    with pytest.raises(UserError, match=match) as caught:
        save_hf(*args, **kwargs)
    assert "\n" not in str(caught.value)


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_with_something_in_it_is_refused_and_left_alone(small, replace, tmp_path):
    source, model = small
    target = tmp_path / "mine"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    refused("exists and is not empty", model, target, source, replace=replace)
    refused("exists and is not empty", model, source, source, replace=replace)
    refused("link or a file", model, target / "thesis.txt", source, replace=replace)
    assert files(target) == {"thesis.txt": b"years of work"} and not hidden(tmp_path)


def test_an_earlier_export_is_replaced_only_when_asked_and_unchanged(small, tmp_path):
    source, model = small
    target = tmp_path / "export"
    target.mkdir()  # an empty folder is nobody's
    save_hf(model, target, source)
    refused("exists and is not empty", model, target, source)
    save_hf(trained(model), target, source, replace=True)
    assert bits(all_tensors(target)["model.norm.weight"]) != bits(all_tensors(source)["model.norm.weight"])
    (target / "notes.md").write_text("mine")
    refused("was changed since it was exported .notes.md", model, target, source, replace=True)
    (target / "notes.md").unlink()
    (target / "README.md").write_text("my own card")
    refused("was changed since it was exported .README.md", model, target, source, replace=True)
    assert (target / "README.md").read_text() == "my own card" and not hidden(tmp_path)


def test_a_write_that_fails_leaves_what_stood_there(small, tmp_path, monkeypatch):
    source, model = small
    save_hf(model, tmp_path / "export", source)
    before = files(tmp_path / "export")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("write_bytes", "check_tensors", "write_tensors"):
        with monkeypatch.context() as patch:
            patch.setattr(tensors, name, full)
            refused("cannot be written .*No space left", trained(model), tmp_path / "export", source, replace=True)
        assert files(tmp_path / "export") == before and not hidden(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
        refused("0 are free", model, tmp_path / "other", source)


def test_bytes_that_changed_on_the_disk_are_noticed(small, tmp_path, monkeypatch):
    source, model = small
    real = os.fsync

    def damage(handle):
        real(handle)
        path = os.readlink(f"/proc/self/fd/{handle}")
        if path.endswith(".safetensors"):
            with open(path, "r+b") as file:
                file.seek(-1, os.SEEK_END)
                last = file.read(1)
                file.seek(-1, os.SEEK_END)
                file.write(bytes([last[0] ^ 1]))

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc to find the file of a handle")
    monkeypatch.setattr(os, "fsync", damage)
    refused("does not read back", model, tmp_path / "export", source)
    assert not (tmp_path / "export").exists()


def test_weights_that_cannot_be_stored_are_refused(small, tmp_path):
    source, model = small
    for value, message in ((1e5, "too large for float16"), (np.nan, "NaN or infinite")):
        norm = {"scale": model.params["final_norm"]["scale"].at[0].set(value)}
        bad = Model(model.spec, {**model.params, "final_norm": norm})
        refused(f"'model.norm.weight' .*{message}", bad, tmp_path / "export", source)
    assert not hidden(tmp_path) and not (tmp_path / "export").exists()


def test_a_folder_of_another_model_is_refused(small, tmp_path):
    source, model = small
    other = Model(dataclasses.replace(model.spec, logit_scale=4.0), model.params)
    refused("logit_scale differ", other, tmp_path / "export", source)
    with pytest.raises(ValueError, match="leaf 'final_norm/scale' of params"):
        short = {**model.params, "final_norm": {"scale": jnp.ones(3)}}
        save_hf(Model(model.spec, short), tmp_path / "export", source)
    for name in ("config.json", "../x.json", "SHA256SUMS", "model.safetensors"):
        with pytest.raises(ValueError, match="not a free plain name"):
            save_hf(model, tmp_path / "export", source, extra_files={name: ""})
    assert not hidden(tmp_path)
