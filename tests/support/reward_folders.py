"""Tiny reward models, and the scores that they give here and in PyTorch."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.hf.checkpoint import load_hf
from dpo_jax.hf.configs import read_spec
from dpo_jax.hf.tensors import Tensors
from dpo_jax.model import decoder
from dpo_jax.model.attention import causal
from dpo_jax.model.decoder import Model, scalar_scores
from tests.support.tiny_folders import ROPE, SIZES, write_folder

PAD = 0
TEXTS = [[5, 9, 60, 2], [17], [3, 3, 80, 41, 7, 22, 90, 11, 2], [95, 1, 2]]
"""Texts of several lengths, none of which holds PAD."""
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
CLASSES = {family: f"{family.capitalize()}ForSequenceClassification" for family in FAMILIES}
ONE_LABEL = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pad_token_id": PAD}
hidden = jax.jit(decoder.hidden, static_argnums=0)
SUMS = dict(rtol=0, atol=1e-5)
"""float32 sums of 32 to 64 terms in another order, through two layers: 2.4e-6 is the largest difference seen, in scores
of up to 5."""


def scores(model: Model, back: int = 1) -> np.ndarray:
    """Our scores of TEXTS, each read at its last token, or `back - 1` tokens before it."""
    longest = max(map(len, TEXTS))
    rows = jnp.asarray([text + [PAD] * (longest - len(text)) for text in TEXTS])
    states = hidden(model.spec, model.params, rows, causal(*rows.shape))
    last = states[jnp.arange(len(TEXTS)), jnp.asarray([max(len(text) - back, 0) for text in TEXTS])]
    return np.asarray(scalar_scores(model.spec, model.params, last))


def torch_scores(folder: Path, pad: int | None = None) -> np.ndarray:
    """Those of PyTorch, which finds the last token itself; every tensor of the folder must be wanted and there."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification

    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    assert model.config.num_labels == 1 and type(model).__name__ == model.config.architectures[0]
    pad = model.config.pad_token_id if pad is None else pad
    longest = max(map(len, TEXTS))
    rows = torch.tensor([text + [pad] * (longest - len(text)) for text in TEXTS])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in TEXTS])
    with torch.no_grad():
        return model(rows, attention_mask=mask).logits[:, 0].numpy()


def torch_folder(folder: Path, family: str, **changes) -> Path:
    """A reward model that transformers made and wrote itself."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    stem = CLASSES[family].removesuffix("ForSequenceClassification")
    sizes = {**SIZES, "num_hidden_layers": 2, "rope_parameters": ROPE, "pad_token_id": PAD}
    config = getattr(transformers, f"{stem}Config")(**{**sizes, "num_labels": 1, **changes})
    model = getattr(transformers, CLASSES[family])(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder)
    return folder


def moved(model: Model, seed: int = 0) -> Model:
    """The model with a scalar head that says something."""
    kernel = 0.3 * jax.random.normal(jax.random.key(seed), (model.spec.head_width, 1))
    return Model(
        model.spec, {**model.params, "score": {"kernel": kernel.astype(model.params["score"]["kernel"].dtype)}}
    )


def causal_folder(folder: Path, family: str = "llama", dtype: str = "float32", shards: int = 1, **changes) -> Path:
    """A language model that knows its padding token."""
    named = {"architectures": [f"{family.capitalize()}ForCausalLM"], "num_hidden_layers": 2, "pad_token_id": PAD}
    return write_folder(folder, family, dtype, shards, **{**named, **changes})


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def all_tensors(folder: Path) -> dict[str, np.ndarray]:
    source = Tensors(folder)
    return {name: source.read(name) for name in source.infos}


def reward(folder: Path) -> Model:
    """A language model's folder with a new scalar head."""
    return load_hf(folder, spec=read_spec(folder, scalar_head=True))
