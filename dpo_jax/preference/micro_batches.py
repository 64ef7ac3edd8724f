"""A packed batch in JAX: a tree of arrays, and its micro-batches one after the other."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from dpo_jax.data.batch import Batch

S = TypeVar("S")
NAMES = tuple(field.name for field in dataclasses.fields(Batch))


def _leaves(batch: Batch) -> tuple[tuple[object, ...], None]:
    return tuple(getattr(batch, name) for name in NAMES), None


def _leaves_with_keys(batch: Batch) -> tuple[tuple[tuple[object, object], ...], None]:
    return tuple((jax.tree_util.GetAttrKey(name), getattr(batch, name)) for name in NAMES), None


def _batch(_: None, leaves: Iterable[object]) -> Batch:
    """Of any leaves (shardings, None, what JAX puts in their place), so not by `Batch(...)`, which may check them."""
    batch = object.__new__(Batch)
    for name, leaf in zip(NAMES, leaves, strict=True):
        object.__setattr__(batch, name, leaf)
    return batch


jax.tree_util.register_pytree_with_keys(Batch, _leaves_with_keys, _batch, _leaves)


def micro_batch(batch: Batch, number: int | Int[Array, ""]) -> Batch:
    """One micro-batch: a batch whose arrays are without their first axis."""
    arrays = {name: getattr(batch, name) for name in NAMES if name != "micro_batches"}
    taken = {name: lax.dynamic_index_in_dim(leaf, number, 0, keepdims=False) for name, leaf in arrays.items()}
    return dataclasses.replace(batch, **taken)


def fold(visit: Callable[[S, Batch, Int[Array, ""]], S], state: S, batch: Batch) -> S:
    """Fold `visit(state, micro_batch, number)` over the micro-batches of a batch that are in use.

    Their number is a value of the batch, not of its shape, so steps that need more or fewer share one compilation.
    """

    def body(number: Int[Array, ""], state: S) -> S:
        return visit(state, micro_batch(batch, number), number)

    if batch.real.shape[0] == 1:  # without a loop a sum over micro-batches, such as the gradient, is held once only
        return body(jnp.int32(0), state)
    return lax.fori_loop(0, batch.micro_batches, body, state)
