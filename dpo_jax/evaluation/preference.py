"""How well a model prefers what people preferred: held-out accuracy and margin, exact over the whole set."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dpo_jax.data.batches import Batches


def evaluate(
    measure: Callable[[Any, Any], Any], params: Any, batches: Batches, place: Callable[[Any], Any]
) -> dict[str, float]:
    """Every metric over all pairs of a sweep: sums and counts are added up in float64 and divided once.

    Args:
      measure: `(params, batch) -> metrics as sums and counts`.
      params: weights of the model.
      batches: a sweep over the pairs.
      place: puts a host batch on the devices.
    """
    totals: dict[str, np.ndarray] = {}
    for step in range(batches.steps):
        measured = jax.device_get(measure(params, place(batches.at(step))))
        for name, mean in measured.items():
            totals[name] = totals.get(name, 0.0) + np.asarray([mean.total, mean.count], np.float64)
    return {name: float(total / count) if count else float("nan") for name, (total, count) in totals.items()}


def completion_logprobs(
    score: Callable[[Any, Any], Any],
    params: Any,
    batches: Batches,
    place: Callable[[Any], Any],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Log-probability of every completion of a data set, float32 [C] in nats; nan for one that no pair uses.

    Args:
      score: `(params, batch) -> log-probabilities [M, D, C]`.
      params: weights of the model.
      batches: a sweep over the pairs.
      place: puts a host batch on the devices.
      progress: told after each batch how many of how many are done.
    """
    values = np.full(len(batches.encoded.completion_length), np.nan, np.float32)
    for step in range(batches.steps):
        batch = batches.at(step)
        scored = np.asarray(jax.device_get(score(params, place(batch))))
        used = batch.ids >= 0
        values[batch.ids[used]] = scored[used]
        progress(step + 1, batches.steps)
    return values
