"""Products of sorted rows with one matrix for each group. Letters: N rows, D inputs, F outputs, G groups, K blocks.

Three ways to multiply each row with the matrix of its own group only:

    TPU    `lax.ragged_dot_general`, for which XLA has a kernel.
    GPU    blocks, below. In jax 0.10.2 `ragged_dot` is chlo.ragged_dot there, which XLA expands to every group on every
           row: it stores an array [G, N, D] and computes G times too much. XLA's flag for a fusion is off and fails on
           some devices, and jax's flag for a Triton kernel imports a module that the wheel does not have.
    CPU    blocks. `ragged_dot` is the same expansion, written out by jax.

Blocks: the rows of a group are cut into runs of at most `M` rows, and a loop over runs multiplies each with one matrix.
The work grows with N, whatever G is, and nothing but one row block and one matrix is copied.

    sizes = [5 0 2], M = 4      rows   0 1 2 3 | 4 | 5 6
                                group  0 0 0 0 | 0 | 2 2
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

LARGEST_BLOCK = 512
SMALLEST_BLOCK = 16


@jax.custom_vjp
def grouped_dot(x: Float[Array, "N D"], w: Float[Array, "G D F"], sizes: Int[Array, " G"]) -> Float[Array, "N F"]:
    """`x[n] @ w[group of n]`, summed in float32; the first `sizes[0]` rows are of group 0, and so on.

    `sizes` must sum to N. The cost is that of `x @ w[0]`, plus at most one block for each group.
    """
    return _product(x, w, sizes, axis=1)


def _forward(x, w, sizes):
    return _product(x, w, sizes, axis=1), (x, w, sizes)


def _backward(residuals, dy):
    x, w, sizes = residuals
    dw = lax.platform_dependent(x, dy, sizes, tpu=_ragged_outer, default=_block_outer)
    return _product(dy, w, sizes, axis=2), dw.astype(w.dtype), None


grouped_dot.defvjp(_forward, _backward)


def _product(x: Float[Array, "N I"], w: Float[Array, "G D F"], sizes: Int[Array, " G"], *, axis: int) -> Array:
    """Each row times its group's matrix, or times its transpose (axis 2)."""
    return lax.platform_dependent(
        x, w, sizes, tpu=partial(ragged_product, axis=axis), default=partial(_block_product, axis=axis)
    )


def ragged_product(x: Float[Array, "N I"], w: Float[Array, "G D F"], sizes: Int[Array, " G"], *, axis: int) -> Array:
    """Each row times its group's matrix, summed over the matrix's axis 1 or 2; by XLA's own operation."""
    numbers = lax.RaggedDotDimensionNumbers((((1,), (axis,)), ((), ())), (0,), (0,))
    return lax.ragged_dot_general(x, w, sizes, numbers, preferred_element_type=jnp.float32).astype(x.dtype)


def _ragged_outer(x, dy, sizes):
    numbers = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    return lax.ragged_dot_general(x, dy, sizes, numbers, preferred_element_type=jnp.float32)


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


def _blocks(sizes: Int[Array, " G"], rows: int) -> Blocks:
    """The runs of each group."""
    groups, size = sizes.shape[0], block_size(rows, sizes.shape[0])
    runs = (sizes + size - 1) // size
    last_run, last_row = jnp.cumsum(runs), jnp.cumsum(sizes)
    block = jnp.arange(block_count(rows, groups, size), dtype=sizes.dtype)
    group = jnp.minimum(jnp.searchsorted(last_run, block, side="right").astype(sizes.dtype), groups - 1)
    start = (last_row - sizes)[group] + (block - (last_run - runs)[group]) * size
    return Blocks(group, start, jnp.clip(last_row[group] - start, 0, size))


def _padded(x: Float[Array, "N I"], groups: int) -> Float[Array, "P I"]:
    """The rows and a block of zeros, which is where blocks beyond the last read and write."""
    return jnp.pad(x, ((0, block_size(x.shape[0], groups)), (0, 0)))


def _block_product(x, w, sizes, *, axis: int):
    def matrix(group):
        return lax.dynamic_index_in_dim(w, group, keepdims=False)

    return block_product(x, matrix, sizes, outputs=w.shape[3 - axis], axis=axis)


def block_product(
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
    return lax.scan(multiply, empty, _blocks(sizes, rows))[0][:rows]


def _block_outer(x, dy, sizes):
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
    return lax.scan(accumulate, empty, _blocks(sizes, rows))[0]
