"""A base and an adapter as one folder: added in float32, rounded once, alike in every part; and written."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from dpo_jax import logits, sharding
from dpo_jax.errors import UserError
from dpo_jax.hf import tensors
from dpo_jax.hf.checkpoint import load_hf
from dpo_jax.hf.configs import read_spec
from dpo_jax.hf.merge import merge
from dpo_jax.hf.tensors import Tensors, changed_files
from dpo_jax.model.decoder import abstract_params
from tests.support.peft_folders import GOLDENS, PREFIX, halves, leaves, view, write_peft
from tests.support.tiny_folders import write_folder

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
SMALL = {"num_hidden_layers": 2, "tie_word_embeddings": True}
BF16 = ml_dtypes.bfloat16


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {
        dtype: write_folder(root / dtype, dtype=dtype, shards=2, **SMALL)
        for dtype in ("float32", "bfloat16", "float16")
    }


@pytest.fixture
def adapter(tmp_path):
    return write_peft(tmp_path / "a", halves(Q, 32, 32) | halves(DOWN, 32, 48))


def delta(folder, module, scale=1.5):
    made = load_file(folder / "adapter_model.safetensors")
    return made[f"{PREFIX}{module}.lora_B.weight"] @ made[f"{PREFIX}{module}.lora_A.weight"] * np.float32(scale)


def test_the_sum_is_rounded_once(bases, tmp_path):
    made = {name: array * np.float32(0.01) for name, array in halves(Q, 32, 32).items()}
    adapter = write_peft(tmp_path / "a", made)
    seen, base = view(adapter, bases["bfloat16"]), Tensors(bases["bfloat16"]).read(f"{Q}.weight").astype(np.float32)
    once = (base + delta(adapter, Q)).astype(BF16)
    twice = base.astype(BF16) + delta(adapter, Q).astype(BF16)
    assert np.array_equal(seen.read(f"{Q}.weight"), once) and (once != twice).any()
    assert seen.infos == Tensors(bases["bfloat16"]).infos and seen.files == Tensors(bases["bfloat16"]).files


def test_a_model_in_float32_has_the_sum_unrounded_whatever_the_base_is_in(bases, adapter):
    found = leaves(bases["bfloat16"], adapter)["blocks/0/attention/query/kernel"][0]
    base = Tensors(bases["bfloat16"]).read(f"{Q}.weight").astype(np.float32)
    assert np.array_equal(found, (base + delta(adapter, Q)).T)
    narrow = leaves(bases["bfloat16"], adapter, dtype=jnp.bfloat16)["blocks/0/attention/query/kernel"][0]
    assert np.array_equal(narrow, found.astype(BF16))


def test_a_part_is_a_part_of_the_whole_bit_for_bit(bases, adapter):
    seen = view(adapter, bases["bfloat16"])
    whole = seen.read(f"{DOWN}.weight")
    for index in ((slice(0, 7), slice(3, 40)), (slice(31, 32), slice(0, 48))):
        assert np.array_equal(seen.read(f"{DOWN}.weight", index), whole[index])
    whole[...] = 0  # an array of the reader's own
    assert seen.read(f"{DOWN}.weight").any()
    pieces = np.concatenate(list(seen.pieces(f"{DOWN}.weight")))
    assert np.array_equal(pieces, seen.read(f"{DOWN}.weight").reshape(-1))
    same = "model.layers.0.self_attn.k_proj.weight"
    assert not seen.changes(same)
    assert np.array_equal(np.concatenate(list(seen.pieces(same))), seen.read(same).reshape(-1))


@pytest.mark.parametrize("module", [Q, "lm_head"])
def test_weights_on_several_devices_are_those_on_one(module, bases, tmp_path):
    adapter = write_peft(tmp_path / "a", halves(module, 96 if module == "lm_head" else 32, 32))
    mesh = sharding.make_mesh(fsdp=2, tensor=2) if jax.device_count() >= 4 else sharding.make_mesh(fsdp=1, tensor=1)
    places = sharding.param_shardings(abstract_params(read_spec(bases["float32"])), mesh)
    one, many = leaves(bases["float32"], adapter), leaves(bases["float32"], adapter, shardings=places)
    assert one.keys() == many.keys() and all(np.array_equal(one[leaf], many[leaf]) for leaf in one)


@pytest.mark.parametrize("dtype", ["keep", "float32", "bfloat16"])
def test_a_merged_folder_is_the_view_in_files_and_whole(dtype, bases, adapter, tmp_path):
    base, target = bases["float16"], tmp_path / "out"
    drift = merge(base, adapter, target, dtype=dtype)
    kind = tensors.DTYPES["F16"] if dtype == "keep" else np.dtype(tensors.DTYPES[{"float32": "F32"}.get(dtype, "BF16")])
    exact, written = view(adapter, base, "float32"), Tensors(target)
    assert written.infos.keys() == exact.infos.keys()
    for name in written.infos:
        assert np.array_equal(written.read(name), exact.read(name).astype(np.float32).astype(kind))
    assert drift.tensors == 2 and drift.weights > 2400 and drift.largest < 0.05
    assert (drift.largest == 0 and drift.unmoved == 0) == (dtype == "float32")
    assert not changed_files(target) and (target / "tokenizer.json").is_file()
    config = json.loads((target / "config.json").read_text())
    assert config["dtype"] == ("float16" if dtype == "keep" else dtype) and config["tie_word_embeddings"]
    assert "is merged into its weights" in (target / "README.md").read_text()


def test_what_rounding_loses_is_counted(bases, tmp_path):
    made = {name: array * np.float32(1e-3) for name, array in halves(Q, 32, 32).items()}
    drift = merge(bases["bfloat16"], write_peft(tmp_path / "a", made), tmp_path / "out")
    base, written = (Tensors(one).read(f"{Q}.weight") for one in (bases["bfloat16"], tmp_path / "out"))
    moved = base.astype(np.float32) + delta(tmp_path / "a", Q) != base.astype(np.float32)
    assert drift.weights == moved.sum() and drift.unmoved == (moved & (base == written)).sum() > 1000
    assert "as they were" in str(drift)


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_tied_head_that_an_adapter_changes_is_a_tensor_of_its_own(module, shards, tmp_path):
    base = write_folder(tmp_path / "m", shards=shards, architectures=["LlamaForCausalLM"], **SMALL)
    made = halves("lm_head", 96, 32)
    if module != "lm_head":
        a, b = made.values()
        made = {f"{PREFIX}{module}.lora_embedding_A": b.T.copy(), f"{PREFIX}{module}.lora_embedding_B": a.T.copy()}
    adapter = write_peft(tmp_path / "a", made)
    merge(base, adapter, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    ours, merged, plain = load_hf(base, adapter=adapter), load_hf(tmp_path / "out"), load_hf(base)
    ids = jnp.arange(24).reshape(2, 12)
    found = [np.asarray(logits(model.spec, model.params, ids)) for model in (ours, merged, plain)]
    assert np.array_equal(found[0], found[1]) and np.abs(found[0] - found[2]).max() > 0.1
    embed, head = (Tensors(tmp_path / "out").read(name) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    held = Tensors(base).read("model.embed_tokens.weight")
    assert np.array_equal(embed, held) == (module == "lm_head") and np.array_equal(head, held) != (module == "lm_head")


def test_a_sum_that_is_too_large_for_the_dtype_is_refused(bases, tmp_path):
    made = {name: array * np.float32(1e3) for name, array in halves(Q, 32, 32).items()}
    adapter = write_peft(tmp_path / "a", made)
    with pytest.raises(UserError, match=r"q_proj.weight' in float16 has a value too large for it; take float32"):
        merge(bases["float16"], adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge(bases["float16"], adapter, tmp_path / "out", dtype="float32")


def test_a_target_in_which_something_would_be_lost_is_refused_first(bases, adapter, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        merge(bases["float32"], adapter, tmp_path / "out")


@pytest.mark.skipif(GOLDENS is None, reason="the goldens of adapters are not here")
@pytest.mark.parametrize("name", ["adapter_float32_default", "adapter_float32_safe"])
def test_a_merged_matrix_is_pefts_where_that_rounds_once(name):
    assert GOLDENS is not None
    case = load_file(GOLDENS / "merge/merge_bf16.safetensors")
    base, a, b, scale, wanted = (case[f"{name}.{part}"] for part in ("base", "lora_A", "lora_B", "scaling", "merged"))
    once = (base.astype(np.float32) + (b @ a) * np.float32(scale)).astype(BF16)
    assert np.array_equal(once, wanted) == name.endswith("default")
