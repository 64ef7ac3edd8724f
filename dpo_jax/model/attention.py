"""Who sees whom in a packed forest, and attention under that rule.

Letters: B rows, T queries, S keys, K key-value heads, G queries per key-value head, H = K G heads, C channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


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
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, queries, kv_heads, heads // kv_heads, channels)
    scores = jnp.einsum("btkgc,bskc->bkgts", grouped, key, preferred_element_type=jnp.float32) * channels**-0.5
    scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bskc->btkgc", weights, value).reshape(batch, queries, heads, channels)
