"""Low-rank adapters (LoRA, arXiv:2106.09685): `W' = W + s A B` for some kernels, of which only A and B are trained.

In a tree of parameters the factors stand beside the kernel that they change, one of each for every layer of a stack:

    blocks/0/attention/query/kernel       [L, I, O]   the base's, frozen
    blocks/0/attention/query/lora/a       [L, I, R]   trained
    blocks/0/attention/query/lora/b       [L, R, O]   trained
    blocks/0/attention/query/lora/scale   [L]         s of each layer, a constant; 0 where it has no adapter
    blocks/0/attention/query/lora/magnitude [L, O]    trained (DoRA only)

A layer of a smaller rank has zeros in the last columns of A and rows of B. Zeros in both stay zeros: each one's
gradient is a product with the other. Where a folder holds several kernels in one tensor they share its A, and only the
first of them (`OWNERS`) has it. Without the factors the same tree is the base, which is the reference.

Letters: L layers, I inputs, O outputs, R rank, E experts, B rows, T positions, N pairs of token and expert.
"""

import dataclasses
import functools
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt32

from dpo_jax import trees
from dpo_jax.model.grouped import grouped_dot
from dpo_jax.model.kernels import dense
from dpo_jax.model.quantised import QuantisedKernel, kind_of, quantised_dense, quantised_grouped_dot
from dpo_jax.trees import Params

LORA = "lora"
OWNERS: dict[str, str] = {"key": "query", "value": "query", "gate": "query", "up": "gate"}
"""Whose A a kernel uses that has none of its own: that of this kernel of the same module."""


class LowRank(NamedTuple):
    """How one stack of kernels is changed.

    Attributes:
      ranks: of each layer; 0 where it is not changed.
      scales: what each layer's A B is multiplied by.
      owner: path of the kernel whose A it uses; its own, where it shares none.
    """

    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    owner: str


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """What is adapted, and how: everything but the numbers.

    Attributes:
      changes: by path of the kernel.
      dropout: share of A's inputs that a training step sets to zero.
      dora: whether columns have a trained magnitude (DoRA, arXiv:2402.09353).
    """

    changes: Mapping[str, LowRank]
    dropout: float = 0.0
    dora: bool = False


# ---------------------------------------------------------------------------------------------- the factors as leaves


def beside(kernel: str, name: str) -> str:
    """Path of what belongs to a kernel.

    >>> beside("blocks/0/mlp/up/kernel", "a")
    'blocks/0/mlp/up/lora/a'
    """
    return f"{kernel.removesuffix('kernel')}{LORA}/{name}"


def fresh(adapter: AdapterSpec, shapes: Mapping[str, tuple[int, ...]], key: PRNGKeyArray) -> Params:
    """Factors that change nothing yet: A uniform in `+-1 / sqrt(I)` as in PEFT, B zero; float32.

    Args:
      adapter: what is adapted.
      shapes: of the base's leaves by path.
      key: with a leaf's path and layer it decides A, whatever else is adapted.
    """
    found = {}
    for path, change in adapter.changes.items():
        rank, (layers, *experts, inputs, outputs) = max(change.ranks), shapes[path]
        if change.owner == path:
            own = jax.random.fold_in(key, zlib.crc32(path.encode()))
            keys = jax.vmap(functools.partial(jax.random.fold_in, own))(jnp.arange(layers))
            shape, limit = (*experts, inputs, rank), inputs**-0.5
            drawn = jax.vmap(lambda k, s=shape, m=limit: jax.random.uniform(k, s, minval=-m, maxval=m))(keys)
            there = jnp.arange(rank)[None, :] < jnp.asarray(change.ranks)[:, None]
            found[beside(path, "a")] = jnp.where(there.reshape(layers, *(1,) * (drawn.ndim - 2), rank), drawn, 0.0)
        found[beside(path, "b")] = jnp.zeros((layers, *experts, rank, outputs))
    return trees.from_paths(found)


def constants(adapter: AdapterSpec) -> Params:
    """What stands beside the factors and is not trained: scales, and what tells one place of dropout from another."""
    found: dict[str, Array] = {}
    for path, change in adapter.changes.items():
        found[beside(path, "scale")] = jnp.asarray(change.scales, jnp.float32)
        if adapter.dropout:
            salts = [zlib.crc32(f"{change.owner} {layer}".encode()) for layer in range(len(change.ranks))]
            found[beside(path, "salt")] = jnp.asarray(salts, jnp.uint32)
    return trees.from_paths(found)


