"""Kills a training run again and again, lets it resume, and checks that weights and metrics are the same bit for bit.

python tools/kill_resume.py CONFIG [key=value ...] [--kills 10] [--seed 0] [--work FOLDER] [--module dpo_jax.train]

The run is made once without interruption, then killed with SIGKILL (half of the kills at a random moment, half while a
checkpoint is being written) and started again by the same command. A killed run that reaches its end is compared; while
kills are left, another one is begun. Needs dpo_jax to be importable. Exit code 0 if every finished run equals the
uninterrupted one, 1 if not.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_jax.reporting.metrics import TIME_FIELDS

POLL_SECONDS = 0.001


@dataclass(frozen=True)
class Program:
    """A training command whose output folder is still open, and where its messages go."""

    module: str
    arguments: list[str]
    log: Path

    def start(self, output: Path) -> subprocess.Popen[bytes]:
        """Run it, in a process group of its own so that a kill reaches everything it started."""
        command = [sys.executable, "-m", self.module, *self.arguments, f"output={output}"]
        with self.log.open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


@dataclass(frozen=True)
class Kill:
    """When to kill: `seconds` after the start, or after the start of the `save`-th save of this start."""

    seconds: float
    save: int | None

    def __str__(self) -> str:
        """The moment in words."""
        return "at a random moment" if self.save is None else f"{1000 * self.seconds:.0f} ms into save {self.save}"


def draw_kills(count: int, wall: float, rng: random.Random) -> list[Kill]:
    """By turns a moment between 0.1 and 0.95 of the uninterrupted time, and 0 to 50 ms into one of the next saves."""
    return [
        Kill(rng.uniform(0, 0.05), rng.randint(1, 3)) if index % 2 else Kill(rng.uniform(0.1, 0.95) * wall, None)
        for index in range(count)
    ]


def sooner(kill: Kill) -> list[Kill]:
    """A kill in place of one whose moment a whole run did not reach; none if the run saves nothing."""
    if kill.save is None:
        return [Kill(kill.seconds / 2, None)]
    return [Kill(kill.seconds, kill.save - 1)] if kill.save > 1 else []


def partial_saves(output: Path) -> set[str]:
    """Names of the checkpoints that are being written, or whose writing was killed."""
    folder = output / "checkpoints"
    return {path.name for path in folder.iterdir() if "orbax-checkpoint-tmp" in path.name} if folder.is_dir() else set()


def newest_checkpoint(output: Path) -> int | None:
    """The highest step that was sealed."""
    found = (output / "checkpoints").glob("*/manifest.json")
    return max((int(path.parent.name) for path in found if path.parent.name.isdigit()), default=None)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> bool:
    """Whether the condition came true before the process ended."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(POLL_SECONDS)
    return False


def save_counter(output: Path, number: int) -> Callable[[], bool]:
    """A condition: the `number`-th new checkpoint has begun to be written."""
    present, begun = partial_saves(output), 0

    def reached() -> bool:
        nonlocal present, begun
        now = partial_saves(output)
        begun, present = begun + len(now - present), now
        return begun >= number

    return reached


def run_and_kill(program: Program, output: Path, kill: Kill) -> bool:
    """Start the run and kill it at its moment; False if it ended before."""
    reached_save = save_counter(output, kill.save) if kill.save is not None else lambda: True
    process = program.start(output)
    try:
        if not wait_for(reached_save, process):
            return expect_success(process, program)
        due = time.monotonic() + kill.seconds
        if not wait_for(lambda: time.monotonic() >= due, process):
            return expect_success(process, program)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return True


def expect_success(process: subprocess.Popen[bytes], program: Program) -> bool:
    """False if the run ended well by itself; a run that fails by itself ends the whole check."""
    if process.wait() != 0:
        tail = program.log.read_text(errors="replace")[-3000:]
        raise SystemExit(f"the run failed by itself with exit code {process.returncode}:\n{tail}")
    return False


def metrics(output: Path) -> list[dict[str, Any]]:
    """Records of metrics.jsonl without the fields that hold times and speeds; a line cut by a kill is kept as text."""
    path, records = output / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            record = {"unreadable line": line}
        records.append({name: value for name, value in record.items() if name.removeprefix("eval_") not in TIME_FIELDS})
    return records


