"""How likely a model finds answers that are given to it.

Letters: B rows, T slots.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dpo_jax.evaluation.generate import check_prompts, check_room, rounded
from dpo_jax.logprobs.tokens import linear_scores
from dpo_jax.model.attention import causal
from dpo_jax.model.decoder import Params, head_of, hidden
from dpo_jax.model.spec import DecoderSpec


def answer_logprobs(
    spec: DecoderSpec,
    params: Params,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    batch_size: int = 4,
) -> list[float]:
    """Log-probability of each answer after its prompt, in nats: the sum over its tokens, at temperature 1.

    An empty answer has log-probability 0.
    """
    check_prompts(spec, prompts)
    check_room(prompts, max(map(len, answers), default=0), spec.positions)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]) + len(answers[index]))
    scores: dict[int, float] = {}
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        texts = [[*prompts[index], *answers[index]] for index in indices]
        tokens = np.zeros((len(indices), rounded(max(map(len, texts)))), np.int32)
        for row, text in enumerate(texts):
            tokens[row, : len(text)] = text
        first = np.asarray([len(prompts[index]) for index in indices], np.int32)
        length = np.asarray([len(answers[index]) for index in indices], np.int32)
        sums = _score(spec, params, tokens, first, length, slots=rounded(int(length.max())))
        scores |= zip(indices, map(float, np.asarray(sums)), strict=True)
    return [scores[index] for index in range(len(prompts))]


@functools.partial(jax.jit, static_argnames=("spec", "slots"))
def _score(
    spec: DecoderSpec,
    params: Params,
    tokens: Int[Array, "B T"],
    first: Int[Array, " B"],
    length: Int[Array, " B"],
    *,
    slots: int,
) -> Float[Array, " B"]:
    """Sums over the tokens `first .. first + length` of each row; the head runs on `slots` positions of it only."""
    tokens = jnp.asarray(tokens)
    states = hidden(spec, params, tokens, causal(*tokens.shape))
    offset = jnp.arange(slots, dtype=jnp.int32)[None, :]
    target = jnp.minimum(jnp.asarray(first)[:, None] + offset, tokens.shape[1] - 1)
    sources = jnp.take_along_axis(states, (target - 1)[:, :, None], axis=1)
    targets = jnp.take_along_axis(tokens, target, axis=1)
    head = head_of(spec, params)
    scores = linear_scores(
        sources.reshape(-1, spec.head_width),
        head.rows,
        targets.reshape(-1),
        bias=head.bias,
        scale=spec.logit_scale,
        softcap=spec.logit_softcap,
    )
    return jnp.where(offset < jnp.asarray(length)[:, None], scores.logps.reshape(target.shape), 0.0).sum(axis=1)
