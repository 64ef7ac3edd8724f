"""What a decoder is, as data: one field for each thing on which two families disagree."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding: rotation `i` of a head turns by `position / theta ** (2 i / head_dim)` radians.

    `llama3` stretches slow rotations: wavelengths longer than `original_positions / low_frequency` are multiplied by
    `factor`, those shorter than `original_positions / high_frequency` are kept, and those between are blended.
    `linear` multiplies every wavelength by `factor`.
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_positions: int = 0


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
    """A decoder: pre-norm blocks of grouped-query attention and a gated MLP."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    norm_epsilon: float
    rope: Rope = Rope()
    tied: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False
    logit_softcap: float | None = None
    windows: tuple[int | None, ...] = ()
    """Sliding window of each layer in tokens (a query sees keys with `0 <= distance < window`); () means none."""
    activation: Literal["silu"] = "silu"
    shared_trunk: bool = True
    """Whether completions may share one computed prompt (false where a layer carries a running state)."""
    scalar_head: bool = False
    """Whether the model scores texts (a reward model) and has no language-model head, whatever `tied` says."""
