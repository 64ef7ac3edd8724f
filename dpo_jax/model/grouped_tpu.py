"""Grouped products for TPUs by JAX's own kernels (megablox), one for each product.

XLA's operation is a kernel there for `x @ w` only: it copies every transposed matrix for the gradient of x, and its
gradient of w is a dense product of all rows for every group.

Letters: N rows, I inputs, O outputs, G groups. Tiles are (rows, contracted, outputs).
"""

import contextlib
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

LANES = 128
ROW_TILES = (128, 256, 512)
STEP_ROWS = 64
"""What a step of the grid costs beside its products, in rows: about 0.35 us, in which a v5p multiplies 50 to 100."""
MEMORY = 11 << 20
"""Bytes of the tiles of a kernel; the least that a TPU's compiler allows by default is 16 MiB, and it needs some."""


def product(
    x: Float[Array, "N I"], w: Float[Array, "G D F"], sizes: Int[Array, " G"], *, axis: int, interpret: bool = False
) -> Float[Array, "N O"]:
    """Each row times its group's matrix, summed over the matrix's axis 1 (D) or 2 (F), in float32."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    rows, outputs = x.shape[0], w.shape[3 - axis]
    tiles = product_tiles(rows, x.shape[1], outputs, w.shape[0], x.dtype.itemsize)
    with _as_written():
        y = gmm(_filled(x, tiles[0]), w, sizes, x.dtype, tiles, transpose_rhs=axis == 2, interpret=interpret)
    return y[:rows]  # those beyond the last group are not written


def outer(
    x: Float[Array, "N D"],
    dy: Float[Array, "N F"],
    sizes: Int[Array, " G"],
    dtype: DTypeLike,
    *,
    interpret: bool = False,
) -> Float[Array, "G D F"]:
    """The sum over each group's rows of `x[n] dy[n]^T`, in float32 until it is rounded; zero for an empty group."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    dtype = jnp.dtype(dtype)
    tiles = outer_tiles(x.shape[0], x.shape[1], dy.shape[1], sizes.shape[0], x.dtype.itemsize, dtype.itemsize)
    with _as_written():
        return tgmm(_filled(x, tiles[0]).T, _filled(dy, tiles[0]), sizes, dtype, tiles, interpret=interpret)


@contextlib.contextmanager
def _as_written() -> Iterator[None]:
    """The promotion of dtypes and ranks that JAX's kernels were written for."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def _filled(x: Float[Array, "N I"], tile: int) -> Float[Array, "P I"]:
    """Rows up to a whole tile, of which no group's are."""
    return jnp.pad(x, ((0, -x.shape[0] % tile), (0, 0)))


def product_tiles(rows: int, inputs: int, outputs: int, groups: int, bytes_each: int) -> tuple[int, int, int]:
    """Tiles of a product: whole contractions where a matrix's tile fits, so that rows are read once for each column."""
    tm, room = row_tile(rows, groups), MEMORY // bytes_each
    ti, to = inputs, _upto(outputs, _widest(room, tm, inputs))
    while to <= 2 * LANES and to < outputs and ti > 4 * LANES:  # a narrow tile reads the rows too often
        ti = _upto(inputs, ti // 2)
        to = _upto(outputs, _widest(room, tm, ti))
    return tm, ti, to


def _widest(room: int, rows: int, inputs: int) -> int:
    """Outputs of which rows, matrix and result fit twice, and a sum in float32 once."""
    return max((room - 2 * rows * inputs) // (2 * inputs + 4 * rows), LANES)


def outer_tiles(
    rows: int, inputs: int, outputs: int, groups: int, bytes_each: int, bytes_out: int
) -> tuple[int, int, int]:
    """Tiles of an outer product: as near to a square as fits, so that both factors are read seldom."""
    tm = row_tile(rows, groups)
    fits = int(MEMORY // (4 + 2 * bytes_out))  # the sum in float32, and the result twice
    fits -= 4 * tm * int(math.sqrt(fits)) * bytes_each // (4 + 2 * bytes_out)  # both factors, twice
    side = int(math.sqrt(fits))
    ti = _upto(inputs, side)
    to = _upto(outputs, max(fits // ti, LANES))
    return tm, _upto(inputs, max(fits // to, LANES)), to


def row_tile(rows: int, groups: int) -> int:
    """Rows of a tile. A group's first and last tile are shared with others, and each of them is multiplied whole."""
    if rows <= ROW_TILES[0]:
        return -(-rows // 16) * 16
    return min(ROW_TILES, key=lambda tile: (-(-rows // tile) + groups - 1) * (tile + STEP_ROWS))


def _upto(size: int, most: int) -> int:
    """The size itself, or the smallest multiple of `LANES` with no more tiles than the widest that is allowed."""
    if size <= most:
        return size
    tiles = -(-size // max(most // LANES * LANES, LANES))
    return -(-size // (tiles * LANES)) * LANES
