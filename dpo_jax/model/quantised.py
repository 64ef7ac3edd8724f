"""Kernels kept in 4 or 8 bits, as bitsandbytes has them, and products with them.

A kernel of 4 bits is cut into blocks of 64 consecutive values, row after row of the weight as hubs store it (outputs,
inputs). A value is `table[code] * absmax`, where absmax is the largest magnitude of its block. Of 8 bits
(LLM.int8): `code * absmax / 127`, where absmax is that of its row.

What stands in a tree of parameters in the place of an array [I, O] is a plain dict:

    nf4, fp4   {kind: uint8 [O, I/2], "absmax": float32 [O, I/64]}            64 divides I: no block crosses a row
               {kind: uint8 [ceil(O*I/2)], "absmax": float32 [ceil(O*I/64)]}  otherwise, flat
    int8       {kind: int8 [O, I], "absmax": float32 [O]}

Two codes share a byte, the first in its high half. Stacks of layers, and of experts, have leading axes on both.

Only the codes are ever kept: a product dequantises, and its backward pass dequantises again.

Letters: I inputs, O outputs, E experts, N rows, B any axes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dpo_jax.errors import UserError
from dpo_jax.model.grouped import kernels
from dpo_jax.model.grouped_blocks import product_with

Kind = Literal["nf4", "fp4", "int8"]
KINDS: tuple[Kind, ...] = ("nf4", "fp4", "int8")
BLOCK = 64
"""Values of 4 bits that share an absmax."""
ONE_127TH = np.float32(7.874015718698502e-3)
"""1 / 127, by which bitsandbytes multiplies; dividing by 127 rounds otherwise."""
AT_ONCE = 1 << 16
"""Values that are quantised together, so that what is in between stays in a core's cache."""

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
TABLES: dict[str, np.ndarray] = {
    "nf4": np.array(_NF4, np.float32),
    "fp4": np.array([*_FP4, *(0.0 - value for value in _FP4)], np.float32) / np.float32(12),
}
"""Values of the sixteen codes, before they are scaled; codes 0 and 8 of fp4 are both zero, without a sign."""


# ---------------------------------------------------------------------------------------------- quantising


