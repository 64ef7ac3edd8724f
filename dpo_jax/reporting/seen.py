"""What an evaluation has left in a run's folder beside its metrics: answers, and the rewards of held-out pairs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

ANSWERS, REWARDS = "answers", "evaluations"
"""Folders of a run: `STEP.jsonl` with a row for each answer, and `STEP.npz` with arrays of rewards."""


class SeenEvaluation(NamedTuple):
    """What there is of one evaluation.

    Attributes:
      file: of the answers, or None.
      answers: rows {"prompt", "answer", "good", ...}.
      rewards: float32 arrays in nats by name, each with the prefix of what is held out: `eval_rewards/chosen`, of a set
        with a name `eval/NAME/rewards/chosen`; beside both their difference, `.../margins`. Only finite ones: no
        histogram takes others.
    """

    file: Path | None
    answers: list[dict[str, Any]]
    rewards: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path, step: int) -> "SeenEvaluation":
        """From the folder of a run; what is not there, or damaged, is left out."""
        file = folder / ANSWERS / f"{step}.jsonl"
        try:
            answers = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError):
            answers = []
        return cls(file if answers else None, answers, _rewards(folder / REWARDS / f"{step}.npz"))


def _rewards(path: Path) -> dict[str, Any]:
    import numpy as np

    try:
        with np.load(path) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError):
        return {}
    named = {}
    for name, values in found.items():
        held_out, _, side = name.rpartition("/")
        start = f"eval/{held_out}/rewards/" if held_out else "eval_rewards/"
        named[start + side] = values
        if side == "chosen" and (other := found.get(name.removesuffix(side) + "rejected")) is not None:
            named |= {f"{start}margins": values - other} if other.shape == values.shape else {}
    finite = {name: values[np.isfinite(values)] for name, values in named.items()}
    return {name: values for name, values in finite.items() if len(values)}
