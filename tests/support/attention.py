"""Packed forests with queries, keys and values for the tests of attention, and the plain formula for them.

Letters: B rows, T slots, H heads, K key-value heads, C channels of a key, E channels of a value.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.model.attention import Layout, VisibilityRules, alibi_slopes, attend_seen, visible

LENGTH = 200
RULES = ("plain", "softcap", "sinks", "alibi", "everything")
WINDOWS = (None, 7)
SHAPES = {"grouped": (4, 2, 8, 8), "single": (3, 3, 8, 8), "wide values": (4, 2, 8, 12)}
"""H, K, C, E."""


def forest(rows: list[list[tuple[int, ...]]], length: int) -> Layout:
    """Rows of trees, each given by the lengths of its prompt and of its branches; the rest is padding.

    (2, 1, 2), (1, 1)  ->  p p a b b | p a | padding
    """
    group, branch, position = np.zeros((3, len(rows), length), np.int32)
    for row, trees in enumerate(rows):
        start = 0
        for number, lengths in enumerate(trees, 1):
            for which, size in enumerate(lengths):
                where = (row, slice(start, start + size))
                group[where], branch[where] = number, which
                position[where] = np.arange(size) + (lengths[0] if which else 0)
                start += size
    return Layout(*map(jnp.asarray, (group, branch, position)))


FOREST = forest([[(70, 30, 45), (3, 1), (20, 5, 9, 2)], [(1, 64, 64, 40)], [(150, 40)]], LENGTH)
"""Trees that end in the middle of blocks and at their edges, with one to three branches, and padding in two rows."""


def inputs(shape: str, channels: int = 1, dtype: Any = jnp.float32, layout: Layout = FOREST):
    """The forest; queries, keys, values and sinks; and the slope of a loss, zero at padding. Channels are multiplied.

    Queries are large enough for a softmax with a few keys that matter and for a soft cap that bends.
    """
    heads, kv_heads, key, value = SHAPES[shape]
    batch, length = layout.group.shape
    wide = [(heads, key, 3.0), (kv_heads, key, 1.0), (kv_heads, value, 1.0), (heads, value, 1.0)]
    arrays = [
        (size * jax.random.normal(jax.random.key(i), (batch, length, n, c * channels))).astype(dtype)
        for i, (n, c, size) in enumerate(wide)
    ]
    slope = jnp.where((layout.group > 0)[:, :, None, None], arrays[3], jnp.zeros((), dtype))
    return layout, (*arrays[:3], jax.random.normal(jax.random.key(9), (heads,))), slope


def slopes_of(heads: int) -> jax.Array:
    return jnp.asarray(alibi_slopes(heads, 0.7))


def as_rules(name: str, sinks: jax.Array) -> VisibilityRules:
    """Rules of that name; `everything` has all of them at once."""
    everything = name == "everything"
    return VisibilityRules(
        0.25,
        softcap=2.0 if name == "softcap" or everything else None,
        sinks=sinks if name == "sinks" or everything else None,
        slopes=slopes_of(len(sinks)) if name == "alibi" or everything else None,
    )


def plainly(arrays, layout: Layout, name: str, window: int | None) -> jax.Array:
    """The plain formula, in float32."""
    query, key, value, sinks = (x.astype(jnp.float32) for x in arrays)
    distance = layout.position[:, :, None] - layout.position[:, None, :]
    return attend_seen(query, key, value, visible(layout, window), as_rules(name, sinks), distance)


def plain_forward(query, key, value, seen, rules: VisibilityRules) -> tuple[jax.Array, jax.Array]:
    """What kernels give: the result, in the dtype of the queries, and log-sum-exps [B, H, T]. No sinks, no slopes."""
    scores, _ = _plain_scores(query, key, seen, rules)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(seen[:, None], jnp.exp(scores - lse[..., None]), 0)
    return jnp.einsum("bhts,bshe->bthe", weights, _by_query(value, query)).astype(query.dtype), lse


def plain_backward(query, key, value, out, slope, lse, seen, rules: VisibilityRules) -> tuple[jax.Array, ...]:
    """Slopes along queries, keys and values, from the result and its log-sum-exps (arXiv:2205.14135, algorithm 4)."""
    scores, tame = _plain_scores(query, key, seen, rules)
    weights = jnp.where(seen[:, None], jnp.exp(scores - lse[..., None]), 0)
    slope, out = slope.astype(jnp.float32), out.astype(jnp.float32)
    drop = (slope * out).sum(axis=-1).transpose(0, 2, 1)
    change = weights * (jnp.einsum("bthe,bshe->bhts", slope, _by_query(value, query)) - drop[..., None])
    change = change * tame * rules.scale
    to_query = jnp.einsum("bhts,bshc->bthc", change, _by_query(key, query))
    to_key = jnp.einsum("bhts,bthc->bshc", change, query.astype(jnp.float32))
    to_value = jnp.einsum("bhts,bthe->bshe", weights, slope)
    wide = (x.reshape(*key.shape[:3], -1, x.shape[-1]).sum(axis=3) for x in (to_key, to_value))
    return tuple(x.astype(query.dtype) for x in (to_query, *wide))


def _plain_scores(query, key, seen, rules: VisibilityRules):
    scores = jnp.einsum("bthc,bshc->bhts", query.astype(jnp.float32), _by_query(key, query)) * rules.scale
    tame = jnp.ones_like(scores)
    if rules.softcap is not None:
        bent = jnp.tanh(scores / rules.softcap)
        scores, tame = rules.softcap * bent, 1 - bent**2
    return jnp.where(seen[:, None], scores, -1e30), tame


def _by_query(x, query):
    """Keys or values of each head of the queries, in float32."""
    return jnp.repeat(x, query.shape[2] // x.shape[2], axis=2).astype(jnp.float32)


def measured(function: Callable, arrays, slope) -> list[np.ndarray]:
    """The function's value where there is a slope, and its gradient along it."""

    def total(arrays):
        found = function(arrays).astype(jnp.float32)
        return (found * slope.astype(jnp.float32)).sum(), jnp.where(slope != 0, found, 0)

    (_, found), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(arrays)
    return [np.asarray(x, np.float32) for x in (found, *gradient)]


@functools.cache
def wanted(shape: str, rules: str, window: int | None) -> list[np.ndarray]:
    """What the plain formula gives for `inputs(shape)`."""
    layout, arrays, slope = inputs(shape)
    return measured(lambda arrays: plainly(arrays, layout, rules, window), arrays, slope)


def assert_close(ours: list[np.ndarray], theirs: list[np.ndarray], tolerance: float) -> None:
    """Both `measured` the same value and the same gradient. The tolerance is a share of the largest of each array."""
    names = ("values", "query", "key", "value", "sinks")
    for name, one, other in zip(names, ours, theirs, strict=True):
        scale = max(float(np.abs(other).max()), 1e-3)
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale, err_msg=name)
