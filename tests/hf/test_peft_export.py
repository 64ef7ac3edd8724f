"""An adapter out: one rank and one scale, in PEFT's names, which every reader takes for the same function."""

import importlib.util
import inspect
import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpo_jax import logits
from dpo_jax.errors import UserError
from dpo_jax.hf import tensors
from dpo_jax.hf.checkpoint import entries_of, load_hf, save_hf, scheme_of
from dpo_jax.hf.configs import quiet, read_spec
from dpo_jax.hf.factors import Adapter, Factor, Rows
from dpo_jax.hf.peft import FILE
from dpo_jax.hf.peft_export import WrittenAdapter, write_adapter
from dpo_jax.hf.peft_names import places
from dpo_jax.hf.tensors import Tensors, changed_files
from dpo_jax.hf.verify import torch_logits
from tests.hf.test_wrappers import WRAPPERS
from tests.support.peft_folders import case, case_names, halves, read, write_peft
from tests.support.tiers import by_day
from tests.support.tiny_folders import write_config, write_folder

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
ROWS = Rows((1,), np.ones((1, 32), np.float32))
UNTIED = {"num_hidden_layers": 2, "tie_word_embeddings": False}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
HAS_PEFT = all(importlib.util.find_spec(name) for name in ("torch", "peft"))
needs_peft = pytest.mark.skipif(not HAS_PEFT, reason="PEFT is not installed")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("base") / "m", architectures=["LlamaForCausalLM"], **UNTIED)


def write(target, adapter, base, **options) -> WrittenAdapter:
    return write_adapter(target, adapter, Tensors(base), read_spec(base), **options)


def config(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def made_for(base, seed=0, rank=2, scale=1.5, only=lambda name: True) -> Adapter:
    """Random factors of all matrices of a base's layers whose names are wanted."""
    spec, rng = read_spec(base), np.random.default_rng(seed)
    where = places(spec, scheme_of(spec, base), Tensors(base).infos)
    factors = {}
    for name, entry in where.entries.items():
        matrix = entry.parts[0].leaf.endswith("/kernel") and len(entry.parts[0].shape) >= 2
        if not matrix or not only(name):
            continue
        first, second = entry.shape[-2:] if entry.turned else entry.shape[:-3:-1]
        for expert in range(entry.shape[0]) if len(entry.shape) == 3 else [None]:
            a, b = (0.3 * rng.standard_normal(shape, np.float32) for shape in ((rank, second), (first, rank)))
            factors[name, expert] = Factor(a.astype(np.float32), b.astype(np.float32), scale)
    return Adapter(factors, where.entries)


def products(adapter):
    return {key: one.b @ one.a * np.float32(one.scale) for key, one in adapter.factors.items()}


def test_what_is_written_reads_back_as_it_was(base, tmp_path):
    adapter = read(write_peft(tmp_path / "a", halves(Q, 32, 32) | halves(DOWN, 32, 48), lora_dropout=0.1), base)
    assert write(tmp_path / "b", adapter, base, base_model="some/base") == WrittenAdapter(2, 3.0, 2)
    assert load_file(tmp_path / "a" / FILE).keys() == load_file(tmp_path / "b" / FILE).keys()
    again = read(tmp_path / "b", base)
    for key, one in adapter.factors.items():
        other = again.factors[key]
        assert np.array_equal(one.a, other.a) and np.array_equal(one.b, other.b) and one.scale == other.scale
    assert again.dropout == 0.1 and not changed_files(tmp_path / "b")
    said = config(tmp_path / "b")
    assert said["base_model_name_or_path"] == "some/base" and set(said["target_modules"]) == {Q, DOWN}
    there = {path.name for path in (tmp_path / "b").iterdir()}
    assert there >= {"tokenizer.json", "chat_template.jinja", "README.md", "dpo_jax.json", "SHA256SUMS", "LICENSE"}
    assert not there & {"config.json", "generation_config.json", "model.safetensors"}
    card = (tmp_path / "b/README.md").read_text()
    assert "library_name: peft" in card and "base_model: some/base" in card and "--max-lora-rank 8" in card


def test_one_rank_and_one_scale_whatever_the_modules_had(base, tmp_path):
    """SGLang and llama.cpp know one alpha only, and divide it by the config's rank or by the tensors' own."""
    made = halves(Q, 32, 32, rank=5) | halves(DOWN, 32, 48)
    patterns = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"down_proj": 7}}
    adapter = read(write_peft(tmp_path / "a", made, use_rslora=True, **patterns), base)
    write(tmp_path / "b", adapter, base)
    said, stored = config(tmp_path / "b"), load_file(tmp_path / "b/adapter_model.safetensors")
    assert said["r"] == 5 and not said["use_rslora"] and said["rank_pattern"] == said["alpha_pattern"] == {}
    assert {array.shape[0 if "lora_A" in name else 1] for name, array in stored.items()} == {5}
    assert all(array.dtype == np.float32 for array in stored.values())
    for key, product in products(adapter).items():
        module = f"base_model.model.{key[0].removesuffix('.weight')}"
        a, b = (stored[f"{module}.lora_{half}.weight"] for half in "AB")
        np.testing.assert_allclose(b @ a * (said["lora_alpha"] / said["r"]), product, rtol=2e-6, atol=1e-6)


