"""Steps of real sizes whose programs are looked at: models, chips and settings, as data."""

import dataclasses
from typing import Any

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
QWEN = LLAMA | {"vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": QWEN
    | {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "Llama-3.1-70B": LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "Qwen3-30B-A3B": QWEN
    | {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "Qwen3.5-0.8B": {
        "model_type": "qwen3_5_text",
        "architectures": ["Qwen3_5ForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "vocab_size": 248320,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 6,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_value_head_dim": 128,
        "linear_num_value_heads": 16,
    },
}
"""What of each model's config.json the shapes of its step depend on."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A step on a chip. `lengths` are mean tokens of prompts and completions; None is those of hh-rlhf."""

    model: str
    chip: str
    devices: int
    settings: tuple[str, ...]
    lengths: tuple[int, int] | None = None

    @property
    def arguments(self) -> list[str]:
        """Of the command `plan`, beside the model and its data."""
        given = ["--chip", self.chip, "--devices", str(self.devices), *self.settings]
        if self.lengths is not None:
            given += ["--prompt-tokens", str(self.lengths[0]), "--completion-tokens", str(self.lengths[1])]
        return given


CHAT, LONG = (220, 260), (8000, 12000)
PROGRAMS = {
    "0.6B, one H200": Program("Qwen3-0.6B", "h200", 1, ("batch.pairs=32", "data.max_length=1024"), CHAT),
    "8B, 8 H100": Program("Llama-3.1-8B", "h100", 8, ("batch.pairs=256",)),
    "8B, 8 A100": Program("Llama-3.1-8B", "a100", 8, ("batch.pairs=256",)),
    "8B, 8 L4": Program("Llama-3.1-8B", "l4", 8, ("batch.pairs=64", "model.remat=block")),
    "8B, 64 v5p": Program("Llama-3.1-8B", "v5p", 64, ("batch.pairs=2048", "mesh.data=4", "mesh.fsdp=16")),
    "8B, 64 v6e": Program("Llama-3.1-8B", "v6e", 64, ("batch.pairs=2048",)),
    "30B-A3B, 16 H100": Program("Qwen3-30B-A3B", "h100", 16, ("batch.pairs=256", "model.remat=names")),
    "30B-A3B, 16 v5p": Program("Qwen3-30B-A3B", "v5p", 16, ("batch.pairs=512", "model.remat=names")),
    "Qwen3.5, 8 H100": Program("Qwen3.5-0.8B", "h100", 8, ("batch.pairs=128",)),
    "70B, long, 64 H100": Program(
        "Llama-3.1-70B",
        "h100",
        64,
        ("batch.pairs=8", "data.max_length=32768", "mesh.context=8", "model.remat=block"),
        LONG,
    ),
    "70B, long, 64 v5p": Program(
        "Llama-3.1-70B",
        "v5p",
        64,
        ("batch.pairs=8", "data.max_length=32768", "mesh.context=8", "model.remat=block"),
        LONG,
    ),
}
