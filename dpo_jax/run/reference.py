"""The reference of a run: log-probabilities as data, or weights that are kept live, or neither."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import sharding, trees
from dpo_jax.data.batches import Batches
from dpo_jax.data.encode import Encoded
from dpo_jax.model.decoder import Model, Params, cast
from dpo_jax.model.weights import Weights
from dpo_jax.preference import heldout
from dpo_jax.preference.loss import TrainingObjective
from dpo_jax.preference.scoring import score_batch
from dpo_jax.processes.here import here
from dpo_jax.reporting.journal import Journal
from dpo_jax.run.data import Data, Packing
from dpo_jax.run.models import load_model, weights_digest
from dpo_jax.run.policy import Policy
from dpo_jax.run.sources import Sources
from dpo_jax.training import reference as references
from dpo_jax.training.settings import ReferenceSettings
from dpo_jax.training.step import MovingReference


@dataclasses.dataclass(frozen=True)
class Reference:
    """Log-probabilities by scored token of the training and of each set of held-out data; or live weights; or
    neither."""

    train: np.ndarray | None = None
    held_out: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    weights: Params | None = None
    moving: MovingReference | None = None


def moving_reference(settings: ReferenceSettings) -> MovingReference | None:
    """How the reference moves, if it does."""
    return MovingReference(settings.update_every, settings.update_rate) if settings.update_every else None


def held_as(moving: MovingReference | None, objective: TrainingObjective) -> str:
    """dtype of a reference's weights; of one that moves small steps must not be lost."""
    return "float32" if moving else objective.compute_dtype


@dataclasses.dataclass(frozen=True)
class ReferenceScorer:
    """Computes a reference's log-probabilities where they are not in the cache folder yet."""

    mesh: jax.sharding.Mesh
    packing: Packing
    cache: Path
    journal: Journal

    def logps(
        self, model: Model, objective: TrainingObjective, encoded: Encoded, digest: str, kind: str, name: str
    ) -> np.ndarray:
        """Log-probability of each scored token, in nats.

        Args:
          model: the reference.
          objective: says in which dtype, and how, it is computed.
          encoded: the data.
          digest: of the reference's weights.
          kind: what it is computed in; with the digest, the data, platform and attention the key of the cached file.
          name: what the data are called where it is said what is being done.
        """

        def compute() -> np.ndarray:
            self.journal.phase(f"compiling the reference for {name}")
            batches = self.packing.sweep(encoded, model.spec)
            return score_all(objective, model, batches, self.mesh, self.journal, name)

        computed = f"{kind} {sharding.platform(self.mesh)} {objective.execution.attention}"
        key = references.cache_key(digest, encoded, computed)
        return references.cached(self.cache, key, encoded.num_scored, compute)


def make_reference(
    settings: ReferenceSettings,
    sources: Sources,
    policy: Weights,
    objective: TrainingObjective,
    data: Data,
    scorer: ReferenceScorer,
    *,
    start: Policy | None = None,
    resumes: bool = False,
) -> Reference:
    """The reference as the settings want it. Cached: its weights are gone when this returns.

    `start` says what of the policy is the reference, where it is an adapter's; else all of it is.

    There are none where the run resumes with a reference that moves: its weights are in the checkpoint.
    """
    moving = moving_reference(settings)
    if settings.mode == "none" or (moving and resumes):
        return Reference(moving=moving)
    dtype = held_as(moving, objective)
    own = sources.reference_is_policy
    params = policy.params if start is None else start.reference(policy, settings.adapter)
    if settings.mode == "live" and own:
        return Reference(weights=_copied(params, {} if moving else policy.frozen, dtype), moving=moving)
    model = Model(objective.spec, params) if own else None
    model = model or load_model(sources.reference, scorer.mesh, dtype, rows=sources.rows)
    if settings.mode == "live":
        return Reference(weights=cast(model.params, jnp.dtype(dtype)), moving=moving)
    digest = weights_digest(sources.reference, here())
    kind = _computed_in(policy, objective) if own else objective.compute_dtype
    kind += "" if sources.rows is None else f" {model.spec.vocab_size} rows"
    kind += start.reference_kind(settings.adapter) if own and start is not None else ""
    train, *others = (
        scorer.logps(model, objective, encoded, digest, kind, name) for name, encoded in data.sets.items()
    )
    return Reference(train=train, held_out=dict(zip(data.held_out, others, strict=True)))


def _copied(params: Params, frozen: Params, dtype: str) -> Params:
    """The parameters in this dtype, none in the policy's own buffers but those of what is `frozen`: the first step
    gives away those that are trained, and those of a reference that moves."""
    new, old, shared = trees.paths(cast(params, jnp.dtype(dtype))), trees.paths(params), trees.paths(frozen)
    return trees.from_paths(
        {path: jnp.copy(x) if x.dtype == old[path].dtype and path not in shared else x for path, x in new.items()}
    )


def _computed_in(policy: Weights, objective: TrainingObjective) -> str:
    """What the policy's own log-probabilities are computed in, for the key of the cache: weights that are kept in fewer
    digits are rounded before they are computed with, but those that are frozen are not."""
    narrow = {leaf.dtype.name for leaf in jax.tree.leaves(policy.trained)} - {"float32"}
    kind = objective.compute_dtype
    if not narrow or kind != "float32":
        return kind
    frozen = json.dumps([sorted(trees.paths(policy.frozen)), sorted(policy.rows)]) if policy.frozen else ""
    return f"{kind} of {min(narrow)}{frozen}"


def score_all(
    objective: TrainingObjective, model: Model, batches: Batches, mesh: jax.sharding.Mesh, journal: Journal, name: str
) -> np.ndarray:
    """Log-probability of each scored token of the data of this name under a model, in nats."""
    params = cast(model.params, jnp.dtype(objective.compute_dtype))
    scorer = sharding.Compiled(
        lambda params, batch: score_batch(model.spec, params, batch, execution=objective.execution), mesh
    )

    def progress(done: int, total: int) -> None:
        journal.phase(f"reference log-probabilities of {name} {done}/{total}")

    place = functools.partial(sharding.place, mesh=mesh)
    return heldout.token_logprobs(scorer, params, batches, place, progress)
