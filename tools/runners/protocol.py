"""What every runner of the stopwatch shares: the spec that it is given and the lines that it prints.

    PYTHON tools/runners/NAME.py SPEC.json

A runner trains by DPO on the pairs of the spec, in the order of the file, `pairs_per_step` of them in each step, and
prints one JSON object per line on stdout:

    {"event": "ready", "wall": s, "cpu": s}                     all before the first step is done; since the start
    {"event": "reference", "wall": s, "cpu": s, "pairs": n}     the reference of so many pairs, where it was a phase
                                                                of its own ("reference": "precomputed"); may
                                                                have "compile_wall", what of it went into compiling
    {"event": "step", "step": i, "loss": x, "wall": s, "cpu": s, "pairs": n}   i from 0; the device has finished it
    {"event": "done", "peak_bytes": b, "versions": {...}}       and "device_peak_bytes" where an accelerator tells it

Seconds are wall seconds and CPU seconds (user + system, all threads of the process). Those of `ready` count from the
start of the process and contain those of `reference`; those of a step count from the event before it. AdamW has no
weight decay and a constant learning rate; the gradient is clipped to the norm `clip_norm`; no dropout, no shuffling.
Master weights, moments and the update are float32. The loss of a step is the mean over its pairs of
-log S(beta (u_w - u_l)); the reference are the weights that training starts from.

This module needs nothing but Python's standard library, and runs in every rival's environment, Python >= 3.10. A runner
imports it first of all: it takes the runners' folder off the path, where `trl.py` would stand before the package trl.
"""

import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

