"""Models of real sizes with random weights, and pairs of random tokens: a step costs what it would on real ones."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dpo_jax.hf.checkpoint import entries_of
from dpo_jax.hf.configs import read_spec
from dpo_jax.planning.lengths import made_up
from tools.benching.workloads import PARTS, write_config, write_tokenizer

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "dtype": "bfloat16",
}
QWEN = LLAMA | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "head_dim": 128}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": LLAMA | {"vocab_size": 8192, "num_key_value_heads": 2, "head_dim": 64},
    "0.6B": QWEN | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "1B": LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
    },
    "8B": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}
"""Shapes of Qwen3-0.6B, Llama-3.2-1B and Llama-3.1-8B; `tiny` tries whether a part runs."""
BLOCK = 1 << 26
"""Random numbers that are drawn; larger tensors repeat them from another place on."""
PROMPT, COMPLETION, LONGEST = 220, 260, 1024
"""Tokens of a chat data set's pairs: mean prompt, mean answer, and what a pair is cut to."""


def write_model(folder: Path, size: str) -> Path:
    """A Hugging Face folder of that size; weights are normal with deviation 0.02, in bfloat16; norms are 1."""
    from safetensors.numpy import save_file

    write_config(folder, **SIZES[size])
    block = np.random.default_rng(0).standard_normal(BLOCK, np.float32)
    block = (0.02 * block).astype(ml_dtypes.bfloat16)
    tensors = {}
    for number, entry in enumerate(entries_of(read_spec(folder), folder)):
        if len(entry.shape) == 1:
            tensors[entry.name] = np.ones(entry.shape, ml_dtypes.bfloat16)
        else:
            tensors[entry.name] = np.resize(np.roll(block, 7919 * number), entry.shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"])
    return folder


def write_pairs(path: Path, count: int, vocabulary: int) -> dict[str, float]:
    """Pairs of random tokens in a chat data set's lengths, one a line; their mean lengths."""
    encoded = made_up(count, prompt_tokens=PROMPT, completion_tokens=COMPLETION, max_length=LONGEST, steps=1)
    rng = np.random.default_rng(0)
    lengths = np.column_stack([encoded.prompt_length, encoded.completion_length.reshape(-1, 2)])
    with path.open("w", encoding="utf-8") as file:
        for row in lengths.tolist():
            ids = [rng.integers(4, vocabulary, length).tolist() for length in row]
            file.write(json.dumps(dict(zip((f"{part}_ids" for part in PARTS), ids, strict=True))) + "\n")
    return dict(zip(PARTS, lengths.mean(axis=0).round(1).tolist(), strict=True))
