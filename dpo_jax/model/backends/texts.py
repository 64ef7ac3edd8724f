"""Packed rows laid out text by text, for kernels that know no prompt groups: a prompt stands there for each completion.

A text is a prompt with one of its completions, or alone where it has none; each attends causally within itself. Both
directions, and both gradients, are gathers of whole channels, so the order of all sums is fixed.

Letters: B rows, T slots, L places of a row of texts, M texts of a row, W branches of a tree, H heads, X channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_jax.model.attention import Bounds, Layout


class Places(NamedTuple):
    """Where each place of another layout comes from. What is not there has the number of the end."""

    source: Int[Array, "B L"]
    """Slot that each place is a copy of, T for none."""
    first: Int[Array, "B L"]
    """The same where the place is the slot's first copy, T elsewhere."""
    copies: Int[Array, "B T W"]
    """Places that are copies of each slot, L for none."""


class Texts(NamedTuple):
    """Where the texts of each row are."""

    places: Places
    start: Int[Array, "B M"]
    """Place of each text's first token; -1 where there are no more texts."""
    size: Int[Array, "B M"]
    """Tokens of each text; -1 where there are no more texts."""


def lay_out(layout: Layout, bounds: Bounds) -> Texts:
    """The texts of these rows. Trees, and branches of a tree, stand in the order of their numbers."""
    return jax.vmap(lambda *row: _lay_out(Layout(*row), bounds))(*layout)


def _lay_out(row: Layout, bounds: Bounds) -> Texts:
    group, branch, _ = row
    length, most = group.shape[0], bounds.texts
    places, slots = bounds.branches * length, jnp.arange(group.shape[0], dtype=jnp.int32)

    def by_tree(reduce, x):  # trees are numbered from 1 to T, and 0 is padding
        return reduce(x, group, length + 1)

    inner = (branch > 0).astype(jnp.int32)
    begin, prefix = by_tree(jax.ops.segment_min, slots), by_tree(jax.ops.segment_sum, 1 - inner)
    there = (by_tree(jax.ops.segment_sum, jnp.ones_like(slots)) > 0) & (jnp.arange(length + 1) > 0)
    count = jnp.where(there, jnp.maximum(by_tree(jax.ops.segment_max, branch), 1), 0)
    base = jnp.cumsum(count) - count

    own = jnp.where(branch > 0, base[group] + branch - 1, most)  # text of a completion's slot
    tree = jnp.searchsorted(jnp.cumsum(count), jnp.arange(most), side="right", method="scan_unrolled")
    real = jnp.arange(most) < count.sum()
    size = jax.ops.segment_sum(inner, own, most + 1)[:-1] + jnp.where(real, prefix[jnp.minimum(tree, length)], 0)
    start = jnp.cumsum(size) - size
    begin_own = jax.ops.segment_min(slots, own, most + 1)

    which = jnp.arange(bounds.branches)[None, :]
    text = jnp.where((branch > 0)[:, None], own[:, None], base[group][:, None] + which)
    inside = jnp.where(branch > 0, prefix[group] + slots - begin_own[own], slots - begin[group])
    copied = which < jnp.where(branch > 0, 1, count[group])[:, None]
    copies = jnp.where(copied, start[jnp.minimum(text, most - 1)] + inside[:, None], places).astype(jnp.int32)

    start, size = (jnp.where(real, x, -1).astype(jnp.int32) for x in (start, size))
    return Texts(places_of(copies, places), start, size)


def places_of(copies: Int[Array, "T W"], places: int) -> Places:
    """The layout of one row in which each slot has copies at these places, of which no two are the same."""
    length = copies.shape[0]
    slots, nothing = jnp.arange(length, dtype=jnp.int32), jnp.full(places, length, jnp.int32)
    source = nothing.at[copies].set(jnp.broadcast_to(slots[:, None], copies.shape), mode="drop")
    return Places(source, nothing.at[copies[:, 0]].set(slots, mode="drop"), copies)


@jax.custom_vjp
def spread(x: Float[Array, "B T H X"], places: Places) -> Float[Array, "B L H X"]:
    """Each slot's values at all its places, and zeros where nothing is; gradients of copies are added in float32."""
    return _take(x, places.source)


def _spread(x, places):
    return _take(x, places.source), places


def _spread_back(places, slope):
    parts = (_take(slope, places.copies[:, :, w]).astype(jnp.float32) for w in range(places.copies.shape[2]))
    return sum(parts, jnp.float32(0)).astype(slope.dtype), None


spread.defvjp(_spread, _spread_back)


@jax.custom_vjp
def gather(x: Float[Array, "B L H X"], places: Places) -> Float[Array, "B T H X"]:
    """What each slot's first place has, and zeros for padding. Copies of a prompt have seen the same, and are equal."""
    return _take(x, places.copies[:, :, 0])


def _gather(x, places):
    return _take(x, places.copies[:, :, 0]), places


def _gather_back(places, slope):
    return _take(slope, places.first), None


gather.defvjp(_gather, _gather_back)


def _take(x: Array, where: Int[Array, "B _"]) -> Array:
    """Zeros where the index lies past the end, whatever a kernel left in places that it does not know."""
    return jax.vmap(lambda row, place: row.at[place].get(mode="fill", fill_value=0))(x, where)
