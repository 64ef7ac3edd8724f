"""Matrix products that are fast on every backend. Letters: I inputs, O outputs."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

NARROW = 8
"""Inputs for each output of a kernel, from which on it has few outputs."""


_ROUNDED = contextvars.ContextVar("rounded", default=False)
_WIDE = contextvars.ContextVar("wide", default=False)


@contextlib.contextmanager
def rounded_gradients(rounded: bool) -> Iterator[None]:
    """Whether kernels' gradients, of what is traced while this lasts, are products in the kernel's dtype."""
    token = _ROUNDED.set(rounded)
    try:
        yield
    finally:
        _ROUNDED.reset(token)


@contextlib.contextmanager
def wide_products() -> Iterator[None]:
    """What is traced while this lasts takes products in float32 and rounds them once, also where devices add them up.

    On a CPU XLA's matrix kernels give float32; asked for bfloat16 they take 5 times as long for 16 rows and twice for
    512.
    """
    token = _WIDE.set(True)
    try:
        yield
    finally:
        _WIDE.reset(token)


def dense(x: Float[Array, "*B I"], kernel: Float[Array, "I O"]) -> Float[Array, "*B O"]:
    """`x @ kernel`, whose backward products are written in the order that XLA's CPU matrix kernels are fast in.

    JAX's own rule asks for the kernel's gradient as (output, input) and transposes it, which on a CPU runs at a half
    (float32) to a sixtieth (bfloat16) of the speed. On GPU and TPU both orders are the same.

    A kernel with few outputs, such as an adapter's A, is the exception: its gradient is computed as (output, input),
    three times as fast.

    The kernel's gradient is a float32 product that is rounded once, so that devices which split the batch add their
    parts in float32: the partitioner adds them in the dtype of the product. Within `rounded_gradients` it is one in the
    kernel's dtype, and devices send each other half as much.
    """
    return _dense(_ROUNDED.get(), x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense(rounded: bool, x: Float[Array, "*B I"], kernel: Float[Array, "I O"]) -> Float[Array, "*B O"]:
    return _product(x, kernel)


def _product(x, kernel):
    wide = jnp.float32 if _WIDE.get() else None
    product = lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=wide)
    return product.astype(jnp.result_type(x, kernel))


def _forward(rounded, x, kernel):
    return _product(x, kernel), (x, kernel)  # not `_dense` itself, in which a policy of remat would see no product


def _backward(rounded, residuals, dy):
    x, kernel = residuals
    batch = tuple(range(x.ndim - 1))
    dx = lax.dot_general(dy, kernel, (((x.ndim - 1,), (1,)), ((), ())))
    turned = kernel.shape[0] >= NARROW * kernel.shape[1]
    wide = None if rounded else jnp.float32
    dkernel = lax.dot_general(
        *((dy, x) if turned else (x, dy)), ((batch, batch), ((), ())), preferred_element_type=wide
    )
    return dx.astype(x.dtype), (dkernel.T if turned else dkernel).astype(kernel.dtype)


_dense.defvjp(_forward, _backward)
