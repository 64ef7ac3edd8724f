"""Bytes of one device by what they hold, from shapes and shardings: a prediction that needs no compiler."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dpo_jax import sharding, trees
from dpo_jax.data.batch import Batch
from dpo_jax.logprobs.tokens import CHUNK
from dpo_jax.model.attention import Layout
from dpo_jax.model.decoder import cast, hidden_and_routing, init_params
from dpo_jax.model.experts import ROOM
from dpo_jax.model.weights import Weights
from dpo_jax.preference.loss import TrainingObjective
from dpo_jax.preference.scoring import bounds_of
from dpo_jax.trees import Tree

LOGITS = 3
"""Arrays of a chunk's size, float32, that the head holds at a time: logits, their exponentials, their slope."""


def per_device(tree: Tree, shardings: Tree) -> int:
    """Bytes of a tree's leaves on one device."""
    sizes = jax.tree.map(
        lambda leaf, where: math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize, tree, shardings
    )
    return sum(jax.tree.leaves(sizes))


def state_items(state: dict[str, Tree], shardings: dict[str, Tree]) -> dict[str, int]:
    """Bytes of the state's parts: weights, the optimizer's moments, a reference that moves, and counters."""
    named = {"trained": "parameters", "optimizer": "optimizer", "reference": "reference"}
    found: dict[str, int] = {}
    for part, tree in state.items():
        name = named.get(part, "counters")
        found[name] = found.get(name, 0) + per_device(tree, shardings[part])
    return found


def step_items(
    objective: TrainingObjective, weights: Weights, packed: Batch, mesh: jax.sharding.Mesh, *, several: bool
) -> dict[str, int]:
    """Bytes that a step needs beside its state, at its fullest moment: in a layer's backward pass or in the head's.

    Args:
      objective: what is computed.
      weights: shapes of what is trained and what is not.
      packed: shapes of one micro-batch, all shards of it.
      mesh: whose shards they are.
      several: whether gradients of several micro-batches are added up.
    """
    dtype, trained = jnp.dtype(objective.compute_dtype), weights.trained
    params = jax.eval_shape(lambda weights: weights.params, weights)
    shardings, places_of_trained = (sharding.param_shardings(tree, mesh) for tree in (params, trained))
    narrow, narrow_trained = (jax.eval_shape(functools.partial(cast, dtype=dtype), tree) for tree in (params, trained))
    copied = {path for path, leaf in trees.paths(params).items() if leaf.dtype != trees.paths(narrow)[path].dtype}
    places, leaves = trees.paths(shardings), trees.paths(narrow)
    # Of one layer at a time: what is computed again of it, and slopes along all that it has.
    kept, whole = (activation_bytes(objective, packed, mesh, remat=remat) for remat in (None, "none"))
    copy = sum(per_device(leaves[path], places[path]) for path in copied)
    layer = (2 * whole - kept) // len(objective.spec.layers)
    head = 0 if objective.spec.scalar_head else _head(objective, packed, mesh)
    return {
        "weights in the dtype of computation": copy,
        "gradient": per_device(jax.eval_shape(functools.partial(cast, dtype=jnp.float32), trained), places_of_trained),
        "gradient of a micro-batch": per_device(narrow_trained, places_of_trained) if several else 0,
        "activations": kept,
        "a layer's backward pass": layer if layer > head else 0,
        "gathered weights": _gathered(objective, leaves, places, mesh),
        "moved tokens": _moved(objective, leaves, packed, mesh),
        "head": head if head >= layer else 0,
    }


