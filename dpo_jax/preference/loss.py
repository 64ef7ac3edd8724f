"""A training objective: the loss and the metrics of packed pairs under objectives, as a function of the weights.

Letters: M micro-batches, D shards, K scored tokens, P pairs, m numbers remembered from step to step.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dpo_jax.data.batch import Batch
from dpo_jax.model.decoder import DEFAULT_EXECUTION, Execution, Params, cast
from dpo_jax.model.experts import Routing, added, load_balance
from dpo_jax.model.kernels import rounded_gradients
from dpo_jax.model.spec import DecoderSpec
from dpo_jax.model.weights import Weights
from dpo_jax.objectives.metrics import Means, Values, means, merge, preference_metrics
from dpo_jax.objectives.mixture import START, Progress, counts_of, outcomes, start_constant, total
from dpo_jax.objectives.pairs import Pairs
from dpo_jax.objectives.rows import Kind
from dpo_jax.objectives.terms import Term, data_of, make_terms
from dpo_jax.preference.micro_batches import fold, micro_batch
from dpo_jax.preference.scoring import Dropout, Scores, Wanted, pairs_of, score, token_metrics
from dpo_jax.trees import Tree


@dataclasses.dataclass(frozen=True)
class TrainingObjective:
    """What is minimised, and how it is computed: everything static that a step, or an evaluation, needs."""

    spec: DecoderSpec
    terms: tuple[Term, ...] = dataclasses.field(default_factory=lambda: make_terms([{"name": "sigmoid"}]))
    compute_dtype: str = "float32"
    execution: Execution = DEFAULT_EXECUTION
    statistics: bool = True
    router_aux: float = 0.0
    """Weight of the load-balancing loss of the policy's experts; 0 leaves it out."""
    dropout: float = 0.0
    """Share of the inputs of the policy's adapter that a training step drops."""
    rounded_gradients: bool = False
    """Products that give a kernel's gradient are rounded to the dtype of computation before devices add them up."""

    @property
    def data(self) -> Kind:
        """What one entry of a step is."""
        return data_of(self.terms)

    @property
    def step_wide(self) -> bool:
        """Whether the loss of one pair depends on the step's others."""
        return any(term.row.scope == "step" for term in self.terms)

    @property
    def uses_reference(self) -> bool:
        """Whether any term compares with a reference."""
        return any(term.uses_reference for term in self.terms)

    @property
    def remembers(self) -> int:
        """Numbers that are carried from step to step."""
        return max(term.row.remembers for term in self.terms)

    @property
    def wanted(self) -> Wanted:
        """What the terms and the metrics need of each token."""
        return Wanted(
            statistics=self.statistics and not self.spec.scalar_head,
            alignment=any(term.weighting != "none" for term in self.terms),
            shared=any(term.desensitizes for term in self.terms),
            routing=self.balances,
        )

    @property
    def balances(self) -> bool:
        """Whether the loss has a part that spreads tokens over experts."""
        return self.router_aux > 0 and self.spec.experts is not None

    @property
    def start_constant(self) -> float | None:
        """The first loss where policy and reference are the same, if it is a constant."""
        return start_constant(self.terms)


class Seen(NamedTuple):
    """What one micro-batch, or all of a step, gives: what the objectives see, token statistics, and routing."""

    pairs: Pairs
    statistics: Means
    routing: Routing | None


def micro_pairs(
    objective: TrainingObjective,
    compute: Params,
    packed: Batch,
    reference: Params | None,
    *,
    quick: bool = False,
    dropout: Dropout | None = None,
) -> Seen:
    """What the objectives see of one micro-batch; no statistics with `quick`.

    The reference's log-probabilities come from its weights where it is live, else from the batch.
    """
    wanted = objective.wanted._replace(statistics=False) if quick else objective.wanted
    scores = score(objective.spec, compute, packed, execution=objective.execution, wanted=wanted, dropout=dropout)
    pairs = pairs_of(scores, _reference_tokens(objective, reference, packed), packed, wanted)
    return Seen(pairs, {} if quick else _token_means(objective, lax.stop_gradient(scores), packed), scores.routing)


def _reference_tokens(objective: TrainingObjective, reference: Params | None, packed: Batch) -> jax.Array:
    if reference is None:
        return packed.reference
    return score(objective.spec, lax.stop_gradient(reference), packed, execution=objective.execution).tokens


def _computing(
    objective: TrainingObjective, weights: Weights, reference: Params | None
) -> tuple[Weights, Params | None]:
    """Weights of the policy, and of a live reference that any term looks at, in the dtype of computation."""
    dtype = jnp.dtype(objective.compute_dtype)
    live = cast(reference, dtype) if reference is not None and objective.uses_reference else None
    narrow = dataclasses.replace(weights, trained=cast(weights.trained, dtype), frozen=cast(weights.frozen, dtype))
    return narrow, live


