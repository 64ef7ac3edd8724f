"""What the first step must say, where that is known before it is made: policy and reference are still the same."""

import math
from collections.abc import Mapping
from typing import Any

from dpo_jax.config.run import Run
from dpo_jax.preference.loss import Problem
from dpo_jax.run.folder import Data, cache_folder
from dpo_jax.run.sources import is_policy
from dpo_jax.settings import UserError

START_TOLERANCE = 1e-4
"""How far the first loss may be from the objective's constant in float32, in nats."""
TOKEN_NOISE = {"bfloat16": 0.04}
"""Root mean square, in nats, of what rounding does to a token's log-probability. Measured on SmolLM2 135M, where it is
0.037 in PyTorch's autocast; the scoring program rounds in other places than the training step."""


def known_start(run: Run, problem: Problem, data: Data) -> float | None:
    """The first loss, if it is known: policy and reference are the same, and no row has a margin or weight of its own.

    A label does not matter where both are equally likely, except to KTO.
    """
    if not problem.uses_reference or not is_policy(run):
        return None
    plain = not (data.train.margin != 0).any() and (data.train.weight == 1).all()
    return problem.start_constant if plain else None


def preference_loss(problem: Problem, metrics: Mapping[str, Any]) -> float:
    """The loss of a step without the part that balances experts."""
    return float(metrics["loss"]) - problem.router_aux * float(metrics.get("aux_loss", 0.0))


def check_start(run: Run, problem: Problem, data: Data, metrics: Mapping[str, Any]) -> None:
    """Where the first loss is known, any other means that something is wrong.

    In bfloat16 log-probabilities are too rough for that, and objectives steeper or less steep: there policy and
    reference must agree on the answers' log-probabilities, to six times what rounding does to their mean.

    Raises:
      UserError: the loss of the first step is not the objective's constant, or policy and reference do not agree.
    """
    expected = known_start(run, problem, data)
    if expected is None:
        return
    if problem.compute_dtype not in TOKEN_NOISE:
        loss = preference_loss(problem, metrics)
        if abs(loss - expected) <= START_TOLERANCE * max(1.0, abs(expected)):
            return
        found = f"the loss must be {expected:.6f} and is {loss:.6f}"
    else:
        drift, tokens = (float(metrics.get(name, math.nan)) for name in ("drift/chosen", "lengths/chosen"))
        answers = 1 if problem.data == "unpaired" else run.batch.pairs  # how many are desirable is not told
        allowed = 6 * TOKEN_NOISE[problem.compute_dtype] * math.sqrt(2 * tokens / answers)
        if not abs(drift) > allowed:  # nan where no completion is desirable, or the first objective has no reference
            return
        found = f"answers must be as likely to both, and differ by {drift:.3g} nats ({allowed:.2g} may be rounding)"
    raise UserError(
        f"step 1: policy and reference are the same weights, so {found}; "
        f"the cached reference may be of other weights: remove {cache_folder(run)} and start again"
    )