def quantise(weight: np.ndarray, kind: Kind) -> dict[str, np.ndarray]:
    """What is kept of a weight [*B, O, I] of any float dtype, to the bit as bitsandbytes quantises each [O, I].

    A code is that of the nearest value of the table; of two that are equally near, the lower value.

    Raises:
      UserError: the weight holds values that are not finite.
    """
    outer, shape = weight.shape[:-2], weight.shape[-2:]
    parts = [_quantised(part, kind) for part in weight.reshape(-1, *shape)]
    stacked = parts[0] if not outer else {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    return {name: leaf.reshape(*outer, *parts[0][name].shape) for name, leaf in stacked.items()}


def _quantised(weight: np.ndarray, kind: Kind) -> dict[str, np.ndarray]:
    if kind == "int8":
        return _eight_bits(weight)
    flat = np.ascontiguousarray(weight).reshape(-1)
    blocks = -(-flat.size // BLOCK)
    codes, absmax = np.empty((blocks, BLOCK), np.uint8), np.empty(blocks, np.float32)
    for start in range(0, blocks, AT_ONCE // BLOCK):
        part = flat[start * BLOCK : start * BLOCK + AT_ONCE].astype(np.float32)
        if part.size % BLOCK:  # the last block of all
            part = np.pad(part, (0, -part.size % BLOCK))
        part = part.reshape(-1, BLOCK)
        largest = np.abs(part).max(axis=1)
        _finite(largest, weight.shape)
        part *= (np.float32(1) / np.maximum(largest, np.float32(1e-38)))[:, None]
        codes[start : start + len(part)] = _codes(part, kind)
        absmax[start : start + len(part)] = largest
    pairs = codes.reshape(-1)[: flat.size + flat.size % 2]
    pairs[flat.size :] = 0
    return kept(kind, (pairs[::2] << 4) | pairs[1::2], absmax, weight.shape)


def _codes(scaled: np.ndarray, kind: Kind) -> np.ndarray:
    """The codes of values between -1 and 1: how many midpoints of the table a value is above, in the table's order."""
    order = np.argsort(TABLES[kind], kind="stable").astype(np.uint8)
    levels = TABLES[kind][order]
    bucket, above = np.zeros(scaled.shape, np.uint8), np.empty(scaled.shape, np.bool_)
    for midpoint in (levels[:-1] + levels[1:]) / np.float32(2):
        np.greater(scaled, midpoint, out=above)
        bucket += above.view(np.uint8)
    return bucket if kind == "nf4" else np.take(order, bucket, mode="clip")


def _eight_bits(weight: np.ndarray) -> dict[str, np.ndarray]:
    """By row; a row of zeros has absmax 0."""
    codes, absmax = np.empty(weight.shape, np.int8), np.empty(weight.shape[0], np.float32)
    rows = max(AT_ONCE // weight.shape[1], 1)
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows].astype(np.float32)
        largest = np.abs(part).max(axis=1)
        _finite(largest, weight.shape)
        factor = np.float32(127) / np.where(largest > 0, largest, np.float32(1))
        codes[start : start + rows] = np.rint(part * factor[:, None])
        absmax[start : start + rows] = largest
    return {"int8": codes, "absmax": absmax}


def _finite(absmax: np.ndarray, shape: tuple[int, ...]) -> None:
    if not np.isfinite(absmax).all():
        raise UserError(
            f"a weight of shape {list(shape)} holds values that are not finite, so it cannot be quantised; "
            "the folder is damaged, or was written by a run that diverged"
        )


def kept(
    kind: Kind, codes: np.ndarray, absmax: np.ndarray, shape: tuple[int, int], block: int = BLOCK
) -> dict[str, np.ndarray]:
    """What is kept of a weight [O, I] that was quantised elsewhere: its bytes and its absmax, flat, in float32.

    Raises:
      ValueError: the block is none of 64, 128, 192 and so on, or there are too few or too many codes or blocks.
    """
    expected = kept_shapes(kind, (shape[1], shape[0]))
    if kind != "int8":
        if block % BLOCK:
            raise ValueError(f"a block of {block} values is not made of blocks of {BLOCK}")
        absmax = np.repeat(absmax.reshape(-1), block // BLOCK)
        blocks = math.prod(expected["absmax"].shape)
        absmax = absmax[:blocks] if 0 <= absmax.size - blocks < block // BLOCK else absmax
    arrays = {kind: codes, "absmax": absmax.astype(np.float32, copy=False)}
    for name, like in expected.items():
        if arrays[name].size != math.prod(like.shape) or arrays[name].dtype != like.dtype:
            found = f"{arrays[name].dtype} {list(arrays[name].shape)}"
            raise ValueError(f"{name} of a weight of shape {list(shape)}: {found}, not {like.dtype} {list(like.shape)}")
    return {name: arrays[name].reshape(like.shape) for name, like in expected.items()}


def kept_shapes(kind: Kind, shape: tuple[int, int]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of what is kept of a kernel [I, O]."""
    inputs, outputs = shape
    count = inputs * outputs
    if kind == "int8":
        codes, absmax = (outputs, inputs), (outputs,)
    elif inputs % BLOCK == 0:
        codes, absmax = (outputs, inputs // 2), (outputs, inputs // BLOCK)
    else:
        codes, absmax = (-(-count // 2),), (-(-count // BLOCK),)
    return {
        kind: jax.ShapeDtypeStruct(codes, jnp.int8 if kind == "int8" else jnp.uint8),
        "absmax": jax.ShapeDtypeStruct(absmax, jnp.float32),
    }


def kind_of(leaf: object) -> Kind | None:
    """The kind of what stands in the place of a kernel; None for an array."""
    if not isinstance(leaf, Mapping):
        return None
    for kind in KINDS:
        if kind in leaf:
            return kind
    return None


# ---------------------------------------------------------------------------------------------- dequantising


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "absmax"], meta_fields=["kind", "shape", "flat"]
)
@dataclasses.dataclass(frozen=True)
class QuantisedKernel:
    """A kernel [*B, I, O] by its codes; a pytree of two arrays, or of whatever JAX puts in their places."""

    codes: Any
    absmax: Any
    kind: Kind
    shape: tuple[int, int]
    """(I, O), without the leading axes of a stack."""
    flat: bool

    @classmethod
    def of(cls, leaf: Mapping[str, Array], shape: tuple[int, int]) -> "QuantisedKernel":
        """The kernel (I, O), or the stack of such kernels, that a dict of a tree of parameters stands for.

        Raises:
          ValueError: the arrays are not those of such a kernel.
        """
        kind = kind_of(leaf)
        if kind is None or set(leaf) != {kind, "absmax"}:
            raise ValueError(f"no quantised kernel: {sorted(leaf)}, not one of {', '.join(KINDS)} and absmax")
        expected = kept_shapes(kind, shape)
        outer = leaf[kind].shape[: leaf[kind].ndim - len(expected[kind].shape)]
        for name, like in expected.items():
            if leaf[name].shape != (*outer, *like.shape):
                raise ValueError(
                    f"{name} of a kernel of shape {shape}: {leaf[name].shape}, not {(*outer, *like.shape)}"
                )
        return cls(leaf[kind], leaf["absmax"], kind, shape, kind != "int8" and shape[0] % BLOCK > 0)

    def weight(self, dtype: DTypeLike) -> Float[Array, "*B O I"]:
        """The values in a hub's orientation, computed in float32 and rounded once; `*B` are the axes of a stack."""
        if self.kind == "int8":
            return (self.codes.astype(jnp.float32) * self.absmax[..., None] * ONE_127TH).astype(dtype)
        inputs, outputs = self.shape
        outer = self.codes.shape[: self.codes.ndim - (1 if self.flat else 2)]
        pairs = jnp.stack([_looked_up(self.codes >> 4, self.kind), _looked_up(self.codes & 15, self.kind)], axis=-1)
        if not self.flat:
            blocks = pairs.reshape(*outer, outputs, inputs // BLOCK, BLOCK) * self.absmax[..., None]
            return blocks.astype(dtype).reshape(*outer, outputs, inputs)
        count = inputs * outputs
        absmax = jnp.repeat(self.absmax, BLOCK, axis=-1)[..., :count]
        values = pairs.reshape(*outer, -1)[..., :count] * absmax
        return values.astype(dtype).reshape(*outer, outputs, inputs)

    def dequantised(self, dtype: DTypeLike) -> Float[Array, "*B I O"]:
        """The kernel as an array, computed in float32 and rounded once."""
        return jnp.swapaxes(self.weight(dtype), -1, -2)

    def expert(self, number: Int[Array, ""]) -> "QuantisedKernel":
        """One kernel of a stack."""
        codes, absmax = (lax.dynamic_index_in_dim(x, number, keepdims=False) for x in (self.codes, self.absmax))
        return dataclasses.replace(self, codes=codes, absmax=absmax)


def _looked_up(codes: Array, kind: Kind) -> Array:
    """The table's values of codes 0..15, float32.

    A TPU gathers scalars one by one, and selects many at a time; on CPUs and GPUs the table stays in a cache.
    """
    return lax.platform_dependent(
        codes, tpu=functools.partial(_selected, kind=kind), default=functools.partial(_gathered, kind=kind)
    )


def _gathered(codes: Array, *, kind: Kind) -> Array:
    return jnp.asarray(TABLES[kind]).at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")


def _selected(codes: Array, *, kind: Kind) -> Array:
    """Bit by bit, from the lowest: one of each two values, then one of each two of those."""
    values = [jnp.full(codes.shape, value) for value in TABLES[kind]]
    for bit in (1, 2, 4, 8):
        is_set = (codes & bit) != 0
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]


# ---------------------------------------------------------------------------------------------- products


@jax.custom_vjp
def quantised_dense(x: Float[Array, "*B I"], kernel: QuantisedKernel) -> Float[Array, "*B O"]:
    """`x @ kernel`, with the kernel dequantised to x's dtype; the kernel has no gradient.

    The backward pass keeps the codes and dequantises again.
    """
    return _times(x, kernel, 1)


def _times(x: Array, kernel: QuantisedKernel, axis: int) -> Array:
    """x times the weight [O, I], summed over one of its axes."""
    return lax.dot_general(x, kernel.weight(x.dtype), (((x.ndim - 1,), (axis,)), ((), ())))


def _dense_back(kernel: QuantisedKernel, dy: Array):
    # without the barrier XLA finds that the values of the forward pass are these, and keeps them
    kernel, dy = lax.optimization_barrier((kernel, dy))
    return _times(dy, kernel, 0), None


quantised_dense.defvjp(lambda x, kernel: (_times(x, kernel, 1), kernel), _dense_back)


@jax.custom_vjp
def quantised_grouped_dot(
    x: Float[Array, "N I"], kernel: QuantisedKernel, sizes: Int[Array, " E"]
) -> Float[Array, "N O"]:
    """`grouped_dot` with a stack of E kernels: `x[n] @ kernel[expert of n]`; the kernels have no gradient.

    Without a kernel for the platform one expert's kernel is dequantised at a time. The backward pass keeps the codes
    and dequantises again.
    """
    return _grouped(x, kernel, sizes, axis=2)


def _grouped(x: Array, kernel: QuantisedKernel, sizes: Array, *, axis: int) -> Array:
    """Each row times its expert's weight, summed over axis 1 or 2 of the weights [E, O, I]."""
    forms = {name: functools.partial(_grouped_whole, module.product, axis=axis) for name, module in kernels().items()}
    return lax.platform_dependent(x, kernel, sizes, **forms, default=functools.partial(_grouped_blocks, axis=axis))


def _grouped_whole(
    product: Callable[..., Array], x: Array, kernel: QuantisedKernel, sizes: Array, *, axis: int
) -> Array:
    return product(x, kernel.weight(x.dtype), sizes, axis=axis)


def _grouped_blocks(x: Array, kernel: QuantisedKernel, sizes: Array, *, axis: int) -> Array:
    outputs = kernel.shape[1] if axis == 2 else kernel.shape[0]
    return product_with(x, lambda group: kernel.expert(group).weight(x.dtype), sizes, outputs=outputs, axis=axis)


def _grouped_back(residuals: tuple[QuantisedKernel, Array], dy: Array):
    (kernel, sizes), dy = lax.optimization_barrier((residuals, dy))
    return _grouped(dy, kernel, sizes, axis=1), None, None


quantised_grouped_dot.defvjp(
    lambda x, kernel, sizes: (_grouped(x, kernel, sizes, axis=2), (kernel, sizes)), _grouped_back
)
