"""Whole training steps on this device: seconds, useful arithmetic, memory, and what the profiler sees."""

import dataclasses
import gzip
import json
import os
import shutil
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tools.benching import compare
from tools.benching.compare import OURS, ROOT, Runner
from tools.device import models
from tools.runners.protocol import Spec

TRACED = 4
"""Steps at the end that the profiler disturbs."""


@dataclasses.dataclass(frozen=True)
class Work:
    """A training run that is timed."""

    size: str
    pairs: int = 32
    steps: int = 14
    warmup: int = 4
    settings: tuple[str, ...] = ()
    flags: str = ""
    """XLA_FLAGS."""


def prepared(work: Work, folder: Path, rate: float = 1e-4) -> tuple[Spec, dict[str, float]]:
    """The model, if it is not there yet, and the pairs; the spec of the run."""
    model = folder / work.size
    if not model.exists():
        models.write_model(model, work.size)
    pairs = folder / "pairs.jsonl"
    vocabulary = json.loads((model / "config.json").read_text("utf-8"))["vocab_size"]
    means = models.write_pairs(pairs, work.pairs * work.steps, vocabulary)
    spec = Spec(
        model=str(model),
        pairs=str(pairs),
        pairs_per_step=work.pairs,
        steps=work.steps,
        warmup=work.warmup,
        dtype="bfloat16",
        learning_rate=rate,
        beta1=0.9,
        beta2=0.999,
        epsilon=1e-8,
        clip_norm=1.0,
        beta=0.1,
        max_length=models.LONGEST,
        reference="precomputed",
        threads=len(os.sched_getaffinity(0)),
        pad_id=0,
    )
    return spec, means


def step_time(work: Work, folder: Path, trace: Path | None = None) -> dict[str, Any]:
    """Run it by the stopwatch's own runner; seconds of a step, its useful arithmetic, and the device's memory."""
    spec, means = prepared(work, folder)
    path = folder / "spec.json"
    spec.write(path)
    script = str(ROOT / "tools" / "runners" / "ours.py")
    os.environ["XLA_FLAGS"] = work.flags
    runner = Runner(OURS, sys.executable, script)
    run = compare.execute(runner, path, 0, 600.0, (*(["--trace", str(trace)] if trace else []), *work.settings))
    found: dict[str, Any] = {"work": dataclasses.asdict(work), "mean_tokens": means}
    if run.problem:
        return found | {"failed": run.problem}
    seconds = [event["wall"] for event in run.of("step")[work.warmup : -TRACED]]
    (done,) = run.of("done")
    found |= {
        "seconds": statistics.median(seconds),
        "all_seconds": [round(event["wall"], 4) for event in run.of("step")],
        "losses": run.losses,
        "reference_seconds": [event["wall"] for event in run.of("reference")],
        "device_peak_bytes": done.get("device_peak_bytes"),
        "row_shapes": done["row_shapes"],
        "compile_seconds": done["compile_wall"],
        "late_compilations": done["late_compilations"],
        "tokens": done["tokens"],
        "slots": done["slots"],
        "first_step": run.of("ready")[0]["wall"] + run.of("step")[0]["wall"],
    }
    return found | utilisation(done["useful_flops"], found["seconds"])


def utilisation(flops: float, seconds: float) -> dict[str, float]:
    """Useful operations of a step, and how many of them are done a second."""
    return {"useful_tflop": flops / 1e12, "useful_tflops": flops / 1e12 / seconds}


def rivals(work: Work, folder: Path, repeats: int) -> dict[str, Any]:
    """dpo_jax and TRL in turn on the same pairs and this device."""
    spec, means = prepared(work, folder)
    programs = [
        Runner(name, sys.executable, str(ROOT / "tools" / "runners" / f"{file}.py"))
        for name, file in ((OURS, "ours"), ("trl", "trl"))
    ]
    runs = compare.alternate(programs, spec, repeats, 400.0, lambda line: print(line, flush=True))
    walls = {run.runner + f" {run.repeat + 1}": [round(event["wall"], 4) for event in run.of("step")] for run in runs}
    losses = {run.runner + f" {run.repeat + 1}": run.losses for run in runs}
    return {
        "work": dataclasses.asdict(work),
        "mean_tokens": means,
        "summary": compare.summary(runs, spec),
        "seconds": walls,
        "losses": losses,
    }


def kernels(trace: Path, keep: Path | None = None, most: int = 40) -> dict[str, Any]:
    """What the profiler saw on the device: milliseconds and launches by kernel, the longest first.

    `keep` is where a copy of the trace goes, for a viewer.
    """
    files = sorted(trace.rglob("*.trace.json.gz"))
    if not files:
        return {"failed": "the profiler left no trace"}
    events = json.loads(gzip.decompress(files[-1].read_bytes()))["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event.get("name") == "process_name"}
    lines = {
        (event["pid"], event["tid"]): event["args"]["name"] for event in events if event.get("name") == "thread_name"
    }
    time, count = Counter(), Counter()
    for event in events:
        place = (event.get("pid"), event.get("tid"))
        if event.get("ph") == "X" and "GPU" in names.get(place[0], "") and "Stream" in lines.get(place, ""):
            time[event["name"]] += event["dur"] / 1000
            count[event["name"]] += 1
    if keep is not None:
        shutil.copyfile(files[-1], keep)
    table = [{"kernel": name[:120], "ms": round(ms, 3), "launches": count[name]} for name, ms in time.most_common(most)]
    return {"ms": round(sum(time.values()), 3), "launches": sum(count.values()), "kernels": table}
