"""Adapters that must be refused in one line: what is wrong with each, and what the line must say."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from tests.support.peft_folders import PREFIX, halves, write_peft

Q = "model.layers.0.self_attn.q_proj"
A, B = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"
EMBED = f"{PREFIX}model.embed_tokens"
FILE = "adapter_model.safetensors"


class Bad(NamedTuple):
    """How a folder is made, and what the refusal says."""

    make: Callable[[Path], Any]
    says: tuple[str, ...]


def _config(*says: str, **changes) -> Bad:
    return Bad(lambda folder: write_peft(folder, halves(Q, 32, 32), **changes), ("adapter_config.json", *says))


def _tensors(*says: str, drop: tuple[str, ...] = (), config: dict | None = None, **changes) -> Bad:
    def make(folder: Path) -> None:
        made = {
            name: array for name, array in (halves(Q, 32, 32) | changes.get("more", {})).items() if name not in drop
        }
        write_peft(folder, made, **(config or {}))

    return Bad(make, says)


def _text(text: bytes, *says: str) -> Bad:
    def make(folder: Path) -> None:
        write_peft(folder, halves(Q, 32, 32))
        (folder / "adapter_config.json").write_bytes(text)

    return Bad(make, ("adapter_config.json", *says))


def _file(content: bytes | None, *says: str, name: str = FILE) -> Bad:
    def make(folder: Path) -> None:
        write_peft(folder, halves(Q, 32, 32))
        (folder / FILE).unlink()
        if content is not None:
            (folder / name).write_bytes(content)

    return Bad(make, says)


def _linked(folder: Path) -> None:
    write_peft(folder, halves(Q, 32, 32))
    (folder / FILE).rename(folder.parent / "outside")
    (folder / FILE).symlink_to(folder.parent / "outside")


def _twice(folder: Path) -> None:
    write_peft(folder, {})
    entry = json.dumps({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
    header = f'{{"{A}": {entry}, "{A}": {entry}}}'.encode()
    (folder / FILE).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)


def _float8(folder: Path) -> None:
    write_peft(folder, {})
    header = json.dumps({A: {"dtype": "F8_E4M3", "shape": [2, 32], "data_offsets": [0, 64]}}).encode()
    (folder / FILE).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)


def _ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def _one_nan() -> np.ndarray:
    array = _ones(2, 32)
    array[1, 7] = np.nan
    return array


BAD = {
    "config: missing": Bad(lambda folder: (folder.mkdir(), save_file({}, folder / FILE)), ("adapter_config.json is",)),
    "config: not JSON": _text(b'{"r": 2,}', "not valid JSON"),
    "config: a list": _text(b"[1]", "not an object"),
    "config: a key twice": _text(b'{"peft_type": "LORA", "r": 2, "r": 3}', "'r'"),
    "config: deep": _text(b'{"r":' + b"[" * 100_000 + b"]" * 100_000 + b"}", ""),
    "config: no kind": _config("peft_type = null", peft_type=...),
    "config: another kind": _config('peft_type = "IA3"', "only LORA", peft_type="IA3"),
    "config: another task": _config('task_type = "SEQ_2_SEQ_LM"', task_type="SEQ_2_SEQ_LM"),
    "config: rank 0": _config("r = 0", "above zero", r=0),
    "config: rank true": _config("r = true", r=True),
    "config: another rank": Bad(lambda folder: write_peft(folder, halves(Q, 32, 32), r=64), ("rank 2", "say 64")),
    "config: alpha infinite": _config("lora_alpha = Infinity", "finite", lora_alpha=float("inf")),
    "config: alpha a text": _config("lora_alpha", lora_alpha="16"),
    "config: dropout 1": _config("lora_dropout = 1.0", lora_dropout=1),
    "config: bias": _config('bias = "some"', "lora_only", bias="some"),
    "config: layers repeated": _config("layer_replication", "not built", layer_replication=[[0, 1], [0, 1]]),
    "config: aLoRA": _config("alora_invocation_tokens", "after certain tokens", alora_invocation_tokens=[1, 2]),
    "config: QALoRA": _config("use_qalora", use_qalora=True),
    "config: BD-LoRA": _config("use_bdlora", use_bdlora={"nblocks": 2}),
    "config: KaSA": _config("kasa_config", kasa_config={"beta": 1.0}),
    "config: arrow": _config("arrow_config", arrow_config={"top_k": 1}),
    "config: MonteCLoRA": _config("monteclora_config", monteclora_config={"samples": 2}),
    "config: PiSSA": _config("init_lora_weights", "another base", "pissa", init_lora_weights="pissa_niter_4"),
    "config: an unknown key": _config("use_newlora = true", "unknown key", use_newlora=True),
    "config: DoRA a text": _config("use_dora", "true or false", use_dora="yes"),
    "config: a pattern that never ends": _config("alpha_pattern", "for ever", alpha_pattern={"(a*)*b": 2}),
    "config: a pattern that is none": _config("rank_pattern", "regular expression", rank_pattern={"(": 2}),
    "config: a rank of a pattern": _config("rank_pattern", "above zero", rank_pattern={"q_proj": 0}),
    "config: a token below zero": _config("trainable_token_indices", trainable_token_indices=[-1]),
    "file: missing": _file(None, FILE, "is missing"),
    "file: a pickle": _file(b"\x80\x04.", "adapter_model.bin", "run code", name="adapter_model.bin"),
    "file: not safetensors": _file(b"\xff" * 100, FILE, "not a whole safetensors file"),
    "file: cut short": _file(struct.pack("<Q", 100) + b"{", FILE, "not a whole safetensors file"),
    "file: a link out": Bad(_linked, (FILE, "leads out of its folder")),
    "file: a name twice": Bad(_twice, (FILE, "not a whole safetensors file")),
    "file: eight bits": Bad(_float8, ("F8_E4M3",)),
    "tensors: none": Bad(lambda folder: write_peft(folder, {}), ("changes nothing",)),
    "tensors: no B": _tensors("lora_A.weight", "without its other half", drop=(B,)),
    "tensors: no A": _tensors("lora_B.weight", "without its other half", drop=(A,)),
    "tensors: A of another width": _tensors("has shape [2, 31]", "[2, 32]", more={A: _ones(2, 31)}),
    "tensors: B of another width": _tensors("has shape [16, 2]", "[32, 2]", more={B: _ones(16, 2)}),
    "tensors: A turned": _tensors("has rank 32", "r or rank_pattern", more={A: _ones(32, 2)}),
    "tensors: A flat": _tensors("has shape [64]", more={A: _ones(64)}),
    "tensors: NaN": _tensors("1 values that are NaN", more={A: _one_nan()}),
    "tensors: another layer": _tensors("is of nothing in the base", more=halves("model.layers.9.mlp.up_proj", 48, 32)),
    "tensors: another family": _tensors("nothing in the base", "the/base", more=halves("h.0.attn.c_attn", 96, 32)),
    "tensors: no prefix": _tensors("does not begin with", more={"model.x.lora_A.weight": _ones(2, 32)}),
    "tensors: a way out": _tensors("is of nothing", more=halves("../../etc/passwd", 2, 2)),
    "tensors: an adapter's name": _tensors("nothing in the base", more={f"{PREFIX}{Q}.lora_A.x.weight": _ones(2, 32)}),
    "tensors: of a norm": _tensors("no matrix", more=halves("model.layers.0.input_layernorm", 32, 32)),
    "tensors: an embedding as a layer": _tensors("which is an embedding", more=halves("model.embed_tokens", 32, 96)),
    "tensors: magnitudes without DoRA": _tensors("use_dora", more={f"{PREFIX}{Q}.lora_magnitude_vector": _ones(32)}),
    "tensors: DoRA without magnitudes": _tensors("no magnitude beside it", config={"use_dora": True}),
    "tensors: a bias that nobody wants": _tensors("lora_bias", more={f"{PREFIX}{Q}.lora_B.bias": _ones(32)}),
    "tensors: a bias where there is none": _tensors(
        "has none", more={f"{PREFIX}{Q}.lora_B.bias": _ones(32)}, config={"lora_bias": True}
    ),
    "tensors: a whole module that nobody names": _tensors(
        "neither modules_to_save", more={f"{PREFIX}model.norm.weight": _ones(32)}
    ),
    "tensors: tokens that nobody names": _tensors(
        "trainable_token_indices", more={f"{EMBED}.token_adapter.trainable_tokens_delta": _ones(1, 32)}
    ),
    "tensors: a token beyond the last": _tensors(
        "token 96",
        more={f"{EMBED}.token_adapter.trainable_tokens_delta": _ones(1, 32)},
        config={"trainable_token_indices": [96]},
    ),
    "tensors: a larger vocabulary": _tensors("vocabulary was changed", more={f"{EMBED}.weight": _ones(97, 32)}),
    "tensors: a layer under two names": _tensors(
        "a second time",
        more={name.replace("model.model.", "model.model.language_model."): a for name, a in halves(Q, 32, 32).items()},
    ),
}
