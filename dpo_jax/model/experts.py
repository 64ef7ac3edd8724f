"""Mixtures of experts: each token goes through the few MLPs that a router picks for it, and through no other.

Letters: B rows, T positions, D width, F width of an expert, E experts, K experts of a token, n tokens, N = n K pairs.

Pairs (token, expert) are sorted by expert, so that each expert's tokens stand in one run of rows, and three grouped
products (`grouped.py`) do the work of the K chosen experts; the results go back to the tokens in their old order:

    choice = [[1 0] [0 2]]     pair      0 1 2 3      expert of it   1 0 0 2
    sorted by expert           order     1 2 0 3      token of it    0 1 0 1      sizes  2 1 1
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dpo_jax.model import spec as specs
from dpo_jax.model.adapters import grouped_product, product
from dpo_jax.model.layers import ACTIVATIONS, Dense, MLPLayer, NormLayer, lookup, normal
from dpo_jax.model.remat import cheap, named


class Routing(NamedTuple):
    """Sums over tokens, each times the token's weight. Those of several layers or batches add up."""

    counts: Float[Array, " E"]
    """How often each expert was chosen; no gradient flows through it."""
    scores: Float[Array, " E"]
    """The probabilities that the router gave to each expert."""
    total: Float[Array, ""]
    """The weights."""


def added(one: Routing, other: Routing) -> Routing:
    """The sums over the tokens of both."""
    return Routing(one.counts + other.counts, one.scores + other.scores, one.total + other.total)


def load_balance(counts: Float[Array, " E"], scores: Float[Array, " E"], total: Float[Array, ""]) -> Float[Array, ""]:
    """`E sum_e (counts_e / total) (scores_e / total)`, the auxiliary loss of arXiv:2101.03961, equations 4 to 6.

    K where all experts are used alike, up to E where all tokens go to the same; 0 where no token has a weight. For
    several layers, add their sums first, as transformers does.
    """
    tokens = jnp.where(total > 0, total, 1.0)
    return counts.shape[0] * jnp.sum((counts / tokens) * (scores / tokens))


class Choice(NamedTuple):
    """What a router says of each token."""

    experts: Int[Array, "B T K"]
    shares: Float[Array, "B T K"]
    """What the output of each is multiplied by."""
    probabilities: Float[Array, "B T E"]
    """Of all experts; they sum to one."""


class Router(nnx.Module):
    """Scores of all experts for each token, in float32, and the best of them."""

    def __init__(self, spec: specs.Experts, width: int, *, rngs: nnx.Rngs):
        """Normal kernel; scales are one, bias and correction zero."""
        self.kernel = normal(rngs, width, spec.count)
        self.bias = nnx.Param(jnp.zeros((spec.count,))) if spec.router_bias else None
        self.correction = nnx.Param(jnp.zeros((spec.count,))) if spec.correction else None
        self.norm = NormLayer(spec.router_norm, width) if spec.router_norm else None
        self.channel_scale = nnx.Param(jnp.ones((width,))) if spec.router_norm else None
        self.expert_scale = nnx.Param(jnp.ones((spec.count,))) if spec.router_norm else None
        self.spec = spec

    def __call__(self, x: Float[Array, "B T D"]) -> Choice:
        """The experts of each token, the best first."""
        logits = self.logits(x.astype(jnp.float32))
        softmax = self.spec.scores == "softmax"
        scores = jax.nn.softmax(logits) if softmax else jax.nn.sigmoid(logits)
        probabilities = scores if softmax else scores / scores.sum(axis=-1, keepdims=True)
        experts = self.best(scores)
        return Choice(experts, self.shares(scores, experts), probabilities)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        """`x @ kernel + bias`, or `(norm(x) channel_scale / sqrt(D)) @ kernel`."""
        if self.norm is not None and self.channel_scale is not None:
            x = self.norm(x) * (_wide(self.channel_scale) * x.shape[-1] ** -0.5)[None, None, :]
        logits = product(x, _wide(self.kernel))
        return logits if self.bias is None else logits + _wide(self.bias)[None, None, :]

    def best(self, scores: Float[Array, "B T E"]) -> Int[Array, "B T K"]:
        """The experts with the highest corrected scores; of equals the first."""
        if self.correction is not None:
            scores = scores + lax.stop_gradient(_wide(self.correction))[None, None, :]
        if self.spec.groups > 1:
            scores = _within_groups(scores, self.spec.groups, self.spec.chosen_groups)
        return lax.top_k(scores, self.spec.chosen)[1]

    def shares(self, scores: Float[Array, "B T E"], experts: Int[Array, "B T K"]) -> Float[Array, "B T K"]:
        """The scores of the chosen experts; each divided by their sum, and scaled."""
        shares = jnp.take_along_axis(scores, experts, axis=-1)
        if self.spec.normalised:
            shares = shares / (shares.sum(axis=-1, keepdims=True) + 1e-20)
        if self.expert_scale is not None:
            shares = shares * _wide(self.expert_scale)[experts]
        return shares * self.spec.scaling


