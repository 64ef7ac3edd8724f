"""Tiny random folders of every family, written by PyTorch, and what PyTorch says of them.

Every parameter is random, norm scales and buffers too, so that none of them can be left out unnoticed.
"""

import atexit
import copy
import functools
import json
import tempfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from dpo_jax.hf.checkpoint import load_hf
from dpo_jax.hf.configs import quiet
from dpo_jax.hf.tensors import Tensors
from dpo_jax.model.decoder import Model, logits
from tests.support.family_configs import CONFIGS

ROWS, LENGTH = 2, 24
LOGITS = 2e-4
"""Largest difference allowed from PyTorch's logits: float32 sums in another order. 7e-5 is the largest seen, where
logits reach 17."""
KINDS = {
    "qwen2": "biases",
    "mistral": "windows",
    "qwen3_moe_windowed": "experts",
    "gpt_oss": "sinks",
    "deepseek_v3": "latent",
    "qwen3_5_text": "delta",
    "gpt_neox": "parallel",
    "cohere_normed": "interleaved",
    "opt_narrow": "positions",
    "gpt2_tied": "turned",
    "bloom": "alibi",
    "gemma2": "sandwich",
    "gemma4_text": "borrowed",
    "gemma4_everything": "everything",
    "apertus": "xielu",
}
"""One model of each kind of structure, for what would take too long with all."""

_SCRATCH = tempfile.TemporaryDirectory(prefix="families-")
atexit.register(_SCRATCH.cleanup)


REASSOCIATION = 1e-5
"""Largest difference, as a share of the largest logit, between two ways to add up the same float32 products."""


def allowed(logits: np.ndarray) -> float:
    """Largest difference allowed of a logit or a log-probability, where a model's logits are these."""
    return REASSOCIATION * max(1.0, float(np.abs(logits).max()))


class Folder(NamedTuple):
    """A model's folder, and the logits that PyTorch found for two rows of tokens."""

    path: Path
    ids: np.ndarray
    logits: np.ndarray


def scratch(name: str) -> Path:
    """A folder for the whole session, which does not exist yet."""
    return Path(_SCRATCH.name) / name


@functools.cache
def own(name: str) -> Folder:
    """The folder of a config of our own."""
    torch = one_thread()
    model = random_model(*CONFIGS[name], seed=zlib.crc32(name.encode()))
    ids = np.random.default_rng(1).integers(3, 88, (ROWS, LENGTH)).astype(np.int32)
    wanted = torch_logits(model, ids)
    with quiet(), torch.no_grad():
        model.save_pretrained(scratch(name))
    return Folder(scratch(name), ids, wanted)


def golden(path: Path) -> Folder:
    """A folder that was written once and for all, with its logits beside it."""
    found = load_file(path / "golden.safetensors")
    return Folder(path, found["ids"], found["logits"])


@functools.cache
def ours(path: Path) -> Model:
    """The folder's model here."""
    return load_hf(path)


def our_logits(model: Model, ids: np.ndarray) -> np.ndarray:
    """Logits of ordinary rows."""
    return np.asarray(logits(model.spec, model.params, jnp.asarray(ids)))


def read(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder."""
    source = Tensors(path)
    return {name: np.array(source.read(name)) for name in source.infos}


# ------------------------------------------------------------------------------------------------ PyTorch


def one_thread() -> Any:
    """PyTorch without threads: to wait for each other takes them longer than these tiny products."""
    import torch

    torch.set_num_threads(1)
    return torch


def random_model(kind: str, fields: dict[str, Any], seed: int) -> Any:
    """PyTorch's model of a config."""
    torch = one_thread()
    with quiet():
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        torch.manual_seed(seed)  # some families draw their vectors at random, and those are kept beside the noise
        config = AutoConfig.for_model(kind, **copy.deepcopy(fields))
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    generator, seen = torch.Generator().manual_seed(seed), set()
    with torch.no_grad():
        for name, value in weights_of(model):
            if id(value) in seen or not value.is_floating_point():
                continue
            seen.add(id(value))
            noise = torch.randn(value.shape, generator=generator)
            matrix, table = value.ndim >= 2, any(part in name for part in ("embed", "wte", "wpe"))
            value.copy_(noise * (0.5 if table else 0.2) if matrix else value + 0.3 * noise)
            if kind.startswith("gemma4") and name.endswith(("q_norm.weight", "k_norm.weight")):
                value.mul_(0.5)  # scores are not divided by anything: at 1 they reach 50, and rounding with them
        with quiet():
            model.tie_weights()
    return model


def weights_of(model: Any) -> list[tuple[str, Any]]:
    """All that a folder of the model holds, by the names that it has in memory."""
    saved = model.state_dict().keys()
    return [*model.named_parameters(), *((name, value) for name, value in model.named_buffers() if name in saved)]


def reloaded(path: Path) -> tuple[Any, dict[str, Any]]:
    """PyTorch's model of a folder, and what it has to say about keys that did not fit."""
    torch = one_thread()
    with quiet():
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )


def torch_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """Logits of ordinary rows."""
    torch = one_thread()
    tokens = torch.tensor(ids.astype(np.int64))
    with quiet(), torch.no_grad():
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits.numpy()


@functools.cache
def theirs(path: Path) -> Any:
    """PyTorch's model of a folder."""
    return reloaded(path)[0]


def raw_config(path: Path) -> dict[str, Any]:
    """What a folder's config.json says."""
    return json.loads((path / "config.json").read_text())
