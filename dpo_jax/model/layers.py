"""The small layers that decoders are made of. Letters: B rows, T positions, D width, I inputs, O outputs, H heads."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from dpo_jax.model import spec as specs
from dpo_jax.model.adapters import product
from dpo_jax.model.placement import TableSplit, found_in_parts, summed_in_parts
from dpo_jax.model.remat import cheap

INITIAL_SCALE = 0.02


def normal(rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    """A float32 parameter with small random numbers."""
    return nnx.Param(INITIAL_SCALE * jax.random.normal(rngs.params(), shape))


# What many tokens share gets the sum of their gradients. JAX would add them up in the dtype of computation, and a
# bfloat16 stands still after 256 equal terms; here they are added in float32, and the sum is rounded once.


def lookup(
    table: Float[Array, "V N"], index: Int[Array, "*B"], split: TableSplit | None = None
) -> Float[Array, "*B N"]:
    """Rows of a table; with `split` each device looks up in its own part, for rows of indices [B, T]."""
    return _lookup(table, index, split)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lookup(table, index, split):
    return table[index] if split is None else found_in_parts(split, table, index)


def _lookup_back(split, kept, slope):
    table, index = kept
    if split is None:
        total = jnp.zeros(table.shape, jnp.float32).at[index].add(slope.astype(jnp.float32))
    else:
        total = summed_in_parts(split, table.shape, index, slope)
    return total.astype(table.dtype), None


_lookup.defvjp(lambda table, index, split: (_lookup(table, index, split), (table, index)), _lookup_back)


@jax.custom_vjp
def biased(x: Float[Array, "*B O"], bias: Float[Array, " O"]) -> Float[Array, "*B O"]:
    """`x + bias`."""
    return x + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def _biased(x, bias):
    return biased(x, bias), bias


def _biased_back(bias, slope):
    total = slope.astype(jnp.float32).sum(axis=tuple(range(slope.ndim - 1)))
    return slope, total.astype(bias.dtype)


biased.defvjp(_biased, _biased_back)


class Dense(nnx.Module):
    """A linear layer; the kernel is stored (inputs, outputs)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, rngs: nnx.Rngs):
        """Normal kernel, zero bias."""
        self.kernel = normal(rngs, inputs, outputs)
        self.bias = nnx.Param(jnp.zeros((outputs,))) if bias else None

    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        """`x @ kernel + bias`."""
        y = product(x, self.kernel.get_value())
        return y if self.bias is None else biased(y, self.bias[...])


class NormLayer(nnx.Module):
    """A norm over the last axis, in float32: `x / sqrt(mean(x^2) + epsilon)`, or that of `x - mean(x)`; then scaled."""

    def __init__(self, spec: specs.Norm, *shape: int):
        """Scale one and bias zero; of shape (channels,), or (heads, channels) for a scale of each head."""
        self.scale = nnx.Param(jnp.full(shape, 1.0 - spec.offset)) if spec.scale else None
        self.bias = nnx.Param(jnp.zeros(shape)) if spec.bias else None
        self.spec = spec

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalised x, in x's dtype."""
        return cheap(self._normalised)(x)

    def _normalised(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        if self.spec.kind == "layer":
            wide = wide - wide.mean(axis=-1, keepdims=True)
        wide = wide * lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.spec.epsilon)
        if self.scale is not None:
            wide = wide * (_lifted(self.scale, x.ndim) + self.spec.offset)
        if self.bias is not None:
            wide = wide + _lifted(self.bias, x.ndim)
        return wide.astype(x.dtype)


def _lifted(param: nnx.Param, ndim: int) -> Float[Array, "..."]:
    """A parameter in float32, with leading axes so that it broadcasts against that many."""
    value = param[...].astype(jnp.float32)
    return value.reshape((1,) * (ndim - value.ndim) + value.shape)


class Xielu(nnx.Module):
    """xIELU (arXiv:2411.13010): a parabola above zero and an exponential below, with learned curvatures.

    `alpha_p x^2 + beta x` for x > 0, else `alpha_n (expm1(min(x, eps)) - x) + beta x`, where alpha_p is the softplus of
    `positive` and alpha_n is beta plus the softplus of `negative`. `beta` and `eps` are stored, and no gradient moves
    them.
    """

    def __init__(self):
        """The paper's start: alpha_p = alpha_n = 0.8, beta = 0.5."""
        self.positive = nnx.Param(jnp.log(jnp.expm1(jnp.full((1,), 0.8))))
        self.negative = nnx.Param(jnp.log(jnp.expm1(jnp.full((1,), 0.3))))
        self.beta = nnx.Param(jnp.full((), 0.5))
        self.eps = nnx.Param(jnp.full((), -1e-6))

    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T I"]:
        """The unit, element by element, computed in float32."""
        beta, eps = (lax.stop_gradient(leaf[...].astype(jnp.float32)) for leaf in (self.beta, self.eps))
        up, down = (jax.nn.softplus(leaf[0].astype(jnp.float32)) for leaf in (self.positive, self.negative))
        wide = x.astype(jnp.float32)
        above = up * wide * wide + beta * wide
        below = (jnp.expm1(jnp.minimum(wide, eps)) - wide) * (beta + down) + beta * wide
        return jnp.where(wide > 0, above, below).astype(x.dtype)


def _gelu_tanh(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The approximation by a cube: of 41 in float16 that is infinite, and from 148 on so is a part of the slope, by
    zero."""
    wide = x.astype(jnp.float32) if x.dtype == jnp.float16 else x
    return jax.nn.gelu(wide, approximate=True).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": _gelu_tanh,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}
"""Activations without parameters; `xielu` is a module."""


class MLPLayer(nnx.Module):
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate."""

    def __init__(self, spec: specs.MLP, width: int, *, rngs: nnx.Rngs):
        """Fresh projections."""
        self.gate = Dense(width, spec.width, bias=spec.bias, rngs=rngs) if spec.gated else None
        self.up = Dense(width, spec.width, bias=spec.bias, rngs=rngs)
        self.down = Dense(spec.width, width, bias=spec.bias, rngs=rngs)
        self.act = Xielu() if spec.activation == "xielu" else None
        self.activation = spec.activation

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The projections of x, bent and projected back."""
        act = ACTIVATIONS[self.activation] if self.act is None else self.act
        if self.gate is None:
            return self.down(cheap(act)(self.up(x)))
        return self.down(cheap(lambda gate, up: act(gate) * up)(self.gate(x), self.up(x)))
