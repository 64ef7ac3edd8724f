"""Tiny random Hugging Face folders, written with NumPy alone."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from dpo_jax.hf.checkpoint import entries_of
from dpo_jax.hf.configs import read_spec

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 5e5}
NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def write_config(folder: Path, family: str, **changes) -> Path:
    """Only a config.json; a change to ... leaves the key out."""
    config = {"model_type": family, **SIZES, "rope_parameters": ROPE, **changes}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}, indent=2))
    return folder


def random_tensors(folder: Path, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor that the folder's config asks for; subnormals and negative zeros are among the numbers."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for entry in entries_of(read_spec(folder), folder):
        values = 0.3 * rng.standard_normal(entry.shape, np.float32) + (1.0 if "norm" in entry.name else 0.0)
        tensors[entry.name] = values.astype(NUMPY_DTYPES[dtype])
    first = next(tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
    smallest = ml_dtypes.finfo(first.dtype).smallest_subnormal
    first[0, :3] = [-0.0, smallest, -smallest]
    return tensors


def write_folder(folder: Path, family: str = "llama", dtype: str = "float32", shards: int = 1, **changes) -> Path:
    """A whole folder: config, weights (single or sharded), and the small files beside them."""
    write_config(folder, family, dtype=dtype, **changes)
    tensors = random_tensors(folder, dtype)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        names = list(tensors)
        files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        weight_map = {name: files[i % shards] for i, name in enumerate(names)}
        for file in files:
            part = {name: tensors[name] for name in names if weight_map[name] == file}
            save_file(part, folder / file, metadata={"format": "pt"})
        total = sum(array.nbytes for array in tensors.values())
        write_index(folder, weight_map, total)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3], "do_sample": true, "temperature": 0.6}\n')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}  \n')
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (folder / "LICENSE").write_text("Apache License\n")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\nmodel-index: [x]\n---\n# Tiny\n")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    return folder


def write_index(folder: Path, weight_map: dict, total: int = 1) -> None:
    """An index with any weight map."""
    table = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table, indent=4))
