"""The rewards of held-out completions, one by one, as each evaluation finds them: kept for the page."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.files import write_whole
from dpo_jax.processes.here import here

FOLDER = "evaluations"


def keep_rewards(folder: Path, step: int, rewards: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write `evaluations/STEP.npz`: float32 arrays `chosen` and `rejected`, in nats; of a named set `NAME/chosen`."""
    arrays: dict[str, Any] = {
        f"{name}/{side}".lstrip("/"): np.asarray(values, np.float32)
        for name, sides in rewards.items()
        for side, values in sides.items()
    }
    if not arrays or not here().owns:
        return
    (folder / FOLDER).mkdir(exist_ok=True)
    file = io.BytesIO()
    np.savez(file, **arrays)
    write_whole(folder / FOLDER / f"{step}.npz", file.getvalue())
