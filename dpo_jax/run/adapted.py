"""What a run of an adapter leaves: a PEFT folder, or its base with the adapter in it."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from dpo_jax import trees
from dpo_jax.hf import adapters as folders
from dpo_jax.hf import factors, merge, merged, peft_export, reward
from dpo_jax.hf.checkpoint import save_hf, scheme_of
from dpo_jax.hf.mapping import TensorEntry, claim
from dpo_jax.hf.quantised import opened
from dpo_jax.model.adapters import folded
from dpo_jax.model.decoder import Model, abstract_params
from dpo_jax.model.spec import DecoderSpec
from dpo_jax.model.weights import Weights
from dpo_jax.processes.here import here
from dpo_jax.run.policy import Policy
from dpo_jax.sharding import on_host
from dpo_jax.trees import Params


@functools.partial(jax.jit, static_argnums=1)
def _folded(params: Params, spec: DecoderSpec) -> Params:
    return folded(params, abstract_params(spec))


class Text(NamedTuple):
    """What stands in a folder beside its weights: a card, further files, and how its base is called."""

    card: Mapping[str, Any]
    files: Mapping[str, str]
    base_model: str


def trained_on(policy: Policy, weights: Weights) -> factors.Adapter:
    """The adapter that was trained, by the tensors of the base's folder; also what of the model was trained whole."""
    assert policy.adapter is not None
    entries, leaves = policy.entries, trees.paths(weights.params)
    own = {path: on_host(leaf) for path, leaf in trees.paths(weights.trained).items() if "/lora/" in path}
    found = folders.to_factors(policy.adapter, own, entries)
    kept = [entry for entry in entries if _is_whole(policy, entry)]
    held = {path: on_host(leaves[path]) for path in dict.fromkeys(part.leaf for entry in kept for part in entry.parts)}
    whole = {entry.name: entry.of(held).astype(np.float32) for entry in kept}
    return factors.Adapter(found, {entry.name: entry for entry in entries}, whole, dropout=policy.dropout)


def _is_whole(policy: Policy, entry: TensorEntry) -> bool:
    """Whether a tensor was trained itself; of a stack of layers, in its own."""
    trained = (policy.trained[part.leaf] for part in entry.parts)
    return any(
        one[part.index[0]] if isinstance(one, tuple) else one for one, part in zip(trained, entry.parts, strict=True)
    )


def write_adapter(policy: Policy, weights: Weights, target: Path, text: Text, *, replace: bool = False) -> None:
    """Write the factors as a PEFT folder; raises as `peft_export.write_adapter`."""
    adapter, base = trained_on(policy, weights), opened(policy.folder)
    if not here().owns:
        return
    peft_export.write_adapter(
        target,
        adapter,
        base,
        policy.spec,
        base_model=text.base_model,
        card=text.card,
        extra_files=text.files,
        replace=replace,
    )


def write_merged(
    policy: Policy,
    weights: Weights,
    target: Path,
    text: Text,
    *,
    dtype: Literal["keep", "float32", "bfloat16"] = "keep",
    replace: bool = False,
) -> str | None:
    """Write the base with what was trained in it, added in float32 and rounded once; what rounding does to it."""
    if reward.head_is_new(policy.spec, policy.folder):
        model = Model(policy.spec, _folded(weights.params, policy.spec))
        how = {"card": text.card, "extra_files": text.files, "replace": replace, "dtype": dtype}
        save_hf(model, target, policy.folder, **how)
        return None
    source = policy.base()
    scheme = scheme_of(policy.spec, policy.folder, source.spare)
    claims = claim(policy.spec, source.infos, str(policy.folder), scheme)
    view = merged.Merged(source, trained_on(policy, weights), claims, "float32")
    if not here().owns:
        return None
    how = {"dtype": dtype, "card": text.card, "extra_files": text.files, "replace": replace}
    return str(merge.write_merged(target, view, policy.spec, scheme, **how))
