"""The rewards of held-out completions, one by one, as each evaluation finds them: kept for the page."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.files import write_whole

FOLDER = "evaluations"


def keep_rewards(folder: Path, step: int, rewards: Mapping[str, np.ndarray]) -> None:
    """Write `evaluations/STEP.npz`: float32 arrays `chosen` and `rejected`, in nats; of a named set `NAME/chosen`."""
    if not rewards:
        return
    there = folder / FOLDER
    there.mkdir(exist_ok=True)
    file = io.BytesIO()
    arrays: dict[str, Any] = {name: np.asarray(values, np.float32) for name, values in rewards.items()}
    np.savez(file, **arrays)
    write_whole(there / f"{step}.npz", file.getvalue())
