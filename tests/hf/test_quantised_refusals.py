"""What of packed folders is refused: by config.json alone, before weights are fetched; and damage, by its tensor."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dpo_jax.errors import UserError
from dpo_jax.hf.checkpoint import load_hf
from dpo_jax.hf.configs import read_spec
from dpo_jax.hf.quantisation import READERS, GroupScheme, method_of
from dpo_jax.hf.quantised import opened
from dpo_jax.hf.tensors import Tensors
from tests.support import packed_weights as packed
from tests.support.hub_stand_in import serving, use
from tests.support.packed_weights import BF16, Packed
from tests.support.tiny_folders import write_config, write_folder

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
WORDS = packed.compressed("pack-quantized", type="int", num_bits=4, strategy="group", group_size=32)


def of_weights(**changes) -> dict:
    """compressed-tensors with another description of its weights."""
    weights = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32} | changes
    return packed.compressed("pack-quantized", **weights)


REFUSED = {
    "no table": (["gptq"], "quantization_config = .*a table is wanted"),
    "no method": ({"bits": 4}, "quant_method = null: .*bitsandbytes, mxfp4, fp8, gptq, awq, compressed-tensors"),
    "an unknown method": ({"quant_method": "quip"}, 'quant_method = "quip": .*give the model that was quantised'),
    "a list for a method": ({"quant_method": ["gptq"]}, "quant_method = "),
    "aqlm": ({"quant_method": "aqlm", "nbits_per_codebook": 16}, 'quant_method = "aqlm"'),
    "an unknown key": (NF4 | {"secret": 1}, "quantization_config.secret = 1: unknown key"),
    "neither 4 nor 8 bits": ({"quant_method": "bitsandbytes"}, "load_in_4bit = false"),
    "4 and 8 bits": (NF4 | {"load_in_8bit": True}, "load_in_4bit = true"),
    "4 bits of another type": (NF4 | {"bnb_4bit_quant_type": "int4"}, 'bnb_4bit_quant_type = "int4": not read'),
    "int8 with weights of 16 bits": (NF4 | {"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight = true"),
    "gptq of 3 bits": (GPTQ | {"bits": 3}, "quantization_config.bits = 3: not read, only 2, 4, 8"),
    "gptq of no bits": ({"quant_method": "gptq"}, "quantization_config.bits = null"),
    "gptq of a text of bits": (GPTQ | {"bits": "4"}, 'bits = "4"'),
    "gptq for marlin": (GPTQ | {"checkpoint_format": "marlin"}, 'checkpoint_format = "marlin"'),
    "gptq for marlin, said otherwise": (GPTQ | {"is_marlin_format": True}, "is_marlin_format = true"),
    "gptq with an adapter": (GPTQ | {"adapter": {"name": "lora"}}, "adapter = "),
    "gptq turned round": (GPTQ | {"rotation": "hadamard"}, 'rotation = "hadamard"'),
    "gptq in words of 16 bits": (GPTQ | {"pack_dtype": "int16"}, 'pack_dtype = "int16"'),
    "gptq in groups of none": (GPTQ | {"group_size": 0}, "group_size = 0: a whole number above zero"),
    "awq for gemv": (AWQ | {"version": "gemv"}, 'version = "gemv": not read, only gemm'),
    "awq for gemv, fast": (AWQ | {"version": "GEMV_FAST"}, 'version = "gemv_fast"'),
    "awq of 3 bits": (AWQ | {"bits": 3}, "bits = 3"),
    "awq without zeros": (AWQ | {"zero_point": False}, "zero_point = false"),
    "fp8 with experts of 4 bits": (FP8 | {"expert_dtype": "fp4"}, 'expert_dtype = "fp4"'),
    "fp8 of another kind": (FP8 | {"fmt": "e3m4"}, 'fmt = "e3m4"'),
    "fp8 in blocks of one number": (FP8 | {"weight_block_size": [128]}, "weight_block_size = .128.: two whole"),
    "fp8 in blocks of none": (FP8 | {"weight_block_size": [0, 128]}, "weight_block_size = .0, 128.: two whole"),
    "compressed for marlin": (WORDS | {"format": "marlin-24"}, 'format = "marlin-24"'),
    "not compressed": (WORDS | {"quantization_status": "frozen"}, 'quantization_status = "frozen"'),
    "sparse": (WORDS | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config = "),
    "turned round": (WORDS | {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config = "),
    "no groups": (WORDS | {"config_groups": {}}, "config_groups = {}: no group"),
    "groups by a name": (WORDS | {"config_groups": {"W4A16": ["Linear"]}}, r"config_groups.W4A16 = .*a table"),
    "words of 3 bits": (of_weights(num_bits=3), r"config_groups.group_0.weights.num_bits = 3: not read"),
    "groups of no size": (of_weights(group_size=None), "weights.group_size = null: a whole number"),
    "scales by token": (of_weights(strategy="token"), 'weights.strategy = "token"'),
    "blocks of no size": (of_weights(strategy="block", group_size=None), "weights.block_structure = null: two"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_its_config_alone(case, tmp_path):
    config, says = REFUSED[case]
    folder = write_config(tmp_path, "llama", architectures=["LlamaForCausalLM"], quantization_config=config)
    with pytest.raises(UserError, match=says) as caught:
        read_spec(folder)
    assert "\n" not in str(caught.value) and "config.json: quantization_config" in str(caught.value)


ACCEPTED = {
    "from before methods had names": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"bits": 4}),
    "as unsloth writes it": (
        NF4 | {"_load_in_4bit": True, "_load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16",
               "bnb_4bit_quant_storage": "uint8", "bnb_4bit_use_double_quant": True, "load_in_8bit": False,
               "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False,
               "llm_int8_skip_modules": ["lm_head"], "llm_int8_threshold": 6.0},
        {"bits": 4},
    ),
    "gptq's first version": (GPTQ | {"desc_act": False, "sym": True, "damp_percent": 0.01}, {"plus_one": True}),
    "gptq's second version": (GPTQ | {"checkpoint_format": "gptq_v2"}, {"plus_one": False, "group": 128}),
    "gptq, a group for a row": (GPTQ | {"group_size": -1}, {"group": None}),
    "gptq, modules of their own": (GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}}, {"mixed": True}),
    "awq": (AWQ | {"zero_point": True, "modules_to_not_convert": None}, {"group": 128}),
    "awq in capitals": (AWQ | {"version": "GEMM"}, {"bits": 4}),
    "fp8 as DeepSeek writes it": (
        FP8 | {"activation_scheme": "dynamic", "fmt": "e4m3", "scale_fmt": "ue8m0"}, {"block": (128, 128)}
    ),
    "fp8 without its blocks": ({"quant_method": "fp8"}, {"block": (128, 128)}),
    "fp8, one scale": ({"quant_method": "fp8", "weight_block_size": None}, {"block": None}),
    "words": (
        WORDS | {"quantization_status": "compressed", "kv_cache_scheme": None, "sparsity_config": {"format": "dense"}},
        {"schemes": (GroupScheme("int", 4, "group", 32, None),)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_programs_write_is_understood(case, tmp_path):
    config, wanted = ACCEPTED[case]
    folder = write_config(tmp_path, "llama", architectures=["LlamaForCausalLM"], quantization_config=config)
    plain = write_config(tmp_path / "plain", "llama", architectures=["LlamaForCausalLM"])
    assert read_spec(folder) == read_spec(plain)
    method = method_of({"quantization_config": config}, Path("config.json"))
    assert method is not None and method.name in READERS
    assert {name: getattr(method, name) for name in wanted} == wanted


def test_a_hub_model_that_cannot_be_read_is_refused_before_its_weights_are_downloaded(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "m", num_hidden_layers=1, architectures=["LlamaForCausalLM"])
    with serving() as hub:
        use(monkeypatch, hub, tmp_path / "home")
        hub.add("org/plain", source)
        load_hf("org/plain")
        assert hub.count("model.safetensors")
        table = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(table | {"quantization_config": GPTQ | {"bits": 3}}))
        hub.add("org/packed", source)
        hub.asked.clear()
        with pytest.raises(UserError, match="bits = 3"):
            load_hf("org/packed")
        assert hub.count("org/packed") and not hub.count("model.safetensors")


# ------------------------------------------------------------------------------------------------ damage

Arrays = dict[str, np.ndarray]
Spoil = Callable[[Arrays], object]
STATE = ".weight.quant_state.bitsandbytes__nf4"


def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def without(*suffixes: str) -> Spoil:
    return lambda tensors: [tensors.pop(suffix) for suffix in suffixes]


def changed(suffix: str, change: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    return lambda tensors: tensors.update({suffix: change(tensors[suffix])})


def with_number(suffix: str, value: float) -> Spoil:
    def spoil(tensors: Arrays) -> None:
        tensors[suffix].reshape(-1)[1] = value

    return spoil


def state(**changes) -> Spoil:
    """Other words in bitsandbytes' JSON."""

    def spoil(tensors: Arrays) -> None:
        table = json.loads(tensors[STATE].tobytes()) | changes
        tensors[STATE] = np.frombuffer(json.dumps(table).encode(), np.uint8)

    return spoil