def _token_means(objective: TrainingObjective, scores: Scores, packed: Batch) -> Means:
    if not objective.wanted.statistics:
        return {}
    return token_metrics(scores, packed, chosen_only=objective.data in ("unpaired", "chosen"))


# ---------------------------------------------------------------------------------------------- whole steps


def loss_and_gradient(
    objective: TrainingObjective,
    weights: Weights,
    batch: Batch,
    reference: Params | None = None,
    progress: Progress = START,
    scale: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Values, Params, Float[Array, " m"] | None]:
    """Loss, metrics, float32 gradient and memory over the whole batch, summed micro-batch by micro-batch.

    The gradient is that of the trained weights, and has their structure. `scale` changes none of the results but by
    rounding: slopes in the dtype of computation are so many times larger, and the gradient is divided by it.

    The denominators are those of the whole batch, so neither micro-batches nor devices change the value. Where a pair's
    loss depends on the step's other pairs, all of them are scored first, and once more with a gradient; so too where
    experts are balanced over a step of several micro-batches.
    """
    compute, reference = _computing(objective, weights, reference)
    solve = _two_passes if objective.step_wide or (objective.balances and batch.real.shape[0] > 1) else _one_pass
    with rounded_gradients(objective.rounded_gradients):
        seen, gradient = solve(objective, compute, batch, reference, progress, scale)
    if scale is not None:
        gradient = jax.tree.map(lambda leaf: leaf / scale, gradient)
    loss, metrics, memory = measure(objective.terms, seen.pairs, progress)
    metrics = metrics | means(seen.statistics)
    if seen.routing is not None:
        balance = load_balance(*seen.routing)
        loss, metrics = loss + objective.router_aux * balance, metrics | {"aux_loss": balance}
    return loss, metrics, gradient, memory


def measure(
    terms: tuple[Term, ...], pairs: Pairs, progress: Progress
) -> tuple[Float[Array, ""], Values, Float[Array, " m"] | None]:
    """Loss, metrics and memory of all the pairs of a step, or of a held-out set."""
    found = outcomes(terms, pairs, progress)
    loss = total(terms, found, counts_of(pairs.real, pairs.chosen_length))
    memory = next((outcome.memory for outcome in found if outcome.memory is not None), None)
    return loss, preference_metrics(terms, pairs, found, progress), memory


def _one_pass(
    objective: TrainingObjective,
    compute: Weights,
    batch: Batch,
    reference: Params | None,
    progress: Progress,
    scale: Float[Array, ""] | None,
) -> tuple[Seen, Params]:
    """Every micro-batch with its gradient, which is multiplied by the scale."""
    counts = counts_of(batch.real, jnp.take_along_axis(batch.lengths, batch.chosen, axis=-1))

    def micro(trained, packed):
        params = dataclasses.replace(compute, trained=trained).params
        seen = micro_pairs(objective, params, packed, reference, dropout=_dropout(objective, progress))
        loss = total(objective.terms, outcomes(objective.terms, seen.pairs, progress), counts)
        return _scaled(loss + _balance(objective, seen.routing, seen.routing), scale), seen

    def visit(state, packed, number):
        sofar, gradient = state
        (_, seen), slope = jax.value_and_grad(micro, has_aux=True)(compute.trained, packed)
        return _absorbed(sofar, seen, number), _added(gradient, slope)

    return fold(visit, (_nothing(objective, batch), _no_gradient(compute.trained)), batch)


def _two_passes(
    objective: TrainingObjective,
    compute: Weights,
    batch: Batch,
    reference: Params | None,
    progress: Progress,
    scale: Float[Array, ""] | None,
) -> tuple[Seen, Params]:
    """The step's pairs, then the gradient along the slope of the step's loss at each of them, times the scale."""
    dropout = _dropout(objective, progress)
    seen = all_pairs(objective, compute.params, batch, reference, dropout)
    pairs = seen.pairs
    counts = counts_of(pairs.real, pairs.chosen_length)

    def loss(policy):
        moved = _with_policy(pairs, policy)
        return total(objective.terms, outcomes(objective.terms, moved, progress), counts)

    slopes = jax.grad(loss)(_policy_of(pairs))

    def micro(trained, packed, slope):
        params = dataclasses.replace(compute, trained=trained).params
        part = micro_pairs(objective, params, packed, reference, quick=True, dropout=dropout)
        products = jax.tree.map(lambda x, y: (x * y).sum(), _policy_of(part.pairs), slope)
        return _scaled(sum(jax.tree.leaves(products), _balance(objective, part.routing, seen.routing)), scale)

    def visit(gradient, packed, number):
        slope = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, number, 0, keepdims=False), slopes)
        return _added(gradient, jax.grad(micro)(compute.trained, packed, slope))

    return seen, fold(visit, _no_gradient(compute.trained), batch)


