"""How well a model prefers what people preferred: loss and metrics, exact over the whole held-out set at once."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from dpo_jax import sharding
from dpo_jax.data.batch import Batch
from dpo_jax.data.batches import Batches
from dpo_jax.data.encoded import Encoded
from dpo_jax.model.decoder import Params
from dpo_jax.model.weights import Weights
from dpo_jax.objectives.metrics import Means, Values, seen_rewards
from dpo_jax.objectives.mixture import Progress
from dpo_jax.objectives.pairs import Pairs, Ranking
from dpo_jax.objectives.terms import Term
from dpo_jax.preference.loss import measure

Measure = Callable[[Pairs, Float[Array, ""]], tuple[Float[Array, ""], Values]]
"""`(all pairs [P], progress) -> (loss, metrics)`."""


class SeenPairs(NamedTuple):
    """What a model says of the pairs of a data set.

    Attributes:
      pairs: of each batch, those that are real.
      totals: sum and count of each token statistic, float64 [2].
    """

    pairs: list[Pairs]
    totals: dict[str, np.ndarray]

    def __add__(self, other: "SeenPairs") -> "SeenPairs":
        """Of both data sets."""
        names = self.totals | other.totals
        zero = np.zeros(2)
        totals = {name: self.totals.get(name, zero) + other.totals.get(name, zero) for name in names}
        return SeenPairs(self.pairs + other.pairs, totals)


def look(
    collect: Callable[[Weights, Batch], tuple[Pairs, Means]],
    weights: Weights,
    batches: Batches,
    place: Callable[[Batch], Batch],
) -> SeenPairs:
    """What a model says of all pairs of a sweep.

    Args:
      collect: `(weights, batch) -> (pairs [M, D, P], token statistics as sums and counts)`.
      weights: of the model.
      batches: a sweep over the pairs.
      place: puts a host batch on the devices.
    """
    parts: list[Pairs] = []
    totals: dict[str, np.ndarray] = {}
    for step in range(batches.steps):
        pairs, means = sharding.fetched(collect(weights, place(batches.at(step))))
        parts.append(jax.tree.map(lambda leaf, real=pairs.real: leaf[real], pairs))
        for name, mean in means.items():
            totals[name] = totals.get(name, np.zeros(2)) + np.asarray([mean.total, mean.count], np.float64)
    return SeenPairs(parts, totals)


def measured(seen: SeenPairs, measure: Measure, progress: float = 1.0) -> dict[str, float]:
    """The loss and every metric over all pairs that were seen, as if they were one step.

    Token statistics are added up in float64 and divided once; everything else is computed from all pairs together, so
    also what sorts them, and quantiles.

    Args:
      seen: the pairs.
      measure: as `measurement` makes it.
      progress: share of the run that is done, for a beta that is scheduled.
    """
    loss, metrics = jax.device_get(measure(_whole(seen), jnp.float32(progress)))
    found = {"loss": loss, **metrics}
    statistics = {name: total / count if count else np.nan for name, (total, count) in seen.totals.items()}
    return {name: float(value) for name, value in (found | statistics).items()}


def _whole(seen: SeenPairs) -> Pairs:
    """All pairs together, on the host."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *map(_widened(seen.pairs), seen.pairs))


def _widened(parts: Sequence[Pairs]) -> Callable[[Pairs], Pairs]:
    """Makes the rankings of all parts as wide as the widest: other data sets may have more completions a prompt."""
    widths = [part.ranking.rank.shape[-1] for part in parts if part.ranking is not None]

    def widen(part: Pairs) -> Pairs:
        if part.ranking is None:
            return part
        room = ((0, 0),) * (part.ranking.rank.ndim - 1) + ((0, max(widths) - part.ranking.rank.shape[-1]),)
        filling = {"rank": -1}  # no completion
        wide: dict[str, Any] = {
            name: np.pad(np.asarray(leaf), room, constant_values=filling.get(name, 0))
            for name, leaf in part.ranking._asdict().items()
        }
        return part._replace(ranking=Ranking(**wide))

    return widen


def measurement(terms: tuple[Term, ...]) -> Measure:
    """What `measured` takes as `measure` for these objectives; compiled once for each number of pairs."""
    return jax.jit(lambda pairs, progress: measure(terms, pairs, Progress(progress))[:2])


def rewards_of(terms: tuple[Term, ...]) -> Callable[[SeenPairs, float], dict[str, np.ndarray]]:
    """A function of `(pairs, progress)` to the rewards of chosen and rejected completions, float32 [P] in nats; empty
    for an objective that has none."""
    compiled = jax.jit(lambda pairs, progress: seen_rewards(terms, pairs, Progress(progress)))

    def found(seen: SeenPairs, progress: float) -> dict[str, np.ndarray]:
        sides = jax.device_get(compiled(_whole(seen), jnp.float32(progress)))
        return {} if sides is None else dict(zip(("chosen", "rejected"), sides, strict=True))

    return found


def token_logprobs(
    score: Callable[[Params, Batch], Float32[Array, "M D K"]],
    params: Params,
    batches: Batches,
    place: Callable[[Batch], Batch],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Log-probability of every scored token of a data set, float32 in nats; nan for one that no pair uses.

    Args:
      score: `(params, batch) -> log-probabilities [M, D, K]`.
      params: weights of the model.
      batches: a sweep over the pairs.
      place: puts a host batch on the devices.
      progress: told after each batch how many of how many are done.
    """
    encoded = batches.encoded
    values = np.full(encoded.num_scored, np.nan, np.float32)
    for step in range(batches.steps):
        batch = place(batches.at(step))
        scored, ids = sharding.fetched((score(params, batch), batch.ids))
        for micro, shard in np.argwhere((ids >= 0).any(axis=-1)).tolist():
            where = scored_places(ids[micro, shard], encoded)
            values[where] = scored[micro, shard, : len(where)]
        progress(step + 1, batches.steps)
    return values


def scored_places(ids: np.ndarray, encoded: Encoded) -> np.ndarray:
    """Where the scored tokens of these completions (-1 is none), one after the other, stand in the flat list of all."""
    used = ids[ids >= 0]
    lengths = encoded.scored_length[used].astype(np.int64)
    before = np.cumsum(lengths) - lengths
    return np.repeat(encoded.scored_start[used] - before, lengths) + np.arange(lengths.sum())
