"""Weights packed in every format, by loops over plain Python numbers: small, slow, and apart from what reads them.

Each function draws codes and scales at random, and gives the tensors of one weight by suffix beside the float32 numbers
that the format's formula makes of them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from tests.support.tiny_folders import write_index

SINGLE = "model.safetensors"

F8 = np.dtype(ml_dtypes.float8_e4m3fn)
E8 = np.dtype(ml_dtypes.float8_e8m0fnu)
BF16 = np.dtype(ml_dtypes.bfloat16)
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
f32 = np.float32


class Packed(NamedTuple):
    """The tensors of a weight by suffix, the weight, and the `quantization_config` that goes with it."""

    tensors: dict[str, np.ndarray]
    weight: np.ndarray
    config: dict


def in_words(codes: list[int], bits: int) -> list[int]:
    """Codes side by side in signed words of 32 bits, the first in the lowest bits; zeros fill the last word."""
    each = 32 // bits
    found = []
    for start in range(0, len(codes), each):
        word = sum(code << bits * place for place, code in enumerate(codes[start : start + each]))
        found.append(word - 2**32 if word >= 2**31 else word)
    return found


def in_bytes(codes: list[int], high_first: bool) -> np.ndarray:
    codes = codes + [0] * (len(codes) % 2)
    pairs = zip(codes[::2], codes[1::2], strict=True)
    return np.array([a << 4 | b if high_first else b << 4 | a for a, b in pairs], np.uint8)


def fp4(code: int) -> np.float32:
    return f32(-FP4[code - 8] if code > 7 else FP4[code])


def four_bits(rng, shape, block=64, kind="nf4", dtype="float32", nested=0, storage=np.uint8) -> Packed:
    """bitsandbytes; `nested` is the block size of scales that are quantised too."""
    count = int(np.prod(shape))
    codes = rng.integers(0, 16, count).tolist()
    table = np.sort(rng.standard_normal(16)).astype(f32)
    number = -(-count // block)
    state: dict = {"quant_type": kind, "blocksize": block, "dtype": dtype, "shape": list(shape)}
    tensors = {}
    if nested:
        small = rng.integers(0, 256, number).astype(np.uint8)
        outer = rng.uniform(0.5, 2, -(-number // nested)).astype(f32)
        inner, offset = np.sort(rng.uniform(-1, 1, 256)).astype(f32), f32(rng.uniform(1, 2))
        absmax = [f32(f32(inner[small[k]] * outer[k // nested]) + offset) for k in range(number)]
        state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": float(offset)}
        tensors = {".weight.absmax": small, ".weight.nested_absmax": outer, ".weight.nested_quant_map": inner}
    else:
        absmax = list(rng.uniform(0.5, 2, number).astype(f32))
        tensors = {".weight.absmax": np.array(absmax, f32)}
    size = np.dtype(storage).itemsize
    packed = in_bytes(codes, high_first=True)
    packed = np.concatenate([packed, np.zeros(-len(packed) % size, np.uint8)])
    tensors |= {
        ".weight": packed.view(storage)[:, None],
        ".weight.quant_map": table,
        f".weight.quant_state.bitsandbytes__{kind}": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }
    weight = np.array([f32(table[code] * absmax[k // block]) for k, code in enumerate(codes)], f32).reshape(shape)
    return Packed(tensors, weight, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind})


def int8(rng, shape) -> Packed:
    codes = rng.integers(-127, 128, shape).astype(np.int8)
    largest = rng.uniform(0.5, 2, shape[0]).astype(f32)
    weight = np.array([[f32(f32(int(q)) * s) / f32(127) for q in row] for row, s in zip(codes, largest, strict=True)])
    tensors = {".weight": codes, ".SCB": largest, ".weight_format": np.array(0, np.uint8)}
    return Packed(tensors, weight.astype(f32), {"quant_method": "bitsandbytes", "load_in_8bit": True})


def mxfp4_experts(rng, experts, outputs, inputs, powers=np.uint8) -> Packed:
    """gpt-oss: the weight is [experts, inputs, outputs]."""
    codes = rng.integers(0, 16, (experts, outputs, inputs))
    scale = rng.integers(120, 134, (experts, outputs, inputs // 32)).astype(np.uint8)
    weight = np.empty((experts, inputs, outputs), f32)
    for e, o, i in np.ndindex(codes.shape):
        weight[e, i, o] = fp4(codes[e, o, i]) * f32(2.0 ** (int(scale[e, o, i // 32]) - 127))
    packed = in_bytes(codes.reshape(-1).tolist(), high_first=False).reshape(experts, outputs, inputs // 32, 16)
    return Packed({"_blocks": packed, "_scales": scale.view(powers)}, weight, {"quant_method": "mxfp4"})


def blocks_of(values: np.ndarray, scale: np.ndarray, rows: int, columns: int) -> np.ndarray:
    found = np.empty(values.shape, f32)
    for o, i in np.ndindex(values.shape):
        found[o, i] = f32(values[o, i]) * f32(scale[o // rows, i // columns])
    return found


def fp8(rng, shape, block=(128, 128), scale="F32", kind=F8) -> Packed:
    """Blocks of `block`, the last of which may be short; or one scale for all, for None."""
    codes = rng.standard_normal(shape).astype(f32).astype(kind)
    rows, columns = block or shape
    counts = -(-shape[0] // rows), -(-shape[1] // columns)
    numbers = rng.uniform(0.01, 0.1, counts).astype(f32)
    stored = numbers
    if scale != "F32":
        exponents = rng.integers(120, 130, counts).astype(np.uint8)
        numbers, stored = (
            f32(2.0) ** (exponents.astype(f32) - 127),
            exponents.view(E8 if scale == "F8_E8M0" else np.uint8),
        )
    tensors = {".weight": codes, ".weight_scale_inv": stored if block else stored.reshape(())}
    if not block:
        tensors[".activation_scale"] = np.ones((), f32)
    config = {"quant_method": "fp8", "weight_block_size": list(block) if block else None}
    return Packed(tensors, blocks_of(codes, numbers, rows, columns), config)


def gptq(rng, shape, bits=4, group=32, version="gptq", order=False, with_groups=True) -> Packed:
    outputs, inputs = shape
    count = -(-inputs // group)
    codes, zeros = rng.integers(0, 2**bits, (inputs, outputs)), rng.integers(0, 2**bits, (count, outputs))
    scale = rng.uniform(0.01, 0.1, (count, outputs)).astype(np.float16)
    groups = np.arange(inputs) // group
    groups = rng.permutation(groups) if order else groups
    weight = np.empty(shape, f32)
    for o, i in np.ndindex(shape):
        g = groups[i]
        weight[o, i] = f32(scale[g, o]) * f32(int(codes[i, o]) - int(zeros[g, o]))
    less = (zeros - 1) % 2**bits if version == "gptq" else zeros
    tensors = {
        ".qweight": np.array([in_words(codes[:, o].tolist(), bits) for o in range(outputs)], np.int64).T,
        ".qzeros": np.array([in_words(row.tolist(), bits) for row in less], np.int64),
        ".scales": scale,
    }
    tensors = {
        name: np.ascontiguousarray(t.astype(np.int32) if t.dtype == np.int64 else t) for name, t in tensors.items()
    }
    tensors |= {".g_idx": groups.astype(np.int32)} if with_groups else {}
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": order,
        "checkpoint_format": version,
    }
    return Packed(tensors, weight, config)


def awq(rng, shape, group=32) -> Packed:
    outputs, inputs = shape
    count = -(-inputs // group)
    codes, zeros = rng.integers(0, 16, (inputs, outputs)), rng.integers(0, 16, (count, outputs))
    scale = rng.uniform(0.01, 0.1, (count, outputs)).astype(np.float16)
    weight = np.empty(shape, f32)
    for o, i in np.ndindex(shape):
        weight[o, i] = f32(int(codes[i, o]) - int(zeros[i // group, o])) * f32(scale[i // group, o])

    def words(table: np.ndarray) -> np.ndarray:  # outputs 0, 2, 4, 6, 1, 3, 5, 7 of each eight, from the lowest bits up
        mixed = table.reshape(len(table), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(len(table), -1)
        return np.array([in_words(row.tolist(), 4) for row in mixed], np.int64).astype(np.int32)

    tensors = {".qweight": words(codes), ".qzeros": words(zeros), ".scales": scale}
    return Packed(tensors, weight, {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"})


def compressed(form: str, **weights) -> dict:
    groups = {"group_0": {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False, **weights}}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


def words(rng, shape, bits=4, group: int | None = 32, zeros="none", order=False, scale=BF16) -> Packed:
    """compressed-tensors' pack-quantized; `zeros` is none, packed, or bytes; no group is one for a whole row."""
    outputs, inputs = shape
    count, half = 1 if group is None else -(-inputs // group), 2 ** (bits - 1)
    codes = rng.integers(-half, half, shape)
    scales = rng.uniform(0.01, 0.1, (outputs, count)).astype(scale)
    zero = np.zeros((outputs, count), int) if zeros == "none" else rng.integers(-half, half, (outputs, count))
    groups = np.zeros(inputs, int) if group is None else np.arange(inputs) // group
    groups = rng.permutation(groups) if order else groups
    weight = np.empty(shape, f32)
    for o, i in np.ndindex(shape):
        weight[o, i] = f32(int(codes[o, i]) - int(zero[o, groups[i]])) * f32(scales[o, groups[i]])
    packed = [in_words([int(code) + half for code in row], bits) for row in codes]
    tensors = {".weight_packed": np.array(packed, np.int32), ".weight_scale": scales, ".weight_shape": np.array(shape)}
    if zeros == "packed":
        stored = [in_words([int(code) + half for code in column], bits) for column in zero.T]
        tensors[".weight_zero_point"] = np.ascontiguousarray(np.array(stored, np.int32).T)
    elif zeros == "bytes":
        tensors[".weight_zero_point"] = zero.astype(np.int8)
    if order:
        tensors[".weight_g_idx"] = groups.astype(np.int32)
    how = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    return Packed(tensors, weight, compressed("pack-quantized", type="int", num_bits=bits, **how))


def byte_codes(rng, shape, kind=F8, strategy="channel", block=(1, 1), zeros=False) -> Packed:
    """compressed-tensors' int-quantized and float-quantized."""
    is_int = kind == np.int8
    codes = rng.integers(-128, 128, shape).astype(np.int8) if is_int else rng.standard_normal(shape).astype(kind)
    rows, columns = {"tensor": shape, "channel": (1, shape[1])}.get(strategy, block)
    counts = -(-shape[0] // rows), -(-shape[1] // columns)
    scale = rng.uniform(0.01, 0.1, counts).astype(f32)
    values = codes.astype(f32)
    tensors = {".weight": codes, ".weight_scale": scale.reshape(1) if strategy == "tensor" else scale}
    if zeros:
        zero = rng.integers(-9, 9, counts).astype(np.int8)
        tensors[".weight_zero_point"] = zero
        values = np.array(
            [[v - f32(zero[o // rows, i // columns]) for i, v in enumerate(r)] for o, r in enumerate(values)]
        )
    how: dict = {"strategy": strategy, "type": "int" if is_int else "float", "num_bits": 8}
    how |= {"block_structure": list(block)} if strategy == "block" else {}
    how |= {"group_size": block[1]} if strategy == "group" else {}
    config = compressed("int-quantized" if is_int else "float-quantized", **how)
    return Packed(tensors, blocks_of(values, scale, rows, columns), config)


def fp4_rows(rng, shape, nv: bool, powers=np.uint8) -> Packed:
    """compressed-tensors' nvfp4-pack-quantized and mxfp4-pack-quantized."""
    group = 16 if nv else 32
    codes = rng.integers(0, 16, shape)
    values = np.array([[fp4(code) for code in row] for row in codes], f32)
    tensors = {".weight_packed": in_bytes(codes.reshape(-1).tolist(), high_first=False).reshape(shape[0], -1)}
    counts = shape[0], -(-shape[1] // group)
    if nv:
        scale, whole = rng.uniform(50, 400, counts).astype(f32).astype(F8), f32(rng.uniform(1000, 9000))
        tensors |= {".weight_scale": scale, ".weight_global_scale": np.array([whole], f32)}
        scale = scale.astype(f32) / whole
    else:
        stored = rng.integers(120, 134, counts).astype(np.uint8)
        tensors |= {".weight_scale": stored.view(powers)}
        scale = f32(2.0) ** (stored.astype(f32) - 127)
    how = {"type": "float", "num_bits": 4, "group_size": group, "strategy": "tensor_group" if nv else "group"}
    name = "nvfp4-pack-quantized" if nv else "mxfp4-pack-quantized"
    return Packed(tensors, blocks_of(values, scale, 1, group), compressed(name, **how))


def write_one(folder: Path, packed: Packed, dtype: str = "bfloat16", stem: str = "x") -> Path:
    """A folder of one packed weight and a plain one, with as much of a `config.json` as says how."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"dtype": dtype, "quantization_config": packed.config}))
    tensors = {stem + suffix: np.ascontiguousarray(tensor) for suffix, tensor in packed.tensors.items()}
    save_file({"norm.weight": np.ones(3, BF16), **tensors}, folder / "model.safetensors")
    return folder


def pack(folder: Path, encode: Callable[..., Packed], shards: int = 1) -> dict[str, np.ndarray]:
    """Packs the projections of a folder's layers, with numbers of their own; all tensors of the plain folder."""
    rng = np.random.default_rng(7)
    there = {name: array for path in sorted(folder.glob("*.safetensors")) for name, array in load_file(path).items()}
    plain, stored, config = dict(there), {}, {}
    for name, array in there.items():
        if not name.endswith("proj.weight"):
            stored[name] = array
            continue
        packed = encode(rng, array.shape)
        stem, plain[name], config = name.removesuffix(".weight"), packed.weight, packed.config
        stored |= {stem + suffix: np.ascontiguousarray(tensor) for suffix, tensor in packed.tensors.items()}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)] if shards > 1 else [SINGLE]
    place = {name: files[i % shards] for i, name in enumerate(stored)}  # the parts of a weight in any file
    for file in files:
        save_file({n: a for n, a in stored.items() if place[n] == file}, folder / file, metadata={"format": "pt"})
    if shards > 1:
        write_index(folder, place)
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**table, "quantization_config": config}))
    return plain
