"""`fit` again and again in one process: `python -m tests.support.fits WORLD` fits each model of a folder under each
objective, so many times, and prints a line of JSON after each: what it was, the digest of its weights, and what the
process holds."""

import contextlib
import ctypes
import gc
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from dpo_jax.files import file_digest

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


def held() -> dict[str, int]:
    """What this process holds: resident bytes, mapped regions, open files, threads; not what its allocator keeps free,
    which is a quarter of what is resident right after a fit."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    with open("/proc/self/maps") as file:
        regions = sum(1 for _ in file)
    files = len(os.listdir("/proc/self/fd"))
    return {
        "rss": pages * os.sysconf("SC_PAGE_SIZE"),
        "regions": regions,
        "files": files,
        "threads": threading.active_count(),
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
