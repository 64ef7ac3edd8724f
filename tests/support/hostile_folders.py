"""Folders that nobody should be given: each starts as a sound one, and is spoiled in one way."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from tests.support.tiny_folders import write_folder, write_index

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NAME = "model.layers.1.mlp.up_proj.weight"
"""A tensor of SECOND."""
NOT_WHOLE = "is not a whole safetensors file"


class Hostile(NamedTuple):
    """How a sound folder of two files (see `sound_folder`) is spoiled, and what the one line about it must say."""

    spoil: Callable[[Path], object]
    says: tuple[str, ...]


def sound_folder(folder: Path) -> Path:
    """A model of two layers in two files, with an index."""
    return write_folder(folder, num_hidden_layers=2, shards=2)


def header(text: str, size: int = 0) -> bytes:
    """A safetensors file with this header and `size` zero bytes of data."""
    return struct.pack("<Q", len(text.encode())) + text.encode() + b"\0" * size


def one(name: str = "a", start: int = 0, end: int = 8, dtype: str = "F32", shape: str = "[2]") -> str:
    """A tensor as a header has it."""
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}'


def _weight_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def _index_to(file: str) -> Callable[[Path], None]:
    """Everything that SECOND held is in `file`, says the index; and it truly is there, beside the folder."""

    def spoil(folder: Path) -> None:
        shutil.copy(folder / SECOND, folder.parent / "outside.safetensors")
        name = file.replace("OUTSIDE", str(folder.parent / "outside.safetensors"))
        write_index(folder, {tensor: name if f == SECOND else f for tensor, f in _weight_map(folder).items()})

    return spoil


def _bytes(file: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(data)


def _claims(size: int, real: int) -> Callable[[Path], None]:
    """A file that says its header has `size` bytes, and has `real` (as a hole, which takes no room)."""

    def spoil(folder: Path) -> None:
        with (folder / FIRST).open("wb") as file:
            file.write(struct.pack("<Q", size))
            file.truncate(8 + real)

    return spoil


def _linked(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).rename(folder.parent / "outside")
        (folder / name).symlink_to("../outside")

    return spoil


def _to_itself(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(name)

    return spoil


def _config(**changes) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return spoil


def _arrays(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    """Changes the tensors of SECOND, and the index as an honest writer would."""

    def spoil(folder: Path) -> None:
        arrays = load_file(folder / SECOND)
        change(arrays)
        save_file(arrays, folder / SECOND)
        others = {name: file for name, file in _weight_map(folder).items() if file != SECOND}
        write_index(folder, others | dict.fromkeys(arrays, SECOND))

    return spoil


def _value(value: float) -> Callable[[Path], None]:
    return _arrays(lambda arrays: arrays[NAME].__setitem__((3, 2), value))


def _dtype(dtype) -> Callable[[Path], None]:
    return _arrays(lambda arrays: arrays.update({NAME: arrays[NAME].astype(dtype)}))


def _twice(folder: Path) -> None:
    name = next(iter(load_file(folder / FIRST)))
    save_file({**load_file(folder / SECOND), name: load_file(folder / FIRST)[name]}, folder / SECOND)


def _key_twice(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{NAME}": "{FIRST}",'))


def _pickled(folder: Path) -> None:
    """Only a pickle, which makes a folder named `ran` if it is opened."""

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(folder / "ran"),))

    for name in (FIRST, SECOND, INDEX):
        (folder / name).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def _with_code(folder: Path) -> None:
    """A config of the folder's own, which makes a folder named `ran` if it is imported."""
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(folder / 'ran')!r})\nclass C: pass\n")
    _config(auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"})(folder)


def _directory(folder: Path) -> None:
    (folder / FIRST).unlink()
    (folder / FIRST).mkdir()


def _pipe(folder: Path) -> None:
    (folder / FIRST).unlink()
    os.mkfifo(folder / FIRST)


def _adapter(folder: Path) -> None:
    """What PEFT writes: no config and no model."""
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "../elsewhere"}')
    save_file({"a": np.zeros(1, np.float32)}, folder / "adapter_model.safetensors")


def _endless(folder: Path) -> None:
    with (folder / "config.json").open("wb") as file:
        file.truncate(1 << 40)


