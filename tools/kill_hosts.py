"""Kills one process of a run of several at random moments, and sees that all end and that the run goes on.

    python tools/kill_hosts.py [--kills 60] [--processes 2] [--timeout 10] [--start-timeout 60] [--seed 0]
                               [--apart] [--work FOLDER]

A small run of `dpo_jax.train` (tokenising, reference, evaluations with answers, checkpoints, export) is made without
interruption, and then killed with SIGKILL, one process at a time, at moments drawn over its whole length: while it
starts, encodes, computes the reference, compiles, makes steps, saves, evaluates or exports. After each kill all other
processes must be gone within the timeout (`distributed.timeout`) and ten seconds; where the one that was killed had not
yet joined the others, so that none of them knew of it, within `distributed.start_timeout` and ten seconds. The same
command then goes on, and is killed again. A run that reaches its end must have the weights and losses of the
uninterrupted one, bit for bit. With --apart each process has an output folder of its own, as on hosts that share no
disk. Needs dpo_jax to be importable, and the project's tests folder. Exit code 1 if anything
was otherwise.
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
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dpo_jax.files import file_digest  # noqa: E402
from dpo_jax.reporting.journal import read_records  # noqa: E402
from tests.support.hosts import Hosts  # noqa: E402
from tests.support.worlds import settings_in, write_world  # noqa: E402

GRACE = 10
"""Seconds beside the timeout in which all processes must be gone."""


NOT_JOINED = "did not find the others"


class Runs(NamedTuple):
    """Runs below a folder, of so many processes, which have an output folder in common unless they are `apart`."""

    root: Path
    processes: int
    limits: "Limits"
    apart: bool

    def start(self, name: str) -> Hosts:
        """Start a run, or go on with it."""
        command = words(self.root, Path("run") if self.apart else self.root / name, self.limits)
        where = self.root / name if self.apart else None
        return Hosts(command, self.root / "logs", processes=self.processes, apart=where)

    def output(self, name: str) -> Path:
        """The folder in which process 0 writes."""
        return self.root / name / "0" / "run" if self.apart else self.root / name

    def forget(self, name: str) -> None:
        """Delete a run, wherever it lies."""
        shutil.rmtree(self.root / name)


class Limits(NamedTuple):
    """Seconds: `distributed.timeout`, and `distributed.start_timeout`."""

    step: int
    start: int

    def of(self, said: str) -> int:
        """The one that counts for a process that ends with these words, and what is granted beside it."""
        return GRACE + (self.start if NOT_JOINED in said else self.step)


def words(root: Path, output: Path, limits: Limits) -> list[str]:
    """The command, less the interpreter."""
    given = settings_in(root) | {
        "steps": 60,
        "checkpoint.every": 5,
        "evaluation.every": 10,
        "distributed.timeout": limits.step,
        "distributed.start_timeout": limits.start,
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
    parser.add_argument("--start-timeout", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--apart", action="store_true")
    parser.add_argument("--work", type=Path, default=None)
    options = parser.parse_args()
    os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
    with tempfile.TemporaryDirectory() as temporary:
        root = options.work or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        write_world(root, 48, 12)
        limits = Limits(options.timeout, options.start_timeout)
        return kill(Runs(root, options.processes, limits, options.apart), options.kills, random.Random(options.seed))


def kill(runs: Runs, kills: int, draw: random.Random) -> int:
    """So many kills; the exit code."""
    output, processes = runs.output("run"), runs.processes
    began = time.monotonic()
    codes = runs.start("whole").ends()
    length = time.monotonic() - began
    assert codes == [0] * processes, codes
    wanted, faults = result(runs.output("whole")), 0
    at, late, ends = Counter[str](), dict[int, float](), Counter[str]()
    print(f"uninterrupted: {length:.0f} s", flush=True)
    done = 0
    while done < kills:
        hosts = runs.start("run")
        moment, who = draw.uniform(0.02, 0.9) * length, draw.randrange(processes)
        hosts.until(lambda: False, moment)
        if any(one.poll() is None for one in hosts.all):
            done += 1
            at[stage := where(hosts.said(0))] += 1
            took, bound = end_of_others(hosts, who, runs.limits)
            late[bound] = max(late.get(bound, 0.0), took)
            faults += took > bound
            ends[str([one.poll() for number, one in enumerate(hosts.all) if number != who])] += 1
            hosts.close()
            text = f"kill {done}: process {who} in {stage}; others gone after {took:.1f} of {bound} s"
            print(f"{text}; {failed(output)}", flush=True)
        else:
            faults += compared(hosts.ends(), output, wanted, processes)
            runs.forget("run")
    hosts = runs.start("run")
    faults += compared(hosts.ends(), output, wanted, processes)
    longest = ", ".join(f"{took:.1f} of {bound} s" for bound, took in sorted(late.items()))
    print(f"{kills} kills {dict(at)}, longest ends {longest}, exit codes {dict(ends)}, {faults} faults")
    return int(faults > 0)


def end_of_others(hosts: Hosts, who: int, limits: Limits) -> tuple[float, int]:
    """Kill a process. Returns the seconds until all others were gone, and those that they have."""
    hosts.send(who, signal.SIGKILL)
    began = time.monotonic()
    others = [one for number, one in enumerate(hosts.all) if number != who]
    hosts.until(lambda: all(one.poll() is not None for one in others), max(limits) + 2 * GRACE)
    took = time.monotonic() - began
    return took, max(limits.of(hosts.said(number)) for number in range(len(hosts.all)))


def failed(output: Path) -> object:
    """What the run's record says of why it ended."""
    path = output / "run.json"
    return json.loads(path.read_text()).get("ends") if path.exists() else None


def compared(codes: list[int | None], output: Path, wanted: object, processes: int) -> int:
    """1 if a run that came to its end is not the uninterrupted one."""
    same = codes == [0] * processes and result(output) == wanted
    print(f"a run came to its end: {'the same' if same else f'NOT the same: {codes}'}", flush=True)
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
