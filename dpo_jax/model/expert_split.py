"""How a mixture of experts lies on a mesh: which devices have which tokens, and which matrices.

Each device routes and sorts its own tokens. Of the axes of the mesh, those that split the batch split the tokens;
`tensor` splits each expert's width; `expert` splits the experts, and the tokens too. Along `expert` tokens move and
matrices do not: the devices of one group gather their tokens, each multiplies the pairs of its own experts, and the
results are added up where the tokens came from. A token of K experts would be sent to K devices of the X, or all of
them, so where X <= K gathering sends no more than an exchange of pairs would, and has the same shape whatever a router
picks. No pair is dropped.

Kernels cannot be split by the compiler, so all axes of the mesh are split here.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax.errors import UserError
from dpo_jax.model import spec as specs
from dpo_jax.trees import Tree

EXPERT, TENSOR = "expert", "tensor"


class Placement(NamedTuple):
    """Axes of a mesh, where they have more than one device.

    Attributes:
      mesh: None is one device.
      rows, slots: split the first and the second axis of the tokens.
      experts: splits the experts.
      width: splits each expert's width.
    """

    mesh: Mesh | AbstractMesh | None = None
    rows: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()
    experts: str | None = None
    width: str | None = None

    @property
    def gathers(self) -> bool:
        """Whether the devices along the axis of experts have different tokens."""
        return self.experts is not None and self.experts in (*self.rows, *self.slots)

    @property
    def parts(self) -> int:
        """Parts that the experts are split into."""
        return 1 if self.mesh is None or self.experts is None else self.mesh.shape[self.experts]


HERE = Placement()


def check(mesh: Mesh, spec: specs.Experts | None) -> None:
    """Whether a mesh can split the experts of a model.

    Raises:
      UserError: it is to, and there are none, or they are no multiple of the axis.
    """
    parts = mesh.shape.get(EXPERT, 1)
    if parts == 1:
        return
    if spec is None:
        raise UserError(f"mesh.expert: {parts}: the model has no experts to split; leave it out and use mesh.fsdp")
    if spec.count % parts:
        fits = [size for size in range(2, parts) if spec.count % size == 0]
        best = f"set it to {fits[-1]}" if fits else "leave it out"
        raise UserError(f"mesh.expert: {parts} does not divide the model's {spec.count} experts; {best}")


def placement(
    activations: NamedSharding | None, shape: tuple[int, ...], spec: specs.Experts, *, quantised: bool
) -> Placement:
    """Where tokens [B, T, ...] and experts lie, of activations that are split like this.

    Axes that do not divide their dimension have the same tokens, or the same matrices, on each of their devices; so has
    `tensor` where the matrices are quantised, as a row of codes cannot be cut everywhere.
    """
    if activations is None or activations.mesh.size == 1:
        return HERE
    sizes = dict(activations.mesh.shape)
    split = (*activations.spec, None, None)[:2]
    rows, slots = (
        _dividing(dimension, tuple(axis for axis in _axes(axes) if axis != TENSOR), sizes)
        for dimension, axes in zip(shape, split, strict=False)
    )
    experts = EXPERT if sizes.get(EXPERT, 1) > 1 and spec.count % sizes[EXPERT] == 0 else None
    parts = sizes.get(TENSOR, 1)
    width = TENSOR if parts > 1 and spec.width % parts == 0 and not quantised else None
    return Placement(activations.mesh, rows, slots, experts, width)


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _dividing(size: int, axes: tuple[str, ...], sizes: dict[str, int]) -> tuple[str, ...]:
    axes = tuple(axis for axis in axes if sizes[axis] > 1)
    return axes if size % math.prod(sizes[axis] for axis in axes) == 0 else ()


def split(function: Callable[..., Tree], place: Placement, layers: tuple[Any, ...]) -> Callable[..., Tree]:
    """`function(tokens, layers)` on each device's own tokens and matrices; `layers` are (router, gate, up, down).

    A result's first two axes are those of the tokens. Gradients of what several devices share are summed.
    """
    if place.mesh is None:
        return function
    tokens, (router, *linears) = P(place.rows or None, place.slots or None), layers
    by_leaf = [jax.tree.map(lambda _: P(), router)]
    for name, layer in zip(("gate", "up", "down"), linears, strict=True):
        rule = functools.partial(_leaf_spec, place, inputs_split=name == "down")
        by_leaf.append(jax.tree_util.tree_map_with_path(rule, layer))
    return jax.shard_map(
        function,
        mesh=place.mesh,
        in_specs=(tokens, tuple(by_leaf)),
        out_specs=tokens,
        check_vma=False,
    )


def _leaf_spec(place: Placement, path: tuple[Any, ...], leaf: object, *, inputs_split: bool) -> P:
    """How a leaf of experts' linear layers is split; their width is the inputs of `down`, and the others' outputs."""
    names = [getattr(key, "name", getattr(key, "key", None)) for key in path]
    into, out = (place.width, None) if inputs_split else (None, place.width)
    if "bias" in names:
        return P(place.experts, out)
    match names[-1]:
        case "scale" | "salt" | "tokens" | "magnitude":
            return P()
        case "codes" | "absmax":
            return P(place.experts)
        case "a":
            return P(place.experts, into, None)
        case "b":
            return P(place.experts, None, out)
    return P(place.experts, into, out)


def gathered(place: Placement, tokens: Tree) -> Tree:
    """Tokens, on the leading axis, of all devices along the axis of experts."""
    if not place.gathers:
        return tokens
    return jax.tree.map(lambda leaf: lax.all_gather(leaf, place.experts, tiled=True), tokens)


def summed(place: Placement, y: jax.Array) -> jax.Array:
    """The sum over devices that have parts of the tokens' results, of each device's own tokens."""
    if place.gathers:
        y = lax.psum_scatter(y, place.experts, tiled=True)
    elif place.experts is not None:
        y = lax.psum(y, place.experts)
    return y if place.width is None else lax.psum(y, place.width)
