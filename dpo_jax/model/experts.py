"""Mixtures of experts: each token goes through the few MLPs that a router picks for it, and through no other.

Letters: B rows, T positions, D width, F width of an expert, E experts, K experts of a token, n tokens, N = n K pairs.

Pairs (token, expert) are sorted by expert, so that each expert's tokens stand in one run of rows, and three grouped
products (`grouped.py`) do the work of the K chosen experts; the results go back to the tokens in their old order:

    choice = [[1 0] [0 2]]     pair      0 1 2 3      expert of it   1 0 0 2
    sorted by expert           order     1 2 0 3      token of it    0 1 0 1      sizes  2 1 1

On several devices `expert_split.py` says which tokens and which experts each has.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from dpo_jax.model import spec as specs
from dpo_jax.model.adapters import grouped_product, product
from dpo_jax.model.expert_split import Placement, gathered, placement, split, summed
from dpo_jax.model.layers import ACTIVATIONS, Dense, MLPLayer, NormLayer, lookup, normal
from dpo_jax.model.quantised import QuantisedKernel
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
    real: Int[Array, ""] | None = None
    """How many rows are pairs of these experts, if not all: the first ones. The others are zero behind each layer."""


def sort_pairs(experts: Int[Array, "n K"], count: int) -> ExpertPairs:
    """The pairs, by expert and then by token; those of expert `count`, which is none of ours, are last."""
    flat = experts.reshape(-1)
    pair = jnp.arange(flat.shape[0], dtype=flat.dtype)
    by_expert, order = lax.sort_key_val(flat, pair)
    rows = lax.sort_key_val(order, pair)[1].reshape(experts.shape)
    bounds = jnp.searchsorted(by_expert, jnp.arange(count + 1, dtype=flat.dtype)).astype(flat.dtype)
    return ExpertPairs(order, rows, by_expert, jnp.diff(bounds))


def some_pairs(pairs: ExpertPairs, start: int | Array, size: int) -> ExpertPairs:
    """Those of the rows from `start` on, `size` of them; none where that is beyond the last."""
    order, experts = (jnp.pad(leaf, (0, size)) for leaf in (pairs.order, pairs.experts))
    order, experts = (lax.dynamic_slice_in_dim(leaf, start, size) for leaf in (order, experts))
    ends = jnp.clip(jnp.cumsum(pairs.sizes) - start, 0, size)
    sizes = jnp.diff(ends, prepend=jnp.zeros((1,), ends.dtype))
    return ExpertPairs(order, pairs.rows - start, jnp.minimum(experts, sizes.shape[0] - 1), sizes, ends[-1])


def _rows(x: Array, index: Array) -> Array:
    return x.at[index].get(mode="promise_in_bounds")


# Each of the next two is the other's transpose, which JAX does not see: it would scatter, and a GPU adds up what is
# scattered in another order each time.


@jax.custom_vjp
def spread(x: Float[Array, "*n"], pairs: ExpertPairs) -> Float[Array, "*N"]:
    """The token of each row, of what tokens have on the first axis."""
    return _rows(x, pairs.order // pairs.rows.shape[1])


@jax.custom_vjp
def collect(y: Float[Array, "*N"], pairs: ExpertPairs) -> Float[Array, "*n"]:
    """The sum of each token's rows, of what rows have on the first axis."""
    parts = (_of_token(y, pairs.rows[:, k], pairs.real).astype(jnp.float32) for k in range(pairs.rows.shape[1]))
    return functools.reduce(jnp.add, parts).astype(y.dtype)


def _of_token(y: Array, rows: Int[Array, " n"], real: Array | None) -> Array:
    if real is None:
        return _rows(y, rows)
    here = (rows >= 0) & (rows < real)
    return jnp.where(here.reshape(-1, *(1,) * (y.ndim - 1)), _rows(y, jnp.where(here, rows, 0)), 0)


spread.defvjp(lambda x, pairs: (spread(x, pairs), pairs), lambda pairs, dy: (collect(dy, pairs), None))
collect.defvjp(lambda y, pairs: (collect(y, pairs), pairs), lambda pairs, dx: (spread(dx, pairs), None))


