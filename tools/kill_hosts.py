"""Kills one process of a run of several at random moments, and sees that all end and that the run goes on.

    python tools/kill_hosts.py [--kills 60] [--processes 2] [--timeout 10] [--seed 0] [--work FOLDER]

A small run of `dpo_jax.train` (tokenising, reference, evaluations with answers, checkpoints, export) is made without
interruption, and then killed with SIGKILL, one process at a time, at moments drawn over its whole length: while it
starts, encodes, computes the reference, compiles, makes steps, saves, evaluates or exports. After each kill all other
processes must be gone within the timeout (`distributed.timeout`) and ten seconds; the same command then goes on, and is
killed again. A run that reaches its end must have the weights and losses of the uninterrupted one, bit for bit. Needs
dpo_jax to be importable, and the project's tests folder. Exit code 1 if anything was otherwise.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dpo_jax.files import file_digest  # noqa: E402
from dpo_jax.reporting.journal import read_records  # noqa: E402
from tests.support.hosts import Hosts  # noqa: E402
from tests.support.worlds import settings_in, write_world  # noqa: E402

GRACE = 10
"""Seconds beside the timeout in which all processes must be gone."""


def words(root: Path, output: Path, timeout: int) -> list[str]:
    """The command, less the interpreter."""
    given = settings_in(root) | {
        "steps": 60,
        "checkpoint.every": 5,
        "evaluation.every": 10,
        "distributed.timeout": timeout,
        "distributed.start_timeout": 300,
        "output": output,
    }
    return ["-m", "dpo_jax.train", *(f"{key}={value}" for key, value in given.items())]


def result(output: Path) -> tuple[dict[str, str], list[tuple[int, float | None]]]:
    """Digests of the exported weights, and the losses."""
    weights = {path.name: file_digest(path) for path in sorted((output / "model").glob("*.safetensors"))}
    return weights, [(record["step"], record.get("loss")) for record in read_records(output / "metrics.jsonl")]


def where(said: str) -> str:
    """What a run was doing, by the last thing that process 0 said of it."""
    marks = {
        "exporting": "export",
        "evaluation after": "steps",
        "training": "steps",
        "compiling 1": "compiling",
        "evaluating": "evaluation",
        "reference": "reference",
        "data.train": "data",
    }
    return (
        max((said.rfind(mark), name) for mark, name in marks.items())[1] if any(m in said for m in marks) else "start"
    )


def main() -> int:
    """Kill and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--timeout", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=None)
    options = parser.parse_args()
    os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
    with tempfile.TemporaryDirectory() as temporary:
        root = options.work or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        write_world(root, 48, 12)
        return kill(root, options.kills, options.processes, options.timeout, random.Random(options.seed))


def kill(root: Path, kills: int, processes: int, timeout: int, draw: random.Random) -> int:
    """So many kills; the exit code."""
    whole, output = root / "whole", root / "run"
    began = time.monotonic()
    codes = Hosts(words(root, whole, timeout), root / "logs", processes=processes).ends()
    length = time.monotonic() - began
    assert codes == [0] * processes, codes
    wanted, faults, at, longest, ends = result(whole), 0, Counter[str](), 0.0, Counter[str]()
    print(f"uninterrupted: {length:.0f} s", flush=True)
    done = 0
    while done < kills:
        hosts = Hosts(words(root, output, timeout), root / "logs", processes=processes)
        moment, who = draw.uniform(0.02, 0.9) * length, draw.randrange(processes)
        hosts.until(lambda: False, moment)
        if any(one.poll() is None for one in hosts.all):
            done += 1
            at[stage := where(hosts.said(0))] += 1
            hosts.send(who, signal.SIGKILL)
            killed = time.monotonic()
            others = [one for number, one in enumerate(hosts.all) if number != who]
            gone = hosts.until(lambda others=others: all(one.poll() is not None for one in others), timeout + GRACE)
            took = time.monotonic() - killed
            longest, faults = max(longest, took), faults + (not gone)
            ends[str([one.poll() for one in others])] += 1
            hosts.close()
            why = (
                json.loads((output / "run.json").read_text()).get("failed") if (output / "run.json").exists() else None
            )
            print(f"kill {done}: process {who} in {stage}; the others were gone after {took:.1f} s; {why}", flush=True)
        else:
            faults += compared(hosts.ends(), output, wanted, processes)
            shutil.rmtree(output)
    hosts = Hosts(words(root, output, timeout), root / "logs", processes=processes)
    faults += compared(hosts.ends(), output, wanted, processes)
    print(f"{kills} kills {dict(at)}, longest end {longest:.1f} s, exit codes {dict(ends)}, {faults} faults")
    return int(faults > 0)


def compared(codes: list[int | None], output: Path, wanted: object, processes: int) -> int:
    """1 if a run that came to its end is not the uninterrupted one."""
    same = codes == [0] * processes and result(output) == wanted
    print(f"a run came to its end: {'the same' if same else f'NOT the same: {codes}'}", flush=True)
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
