"""Rotary position embedding. Letters: B rows, T positions, H heads, C channels of a head."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dpo_jax.model.spec import Rope


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per position of each rotation, float32 [head_dim / 2]."""
    plain = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    match rope.kind:
        case "default":
            return plain.astype(np.float32)
        case "linear":
            return (plain / rope.factor).astype(np.float32)
        case "llama3":
            return _stretched(plain, rope).astype(np.float32)


def _stretched(plain: np.ndarray, rope: Rope) -> np.ndarray:
    """Llama 3.1's blend of kept (fast) and slowed (slow) rotations."""
    turns = rope.original_positions * plain / (2 * math.pi)
    kept = np.clip((turns - rope.low_frequency) / (rope.high_frequency - rope.low_frequency), 0.0, 1.0)
    return kept * plain + (1 - kept) * plain / rope.factor


def rotation(
    rope: Rope, head_dim: int, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
    """Cosine and sine of every rotation at every position, float32, ready to broadcast over heads."""
    angles = positions[:, :, None].astype(jnp.float32) * frequencies(rope, head_dim)[None, None, :]
    return jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]


def rotate(
    x: Float[Array, "B T H C"], cos: Float[Array, "B T 1 half"], sin: Float[Array, "B T 1 half"]
) -> Float[Array, "B T H C"]:
    """Turn channel i against channel i + C / 2, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
