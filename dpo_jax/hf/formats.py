"""How packed weights lie in a folder: for each `quant_method`, a row for each of its formats.

The formulas are those of the libraries that own the formats, computed in float32 (`dequantise`); where a library's own
way back differs, it is said beside the row.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.errors import one_line, short
from dpo_jax.hf import dequantise
from dpo_jax.hf.dequantise import blocks, blockwise
from dpo_jax.hf.packed import Arrays, Damaged, PackedFormat, Plan, Shape, Stem
from dpo_jax.hf.quantisation import DTYPES, GroupScheme, Method
from dpo_jax.hf.tensors import STORED, TensorInfo

FLOATS = ("F32", "F16", "BF16")
FLOAT8 = ("F8_E4M3", "F8_E5M2")
POWERS = ("U8", "F8_E8M0")
"""Scales that are powers of two."""


# ---------------------------------------------------------------------------------------------- bitsandbytes

STATE = ".weight.quant_state.bitsandbytes__"
STATES = (f"{STATE}nf4", f"{STATE}fp4")
MAX_STATE_BYTES = 1 << 16
BLOCKS = tuple(2**power for power in range(5, 13))
NESTED = (".weight.nested_absmax", ".weight.nested_quant_map")
FLOAT_MAX = float(np.finfo(np.float32).max)


def _four_bits(stem: Stem, method: Method) -> Plan:
    suffix, state = _state(stem)
    shape, block = tuple(state["shape"]), state["blocksize"]
    count = math.prod(shape)
    stem.shape(".weight", *(name for name, dtype in STORED.items() if dtype.itemsize <= 4))
    packed = stem.infos[".weight"]
    size = STORED[packed.dtype].itemsize
    held = math.prod(packed.shape) * size
    if not 0 <= held - -(-count // 2) < size:
        raise stem.wrong(suffix, f"says shape {list(shape)}, and {stem.name}.weight has codes for {2 * held} numbers")
    stem.must(".weight.quant_map", [(16,)], "F32")
    return Plan(shape, (block, *_absmax(stem, suffix, state, -(-count // block))), DTYPES[state["dtype"]])


def _absmax(stem: Stem, suffix: str, state: Mapping[str, Any], number: int) -> tuple[int | float, ...]:
    """Block size and offset of scales that were quantised themselves; () if they were not."""
    if not any(one in stem.infos for one in NESTED):
        stem.must(".weight.absmax", [(number,)], "F32")
        return ()
    missing = [one for one in NESTED if one not in stem.infos]
    if missing:
        raise stem.wrong(missing[0], "is missing")
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise stem.wrong(suffix, f"says nested_blocksize = {short(json.dumps(block))}")
    if isinstance(offset, bool) or not isinstance(offset, int | float) or not abs(offset) < FLOAT_MAX:
        raise stem.wrong(suffix, f"says nested_offset = {short(json.dumps(offset))}")
    stem.must(".weight.absmax", [(number,)], "U8")
    stem.must(".weight.nested_absmax", [(-(-number // block),)], "F32")
    stem.must(".weight.nested_quant_map", [(256,)], "F32")
    return block, float(offset)


def _state(stem: Stem) -> tuple[str, dict[str, Any]]:
    """The JSON that bitsandbytes writes beside a weight, and the suffix of its tensor."""
    suffix, *others = [suffix for suffix in STATES if suffix in stem.infos] or [STATES[0]]
    if others or suffix not in stem.infos:
        raise stem.wrong(suffix, f"stands beside {stem.name + others[0]!r}" if others else "is missing")
    (size,) = stem.shape(suffix, "U8", rank=1)
    if size > MAX_STATE_BYTES:
        raise stem.wrong(suffix, f"has {size} bytes, more than the {MAX_STATE_BYTES} it may have")
    try:
        state = json.loads(stem.read(suffix).tobytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise stem.wrong(suffix, f"is not valid JSON ({one_line(error)})") from error
    if not isinstance(state, dict):
        raise stem.wrong(suffix, f"holds a JSON {type(state).__name__}, not an object")
    shape = state.get("shape")
    axes = shape if isinstance(shape, list) and 1 <= len(shape) <= 4 else [0]
    right = {
        "quant_type": state.get("quant_type") == suffix.removeprefix(STATE),
        "blocksize": type(state.get("blocksize")) is int and state["blocksize"] in BLOCKS,
        "dtype": isinstance(state.get("dtype"), str) and state["dtype"] in DTYPES,
        "shape": all(type(axis) is int and 0 < axis < 2**31 for axis in axes),
    }
    bad = next((name for name, ok in right.items() if not ok), None)
    if bad is not None:
        raise stem.wrong(suffix, f"says {bad} = {short(json.dumps(state.get(bad)))}, which no weight has")
    return suffix, state


class FourBits(NamedTuple):
    """A weight of bitsandbytes' 4 bits: `codes` two to a byte with the first one high, the value `table` has for each,
    and `absmax` of each `block` codes in a row, in float32 whether or not the folder has it in 8 bits."""

    codes: np.ndarray
    table: np.ndarray
    absmax: np.ndarray
    block: int
    shape: Shape


def four_bits(arrays: Arrays, plan: Plan) -> FourBits:
    """The parts of a weight, still packed."""
    block, *nested = plan.facts
    absmax = arrays[".weight.absmax"]
    if nested:
        absmax = dequantise.absmax_of(absmax, arrays[NESTED[1]], arrays[NESTED[0]], nested[0], nested[1])
    codes = arrays[".weight"].reshape(-1).view(np.uint8)[: -(-math.prod(plan.shape) // 2)]
    return FourBits(codes, arrays[".weight.quant_map"], absmax, block, plan.shape)


def _four_bit_weight(arrays: Arrays, plan: Plan) -> np.ndarray:
    packed, table, absmax, block, shape = four_bits(arrays, plan)
    codes = dequantise.nibbles(packed, high_first=True)[: math.prod(shape)]
    return dequantise.flat_blocks(codes, table, absmax, block).reshape(shape)


def _int8(stem: Stem, method: Method) -> Plan:
    shape = stem.shape(".weight", "I8", rank=2)
    stem.must(".SCB", [shape[:1], (shape[0], 1), (1, shape[0])], "F32")
    if ".weight_format" in stem.infos:
        kind = int(stem.read(".weight_format").reshape(-1)[0]) if math.prod(stem.infos[".weight_format"].shape) else -1
        if kind != 0:
            raise stem.wrong(".weight_format", f"is {kind}; only 0, whole rows, is read")
    return Plan(shape)


def _int8_weight(arrays: Arrays, plan: Plan) -> np.ndarray:
    return dequantise.int8_rows(arrays[".weight"], arrays[".SCB"].reshape(-1))


# ---------------------------------------------------------------------------------------------- MXFP4 and FP8


def _mxfp4(stem: Stem, method: Method) -> Plan:
    experts, outputs, groups, half = stem.shape("_blocks", "U8", rank=4)
    if half != 16:
        raise stem.wrong("_blocks", f"has {half} bytes in a block, and 16 (of 32 numbers) are wanted")
    stem.must("_scales", [(experts, outputs, groups)], *POWERS)
    return Plan((experts, 32 * groups, outputs))


def _mxfp4_weight(arrays: Arrays, plan: Plan) -> np.ndarray:
    experts, inputs, outputs = plan.shape
    scale = dequantise.powers_of_two(arrays["_scales"]).reshape(experts * outputs, -1)
    found = dequantise.microscaled(arrays["_blocks"].reshape(experts * outputs, -1), scale, 32)
    return found.reshape(experts, outputs, inputs).swapaxes(1, 2)


def _fp8(stem: Stem, method: Method) -> Plan:
    shape = stem.shape(".weight", *FLOAT8, rank=2)
    scales = [suffix for suffix in (".weight_scale_inv", ".weight_scale") if suffix in stem.infos]
    if len(scales) != 1:
        raise stem.wrong(".weight_scale_inv", "stands beside a .weight_scale" if scales else "is missing")
    if method.block is not None and scales[0] == ".weight_scale_inv":
        options = _options(shape, GroupScheme("float", 8, "block", None, method.block))
    else:
        options = [
            one for way in ("tensor", "channel") for one in _options(shape, GroupScheme("float", 8, way, None, None))
        ]
    return Plan(shape, (scales[0], _block_of(stem, scales[0], options, *FLOATS, *POWERS)))


def _fp8_weight(arrays: Arrays, plan: Plan) -> np.ndarray:
    return _scaled(arrays[".weight"], arrays[plan.facts[0]], plan.facts[1])


def _options(shape: Shape, scheme: GroupScheme) -> list[tuple[Shape, Shape]]:
    """Shapes that scales may have, each with the rows and columns that then share one."""
    match scheme.strategy:
        case "tensor":
            return [((), shape), ((1,), shape), ((1, 1), shape)]
        case "channel":
            return [((shape[0], 1), (1, shape[1])), ((shape[0],), (1, shape[1]))]
        case "block":
            assert scheme.block is not None
            return [(_counts(shape, scheme.block), scheme.block)]
    assert scheme.group is not None
    return [(_counts(shape, (1, scheme.group)), (1, scheme.group))]


def _counts(shape: Shape, block: Shape) -> Shape:
    """How many blocks there are on each axis, the last of which may be short."""
    return tuple(-(-size // part) for size, part in zip(shape, block, strict=True))


def _block_of(stem: Stem, suffix: str, options: Sequence[tuple[Shape, Shape]], *dtypes: str) -> Shape:
    stem.must(suffix, [shape for shape, _ in options], *dtypes)
    found = {block for shape, block in options if shape == stem.infos[suffix].shape}
    if len(found) > 1:
        raise stem.wrong(suffix, f"may be of blocks of {' or '.join(map(str, sorted(found)))}, and nothing says which")
    return found.pop()


def _scaled(codes: np.ndarray, scale: np.ndarray, block: Shape, zeros: np.ndarray | None = None) -> np.ndarray:
    """Codes of one byte times the scale of their block."""
    counts = _counts(codes.shape, block)
    scale = dequantise.powers_of_two(scale) if scale.dtype.name in ("uint8", "float8_e8m0fnu") else scale
    zeros = None if zeros is None else zeros.astype(np.float32).reshape(counts)
    rows, columns = (blocks(size, part) for size, part in zip(codes.shape, block, strict=True))
    table = None
    if codes.dtype.name.startswith("float8"):
        table, codes = dequantise.float_table(codes.dtype), codes.view(np.uint8)
    return blockwise(codes, scale.astype(np.float32).reshape(counts), rows, columns, table=table, zeros=zeros)


# ---------------------------------------------------------------------------------------------- GPTQ and AWQ


def _gptq(stem: Stem, method: Method) -> Plan:
    packed, outputs = stem.shape(".qweight", "I32", rank=2)
    groups, _ = stem.shape(".scales", *FLOATS, rank=2)
    bits = method.bits
    if method.mixed:
        bits = 32 * stem.shape(".qzeros", "I32", rank=2)[1] // outputs
        if bits not in (2, 4, 8):
            raise stem.wrong(".qzeros", f"has {bits} bits for each of {outputs} outputs; only 2, 4 and 8 are read")
    inputs = 32 * packed // bits
    stem.must(".scales", [(groups, outputs)], *FLOATS)
    stem.must(".qzeros", [(groups, -(-outputs * bits // 32))], "I32")
    if ".g_idx" in stem.infos:
        stem.must(".g_idx", [(inputs,)], "I32", "I64")
    else:
        stem.must(".scales", [(-(-inputs // (method.group or inputs)), outputs)], *FLOATS)
    return Plan((outputs, inputs), (bits, method.plus_one, method.group or inputs))


def _gptq_weight(arrays: Arrays, plan: Plan) -> np.ndarray:
    bits, plus_one, group = plan.facts
    scale, groups = arrays[".scales"].astype(np.float32), blocks(plan.shape[1], group)
    if ".g_idx" in arrays:
        groups = _groups(".g_idx", arrays[".g_idx"], len(scale))
    return dequantise.gptq(arrays[".qweight"], arrays[".qzeros"], scale, groups, bits, plus_one=plus_one)


def _groups(suffix: str, numbers: np.ndarray, count: int) -> np.ndarray:
    """The group of each input, which must be one of so many."""
    wrong = numbers[(numbers < 0) | (numbers >= count)]
    if len(wrong):
        raise Damaged(suffix, f"names group {wrong[0]}, and there are {count}")
    return numbers


def _awq(stem: Stem, method: Method) -> Plan:
    inputs, packed = stem.shape(".qweight", "I32", rank=2)
    group = method.group or inputs
    groups = -(-inputs // group)
    stem.must(".scales", [(groups, 8 * packed)], *FLOATS)
    stem.must(".qzeros", [(groups, packed)], "I32")
    return Plan((8 * packed, inputs), (group,))


def _awq_weight(arrays: Arrays, plan: Plan) -> np.ndarray:
    scale = arrays[".scales"].astype(np.float32)
    return dequantise.awq(arrays[".qweight"], arrays[".qzeros"], scale, plan.facts[0])


# ---------------------------------------------------------------------------------------------- compressed-tensors


def _compressed_as(infos: Mapping[str, TensorInfo]) -> str:
    """The format of a stem."""
    packed, scale = infos.get(".weight_packed"), infos.get(".weight_scale")
    if packed is None:
        return "pack" if ".weight" not in infos else "bytes"
    if packed.dtype == "U8" and ".weight_shape" not in infos:
        is_nv = ".weight_global_scale" in infos or (scale is not None and scale.dtype in FLOAT8)
        return "nvfp4" if is_nv else "mxfp4"
    return "pack"


def _is(kind: str) -> Callable[[Mapping[str, TensorInfo]], bool]:
    return lambda infos: _compressed_as(infos) == kind


def _words(stem: Stem, method: Method) -> Plan:
    """Whole numbers of a few bits, in 32-bit words."""
    outputs, packed = stem.shape(".weight_packed", "I32", rank=2)
    stem.must(".weight_shape", [(2,)], "I64", "I32")
    shape = tuple(int(size) for size in stem.read(".weight_shape"))
    fits = [one for one in method.schemes if one.kind == "int" and _word_count(shape, one.bits) == (outputs, packed)]
    if not fits:
        held = f"and {stem.name}.weight_packed has {outputs} rows of {packed} words"
        raise stem.wrong(".weight_shape", f"says {list(shape)}, {held}, which no group of config_groups makes of it")
    if len({one.bits for one in fits}) > 1:
        raise stem.wrong(".weight_packed", "may be of several numbers of bits, and nothing says which")
    block = _block_of(stem, ".weight_scale", [way for one in fits for way in _options(shape, one)], *FLOATS)
    bits, counts = fits[0].bits, _counts(shape, block)
    if ".weight_zero_point" in stem.infos:
        kind = stem.infos[".weight_zero_point"].dtype
        wanted = counts if kind == "I8" else (-(-counts[0] * bits // 32), counts[1])
        stem.must(".weight_zero_point", [wanted], "I32", "I8")
    if ".weight_g_idx" in stem.infos:
        stem.must(".weight_g_idx", [shape[1:]], "I32", "I64")
    return Plan(shape, (bits, block))


def _word_count(shape: Shape, bits: int) -> Shape:
    return shape[0], -(-shape[1] // (32 // bits))


def _words_weight(arrays: Arrays, plan: Plan) -> np.ndarray:
    bits, block = plan.facts
    counts, half = _counts(plan.shape, block), 2 ** (bits - 1)
    codes = dequantise.words(arrays[".weight_packed"], bits, 1)[:, : plan.shape[1]]
    zeros = np.full(counts, half, np.float32)
    if (stored := arrays.get(".weight_zero_point")) is not None:
        signed = stored.dtype == np.int8
        zeros = stored.astype(np.float32) + half if signed else dequantise.words(stored, bits, 0)[: counts[0]]
    rows, columns = (blocks(size, part) for size, part in zip(plan.shape, block, strict=True))
    order = arrays.get(".weight_g_idx")
    if order is not None and (order != -1).any():  # -1 stands where the inputs are in order
        columns = _groups(".weight_g_idx", order, counts[1])
    scale = arrays[".weight_scale"].astype(np.float32).reshape(counts)
    return blockwise(codes, scale, rows, columns, zeros=zeros)


def _bytes(stem: Stem, method: Method) -> Plan:
    """Whole numbers or floating-point ones of 8 bits, one after another."""
    shape = stem.shape(".weight", "I8", *FLOAT8, rank=2)
    kind = "int" if stem.infos[".weight"].dtype == "I8" else "float"
    fits = [scheme for scheme in method.schemes if scheme.kind == kind]
    block = _block_of(stem, ".weight_scale", [way for one in fits for way in _options(shape, one)], *FLOATS)
    if ".weight_zero_point" in stem.infos:
        stem.must(".weight_zero_point", [stem.infos[".weight_scale"].shape], "I8", *FLOATS, *FLOAT8)
    return Plan(shape, (block,))


def _bytes_weight(arrays: Arrays, plan: Plan) -> np.ndarray:
    return _scaled(arrays[".weight"], arrays[".weight_scale"], plan.facts[0], arrays.get(".weight_zero_point"))


def _fp4(group: int, *dtypes: str) -> Callable[[Stem, Method], Plan]:
    """FP4 with a scale for so many neighbours, and for NVFP4 one more for the whole weight."""

    def plan(stem: Stem, method: Method) -> Plan:
        outputs, half = stem.shape(".weight_packed", "U8", rank=2)
        stem.must(".weight_scale", [(outputs, -(-2 * half // group))], *dtypes)
        if ".weight_global_scale" in stem.infos:
            stem.must(".weight_global_scale", [(), (1,)], "F32")
        return Plan((outputs, 2 * half))

    return plan


def _nvfp4_weight(arrays: Arrays, plan: Plan) -> np.ndarray:
    scale = arrays[".weight_scale"].astype(np.float32) / arrays[".weight_global_scale"].reshape(())
    return dequantise.microscaled(arrays[".weight_packed"], scale, 16)


def _mx_weight(arrays: Arrays, plan: Plan) -> np.ndarray:
    return dequantise.microscaled(arrays[".weight_packed"], dequantise.powers_of_two(arrays[".weight_scale"]), 32)


# ---------------------------------------------------------------------------------------------- the table

INT = (".qweight", ".qzeros", ".scales")
SCALES = (".weight_scale_inv", ".weight_scale")
BYTES = (".weight", ".weight_scale")
PACKED = (".weight_packed", ".weight_scale")


def _any(infos: Mapping[str, TensorInfo]) -> bool:
    return True


FORMATS: Mapping[str, tuple[PackedFormat, ...]] = {
    "bitsandbytes": (
        PackedFormat(
            codes=".weight",
            needed=(".weight", ".weight.absmax", ".weight.quant_map"),
            optional=(*NESTED, *STATES),
            fits=lambda infos: any(suffix.startswith(".weight.") for suffix in infos),
            plan=_four_bits,
            weight=_four_bit_weight,
        ),
        # bitsandbytes rounds the activations to 8 bits too, which is no matter of the weights
        PackedFormat(
            codes=".weight",
            needed=(".weight", ".SCB"),
            optional=(".weight_format",),
            fits=lambda infos: ".SCB" in infos or ".weight_format" in infos,
            plan=_int8,
            weight=_int8_weight,
        ),
    ),
    "mxfp4": (PackedFormat("_blocks", ("_blocks", "_scales"), (), _any, _mxfp4, _mxfp4_weight, plain=""),),
    # transformers 5.24 takes other blocks where 128 does not divide a shape
    "fp8": (PackedFormat(".weight", (".weight",), SCALES, _any, _fp8, _fp8_weight),),
    "gptq": (PackedFormat(".qweight", INT, (".g_idx",), _any, _gptq, _gptq_weight),),
    "awq": (PackedFormat(".qweight", INT, (), _any, _awq, _awq_weight),),
    "compressed-tensors": (
        PackedFormat(
            codes=".weight_packed",
            needed=(*PACKED, ".weight_shape"),
            optional=(".weight_zero_point", ".weight_g_idx"),
            fits=_is("pack"),
            plan=_words,
            weight=_words_weight,
        ),
        PackedFormat(".weight", BYTES, (".weight_zero_point",), _is("bytes"), _bytes, _bytes_weight),
        # the library rounds its scales, and so the weights, to bfloat16
        PackedFormat(
            codes=".weight_packed",
            needed=(*PACKED, ".weight_global_scale"),
            optional=(),
            fits=_is("nvfp4"),
            plan=_fp4(16, "F8_E4M3"),
            weight=_nvfp4_weight,
        ),
        PackedFormat(".weight_packed", PACKED, (), _is("mxfp4"), _fp4(32, *POWERS), _mx_weight),
    ),
}
"""The formats of each method; a packed weight is of exactly one."""

ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
    "fp8": (".input_scale", ".activation_scale", ".k_scale", ".v_scale"),
    "compressed-tensors": tuple(
        f".{of}_{what}"
        for of in ("input", "output", "k", "v", "q")
        for what in ("scale", "zero_point", "global_scale", "g_idx")
    ),
}
"""Suffixes of what is used to round activations; these weights are used without."""

MARKS: Mapping[str, tuple[str, ...]] = {
    ".weight.absmax": ("bitsandbytes",),
    ".SCB": ("bitsandbytes",),
    "_blocks": ("mxfp4",),
    ".weight_scale_inv": ("fp8",),
    ".qweight": ("gptq", "awq"),
    ".weight_packed": ("compressed-tensors",),
}
"""Suffixes that no plain tensor has, and the methods that packed it."""
