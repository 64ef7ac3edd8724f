"""From packed codes and scales to weights: the arithmetic of every format, in NumPy and float32.

Nothing here checks what it is given; `formats` does, from the headers of a folder, before anything is read. Every
product is taken in float32 and nothing is rounded further. Beside the codes (a byte for each) and the result, only
some rows at a time are held.
"""

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int, Num, Shaped, UInt8

ROWS_AT_ONCE = 1 << 20
"""Numbers of a weight that are computed at a time, in whole rows."""
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""Values of the 4-bit floating-point numbers of MXFP4 and NVFP4 (e2m1), by code."""
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which four bits of a word AWQ puts each of eight neighbouring outputs into."""


def blockwise(
    codes: Shaped[np.ndarray, "R C"],
    scale: Float[np.ndarray, "G H"],
    rows: Int[np.ndarray, " R"],
    columns: Int[np.ndarray, " C"],
    *,
    table: Float[np.ndarray, " N"] | None = None,
    zeros: Num[np.ndarray, "G H"] | None = None,
) -> Float[np.ndarray, "R C"]:
    """`(table[codes] - zeros) * scale`, where row r and column c of the codes belong to block `rows[r], columns[c]`.

    Without a table a code is its own value; without zeros nothing is subtracted.
    """
    found = np.empty(codes.shape, np.float32)
    step = max(1, ROWS_AT_ONCE // max(1, codes.shape[1]))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        values = codes[part].astype(np.float32) if table is None else table.take(codes[part])
        if zeros is not None:
            values -= _spread(zeros, rows[part], columns)
        np.multiply(values, _spread(scale, rows[part], columns), out=found[part])
    return found


def _spread(block: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """A block's number for each row and column; one column where all have the same."""
    chosen = np.asarray(block[rows], np.float32)
    return chosen if block.shape[1] == 1 else chosen.take(columns, axis=1)


def blocks(count: int, size: int) -> Int[np.ndarray, " {count}"]:
    """The block that each of `count` neighbours belongs to, where the last block may be short.

    >>> blocks(5, 2).tolist()
    [0, 0, 1, 1, 2]
    """
    return np.arange(count) // size


def float_table(dtype: np.dtype) -> Float[np.ndarray, " 256"]:
    """The value of every byte that is an 8-bit floating-point number."""
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)


def powers_of_two(exponents: Shaped[np.ndarray, "*S"]) -> Float[np.ndarray, "*S"]:
    """`2 ** (e - 127)` for each byte e, NaN for 255: the scales of MXFP4, and of FP8 with `ue8m0`."""
    return float_table(np.dtype(ml_dtypes.float8_e8m0fnu)).take(exponents.view(np.uint8))


def nibbles(packed: UInt8[np.ndarray, "*S N"], *, high_first: bool) -> UInt8[np.ndarray, "*S M"]:
    """The two codes of each byte, one after the other on the last axis.

    >>> nibbles(np.array([0x12, 0x34], np.uint8), high_first=True).tolist()
    [1, 2, 3, 4]
    """
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    codes[..., 0 if high_first else 1 :: 2] = packed >> 4
    codes[..., 1 if high_first else 0 :: 2] = packed & 15
    return codes


def words(
    packed: Int[np.ndarray, "R C"], bits: int, axis: int, order: tuple[int, ...] = ()
) -> UInt8[np.ndarray, "S D"]:
    """The `32 / bits` codes of each 32-bit word, side by side on this axis.

    Args:
      packed: the words, of any sign.
      bits: of a code.
      axis: 0 where the codes of a word belong to neighbouring rows, 1 for columns.
      order: which place in the word each of the codes has; the lowest bits first if nothing is said.
    """
    each = 32 // bits
    shape = tuple(size * (each if at == axis else 1) for at, size in enumerate(packed.shape))
    codes = np.empty(shape, np.uint8)
    for number, place in enumerate(order or range(each)):
        where = (slice(None),) * axis + (slice(number, None, each),)
        codes[where] = (packed.view(np.uint32) >> np.uint32(bits * place)) & np.uint32(2**bits - 1)
    return codes


# ---------------------------------------------------------------------------------------------- bitsandbytes


def absmax_of(
    codes: UInt8[np.ndarray, " N"],
    code_map: Float[np.ndarray, " 256"],
    nested: Float[np.ndarray, " B"],
    block: int,
    offset: float,
) -> Float[np.ndarray, " N"]:
    """Largest absolute values of blocks that were quantised themselves (double quantisation)."""
    return code_map[codes] * nested[blocks(len(codes), block)] + np.float32(offset)


def flat_blocks(
    codes: UInt8[np.ndarray, " N"], table: Float[np.ndarray, " 16"], absmax: Float[np.ndarray, " B"], block: int
) -> Float[np.ndarray, " N"]:
    """`table[codes] * absmax`, where a block is so many codes in a row, and the last may be short."""
    whole = np.zeros(len(absmax) * block, np.uint8)
    whole[: len(codes)] = codes
    found = blockwise(
        whole.reshape(-1, block), absmax[:, None], np.arange(len(absmax)), np.zeros(block, int), table=table
    )
    return found.reshape(-1)[: len(codes)]


def int8_rows(codes: Int[np.ndarray, "O I"], absmax: Float[np.ndarray, " O"]) -> Float[np.ndarray, "O I"]:
    """`codes * absmax / 127`, a largest absolute value for each row (LLM.int8)."""
    found = blockwise(codes, absmax[:, None], np.arange(len(codes)), np.zeros(codes.shape[1], int))
    found /= np.float32(127)
    return found


# ---------------------------------------------------------------------------------------------- the others


def microscaled(
    packed: UInt8[np.ndarray, "O H"], scale: Float[np.ndarray, "O G"], group: int
) -> Float[np.ndarray, "O I"]:
    """FP4 values times a scale for each group of a row; the low four bits of a byte come first (MXFP4, NVFP4)."""
    codes = nibbles(packed, high_first=False)
    return blockwise(codes, scale, np.arange(len(codes)), blocks(codes.shape[1], group), table=FP4)


def gptq(
    weight: Int[np.ndarray, "P O"],
    zeros: Int[np.ndarray, "G Q"],
    scale: Float[np.ndarray, "G O"],
    groups: Int[np.ndarray, " I"],
    bits: int,
    *,
    plus_one: bool,
) -> Float[np.ndarray, "O I"]:
    """`scale[g, o] * (q - z)` with g the group of each input; the first version of the format stores z - 1."""
    stored = words(zeros, bits, axis=1)[:, : scale.shape[1]]
    zero = (stored + np.uint8(plus_one)) & np.uint8(2**bits - 1)
    outputs = np.arange(scale.shape[1])
    return blockwise(words(weight, bits, axis=0), scale, groups, outputs, zeros=zero).T


def awq(
    weight: Int[np.ndarray, "I Q"], zeros: Int[np.ndarray, "G Q"], scale: Float[np.ndarray, "G O"], group: int
) -> Float[np.ndarray, "O I"]:
    """`(q - z) * scale` with neighbouring outputs in one word, in AWQ's order of them."""
    codes, zero = (words(part, 4, 1, AWQ_ORDER) for part in (weight, zeros))
    return blockwise(codes, scale, blocks(len(codes), group), np.arange(scale.shape[1]), zeros=zero).T
