"""config.json -> spec, and the table of names: every key is judged, every leaf and every tensor is claimed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax import trees
from dpo_jax.errors import UserError
from dpo_jax.hf import mapping, names
from dpo_jax.hf.checkpoint import entries_of, load_hf
from dpo_jax.hf.configs import read_spec
from dpo_jax.hf.keys import Keys
from dpo_jax.hf.tokenizer import generation_settings, load_tokenizer
from dpo_jax.model.decoder import abstract_params, logits
from dpo_jax.model.spec import MLP, Attention, DecoderSpec, HeadNorm, Layer, Norm, Rope
from tests.support.tiny_folders import SIZES, write_config, write_folder

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
OLD = {"rope_parameters": ...}
VARIANTS = {
    "llama": {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "tie_word_embeddings": True},
    "llama_bias": {
        "rope_parameters": {**LLAMA3, "rope_theta": 5e5},
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 16,
    },
    "mistral": {"sliding_window": 3, "head_dim": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
    "qwen3": {"head_dim": 16, "attention_bias": True},
}


def family_of(variant: str) -> str:
    return variant.removesuffix("_bias")


# ------------------------------------------------------------------------------------------------ against PyTorch


@pytest.mark.parametrize("variant", ["llama_bias", "mistral", "qwen2", "qwen3"])
def test_logits_are_those_of_pytorch_on_a_random_folder(variant, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder = write_folder(tmp_path / "m", family_of(variant), **VARIANTS[variant])
    (folder / "pytorch_model.bin").unlink()
    ids = np.random.default_rng(1).integers(0, 96, (2, 12)).astype(np.int32)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids.astype(np.int64))).logits.numpy()
    model = load_hf(folder)
    np.testing.assert_allclose(logits(model.spec, model.params, jnp.asarray(ids)), wanted, rtol=0, atol=2e-4)


# ------------------------------------------------------------------------------------------------ config.json


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "granite"])
@pytest.mark.parametrize("scaling", [None, LLAMA3, {"rope_type": "linear", "factor": 4.0}])
def test_both_styles_of_config_give_one_spec(family, scaling, tmp_path):
    old_scaling = scaling and {
        "type" if key == "rope_type" and scaling["rope_type"] == "linear" else key: value
        for key, value in scaling.items()
    }
    old = write_config(tmp_path / "old", family, **OLD, rope_theta=5e5, rope_scaling=old_scaling, torch_dtype="float16")
    new = write_config(
        tmp_path / "new",
        family,
        rope_parameters={"rope_type": "default", **(scaling or {}), "rope_theta": 5e5},
        dtype="float16",
    )
    assert read_spec(old) == read_spec(new)
    rope = read_spec(new).layers[0].mixer.rope
    assert rope.theta == 5e5 and rope.kind == (scaling or {}).get("rope_type", "default")


def test_a_spec_says_what_the_config_says(tmp_path):
    llama = read_spec(write_config(tmp_path / "a", "llama", rope_parameters={**LLAMA3, "rope_theta": 5e5}))
    rope = Rope(5e5, "llama3", 8.0, 1.0, 4.0, 16, channels=8)
    assert llama == DecoderSpec(96, 32, (Layer(Attention(4, 2, 8, rope), MLP(48)),) * 4, Norm(1e-6))
    biased = read_spec(write_config(tmp_path / "b", "llama", **VARIANTS["llama_bias"], tie_word_embeddings=True))
    first = biased.layers[0]
    assert (first.mixer.qkv_bias, first.mixer.output_bias, first.mlp.bias, biased.tied) == (True, True, True, True)
    qwen2, qwen3 = (read_spec(write_config(tmp_path / family, family)).layers[0].mixer for family in ("qwen2", "qwen3"))
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.head_norm, qwen2.head_dim) == (True, False, None, 8)
    # qwen3's default head_dim is 128, not width / heads
    norm = HeadNorm(Norm(1e-6))
    assert (qwen3.qkv_bias, qwen3.output_bias, qwen3.head_norm, qwen3.head_dim) == (False, False, norm, 128)


@pytest.mark.parametrize(
    ("family", "config", "windows"),
    [
        ("mistral", {"sliding_window": 5}, (5, 5, 5, 5)),
        ("mistral", {"sliding_window": None}, (None,) * 4),
        ("qwen2", {"sliding_window": 5}, (None,) * 4),
        ("qwen2", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 5)),
        (
            "qwen3",
            {
                "sliding_window": 7,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (7, None, 7, None),
        ),
    ],
)
def test_windows_are_where_the_family_puts_them(family, config, windows, tmp_path):
    spec = read_spec(write_config(tmp_path, family, **config))
    assert tuple(layer.mixer.window for layer in spec.layers) == windows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0: not supported, only null is"),
        ({"new_softcap": 30.0}, "new_softcap = 30.0: unknown key"),
        ({"model_type": "mamba"}, r'model_type = "mamba": not supported; supported: apertus, .*, llama, .*'),
        ({"model_type": ...}, "model_type = null: not supported"),
        ({"auto_map": {"AutoConfig": "evil.Config"}}, "auto_map = .*never run"),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 7,
                "layer_types": ["sliding_attention"] * 4,
                "use_sliding_window": False,
            },
            'layer_types = "sliding_attention": not supported while use_sliding_window is false',
        ),
        ({"hidden_act": "mish"}, 'hidden_act = "mish": not supported; supported: silu'),
        ({"rope_parameters": {"rope_type": "proportional", "factor": -2.0, "rope_theta": 1e4}}, "factor = -2.0"),
        ({**OLD, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 'rope_type = "dynamic"'),
        ({**OLD, "rope_scaling": {"rope_type": "mine", "factor": 2.0}}, 'rope_type = "mine"'),
        ({"rope_parameters": {"rope_theta": 1e4, "mscale": 2}}, "rope_parameters.mscale = 2: unknown key"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_theta": 1e4}, "rope_theta = 10000.0: differs from rope_parameters.rope_theta"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling = .*differs from rope_parameters"),
        ({"rope_parameters": {"rope_type": "linear", "factor": -1, "rope_theta": 1e4}}, "rope_parameters.factor = -1"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters"),
        ({"quantization_config": {"quant_method": "quip"}}, "quantization_config.quant_method = .quip.: weights"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder = true"),
        ({"architectures": ["LlamaForTokenClassification"]}, "architectures"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "id2label = null: makes 2 labels"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3: must divide"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0: a whole number above zero"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = NaN: a finite number"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"head_dim": 7}, "even rotary dimension.*head_dim.=7"),
        ({"sliding_window": 9}, "sliding_window = 9: not supported, only null"),
        ({"configuration_files": ["config.4.0.0.json"]}, "configuration_files = .*must stand in config.json"),
        ({"vocab_size": True}, "vocab_size"),
    ],
)  # fmt: skip
def test_a_key_that_is_not_understood_is_refused_by_name(changes, message, tmp_path):
    folder = write_config(tmp_path, "llama", **changes)
    with pytest.raises(UserError, match=message) as caught:
        read_spec(folder)
    assert "\n" not in str(caught.value) and "config.json" in str(caught.value)


@pytest.mark.parametrize("types", [["linear_attention"] * 4, ["sliding_attention"] * 3])
def test_layer_types_must_be_known_and_one_for_each_layer(types, tmp_path):
    with pytest.raises(UserError):
        read_spec(write_config(tmp_path, "qwen3", layer_types=types, use_sliding_window=True, sliding_window=4))


def test_keys_that_do_not_change_the_numbers_are_let_through(tmp_path):
    harmless = {"_name_or_path": "/home/x", "transformers.js_config": {}, "temperature": 0.7, "attention_dropout": 0.1,
                "architectures": ["LlamaForCausalLM"], "is_llama_config": True, "rope_interleaved": False,
                "pretraining_tp": 2, "use_cache": False, "bos_token_id": None}  # fmt: skip
    assert read_spec(write_config(tmp_path / "a", "llama", **harmless)) == read_spec(
        write_config(tmp_path / "b", "llama")
    )


@given(st.sampled_from(sorted(SIZES)), st.one_of(st.none(), st.text(max_size=3), st.floats(), st.lists(st.integers())))
@settings(max_examples=15, deadline=None)
def test_nothing_but_a_user_error_comes_out_of_a_wrong_value(tmp_path_factory, key, value):
    folder = write_config(tmp_path_factory.mktemp("c"), "llama", **{key: value})
    try:
        assert isinstance(read_spec(folder), DecoderSpec)
    except UserError as error:
        assert "\n" not in str(error)


def test_keys_that_nobody_reads_are_the_last_thing_refused(tmp_path):
    keys = Keys({"a": 1, "b": {"c": 2}}, tmp_path / "config.json")
    assert keys.size("a") == 1 and keys.part("b").size("c") == 2
    keys.finish()
    with pytest.raises(UserError, match=r'config.json: b.c = "x": a whole number'):
        Keys({"b": {"c": "x"}}, tmp_path / "config.json").part("b").size("c")


# ------------------------------------------------------------------------------------------------ the table of names


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_leaf_and_every_tensor_has_one_place(variant, tmp_path):
    folder = write_config(tmp_path, family_of(variant), **VARIANTS[variant])
    spec = read_spec(folder)
    shapes = {leaf: value.shape for leaf, value in trees.paths(abstract_params(spec)).items()}
    entries = entries_of(spec, folder)
    assert len({entry.name for entry in entries}) == len(entries)
    parts = [(part.leaf, part.index) for entry in entries for part in entry.parts]
    layers = {
        leaf: [(i,) for i in range(shape[0])] if leaf.startswith("blocks/") else [()] for leaf, shape in shapes.items()
    }
    assert sorted(parts) == sorted((leaf, index) for leaf in shapes for index in layers[leaf])
    assert sum(int(np.prod(entry.shape)) for entry in entries) == trees.num_parameters(abstract_params(spec))


QKV = (("a", 8), ("b", 4), ("c", 4))
ENTRIES = {
    "as it is": mapping.TensorEntry("x", (mapping.LeafPart("a", (), (3, 5)),)),
    "turned": mapping.TensorEntry("x", (mapping.LeafPart("a", (), (3, 5)),), turned=True),
    "column": mapping.TensorEntry("x", (mapping.LeafPart("a", (), (3, 5)),), column=True),
    "one after another": mapping.TensorEntry("x", tuple(mapping.LeafPart(n, (), (3, s)) for n, s in QKV), True),
    "in turn": mapping.TensorEntry("x", tuple(mapping.LeafPart(n, (), (3, s)) for n, s in QKV), True, 2),
    "by channel": mapping.TensorEntry("x", tuple(mapping.LeafPart(n, (), (2, 3, 4)) for n in "ab"), groups=4),
    "biases": mapping.TensorEntry("x", tuple(mapping.LeafPart(n, (), (s,)) for n, s in QKV), False, 4),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_tensor_taken_apart_and_put_together_is_itself(name):
    entry = ENTRIES[name]
    tensor = np.arange(np.prod(entry.shape), dtype=np.float32).reshape(entry.shape)
    parts = [entry.unpack(tensor, number) for number in range(len(entry.parts))]
    assert [part.shape for part in parts] == [part.shape for part in entry.parts]
    np.testing.assert_array_equal(entry.pack(parts), tensor)
    if entry.plain:
        piece = tuple(slice(1, size) for size in parts[0].shape)
        np.testing.assert_array_equal(entry.unpack(tensor[entry.index_of(piece)]), parts[0][piece])


def test_heads_that_take_turns_are_told_apart():
    """Two groups of (query query key value), one channel each: q0 q1 k0 v0 q2 q3 k1 v1."""
    parts = tuple(mapping.LeafPart(name, (), (size,)) for name, size in (("query", 4), ("key", 2), ("value", 2)))
    entry = mapping.TensorEntry("x", parts, groups=2)
    found = [entry.unpack(np.arange(8), number).tolist() for number in range(3)]
    assert found == [[0, 1, 4, 5], [2, 6], [3, 7]]


def test_a_leaf_without_a_name_is_an_error(tmp_path):
    spec = read_spec(write_config(tmp_path, "llama"))
    lacking = {key: name for key, name in names.LLAMA.names.items() if key != "*/mlp/up"}
    with pytest.raises(ValueError, match="no name .* claims leaf 'blocks/0/mlp/up/kernel'"):
        mapping.names(spec, names.LLAMA._replace(names=lacking))


# ------------------------------------------------------------------------------------------------ placing


def test_shards_are_read_straight_into_place(tmp_path):
    count = len(jax.devices())
    if count < 2 or 32 % count:
        pytest.skip("needs several devices, a divisor of 32")
    mesh = jax.make_mesh((count // 2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = {1: jax.P("fsdp"), 2: jax.P(None, ("tensor", "fsdp")), 3: jax.P(None, "fsdp", "tensor")}
    folder = write_folder(tmp_path / "m", "qwen3", "bfloat16", shards=2, head_dim=8, attention_bias=True)
    whole = load_hf(folder)
    fits = jax.tree.map(lambda leaf: jax.NamedSharding(mesh, specs[leaf.ndim]), abstract_params(whole.spec))
    placed = load_hf(folder, shardings=fits)
    for leaf, wanted in trees.paths(whole.params).items():
        found = trees.paths(placed.params)[leaf]
        assert found.sharding == trees.paths(fits)[leaf] and found.dtype == np.float32
        np.testing.assert_array_equal(found, wanted)


def test_weights_can_be_held_in_another_dtype(tmp_path):
    folder = write_folder(tmp_path / "m")
    wide, narrow = load_hf(folder), load_hf(folder, dtype="bfloat16")
    for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(narrow), strict=True):
        np.testing.assert_array_equal(np.asarray(a).astype(b.dtype), b)


# ------------------------------------------------------------------------------------------------ tokenizer


def write_tokenizer(folder, **config):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", **config}))
    return folder


def test_a_tokenizer_is_loaded_in_silence(tmp_path, capfd):
    folder = write_tokenizer(write_config(tmp_path / "m", "llama"))
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages }}")
    tokenizer = load_tokenizer(folder, template=str(template))
    assert tokenizer.convert_tokens_to_ids("b") == 1 and tokenizer.chat_template == "{{ messages }}"
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_that_is_missing_or_brings_code_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(write_config(tmp_path / "a", "llama"))
    folder = write_tokenizer(write_config(tmp_path / "b", "llama"), auto_map={"AutoTokenizer": ["evil.T", None]})
    with pytest.raises(UserError, match="auto_map"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="data.template: .*none.jinja: no such file; give a Jinja file"):
        load_tokenizer(write_tokenizer(write_config(tmp_path / "c", "llama")), template=str(tmp_path / "none.jinja"))


def test_generation_settings_come_from_the_first_file_that_says_so(tmp_path):
    folder = write_config(tmp_path, "llama", eos_token_id=2, pad_token_id=0)
    assert generation_settings(folder)[:4] == ((2,), 1, 0, False)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3], "temperature": 0.6, "do_sample": true}')
    found = generation_settings(folder)
    assert (found.eos, found.temperature, found.do_sample, found.top_p, found.top_k) == ((2, 3), 0.6, True, 1.0, 50)
    (folder / "generation_config.json").write_text('{"temperature": -1}')
    with pytest.raises(UserError, match="temperature = -1"):
        generation_settings(folder)
