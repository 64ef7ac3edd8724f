"""Log-probabilities of completions from packed rows: the decoder, the head on scored tokens only, and sums.

Letters: D shards, R rows, T slots, K scored tokens, C completions, P pairs, W completions of a ranking. `packed` is one
micro-batch: a `Batch` without its leading M axis.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, UInt32

from dpo_jax.data.batch import Batch
from dpo_jax.logprobs.tokens import linear_scores
from dpo_jax.model.adapters import Noise, token_noise
from dpo_jax.model.attention import TILE, Bounds, Layout
from dpo_jax.model.backends.table import TILES
from dpo_jax.model.decoder import (
    DEFAULT_EXECUTION,
    Execution,
    Params,
    head_of,
    hidden_and_routing,
    scalar_scores,
)
from dpo_jax.model.experts import Routing
from dpo_jax.model.placement import picked
from dpo_jax.model.spec import DecoderSpec
from dpo_jax.objectives.metrics import Mean, Means
from dpo_jax.objectives.pairs import Pairs, Ranking, Sums
from dpo_jax.preference.micro_batches import fold


class Wanted(NamedTuple):
    """What is computed beside log-probabilities: token statistics, WPO's alignment, sums over the shared length, and
    how experts were chosen."""

    statistics: bool = False
    alignment: bool = False
    shared: bool = False
    routing: bool = False


class Dropout(NamedTuple):
    """What is drawn at random in a training step: a number of the seed and the step, and the share that is dropped."""

    key: UInt32[Array, ""]
    share: float


class Scores(NamedTuple):
    """What a model says of a micro-batch; what was not asked for is 0, or None.

    A reward model's score of a completion stands in `logps`, and its `tokens` are 0.
    """

    tokens: Float[Array, "D K"]
    logps: Float[Array, "D C"]
    entropy: Float[Array, "D C"]
    mean_logit: Float[Array, "D C"]
    hits: Float[Array, "D C"]
    alignment: Float[Array, "D C"]
    routing: Routing | None = None
    """Over all layers; each text counts, so a prompt that several completions share counts once for each."""


def score(
    spec: DecoderSpec,
    params: Params,
    packed: Batch,
    *,
    execution: Execution = DEFAULT_EXECUTION,
    wanted: Wanted = Wanted(),  # noqa: B008 (a constant)
    dropout: Dropout | None = None,
) -> Scores:
    """Score every completion of one micro-batch. Gradients flow through `tokens`, `logps` and routing scores.

    `dropout` is of the adapters in a training step; None drops nothing.
    """
    noise = None if dropout is None else _noise(packed, dropout)
    states, routing = _states(spec, params, packed, execution, noise, routed=wanted.routing)
    if spec.scalar_head:
        return _scalar(spec, params, picked(states, packed.last, execution.activations), packed)._replace(
            routing=routing
        )
    sources = picked(states, packed.source, execution.activations)
    targets = packed.target.reshape(-1)
    head = head_of(spec, params)
    found = linear_scores(
        sources,
        head.rows,
        targets,
        bias=head.bias,
        scale=spec.logit_scale,
        softcap=spec.logit_softcap,
        statistics=wanted.statistics,
        collision=wanted.alignment,
        frozen=execution.frozen_head,
        split=execution.head,
    )
    hits = (found.top1 == targets).astype(jnp.float32)
    alignment = lax.stop_gradient(found.logps) - found.collision
    by_token = (found.logps, found.entropy, found.mean_logit, hits, alignment)
    logps, entropy, logit, hit, aligned = (summed(values.reshape(packed.source.shape), packed) for values in by_token)
    return Scores(found.logps.reshape(packed.source.shape), logps, entropy, logit, hit, aligned, routing)


def _states(
    spec: DecoderSpec, params: Params, packed: Batch, execution: Execution, noise: Noise | None, *, routed: bool
) -> tuple[Float[Array, "B T W"], Routing | None]:
    """Final hidden states of every slot, and how experts were chosen if that is wanted."""
    shards, rows, length = packed.tokens.shape
    flat = (shards * rows, length)
    layout = Layout(packed.group.reshape(flat), packed.branch.reshape(flat), packed.position.reshape(flat))
    weights = _texts(layout) if routed else None
    execution = dataclasses.replace(execution, bounds=bounds_of(packed, execution.platform))
    return hidden_and_routing(spec, params, packed.tokens.reshape(flat), layout, weights, execution, noise)


def _noise(packed: Batch, dropout: Dropout) -> Noise | None:
    """Noise of every slot, which depends on whose token it is and not on where it stands: a completion's by its number
    in the data set, a prompt's by its prompt's.

    A slot belongs to the first completion that ends at it or behind it, or to the prompt of that one.
    """
    rows, length = packed.tokens.shape[1:]

    def of_shard(ids, prompts, last, branch):
        ends = jnp.where(ids < 0, rows * length, last)
        order = jnp.argsort(ends)
        place = jnp.searchsorted(ends[order], jnp.arange(rows * length))
        completion = order[jnp.minimum(place, len(order) - 1)]
        return jnp.where(branch.reshape(-1) > 0, 2 * ids[completion] + 1, 2 * prompts[completion])

    text = jax.vmap(of_shard)(packed.ids, packed.prompts, packed.last, packed.branch)
    return token_noise(dropout.key, text.reshape(-1, length), packed.position.reshape(-1, length), dropout.share)


def bounds_of(packed: Batch, platform: str) -> Bounds:
    """What the shapes of a micro-batch say of its rows: it has room for as many completions of each of its P pairs as
    the fullest prompt has."""
    completions = packed.ids.shape[-1]
    texts, branches = min(completions, packed.tokens.shape[-1]), -(-completions // packed.chosen.shape[-1])
    return Bounds(texts, branches, TILES.get(platform, TILE), platform)


def _texts(layout: Layout) -> Float[Array, "B T"]:
    """How many texts each slot is of: one for a completion's, one for each branch for a prompt's, none for padding."""

    def by_row(group, branch):
        return jax.ops.segment_max(branch, group, group.shape[0] + 1)[group]

    branches = jax.vmap(by_row)(layout.group, layout.branch)
    return jnp.where(layout.group == 0, 0, jnp.where(layout.branch > 0, 1, branches)).astype(jnp.float32)


def _scalar(spec: DecoderSpec, params: Params, last: Float[Array, "M W"], packed: Batch) -> Scores:
    """A reward model's score of each completion, from the state of its last token."""
    values = scalar_scores(spec, params, last).reshape(packed.last.shape)
    nothing = jnp.zeros(packed.ids.shape, jnp.float32)
    return Scores(jnp.zeros(packed.source.shape, jnp.float32), values, nothing, nothing, nothing, nothing)


