"""Leaves of the parameter tree, read from a folder straight onto devices, about one tensor in host memory at a time."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from dpo_jax.errors import UserError
from dpo_jax.hf import tensors
from dpo_jax.hf.mapping import LeafPart, TensorEntry
from dpo_jax.hf.tensors import Tensors
from dpo_jax.model.quantised import Kind, kept_shapes, quantise


class Found(NamedTuple):
    """Where the folder has a part of a leaf: which part of which tensor."""

    entry: TensorEntry
    number: int

    @property
    def part(self) -> LeafPart:
        """The part of the leaf."""
        return self.entry.parts[self.number]


def leaf_of(
    source: Tensors, found: list[Found], shape: tuple[int, ...], dtype: DTypeLike, sharding: Sharding | None
) -> jax.Array:
    """One leaf; a stacked one starts from zeros, and each entry is written into it in place.

    One that has no parts in the folder (a new scalar head) stays zero.
    """
    if found and not found[0].part.index:
        return _cast(sharding)(_piece(source, found[0], sharding), dtype)
    stack = _zeros(sharding)(shape, dtype)
    for one in found:
        piece = _piece(source, one, _below(sharding, len(one.part.index)))
        # Waiting keeps the host from reading far ahead of the devices, one tensor after another.
        stack = jax.block_until_ready(_put(sharding)(stack, piece, one.part.index))
    return stack


def _piece(source: Tensors, found: Found, sharding: Sharding | None) -> jax.Array:
    """One part of a leaf as the tree lays it out, in the folder's dtype."""
    shape = found.part.shape
    if sharding is None:
        return jnp.asarray(_read(source, found, ()))
    if found.entry.plain and not source.is_packed(found.entry.name):
        read = functools.lru_cache(functools.partial(_read, source, found))
        return jax.make_array_from_callback(shape, sharding, lambda index: read(_bounds(index, shape)))
    whole = _read(source, found, ())
    return jax.make_array_from_callback(shape, sharding, lambda index: whole[index])


def _bounds(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """A device's part of an array as plain numbers, so that devices with equal parts share one read."""
    return tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))


def _read(source: Tensors, found: Found, bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
    name = found.entry.name
    index = found.entry.index_of(tuple(slice(*bound) for bound in bounds)) if bounds else ()
    array = source.exact(name, index)
    bad = tensors.non_finite(array)
    if bad:
        where = source.folder / source.infos[name].file
        raise UserError(f"{where}: tensor {name!r} has {bad} values that are NaN or infinite; the model is damaged")
    return np.asarray(found.entry.unpack(array, found.number), order="C")


def _below(sharding: Sharding | None, axes: int) -> Sharding | None:
    """Where one entry of a stacked leaf goes: the leaf's sharding without its first axes."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[axes:]), memory_kind=sharding.memory_kind)


@functools.lru_cache
def _zeros(sharding: Sharding | None) -> Callable:
    return jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)


@functools.lru_cache
def _cast(sharding: Sharding | None) -> Callable:
    return jax.jit(lambda piece, dtype: piece.astype(dtype), static_argnums=1, out_shardings=sharding)


@functools.lru_cache
def _put(sharding: Sharding | None) -> Callable:
    def put(stack, piece, index):
        piece = piece.astype(stack.dtype).reshape((1,) * len(index) + piece.shape)
        return lax.dynamic_update_slice(stack, piece, (*index, *(0,) * (stack.ndim - len(index))))

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)


def quantised_leaf(
    source: Tensors, found: list[Found], shape: tuple[int, ...], kind: Kind, places: Mapping[str, Sharding | None]
) -> dict[str, jax.Array]:
    """The codes of a stack of kernels [L, *E, I, O], quantised one at a time as they are read.

    Weights that came from the same kind of codes, with all digits, get those codes again.

    Args:
      source: with all digits (`opened(unrounded=True)`).
      found: where the folder has the kernels.
      shape: of the stack.
      kind: of the codes.
      places: where the arrays of `kept_shapes` go.
    """
    kept = kept_shapes(kind, (shape[-2], shape[-1]))
    stacks = {name: _zeros(places[name])((*shape[:-2], *like.shape), like.dtype) for name, like in kept.items()}
    for one in found:
        made = quantise(np.swapaxes(_read(source, one, ()), -1, -2), kind)
        for name, array in made.items():
            place = _below(places[name], len(one.part.index))
            piece = jnp.asarray(array) if place is None else jax.device_put(array, place)
            stacks[name] = jax.block_until_ready(_put(places[name])(stacks[name], piece, one.part.index))
    return stacks