def _wide(param: nnx.Param) -> Array:
    return param.get_value().astype(jnp.float32)


def _within_groups(scores: Float[Array, "B T E"], groups: int, chosen: int) -> Float[Array, "B T E"]:
    """The scores of the groups whose best two scores have the highest sums; minus infinity for all other experts."""
    by_group = scores.reshape(*scores.shape[:2], groups, -1)
    group_scores = lax.top_k(by_group, 2)[0].sum(axis=-1)
    best = lax.top_k(group_scores, chosen)[1]
    kept = (best[..., None] == jnp.arange(groups)[None, None, None, :]).any(axis=2)
    return jnp.where(kept[..., None], by_group, -jnp.inf).reshape(scores.shape)


def routing_sums(choice: Choice, weights: Float[Array, "B T"]) -> Routing:
    """The sums that the auxiliary loss is made of."""
    weights = weights.astype(jnp.float32)
    experts = jnp.arange(choice.probabilities.shape[-1])[None, None, None, :]
    chosen = (choice.experts[..., None] == experts).sum(axis=2).astype(jnp.float32)
    return Routing(
        counts=jnp.einsum("bt,bte->e", weights, chosen),
        scores=jnp.einsum("bt,bte->e", weights, choice.probabilities),
        total=weights.sum(),
    )


class ExpertPairs(NamedTuple):
    """Pairs (token, expert), sorted by expert."""

    order: Int[Array, " N"]
    """Pair that stands in each row; pair p belongs to token p // K."""
    rows: Int[Array, "n K"]
    """Row in which each pair stands."""
    experts: Int[Array, " N"]
    sizes: Int[Array, " E"]


def sort_pairs(experts: Int[Array, "n K"], count: int) -> ExpertPairs:
    """The pairs, by expert and then by token."""
    flat = experts.reshape(-1)
    pair = jnp.arange(flat.shape[0], dtype=flat.dtype)
    by_expert, order = lax.sort_key_val(flat, pair)
    rows = lax.sort_key_val(order, pair)[1].reshape(experts.shape)
    bounds = jnp.searchsorted(by_expert, jnp.arange(count + 1, dtype=flat.dtype)).astype(flat.dtype)
    return ExpertPairs(order, rows, by_expert, jnp.diff(bounds))


def _rows(x: Array, index: Array) -> Array:
    return x.at[index].get(mode="promise_in_bounds")


# Each of the next two is the other's transpose, which JAX does not see: it would scatter, and a GPU adds up what is
# scattered in another order each time.


