"""What a run trains: the whole model, a part of it, or an adapter beside it; described, and then read.

Of an adapter's base nothing is trained, and nothing of it is exported but what its folder has: it is held in the dtype
of computation, once, and is the reference as well.
"""

import dataclasses
import functools
import hashlib
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dpo_jax import sharding, trees
from dpo_jax.config.rules import ADAPTER_RATE, LOW_ADAPTER_RATE
from dpo_jax.config.run import Run
from dpo_jax.errors import UserError
from dpo_jax.hf import adapters as folders
from dpo_jax.hf import reward
from dpo_jax.hf.checkpoint import entries_of, scheme_of
from dpo_jax.hf.factors import Factor, Key
from dpo_jax.hf.few_bits import FewBits
from dpo_jax.hf.quantised import opened
from dpo_jax.hf.tensors import Tensors, read_json
from dpo_jax.model import adapters
from dpo_jax.model.adapters import AdapterSpec
from dpo_jax.model.decoder import abstract_params, cast, held_in, stacks
from dpo_jax.model.quantised import Kind
from dpo_jax.model.settings import AdapterSettings, ModelSettings
from dpo_jax.model.spec import DecoderSpec
from dpo_jax.model.weights import Trained, Weights, divided, what_is_trained, what_matches
from dpo_jax.run import models
from dpo_jax.run.sources import Sources
from dpo_jax.trees import Params


def policy_of(run: Run, sources: Sources, mesh: jax.sharding.Mesh) -> "Policy":
    """What a run trains; raises as `Policy.of`."""
    return Policy.of(
        sources,
        run.model,
        run.adapter,
        compute_dtype=models.compute_dtype(run.model, mesh),
        param_dtype=run.optimizer.param_dtype,
        scalar_head=run.objective.trains_reward_model,
    )


def adapter_notes(run: Run, policy: "Policy") -> list[str]:
    """What is to be said of an adapter before it is trained."""
    if policy.adapter is None:
        return []
    shapes, changes = _shapes(policy.spec), policy.adapter.changes
    numbers = trees.num_parameters(jax.eval_shape(lambda: policy.fresh(0)))
    whole = sum(math.prod(shape) for shape in shapes.values())
    kinds = sorted({path.split("/", 2)[2].removesuffix("/kernel") for path in changes})
    found = [
        f"adapter: {numbers:,} numbers beside the {whole:,} of the model ({numbers / whole:.2%}), of {', '.join(kinds)}"
    ]
    if 0 < run.optimizer.learning_rate < LOW_ADAPTER_RATE:
        found.append(
            f"optimizer.learning_rate: {run.optimizer.learning_rate:g} is low for an adapter, which wants about ten "
            f"times the rate of a whole model: {ADAPTER_RATE:g} to 1e-5"
        )
    return found


