"""Products of sorted rows with one matrix for each group. Letters: N rows, D inputs, F outputs, G groups.

The platform that a program is compiled for decides how it multiplies each row with the matrix of its own group only:

    tpu       grouped_tpu      a kernel of JAX's megablox for each product
    cuda      grouped_gpu      a kernel of Triton for each product
    others    grouped_blocks   a loop over blocks of rows

XLA's own `ragged_dot` is a kernel for one of the three products on a TPU, and every group on every row elsewhere.
"""

import functools
import importlib.util
from types import ModuleType

import jax
from jax import lax
from jaxtyping import Array, Float, Int

from dpo_jax.model import grouped_blocks, grouped_gpu, grouped_tpu

KERNELS: dict[str, ModuleType] = {"tpu": grouped_tpu, "cuda": grouped_gpu}
"""Platforms with kernels: each module's `product` and `outer` give what those of `grouped_blocks` do."""


@functools.cache
def missing() -> str | None:
    """What this JAX lacks for experts on GPUs; None if it has it. JAX 0.12 says that Pallas will lose Triton."""
    if importlib.util.find_spec("jax.experimental.pallas.triton") is not None:
        return None
    return (
        f"experts are multiplied by kernels of Pallas and Triton on a GPU, which jax {jax.__version__} does not have; "
        "install an older one (0.10.2 and 0.12.0 have them)"
    )


def kernels() -> dict[str, ModuleType]:
    """Those that can be traced: all platforms' forms are, wherever the program will run."""
    return {name: module for name, module in KERNELS.items() if name != "cuda" or missing() is None}


@jax.custom_vjp
def grouped_dot(x: Float[Array, "N D"], w: Float[Array, "G D F"], sizes: Int[Array, " G"]) -> Float[Array, "N F"]:
    """`x[n] @ w[group of n]`, summed in float32; the first `sizes[0]` rows are of group 0, and so on.

    `sizes` must sum to N. The cost is that of `x @ w[0]`, plus at most one block for each group.
    """
    return product(x, w, sizes, axis=1)


def product(x: Float[Array, "N I"], w: Float[Array, "G D F"], sizes: Int[Array, " G"], *, axis: int) -> Array:
    """Each row times its group's matrix, summed over the matrix's axis 1 (D) or 2 (F), in float32."""
    forms = {name: functools.partial(module.product, axis=axis) for name, module in kernels().items()}
    return lax.platform_dependent(x, w, sizes, **forms, default=functools.partial(grouped_blocks.product, axis=axis))


def _outer(x, dy, sizes, dtype):
    forms = {name: functools.partial(module.outer, dtype=dtype) for name, module in kernels().items()}
    return lax.platform_dependent(x, dy, sizes, **forms, default=functools.partial(grouped_blocks.outer, dtype=dtype))


def _backward(residuals, dy):
    x, w, sizes = residuals
    return product(dy, w, sizes, axis=2), _outer(x, dy, sizes, w.dtype), None


grouped_dot.defvjp(lambda x, w, sizes: (product(x, w, sizes, axis=1), (x, w, sizes)), _backward)
