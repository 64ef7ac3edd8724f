"""`fit` again and again in one process: `python -m tests.support.fits WORLD` fits each model of a folder under each
objective, so many times, and prints a line of JSON after each: what it was, the digest of its weights, and what the
process holds."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from dpo_jax.files import file_digest
from tests.support.held import held

OBJECTIVES = ("sigmoid", "ipo", "kto", "simpo")
MODELS = ("llama", "qwen3")
TIMES = 20
SETTINGS: dict[str, Any] = {
    "batch.pairs": 4,
    "batch.micro_tokens": 256,
    "data.max_length": 64,
    "steps": 2,
    "optimizer.learning_rate": 1e-3,
    "checkpoint.every": 1,
}


def main(world: Path) -> None:
    from dpo_jax import fit

    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    for number in range(TIMES):
        model, objective = MODELS[number % 2], OBJECTIVES[number // 2 % 4]
        output = world / "fits" / str(number)
        with contextlib.redirect_stderr(sys.stdout):
            result = fit(world / model, train=rows, output=output, objective=objective, verbose=False, **SETTINGS)
            result.plot()
        digest = file_digest(result.model / "model.safetensors")
        print(json.dumps({"model": model, "objective": objective, "digest": digest, **held()}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
