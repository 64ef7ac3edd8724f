"""Grouped products as a loop over blocks of rows, which is what CPUs run and what all other forms are held against.

The rows of a group are cut into runs of at most `M` rows, and a loop over runs multiplies each with one matrix. The
work grows with N, whatever G is, and nothing but one row block and one matrix is copied.

    sizes = [5 0 2], M = 4      rows   0 1 2 3 | 4 | 5 6
                                group  0 0 0 0 | 0 | 2 2

Letters: N rows, D inputs, F outputs, G groups, K blocks.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

LARGEST_BLOCK = 512
SMALLEST_BLOCK = 16


class Blocks(NamedTuple):
    """Runs of rows of one group, in the order of the rows; those beyond the last run are empty, at N or later."""

    group: Int[Array, " K"]
    start: Int[Array, " K"]
    rows: Int[Array, " K"]


def block_size(rows: int, groups: int) -> int:
    """Rows of a block: the power of two next below half a group of average size, within bounds.

    A group's last block is half empty on average, so larger blocks would waste work, and smaller ones copy a matrix
    too often.
    """
    half = max(rows // (2 * groups), 1)
    return min(max(1 << (half.bit_length() - 1), SMALLEST_BLOCK), LARGEST_BLOCK)


def block_count(rows: int, groups: int, size: int) -> int:
    """The most blocks that any division of the rows into groups needs."""
    return rows if rows < groups else groups + (rows - groups) // size


def blocks(sizes: Int[Array, " G"], rows: int, size: int) -> Blocks:
    """The runs of each group, of at most `size` rows."""
    groups = sizes.shape[0]
    runs = (sizes + size - 1) // size
    last_run, last_row = jnp.cumsum(runs), jnp.cumsum(sizes)
    block = jnp.arange(block_count(rows, groups, size), dtype=sizes.dtype)
    ended = (block[:, None] >= last_run[None, :]).sum(axis=1, dtype=sizes.dtype)
    group = jnp.minimum(ended, groups - 1)
    start = (last_row - sizes)[group] + (block - (last_run - runs)[group]) * size
    return Blocks(group, start, jnp.clip(last_row[group] - start, 0, size))


def _padded(x: Float[Array, "N I"], groups: int) -> Float[Array, "P I"]:
    """The rows and a block of zeros, which is where blocks beyond the last read and write."""
    return jnp.pad(x, ((0, block_size(x.shape[0], groups)), (0, 0)))


def product(
    x: Float[Array, "N I"], w: Float[Array, "G D F"], sizes: Int[Array, " G"], *, axis: int
) -> Float[Array, "N O"]:
    """Each row times its group's matrix, summed over the matrix's axis 1 (D) or 2 (F), in float32."""

    def matrix(group):
        return lax.dynamic_index_in_dim(w, group, keepdims=False)

    return product_with(x, matrix, sizes, outputs=w.shape[3 - axis], axis=axis)


def product_with(
    x: Float[Array, "N I"],
    matrix: Callable[[Int[Array, ""]], Float[Array, "D F"]],
    sizes: Int[Array, " G"],
    *,
    outputs: int,
    axis: int,
) -> Float[Array, "N O"]:
    """Each row times its group's matrix, summed over the matrix's axis, 1 (D) or 2 (F); block by block."""
    rows, groups = x.shape[0], sizes.shape[0]
    size, inputs = block_size(rows, groups), _padded(x, groups)

    def multiply(y, block: Blocks):
        part = lax.dynamic_slice_in_dim(inputs, block.start, size)
        kernel = matrix(block.group)
        part = lax.dot_general(part, kernel, (((1,), (axis - 1,)), ((), ())), preferred_element_type=jnp.float32)
        # rows of the next group are wrong here, and the next block writes over them
        return lax.dynamic_update_slice_in_dim(y, part.astype(x.dtype), block.start, 0), None

    empty = jnp.zeros((rows + size, outputs), x.dtype)
    return lax.scan(multiply, empty, blocks(sizes, rows, size))[0][:rows]


def outer(
    x: Float[Array, "N D"], dy: Float[Array, "N F"], sizes: Int[Array, " G"], dtype: DTypeLike
) -> Float[Array, "G D F"]:
    """The sum over each group's rows of `x[n] dy[n]^T`, in float32 until it is rounded; zero for an empty group."""
    rows, groups, size = x.shape[0], sizes.shape[0], block_size(x.shape[0], sizes.shape[0])
    left, right = _padded(x, groups), _padded(dy, groups)

    def accumulate(dw, block: Blocks):
        own = (jnp.arange(size) < block.rows)[:, None]
        a = lax.dynamic_slice_in_dim(left, block.start, size)
        b = jnp.where(own, lax.dynamic_slice_in_dim(right, block.start, size), 0)
        part = lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        part = part + lax.dynamic_index_in_dim(dw, block.group, keepdims=False)
        return lax.dynamic_update_index_in_dim(dw, part, block.group, 0), None

    empty = jnp.zeros((groups, x.shape[1], dy.shape[1]), jnp.float32)
    return lax.scan(accumulate, empty, blocks(sizes, rows, size))[0].astype(dtype)
