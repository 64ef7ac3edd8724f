"""Log-probabilities of tokens and of completions, in nats and float32 whatever the model computes in.

Letters: B rows, T positions, V vocabulary, N scored tokens, D width, C tokens of the vocabulary in a chunk.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

CHUNK = 4096
"""Tokens of the vocabulary whose logits are held at a time by the linear form."""


class TokenScores(NamedTuple):
    """What the head says about each scored token; only `logps` carries a gradient."""

    logps: Float[Array, " N"]
    entropy: Float[Array, " N"]
    mean_logit: Float[Array, " N"]
    top1: Int[Array, " N"]
    collision: Float[Array, " N"]


@jax.jit
def token_logprobs(logits: Float[Array, "*B V"], targets: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """Log-probability of each target under its own logits: `logits[target] - logsumexp(logits)`."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


@functools.partial(jax.jit, static_argnames="average")
def sequence_logprobs(
    logits: Float[Array, "B T V"],
    tokens: Int[Array, "B T"],
    completion_mask: Bool[Array, "B T"] | Int[Array, "B T"] | Float[Array, "B T"],
    *,
    average: bool = False,
) -> Float[Array, " B"]:
    """Summed log-probability of each row's completion, in nats.

    Position t predicts token t + 1, so a completion token in the first position has nothing that predicts it and is
    never scored. Logits whose target is not scored carry neither value nor gradient, not even when they are nan.

        tokens          = [ 5  6  7  8  0]
        completion_mask = [ 0  0  1  1  0]
        result          = log p(7 | 5 6) + log p(8 | 5 6 7)

    Args:
      logits: of any floating dtype; `logits[:, t]` is the prediction made after reading `tokens[:, :t + 1]`.
      tokens: ids of prompt, completion and padding.
      completion_mask: true where the token belongs to the completion.
      average: divide by the number of scored tokens (at least 1), as length-normalised objectives do.
    """
    scored = completion_mask[:, 1:].astype(bool)
    safe = jnp.where(scored[..., None], logits[:, :-1], jnp.zeros((), logits.dtype))
    sums = jnp.where(scored, token_logprobs(safe, tokens[:, 1:]), 0.0).sum(axis=-1)
    return sums / jnp.maximum(scored.sum(axis=-1), 1).astype(jnp.float32) if average else sums