def beside(**tensors: np.ndarray) -> Spoil:
    return lambda there: there.update({name.replace("_dot_", "."): tensor for name, tensor in tensors.items()})


def raw(text: bytes) -> Spoil:
    return changed(STATE, lambda _: np.frombuffer(text, np.uint8))


def nf4() -> Packed:
    return packed.four_bits(rng(), (6, 64))


def double() -> Packed:
    return packed.four_bits(rng(), (8, 64), nested=4)


def fp8() -> Packed:
    return packed.fp8(rng(), (12, 20), (8, 8))


def gptq() -> Packed:
    return packed.gptq(rng(), (8, 64))


def awq() -> Packed:
    return packed.awq(rng(), (16, 64))


def words() -> Packed:
    return packed.words(rng(), (24, 64), zeros="packed")


def experts() -> Packed:
    return packed.mxfp4_experts(rng(), 2, 4, 64)


def nvfp4() -> Packed:
    return packed.fp4_rows(rng(), (4, 32), nv=True)


def int8() -> Packed:
    return packed.int8(rng(), (4, 8))


DAMAGED: dict[str, tuple[Callable[[], Packed], Spoil, str]] = {
    "nf4: no absmax": (nf4, without(".weight.absmax"), "x.weight.absmax' is missing"),
    "nf4: no map of codes": (nf4, without(".weight.quant_map"), "x.weight.quant_map' is missing"),
    "nf4: no state": (nf4, without(STATE), "bitsandbytes__nf4' is missing"),
    "nf4: no codes": (nf4, without(".weight"), "x.weight' is missing"),
    "nf4: a state that is no JSON": (nf4, raw(b"{quant_type: nf4}"), "is not valid JSON"),
    "nf4: a state that is no text": (nf4, raw(b"\xff\xfe\x00"), "is not valid JSON"),
    "nf4: a state that is no object": (nf4, raw(b"[4]"), "holds a JSON list, not an object"),
    "nf4: a state of a hundred kilobytes": (nf4, raw(b" " * 100_000), "has 100000 bytes, more than"),
    "nf4: a shape of a petabyte": (
        nf4,
        state(shape=[2**25, 2**25]),
        "says shape .33554432, 33554432., and x.weight has",
    ),
    "nf4: a shape below zero": (nf4, state(shape=[-6, -64]), r"says shape = \[-6, -64\]"),
    "nf4: a shape of fractions": (nf4, state(shape=[6.0, 64]), "says shape = "),
    "nf4: a shape of a thousand axes": (nf4, state(shape=[1] * 1000), "says shape = "),
    "nf4: a smaller shape": (nf4, state(shape=[5, 64]), "has codes for 384 numbers"),
    "nf4: no block size": (nf4, state(blocksize=None), "says blocksize = null"),
    "nf4: a block size of nothing": (nf4, state(blocksize=0), "says blocksize = 0"),
    "nf4: another block size": (nf4, state(blocksize=128), r"absmax' has shape \[6\].*ask for \[3\]"),
    "nf4: another type": (nf4, state(quant_type="fp4"), 'says quant_type = "fp4"'),
    "nf4: another dtype": (nf4, state(dtype="int8"), 'says dtype = "int8"'),
    "nf4: two states": (nf4, lambda t: t.update({STATE.replace("nf4", "fp4"): t[STATE]}), "stands beside"),
    "nf4: a short map": (nf4, changed(".weight.quant_map", lambda a: a[:15]), r"quant_map' has shape \[15\]"),
    "nf4: absmax is NaN": (nf4, with_number(".weight.absmax", np.nan), "absmax' has values that are NaN or infinite"),
    "nf4: absmax is infinite": (nf4, with_number(".weight.absmax", np.inf), "absmax' has values that are NaN"),
    "nf4: absmax in 16 bits": (nf4, changed(".weight.absmax", lambda a: a.astype(np.float16)), "has dtype F16"),
    "nf4: codes in 64 bits": (nf4, changed(".weight", lambda a: a.reshape(-1).view(np.int64)), "dtype I64"),
    "nf4: the scales of int8 too": (nf4, beside(_dot_SCB=np.ones(6, np.float32)), "is packed in two ways at once"),
    "nf4: a tensor of gptq too": (nf4, beside(_dot_qweight=np.ones((8, 64), np.int32)), "packed by gptq or awq"),
    "double: no outer scales": (double, without(".weight.nested_absmax"), "nested_absmax' is missing"),
    "double: no outer map": (double, without(".weight.nested_quant_map"), "nested_quant_map' is missing"),
    "double: neither": (double, without(".weight.nested_quant_map", ".weight.nested_absmax"), "has dtype U8, and F32"),
    "double: no offset": (double, state(nested_offset=None), "says nested_offset = null"),
    "double: an offset that is NaN": (double, state(nested_offset=np.nan), "says nested_offset = NaN"),
    "double: an endless offset": (double, state(nested_offset=10**400), "says nested_offset = 1000"),
    "double: outer blocks of none": (double, state(nested_blocksize=0), "says nested_blocksize = 0"),
    "double: other outer blocks": (double, state(nested_blocksize=256), r"nested_absmax' has shape \[2\]"),
    "int8: no scales": (int8, without(".SCB"), "x.SCB' is missing"),
    "int8: too few scales": (int8, changed(".SCB", lambda a: a[:3]), r"x.SCB' has shape \[3\]"),
    "int8: another order": (int8, changed(".weight_format", lambda a: a + np.uint8(2)), "weight_format' is 2"),
    "int8: codes in 16 bits": (int8, changed(".weight", lambda a: a.astype(np.int16)), "has dtype I16, and I8"),
    "mxfp4: no scales": (experts, without("_scales"), "x_scales' is missing"),
    "mxfp4: no blocks": (experts, without("_blocks"), "x_blocks' is missing"),
    "mxfp4: blocks of 8 bytes": (experts, changed("_blocks", lambda a: a[..., :8]), "has 8 bytes in a block"),
    "mxfp4: too few scales": (experts, changed("_scales", lambda a: a[:, 1:]), r"x_scales' has shape \[2, 3, 2\]"),
    "mxfp4: no axis of experts": (experts, changed("_blocks", lambda a: a[0]), "4 axes"),
    "fp8: no scales": (fp8, without(".weight_scale_inv"), "no tensor is packed"),
    "fp8: scales by both names": (fp8, beside(_dot_weight_scale=np.ones(1, np.float32)), "stands beside a .weight_sc"),
    "fp8: scales of other blocks": (fp8, changed(".weight_scale_inv", lambda a: a[:1]), r"ask for \[2, 3\]"),
    "fp8: scales that are infinite": (fp8, with_number(".weight_scale_inv", np.inf), "NaN or infinite"),
    "fp8: weights that are not packed": (fp8, changed(".weight", lambda a: a.astype(BF16)), "has dtype BF16"),
    "fp8: three axes": (fp8, changed(".weight", lambda a: a[None]), "2 axes"),
    "gptq: no zeros": (gptq, without(".qzeros"), "x.qzeros' is missing"),
    "gptq: no scales": (gptq, without(".scales"), "x.scales' is missing"),
    "gptq: no weights": (gptq, without(".qweight"), "x.qweight' is missing"),
    "gptq: a group too many": (
        gptq,
        changed(".g_idx", lambda a: a + np.int32(1)),
        "g_idx' names group 2, and there are 2",
    ),
    "gptq: a group below zero": (gptq, with_number(".g_idx", -1), "g_idx' names group -1"),
    "gptq: too few numbers of groups": (gptq, changed(".g_idx", lambda a: a[:9]), r"g_idx' has shape \[9\]"),
    "gptq: weights in 64 bits": (gptq, changed(".qweight", lambda a: a.astype(np.int64)), "has dtype I64, and I32"),
    "gptq: zeros of another width": (gptq, changed(".qzeros", lambda a: np.tile(a, 2)), r"ask for \[2, 1\]"),
    "gptq: nothing in it": (gptq, changed(".qweight", lambda a: a[:0]), r"has shape \[0, 8\]"),
    "gptq: the plain weight too": (gptq, beside(_dot_weight=np.ones((8, 64), np.float16)), "is the same weight"),
    "awq: scales of other groups": (awq, changed(".scales", lambda a: a[:1]), r"ask for \[2, 16\]"),
    "awq: zeros of another width": (awq, changed(".qzeros", lambda a: a[:, :1]), r"ask for \[2, 2\]"),
    "awq: scales that are NaN": (awq, with_number(".scales", np.nan), "NaN or infinite"),
    "words: no shape": (words, without(".weight_shape"), "weight_"),
    "words: a shape of a petabyte": (words, with_number(".weight_shape", 2**50), "which no group of config_groups"),
    "words: a shape below zero": (words, with_number(".weight_shape", -64), "which no group of config_groups"),
    "words: other groups": (words, changed(".weight_scale", lambda a: a[:, :1]), r"ask for \[24, 2\]"),
    "words: zeros along the other axis": (
        words,
        changed(".weight_zero_point", lambda a: a.T),
        r"shape \[2, 3\].*ask for \[3, 2\]",
    ),
    "words: a group that is not there": (words, beside(_dot_weight_g_idx=np.full(64, 7)), "names group 7"),
    "nvfp4: no scale of the whole": (nvfp4, without(".weight_global_scale"), "weight_global_scale' is missing"),
    "nvfp4: scales in 32 bits": (nvfp4, changed(".weight_scale", lambda a: a.astype(np.float32)), "has dtype F32"),
    "float8 by rows: of other rows": (
        lambda: packed.byte_codes(rng(), (6, 8)),
        changed(".weight_scale", lambda a: a[1:]),
        "ask for",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_one_line_that_names_the_tensor(case, tmp_path):
    make, spoil, says = DAMAGED[case]
    one = make()
    sound = opened(packed.write_one(tmp_path / "sound", one))
    sound.exact("x" if "_blocks" in one.tensors else "x.weight")
    tensors = {suffix: tensor.copy() for suffix, tensor in one.tensors.items()}
    spoil(tensors)
    folder = packed.write_one(tmp_path / "damaged", one._replace(tensors=tensors))
    with pytest.raises(UserError) as caught:
        opened(folder).exact("x" if "_blocks" in one.tensors or "_scales" in one.tensors else "x.weight")
    line = str(caught.value)
    assert re.search(says, line), line
    assert "\n" not in line and len(line) < 500 and str(folder) in line and ";" in line, line


def test_a_file_that_ends_early_is_refused(tmp_path):
    folder = packed.write_one(tmp_path, nf4())
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-20])
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        opened(folder)


