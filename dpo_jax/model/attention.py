"""Who sees whom in a packed row, and attention where that is known for every pair.

Letters: B rows, T queries, S keys, K key-value heads, G queries per key-value head, H = K G heads, C channels of a key,
E channels of a value.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int


class Layout(NamedTuple):
    """Where each slot of a row stands: its tree, its branch of that tree, and its position in the text.

    A tree's slots stand together, its prompt first and then branch after branch, and positions rise by one at most from
    slot to slot. Trees are numbered from 1 to T at most.

    tokens     p0 p1 p2 | c0 c1 | r0 r1 || p0 p1 | c0 | pad
    group       1  1  1    1  1    1  1     2  2    2     0
    branch      0  0  0    1  1    2  2     0  0    1     0
    position    0  1  2    3  4    3  4     0  1    2     0
    """

    group: Int[Array, "B T"]
    branch: Int[Array, "B T"]
    position: Int[Array, "B T"]


TILE = 64
"""Slots of a tile of scores. On a CPU, of 32, 64, 128 and 256, by queries and by keys, this took least time."""


class Bounds(NamedTuple):
    """What is known of rows when their computation is compiled."""

    texts: int
    """Most texts of a row: completions, and prompts that have none."""
    branches: int
    """Most branches of a tree, at least 1."""
    tile: int = TILE
    """Slots of a tile of scores, by queries and by keys, where a backend goes tile by tile."""
    platform: str = "cpu"
    """Of the devices that it is compiled for, which need not be those of this process."""


def causal(batch: int, length: int) -> Layout:
    """Layout of ordinary rows: one text each, from position 0."""
    position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    return Layout(jnp.ones_like(position), jnp.zeros_like(position), position)


def visible(layout: Layout, window: int | None) -> Bool[Array, "B T T"]:
    """True where query t sees key s: no later slot, same group, and s is prompt or on t's own branch.

    A window counts positions in the text, not slots of the row: two branches of a prompt stand apart in the row but
    continue the same text.
    """
    group, branch, position = layout
    slots = jnp.arange(group.shape[1])
    seen = (slots[:, None] >= slots[None, :])[None]
    seen = seen & (group[:, :, None] == group[:, None, :])
    seen = seen & ((branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None]))
    return seen if window is None else seen & (position[:, :, None] - position[:, None, :] < window)


class VisibilityRules(NamedTuple):
    """How scores are made of queries and keys; what is None is not done."""

    scale: float
    softcap: float | None = None
    sinks: Float[Array, " H"] | None = None
    """One further logit of each head, which takes its share of the softmax and has no value."""
    slopes: Float[Array, " H"] | None = None
    """Of the linear biases: a key `d` tokens back scores `slope d` less."""


def alibi_slopes(heads: int, factor: float) -> np.ndarray:
    """Slopes of the linear position biases (arXiv:2108.12409), float32 [heads], times `factor`.

    A geometric sequence that starts at its own ratio, `2 ** (-8 / n)`, where n is the power of two at or below the
    number of heads; heads beyond n take every second one of the sequence for 2 n.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    return np.asarray(slopes, np.float32) * np.float32(factor)


def attend_seen(
    query: Float[Array, "B T H C"],
    key: Float[Array, "B S K C"],
    value: Float[Array, "B S K E"],
    seen: Bool[Array, "B T S"],
    rules: VisibilityRules,
    distance: Int[Array, "B T S"] | None = None,
) -> Float[Array, "B T H E"]:
    """`softmax(scale query . key)` over the keys that each query sees, times the values; softmax in float32.

    All scores exist at once: this is for short rows.

    `distance`, in tokens from each key to each query, is wanted where the rules have slopes. Every query must see at
    least one key.
    """
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    return _attended(query, key, value, seen, rules, distance, value.dtype)


def attend_kept(
    query: Float[Array, "B T H C"],
    key: Float[Array, "B K S C"],
    value: Float[Array, "B K S E"],
    seen: Bool[Array, "B T S"],
    rules: VisibilityRules,
    distance: Int[Array, "B T S"] | None = None,
) -> Float[Array, "B T H E"]:
    """As `attend_seen`, for a few queries that follow a cache, whose keys and values lie head by head: nothing of the
    cache's size is moved. The sum over values is rounded once, from float32."""
    return _attended(query, key, value, seen, rules, distance, jnp.float32)


def _attended(query, key, value, seen, rules: VisibilityRules, distance, sums: DTypeLike):
    """Of keys and values [B, K, S, C]; the sum over values is a product in dtype `sums`."""
    batch, queries, heads, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]

    def merged(x: Array) -> Array:
        return x.reshape(batch * kv_heads, -1, x.shape[-1])

    scores = _scores(merged(query.transpose(0, 2, 1, 3)), merged(key))
    scores = scores.reshape(batch, heads, queries, keys) * rules.scale
    if rules.softcap is not None:
        scores = rules.softcap * jnp.tanh(scores / rules.softcap)
    if rules.slopes is not None and distance is not None:
        scores = scores - rules.slopes[None, :, None, None] * distance[:, None].astype(jnp.float32)
    scores = jnp.where(seen[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = _softmax(scores, rules.sinks).astype(value.dtype).reshape(batch * kv_heads, -1, keys)
    mixed = _batched(weights, merged(value), 1, sums).astype(value.dtype)
    return mixed.reshape(batch, heads, queries, -1).transpose(0, 2, 1, 3)


def _softmax(scores: Float[Array, "B H T S"], sinks: Float[Array, " H"] | None) -> Float[Array, "B H T S"]:
    """Over the last axis; with sinks the weights add up to less than one."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sink = jnp.broadcast_to(sinks.astype(jnp.float32)[None, :, None, None], (*scores.shape[:3], 1))
    return jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :-1]


def _scores(query: Float[Array, "N T C"], key: Float[Array, "N S C"]) -> Float32[Array, "N T S"]:
    """`query . key`. In 16 bits its slopes are rounded before they are multiplied, as in kernels: a GPU's matrix units
    do not multiply float32."""
    if query.dtype == jnp.float32:
        return _batched(query, key, 2, jnp.float32)
    return _narrow_scores(query, key)


@jax.custom_vjp
def _narrow_scores(query: Float[Array, "N T C"], key: Float[Array, "N S C"]) -> Float32[Array, "N T S"]:
    return _batched(query, key, 2, jnp.float32)


def _slopes_of_scores(residuals, slope):
    query, key = residuals
    slope = slope.astype(query.dtype)
    to_key = lax.dot_general(slope, query, (((1,), (1,)), ((0,), (0,))), preferred_element_type=key.dtype)
    return _batched(slope, key, 1, query.dtype), to_key


_narrow_scores.defvjp(lambda query, key: (_batched(query, key, 2, jnp.float32), (query, key)), _slopes_of_scores)


def _batched(
    a: Float[Array, "N T X"], b: Float[Array, "N S Y"], b_axis: int, dtype: DTypeLike
) -> Float[Array, "N T Z"]:
    """Product of each matrix of a batch with its partner, over a's last axis and the given one of b."""
    return lax.dot_general(a, b, (((2,), (b_axis,)), ((0,), (0,))), preferred_element_type=dtype)
