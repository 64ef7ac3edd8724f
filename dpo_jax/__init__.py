"""dpo_jax: preference training in JAX. The public names; each is imported when it is first used."""

import importlib

# Every name is imported when it is first asked for.
# pyright: reportUnsupportedDunderAll=false

_HOME = {
    "sequence_logprobs": "dpo_jax.logprobs.tokens",
    "linear_logprobs": "dpo_jax.logprobs.tokens",
    "token_logprobs": "dpo_jax.logprobs.tokens",
    "dpo_loss": "dpo_jax.objectives.pairwise",
    "DPOLoss": "dpo_jax.objectives.pairwise",
    "dpo_loss_from_indices": "dpo_jax.objectives.pairwise",
    "Pairs": "dpo_jax.objectives.pairs",
    "make_pairs": "dpo_jax.objectives.pairs",
    "objective_loss": "dpo_jax.objectives.mixture",
    "Model": "dpo_jax.model.decoder",
    "logits": "dpo_jax.model.decoder",
    "load_hf": "dpo_jax.hf.checkpoint",
    "save_hf": "dpo_jax.hf.checkpoint",
    "load_tokenizer": "dpo_jax.hf.tokenizer",
    "fit": "dpo_jax.python.fit",
    "Result": "dpo_jax.python.result",
    "score_pairs": "dpo_jax.python.models",
    "PairLogprobs": "dpo_jax.python.models",
    "generate": "dpo_jax.python.models",
}

__all__ = [
    "DPOLoss",
    "Model",
    "PairLogprobs",
    "Pairs",
    "Result",
    "dpo_loss",
    "dpo_loss_from_indices",
    "fit",
    "generate",
    "linear_logprobs",
    "load_hf",
    "load_tokenizer",
    "logits",
    "make_pairs",
    "objective_loss",
    "save_hf",
    "score_pairs",
    "sequence_logprobs",
    "token_logprobs",
]
__version__ = "0.1.0"


def __getattr__(name: str):
    """Import a public name on first use, so that `import dpo_jax` costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'dpo_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """Public names, for completion in a notebook."""
    return __all__