@functools.partial(jax.jit, static_argnames=("scale", "softcap", "chunk"))
def linear_logprobs(
    hidden: Float[Array, "N D"],
    head: Float[Array, "D V"],
    targets: Int[Array, " N"],
    *,
    bias: Float[Array, " V"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int = CHUNK,
) -> Float[Array, " N"]:
    """Log-probability of each target under `softmax(cap(scale (hidden @ head + bias)))`, without ever holding [N, V].

    The vocabulary is scanned in chunks with a running maximum and sum, forwards and backwards; sums are float32. The
    largest temporary is [N, chunk]. `cap(z) = softcap * tanh(z / softcap)`, or `z` where softcap is None. For a head
    that is tied to an embedding of shape [V, D] pass `embedding.T`.

    Args:
      hidden: final hidden states of the positions that predict the targets.
      head: output projection, same dtype as hidden.
      targets: token ids in [0, V).
      bias: added to the logits.
      scale: what they are multiplied by then, as in Granite and Cohere.
      softcap: bound on the logits' magnitude, as in Gemma 2.
      chunk: vocabulary entries per chunk; need not divide V.
    """
    return linear_scores(hidden, head.T, targets, bias=bias, scale=scale, softcap=softcap, chunk=chunk).logps


def linear_scores(  # noqa: PLR0913 (each says how logits are made, or what is wanted of them)
    hidden: Float[Array, "N D"],
    rows: Float[Array, "V D"],
    targets: Int[Array, " N"],
    *,
    bias: Float[Array, " V"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int = CHUNK,
    statistics: bool = False,
    collision: bool = False,
) -> TokenScores:
    """As `linear_logprobs` for a head stored by vocabulary row, with statistics of the distribution from the same scan.

    With `statistics`: the entropy in nats, the mean logit over the vocabulary and the most probable token (the lowest
    id among equals). With `collision`: the logarithm of the chance that two draws are the same token,
    `log sum_v p(v)^2`. What is not asked for is zeros that cost nothing.
    """
    scores: Any = _scored(hidden, rows, targets, bias, _Shape(scale, softcap), chunk, (statistics, collision))
    return scores


class _Shape(NamedTuple):
    """What is done to logits before the softmax."""

    scale: float
    softcap: float | None

    def of(self, logits: Float[Array, "N C"]) -> Float[Array, "N C"]:
        """Logits scaled and bounded."""
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)

    def back(self, logits: Float[Array, "N C"], slope: Float[Array, "N C"]) -> Float[Array, "N C"]:
        """Slope along what `of` was given, from the slope along what it gave, `logits`."""
        slope = slope if self.softcap is None else slope * (1.0 - jnp.square(logits / self.softcap))
        return slope if self.scale == 1.0 else slope * self.scale


class _Running(NamedTuple):
    """State of the scan over the vocabulary, one value per scored token."""

    top: Float[Array, " N"]
    total: Float[Array, " N"]
    picked: Float[Array, " N"]
    weighted: Float[Array, " N"]
    summed: Float[Array, " N"]
    best: Int[Array, " N"]
    squared: Float[Array, " N"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _scored(hidden, rows, targets, bias, shape, chunk, wanted) -> TokenScores:
    return _scored_forward(hidden, rows, targets, bias, shape, chunk, wanted)[0]


def _scored_forward(hidden, rows, targets, bias, shape, chunk, wanted):
    statistics, collision = wanted

    def visit(state: _Running, start, size):
        logits = _chunk_logits(hidden, rows, bias, shape, start, size)
        return _absorb(state, logits, targets - start, start, wanted)

    n = hidden.shape[0]
    zeros = jnp.zeros((n,), jnp.float32)
    lowest, token = jnp.full((n,), -jnp.inf, jnp.float32), jnp.zeros((n,), jnp.int32)
    first = _Running(lowest, zeros, zeros, zeros, zeros, token, zeros)
    state = _over_chunks(visit, first, rows.shape[0], chunk)
    normaliser = state.top + jnp.log(state.total)
    scores = TokenScores(
        logps=state.picked - normaliser,
        entropy=normaliser - state.weighted / state.total if statistics else zeros,
        mean_logit=state.summed / rows.shape[0],
        top1=state.best,
        collision=jnp.log(state.squared) + 2.0 * (state.top - normaliser) if collision else zeros,
    )
    return scores, (hidden, rows, targets, bias, normaliser)


def _absorb(state: _Running, logits: Float[Array, "N C"], local: Int[Array, " N"], start, wanted) -> _Running:
    """Take one chunk of logits into the running sums; `local` is each target's place in this chunk, maybe outside."""
    statistics, collision = wanted
    size = logits.shape[1]
    peak = logits.max(axis=-1)
    top = jnp.maximum(state.top, peak)
    weights = jnp.exp(logits - top[:, None])
    shrink = jnp.exp(state.top - top)
    inside = (local >= 0) & (local < size)
    found = jnp.take_along_axis(logits, jnp.clip(local, 0, size - 1)[:, None], axis=-1)[:, 0]
    state = state._replace(
        total=state.total * shrink + weights.sum(axis=-1), picked=state.picked + jnp.where(inside, found, 0.0)
    )
    if statistics:
        place = start + jnp.argmax(logits, axis=-1).astype(jnp.int32)
        state = state._replace(
            weighted=state.weighted * shrink + (weights * logits).sum(axis=-1),
            summed=state.summed + logits.sum(axis=-1),
            best=jnp.where(peak > state.top, place, state.best),
        )
    if collision:
        squared = state.squared * jnp.square(shrink) + jnp.square(weights).sum(axis=-1)
        state = state._replace(squared=squared)
    return state._replace(top=top)


def _scored_backward(shape, chunk, wanted, residuals, cotangent):
    hidden, rows, targets, bias, normaliser = residuals
    slope = cotangent.logps[:, None]

    def visit(dhidden, start, size):
        logits = _chunk_logits(hidden, rows, bias, shape, start, size)
        hit = (targets - start)[:, None] == jnp.arange(size)[None, :]
        dlogits = (hit.astype(jnp.float32) - jnp.exp(logits - normaliser[:, None])) * slope
        dlogits = shape.back(logits, dlogits)
        narrow = dlogits.astype(hidden.dtype)
        part = lax.dynamic_slice_in_dim(rows, start, size)
        dhidden = dhidden + _dot(narrow, part, 1, 0)
        return dhidden, (_dot(narrow, hidden, 0, 0).astype(rows.dtype), dlogits.sum(axis=0))

    dhidden, (drows, dbias) = _over_chunks_collecting(visit, jnp.zeros(hidden.shape, jnp.float32), rows.shape[0], chunk)
    return dhidden.astype(hidden.dtype), drows, None, None if bias is None else dbias.astype(bias.dtype)


_scored.defvjp(_scored_forward, _scored_backward)


def _chunk_logits(hidden, rows, bias, shape, start, size) -> Float[Array, "N C"]:
    """Logits of `size` vocabulary entries from `start`, in float32."""
    logits = _dot(hidden, lax.dynamic_slice_in_dim(rows, start, size), 1, 1)
    if bias is not None:
        logits = logits + lax.dynamic_slice_in_dim(bias, start, size)[None, :].astype(jnp.float32)
    return shape.of(logits)


def _dot(a, b, a_axis: int, b_axis: int):
    """Matrix product over the given axes with float32 sums."""
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _over_chunks(visit, state, size: int, chunk: int):
    """Fold `visit(state, start, size)` over [0, size) in whole chunks, then over what is left."""
    whole = size // chunk
    if whole:
        state, _ = lax.scan(lambda s, i: (visit(s, i * chunk, chunk), None), state, jnp.arange(whole, dtype=jnp.int32))
    return visit(state, jnp.int32(whole * chunk), size - whole * chunk) if size % chunk else state


def _over_chunks_collecting(visit, state, size: int, chunk: int):
    """As `_over_chunks` for a visit that also returns arrays by vocabulary entry; these come back joined."""
    whole = size // chunk
    parts = []
    if whole:
        state, rows = lax.scan(lambda s, i: visit(s, i * chunk, chunk), state, jnp.arange(whole, dtype=jnp.int32))
        parts.append(jax.tree.map(lambda x: x.reshape(whole * chunk, *x.shape[2:]), rows))
    if size % chunk:
        state, rows = visit(state, jnp.int32(whole * chunk), size - whole * chunk)
        parts.append(rows)
    return state, parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
