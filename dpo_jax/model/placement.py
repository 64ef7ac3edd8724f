"""Where a step's arrays live on a mesh: activations [B, T, ...] by rows and by slots, heads and channels by axes.

Between layers the slots of a row are split over `context`, and over `tensor` too, where each device then normalises and
adds up its own slots only (arXiv:2205.05198, section 4.2). A layer's products see the slots of a `context` part whole,
and `tensor` splits their columns. What mixes the slots of a row (attention, a delta rule) sees whole rows and some of
their heads: these are split over `tensor` and `context` together, and XLA makes all-to-alls of the change
(arXiv:2309.14509).

Letters: B rows, T slots, S those of one device, V rows of a table, N columns of it, W and E those of one device's part,
H heads, K key-value heads; D batch shards, R rows of one, K slots that are picked of one, L those of one device.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dpo_jax.logprobs.fused import HeadSplit, dividing

CONTEXT, TENSOR = "context", "tensor"


def settled(x: Float[Array, "B T ..."], where: NamedSharding | None) -> Float[Array, "B T ..."]:
    """Activations held where the execution wants them, so that weights move to them and not the reverse."""
    return x if where is None else lax.with_sharding_constraint(x, where)


def between_layers(where: NamedSharding | None, rows: int, length: int) -> NamedSharding | None:
    """The sharding of activations for so many rows and slots: less the axes of slots that do not divide them, and
    without any where rows are not divided."""
    if where is None or not slot_axes(where):
        return where
    slots = dividing(where.mesh, slot_axes(where), length) if rows % _parts(where.mesh, row_axes(where)) == 0 else ()
    return NamedSharding(where.mesh, P(where.spec[0], slots) if slots else P(where.spec[0]))


def inside_layers(where: NamedSharding | None) -> NamedSharding | None:
    """As a layer's products see them: slots that `tensor` splits between layers are together."""
    if where is None or TENSOR not in slot_axes(where):
        return where
    return NamedSharding(where.mesh, P(where.spec[0], _context(where) or None))


def row_axes(where: NamedSharding) -> tuple[str, ...]:
    """Axes of the mesh that rows are split over."""
    return _axes(where, 0)


def slot_axes(where: NamedSharding) -> tuple[str, ...]:
    """Axes of the mesh that slots are split over between layers."""
    return _axes(where, 1)


def _axes(where: NamedSharding, dimension: int) -> tuple[str, ...]:
    found = where.spec[dimension] if len(where.spec) > dimension else None
    return found if isinstance(found, tuple) else () if found is None else (found,)