_IMPORTED = time.time()
_HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE]


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is run: the same for every runner."""

    model: str
    """Hugging Face folder."""
    pairs: str
    """JSONL file of pairs in step order: {"prompt_ids": [...], "chosen_ids": [...], "rejected_ids": [...]}."""
    pairs_per_step: int
    steps: int
    """Steps in all, those of the warm-up included."""
    warmup: int
    """First steps that the driver leaves out of its figures. Runners run them as they run any other."""
    dtype: str
    """Of activations and matrix products: "float32" or "bfloat16". The weights that are trained are float32."""
    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    clip_norm: float | None
    beta: float
    """DPO's."""
    max_length: int
    """No prompt with an answer is longer, in tokens. The pairs are cut to it already."""
    reference: str
    """When it is computed: "precomputed", before the first step; "default", as the library does unless told."""
    threads: int
    """Threads that a library may use on a CPU; the process is bound to as many CPUs (see `spec_of_command_line`)."""
    pad_id: int
    adapter: str | None = None
    """PEFT folder of the adapter that is trained, in place of the model; the reference is the model without it."""

    @staticmethod
    def read(path: str | Path) -> "Spec":
        """The spec of a file.

        Raises:
          ValueError: a key is missing or unknown.
        """
        values = json.loads(Path(path).read_text("utf-8"))
        names = {field.name for field in dataclasses.fields(Spec)}
        if set(values) != names:
            raise ValueError(
                f"{path}: keys differ from a spec's: {sorted(set(values) ^ names)}; run it by tools/bench.py"
            )
        return Spec(**values)

    def write(self, path: str | Path) -> None:
        """Write the file that `read` reads."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", "utf-8")

    def rows(self) -> list[dict[str, list[int]]]:
        """The pairs of all steps, `steps * pairs_per_step` of them.

        Raises:
          ValueError: the file has fewer.
        """
        wanted = self.steps * self.pairs_per_step
        with open(self.pairs, encoding="utf-8") as file:
            rows = [json.loads(line) for _, line in zip(range(wanted), file, strict=False)]
        if len(rows) < wanted:
            raise ValueError(f"{self.pairs}: {len(rows)} pairs; {self.steps} steps need {wanted}")
        return rows

    def batches(self) -> list[list[dict[str, list[int]]]]:
        """The pairs by step."""
        rows, size = self.rows(), self.pairs_per_step
        return [rows[step * size : (step + 1) * size] for step in range(self.steps)]


def spec_of_command_line(*, more: bool = False) -> Spec:
    """The spec that the command line names. Binds the process to its threads, before any library counts the CPUs.

    Says how it is used and stops if the command line names none, or says `more` where a runner takes no more.
    """
    if len(sys.argv) < 2 or (len(sys.argv) > 2 and not more):
        sys.exit(f"usage: {sys.argv[0]} SPEC.json; tools/bench.py writes the file and calls this")
    spec = Spec.read(sys.argv[1])
    bind(spec.threads)
    return spec


def bind(threads: int) -> None:
    """Let this process run on so many CPUs, and tell the libraries that ask for a number of threads.

    Raises:
      ValueError: there are fewer.
    """
    os.environ |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if not hasattr(os, "sched_setaffinity"):  # not Linux: the two variables must do
        return
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < threads:
        raise ValueError(f"threads: {threads} is more than the {len(allowed)} CPUs there are; give fewer")
    os.sched_setaffinity(0, allowed[:threads])


class Events:
    """Prints the events of a run. Make it first of all, before heavy imports: it takes over stdout.

    What libraries print goes to stderr from then on, so that stdout has events only.
    """

    def __init__(self):
        """Start of the run; the clock counts from the start of the process where the system tells it."""
        self._out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._started = process_start()
        self._wall, self._cpu = time.perf_counter(), cpu_seconds()

    def ready(self) -> None:
        """All before the first step is done. Whatever comes now is counted as a step's."""
        self._emit(event="ready", wall=time.time() - self._started, cpu=cpu_seconds())
        self.restart()

    def reference(self, wall: float, cpu: float, pairs: int, compile_wall: float = 0.0) -> None:
        """The reference of so many pairs took that long; printed before `ready`, which contains it.

        Of `wall`, `compile_wall` went into compiling, if the runner can tell; it would not grow with the pairs.
        """
        self._emit(event="reference", wall=wall, cpu=cpu, pairs=pairs, compile_wall=compile_wall)

    def step(self, step: int, loss: float, pairs: int) -> None:
        """A step (from 0) is finished on the device, and the next one's clock starts now."""
        wall, cpu = time.perf_counter(), cpu_seconds()
        self._emit(event="step", step=step, loss=float(loss), wall=wall - self._wall, cpu=cpu - self._cpu, pairs=pairs)
        self._wall, self._cpu = wall, cpu

    def restart(self) -> None:
        """Time the next step from now. For work between steps that is no part of any."""
        self._wall, self._cpu = time.perf_counter(), cpu_seconds()

    def done(self, packages: Sequence[str], device_peak_bytes: int | None = None, **more: Any) -> None:
        """The end: peak memory, and the versions of these packages. `more` is what else is worth keeping."""
        more |= {} if device_peak_bytes is None else {"device_peak_bytes": device_peak_bytes}
        self._emit(event="done", peak_bytes=peak_bytes(), versions=versions(packages), **more)

    def _emit(self, **event: Any) -> None:
        print(json.dumps(event), file=self._out, flush=True)


def cpu_seconds() -> float:
    """User and system seconds of this process, all its threads."""
    return time.process_time()


def peak_bytes() -> int:
    """The most resident memory that this process has had. Its own: what forked it does not count, as in ru_maxrss."""
    try:
        for line in Path("/proc/self/status").read_text("ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def process_start() -> float:
    """When this process started, as time.time() has it: Linux tells it to 10 ms; elsewhere, when this was imported."""
    try:
        ticks = int(Path("/proc/self/stat").read_text("ascii").rpartition(")")[2].split()[19])
        age = float(Path("/proc/uptime").read_text("ascii").split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except OSError:
        return _IMPORTED
    return time.time() - age


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of those of the packages that are installed, and Python's."""
    found = {"python": sys.version.split()[0]}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
