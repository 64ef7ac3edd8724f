"""Packed rows laid out text by text, for kernels that know no prompt groups: a prompt stands there for each completion.

A text is a prompt with one of its completions, or alone where it has none; each attends causally within itself. Both
directions, and both gradients, are gathers of whole channels, so the order of all sums is fixed.

Letters: B rows, T slots, L places of a row of texts, M texts of a row, W branches of a tree, H heads, X channels.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from dpo_jax.model.attention import Bounds, Layout
from dpo_jax.model.remat import named
from dpo_jax.trees import Tree


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


class Kernel(NamedTuple):
    """A kernel for the other layout, whose gradient is a kernel too.

    Attributes:
      forward: of queries, keys, values [B, L, H, X] and what else it wants: the result, and numbers that the backward
        pass wants of each place and head, each [B, L, H].
      backward: of queries, keys, values, the result, those numbers, what else it wants, and the slope along the result:
        the slopes along queries, keys and values. Places that are no copies have the number 1 and no slope.
    """

    forward: Callable[..., tuple[Array, tuple[Array, ...]]]
    backward: Callable[..., tuple[Array, Array, Array]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def by_copies(
    kernel: Kernel,
    query: Float[Array, "B T H C"],
    key: Float[Array, "B T K C"],
    value: Float[Array, "B T K C"],
    places: Places,
    about: Tree,
) -> Float[Array, "B T H C"]:
    """What the kernel makes of all copies, taken from the first of each slot, and zeros for padding.

    Copies of a prompt have seen the same, and are equal. So what the backward pass keeps has the size of the slots, and
    the kernel's forward pass is not computed again where a policy keeps the name `context`.
    """
    return _by_copies(kernel, query, key, value, places, about)[0]


def _by_copies(kernel: Kernel, query, key, value, places: Places, about: Tree):
    out, kept = kernel.forward(*(spread(x, places) for x in (query, key, value)), about)
    out, kept = named((gather(out, places), tuple(gather(x, places) for x in kept)), "context")
    return out, (query, key, value, places, about, out, kept)


def _by_copies_back(kernel: Kernel, residuals: Any, slope):
    query, key, value, places, about, out, kept = residuals
    wide = (spread(x, places) for x in (query, key, value, out))
    kept = tuple(spread(x, places, 1.0) for x in kept)
    found = kernel.backward(*wide, kept, about, _take(slope, places.first))
    return *(gathered(x, places) for x in found), None, None


by_copies.defvjp(_by_copies, _by_copies_back)


def spread(x: Float[Array, "B T *X"], places: Places, nothing: float = 0.0) -> Float[Array, "B L *X"]:
    """Each slot's values at all its places, and `nothing` where nothing is."""
    return _take(x, places.source, nothing)


def gather(x: Float[Array, "B L *X"], places: Places) -> Float[Array, "B T *X"]:
    """What each slot's first place has, and zeros for padding."""
    return _take(x, places.copies[:, :, 0])


def gathered(slope: Float[Array, "B L *X"], places: Places) -> Float[Array, "B T *X"]:
    """The sum of what all places of each slot have, added in float32 and in order."""
    parts = (_take(slope, places.copies[:, :, w]).astype(jnp.float32) for w in range(places.copies.shape[2]))
    return sum(parts, jnp.float32(0)).astype(slope.dtype)


def _take(x: Array, where: Int[Array, "B _"], nothing: float = 0.0) -> Array:
    """`nothing` where the index lies past the end, whatever a kernel left in places that it does not know."""
    return jax.vmap(lambda row, place: row.at[place].get(mode="fill", fill_value=nothing))(x, where)


def by_text(stats: Float32[Array, "N H L"], texts: Texts) -> Float32[Array, "B L H"]:
    """Numbers of all rows' texts, one text after the other, for each place of these rows.

    The texts of a row follow those of the row before it, without a gap: text m of row b is number `texts of the rows
    before b` + m. Places that are in no text have zeros.
    """
    number, inside = _inside(texts)
    taken = stats[jnp.minimum(number, stats.shape[0] - 1), :, inside]
    return jnp.where((texts.places.source < texts.places.copies.shape[1])[:, :, None], taken, 0.0)


def of_places(x: Float32[Array, "B L H"], texts: Texts) -> Float32[Array, "N H L"]:
    """What `by_text` took apart; whatever no text has is zero."""
    number, inside = _inside(texts)
    batch, length, heads = x.shape
    blank = jnp.zeros((texts.start.size, heads, length), x.dtype)
    number = jnp.where(texts.places.source < texts.places.copies.shape[1], number, texts.start.size)
    return blank.at[number, :, inside].set(x, mode="drop")


def _inside(texts: Texts) -> tuple[Int[Array, "B L"], Int[Array, "B L"]]:
    """The number, over all rows, of the text that each place is in, and how far inside of it the place is."""
    order = jnp.arange(texts.places.source.shape[1], dtype=jnp.int32)
    real = texts.start >= 0
    before = jnp.cumsum(real.sum(axis=1)) - real.sum(axis=1)

    def row(start, real, before):
        which = jnp.searchsorted(jnp.where(real, start, order.size), order, side="right", method="scan_unrolled") - 1
        return before + which, order - start[which]

    number, inside = jax.vmap(row)(texts.start, real, before)
    return number.astype(jnp.int32), inside.astype(jnp.int32)