def test_the_config_passes_the_rules_of_programs_that_serve(base, tmp_path):
    write(tmp_path / "b", read(write_peft(tmp_path / "a", halves(Q, 32, 32)), base), base)
    said = config(tmp_path / "b")
    assert {"r", "lora_alpha", "target_modules"} <= said.keys() and isinstance(said["target_modules"], list)
    assert said["r"] <= 512 and said["bias"] == "none" and said["init_lora_weights"] is True
    assert not any(said.get(key) for key in ("use_dora", "lora_bias", "modules_to_save", "alora_invocation_tokens"))
    assert not any(
        said.get(key) for key in ("layer_replication", "use_bdlora", "use_qalora", "trainable_token_indices")
    )
    names = load_file(tmp_path / "b/adapter_model.safetensors")
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)


def test_names_of_modules_are_short_where_all_that_end_so_are_meant(base, tmp_path):
    write(tmp_path / "a", made_for(base), base)
    kinds = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config(tmp_path / "a")["target_modules"] == kinds
    write(tmp_path / "b", made_for(base, only=lambda name: ".1." in name and "q_proj" in name), base)
    assert config(tmp_path / "b")["target_modules"] == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("same_a", [True, False])
def test_experts_are_written_as_one_parameter_and_share_a_where_they_can(same_a, tmp_path):
    base = write_folder(tmp_path / "m", "mixtral", num_hidden_layers=1, **EXPERTS)
    adapter = made_for(base, only=lambda name: "experts" in name)
    if same_a:
        for name, _ in list(adapter.factors):
            if ".w3." in name:
                one = adapter.factors[name, None]
                adapter.factors[name, None] = one._replace(a=adapter.factors[name.replace("w3", "w1"), None].a)
    assert write(tmp_path / "a", adapter, base).rank == (2 if same_a else 4)
    said = config(tmp_path / "a")
    assert said["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    found = products(read(tmp_path / "a", base))
    for key, product in products(adapter).items():
        np.testing.assert_allclose(found[key], product, atol=1e-6)


def test_experts_of_which_some_have_no_factors_get_zeros(tmp_path):
    base = write_folder(tmp_path / "m", "mixtral", num_hidden_layers=1, **EXPERTS)
    adapter = made_for(base, only=lambda name: "experts.2.w1" in name)
    write(tmp_path / "a", adapter, base)
    found = products(read(tmp_path / "a", base))
    for key, product in found.items():
        np.testing.assert_allclose(product, products(adapter).get(key, 0 * product), atol=1e-6)


@pytest.mark.parametrize("what", ["dora", "bias", "whole", "rows", "tied", "nothing"])
def test_what_not_every_reader_takes_is_refused(what, tmp_path):
    base = write_folder(tmp_path / "m", num_hidden_layers=1, tie_word_embeddings=True)
    one = Factor(np.ones((1, 32), np.float32), np.ones((32, 1), np.float32), 1.0)
    entries = made_for(base).entries
    adapter = {
        "dora": Adapter({(f"{Q}.weight", None): one._replace(magnitude=np.ones(32, np.float32))}, entries),
        "bias": Adapter({(f"{Q}.weight", None): one._replace(bias=np.ones(32, np.float32))}, entries),
        "whole": Adapter({(f"{Q}.weight", None): one}, entries, {"model.norm.weight": np.ones(32, np.float32)}),
        "rows": Adapter({(f"{Q}.weight", None): one}, entries, rows={"model.embed_tokens.weight": ROWS}),
        "tied": Adapter({("model.embed_tokens.weight", None): one}, entries),
        "nothing": Adapter({}, entries),
    }[what]
    with pytest.raises(UserError, match="train some modules" if what == "nothing" else "merged model"):
        write(tmp_path / "a", adapter, base)
    assert not (tmp_path / "a").exists()


def test_a_target_that_is_not_free_is_left_alone(base, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        write(tmp_path / "a", made_for(base), base)
    write(tmp_path / "b", made_for(base), base)
    write(tmp_path / "b", made_for(base, seed=1), base, replace=True)
    assert tensors.listed_files(tmp_path / "b")


# ---------------------------------------------------------------------------------------------- read by PEFT


def told_by_peft(folder, adapter, ids):
    """Logits of PEFT, which must find every tensor that it looks for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|inconsistency).*")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        found, _ = torch_logits(folder, ids, adapter)
    return found


def random_folder(folder, family, **changes):
    write_config(folder, family, **changes)
    rng = np.random.default_rng(0)
    made = {
        one.name: (0.3 * rng.standard_normal(one.shape) + ("norm" in one.name)).astype(np.float32)
        for one in entries_of(read_spec(folder), folder)
    }
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


FAMILIES = {
    "llama": {"architectures": ["LlamaForCausalLM"], **UNTIED},
    "mixtral": {"architectures": ["MixtralForCausalLM"], "num_hidden_layers": 1, **EXPERTS},
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_hidden_layers": 2,
        "mlp_only_layers": [0],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "norm_topk_prob": False,
        "tie_word_embeddings": False,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_hidden_layers": 2,
        "mlp_only_layers": [0],
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"],
        "num_hidden_layers": 2,
        "head_dim": 8,
        **EXPERTS,
        "sliding_window": 8,
        "tie_word_embeddings": False,
    },
}


@needs_peft
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_factors_of_every_matrix_of_a_family(family, tmp_path):
    base = random_folder(tmp_path / "m", family, **FAMILIES[family])
    adapter = made_for(base, only=lambda name: "layers" in name)
    write(tmp_path / "a", adapter, base)
    ids = np.random.default_rng(1).integers(3, 96, (2, 16))
    model = load_hf(base, adapter=tmp_path / "a")
    ours = np.asarray(logits(model.spec, model.params, jnp.asarray(ids, jnp.int32)))
    theirs = told_by_peft(base, tmp_path / "a", ids)
    assert np.abs(ours - theirs).max() < 1e-5 * max(10, np.abs(theirs).max())


@needs_peft
@pytest.mark.parametrize(("kind", "outside"), [("gemma3", "model.language_model.layers."), ("qwen3_5", None)])
def test_modules_of_a_decoder_within_a_larger_model_have_its_paths(kind, outside, tmp_path):
    """As `AutoModelForCausalLM` builds it: some of these models whole, of others the decoder alone."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    with quiet():
        torch.manual_seed(0)
        made = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **WRAPPERS[kind])).float()
        made.save_pretrained(tmp_path / "m")
        base = tmp_path / "m"
        adapter = made_for(base, only=lambda name: "layers" in name and name.endswith("proj.weight"))
        write(tmp_path / "a", adapter, base)
        if outside is None:
            table = json.loads((base / "config.json").read_text()) | {"architectures": ["Qwen3_5ForCausalLM"]}
            (base / "config.json").write_text(json.dumps(table))
        else:
            assert all(name.startswith(outside) for name in config(tmp_path / "a")["target_modules"])
        ids = np.random.default_rng(1).integers(3, 90, (2, 12))
        theirs = told_by_peft(base, tmp_path / "a", ids)
    model = load_hf(base, adapter=tmp_path / "a")
    ours = np.asarray(logits(model.spec, model.params, jnp.asarray(ids, jnp.int32)))
    assert np.abs(ours - theirs).max() < 1e-4