def summed(values: Float[Array, "D K"], packed: Batch) -> Float[Array, "D C"]:
    """Values of scored tokens added up by completion; padding lands one past the last completion and is cut off."""
    shards, completions = packed.ids.shape
    owner = (packed.completion + jnp.arange(shards)[:, None] * (completions + 1)).reshape(-1)
    sums = jax.ops.segment_sum(values.reshape(-1), owner, shards * (completions + 1))
    return sums.reshape(shards, completions + 1)[:, :-1]


def shared_sums(tokens: Float[Array, "D K"], packed: Batch) -> tuple[Float[Array, "D P"], Float[Array, "D P"]]:
    """Sums over the first `min(chosen length, rejected length)` tokens of chosen and of rejected completions.

    A running sum that starts again at each completion, so that no large number is taken from another. A completion's
    tokens stand one after the other, and completions in the order of their numbers.
    """
    starts = jnp.concatenate(
        [jnp.ones_like(packed.completion[:, :1], bool), packed.completion[:, 1:] != packed.completion[:, :-1]], axis=1
    )
    running, _ = lax.associative_scan(_restarting, (tokens, starts), axis=1)
    lengths = packed.lengths.astype(jnp.int32)
    first = jnp.cumsum(lengths, axis=1) - lengths
    chosen, rejected = (jnp.take_along_axis(lengths, ids, axis=1) for ids in (packed.chosen, packed.rejected))
    shared = jnp.minimum(chosen, rejected)

    def upto(ids):
        place = jnp.take_along_axis(first, ids, axis=1) + jnp.maximum(shared, 1) - 1
        sums = jnp.take_along_axis(running, jnp.clip(place, 0, running.shape[1] - 1), axis=1)
        return jnp.where(packed.real & (shared > 0), sums, 0.0)

    return upto(packed.chosen), upto(packed.rejected)


