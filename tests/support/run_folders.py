"""Folders of runs that nobody made: what a page is drawn from, as long and as hostile as is asked for."""

import io
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.config import run as config

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&lt; {{ 7*7 }} \u202eevil\x1b[2J\x00"
    " $\\frac{1}{2}$"
)
"""Markup, a template, directional and terminal controls, and mathematics for Matplotlib."""
SETTINGS = {
    "model": {"path": "/home/someone/models/tiny"},
    "data": {"train": "pairs.jsonl", "eval": "heldout.jsonl"},
    "evaluation": {"answers": "questions.jsonl"},
}


def settings(**more: Any) -> dict[str, Any]:
    """A run's settings as its folder has them."""
    return config.dump(config.Run.model_validate({"output": "runs/made", **SETTINGS, **more}))


def records(steps: int, every: int, rising: float = 0.4) -> list[dict[str, Any]]:
    """Records of a run that learns: noisy, with an evaluation before the first step and each `every` steps."""
    draw, found = random.Random(0), [{"step": 0, **_evaluation(0.0, 0.5)}]
    for step in range(1, steps + 1):
        share = step / steps
        margin = rising * share + draw.gauss(0, 0.1)
        found.append(
            {
                "step": step,
                "loss": math.log1p(math.exp(-margin)),
                "rewards/margins": margin,
                "rewards/margins_p10": margin - 0.3,
                "rewards/margins_p50": margin,
                "rewards/margins_p90": margin + 0.4,
                "rewards/accuracies": 0.5 + 0.4 * share,
                "drift/chosen": -share,
                "drift/rejected": -3 * share,
                "kl": 0.1 * share * math.exp(draw.gauss(0, 1)),
                "gradient_weight": 0.5 - 0.1 * share,
                "grad_norm": math.exp(draw.gauss(0, 0.3)),
                "learning_rate": 5e-7 * (1 - share),
                "entropy": 0.5,
                "lengths/chosen": 20.0 + draw.random(),
                "lengths/rejected": 19.0,
                "step_seconds": 0.5,
                "input_wait": 0.0,
                "pairs_per_second": 64.0 + draw.random(),
                "tokens_per_second": 4000.0,
                "memory_bytes": 2**30,
            }
        )
        if step % every == 0:
            found.append({"step": step, **_evaluation(rising * share, 0.5 + 0.4 * share)})
    return found


def _evaluation(margin: float, accuracy: float) -> dict[str, Any]:
    named = {"loss": math.log1p(math.exp(-margin)), "rewards/margins": margin, "rewards/accuracies": accuracy}
    named |= {"logps/accuracies": accuracy, "kl": margin / 10, "drift/chosen": -margin, "drift/rejected": -3 * margin}
    return {f"eval_{name}": value for name, value in {**named, "pass_rate": accuracy}.items()}


def make_run(
    folder: Path, *, steps: int = 60, every: int = 20, text: str = "", finished: bool = True, **given: Any
) -> Path:
    """A folder of a run with all that a page shows; `text` is in each place that takes text from elsewhere."""
    folder.mkdir(parents=True)
    facts = {"number of steps": steps, "number of pairs": 3000, "digest of the training data": "ab" * 32}
    machine = {"dpo_jax": "0.1.0", "jax": "0.10.2", "devices": f"8 x chip {text}"}
    known = {"settings": settings(**given), "facts": facts, "machine": machine, "finished": finished}
    (folder / "run.json").write_text(json.dumps(known))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records(steps, every)))
    report = {"rows": 3000, "kept": 2990, "bad": 10, "too_long": 0, "pairs": 2990, "counts": {"duplicate pair": 3}}
    report |= {"files": {f"pairs.jsonl{text}": {"rows": 3000, "layout": "pair"}}}
    report |= {"examples": {"duplicate pair": [f"pairs.jsonl:7: {text}"]}, "lengths": {"prompt": {"min": 3, "max": 90}}}
    (folder / "data.json").write_text(json.dumps({"data.train": report, "data.eval": {**report, "pairs": 200}}))
    (folder / "answers").mkdir()
    for step, bad in ((0, 3), (steps, 9)):
        rows = [
            {
                "prompt": [{"role": "user", "content": f"Question {i} {text}"}],
                "answer": f"Answer {i} after {step} {text}",
                "good": i % bad != 0,
                "finished": i % 7 != 0,
            }
            for i in range(100)
        ]
        (folder / "answers" / f"{step}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    notes = [(1, "first step done"), (min(40, steps), f"alarm: step 40: kl is large {text}")]
    (folder / "notes.jsonl").write_text("".join(json.dumps({"step": s, "note": n}) + "\n" for s, n in notes))
    (folder / "evaluations").mkdir()
    draw = np.random.default_rng(0)
    for step, shift in ((0, 0.0), (steps, 0.5)):
        file = io.BytesIO()
        np.savez(file, chosen=shift * draw.normal(0.5, 1, 200), rejected=shift * draw.normal(-1, 1, 200))
        (folder / "evaluations" / f"{step}.npz").write_bytes(file.getvalue())
    (folder / "model").mkdir()
    (folder / "model" / "dpo_jax.json").write_text(json.dumps({"commits": {"model": "f" * 40}, "notes": [text]}))
    return folder
