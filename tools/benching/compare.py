"""Runs of several programs on one spec, in turn, and what is made of them: figures, agreement of losses, ratios.

Letters of the docstrings: a *runner* is a program, an *event* a line that it prints (see runners/protocol.py), a *run*
one execution of a runner.
"""

import dataclasses
import json
import math
import os
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tools.runners.protocol import Spec

OURS = "dpo_jax"
ROOT = Path(__file__).resolve().parents[2]


class Bound(NamedTuple):
    """When losses are the same: `tolerance` of one pair's loss in nats, and how many of them losses must move."""

    tolerance: float
    averages: bool
    """Whether what differs is noise of each pair by itself, which a step's mean over n pairs divides by sqrt(n)."""
    moved: float


BOUNDS = {"float32": Bound(2e-4, False, 5.0), "bfloat16": Bound(6e-2, True, 2.0)}
"""By dtype, how far two programs' losses of a step may be apart, and how far they must have moved from ln 2.

float32: a completion's log-probability is a sum of some -1,000 nats, good to 1e-4; beta 0.1 and the mean over pairs
leave 1e-5 of that, and weights trained by the same gradients in another order of sums add as much. Against TRL, 6e-6
was measured after six steps. bfloat16 keeps 3 digits of each activation: after six steps of two pairs, losses were 3e-2
apart, where 4e-2 is allowed; of eight pairs, 2e-2 is. That is rough, so compare in float32 as well.

Losses that hardly move cannot tell anything: every program begins at ln 2, whatever else it gets wrong.
"""
QUIET = 0.08
"""Share of the machine's CPU time that others may use in a run before its wall times count as disturbed."""


@dataclasses.dataclass(frozen=True)
class Runner:
    """A program: the interpreter of its environment, and its script."""

    name: str
    python: str
    script: str

    def command(self, spec: Path) -> list[str]:
        """What to execute."""
        return [self.python, self.script, str(spec)]


@dataclasses.dataclass(frozen=True)
class Run:
    """One execution. `problem` is empty where it went to its end."""

    runner: str
    repeat: int
    events: list[dict[str, Any]]
    problem: str
    others: float
    """Share of the machine's CPU time that went to other processes meanwhile."""

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind."""
        return [event for event in self.events if event["event"] == kind]

    @property
    def losses(self) -> list[float]:
        """Losses of the steps, in nats."""
        return [float(event["loss"]) for event in self.of("step")]


@dataclasses.dataclass(frozen=True)
class Figures:
    """What one run cost. Seconds are wall seconds unless they are said to be CPU seconds."""

    pairs_per_second: float
    cpu_per_pair: float
    """CPU seconds."""
    with_reference: float
    """Pairs per second where each pair's reference is computed once and used once, that is, in one epoch."""
    cpu_with_reference: float
    """CPU seconds of a pair and its reference."""
    peak_bytes: int
    device_peak_bytes: int | None
    first_step: float
    """From the start of the process to the end of the first step, compiling and all."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Whether a run's losses are those of another."""

    agrees: bool
    worst: float
    """Largest difference of a step's losses, in nats."""
    moved: float
    """How far the losses went from where they began, in nats."""
    reason: str
    """Why not; empty where they agree."""


# ---------------------------------------------------------------------------------------------- running


def alternate(
    runners: Sequence[Runner], spec: Spec, repeats: int, timeout: float, say: Callable[[str], None]
) -> list[Run]:
    """Runs in turn, A B A B ..., so that what else the machine does meets all of them alike.

    A runner that failed is not asked again.
    """
    runs: list[Run] = []
    failed: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spec.json"
        spec.write(path)
        for repeat in range(repeats):
            for runner in runners:
                if runner.name in failed:
                    continue
                run = execute(runner, path, repeat, timeout)
                runs.append(run)
                if run.problem:
                    failed.add(runner.name)
                say(line_of(run, spec))
    return runs


