"""What the first step must say, where that is known before it is made: policy and reference are still the same."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_jax.data.encoded import Encoded
from dpo_jax.errors import UserError
from dpo_jax.preference.loss import TrainingObjective

START_TOLERANCE = 1e-4
"""How far the first loss may be from the objective's constant in float32, in nats."""
TOKEN_NOISE = {"bfloat16": 0.04, "float16": 0.005}
"""Root mean square, in nats, of what rounding does to a token's log-probability. Measured on SmolLM2 135M, where it is
0.037 in PyTorch's autocast; the scoring program rounds in other places than the training step. A float16 has three
binary digits more, and an eighth of the noise: on two small models 0.0017 for 0.0134, and 0.0022 for 0.0177."""


def preference_loss(objective: TrainingObjective, metrics: Mapping[str, Any]) -> float:
    """The loss of a step without the part that balances experts."""
    return float(metrics["loss"]) - objective.router_aux * float(metrics.get("aux_loss", 0.0))


@dataclasses.dataclass(frozen=True)
class FirstStep:
    """What is known of the first step of a run.

    Attributes:
      objective: what is minimised.
      pairs: examples of a step.
      known_loss: the loss, in nats, or None where it is not known.
      cache: folder of the cached reference, for the error.
    """

    objective: TrainingObjective
    pairs: int
    known_loss: float | None
    cache: Path

    @classmethod
    def of(
        cls, objective: TrainingObjective, train: Encoded, pairs: int, cache: Path, *, reference_is_policy: bool
    ) -> "FirstStep":
        """The loss is known where policy and reference are the same, and no row has a margin or weight of its own.

        A label does not matter where both are equally likely, except to KTO.
        """
        plain = not (train.margin != 0).any() and (train.weight == 1).all()
        known = objective.uses_reference and reference_is_policy and plain
        return cls(objective, pairs, objective.start_constant if known else None, cache)

    def check(self, metrics: Mapping[str, Any]) -> None:
        """Where the first loss is known, any other means that something is wrong.

        In 16 bits log-probabilities are too rough for that, and objectives steeper or less steep: there policy and
        reference must agree on the answers' log-probabilities, to six times what rounding does to their mean.

        Raises:
          UserError: the loss of the first step is not the objective's constant, or policy and reference do not agree.
        """
        objective, expected = self.objective, self.known_loss
        if expected is None:
            return
        if objective.compute_dtype not in TOKEN_NOISE:
            loss = preference_loss(objective, metrics)
            if abs(loss - expected) <= START_TOLERANCE * max(1.0, abs(expected)):
                return
            found = f"the loss must be {expected:.6f} and is {loss:.6f}"
        else:
            drift, tokens = (float(metrics.get(name, math.nan)) for name in ("drift/chosen", "lengths/chosen"))
            answers = 1 if objective.data == "unpaired" else self.pairs  # how many are desirable is not told
            allowed = 6 * TOKEN_NOISE[objective.compute_dtype] * math.sqrt(2 * tokens / answers)
            if not abs(drift) > allowed:  # nan where no completion is desirable, or the first term has no reference
                return
            found = f"answers must be as likely to both, and differ by {drift:.3g} nats ({allowed:.2g} may be rounding)"
        raise UserError(
            f"step 1: policy and reference are the same weights, so {found}; "
            f"the cached reference may be of other weights: remove {self.cache} and start again"
        )
