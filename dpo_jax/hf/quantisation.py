"""`quantization_config` of a `config.json`: how a folder's weights are packed, and whether that can be read here.

Everything is judged from the config alone, so that a hub model that cannot be read is refused before its weights are
downloaded. As with the rest of a config, a key must be used, required to have a harmless value, or known not to change
what the weights are. Which tensors are packed is seen from the tensors themselves (`formats`), never from lists of
modules to skip.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.hf.keys import Keys

KEY = "quantization_config"
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
WITHOUT = "give the model that was quantised, or one packed in another way"


class GroupScheme(NamedTuple):
    """What compressed-tensors says of the weights of a group of modules."""

    kind: str
    bits: int
    strategy: str
    group: int | None
    block: tuple[int, int] | None


class Method(NamedTuple):
    """How the weights of a folder are packed.

    `dtype` is safetensors' name of what weights become where neither they nor their format say. `group` is None for one
    group; `block` is None for FP8 with one scale for a whole weight. `mixed` says that some modules have other `bits`.
    """

    name: str
    dtype: str = "BF16"
    bits: int = 4
    group: int | None = None
    block: tuple[int, int] | None = None
    plus_one: bool = False
    mixed: bool = False
    schemes: tuple[GroupScheme, ...] = ()


def method_of(raw: Mapping[str, Any], file: Path) -> Method | None:
    """How a `config.json` says that weights are packed; None where it says nothing.

    Raises:
      UserError: they are packed in a way that is not read here; names the key, its value and what to do.
    """
    table = raw.get(KEY)
    if table is None:
        return None
    if not isinstance(table, dict):
        raise Keys(raw, file).refuse(KEY, table, "a table is wanted; fetch the file again")
    keys = Keys(table, file, f"{KEY}.")
    name = keys.take("quant_method")
    if name is None and (table.get("load_in_4bit") or table.get("load_in_8bit")):
        name = "bitsandbytes"  # before it named itself
    if not isinstance(name, str) or name not in READERS:
        why = f"weights packed this way are not read, only those of {', '.join(READERS)}; {WITHOUT}"
        raise keys.refuse("quant_method", name, why)
    read, harmless = READERS[name]
    method = read(keys)._replace(name=name, dtype=_dtype(raw))
    keys.finish(frozenset(harmless.split()))
    return method


def _dtype(raw: Mapping[str, Any]) -> str:
    """What a config says that weights are where they are not packed."""
    inner = raw.get("text_config")
    for table in (raw, inner if isinstance(inner, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if (name := str(table.get(key)).removeprefix("torch.")) in DTYPES:
                return DTYPES[name]
    return "BF16"


def _one_of(k: Keys, name: str, allowed: tuple[Any, ...], default: object) -> Any:
    """The value of a key that must be one of these, in capitals or not."""
    value = k.take(name, default)
    value = value.lower() if isinstance(value, str) else value
    if isinstance(value, list | dict) or value not in allowed:
        raise k.refuse(name, value, f"not read, only {', '.join(map(str, allowed))}; {WITHOUT}")
    return value


def _group(k: Keys, name: str) -> int | None:
    """Inputs that share a scale; None where all do."""
    return None if k.peek(name) in (None, -1) and k.take(name) in (None, -1) else k.size(name)


def _pair(k: Keys, name: str, value: object) -> tuple[int, int]:
    sizes = value if isinstance(value, list | tuple) and len(value) == 2 else []
    if not sizes or any(isinstance(one, bool) or not isinstance(one, int) or one < 1 for one in sizes):
        raise k.refuse(name, value, "two whole numbers above zero are wanted")
    return sizes[0], sizes[1]


def _bitsandbytes(k: Keys) -> Method:
    four, eight = k.flag("load_in_4bit"), k.flag("load_in_8bit")
    if four == eight:
        raise k.refuse("load_in_4bit", four, f"load_in_8bit is {str(eight).lower()} too; one of the two must be true")
    k.require({"llm_int8_has_fp16_weight": False})
    if four:
        _one_of(k, "bnb_4bit_quant_type", ("nf4", "fp4"), "fp4")
    return Method("", bits=4 if four else 8)


def _mxfp4(k: Keys) -> Method:
    return Method("")


def _fp8(k: Keys) -> Method:
    _one_of(k, "fmt", ("e4m3", "e5m2", "e4m3fn", "float8_e4m3fn"), "e4m3")
    _one_of(k, "scale_fmt", ("float", "ue8m0"), "float")
    _one_of(k, "expert_dtype", ("fp8",), "fp8")
    size = k.take("weight_block_size", None if k.has("weight_block_size") else [128, 128])
    return Method("", bits=8, block=None if size is None else _pair(k, "weight_block_size", size))


def _gptq(k: Keys) -> Method:
    bits = _one_of(k, "bits", (2, 4, 8), None)
    versions = ("gptq", "gptq_v2")
    version = _one_of(k, "format", versions, "gptq")
    version = _one_of(k, "checkpoint_format", versions, version)
    _one_of(k, "pack_dtype", ("int32", "torch.int32"), "int32")
    k.require({"is_marlin_format": False, "adapter": None, "rotation": None})
    mixed = bool(k.take("dynamic"))
    return Method("", bits=bits, group=_group(k, "group_size"), plus_one=version == "gptq", mixed=mixed)


def _awq(k: Keys) -> Method:
    _one_of(k, "bits", (4,), 4)
    _one_of(k, "format", ("gemm",), "gemm")
    _one_of(k, "version", ("gemm",), "gemm")
    k.require({"zero_point": True})
    return Method("", group=_group(k, "group_size"))


COMPRESSED = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mixed-precision"),
)


def _compressed(k: Keys) -> Method:
    _one_of(k, "format", COMPRESSED, None)
    _one_of(k, "quantization_status", ("compressed",), "compressed")
    for name in ("sparsity_config", "transform_config"):
        value = k.take(name)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            raise k.refuse(name, value, f"not read, only weights that are quantised and nothing else; {WITHOUT}")
    named = k.peek("config_groups")
    groups = k.part("config_groups")
    schemes = [_scheme(groups.part(name)) for name in named or ()]
    if not any(schemes):
        raise k.refuse("config_groups", named, f"no group of modules has quantised weights; {WITHOUT}")
    return Method("", schemes=tuple(dict.fromkeys(scheme for scheme in schemes if scheme is not None)))


def _scheme(k: Keys) -> GroupScheme | None:
    """One group of modules; None if only its activations are quantised."""
    _one_of(k, "format", (None, *COMPRESSED), None)
    weights, there = k.part("weights"), bool(k.peek("weights"))
    k.finish(frozenset({"targets", "input_activations", "output_activations"}))
    if not there:
        return None
    kind = _one_of(weights, "type", ("int", "float"), "int")
    bits = _one_of(weights, "num_bits", (2, 4, 8) if kind == "int" else (4, 8), 8)
    block = weights.take("block_structure")
    guess = "block" if block is not None else "tensor" if weights.peek("group_size") is None else "group"
    strategy = _one_of(weights, "strategy", ("tensor", "channel", "group", "tensor_group", "block"), guess)
    group = weights.size("group_size") if strategy in ("group", "tensor_group") else None
    sizes = _pair(weights, "block_structure", block) if strategy == "block" else None
    weights.finish(
        frozenset("group_size symmetric dynamic actorder observer observer_kwargs scale_dtype zp_dtype".split())
    )
    return GroupScheme(kind, bits, strategy, group, sizes)


BNB = (
    "_load_in_4bit _load_in_8bit bnb_4bit_compute_dtype bnb_4bit_quant_storage bnb_4bit_quant_type "
    "bnb_4bit_use_double_quant llm_int8_enable_fp32_cpu_offload llm_int8_skip_modules llm_int8_threshold"
)
SKIPPED = "modules_to_not_convert modules_to_convert ignored_layers"
GPTQ = (
    "quant_method sym desc_act static_groups act_group_aware hyb_act true_sequential damp_percent damp_auto_increment "
    "mse lm_head meta tokenizer dataset backend model_seqlen block_name_to_quantize module_name_preceding_first_block "
    "batch_size pad_token_id max_input_length cache_block_outputs modules_in_block_to_quantize use_cuda_fp16 "
    "use_exllama exllama_config disable_exllama max_new_tokens model_name_or_path model_file_base_name quantizer "
    "modules_to_not_convert parallel_packing offload_to_disk offload_to_disk_path pack_impl mock_quantization gptaq "
    "gptaq_alpha v2 v2_alpha gptq_v2 use_marlin"
)
AWQ = (
    f"{SKIPPED} backend do_fuse fuse_max_seq_len modules_to_fuse exllama_config sym desc_act damp_percent "
    "true_sequential lm_head meta quantizer"
)
READERS: Mapping[str, tuple[Callable[[Keys], Method], str]] = {
    "bitsandbytes": (_bitsandbytes, BNB),
    "mxfp4": (_mxfp4, f"{SKIPPED} dequantize"),
    "fp8": (_fp8, f"{SKIPPED} activation_scheme dequantize kv_cache_scheme"),
    "gptq": (_gptq, GPTQ),
    "awq": (_awq, AWQ),
    "compressed-tensors": (
        _compressed,
        "ignore kv_cache_scheme global_compression_ratio version run_compressed dequantize use_optimized_inference",
    ),
}
"""For each `quant_method`, its reader, and the keys that do not change what the weights are."""
