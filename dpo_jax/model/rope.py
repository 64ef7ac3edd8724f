"""Rotary position embedding. Letters: B rows, T positions, H heads, C channels of a head."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dpo_jax.model.spec import Rope

Rotation = tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]


def frequencies(rope: Rope, head_dim: int, *, long: bool = False) -> np.ndarray:
    """Radians per position of each rotation, float32 [turning channels / 2]; `long` takes longrope's factors for that.

    A rotation of frequency 0 leaves its channels as they are.
    """
    channels = rope.channels or head_dim
    span = head_dim if rope.kind == "proportional" else channels
    plain = 1.0 / rope.theta ** (np.arange(0, channels, 2, dtype=np.float32) / span)
    match rope.kind:
        case "default":
            found = plain
        case "linear":
            found = plain / rope.factor
        case "llama3":
            found = _stretched(plain, rope)
        case "yarn":
            found = _blended(plain, rope, channels)
        case "longrope":
            found = plain / np.asarray(rope.long if long else rope.short, np.float32)
        case "proportional":
            found = np.pad(plain / rope.factor, (0, (head_dim - channels) // 2))
    return found.astype(np.float32)


def _stretched(plain: np.ndarray, rope: Rope) -> np.ndarray:
    """Llama 3.1's blend of kept (fast) and slowed (slow) rotations."""
    turns = rope.original_positions * plain / (2 * math.pi)
    kept = np.clip((turns - rope.low_frequency) / (rope.high_frequency - rope.low_frequency), 0.0, 1.0)
    return kept * plain + (1 - kept) * plain / rope.factor


def _blended(plain: np.ndarray, rope: Rope, channels: int) -> np.ndarray:
    """YaRN's: a ramp over the number of the rotation, between those that turn `beta_fast` and `beta_slow` times."""

    def rotation_of(turns: float) -> float:
        return channels * math.log(rope.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = rotation_of(rope.beta_fast), rotation_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, channels - 1)
    high = high + 0.001 if low == high else high
    kept = 1 - np.clip((np.arange(channels // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return kept * plain + (1 - kept) * plain / rope.factor


def rotation(rope: Rope, head_dim: int, positions: Int[Array, "B T"], lengths: Int[Array, "B T"]) -> Rotation:
    """Cosine and sine of every rotation at every position, float32, ready to broadcast over heads.

    `lengths` is the number of tokens of the text that each position is of; longrope alone looks at it.
    """
    table = frequencies(rope, head_dim)[None, None, :]
    if rope.kind == "longrope":
        beyond = (lengths > rope.original_positions)[:, :, None]
        table = jnp.where(beyond, frequencies(rope, head_dim, long=True)[None, None, :], table)
    angles = positions[:, :, None].astype(jnp.float32) * table
    cos, sin = jnp.cos(angles) * rope.magnitude, jnp.sin(angles) * rope.magnitude
    return cos[:, :, None, :], sin[:, :, None, :]


def rotate(x: Float[Array, "B T H C"], turn: Rotation, *, interleaved: bool = False) -> Float[Array, "B T H C"]:
    """Turn channel i against channel i + n / 2 (or 2 i against 2 i + 1) of the first n = 2 half, in float32."""
    cos, sin = turn
    turning = 2 * cos.shape[-1]
    wide, rest = x[..., :turning].astype(jnp.float32), x[..., turning:]
    first, second = (wide[..., ::2], wide[..., 1::2]) if interleaved else jnp.split(wide, 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    both = jnp.stack(turned, axis=-1).reshape(wide.shape) if interleaved else jnp.concatenate(turned, axis=-1)
    both = both.astype(x.dtype)
    return jnp.concatenate([both, rest], axis=-1) if rest.shape[-1] else both
