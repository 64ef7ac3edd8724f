"""Grouped products for GPUs from Ampere on as kernels of Triton, which XLA compiles itself, one for each product.

Each program of a product's kernel multiplies one block of rows with some columns of one matrix, and programs of empty
blocks end at once. In the kernel of an outer product each adds up all rows of one group, in their order.

Letters: N rows, I inputs, O outputs, D, F sides of a matrix, G groups, K blocks.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dpo_jax.model.grouped_blocks import block_count, blocks

COLUMNS = 128
"""Of a program's result, and of an outer product's also its rows."""
DEPTH = 128
"""Bytes of a row of either factor that are read at a time."""
ROWS = (16, 32, 64, 128)
"""A block's rows; below 64 a block leaves part of a tensor core's time unused, but most of a small group's is."""


def product(
    x: Float[Array, "N I"], w: Float[Array, "G D F"], sizes: Int[Array, " G"], *, axis: int, interpret: bool = False
) -> Float[Array, "N O"]:
    """Each row times its group's matrix, summed over the matrix's axis 1 (D) or 2 (F), in float32."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    (rows, inputs), outputs, groups = x.shape, w.shape[3 - axis], w.shape[0]
    size, depth = row_block(rows, groups), DEPTH // x.dtype.itemsize
    table = blocks(sizes, rows, size)

    def kernel(
        group_ref: jax.Ref, start_ref: jax.Ref, rows_ref: jax.Ref, x_ref: jax.Ref, w_ref: jax.Ref, y_ref: jax.Ref
    ) -> None:
        block, left_column = pl.program_id(1), pl.program_id(0) * COLUMNS
        count = rows_ref[block]

        @pl.when(count > 0)
        def _():
            start, group, columns = start_ref[block], group_ref[block], pl.ds(left_column, COLUMNS)
            own = (jnp.arange(size) < count)[:, None]
            exist = (left_column + jnp.arange(COLUMNS) < outputs)[None, :]

            def add(step: Array, total: Array) -> Array:
                inner = pl.ds(step * depth, depth)
                there = step * depth + jnp.arange(depth) < inputs
                left = triton.load(x_ref.at[pl.ds(start, size), inner], mask=own & there[None, :], other=0)
                if axis == 1:
                    matrix = triton.load(w_ref.at[group, inner, columns], mask=there[:, None] & exist, other=0)
                else:
                    matrix = triton.load(w_ref.at[group, columns, inner], mask=exist.T & there[None, :], other=0)
                return total + triton.dot(left, matrix, trans_b=axis == 2)

            total = lax.fori_loop(0, pl.cdiv(inputs, depth), add, jnp.zeros((size, COLUMNS), jnp.float32))
            triton.store(y_ref.at[pl.ds(start, size), columns], total.astype(y_ref.dtype), mask=own & exist)

    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, outputs), x.dtype),
        grid=(pl.cdiv(outputs, COLUMNS), block_count(rows, groups, size)),
        **_options(size, interpret),
    )
    return call(*table, x, w)


def outer(
    x: Float[Array, "N D"],
    dy: Float[Array, "N F"],
    sizes: Int[Array, " G"],
    dtype: DTypeLike,
    *,
    interpret: bool = False,
) -> Float[Array, "G D F"]:
    """The sum over each group's rows of `x[n] dy[n]^T`, in float32 until it is rounded; zero for an empty group."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    groups, inputs, outputs = sizes.shape[0], x.shape[1], dy.shape[1]
    depth = DEPTH // x.dtype.itemsize
    last = jnp.cumsum(sizes)

    def kernel(first_ref: jax.Ref, last_ref: jax.Ref, x_ref: jax.Ref, dy_ref: jax.Ref, dw_ref: jax.Ref) -> None:
        group = pl.program_id(2)
        first, last = first_ref[group], last_ref[group]
        corner = [pl.program_id(1 - side) * COLUMNS for side in (0, 1)]
        place = [pl.ds(each, COLUMNS) for each in corner]
        exist = [each + jnp.arange(COLUMNS) < end for each, end in zip(corner, (inputs, outputs), strict=True)]

        def add(step: Array, total: Array) -> Array:
            start = first + step * depth
            own = (start + jnp.arange(depth) < last)[:, None]
            left, right = (
                triton.load(ref.at[pl.ds(start, depth), place[side]], mask=own & exist[side][None, :], other=0)
                for side, ref in enumerate((x_ref, dy_ref))
            )
            return total + triton.dot(left, right, trans_a=True)

        total = lax.fori_loop(0, pl.cdiv(last - first, depth), add, jnp.zeros((COLUMNS, COLUMNS), jnp.float32))
        mask = exist[0][:, None] & exist[1][None, :]
        triton.store(dw_ref.at[group, place[0], place[1]], total.astype(dw_ref.dtype), mask=mask)

    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((groups, inputs, outputs), dtype),
        grid=(pl.cdiv(outputs, COLUMNS), pl.cdiv(inputs, COLUMNS), groups),
        **_options(COLUMNS, interpret),
    )
    return call(last - sizes, last, x, dy)


def row_block(rows: int, groups: int) -> int:
    """Rows of a block: at most half a group of average size, so that the last block of each wastes little."""
    return max((size for size in ROWS if 2 * size * groups <= rows), default=ROWS[0])


@functools.cache
def _options(size: int, interpret: bool) -> dict[str, Any]:
    from jax.experimental.pallas import triton

    return {
        "compiler_params": triton.CompilerParams(num_warps=8 if size >= 128 else 4, num_stages=3),
        "interpret": interpret,
    }