def magnitudes(params: Params, shapes: Params) -> Params:
    """DoRA's magnitudes at the start, beside the factors of `params`: the norm of each column of `W + s A B`.

    `shapes` is a tree like the base's parameters.
    """

    def of(kernel: "AdaptedKernel") -> Array:
        return jax.vmap(lambda one: one.norms())(kernel)

    made = composed(params, shapes)
    leaves = jax.tree_util.tree_leaves_with_path(made, is_leaf=lambda leaf: isinstance(leaf, AdaptedKernel))
    found = {trees.name_of(path): leaf for path, leaf in leaves if isinstance(leaf, AdaptedKernel)}
    return trees.from_paths({beside(path, "magnitude"): of(kernel) for path, kernel in found.items()})


def without(params: Params) -> Params:
    """The base of an adapted model, the same arrays."""
    rest = {name: child for name, child in params.items() if name != LORA}
    return {name: without(child) if isinstance(child, dict) else child for name, child in rest.items()}


# ---------------------------------------------------------------------------------------------- noise


class Noise(NamedTuple):
    """Dropout of one pass: a number for each token, and the share that is set to zero."""

    tokens: UInt32[Array, "B T"]
    share: float


def token_noise(
    key: UInt32[Array, ""], text: Int[Array, "B T"], position: Int[Array, "B T"], share: float
) -> Noise | None:
    """Noise that a token has wherever it stands: of the step's key, the number of its text and its position.

    None where nothing is dropped.
    """
    if not share:
        return None
    mixed = _mixed(_mixed(key ^ text.astype(jnp.uint32)) + position.astype(jnp.uint32) * jnp.uint32(0x9E3779B9))
    return Noise(mixed, share)