HOSTILE: dict[str, Hostile] = {
    "index: a path upwards": Hostile(_index_to("../outside.safetensors"), (INDEX, "is followed")),
    "index: an absolute path": Hostile(_index_to("OUTSIDE"), (INDEX, "is followed")),
    "index: a path down and up": Hostile(_index_to("additional_chat_templates/../../outside.safetensors"), (INDEX,)),
    "index: a pickle": Hostile(_index_to("pytorch_model.bin"), (INDEX, "is followed")),
    "index: a key twice": Hostile(_key_twice, (INDEX, NAME, "twice")),
    "index: no weight_map": Hostile(_bytes(INDEX, b'{"metadata": {"total_size": 1}}'), (INDEX, "no weight_map")),
    "index: not JSON": Hostile(_bytes(INDEX, b'{"weight_map": {'), (INDEX, "not valid JSON")),
    "index: a file too": Hostile(lambda f: shutil.copy(f / FIRST, f / SINGLE), ("both", SINGLE, INDEX)),
    "index: a file that is missing": Hostile(lambda f: (f / SECOND).unlink(), (SECOND, "is missing")),
    "link: a shard": Hostile(_linked(FIRST), (FIRST, "leads out of its folder")),
    "link: the index": Hostile(_linked(INDEX), (INDEX, "leads out of its folder")),
    "link: the config": Hostile(_linked("config.json"), ("config.json", "leads out of its folder")),
    "file: empty": Hostile(_bytes(FIRST, b""), (FIRST, NOT_WHOLE)),
    "file: a directory": Hostile(_directory, (FIRST, "not a regular file")),
    "file: a pipe that never ends": Hostile(_pipe, (FIRST, "not a regular file")),
    "header: truncated": Hostile(lambda f: os.truncate(f / FIRST, 100), (FIRST, NOT_WHOLE)),
    "header: past the end": Hostile(_claims(1000, 100), (FIRST, NOT_WHOLE)),
    "header: of 2^62 bytes": Hostile(_claims(2**62, 100), (FIRST, NOT_WHOLE)),
    "header: of 150 MB, and they are there": Hostile(_claims(150 * 10**6, 160 * 10**6), (FIRST, NOT_WHOLE)),
    "header: not JSON": Hostile(_bytes(FIRST, header("[[[[[[[[")), (FIRST, NOT_WHOLE)),
    "header: a name twice": Hostile(
        _bytes(FIRST, header(f"{{{one()},{one(dtype='F16', shape='[4]')}}}", 8)), (FIRST, "'a' stands there twice")
    ),
    "header: tensors that overlap": Hostile(
        _bytes(FIRST, header(f"{{{one()},{one('b', 4, 12)}}}", 12)), (FIRST, NOT_WHOLE)
    ),
    "header: tensors that are one": Hostile(_bytes(FIRST, header(f"{{{one()},{one('b')}}}", 8)), (FIRST, NOT_WHOLE)),
    "header: a hole": Hostile(_bytes(FIRST, header(f"{{{one()},{one('b', 16, 24)}}}", 24)), (FIRST, NOT_WHOLE)),
    "header: data left over": Hostile(_bytes(FIRST, header(f"{{{one()}}}", 16)), (FIRST, NOT_WHOLE)),
    "header: a shape too large": Hostile(
        _bytes(FIRST, header(f"{{{one(shape=f'[{2**40},{2**40}]')}}}", 8)), (FIRST, NOT_WHOLE)
    ),
    "tensor: missing": Hostile(_arrays(lambda a: a.pop(NAME)), (NAME, "missing")),
    "tensor: extra": Hostile(_arrays(lambda a: a.update({"model.evil": a[NAME].copy()})), ("model.evil",)),
    "tensor: extra, with a name of several lines": Hostile(
        _arrays(lambda a: a.update({"evil\nerror: \x1b[2J": a[NAME].copy()})), ("evil\\n",)
    ),
    "tensor: in two files": Hostile(_twice, ("is in both", FIRST, SECOND)),
    "tensor: another shape": Hostile(_arrays(lambda a: a.update({NAME: a[NAME][:-1].copy()})), (NAME, "shape")),
    "tensor: NaN": Hostile(_value(np.nan), (SECOND, NAME, "NaN or infinite")),
    "tensor: infinite": Hostile(_value(-np.inf), (SECOND, NAME, "NaN or infinite")),
    "tensor: int8": Hostile(_dtype(np.int8), (NAME, "I8", "dequantise or convert")),
    "tensor: float64": Hostile(_dtype(np.float64), (NAME, "F64", "dequantise or convert")),
    "tensor: float8": Hostile(_dtype(ml_dtypes.float8_e4m3fn), (NAME, "F8_E4M3", "dequantise or convert")),
    "weights: a pickle only": Hostile(_pickled, ("pytorch_model.bin", "safe_serialization=True")),
    "weights: an adapter only": Hostile(_adapter, ("is an adapter of ../elsewhere, not a model", "BASE")),
    "weights: an adapter beside a model": Hostile(
        _bytes("adapter_config.json", b'{"base_model_name_or_path": 7}'),
        ("holds an adapter beside a model", "convert merge"),
    ),
    "config: code of its own": Hostile(_with_code, ("config.json", "auto_map", "never run")),
    "config: not JSON": Hostile(_bytes("config.json", b'{"model_type": "llama",}'), ("config.json", "not valid JSON")),
    "config: not an object": Hostile(_bytes("config.json", b'["llama"]'), ("config.json", "not an object")),
    "config: a terabyte": Hostile(_endless, ("config.json", "more than the")),
    "config: an unknown family": Hostile(_config(model_type="evil"), ("config.json", 'model_type = "evil"')),
    "config: an unknown key": Hostile(_config(secret_gate=2), ("config.json", "secret_gate = 2: unknown key")),
    "config: a billion layers": Hostile(
        _config(num_hidden_layers=10**9), ("num_hidden_layers = 1000000000", "at most")
    ),
    "config: a billion layers of another tower": Hostile(
        _config(vision_config={"num_hidden_layers": 10**9}), ("vision_config.num_hidden_layers", "at most")
    ),
    "config: a billion labels": Hostile(_config(num_labels=10**9), ("num_labels = 1000000000", "at most")),
    "config: more layers than there are tensors of": Hostile(_config(num_hidden_layers=40), ("is missing",)),
    "config: a number of 400 digits": Hostile(_config(vocab_size=10**400), ("vocab_size", "at most")),
    "config: more lists than a file may have": Hostile(
        _bytes("config.json", b'{"a": [' + b"[]," * 300_000 + b"[]]}"), ("config.json", "lists and objects")
    ),
    "config: a link to itself": Hostile(_to_itself("config.json"), ("config.json", "leads nowhere")),
    "tokenizer: a link to itself": Hostile(_to_itself("tokenizer.json"), ("tokenizer.json", "leads nowhere")),
    "template: a link out": Hostile(_linked("chat_template.jinja"), ("chat_template.jinja", "leads out of its folder")),
    "template: one of several, a link out": Hostile(
        _linked("additional_chat_templates"), ("additional_chat_templates", "leads out of its folder")
    ),
    "config: quantised": Hostile(
        _config(quantization_config={"quant_method": "gptq", "bits": 4}), ("config.json", "quantization_config")
    ),
}
