"""How fast answers are written: dpo_jax and transformers' generate in turn, each in processes of its own.

Both write the same number of tokens to the same prompts. CPU seconds are compared as well, since other work on the
machine takes no part in them.
"""

import json
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.errors import UserError

SCRIPT = Path(__file__).resolve().parents[1] / "runners" / "answering.py"
ROOT = SCRIPT.parents[2]
PROGRAMS = ("dpo_jax", "transformers")
DTYPES = ("float32", "bfloat16")


def prompts(model: Path, count: int, length: int) -> list[list[int]]:
    """Random prompts of one length, the same each time."""
    known = json.loads((model / "config.json").read_text("utf-8")).get("vocab_size", 0)
    if known < 2:
        raise UserError(f"--model {model}: its config.json has no vocab_size; give the folder of a language model")
    return np.random.default_rng(0).integers(0, known, (count, length)).tolist()


def alternate(
    pythons: Mapping[str, str], spec: Mapping[str, Any], folder: Path, timeout: float, say: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """What each program at each dtype took, `spec["repeats"]` processes each, in turn."""
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(spec["repeats"]):
        for dtype in DTYPES:
            path = folder / f"{dtype}.json"
            path.write_text(json.dumps({**spec, "dtype": dtype, "repeats": 1}), "utf-8")
            for program in PROGRAMS:
                command = [pythons[program], str(SCRIPT), program, str(path)]
                done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)
                if done.returncode:
                    last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
                    raise UserError(f"{program}, {dtype}: {(last or ['failed without a word'])[0]}")
                run = json.loads(done.stdout.splitlines()[-1])
                found.setdefault(f"{program}, {dtype}", []).append(run)
                say(f"{program}, {dtype}: {run['calls'][0]['cpu']:.2f} CPU-s, {run['calls'][0]['wall']:.2f} s")
    return found


def rows(found: Mapping[str, Sequence[Mapping[str, Any]]], written: int) -> list[dict[str, Any]]:
    """A row for each program and dtype: medians, and how many of the tokens are transformers' in float32."""
    wanted = np.asarray(found["transformers, float32"][0]["tokens"])
    table = []
    for name, runs in found.items():
        program, dtype = name.split(", ")
        wall = statistics.median(call["wall"] for run in runs for call in run["calls"])
        cpu = statistics.median(call["cpu"] for run in runs for call in run["calls"])
        alike = np.cumprod(np.asarray(runs[0]["tokens"]) == wanted, axis=1).mean()
        first = statistics.median(run["first"]["cpu"] for run in runs)
        figures = {"tokens/s": written / wall, "tokens/CPU-s": written / cpu, "first call, CPU-s": first}
        table.append({"program": program, "dtype": dtype, **figures, "same tokens": float(alike)})
    return table
