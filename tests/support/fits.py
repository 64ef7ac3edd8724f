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


class Used(ctypes.Structure):
    """The C library's `mallinfo2`: bytes and counts of its heap."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def allocated() -> int:
    """Bytes that the C library has given away and not got back; 0 where it does not say (another than glibc 2.33)."""
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return 0
    ask.restype = Used
    used = ask()
    return used.uordblks + used.hblkhd


def held() -> dict[str, int]:
    """What this process holds: resident bytes, mapped regions, open files, threads; not what its allocator keeps free,
    which is a quarter of what is resident right after a fit. Of the resident bytes some are holes between what is in
    use, more of them on a busy machine; `allocated` bytes and Python's `objects` have none."""
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
        "allocated": allocated(),
        "objects": sys.getallocatedblocks(),
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