def execute(runner: Runner, spec: Path, repeat: int, timeout: float, more: Sequence[str] = ()) -> Run:
    """One run. stdout has its events; the end of stderr is the problem, should there be one."""
    before, started = _Clock.now(), time.perf_counter()
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    try:
        command = [*runner.command(spec), *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
        events, problem = parse(done.stdout)
        if done.returncode:
            problem = f"exit code {done.returncode}: {last_line(done.stderr, runner.python)}"
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        events, _ = parse(output)
        problem = f"not done after {time.perf_counter() - started:.0f} s; give --timeout"
    except OSError as error:
        events, problem = [], f"{Path(runner.python).name} cannot be started: {error.strerror}"
    return Run(runner.name, repeat, events, problem, _Clock.now().others_since(before))


def parse(stdout: str) -> tuple[list[dict[str, Any]], str]:
    """The events of a run's output, and what is wrong with it."""
    events = []
    for line in stdout.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            return events, f"printed what is no event: {line[:80]!r}"
        if not isinstance(event, dict) or "event" not in event:
            return events, f"printed what is no event: {line[:80]!r}"
        events.append(event)
    kinds = [event["event"] for event in events]
    missing = [kind for kind in ("ready", "step", "done") if kind not in kinds]
    return events, f"printed no event {missing[0]!r}" if missing else ""


def last_line(text: str, python: str) -> str:
    """The last line that says anything, less the folders of this machine, since it goes into the record."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else "nothing on stderr"
    return last.replace(str(Path(python).parent.parent), "VENV").replace(str(ROOT), ".")[:300]


@dataclasses.dataclass(frozen=True)
class _Clock:
    """CPU seconds of the machine and of this process's children, up to a moment."""

    busy: float
    idle: float
    children: float

    @classmethod
    def now(cls) -> "_Clock":
        times, used = psutil.cpu_times(), resource.getrusage(resource.RUSAGE_CHILDREN)
        busy = sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
        return cls(busy, times.idle + getattr(times, "iowait", 0.0), used.ru_utime + used.ru_stime)

    def others_since(self, before: "_Clock") -> float:
        """Share of the machine that neither idled nor ran the children."""
        busy, idle = self.busy - before.busy, self.idle - before.idle
        rest = busy - (self.children - before.children)
        return max(rest, 0.0) / (busy + idle) if busy + idle > 0 else 0.0


# ---------------------------------------------------------------------------------------------- judging


def figures(run: Run, warmup: int) -> Figures:
    """What a run cost a pair, its first `warmup` steps left out.

    On an accelerator the last one is left out, too: a program that runs ahead of the device reports a step when it
    hands over the next one, and the last together with the one before.

    Raises:
      ValueError: no step is left.
    """
    (done,) = run.of("done")
    on_device = done.get("device_peak_bytes") is not None
    steps = run.of("step")[warmup : -1 if on_device else None]
    pairs = sum(step["pairs"] for step in steps)
    if not pairs:
        raise ValueError(f"{run.runner}: {len(run.of('step'))} steps are no more than the warm-up of {warmup}")
    wall, cpu = (sum(step[clock] for step in steps) / pairs for clock in ("wall", "cpu"))
    # Compiling would take as long for a million pairs: it is part of the time to the first step, not of a pair's.
    reference = [(e["wall"] - e.get("compile_wall", 0.0), e["cpu"], e["pairs"]) for e in run.of("reference")]
    extra, extra_cpu = (sum(e[i] / e[2] for e in reference) for i in (0, 1))
    return Figures(
        pairs_per_second=1 / wall,
        cpu_per_pair=cpu,
        with_reference=1 / (wall + extra),
        cpu_with_reference=cpu + extra_cpu,
        peak_bytes=done["peak_bytes"],
        device_peak_bytes=done.get("device_peak_bytes"),
        first_step=run.of("ready")[0]["wall"] + run.of("step")[0]["wall"],
    )


def tolerance_of(dtype: str, pairs: int) -> float:
    """Largest difference of the losses of a step of so many pairs, in nats."""
    bound = BOUNDS[dtype]
    return bound.tolerance / (math.sqrt(pairs) if bound.averages else 1.0)


def agreement(ours: Sequence[float], theirs: Sequence[float], dtype: str, pairs: int) -> Agreement:
    """Whether two runs' losses are the same, step by step of so many pairs, and moved enough to tell."""
    tolerance = tolerance_of(dtype, pairs)
    if len(ours) != len(theirs):
        return Agreement(False, math.inf, 0.0, f"{len(theirs)} steps, not {len(ours)}")
    if not all(map(math.isfinite, [*ours, *theirs])):
        return Agreement(False, math.inf, 0.0, "a loss is not finite")
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    moved = max(abs(loss - ours[0]) for loss in ours)
    if worst > tolerance:
        step = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if abs(a - b) > tolerance)
        return Agreement(False, worst, moved, f"{theirs[step]:.6f}, not {ours[step]:.6f}, at step {step}")
    if moved < BOUNDS[dtype].moved * tolerance:
        return Agreement(
            False, worst, moved, f"losses moved by {moved:.1e} only, too little to tell; give more --steps"
        )
    return Agreement(True, worst, moved, "")


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Least, median and greatest of `ours / theirs`, repetition by repetition: above 1, ours is faster.

    For rates (pairs per second). Give seconds per pair the other way round.
    """
    found = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"min": min(found), "median": statistics.median(found), "max": max(found)}


def summary(runs: Sequence[Run], spec: Spec) -> dict[str, Any]:
    """By runner: median figures; and for a rival that agrees with ours, ratios; for one that does not, why.

    Every run is held against the first of ours, ours as well: if ours do not agree, nothing is
    believed.
    """
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        by_name.setdefault(run.runner, []).append(run)
    ours = by_name.get(OURS, [])
    problem = next((run.problem for run in ours if run.problem), "" if ours else "was not run")
    if problem:
        return {OURS: {"problem": problem}}
    base = [figures(run, spec.warmup) for run in ours]
    result = {name: _judged(found, ours, base, spec) for name, found in by_name.items()}
    return {OURS: result[OURS]} if "problem" in result[OURS] else result


def _judged(runs: Sequence[Run], ours: Sequence[Run], base: Sequence[Figures], spec: Spec) -> dict[str, Any]:
    if problem := next((run.problem for run in runs if run.problem), ""):
        return {"problem": problem}
    verdicts = [agreement(ours[0].losses, run.losses, spec.dtype, spec.pairs_per_step) for run in runs]
    result: dict[str, Any] = {
        "worst_difference": _finite(max(verdict.worst for verdict in verdicts)),
        "moved": min(verdict.moved for verdict in verdicts),
        "others": max(run.others for run in runs),
    }
    if reason := next((verdict.reason for verdict in verdicts if not verdict.agrees), ""):
        return result | {"problem": f"losses disagree: {reason}"}
    found = [figures(run, spec.warmup) for run in runs]
    result |= {field.name: _median([getattr(f, field.name) for f in found]) for field in dataclasses.fields(Figures)}
    if runs[0].runner == OURS:
        return result
    pairs = list(zip(base, found, strict=True))
    return result | {
        "ratio": ratios([a.pairs_per_second for a, _ in pairs], [b.pairs_per_second for _, b in pairs]),
        "ratio_cpu": ratios([b.cpu_per_pair for _, b in pairs], [a.cpu_per_pair for a, _ in pairs]),
        "ratio_with_reference": ratios([a.with_reference for a, _ in pairs], [b.with_reference for _, b in pairs]),
        "ratio_cpu_with_reference": ratios(
            [b.cpu_with_reference for _, b in pairs], [a.cpu_with_reference for a, _ in pairs]
        ),
    }


def _finite(value: float) -> float | None:
    """The value, or None where JSON has no word for it."""
    return value if math.isfinite(value) else None


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


# ---------------------------------------------------------------------------------------------- saying


def line_of(run: Run, spec: Spec) -> str:
    """One line for the terminal as a run ends."""
    head = f"{run.repeat + 1}  {run.runner:<9}"
    if run.problem:
        return f"{head} failed: {run.problem}"
    found = figures(run, spec.warmup)
    busy = f"  (others used {run.others:.0%} of the machine)" if run.others > QUIET else ""
    return (
        f"{head} {found.pairs_per_second:8.3f} pairs/s  {found.cpu_per_pair:8.3f} CPU-s/pair  "
        f"{found.peak_bytes / 2**30:5.2f} GiB  first step after {found.first_step:.1f} s{busy}"
    )


def lines_of(result: Mapping[str, Any]) -> list[str]:
    """The summary for the terminal."""
    lines = []
    for name, found in result.items():
        if "problem" in found:
            lines.append(f"{name}: {found['problem']}")
        elif "ratio" in found:
            lines.append(f"{name}: losses agree to {found['worst_difference']:.1e} (they moved {found['moved']:.1e})")
            for key, what in RATIOS.items():
                least, middle, most = (found[key][which] for which in ("min", "median", "max"))
                lines.append(f"  dpo_jax is {middle:.2f}x as fast ({least:.2f} to {most:.2f}), {what}")
    return lines


RATIOS = {
    "ratio": "steps, wall",
    "ratio_cpu": "steps, CPU",
    "ratio_with_reference": "one epoch with its reference, wall",
    "ratio_cpu_with_reference": "one epoch with its reference, CPU",
}
