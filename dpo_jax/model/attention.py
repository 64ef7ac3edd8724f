"""Who sees whom in a packed forest, and attention under that rule.

Letters: B rows, T queries, S keys, K key-value heads, G queries per key-value head, H = K G heads, C channels.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

QUERY_BLOCK = 128
"""Queries that attend together; smaller skips more of the upper triangle, larger has less overhead."""


class Layout(NamedTuple):
    """Where each slot of a row stands: its tree, its branch of that tree, and its position in the text.

    tokens     p0 p1 p2 | c0 c1 | r0 r1 || p0 p1 | c0 | pad
    group       1  1  1    1  1    1  1     2  2    2     0
    branch      0  0  0    1  1    2  2     0  0    1     0
    position    0  1  2    3  4    3  4     0  1    2     0
    """

    group: Int[Array, "B T"]
    branch: Int[Array, "B T"]
    position: Int[Array, "B T"]


def causal(batch: int, length: int) -> Layout:
    """Layout of ordinary rows: one text each, from position 0."""
    position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    return Layout(jnp.ones_like(position), jnp.zeros_like(position), position)


def visible(layout: Layout, window: Int[Array, ""] | int | None) -> Bool[Array, "B T T"]:
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


def attend(
    query: Float[Array, "B T H C"],
    key: Float[Array, "B S K C"],
    value: Float[Array, "B S K C"],
    seen: Bool[Array, "B T S"],
) -> Float[Array, "B T H C"]:
    """`softmax(query . key / sqrt(C))` over the keys that each query sees, times the values; softmax in float32.

    Every query must see at least one key.
    """
    batch, queries, heads, channels = query.shape
    keys, kv_heads = key.shape[1], key.shape[2]

    def by_head(x: Array) -> Array:
        return x.transpose(0, 2, 1, 3).reshape(batch * kv_heads, -1, channels)

    scores = _batched(by_head(query), by_head(key), 2, jnp.float32) * channels**-0.5
    scores = scores.reshape(batch, heads, queries, keys)
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, jnp.finfo(jnp.float32).min), axis=-1)
    weights = weights.astype(value.dtype).reshape(batch * kv_heads, -1, keys)
    mixed = _batched(weights, by_head(value), 1, value.dtype)
    return mixed.reshape(batch, heads, queries, channels).transpose(0, 2, 1, 3)


def attend_causally(
    query: Float[Array, "B T H C"],
    key: Float[Array, "B T K C"],
    value: Float[Array, "B T K C"],
    seen: Bool[Array, "B T T"],
) -> Float[Array, "B T H C"]:
    """`attend` where no query sees a later slot: queries go in blocks, and keys after a block are not computed."""
    length = query.shape[1]
    parts = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        parts.append(attend(query[:, start:stop], key[:, :stop], value[:, :stop], seen[:, start:stop, :stop]))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _batched(a: Float[Array, "N T X"], b: Float[Array, "N S Y"], b_axis: int, dtype: Any) -> Float[Array, "N T Z"]:
    """Product of each matrix of a batch with its partner, over a's last axis and the given one of b."""
    return lax.dot_general(a, b, (((2,), (b_axis,)), ((0,), (0,))), preferred_element_type=dtype)