def activation_bytes(
    objective: TrainingObjective, packed: Batch, mesh: jax.sharding.Mesh, *, remat: str | None = None
) -> int:
    """Bytes on one device that a micro-batch's forward pass keeps for its backward pass: JAX's residuals, less weights.

    `remat` stands in for the objective's own.
    """
    given = objective.execution
    bounds = bounds_of(packed, given.platform)
    execution = dataclasses.replace(given, activations=None, remat=remat or given.remat, bounds=bounds)
    params = jax.eval_shape(
        lambda: cast(init_params(objective.spec, jax.random.key(0)), jnp.dtype(objective.compute_dtype)),
    )
    rows = (math.prod(packed.tokens.shape[:-1]) // sharding.batch_shards(mesh), packed.tokens.shape[-1])

    def forward(weights, tokens, group, branch, position):
        view = Layout(group, branch, position)
        states = lambda weights: hidden_and_routing(objective.spec, weights, tokens, view, None, execution)[0]  # noqa: E731
        return jax.vjp(states, weights)[1]

    ids = jax.ShapeDtypeStruct(rows, jnp.int32)
    residuals = jax.tree.leaves(jax.eval_shape(forward, params, ids, ids, ids, ids))
    weights = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params)}
    tensor, context = mesh.shape["tensor"], mesh.shape["context"]
    room = ROOM if mesh.shape["expert"] > 1 else 1.0
    pairs = {math.prod(rows) * layer.experts.chosen for layer in objective.spec.layers if layer.experts}
    return sum(
        int(leaf.size * leaf.dtype.itemsize * (room if pairs & {*leaf.shape} else 1.0))
        // (tensor if _is_split(leaf, objective.spec.width, tensor) else 1)
        // context
        for leaf in residuals
        if (leaf.shape, leaf.dtype) not in weights
    )


def _is_split(leaf: jax.ShapeDtypeStruct, width: int, tensor: int) -> bool:
    """Whether a residual is inside a layer, where the mesh's tensor axis splits it, and not the layer's states."""
    return leaf.ndim >= 3 and leaf.shape[-1] not in (width, 1) and leaf.shape[-1] % tensor == 0


def _gathered(
    objective: TrainingObjective,
    leaves: dict[str, jax.ShapeDtypeStruct],
    places: dict[str, jax.sharding.NamedSharding],
    mesh: jax.sharding.Mesh,
) -> int:
    """The largest layer's weights, whole over the axes that share them, and its gradient before it is scattered."""
    if sharding.weight_shards(mesh) == 1:
        return 0
    axes = lambda path: {*jax.tree.leaves(tuple(places[path].spec))} - {*sharding.gathered_over(path)}  # noqa: E731
    return 2 * _largest_layer(leaves, lambda path: math.prod(mesh.shape[axis] for axis in axes(path)))


def _largest_layer(leaves: dict[str, jax.ShapeDtypeStruct], parts: Callable[[str], int]) -> int:
    """Bytes of the largest layer, of leaves that are split into so many parts; 0 parts is not to be counted."""
    layers: dict[str, int] = {}
    for path, leaf in leaves.items():
        if path.startswith("blocks/") and (split := parts(path)):
            stack = path.split("/")[1]
            layers[stack] = layers.get(stack, 0) + leaf.size * leaf.dtype.itemsize // leaf.shape[0] // split
    return max(layers.values(), default=0)


def _moved(
    objective: TrainingObjective, leaves: dict[str, jax.ShapeDtypeStruct], packed: Batch, mesh: jax.sharding.Mesh
) -> int:
    """Where experts lie on an axis of their own: tokens of all its devices, one for each expert of a token, and what
    the rare rounds of rows take and give, tokens and a layer's matrices, while two of them are in each other."""
    parts, experts = mesh.shape["expert"], [layer.experts for layer in objective.spec.layers if layer.experts]
    if parts == 1 or not experts:
        return 0
    itemsize = jnp.dtype(objective.compute_dtype).itemsize
    tokens = parts * packed.tokens.size // sharding.token_shards(mesh) * objective.spec.width * itemsize
    matrices = _largest_layer(leaves, lambda path: parts if "/experts/" in path else 0)
    return (max(one.chosen for one in experts) + 4) * tokens + 4 * matrices


def _head(objective: TrainingObjective, packed: Batch, mesh: jax.sharding.Mesh) -> int:
    """Chunks of logits, states of the scored tokens and the slope along them in float32, and a chunk of weights."""
    width, dtype = objective.spec.head_width, jnp.dtype(objective.compute_dtype)
    scored = packed.source.size // sharding.token_shards(mesh)
    chunk = min(CHUNK, objective.spec.vocab_size)
    states = scored * width * (2 * 4 + dtype.itemsize)
    return LOGITS * scored * chunk * 4 + states + chunk * width * (4 + dtype.itemsize)
