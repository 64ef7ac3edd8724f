"""Log-probabilities of tokens and of completions, in nats and float32 whatever the model computes in.

Letters: B rows, T positions, V vocabulary, N scored tokens, D width. The scan behind the linear form is in
`fused.py`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from dpo_jax.errors import UserError, short
from dpo_jax.logprobs.fused import CHUNK, HeadShape, HeadSplit, ScanPlan, TokenScores, scored


@jax.jit
def token_logprobs(logits: Float[Array, "*B V"], targets: Integer[Array, "*B"]) -> Float[Array, "*B"]:
    """Log-probability of each target under its own logits: `logits[target] - logsumexp(logits)`; nan where the target
    is not in [0, V), as -100 is, with which PyTorch marks what is not scored.

    >>> round(float(token_logprobs(jnp.array([0.0, 0.0]), jnp.array(1))), 4)  # log(1/2)
    -0.6931
    """
    logits, targets = logits.astype(jnp.float32), _as_ids(targets)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return _of_vocabulary(picked - jax.nn.logsumexp(logits, axis=-1), targets, logits.shape[-1])


def _as_ids(tokens: Array) -> Array:
    """Token ids of a dtype that counts a vocabulary, which a byte does not where it has 256 entries."""
    return tokens.astype(jnp.int32) if tokens.dtype.itemsize < 4 else tokens


def _of_vocabulary(logps: Array, targets: Array, vocabulary: int) -> Array:
    """Log-probabilities, nan of targets that are no tokens."""
    return jnp.where((targets >= 0) & (targets < vocabulary), logps, jnp.nan)


def sequence_logprobs(
    logits: Float[Array, "*B T V"],
    tokens: Integer[Array, "*B T"],
    completion_mask: Bool[Array, "*B T"] | Integer[Array, "*B T"] | Float[Array, "*B T"],
    *,
    average: bool = False,
) -> Float[Array, "*B"]:
    """Summed log-probability of each row's completion, in nats.

    Position t predicts token t + 1, so a completion token in the first position has nothing that predicts it and is
    never scored. Logits whose target is not scored carry neither value nor gradient, not even when they are nan.

        tokens          = [ 5  6  7  8  0]
        completion_mask = [ 0  0  1  1  0]
        result          = log p(7 | 5 6) + log p(8 | 5 6 7)

    >>> uniform, tokens, mask = jnp.zeros((1, 5, 10)), jnp.array([[5, 6, 7, 8, 0]]), jnp.array([[0, 0, 1, 1, 0]])
    >>> round(float(sequence_logprobs(uniform, tokens, mask)[0]), 4)  # 2 log(1/10)
    -4.6052

    Args:
      logits: of any floating dtype; `logits[:, t]` is the prediction made after reading `tokens[:, :t + 1]`.
      tokens: ids of prompt, completion and padding.
      completion_mask: true where the token belongs to the completion.
      average: divide by the number of scored tokens (at least 1), as length-normalised objectives do; static under jit.

    Raises:
      UserError: tokens or completion_mask are not of the logits' rows and positions.
    """
    logits, tokens, completion_mask = (jnp.asarray(given) for given in (logits, tokens, completion_mask))
    if logits.ndim < 2:
        raise UserError(f"logits: has the shape {logits.shape}; give [T, V], or [B, T, V] of several rows")
    for name, given in (("tokens", tokens), ("completion_mask", completion_mask)):
        if given.shape != logits.shape[:-1]:
            shapes = f"{given.shape} beside logits of {logits.shape}"
            raise UserError(f"{name}: has the shape {shapes}; give one for each row and position, {logits.shape[:-1]}")
    return _sequence_logprobs(logits, tokens, completion_mask, average=average)


@functools.partial(jax.jit, static_argnames="average")
def _sequence_logprobs(logits: Array, tokens: Array, completion_mask: Array, *, average: bool) -> Array:
    scored = completion_mask[..., 1:].astype(bool)
    safe = jnp.where(scored[..., None], logits[..., :-1, :], jnp.zeros((), logits.dtype))
    sums = jnp.where(scored, token_logprobs(safe, tokens[..., 1:]), 0.0).sum(axis=-1)
    return sums / jnp.maximum(scored.sum(axis=-1), 1).astype(jnp.float32) if average else sums


def linear_logprobs(
    hidden: Float[Array, "N D"],
    head: Float[Array, "D V"],
    targets: Integer[Array, " N"],
    *,
    bias: Float[Array, " V"] | None = None,
    scale: float | Float[Array, ""] = 1.0,
    softcap: float | Float[Array, ""] | None = None,
    chunk: int = CHUNK,
    frozen: bool = False,
) -> Float[Array, " N"]:
    """Log-probability of each target under `softmax(cap(scale (hidden @ head + bias)))`, without ever holding [N, V].

    The vocabulary is scanned in chunks with a running maximum and sum, forwards and backwards; sums are float32. The
    largest temporary is [N, chunk]. `cap(z) = softcap * tanh(z / softcap)`, or `z` where softcap is None. For a head
    that is tied to an embedding of shape [V, D] pass `embedding.T`. It has gradients (`jax.grad`, `jax.hessian`), and
    no forward mode (`jax.jvp`). The numbers after `bias` are compiled in: another one is another program.

    >>> hidden, head, targets = jnp.ones((2, 4)), jnp.eye(4, 10), jnp.array([0, 9])
    >>> direct = token_logprobs(hidden @ head, targets)
    >>> bool(jnp.allclose(linear_logprobs(hidden, head, targets), direct))
    True

    Args:
      hidden: final hidden states of the positions that predict the targets.
      head: output projection, same dtype as hidden.
      targets: token ids in [0, V); of another the result is nan.
      bias: added to the logits.
      scale: what they are multiplied by then, as in Granite and Cohere.
      softcap: bound on the logits' magnitude, as in Gemma 2.
      chunk: vocabulary entries per chunk; need not divide V.
      frozen: head and bias are constants, whose gradient is zero; that of `hidden` then costs two products in all
        instead of four, and [N, D] in float32 is kept for it.

    Raises:
      UserError: scale, softcap or chunk is no number that is known when compiling, or chunk is less than 1.
    """
    scale, softcap = _known("scale", scale), None if softcap is None else _known("softcap", softcap)
    if _known("chunk", chunk) < 1:
        raise UserError(f"chunk: {chunk}: must be at least 1, such as {CHUNK}")
    how = {"scale": scale, "softcap": softcap, "chunk": int(chunk), "frozen": frozen}
    return _linear_logprobs(hidden, head, targets, bias, **how)


def _known(name: str, value: object) -> float:
    """A number that a program can be made for.

    Raises:
      UserError: it is none, or one that is only known when the program runs.
    """
    try:
        return float(value)  # pyright: ignore[reportArgumentType] (what it takes is what is asked)
    except (TypeError, ValueError):
        raise UserError(f"{name}: {short(str(value))}: must be a number that is known when compiling") from None


@functools.partial(jax.jit, static_argnames=("scale", "softcap", "chunk", "frozen"))
def _linear_logprobs(
    hidden: Array,
    head: Array,
    targets: Array,
    bias: Array | None,
    *,
    scale: float,
    softcap: float | None,
    chunk: int,
    frozen: bool,
) -> Array:
    targets = _as_ids(targets)
    return _of_vocabulary(
        linear_scores(
            hidden, head.T, targets, bias=bias, scale=scale, softcap=softcap, chunk=chunk, frozen=frozen
        ).logps,
        targets,
        head.shape[1],
    )


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
    frozen: bool = False,
    split: HeadSplit | None = None,
) -> TokenScores:
    """As `linear_logprobs` for a head stored by vocabulary row, with statistics of the distribution from the same scan.

    With `statistics`: the entropy in nats, the mean logit over the vocabulary and the most probable token (the lowest
    id among equals). With `collision`: the logarithm of the chance that two draws are the same token,
    `log sum_v p(v)^2`. What is not asked for is zeros that cost nothing.

    With `split` each device scans its own part of the vocabulary for its own tokens, and a few numbers per token are
    put together; of the width one chunk is gathered at a time. A vocabulary that the axis does not divide is filled up;
    a number of tokens or a width that its axes do not divide is whole on each device.
    """
    plan = ScanPlan(HeadShape(scale, softcap), chunk, statistics, collision, frozen, split)
    return scored(hidden, rows, targets, bias, plan)