def weights(output: Path) -> dict[str, str]:
    """Digest of each safetensors file of the exported folder, by name."""
    folder, found = output / "model", {}
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def ended(output: Path) -> dict[str, Any]:
    """How the run says that it ended: which step is the best, and whether it stopped early."""
    known = json.loads((output / "run.json").read_text())
    return {name: known.get(name) for name in ("finished", "best", "stopped")}


def differences(reference: Path, killed: Path) -> list[str]:
    """What is not equal in two finished runs, one line each; a run without weights or metrics is not equal to any."""
    want, got, lines = weights(reference), weights(killed), []
    if not want:
        lines.append(f"{reference / 'model'} holds no safetensors file")
    lines += [f"model/{name} differs" for name in sorted(want | got) if want.get(name) != got.get(name)]
    if ended(reference) != ended(killed):
        lines.append(f"run.json says {ended(killed)} instead of {ended(reference)}")
    rows, other = metrics(reference), metrics(killed)
    if not rows:
        lines.append(f"{reference / 'metrics.jsonl'} holds no record")
    if len(rows) != len(other):
        lines.append(f"metrics.jsonl has {len(other)} records instead of {len(rows)}")
    changed = [(a, b) for a, b in zip(rows, other, strict=False) if json.dumps(a) != json.dumps(b)]
    if changed:
        lines.append(
            f"metrics.jsonl: {len(changed)} records differ, the first: {changed[0][1]} instead of {changed[0][0]}"
        )
    return lines


def report_kill(number: int, kill: Kill, seconds: float, output: Path) -> int:
    """Print what a kill left behind; 1 if it left a partly written checkpoint."""
    left = sorted(partial_saves(output))
    step = next((record["step"] for record in reversed(metrics(output)) if "step" in record), None)
    print(
        f"kill {number:3d}  {kill}, {seconds:.2f} s after the start: metrics to step {step}, "
        f"checkpoint {newest_checkpoint(output)}, partly written {', '.join(left) or 'none'}",
        flush=True,
    )
    return int(bool(left))


def killed_runs(program: Program, reference: Path, work: Path, kills: list[Kill]) -> list[str]:
    """Run and kill until every kill is spent and the last run has ended; all differences found."""
    problems, waiting, landed, partly, runs = [], list(kills), 0, 0, 0
    while waiting:
        runs += 1
        output, before = work / f"killed-{runs}", landed
        while True:
            kill = waiting[0] if waiting else Kill(float("inf"), None)
            began = time.monotonic()
            if not run_and_kill(program, output, kill):
                break
            landed += 1
            waiting.pop(0)
            partly += report_kill(landed, kill, time.monotonic() - began, output)
        if landed == before:
            waiting[:1] = sooner(waiting[0])
        found = differences(reference, output)
        print(f"run {runs} ended after {landed - before} kills: {'; '.join(found) or 'equal'}", flush=True)
        problems += found
    print(f"{landed} of {len(kills)} kills in {runs} runs, {partly} left a partly written checkpoint")
    return problems if landed else [*problems, "no run was killed"]


def main() -> int:
    """Make the uninterrupted run, the killed ones, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="an empty folder for the runs (default: a temporary one)")
    parser.add_argument("--module", default="dpo_jax.train", help="the command under test, as in python -m")
    arguments = parser.parse_intermixed_args()
    work = (arguments.work or Path(tempfile.mkdtemp(prefix="kill_resume_"))).absolute()
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()):
        parser.error(f"--work {work} is not empty")
    program = Program(arguments.module, [arguments.config, *arguments.overrides], work / "log.txt")
    began = time.monotonic()
    expect_success(program.start(work / "reference"), program)
    wall = time.monotonic() - began
    print(f"uninterrupted: {wall:.2f} s, {len(metrics(work / 'reference'))} records; seed {arguments.seed}", flush=True)
    kills = draw_kills(arguments.kills, wall, random.Random(arguments.seed))
    problems = killed_runs(program, work / "reference", work, kills)
    if problems:
        print(f"NOT EQUAL; the runs are in {work}")
        return 1
    print("equal: weights and metrics are those of the uninterrupted run, bit for bit")
    if arguments.work is None:
        shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
