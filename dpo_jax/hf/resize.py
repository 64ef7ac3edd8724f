"""More rows for an embedding: for tokens that were added to a tokenizer after its model was trained.

A new row is the mean of the old ones, in the embedding and in a head of its own, and so is its bias: the new token is
as likely as a token that nobody knows anything of. Rows are only ever added.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from dpo_jax import trees
from dpo_jax.errors import UserError
from dpo_jax.hf.configs import is_wrapper, read_spec
from dpo_jax.hf.mapping import Claims, TensorEntry
from dpo_jax.hf.tensors import TensorInfo
from dpo_jax.model.decoder import abstract_params
from dpo_jax.model.spec import DecoderSpec

MOST_GROWTH = 2
"""Times as many rows as before; a tokenizer of more tokens is another model's."""


def with_rows(spec: DecoderSpec, folder: Path, rows: int | None) -> DecoderSpec:
    """The spec of a folder's model with at least so many rows; the spec itself where it has them, or for None.

    Raises:
      UserError: the folder's embedding cannot be given more rows.
    """
    if rows is None or rows <= spec.vocab_size:
        return spec
    reasons = {
        "its decoder is a part of a larger model, whose config names its tokens by number": is_wrapper(folder),
        "it has a second table of tokens, one for the inputs of its layers": spec.inputs_vocab > 0,
        f"{rows} tokens are more than {MOST_GROWTH} for each of its {spec.vocab_size} rows, so the tokenizer is "
        "another model's": rows > MOST_GROWTH * spec.vocab_size,
    }
    why = next((why for why, applies in reasons.items() if applies), None)
    if why is not None:
        raise UserError(f"model.resize_embedding: {folder} cannot be resized: {why}; leave the setting out")
    return dataclasses.replace(spec, vocab_size=rows)


def as_stored(spec: DecoderSpec, folder: Path) -> DecoderSpec:
    """The spec with as many rows as the folder's tensors have, should it have more."""
    rows = read_spec(folder).vocab_size
    return dataclasses.replace(spec, vocab_size=rows) if rows < spec.vocab_size else spec


def grown_leaves(stored: DecoderSpec, spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Shape by path of the leaves that have more rows in `spec` than are stored."""
    if stored == spec:
        return {}
    before, after = (trees.paths(abstract_params(one)) for one in (stored, spec))
    return {leaf: value.shape for leaf, value in after.items() if value.shape != before[leaf].shape}


def grown(leaf: jax.Array, rows: int, sharding: Sharding | None) -> jax.Array:
    """A leaf [V, ...] with so many rows; each new one is the mean of the old ones, taken in float32."""

    def grow(old: jax.Array) -> jax.Array:
        mean = jnp.mean(old.astype(jnp.float32), axis=0, keepdims=True).astype(old.dtype)
        return jnp.concatenate([old, jnp.broadcast_to(mean, (rows - old.shape[0], *old.shape[1:]))])

    return jax.jit(grow, out_shardings=sharding)(leaf)


def whole_rows(sharding: Sharding | None) -> Sharding | None:
    """The sharding with its first axis whole, which the number of old rows need not divide."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:]), memory_kind=sharding.memory_kind)


def grown_claims(
    claims: Claims, infos: Mapping[str, TensorInfo], leaves: Mapping[str, tuple[int, ...]]
) -> tuple[Claims, dict[str, TensorInfo]]:
    """What a folder of the grown model holds, from what one of the stored model does."""

    def entry_of(entry: TensorEntry) -> TensorEntry:
        parts = (part._replace(shape=leaves.get(part.leaf, part.shape)) for part in entry.parts)
        return entry._replace(parts=tuple(parts))

    entries, copies = ({name: entry_of(entry) for name, entry in table.items()} for table in claims[:2])
    shapes = {name: entry.shape for name, entry in {**entries, **copies}.items()}
    return Claims(entries, copies, claims.carried), {
        name: info._replace(shape=shapes.get(name, info.shape)) for name, info in infos.items()
    }


def with_vocabulary(config: dict[str, Any], rows: int) -> dict[str, Any]:
    """The `config.json` of a model with so many rows."""
    return {**config, "vocab_size": rows}
