"""Runs several processes as one for hours, and sees that they hold no more memory, files and threads than at first.

    python tools/soak.py [--hours 2] [--processes 2] [--every 30] [--work FOLDER]

A small run of `dpo_jax.train` that evaluates, answers a question, saves and draws its page again and again. Of each
process its memory (resident, what the C library keeps free given back first, and in use), open handles, threads (all,
and Python's) and compilations so far are kept in WORK/samples.jsonl. When the time is up one process gets SIGTERM, and
all are to save and end with 75. Samples of the first quarter are of warming up. Exit code 1 if, between the second
quarter and the last, either memory grew by more than 16 MiB, handles or Python's threads by any, or all threads by more
than 4 (pools of gRPC and TensorStore begin one when they are busy), if anything was compiled after the first quarter,
or if the end was another. Needs dpo_jax to be importable, and the project's tests folder.
"""

import argparse
import json
import math
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.hosts import Hosts  # noqa: E402
from tests.support.worlds import settings_in, write_world  # noqa: E402

MAY_GROW = {"resident": 16, "in_use": 16, "objects": math.inf, "handles": 0, "threads": 4, "python_threads": 0}
"""By how much each of these may be more in the end: MiB, or how many."""
STOPPED = 75
"""Exit code of a run that was asked to stop and can go on."""


class Sample(NamedTuple):
    """A process at a moment: seconds since the start, step of the run, MiB, and counts."""

    seconds: float
    step: int
    process: int
    resident: float
    in_use: float
    objects: int
    handles: int
    threads: int
    python_threads: int
    compilations: int


def words(root: Path, every: float) -> list[str]:
    """The command, less the interpreter."""
    given = settings_in(root) | {
        "steps": 400_000,
        "evaluation.every": 200,
        "checkpoint.every": 200,
        "log.every": 10,
        "log.tensorboard": True,
        "distributed.timeout": 300,
        "output": root / "run",
    }
    settings = [f"{key}={value}" for key, value in given.items()]
    return ["-m", "tests.support.held", str(root / "held"), str(every), "dpo_jax.train", *settings]


def samples(hosts: Hosts, root: Path, seconds: float, every: float) -> Iterator[Sample]:
    """What is seen of all processes until the time is up or one has ended."""
    began = time.monotonic()
    seen = [psutil.Process(one.pid) for one in hosts.all]
    while time.monotonic() - began < seconds and not hosts.until(
        lambda: any(one.poll() is not None for one in hosts.all), every
    ):
        for number, process in enumerate(seen):
            held = last(root / "held" / f"{process.pid}.jsonl")
            if held is None:
                continue
            compiled = len(re.findall(r"^Compiling |Finished XLA compilation of", hosts.said(number), re.MULTILINE))
            step = (last(root / "run" / "metrics.jsonl") or {}).get("step", 0)
            resident, in_use = (round(held[name] / 2**20, 1) for name in ("rss", "allocated"))
            counts = held["objects"], process.num_fds(), process.num_threads(), held["threads"], compiled
            yield Sample(round(time.monotonic() - began), step, number, resident, in_use, *counts)


def last(path: Path) -> dict[str, Any] | None:
    """The newest record of a file, as far as it is written."""
    try:
        whole, _, _ = path.read_bytes().rpartition(b"\n")
    except FileNotFoundError:
        return None
    return json.loads(whole.splitlines()[-1]) if whole else None


def judged(found: list[Sample], process: int) -> tuple[str, bool]:
    """What became of a process between the second quarter and the last, and whether that is flat."""
    mine = [one for one in found if one.process == process]
    quarter = max(len(mine) // 4, 1)
    early, late = mine[quarter : 2 * quarter] or mine, mine[-quarter:]
    parts, flat = [], True
    for name, bound in MAY_GROW.items():
        old, new = (statistics.median(getattr(one, name) for one in some) for some in (early, late))
        parts.append(f"{name} {old:,.0f} -> {new:,.0f}")
        flat &= new - old <= bound
    compiled = late[-1].compilations - early[0].compilations
    return f"process {process}: {', '.join(parts)}, {compiled} compilations after warming up", flat and not compiled


def soak(root: Path, hours: float, processes: int, every: float) -> int:
    """The run; the exit code."""
    write_world(root, 2000, 40)
    hosts = Hosts(words(root, every), root / "logs", processes=processes, environment={"JAX_LOG_COMPILES": "1"})
    found = []
    with (root / "samples.jsonl").open("w") as file:
        for sample in samples(hosts, root, 3600 * hours, every):
            found.append(sample)
            file.write(json.dumps(sample._asdict()) + "\n")
            file.flush()
    hosts.send(processes - 1, signal.SIGTERM)
    codes, said = hosts.ends(900), [judged(found, number) for number in range(processes)]
    print(f"{found[-1].seconds / 3600:.2f} h, {found[-1].step:,} steps of {processes} processes; exit codes {codes}")
    print("\n".join(text for text, _ in said))
    return int(codes != [STOPPED] * processes or not all(flat for _, flat in said))


def main() -> int:
    """Run, look, and judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hours", type=float, default=2)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--every", type=float, default=30)
    parser.add_argument("--work", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = options.work or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        return soak(root, options.hours, options.processes, options.every)


if __name__ == "__main__":
    sys.exit(main())