BY_DAY = (
    *"bloom_default gemma2_regex_exclude gpt2_all_linear gpt2_dora gpt_neox_embed_save".split(),
    *"gpt_oss_target_parameters llama_all_linear_rslora llama_embedding_tied".split(),
    *"llama_layers_to_transform llama_trainable_tokens".split(),
    *"mixtral_per_expert_v4 opt_bias_lora_only opt_lora_bias qwen2_bias_all qwen3_rank_pattern".split(),
)
"""One of each kind of adapter; PEFT takes longer to open a model than all the rest."""


@needs_peft
@pytest.mark.skipif(not case_names(), reason="the goldens of adapters are not here")
@pytest.mark.parametrize("name", by_day(case_names(), BY_DAY))
def test_a_golden_that_is_written_again_is_the_same_to_peft(name, tmp_path):
    folder, base = case(name)
    adapter = read(folder, base)
    tied = read_spec(base).tied and any("embed" in key or "lm_head" in key for key, _ in adapter.factors)
    if adapter.beyond_lora or tied:
        with pytest.raises(UserError, match="merged model"):
            write(tmp_path / "a", adapter, base)
        return
    write(tmp_path / "a", adapter, base)
    ids = load_file(base / "golden.safetensors")["ids"]
    with quiet():
        before, after = told_by_peft(base, folder, ids), told_by_peft(base, tmp_path / "a", ids)
    # Where the factors are not written as they were read (several scales, of which all but one are multiplied into B;
    # several ranks, filled up with zeros; each expert's matrices put together), PEFT's products are added in another
    # order, which depends on the machine: half of the 2e-4 that any two ways to the same logits may differ by.
    factors = [load_file(where / "adapter_model.safetensors") for where in (folder, tmp_path / "a")]
    alike = all(np.array_equal(value, factors[1].get(key)) for key, value in factors[0].items())
    assert np.abs(before - after).max() <= (0 if alike else 1e-4)