def _parts(mesh: Mesh | AbstractMesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _context(where: NamedSharding) -> tuple[str, ...]:
    return tuple(axis for axis in slot_axes(where) if axis != TENSOR)


# ---------------------------------------------------------------------------------------------- heads


class HeadAxes(NamedTuple):
    """How heads are split: over which axes, and how often each key-value head is repeated so that these divide them."""

    axes: tuple[str, ...]
    repeats: int


def head_axes(where: NamedSharding, heads: int, kv_heads: int) -> HeadAxes:
    """Axes over which so many heads are split within a layer that mixes slots.

    Over `tensor` and `context` where their product divides the heads, else over one of them or none: each device of the
    others then computes the same. `row_axes` are left out.
    """
    sizes, rows = where.mesh.shape, row_axes(where)
    able = tuple(axis for axis in (TENSOR, CONTEXT) if sizes.get(axis, 1) > 1 and axis not in rows)
    for axes in (able, *((axis,) for axis in able)):
        parts = _parts(where.mesh, axes)
        if parts > 1 and heads % parts == 0:
            return HeadAxes(axes, math.lcm(kv_heads, parts) // kv_heads)
    return HeadAxes((), 1)


def by_heads(where: NamedSharding, axes: tuple[str, ...]) -> P:
    """Of [B, T, heads, channels] where slots are mixed: whole rows, some heads."""
    return P(row_axes(where) or None, None, axes or None)


def by_slots(where: NamedSharding | None, x: Float[Array, "B T H C"]) -> Float[Array, "B T H C"]:
    """Queries, keys, values, or what attention gives, where products make them and use them: own slots, and those heads
    that the columns of the weights are."""
    if where is None or not slot_axes(where):
        return x
    heads = dividing(where.mesh, (TENSOR,), x.shape[2])
    return lax.with_sharding_constraint(
        x, NamedSharding(where.mesh, P(where.spec[0], _context(where) or None, heads or None))
    )


def repeated(x: Float[Array, "..."], times: int, axis: int = 2) -> Float[Array, "..."]:
    """Each head of an axis so often, one after the other; slopes are added up in float32."""
    return x if times == 1 else _repeated(x, times, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _repeated(x: Float[Array, "..."], times: int, axis: int) -> Float[Array, "..."]:
    return jnp.repeat(x, times, axis=axis)


def _repeated_back(times: int, axis: int, _, slope: Float[Array, "..."]):
    parts = slope.reshape(*slope.shape[:axis], -1, times, *slope.shape[axis + 1 :]).astype(jnp.float32)
    return (parts.sum(axis=axis + 1).astype(slope.dtype),)


_repeated.defvjp(lambda x, times, axis: (_repeated(x, times, axis), None), _repeated_back)


# ---------------------------------------------------------------------------------------------- tables


class TableSplit(NamedTuple):
    """How a table and the slots that are looked up in it are split.

    Attributes:
      mesh: over which.
      rows: axes of the rows of indices.
      slots: axes of their slots; the result's.
      words: axis of the table's rows, which sees the same indices on each of its devices, or splits their slots last.
      width: axes of the table's columns, all of them among `rows` and `slots`.
    """

    mesh: Mesh | AbstractMesh
    rows: tuple[str, ...]
    slots: tuple[str, ...]
    words: str | None
    width: tuple[str, ...]

    @property
    def scattered(self) -> bool:
        """Whether `words` splits the slots of the result."""
        return self.words in self.slots

    @property
    def index(self) -> P:
        """Of the indices, [B, T]."""
        return P(self.rows or None, tuple(axis for axis in self.slots if axis != self.words) or None)

    @property
    def table(self) -> P:
        """Of the table, [V, N]."""
        return P(self.words, self.width or None)

    @property
    def found(self) -> P:
        """Of what is found, [B, T, N]."""
        return P(self.rows or None, self.slots or None)

    @property
    def others(self) -> tuple[str, ...]:
        """Axes whose devices see other indices and hold the same part of the table."""
        return tuple(axis for axis in (*self.rows, *self.slots) if axis not in self.width and axis != self.words)


def table_split(
    head: HeadSplit | None, where: NamedSharding | None, table: tuple[int, ...], rows: int, *, vocabulary: bool = True
) -> TableSplit | None:
    """How a lookup is done on each device's own part of a table of this shape, for so many rows of indices.

    None leaves it to the compiler: one device, or rows that their axes do not divide. Tables of no `vocabulary` are
    split by columns only.
    """
    if head is None or where is None or where.mesh.size == 1:
        return None
    mesh, sizes = where.mesh, where.mesh.shape
    axes, slots = row_axes(where), slot_axes(where)
    words = head.vocabulary if vocabulary and head.vocabulary and table[0] % sizes[head.vocabulary] == 0 else None
    words = words if words and sizes[words] > 1 else None
    width = tuple(axis for axis in dividing(mesh, head.width, table[1]) if sizes[axis] > 1)
    if rows % _parts(mesh, axes) or not set(width) <= {*axes, *slots}:
        return None
    return TableSplit(mesh, axes, slots, words, width)


def on_parts(function: Callable, split: TableSplit, inputs: tuple[P, ...], output: P) -> Callable:
    """`function` on each device's own part of its arguments."""
    return jax.shard_map(function, mesh=split.mesh, in_specs=inputs, out_specs=output, check_vma=False)


def found_in_parts(split: TableSplit, table: Float[Array, "V N"], index: Int[Array, "B T"]) -> Float[Array, "B T N"]:
    """Rows of a split table. Each device looks up its own columns for all devices that share the width, and these
    exchange them; of a row that another device of `words` holds it finds zeros, and the parts are added up."""

    def local(part: Float[Array, "W E"], index: Int[Array, "B T"]) -> Float[Array, "B S N"]:
        index, mine = _own(split, part.shape[0], index)
        found = jnp.where(mine[..., None], part[jnp.where(mine, index, 0)], 0)
        if split.words and split.scattered:
            found = lax.psum_scatter(found, split.words, scatter_dimension=2, tiled=True)
        elif split.words:
            found = lax.psum(found, split.words)
        return (lax.all_to_all(found, split.width, 0, 3, tiled=True) if split.width else found)[0]

    return on_parts(local, split, (split.table, split.index), split.found)(table, index)


def summed_in_parts(
    split: TableSplit, shape: tuple[int, int], index: Int[Array, "B T"], slope: Float[Array, "B T N"]
) -> Float[Array, "V N"]:
    """The float32 sum of slopes by row of the table, each device's own part of it; `found_in_parts` the other way."""
    words, width = (split.mesh.shape[split.words] if split.words else 1), _parts(split.mesh, split.width)

    def local(index: Int[Array, "B T"], slope: Float[Array, "B S N"]) -> Float[Array, "W E"]:
        index, mine = _own(split, shape[0] // words, index)
        slope = slope[None]
        slope = lax.all_to_all(slope, split.width, 3, 0, tiled=True) if split.width else slope
        if split.words and split.scattered:
            slope = lax.all_gather(slope, split.words, axis=2, tiled=True)
        total = jnp.zeros((shape[0] // words, shape[1] // width), jnp.float32)
        total = total.at[jnp.where(mine, index, total.shape[0])].add(slope.astype(jnp.float32), mode="drop")
        return lax.psum(total, split.others) if split.others else total

    return on_parts(local, split, (split.index, split.found), split.table)(index, slope)


def _own(split: TableSplit, rows: int, index: Int[Array, "B T"]) -> tuple[Int[Array, "X B T"], Array]:
    """The indices of all devices that share the width, counted from this device's first row; and which it holds."""
    index = lax.all_gather(index, split.width) if split.width else index[None]
    index = index - (lax.axis_index(split.words) * rows if split.words else 0)
    return index, (index >= 0) & (index < rows)


# ---------------------------------------------------------------------------------------------- picked slots


def picked(
    states: Float[Array, "B T N"], source: Int[Array, "D K"], where: NamedSharding | None
) -> Float[Array, "M N"]:
    """States at the numbered slots of each batch shard, whose rows stand one after the other; M = D K.

    Where slots are split, each device picks from its own, and what they have picked is added up and split like the
    tokens of a head (see `HeadSplit`).
    """
    shards, length = source.shape[0], states.shape[1]
    where = between_layers(where, shards, length)
    if where is None or not slot_axes(where) or shards != _parts(where.mesh, row_axes(where)):
        flat = states.reshape(shards, -1, states.shape[-1])
        return jnp.take_along_axis(flat, source[:, :, None], axis=1).reshape(-1, states.shape[-1])
    return _picked_in_parts(where, states, source)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _picked_in_parts(where: NamedSharding, states: Float[Array, "B T N"], source: Int[Array, "D K"]):
    tensor, context = _picking(where, source.shape[1])

    def local(states: Float[Array, "R S N"], source: Int[Array, "1 K"]) -> Float[Array, "L N"]:
        row, slot, mine = _places(where, states.shape[1], source[0])
        found = jnp.where(mine[:, None], states[row, jnp.where(mine, slot, 0)], 0)
        found = lax.psum_scatter(found, context, scatter_dimension=0, tiled=True) if context else found
        return lax.psum(found, tensor) if tensor else found

    rows = row_axes(where)
    inputs = (P(rows, slot_axes(where)), P(rows))
    return jax.shard_map(local, mesh=where.mesh, in_specs=inputs, out_specs=P((*rows, *context)), check_vma=False)(
        states, source
    )


def _picked_back(where: NamedSharding, kept, slope: Float[Array, "M N"]):
    like, source = kept
    parts = _parts(where.mesh, slot_axes(where))
    shape = (like.shape[0] // source.shape[0], like.shape[1] // parts, slope.shape[-1])
    _, context = _picking(where, source.shape[1])

    def local(source: Int[Array, "1 K"], slope: Float[Array, "L N"]) -> Float[Array, "R S N"]:
        slope = lax.all_gather(slope, context, tiled=True) if context else slope
        row, slot, mine = _places(where, shape[1], source[0])
        return jnp.zeros(shape, slope.dtype).at[row, jnp.where(mine, slot, shape[1])].add(slope, mode="drop")

    rows = row_axes(where)
    inputs = (P(rows), P((*rows, *context)))
    total = jax.shard_map(
        local, mesh=where.mesh, in_specs=inputs, out_specs=P(rows, slot_axes(where)), check_vma=False
    )(source, slope)
    return total, None


_picked_in_parts.defvjp(
    lambda where, states, source: (_picked_in_parts(where, states, source), (jax.eval_shape(lambda: states), source)),
    _picked_back,
)


def _picking(where: NamedSharding, count: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Axes of slots that see all picked slots, and those that these are split over."""
    context = _context(where)
    context = context if count % _parts(where.mesh, context) == 0 else ()
    return tuple(axis for axis in slot_axes(where) if axis not in context), context


def _places(where: NamedSharding, own: int, source: Int[Array, " K"]) -> tuple[Array, Array, Array]:
    """Row, this device's slot, and whether it has that slot, of numbers that count the slots of all rows."""
    length = own * _parts(where.mesh, slot_axes(where))
    row, slot = source // length, source % length - lax.axis_index(slot_axes(where)) * own
    return row, slot, (slot >= 0) & (slot < own)
