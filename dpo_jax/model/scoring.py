"""Log-probabilities of completions from packed forests: the decoder, the head on scored tokens only, and sums.

Letters: D shards, R rows, T slots, K scored tokens, C completions, P pairs. `forest` is one micro-batch: any object
with the arrays of `data.batches.Batch` less their leading M axis.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dpo_jax.logprobs import TokenScores, linear_scores
from dpo_jax.losses import Pairs
from dpo_jax.metrics import Mean, Metrics
from dpo_jax.model.attention import Layout
from dpo_jax.model.decoder import DEFAULT_EXECUTION, Execution, Params, head_of, hidden
from dpo_jax.model.spec import DecoderSpec


class CompletionScores(NamedTuple):
    """Sums over each completion's scored tokens; the last three are 0 unless statistics were asked for."""

    logps: Float[Array, "D C"]
    lengths: Float[Array, "D C"]
    entropy: Float[Array, "D C"]
    mean_logit: Float[Array, "D C"]
    hits: Float[Array, "D C"]


def score(
    spec: DecoderSpec,
    params: Params,
    forest: Any,
    *,
    execution: Execution = DEFAULT_EXECUTION,
    statistics: bool = False,
) -> CompletionScores:
    """Score every completion of one micro-batch. Gradients flow through `logps` alone."""
    shards, rows, length = forest.tokens.shape
    flat = (shards * rows, length)
    layout = Layout(forest.group.reshape(flat), forest.branch.reshape(flat), forest.position.reshape(flat))
    states = hidden(spec, params, forest.tokens.reshape(flat), layout, execution)
    states = states.reshape(shards, rows * length, spec.width)
    sources = jnp.take_along_axis(states, forest.source[:, :, None], axis=1).reshape(-1, spec.width)
    targets = forest.target.reshape(-1)
    head = head_of(spec, params)
    scores = linear_scores(
        sources, head.rows, targets, bias=head.bias, softcap=spec.logit_softcap, statistics=statistics
    )
    return _summed(scores, targets, forest)


def _summed(scores: TokenScores, targets, forest: Any) -> CompletionScores:
    """Token scores added up by completion; padding lands one past the last completion and is cut off."""
    shards, completions = forest.ids.shape
    owner = (forest.completion + jnp.arange(shards)[:, None] * (completions + 1)).reshape(-1)

    def by_completion(values):
        sums = jax.ops.segment_sum(values, owner, shards * (completions + 1))
        return sums.reshape(shards, completions + 1)[:, :-1]

    hits = (scores.top1 == targets).astype(jnp.float32)
    logps, entropy, logit, hit = map(by_completion, (scores.logps, scores.entropy, scores.mean_logit, hits))
    return CompletionScores(logps, forest.lengths, entropy, logit, hit)


def pairs_of(scores: CompletionScores, reference: Float[Array, "D C"], forest: Any) -> Pairs:
    """What an objective sees of one micro-batch, [D, P]; the reference gets no gradient, padding gets zeros."""

    def pick(values, ids):
        return jnp.where(forest.real, jnp.take_along_axis(values, ids, axis=1), 0.0)

    reference = lax.stop_gradient(reference)
    return Pairs(
        policy_chosen=pick(scores.logps, forest.chosen),
        policy_rejected=pick(scores.logps, forest.rejected),
        reference_chosen=pick(reference, forest.chosen),
        reference_rejected=pick(reference, forest.rejected),
        chosen_length=pick(scores.lengths, forest.chosen),
        rejected_length=pick(scores.lengths, forest.rejected),
        margin=forest.margin,
    )


def token_metrics(scores: CompletionScores, forest: Any) -> Metrics:
    """TRL's token statistics: means over the completion tokens of the pairs, prompts left out.

    `entropy` in nats over chosen and rejected tokens; `logits/*` the mean over the vocabulary of each token's logits;
    `mean_token_accuracy` the share of chosen tokens that are the most probable one.
    """

    def total(values, ids):
        return jnp.where(forest.real, jnp.take_along_axis(values, ids, axis=1), 0.0).sum()

    chosen, rejected = total(scores.lengths, forest.chosen), total(scores.lengths, forest.rejected)
    entropy = total(scores.entropy, forest.chosen) + total(scores.entropy, forest.rejected)
    return {
        "entropy": Mean(entropy, chosen + rejected),
        "logits/chosen": Mean(total(scores.mean_logit, forest.chosen), chosen),
        "logits/rejected": Mean(total(scores.mean_logit, forest.rejected), rejected),
        "mean_token_accuracy": Mean(total(scores.hits, forest.chosen), chosen),
    }


def fold(visit, state: Any, batch: Any) -> Any:
    """Fold `visit(state, forest, number)` over the micro-batches of a batch that are in use.

    Their number is a value of the batch, not of its shape, so steps that need more or fewer share one compilation.
    """

    def body(number, state):
        forest = batch._replace(
            **{
                name: lax.dynamic_index_in_dim(leaf, number, 0, keepdims=False)
                for name, leaf in batch._asdict().items()
                if leaf.ndim
            }
        )
        return visit(state, forest, number)

    return lax.fori_loop(0, batch.micro_batches, body, state)


def score_batch(spec: DecoderSpec, params: Params, batch: Any, *, execution: Execution = DEFAULT_EXECUTION) -> Any:
    """Log-probabilities of all completions of a batch, float32 [M, D, C] in nats, without a gradient."""

    def visit(logps, forest, number):
        return logps.at[number].set(score(spec, params, forest, execution=execution).logps)

    return fold(visit, jnp.zeros(batch.ids.shape, jnp.float32), batch)
