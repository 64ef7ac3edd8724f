"""Gradients of every kind of layer are PyTorch's, parameter by parameter, through packed rows and shared prompts."""

import jax
import numpy as np
import pytest

from dpo_jax import trees
from dpo_jax.data.batches import Batches
from dpo_jax.hf.checkpoint import scheme_of
from dpo_jax.hf.configs import quiet
from dpo_jax.hf.mapping import claim
from dpo_jax.hf.tensors import Tensors
from dpo_jax.preference import scoring
from dpo_jax.preference.micro_batches import micro_batch
from tests.support.family_models import KINDS, LENGTH, ours, own, read, reloaded, weights_of
from tests.support.forests import random_encoded
from tests.support.tiers import LIGHT_MIXERS, by_day

pytest.importorskip("torch")
ENCODED = random_encoded(units=4, completions=(2, 2), vocab=88, seed=24, longest=12)
RELATIVE = 1e-4
"""Largest norm of the difference, as a share of the tensor's own norm: float32 sums in another order."""
FLOOR = 1e-4
"""A key's bias without rotation has gradient 0, as a softmax does not see it; what is found there is the rounding of
larger numbers, and is held against this share of the largest tensor's gradient. No other tensor is so small."""
STILL = ("correction_bias", "layer_scalar", "act_fn.beta", "act_fn.eps")
"""Buffers: what a folder holds and no gradient moves."""


def our_gradients(name: str) -> dict[str, np.ndarray]:
    """By the folder's names: a tensor packs its parts, and so does its gradient."""
    folder = own(name).path
    model = ours(folder)
    share = model.spec.can_share_prompt(LENGTH)
    batch = Batches(ENCODED, ENCODED.num_pairs, 1, 1, share_prompts=share).at(0)

    @jax.jit
    @jax.grad
    def gradient(params, batch):
        return scoring.score(model.spec, params, micro_batch(batch, 0)).logps.sum()

    assert batch.micro_batches == 1
    leaves = trees.paths(jax.device_get(gradient(model.params, batch)))
    claims = claim(model.spec, Tensors(folder).infos, name, scheme_of(model.spec, folder))
    return {
        tensor: entry.pack([np.asarray(leaves[part.leaf][part.index]) for part in entry.parts])
        for tensor, entry in claims.entries.items()
    }


def torch_gradients(name: str, target) -> dict[str, np.ndarray]:
    """PyTorch's, from one text a row; written as if they were the weights, so that they get the folder's names."""
    import torch

    model, _ = reloaded(own(name).path)
    with quiet():
        for c in range(ENCODED.num_completions):
            prompt, answer = ENCODED.prompt(c), ENCODED.completion(c)
            text = torch.tensor([[*prompt.tolist(), *answer.tolist()]])
            logits = model(input_ids=text, use_cache=False).logits[0, len(prompt) - 1 : -1]
            (-torch.nn.functional.cross_entropy(logits, text[0, len(prompt) :], reduction="sum")).backward()
        for _, value in weights_of(model):
            value.data = torch.zeros_like(value) if value.grad is None else value.grad
        model.save_pretrained(target)
    return read(target)


@pytest.mark.parametrize("name", by_day(KINDS, LIGHT_MIXERS))
def test_every_gradient_is_that_of_pytorch(name, tmp_path):
    found, wanted = our_gradients(name), torch_gradients(name, tmp_path / "gradients")
    assert found.keys() == wanted.keys()
    norms = {tensor: float(np.linalg.norm(value)) for tensor, value in wanted.items()}
    floor = FLOOR * max(norms.values())
    for tensor, value in wanted.items():
        if tensor.endswith(STILL):
            assert not found[tensor].any() and not value.any(), tensor
            continue
        assert norms[tensor] > floor or not value.any() or tensor.endswith("k_proj.bias"), tensor
        error = float(np.linalg.norm(found[tensor] - value)) / max(norms[tensor], floor)
        assert error <= RELATIVE, (tensor, error, norms[tensor])
