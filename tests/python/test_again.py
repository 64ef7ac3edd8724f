"""`fit` twenty times in one process: nothing piles up, and every run has the bits of the command."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import ROOT
from tests.support import fits
from tests.support.tiny_rows import write, yes_or_no
from tests.support.worlds import write_model

WARM = 8
"""Runs until each model has been trained under each objective."""
KEPT = 1500
"""Objects of Python by which each run may be more. Some 1,100 are not this project's: tensorstore 0.1.86 loses 14 of
them each time that a spec is written as JSON, which Orbax does for each array of each save."""
PILES = {"allocated": 6 << 20, "objects": 10 * KEPT, "rss": 16 << 20, "regions": 40, "files": 0, "threads": 0}
"""By how much what a process holds may grow in the last ten runs or so. What is in use is exact: of its bytes 0.5 MiB
are those objects, and 3.7 a table of Python's that is doubled now and then. Resident bytes have holes, more of them on
a busy machine (2 to 10 MiB), where threads share one heap; a heap of each thread's own has some 30 MiB by the 18th run.
A run's programs that were kept would be more in each of the runs."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("again")
    for family, more in (("llama", {}), ("qwen3", {"head_dim": 8})):
        write_model(root / family, family, num_hidden_layers=2, **more)
    write(root / "train.jsonl", *yes_or_no(12))
    return root


def python(world, *arguments):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(world / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "MALLOC_ARENA_MAX": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, check=True, env=environment, cwd=ROOT
    )


@pytest.mark.nightly
def test_twenty_runs_hold_no_more_than_eight_and_are_the_commands(world):
    lines = [json.loads(line) for line in python(world, "tests.support.fits", str(world)).stdout.splitlines()]
    assert len(lines) == fits.TIMES
    for name, room in PILES.items():
        warm, rest = [line[name] for line in lines[WARM - 2 : WARM + 2]], [line[name] for line in lines[-4:]]
        assert max(rest) <= max(warm) + room, (name, [line[name] for line in lines])
    found = {(line["model"], line["objective"]): line["digest"] for line in lines}
    assert all(found[line["model"], line["objective"]] == line["digest"] for line in lines) and len(found) == 8
    words = [f"{key}={value}" for key, value in fits.SETTINGS.items()] + [f"data.train={world / 'train.jsonl'}"]

    def trained(point):
        model, objective = point
        output = world / f"{model}-{objective}"
        more = [f"model.path={world / model}", f"objective.name={objective}", f"output={output}"]
        python(world, "dpo_jax.train", *words, *more)
        return fits.file_digest(output / "model" / "model.safetensors")

    with ThreadPoolExecutor(2) as pool:
        assert dict(zip(found, pool.map(trained, found), strict=True)) == found