def _restarting(left, right):
    (before, started), (value, starts) = left, right
    return jnp.where(starts, value, before + value), started | starts


def pairs_of(scores: Scores, reference: Float[Array, "D K"], packed: Batch, wanted: Wanted = Wanted()) -> Pairs:  # noqa: B008
    """What an objective sees of one micro-batch, [D, P]; the reference gets no gradient, padding gets zeros."""
    reference = lax.stop_gradient(reference)
    sums = summed(reference, packed)

    def pick(values, ids):
        return jnp.where(packed.real, jnp.take_along_axis(values, ids, axis=1), 0.0)

    def both(values):
        return pick(values, packed.chosen), pick(values, packed.rejected)

    lengths = both(packed.lengths)
    averaged = scores.alignment / jnp.maximum(packed.lengths, 1.0)
    return Pairs(
        *both(scores.logps),
        *both(sums),
        *lengths,
        margin=packed.margin,
        label=packed.label,
        weight=packed.weight,
        real=packed.real,
        noise=packed.noise,
        shared=Sums(*shared_sums(scores.tokens, packed), *shared_sums(reference, packed)) if wanted.shared else None,
        alignment=both(averaged) if wanted.alignment else None,
        ranking=_ranking(scores.logps, sums, packed) if packed.rank.shape[-1] else None,
    )


def _ranking(policy: Float[Array, "D C"], reference: Float[Array, "D C"], packed: Batch) -> Ranking:
    """All completions of each entry's prompt; what is no completion gets rank -1 and zeros."""
    shape, there = packed.rank.shape, packed.rank >= 0

    def pick(values):
        found = jnp.take_along_axis(values, packed.ranked.reshape(shape[0], -1), axis=1).reshape(shape)
        return jnp.where(there, found, 0.0)

    return Ranking(pick(policy), pick(reference), packed.rank)


def token_metrics(scores: Scores, packed: Batch, *, chosen_only: bool = False) -> Means:
    """TRL's token statistics: means over the completion tokens of the entries, prompts left out.

    `entropy` in nats over chosen and rejected tokens; `logits/*` the mean over the vocabulary of each token's logits;
    `mean_token_accuracy` the share of chosen tokens that are the most probable one. With `chosen_only` nothing is said
    of rejected completions (there are none, or they are there for another purpose).
    """

    def total(values, ids):
        return jnp.where(packed.real, jnp.take_along_axis(values, ids, axis=1), 0.0).sum()

    chosen = total(packed.lengths, packed.chosen)
    found = {
        "entropy": Mean(total(scores.entropy, packed.chosen), chosen),
        "logits/chosen": Mean(total(scores.mean_logit, packed.chosen), chosen),
        "mean_token_accuracy": Mean(total(scores.hits, packed.chosen), chosen),
    }
    if chosen_only:
        return found
    rejected = total(packed.lengths, packed.rejected)
    entropy = found["entropy"]
    both = Mean(entropy.total + total(scores.entropy, packed.rejected), chosen + rejected)
    return found | {"entropy": both, "logits/rejected": Mean(total(scores.mean_logit, packed.rejected), rejected)}


def score_batch(
    spec: DecoderSpec, params: Params, batch: Batch, *, execution: Execution = DEFAULT_EXECUTION
) -> Float32[Array, "M D K"]:
    """Log-probabilities of all scored tokens of a batch, float32 [M, D, K] in nats, without a gradient."""

    def visit(logps, packed, number):
        return logps.at[number].set(score(spec, params, packed, execution=execution).tokens)

    return fold(visit, jnp.zeros(batch.source.shape, jnp.float32), batch)