def _mixed(x: UInt32[Array, "*B"]) -> UInt32[Array, "*B"]:
    """A permutation of the 32-bit numbers in which each bit of x moves about half of the result's.

    The constants are those of C. Wellons' search for such functions, `lowbias32`.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _dropped(x: Float[Array, "B T I"], tokens: UInt32[Array, "B T"], salt: UInt32[Array, ""], share: float) -> Array:
    """x with this share of its numbers zero, and the others larger, so that the mean stays."""
    channels = jnp.arange(x.shape[-1], dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    drawn = _mixed(_mixed(tokens ^ salt)[..., None] + channels[None, None, :])
    stays = drawn >= jnp.uint32(min(round(share * 2**32), 2**32 - 1))
    return jnp.where(stays, x * jnp.asarray(1 / (1 - share), x.dtype), jnp.zeros((), x.dtype))


# ---------------------------------------------------------------------------------------------- products


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "a", "b", "scale", "magnitude", "salt", "tokens"],
    meta_fields=["share"],
)
@dataclasses.dataclass(frozen=True)
class AdaptedKernel:
    """A kernel with its adapter: what stands in the place of an array inside the layers.

    A pytree, so its leaves may be whatever JAX puts in the places of arrays; a stack of layers has one axis more.

    Attributes:
      base: [*E, I, O], or a quantised kernel.
      a, b: [*E, I, R] and [*E, R, O].
      scale: [].
      magnitude: [O], DoRA's, or None.
      salt: [], which tells this place of dropout from others, or None.
      tokens, share: those of `Noise`, where this pass has any.
    """

    base: Any
    a: Any
    b: Any
    scale: Any
    magnitude: Any = None
    salt: Any = None
    tokens: Any = None
    share: float = 0.0

    def astype(self, dtype: object) -> "AdaptedKernel":
        """With base and factors in this dtype."""
        base = self.base if isinstance(self.base, QuantisedKernel) else self.base.astype(dtype)
        return dataclasses.replace(self, base=base, a=self.a.astype(dtype), b=self.b.astype(dtype))

    def change(self) -> Float[Array, "*E I O"]:
        """`s A B`, in float32."""
        return self.scale * (self.a.astype(jnp.float32) @ self.b.astype(jnp.float32))

    def norms(self) -> Float[Array, " O"]:
        """Of the columns of `W + s A B`, in float32."""
        whole = _plain(self.base) + self.change()
        return jnp.sqrt(jnp.square(whole).sum(axis=0))


def _plain(kernel: Array | QuantisedKernel) -> Array:
    """A kernel as an array of float32, whatever it is kept in."""
    return kernel.dequantised(jnp.float32) if isinstance(kernel, QuantisedKernel) else kernel.astype(jnp.float32)


def product(x: Float[Array, "*B I"], kernel: Any) -> Float[Array, "*B O"]:
    """`x @ kernel`, of an array, or of a quantised or an adapted kernel."""
    if isinstance(kernel, QuantisedKernel):
        return quantised_dense(x, kernel)
    if not isinstance(kernel, AdaptedKernel):
        return dense(x, kernel)
    y, low = product(x, kernel.base), _low_rank(x, kernel)
    if kernel.magnitude is None:
        return y + low
    # DoRA: (m / n) (x W + s x A B), in which n is a constant to the gradient; noise is in both but the plain x W.
    ratio = kernel.magnitude.astype(jnp.float32) / jax.lax.stop_gradient(kernel.norms())
    ratio = jnp.where(kernel.scale != 0, ratio, 1.0).astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    if kernel.tokens is None:
        return ratio * (y + low)
    return y + (ratio - 1) * product(_noisy(x, kernel), kernel.base) + ratio * low


def _low_rank(x: Float[Array, "*B I"], kernel: AdaptedKernel) -> Float[Array, "*B O"]:
    """`s x A B`; the noise is made again in the backward pass."""

    def lowered(x: Array, a: Array, tokens: Array | None, salt: Array | None) -> Array:
        return dense(x if tokens is None or salt is None else _dropped(x, tokens, salt, kernel.share), a)

    lowered = lowered if kernel.tokens is None else jax.checkpoint(lowered)
    low = lowered(x, kernel.a.astype(x.dtype), kernel.tokens, kernel.salt)
    return dense(_scaled(low, kernel.scale), kernel.b.astype(x.dtype))


def _scaled(low: Float[Array, "*B R"], scale: Float[Array, ""]) -> Float[Array, "*B R"]:
    """`s x A`, where it is narrow; the scale keeps its digits, which in bfloat16 would be three."""
    return (low.astype(jnp.float32) * scale).astype(low.dtype)


def _noisy(x: Float[Array, "B T I"], kernel: AdaptedKernel) -> Float[Array, "B T I"]:
    assert kernel.tokens is not None and kernel.salt is not None
    return _dropped(x, kernel.tokens, kernel.salt, kernel.share)


def grouped_product(x: Float[Array, "N I"], kernel: Any, sizes: Int[Array, " E"]) -> Float[Array, "N O"]:
    """`x[n] @ kernel[expert of n]`, as `grouped_dot`, of an array, or of a quantised or an adapted kernel."""
    if isinstance(kernel, QuantisedKernel):
        return quantised_grouped_dot(x, kernel, sizes)
    if not isinstance(kernel, AdaptedKernel):
        return grouped_dot(x, kernel, sizes)
    low = _scaled(grouped_dot(x, kernel.a.astype(x.dtype), sizes), kernel.scale)
    return grouped_product(x, kernel.base, sizes) + grouped_dot(low, kernel.b.astype(x.dtype), sizes)


# ---------------------------------------------------------------------------------------------- kernels as one value


def composed(params: Params, shapes: Params, noise: Noise | None = None) -> Params:
    """The parameters of some modules in which each kernel that is quantised, or has factors beside it, is one value.

    `shapes` is the same tree of what has the kernels' shapes, with or without the axis of a stack.
    """
    found = {}
    for name, child in params.items():
        if not isinstance(child, dict):
            found[name] = child
            continue
        if kind_of(child) is not None:
            found[name] = QuantisedKernel.of(child, tuple(shapes[name].shape[-2:]))
            continue
        inner = composed({key: value for key, value in child.items() if key != LORA}, shapes[name], noise)
        if LORA in child:
            inner["kernel"] = _adapted(inner["kernel"], child[LORA], _shared(params, name), noise)
        found[name] = inner
    return found


def _shared(siblings: Params, name: str) -> Array:
    """The A that a module uses."""
    while "a" not in siblings[name][LORA]:
        name = OWNERS[name]
    return siblings[name][LORA]["a"]


def _adapted(base: object, factors: Params, a: Array, noise: Noise | None) -> AdaptedKernel:
    found = AdaptedKernel(base, a, factors["b"], factors["scale"], factors.get("magnitude"))
    if noise is None or "salt" not in factors:
        return found
    return dataclasses.replace(found, salt=factors["salt"], tokens=noise.tokens, share=noise.share)


def folded(params: Params, shapes: Params) -> Params:
    """The parameters with each adapter in its kernel, in float32: the same function without factors.

    `shapes` is a tree like the base's parameters.
    """
    return dict(_folded(composed(params, shapes)))


def _folded(params: Params) -> Iterator[tuple[str, Any]]:
    for name, child in params.items():
        if isinstance(child, dict):
            yield name, dict(_folded(child))
        elif isinstance(child, AdaptedKernel):
            yield name, jax.vmap(_whole)(child)
        elif isinstance(child, QuantisedKernel):
            yield name, _plain(child)
        else:
            yield name, child


def _whole(kernel: AdaptedKernel) -> Array:
    """W', in float32."""
    whole = _plain(kernel.base) + kernel.change()
    if kernel.magnitude is None:
        return whole
    ratio = kernel.magnitude.astype(jnp.float32) / jnp.sqrt(jnp.square(whole).sum(axis=0))
    return jnp.where(kernel.scale != 0, ratio, 1.0)[None, :] * whole
