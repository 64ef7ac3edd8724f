"""Attention over packed rows by FlashAttention-4 (the package fa4-jax), prompt group by prompt group.

Each group is a sequence of the kernel's packed form, causal, and a predicate inside its tiles hides the other branches.
No tile of two prompt groups is computed, and nothing is laid out again. Padding at the end of a row is a sequence of
its own.

Where several queries share a key, the kernel adds up gradients of keys and values in no fixed order.

Letters: B rows, T slots, N = B T slots of all rows, S sequences of a row, H heads, K key-value heads, C channels.
"""

import dataclasses
import functools
import importlib
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_jax.model.attention import Bounds, Layout, VisibilityRules

BEYOND = 256
"""Entries after the last slot that a tile at the end may ask for; no tile is larger."""


class GroupRanges(NamedTuple):
    """Where the trees of each row begin, T where there are no more; and of each slot what the predicate asks for."""

    begin: Int[Array, "B S"]
    branch: Int[Array, "B T"]
    position: Int[Array, "B T"]


def prepare(layout: Layout, window: int | None, bounds: Bounds | None) -> GroupRanges:
    """The trees of each row; the same for all layers. Without bounds a row may have as many trees as slots."""
    group, branch, position = layout
    length = group.shape[1]
    most = 1 + (length if bounds is None else bounds.texts)  # and padding
    begins = jnp.pad(group[:, 1:] != group[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    slots = jnp.where(begins, jnp.arange(length, dtype=jnp.int32), length)
    return GroupRanges(
        jnp.pad(jnp.sort(slots, axis=1), ((0, 0), (0, 1)), constant_values=length)[:, :most], branch, position
    )


def keeps_scores(length: int) -> bool:
    """Whether the backward pass finds scores where the forward pass left them: it computes them again."""
    return False


def attend(
    query: Float[Array, "B T H C"],
    key: Float[Array, "B T K C"],
    value: Float[Array, "B T K C"],
    trees: GroupRanges,
    window: int | None,
    rules: VisibilityRules,
) -> Float[Array, "B T H C"]:
    """Attention of each slot to what it sees of its own tree; softmax in float32."""
    batch, length = query.shape[:2]
    begin = (trees.begin + length * jnp.arange(batch, dtype=jnp.int32)[:, None]).reshape(-1)
    offsets = jnp.append(begin, jnp.int32(batch * length))
    branch, position = (jnp.pad(x.reshape(-1), (0, BEYOND)) for x in trees[1:])
    flat_query, key, value = (x.reshape(batch * length, *x.shape[2:]) for x in (query, key, value))
    mixed = _kernel(flat_query, key, value, offsets, branch, position, float(rules.scale), window)
    return mixed.reshape(query.shape)


def sees(mask: Any, sequence: Any, query: Any, key: Any) -> Any:
    """Whether a query sees a key that is not after it; both are counted from the start of their sequence.

    The kernel compiles this very function; `mask` has its arrays.
    """
    begin = mask.offsets[sequence]
    query, key = begin + query, begin + key
    seen = (mask.branch[key] == 0) | (mask.branch[key] == mask.branch[query])
    return seen if mask.window is None else seen & (mask.position[query] - mask.position[key] < mask.window)


def _kernel(
    query: Float[Array, "N H C"],
    key: Float[Array, "N K C"],
    value: Float[Array, "N K C"],
    offsets: Int[Array, " _"],
    branch: Int[Array, " _"],
    position: Int[Array, " _"],
    scale: float,
    window: int | None,
) -> Float[Array, "N H C"]:
    """Causal attention within sequences that begin at the offsets, of what `sees` allows."""
    package = importlib.import_module("fa4_jax")
    mask = _mask()(offsets, branch, position, window)
    return package.flash_attn_varlen(query, key, value, offsets, offsets, causal=True, scale=scale, mask_mod=mask)


@functools.cache
def _mask() -> Any:
    """The predicate as the package wants it: arrays are data, and what is static is compiled in."""
    package = importlib.import_module("fa4_jax")

    @dataclasses.dataclass(frozen=True)
    class Branches(package.MaskMod):
        offsets: Any
        branch: Any
        position: Any
        window: int | None = package.static()

        def __call__(self, b, h, q_idx, kv_idx):
            return sees(self, b, q_idx, kv_idx)

    return Branches
