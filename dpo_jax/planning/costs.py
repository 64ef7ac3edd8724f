"""Useful operations of a step from the spec alone: what a step must multiply, however it is compiled.

A forward pass multiplies each token once with every matrix of every layer (with the chosen experts' alone), each
query with the keys that it sees and their values, and each scored token with the head; a step is three forward passes.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from dpo_jax import trees
from dpo_jax.data.batch import Batch
from dpo_jax.model import spec as specs
from dpo_jax.model.decoder import abstract_params
from dpo_jax.model.spec import DecoderSpec
from dpo_jax.trees import Params


class Load(NamedTuple):
    """What a step has to work on, all devices and micro-batches together (means over steps): numbers of real tokens, of
    scored tokens, of (query, key) pairs that see each other by window, and of slots, padding included."""

    tokens: float
    scored: float
    seen: dict[int | None, float]
    slots: float


def load_of(batch: Batch, windows: set[int | None]) -> Load:
    """The load of one step's batch (host arrays)."""
    real, used = np.asarray(batch.group) > 0, int(batch.micro_batches)
    position = np.asarray(batch.position)[real]
    seen = {w: float(np.minimum(position + 1, w or position.size + 1).sum(dtype=np.float64)) for w in windows}
    scored = (np.asarray(batch.completion) < batch.ids.shape[-1]).sum()
    return Load(float(real.sum()), float(scored), seen, float(used * math.prod(real.shape[1:])))


def mean_load(loads: list[Load]) -> Load:
    """The mean of several steps' loads."""
    first, count = loads[0], len(loads)
    seen = {window: sum(load.seen[window] for load in loads) / count for window in first.seen}
    tokens, scored, slots = (
        sum(getattr(load, name) for load in loads) / count for name in ("tokens", "scored", "slots")
    )
    return Load(tokens, scored, seen, slots)


def windows_of(spec: DecoderSpec) -> set[int | None]:
    """Sliding windows of the spec's attention; None is none."""
    return {layer.mixer.window if isinstance(layer.mixer, specs.Attention) else None for layer in spec.layers}


def forward_flops(spec: DecoderSpec, load: Load) -> float:
    """Operations of one forward pass over the load, two for each multiplication."""
    return load.tokens * token_flops(spec) + load.scored * head_flops(spec) + attention_flops(spec, load)


def step_flops(spec: DecoderSpec, load: Load, trained: Params | None = None) -> float:
    """Useful operations of one step: forward, and twice that backward; no recomputation, no reference.

    Of what is not trained the gradient is not computed, which leaves out a third; the factors of an adapter are three
    products more. `trained` are its leaves, or their shapes; None is the whole model.
    """
    if trained is None:
        return 3.0 * forward_flops(spec, load)
    leaves = trees.paths(trained)
    products = {p: x for p, x in leaves.items() if p.endswith(("kernel", "/lora/a", "/lora/b"))}
    by_token = {p: 2.0 * math.prod(x.shape) * _share(spec, p) for p, x in products.items() if not p.startswith("score")}
    factors = sum(flops for path, flops in by_token.items() if "/lora/" in path)
    head = head_flops(spec) if f"{'embed' if spec.tied else 'head'}/embedding" in leaves else 0.0
    gradient = load.tokens * (sum(by_token.values()) + 2.0 * factors) + load.scored * head
    return 2.0 * forward_flops(spec, load) + attention_flops(spec, load) + gradient


def token_flops(spec: DecoderSpec) -> float:
    """Operations of all layers' matrices on one token."""
    return sum(2.0 * math.prod(leaf.shape) * _share(spec, path) for path, leaf in trees.paths(_matrices(spec)).items())


def _matrices(spec: DecoderSpec) -> dict[str, Any]:
    table = trees.paths(abstract_params(spec))
    return trees.from_paths(
        {path: leaf for path, leaf in table.items() if path.endswith("kernel") and not path.startswith("score")}
    )


def _share(spec: DecoderSpec, path: str) -> float:
    """The share of a matrix that a token meets: one of all the experts that are chosen."""
    experts = spec.experts
    routed = "/experts/" in path and not any(part in path for part in ("/shared", "/router"))
    return experts.chosen / experts.count if routed and experts is not None else 1.0


def head_flops(spec: DecoderSpec) -> float:
    """Operations of the head on one scored token."""
    return 0.0 if spec.scalar_head else 2.0 * spec.vocab_size * spec.head_width


def attention_flops(spec: DecoderSpec, load: Load) -> float:
    """Operations between queries, keys and values of all layers over the load; of a delta rule's state."""
    total = 0.0
    for layer in spec.layers:
        match layer.mixer:
            case specs.Attention(heads=heads, head_dim=channels, window=window):
                total += 4.0 * heads * channels * load.seen[window]
            case specs.MLA() as latent:
                width = latent.plain_dim + latent.rope_dim + latent.value_dim
                total += 2.0 * latent.heads * width * load.seen[None]
            case specs.GatedDelta() as delta:  # the state is decayed, read twice and written once
                total += 8.0 * delta.value_heads * delta.key_dim * delta.value_dim * load.tokens
    return total