class Linears(nnx.Module):
    """A linear layer for each expert; kernels are stored (expert, inputs, outputs)."""

    def __init__(self, count: int, inputs: int, outputs: int, *, bias: bool, rngs: nnx.Rngs):
        """Normal kernels, zero biases."""
        self.kernel = normal(rngs, count, inputs, outputs)
        self.bias = nnx.Param(jnp.zeros((count, outputs))) if bias else None

    def __call__(self, x: Float[Array, "N I"], pairs: ExpertPairs, biased: Array | None = None) -> Float[Array, "N O"]:
        """Each row through the layer of its expert; `biased` is whether the bias is added, None is always."""
        y = named(grouped_product(x, self.kernel.get_value(), pairs.sizes), "experts")
        if self.bias is not None:
            bias = lookup(self.bias[...], pairs.experts)
            y = y + (bias if biased is None else jnp.where(biased, bias, 0))
        return y if pairs.real is None else jnp.where((jnp.arange(y.shape[0]) < pairs.real)[:, None], y, 0)


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
          activations: how x is split, and on which mesh; None is one device.
        """
        layers = (self.router, self.gate, self.up, self.down)
        place = placement(activations, x.shape, self.spec, quantised=_any_quantised(layers))
        run = split(functools.partial(_routed, place), place, layers)
        y, choice = run((x, x if router_input is None else router_input), layers)
        if self.shared is not None:
            shared = self.shared(x)
            y = y + (shared if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(x)) * shared)
        return y, None if weights is None else routing_sums(choice, weights)


def _any_quantised(layers: object) -> bool:
    kernels = jax.tree.leaves(layers, is_leaf=lambda leaf: isinstance(leaf, QuantisedKernel))
    return any(isinstance(leaf, QuantisedKernel) for leaf in kernels)


Layers = tuple[Router, Linears, Linears, Linears]


def _routed(
    place: Placement, inputs: tuple[Float[Array, "B T D"], Float[Array, "B T D"]], layers: Layers
) -> tuple[Float[Array, "B T D"], Choice]:
    """Tokens through the experts that a router picks from its own input, and what it picked."""
    (x, router_input), (router, *linears) = inputs, layers
    choice = router(router_input)
    tokens = RoutedTokens(
        *(leaf.reshape(-1, leaf.shape[-1]) for leaf in (x, choice.experts, choice.shares.astype(x.dtype)))
    )
    run = functools.partial(_through, linears=linears, spec=router.spec, place=place)
    if place.experts is None:
        y = run(tokens, sort_pairs(tokens.experts, router.spec.count))
    else:
        y = _through_own(run, gathered(place, tokens), place, router.spec.count)
    return summed(place, y).reshape(x.shape), choice


class RoutedTokens(NamedTuple):
    """Tokens, and what a router says of each."""

    x: Float[Array, "n D"]
    experts: Int[Array, "n K"]
    shares: Float[Array, "n K"]


def _through(
    tokens: RoutedTokens, pairs: ExpertPairs, *, linears: Sequence[Linears], spec: specs.Experts, place: Placement
) -> Float[Array, "n D"]:
    """What the experts of some pairs give their tokens."""
    gate, up, down = linears
    rows = spread(tokens.x, pairs)
    unit = cheap(functools.partial(_unit, spec=spec))
    biased = None if place.width is None else lax.axis_index(place.width) == 0
    rows = down(unit(gate(rows, pairs), up(rows, pairs)), pairs, biased)
    share = spread(tokens.shares.reshape(-1), pairs._replace(rows=pairs.rows.reshape(-1, 1)))
    return collect(rows * share[:, None], pairs)


ROOM = 1.25
"""Rows for the pairs of a device's own experts, as a multiple of what they are where all experts are used alike."""
LESS = 8
"""How many times smaller further rounds are: they are rare, and memory is set aside for them all the same."""
RARE = "rare_rounds"
"""Name of what is done in these, by which a program's text tells them."""


def _through_own(run: Callable[..., Array], tokens: RoutedTokens, place: Placement, count: int) -> Float[Array, "n D"]:
    """What this device's experts give the tokens of all: in one round of rows, and more where they are used more.

    Rounds beyond the first are rare, so their gradient keeps nothing and computes all again.
    """
    own, total = count // place.parts, tokens.experts.size
    number = tokens.experts - lax.axis_index(place.experts) * own
    pairs = sort_pairs(jnp.where((number >= 0) & (number < own), number, own), own)
    size = min(total, -(-math.ceil(ROOM * total / place.parts) // ROUND) * ROUND)

    less = min(size, -(-size // (LESS * ROUND)) * ROUND)

    def further(tokens: RoutedTokens) -> Array:
        def one(y: Array, start: Array) -> tuple[Array, None]:
            there = start < pairs.sizes.sum()
            return y + lax.cond(there, lambda: run(tokens, some_pairs(pairs, start, less)), lambda: zero), None

        starts = jnp.arange(size, total, less, dtype=pairs.order.dtype)
        return lax.scan(jax.checkpoint(one), zero, starts)[0]

    zero = jnp.zeros_like(tokens.x)
    y = run(tokens, some_pairs(pairs, 0, size))
    if size == total:
        return y
    with jax.named_scope(RARE):
        return y + lax.cond(pairs.sizes.sum() > size, jax.checkpoint(further), lambda tokens: zero, tokens)


ROUND = 128
"""Rows of a round are a multiple of this."""


def _unit(gate: Float[Array, "N F"], up: Float[Array, "N F"], spec: specs.Experts) -> Float[Array, "N F"]:
    """`act(gate) up`, or gpt-oss's unit where there is a limit."""
    if spec.limit is None:
        return ACTIVATIONS[spec.activation](gate) * up
    gate = jnp.minimum(gate, spec.limit)
    up = jnp.clip(up, -spec.limit, spec.limit)
    return (up + 1) * gate * jax.nn.sigmoid(spec.slope * gate)