def _scaled(loss: Float[Array, ""], scale: Float[Array, ""] | None) -> Float[Array, ""]:
    return loss if scale is None else loss * scale


def _balance(objective: TrainingObjective, part: Routing | None, whole: Routing | None) -> jax.Array:
    """A micro-batch's part of the load-balancing loss of a whole step, weighted: linear in its routers' scores."""
    if part is None or whole is None:
        return jnp.zeros(())
    counts, total_weight = lax.stop_gradient((whole.counts, whole.total))
    return objective.router_aux * load_balance(counts, part.scores, total_weight)


def _dropout(objective: TrainingObjective, progress: Progress) -> Dropout | None:
    return None if progress.key is None or not objective.dropout else Dropout(progress.key, objective.dropout)


def all_pairs(
    objective: TrainingObjective,
    compute: Params,
    batch: Batch,
    reference: Params | None,
    dropout: Dropout | None = None,
) -> Seen:
    """Every pair of a batch, [M, D, P], the sums of its token statistics, and of its routing; no gradient."""

    def visit(sofar, packed, number):
        return _absorbed(sofar, micro_pairs(objective, compute, packed, reference, dropout=dropout), number)

    return fold(visit, _nothing(objective, batch), batch)


def evaluate_batch(
    objective: TrainingObjective, weights: Weights, batch: Batch, reference: Params | None = None
) -> tuple[Pairs, Means]:
    """Pairs and statistics from the weights as they are trained: what `heldout.measured` puts together."""
    compute, reference = _computing(objective, weights, reference)
    seen = all_pairs(objective, compute.params, batch, reference)
    return seen.pairs, seen.statistics


def _policy_of(pairs: Pairs) -> dict[str, Tree]:
    """What of the pairs carries a gradient."""
    shared, ranking = pairs.shared, pairs.ranking
    return {
        "sums": (pairs.policy_chosen, pairs.policy_rejected),
        "shared": None if shared is None else (shared.policy_chosen, shared.policy_rejected),
        "ranking": None if ranking is None else ranking.policy,
    }


def _with_policy(pairs: Pairs, policy: dict[str, Tree]) -> Pairs:
    """The pairs with these values in place of what carries a gradient."""
    chosen, rejected = policy["sums"]
    shared, ranking = pairs.shared, pairs.ranking
    if shared is not None:
        shared = shared._replace(policy_chosen=policy["shared"][0], policy_rejected=policy["shared"][1])
    if ranking is not None:
        ranking = ranking._replace(policy=policy["ranking"])
    return pairs._replace(policy_chosen=chosen, policy_rejected=rejected, shared=shared, ranking=ranking)


def _nothing(objective: TrainingObjective, batch: Batch) -> Seen:
    """No pairs yet in the shape of all of a batch's, and no token statistics or routing."""

    def first(batch):
        packed = micro_batch(batch, 0)
        completions, tokens = jnp.zeros(packed.ids.shape), jnp.zeros(packed.source.shape)
        scores = Scores(tokens, completions, completions, completions, completions, completions)
        return pairs_of(scores, packed.reference, packed, objective.wanted), _token_means(objective, scores, packed)

    pairs, statistics = jax.eval_shape(first, batch)
    depth = batch.real.shape[0]
    stack = jax.tree.map(lambda leaf: jnp.zeros((depth, *leaf.shape), leaf.dtype), pairs)
    experts, routing = objective.spec.experts, None
    if experts is not None and objective.balances:
        routing = Routing(jnp.zeros((experts.count,)), jnp.zeros((experts.count,)), jnp.zeros(()))
    return Seen(stack, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), statistics), routing)


def _absorbed(sofar: Seen, seen: Seen, number: Int[Array, ""]) -> Seen:
    """With one micro-batch more in its place, without its gradient."""
    pairs, statistics, routing = lax.stop_gradient((seen.pairs, seen.statistics, seen.routing))
    stack = jax.tree.map(lambda all, one: all.at[number].set(one), sofar.pairs, pairs)
    sums = None if routing is None or sofar.routing is None else added(sofar.routing, routing)
    return Seen(stack, merge(sofar.statistics, statistics), sums)


def _no_gradient(params: Params) -> Params:
    """Zeros in float32, also where parameters are bfloat16: sums over micro-batches need the digits."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)


def _added(gradient: Params, slope: Params) -> Params:
    return jax.tree.map(lambda total, leaf: total + leaf.astype(total.dtype), gradient, slope)