@jax.custom_vjp
def spread(x: Float[Array, "n D"], pairs: ExpertPairs) -> Float[Array, "N D"]:
    """The token of each row."""
    return _rows(x, pairs.order // pairs.rows.shape[1])


@jax.custom_vjp
def collect(y: Float[Array, "N D"], pairs: ExpertPairs) -> Float[Array, "n D"]:
    """The sum of each token's rows."""
    parts = (_rows(y, pairs.rows[:, k]).astype(jnp.float32) for k in range(pairs.rows.shape[1]))
    return functools.reduce(jnp.add, parts).astype(y.dtype)


spread.defvjp(lambda x, pairs: (spread(x, pairs), pairs), lambda pairs, dy: (collect(dy, pairs), None))
collect.defvjp(lambda y, pairs: (collect(y, pairs), pairs), lambda pairs, dx: (spread(dx, pairs), None))


class Linears(nnx.Module):
    """A linear layer for each expert; kernels are stored (expert, inputs, outputs)."""

    def __init__(self, count: int, inputs: int, outputs: int, *, bias: bool, rngs: nnx.Rngs):
        """Normal kernels, zero biases."""
        self.kernel = normal(rngs, count, inputs, outputs)
        self.bias = nnx.Param(jnp.zeros((count, outputs))) if bias else None

    def __call__(self, x: Float[Array, "N I"], pairs: ExpertPairs) -> Float[Array, "N O"]:
        """Each row through the layer of its expert."""
        y = named(grouped_product(x, self.kernel.get_value(), pairs.sizes), "experts")
        return y if self.bias is None else y + lookup(self.bias[...], pairs.experts)


class Mixture(nnx.Module):
    """The chosen experts' outputs, each times its share, and the output of the shared MLP where there is one."""

    def __init__(self, spec: specs.Experts, width: int, *, rngs: nnx.Rngs):
        """A fresh router and fresh experts."""
        self.router = Router(spec, width, rngs=rngs)
        self.gate = Linears(spec.count, width, spec.width, bias=spec.bias, rngs=rngs)
        self.up = Linears(spec.count, width, spec.width, bias=spec.bias, rngs=rngs)
        self.down = Linears(spec.count, spec.width, width, bias=spec.bias, rngs=rngs)
        self.shared = MLPLayer(spec.shared, width, rngs=rngs) if spec.shared else None
        self.shared_gate = Dense(width, 1, bias=False, rngs=rngs) if spec.shared_gate else None
        self.spec = spec

    def __call__(
        self,
        x: Float[Array, "B T D"],
        router_input: Float[Array, "B T D"] | None = None,
        weights: Float[Array, "B T"] | None = None,
        *,
        activations: NamedSharding | None = None,
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        """The mixture, and the router's sums over tokens where their weights are given.

        Args:
          x: what the experts see.
          router_input: what the router sees; None is x.
          weights: of each token in the sums.
          activations: how x is split. Over the axes of its first entry each device sorts its own tokens; without it,
            or where they do not divide B, tokens are sorted all together.
        """
        run = _per_device(_routed, x.shape[0], activations)
        y, choice = run((x, x if router_input is None else router_input), (self.router, self.gate, self.up, self.down))
        if self.shared is not None:
            shared = self.shared(x)
            y = y + (shared if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(x)) * shared)
        return y, None if weights is None else routing_sums(choice, weights)


def _routed(
    inputs: tuple[Float[Array, "B T D"], Float[Array, "B T D"]], layers: tuple[Router, Linears, Linears, Linears]
) -> tuple[Float[Array, "B T D"], Choice]:
    """Tokens through the experts that a router picks from its own input, and what it picked."""
    x, router_input = inputs
    router, gate, up, down = layers
    choice = router(router_input)
    pairs = sort_pairs(choice.experts.reshape(-1, choice.experts.shape[-1]), router.spec.count)
    rows = spread(x.reshape(-1, x.shape[-1]), pairs)
    unit = cheap(functools.partial(_unit, spec=router.spec))
    rows = down(unit(gate(rows, pairs), up(rows, pairs)), pairs)
    share = choice.shares.reshape(-1).at[pairs.order].get(mode="promise_in_bounds", unique_indices=True)
    return collect(rows * share.astype(x.dtype)[:, None], pairs).reshape(x.shape), choice


def _unit(gate: Float[Array, "N F"], up: Float[Array, "N F"], spec: specs.Experts) -> Float[Array, "N F"]:
    """`act(gate) up`, or gpt-oss's unit where there is a limit."""
    if spec.limit is None:
        return ACTIVATIONS[spec.activation](gate) * up
    gate = jnp.minimum(gate, spec.limit)
    up = jnp.clip(up, -spec.limit, spec.limit)
    return (up + 1) * gate * jax.nn.sigmoid(spec.slope * gate)


def _per_device(function: Callable, rows: int, activations: NamedSharding | None) -> Callable:
    """`function(arrays, layers)` on each device's own rows, or on all rows where they cannot be split.

    Without it the sort, and the router's top-k, would bring the tokens of all devices together. Layers come in whole
    over the axes that the rows are split over, and their gradients are summed; other axes stay with the compiler.
    """
    if activations is None or not len(activations.spec):
        return function
    axes = activations.spec[0] or ()
    axes = axes if isinstance(axes, tuple) else (axes,)
    parts = math.prod(activations.mesh.shape[axis] for axis in axes)
    if parts == 1 or rows % parts:
        return function
    return jax.shard_map(
        function,
        mesh=activations.mesh,
        in_specs=(P(axes), P()),
        out_specs=P(axes),
        axis_names=set(axes),
        check_vma=False,
    )
