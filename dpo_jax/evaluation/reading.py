"""What a model makes of whole texts: the state of the last token of each, and what its head says of that.

Letters: B rows, T slots, W width, V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dpo_jax import sharding
from dpo_jax.evaluation.generate import check_prompts, check_room, rounded
from dpo_jax.model.attention import Layout
from dpo_jax.model.decoder import Model, Params, head_logits, hidden, scalar_scores
from dpo_jax.model.spec import DecoderSpec

Rows = np.ndarray | jax.Array
Read = Callable[[Rows, Rows], Array]
"""`(tokens, lengths) -> something for each row`."""


def scores_of(
    model: Model, texts: Sequence[Sequence[int]], *, batch_size: int = 8, mesh: Mesh | None = None
) -> list[float]:
    """A reward model's score of each text, at its last token.

    Raises:
      UserError: a text has no tokens, some that the model does not know, or more than it knows positions for.
    """
    read = functools.partial(_scores, model.spec, model.params)
    return [float(score) for score in _by_batches(model.spec, texts, read, batch_size, mesh)]


def next_logits(
    model: Model, texts: Sequence[Sequence[int]], *, batch_size: int = 8, mesh: Mesh | None = None
) -> list[Float[np.ndarray, " V"]]:
    """The logits of what comes after each text, float32; raises as `scores_of`."""
    read = functools.partial(_logits, model.spec, model.params)
    return _by_batches(model.spec, texts, read, batch_size, mesh)


def _by_batches(
    spec: DecoderSpec, texts: Sequence[Sequence[int]], read: Read, batch_size: int, mesh: Mesh | None
) -> list[Any]:
    """What `read` says of each text. Texts of like length share a batch; sizes are rounded, so little is compiled."""
    check_prompts(spec, texts)
    check_room(texts, 0, spec.positions)
    shards = 1 if mesh is None else sharding.batch_shards(mesh)
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    found: dict[int, Any] = {}
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        rows = min(batch_size, 1 << (len(indices) - 1).bit_length())
        tokens = np.zeros((-(-rows // shards) * shards, rounded(max(len(texts[i]) for i in indices))), np.int32)
        lengths = np.ones(len(tokens), np.int32)
        for row, index in enumerate(indices):
            tokens[row, : len(texts[index])] = texts[index]
            lengths[row] = len(texts[index])
        found |= zip(indices, sharding.on_host(read(_split(tokens, mesh), _split(lengths, mesh))), strict=False)
    return [found[index] for index in range(len(texts))]


def _split(part: np.ndarray, mesh: Mesh | None) -> Rows:
    if mesh is None:
        return part
    return jax.make_array_from_callback(part.shape, sharding.rows(mesh), part.__getitem__)


def _last(
    spec: DecoderSpec, params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
) -> Float[Array, "B W"]:
    slots = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    there = slots < lengths[:, None]  # what fills a row up is of group 0, so that no text is longer for it
    layout = Layout(there.astype(jnp.int32), jnp.zeros_like(slots), jnp.where(there, slots, 0))
    states = hidden(spec, params, tokens, layout)
    return jnp.take_along_axis(states, lengths[:, None, None] - 1, axis=1)[:, 0]


@functools.partial(jax.jit, static_argnames="spec")
def _scores(spec, params, tokens, lengths):
    return scalar_scores(spec, params, _last(spec, params, jnp.asarray(tokens), jnp.asarray(lengths)))


@functools.partial(jax.jit, static_argnames="spec")
def _logits(spec, params, tokens, lengths):
    return head_logits(spec, params, _last(spec, params, jnp.asarray(tokens), jnp.asarray(lengths)))