def test_an_adapter_alone_is_loaded_with_the_base_that_it_names(base, tmp_path):
    adapter = tmp_path / "adapter"
    write(adapter, made_for(base), base, base_model=str(base))
    tokens = [[1, 2, 3, 4]]
    alone, both, plain = load_hf(adapter), load_hf(base, adapter=adapter), load_hf(base)
    np.testing.assert_array_equal(alone.logits(tokens), both.logits(tokens))
    assert (alone.logits(tokens) != plain.logits(tokens)).any()
    (adapter / "adapter_config.json").write_text(
        json.dumps(config(adapter) | {"base_model_name_or_path": str(tmp_path / "none")})
    )
    with pytest.raises(UserError) as caught:
        load_hf(adapter)
    assert str(caught.value).endswith(f"load_hf(BASE, adapter={str(adapter)!r})") and "--" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["int8", np.int32, "float64", "nonsense", lambda leaf: jnp.int8])
def test_weights_are_floats(base, dtype):
    with pytest.raises(UserError, match="^load_hf: dtype: .*: weights are computed with in float32, bfloat16, float16"):
        load_hf(base, dtype=dtype)


def test_a_tensor_is_written_in_a_known_dtype(base, tmp_path):
    with pytest.raises(UserError, match="^save_hf: dtype: int8: give one of keep, float32, bfloat16"):
        inspect.unwrap(save_hf)(load_hf(base), tmp_path / "out", base, dtype="int8")
