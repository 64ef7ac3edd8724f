"""The rewards of held-out completions, one by one, kept for the page: of the first evaluation and the newest one."""

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.files import write_whole

FOLDER = "evaluations"


def keep_rewards(folder: Path, step: int, rewards: Mapping[str, np.ndarray]) -> None:
    """Write `evaluations/STEP.npz`: arrays `chosen` and `rejected`, of a named set `NAME/chosen` and so on.

    What stands there of other steps goes, but for the first; the names are those of `page.folder`.
    """
    if not rewards:
        return
    there = folder / FOLDER
    there.mkdir(exist_ok=True)
    file = io.BytesIO()
    arrays: dict[str, Any] = {name: np.asarray(values, np.float32) for name, values in rewards.items()}
    np.savez(file, **arrays)
    write_whole(there / f"{step}.npz", file.getvalue())
    for other in there.glob("*.npz"):
        if other.stem not in ("0", str(step)):
            with contextlib.suppress(OSError):
                other.unlink()