def test_packed_weights_that_the_config_does_not_mention_are_refused(tmp_path):
    for number, (make, method) in enumerate([(nf4, "bitsandbytes"), (fp8, "fp8"), (words, "compressed-tensors")]):
        folder = packed.write_one(tmp_path / str(number), make())
        (folder / "config.json").write_text('{"dtype": "bfloat16"}')
        with pytest.raises(UserError, match=f"is packed by {method}, and config.json has no quantization_config"):
            opened(folder)


def test_a_config_that_mentions_packing_and_tensors_that_are_plain_are_refused(tmp_path):
    folder = write_folder(tmp_path / "m", num_hidden_layers=1, architectures=["LlamaForCausalLM"])
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(table | {"quantization_config": GPTQ}))
    with pytest.raises(UserError, match="says 'gptq', and no tensor is packed by it; take quantization_config out"):
        load_hf(folder)


def test_a_weight_that_is_read_as_nan_is_refused_by_name(tmp_path):
    folder = write_folder(tmp_path / "m", num_hidden_layers=1, architectures=["LlamaForCausalLM"])
    packed.pack(folder, lambda r, shape: packed.fp8(r, shape, (16, 16)))
    stored = Tensors(folder)
    tensors = {name: stored.read(name) for name in stored.infos}
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name].view(np.uint8)[3, 4] = 0x7F  # NaN, in every way of 8 bits
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"tensor '{name}' gives 1 weights that are NaN"):
        load_hf(folder)


def test_a_module_with_bits_of_its_own_is_read_where_the_config_allows_it(tmp_path):
    one = packed.gptq(rng(), (16, 64), bits=8)
    folder = packed.write_one(tmp_path, one._replace(config=one.config | {"bits": 4}))
    with pytest.raises(UserError, match="x.qzeros' has shape"):
        opened(folder)
    mixed = one.config | {"bits": 4, "dynamic": {"+:x": {"bits": 8}}}
    packed.write_one(tmp_path, one._replace(config=mixed))
    assert np.array_equal(opened(tmp_path).exact("x.weight"), one.weight)