@dataclasses.dataclass(frozen=True)
class Policy:
    """What is trained of a model.

    Attributes:
      spec: of the model.
      folder: that its weights are read from.
      trained: what of the model itself is trained.
      param_dtype: that this is held in.
      frozen_dtype: that the rest is held in.
      adapter: what is trained beside the model, or None.
      start: the factors of an adapter that the run goes on from, or None.
      kinds: of the base's kernels that are kept in few bits, by leaf path.
    """

    spec: DecoderSpec
    folder: Path
    trained: Trained
    param_dtype: str
    frozen_dtype: str = "float32"
    adapter: AdapterSpec | None = None
    start: Mapping[Key, Factor] | None = None
    kinds: Mapping[str, Kind] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        sources: Sources,
        model: ModelSettings,
        adapter: AdapterSettings,
        *,
        compute_dtype: str,
        param_dtype: str,
        scalar_head: bool,
    ) -> "Policy":
        """What the settings say; reads no weights of the model.

        Raises:
          UserError: a pattern or a target is not of this model, or an adapter is not as it must be.
        """
        spec = models.spec_of(sources.policy, sources.rows, scalar_head=scalar_head)
        if not adapter.used:
            return cls(spec, sources.policy, what_is_trained(spec, model.freeze), param_dtype)
        found, start = _adapter_of(adapter, spec, sources)
        trained = dict(what_matches(spec, adapter.modules_to_save, "adapter.modules_to_save"))
        trained |= {path: True for path in trained if path.startswith("score/")}
        _check_apart(found, trained)
        few = folders.few_bits(model.quantise, sources.policy, entries_of(spec, sources.policy))
        kinds: dict[str, Kind] = {path: kind for path, kind in few.items() if not trained[path]}
        frozen = "float32" if reward.head_is_new(spec, sources.policy) else compute_dtype
        return cls(spec, sources.policy, trained, param_dtype, frozen, found, start, kinds)

    def held(self, path: str) -> DTypeLike:
        """dtype that a leaf of the model is read in; what is frozen in full training comes back exactly."""
        dtype = jnp.dtype(self.param_dtype if self.trained[path] is True else self.frozen_dtype)
        return held_in(path, dtype if self.trained[path] in (True, False) else jnp.dtype("float32"))

    def load(self, mesh: jax.sharding.Mesh, seed: int = 0) -> Weights:
        """The policy on its shardings, divided into what is trained and what is frozen; `seed` is of new factors."""
        base = models.loaded(self.spec, self.folder, mesh, self.held, quantise=self.kinds)
        weights = self._divided(base.params)
        if self.adapter is not None:
            weights = self._adapted(weights, mesh, seed)
        return jax.device_put(weights, _shardings(weights, mesh))

    def abstract(self, mesh: jax.sharding.Mesh) -> Weights:
        """Shapes, dtypes and shardings of what `load` returns."""

        def made() -> Weights:
            leaves = trees.paths(models.abstract_quantised(self.spec, self.kinds))
            held = {path: self.held(path) if path in self.trained else leaf.dtype for path, leaf in leaves.items()}
            base = trees.from_paths({path: jnp.zeros(leaf.shape, held[path]) for path, leaf in leaves.items()})
            weights = self._divided(base)
            return weights if self.adapter is None else self._with(weights, self.fresh(0))

        weights = jax.eval_shape(made)
        return sharding.shape_of(weights, _shardings(weights, mesh))

    def reference(self, weights: Weights, adapter: str) -> Params:
        """The parameters of a reference that is the policy's start: with its adapter, or (`adapter` base, or where the
        adapter is new and changes nothing yet) without it."""
        own = self.adapter is None or (self.start is not None and adapter == "start")
        return weights.params if own else adapters.without(weights.params)

    def reference_kind(self, adapter: str) -> str:
        """What tells the reference's numbers from those of the folder alone, for the key of their cache."""
        bits = f" {sorted(self.kinds.items())}" if self.kinds else ""
        if self.start is None or adapter == "base":
            return bits
        digest = hashlib.sha256()
        for (name, expert), factor in sorted(self.start.items(), key=str):
            parts = [b"" if part is None else np.ascontiguousarray(part).tobytes() for part in (factor.a, factor.b)]
            digest.update(f"{name} {expert} {factor.scale}".encode() + b"".join(parts))
            digest.update(b"" if factor.magnitude is None else factor.magnitude.tobytes())
        return f"{bits} adapter {digest.hexdigest()}"

    @property
    def dropout(self) -> float:
        """Share of the adapter's inputs that a training step drops."""
        return 0.0 if self.adapter is None else self.adapter.dropout

    def starts_at_reference(self, adapter: str) -> bool:
        """Whether the policy's start is its own reference, where that is not another model (`reference.adapter`)."""
        return self.start is None or adapter == "start"

    def base(self) -> Tensors:
        """The tensors of the model as it is trained on: those of its folder, or what few bits leave of them."""
        if not self.kinds:
            return opened(self.folder)
        return FewBits(opened(self.folder, unrounded=True), self.entries, self.kinds)

    @property
    def entries(self) -> list:
        """Every tensor of the folder."""
        return entries_of(self.spec, self.folder)

    def _divided(self, base: Params) -> Weights:
        codes = dict.fromkeys((path for path in trees.paths(base) if path not in self.trained), False)
        weights = divided(base, {**self.trained, **codes})
        return Weights(cast(weights.trained, jnp.dtype(self.param_dtype)), weights.frozen, weights.rows)

    def _adapted(self, weights: Weights, mesh: jax.sharding.Mesh, seed: int) -> Weights:
        """With the adapter's factors beside what of the model itself is trained."""
        if self.start is not None and self.adapter is not None:
            factors = folders.to_leaves(self.start, self.adapter, _shapes(self.spec), self.entries)
        else:
            places = sharding.param_shardings(jax.eval_shape(lambda: self.fresh(0)), mesh)
            factors = jax.jit(self.fresh, static_argnums=0, out_shardings=places)(seed)
        return self._with(weights, factors)

    def _magnitudes(self, params: Params) -> Params:
        return jax.jit(functools.partial(adapters.magnitudes, shapes=abstract_params(self.spec)))(params)

    def fresh(self, seed: int) -> Params:
        """New factors, which change nothing."""
        assert self.adapter is not None
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"adapter"))
        return adapters.fresh(self.adapter, _shapes(self.spec), key)

    def _with(self, weights: Weights, factors: Params) -> Weights:
        assert self.adapter is not None
        frozen = trees.joined(weights.frozen, adapters.constants(self.adapter))
        trained = trees.joined(weights.trained, factors)
        found = Weights(trained, frozen, weights.rows)
        if not self.adapter.dora or self.start is not None:
            return found
        return dataclasses.replace(found, trained=trees.joined(trained, self._magnitudes(found.params)))


def _adapter_of(
    settings: AdapterSettings, spec: DecoderSpec, sources: Sources
) -> tuple[AdapterSpec, Mapping[Key, Factor] | None]:
    """What is adapted, and the factors of one that is gone on with."""
    entries, layers = entries_of(spec, sources.policy), {name: numbers for name, _, numbers in stacks(spec)}
    if settings.path is None:
        kind = read_json(sources.policy, "config.json").get("model_type", "")
        return folders.resolve(settings, entries, layers, kind), None
    from dpo_jax.hf.peft import read_adapter

    assert sources.adapter is not None
    base = opened(sources.policy)
    read = read_adapter(sources.adapter, spec, scheme_of(spec, sources.policy, base.spare), base)
    if read.replaced or read.rows or read.unties or any(one.bias is not None for one in read.factors.values()):
        raise UserError(
            f"adapter.path: {sources.adapter} has more than factors (biases, whole modules or rows of an embedding), "
            "and a run goes on with factors alone; merge it first: python -m dpo_jax.convert merge BASE ADAPTER TARGET"
        )
    found = folders.described(read.factors, entries, layers)
    return dataclasses.replace(found, dropout=settings.dropout), read.factors


def _check_apart(adapter: AdapterSpec, trained: Trained) -> None:
    for path in adapter.changes:
        if trained[path]:
            raise UserError(
                f"adapter.modules_to_save: {path} is trained whole, and adapter.targets adapts it; leave one out"
            )


def _shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in trees.paths(abstract_params(spec)).items()}


def _shardings(weights: Weights, mesh: jax.sharding.Mesh) -> Weights:
    """A sharding in the place of each leaf."""
    trained, frozen = (sharding.param_shardings(tree, mesh) for tree in (weights.trained, weights.frozen))
    return Weights(trained, frozen, weights.rows)
