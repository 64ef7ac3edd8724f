"""A sweep: one run for each combination of values of some settings, in folders of their own below one output folder.

The runs share one cache, so that data are tokenised once and reference log-probabilities are computed once wherever
runs have the same. Nothing here imports jax: a sweep starts `dpo_jax.train` in other processes.
"""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.config import run as config
from dpo_jax.config.run import Run
from dpo_jax.errors import COMMAND_LINE, UserError, short
from dpo_jax.files import digest_of, write_whole
from dpo_jax.reporting.journal import METRICS_FILE, read_records
from dpo_jax.reporting.metrics import BETTER, MEASURED, goodness, held_out_of, recorded
from dpo_jax.run import output

RECORD = "sweep.json"
"""What a sweep's folder says of it."""
POLL_SECONDS = 0.2
LONGEST_NAME = 80
"""Characters of a run's folder name; a longer one is cut and gets a digest."""
OPENING, CLOSING, QUOTES = "[{(", "]})", "\"'"


class Axis(NamedTuple):
    """A setting and the texts of its values, as they were given."""

    key: str
    values: tuple[str, ...]


class Point(NamedTuple):
    """One run of a sweep: its folder's name, the value that it has of each axis, and what `train` is called with."""

    name: str
    values: Mapping[str, str]
    words: tuple[str, ...]
    folder: Path


# ---------------------------------------------------------------------------------------------- what is swept


def parts_of(text: str) -> list[str]:
    """The values of a text, which commas stand between; those in brackets, braces and quotes divide nothing.

    >>> parts_of("0.1,0.3"), parts_of("[a.jsonl,b.jsonl]"), parts_of("{a: 1, b: 2},null")
    (['0.1', '0.3'], ['[a.jsonl,b.jsonl]'], ['{a: 1, b: 2}', 'null'])
    """
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in QUOTES and not parts[-1].strip():
            quote = letter
        elif letter in OPENING:
            depth += 1
        elif letter in CLOSING:
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += letter
    return [part.strip() for part in parts]


def axes_of(argv: Sequence[str]) -> tuple[list[Axis], list[str]]:
    """The words `key=a,b,...` as axes, and all other words.

    Raises:
      UserError: a value is missing or given twice, a setting is given twice, it cannot be swept, or nothing is.
    """
    axes, rest = [], []
    for word in argv:
        key, equals, text = word.removeprefix("--").partition("=")
        parts = parts_of(text) if equals and not os.path.isfile(word) else []
        if len(parts) > 1:
            axes.append(Axis(key.replace("-", "_"), tuple(parts)))
        else:
            rest.append(word)
    problems = [problem for axis in axes for problem in _problems(axis, axes, rest)]
    if not axes:
        problems.append(f"{COMMAND_LINE}: nothing to sweep; give a setting several values: objective.beta=0.05,0.1,0.3")
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return axes, rest


def _problems(axis: Axis, axes: Sequence[Axis], rest: Sequence[str]) -> Iterable[str]:
    key = short(axis.key)
    if "" in axis.values:
        yield f"{COMMAND_LINE}: {key}: a value is missing between two commas; leave one comma out"
    if len(set(axis.values)) < len(axis.values):
        yield f"{COMMAND_LINE}: {key}: a value is given twice; leave one out"
    given = sum(other.key == axis.key for other in axes)
    given += sum(word.removeprefix("--").partition("=")[0].replace("-", "_") == axis.key for word in rest)
    if given > 1:
        yield f"{COMMAND_LINE}: {key}: is given twice; keep one"
    if axis.key in ("output", "data.cache"):
        yield f"{COMMAND_LINE}: {key}: is of the whole sweep; give one value"


def combinations(axes: Sequence[Axis]) -> list[dict[str, str]]:
    """The value of each axis in each run, the last axis changing first."""
    keys = [axis.key for axis in axes]
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(axis.values for axis in axes))]


def check(axes: Sequence[Axis], words: Sequence[str]) -> Run:
    """Read the settings of every run; returns those of the first.

    Raises:
      UserError: some are not as they must be; each such line once.
    """
    runs, problems = [], {}
    for values in combinations(axes):
        try:
            runs.append(config.load([*words, *_assigned(values)], "sweep"))
        except UserError as error:
            problems |= dict.fromkeys(str(error).splitlines())
    if problems:
        raise UserError("\n".join(problems))
    return runs[0]


def _assigned(values: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def points_of(axes: Sequence[Axis], words: Sequence[str], folder: Path, cache: str) -> list[Point]:
    """A point for each combination of values, in folders below the sweep's."""
    points = []
    for values in combinations(axes):
        name = name_of(values)
        own = {**values, "output": json.dumps(str(folder / name)), "data.cache": json.dumps(cache)}
        points.append(Point(name, values, (*words, *_assigned(own)), folder / name))
    return points


def name_of(values: Mapping[str, str]) -> str:
    """A folder's name that says the values: `beta=0.1,learning_rate=1e-5`; whole keys where their ends are the same."""
    ends = [key.rsplit(".", 1)[-1] for key in values]
    names = ends if len(set(ends)) == len(ends) else list(values)
    pairs = zip(names, values.values(), strict=True)
    whole = ",".join(f"{name}={value}" for name, value in pairs)
    safe = re.sub(r"[^A-Za-z0-9_.,=+-]", "-", whole)
    return safe if safe == whole and len(safe) <= LONGEST_NAME else f"{safe[:LONGEST_NAME]}-{digest_of(whole)[:8]}"


def check_folder(folder: Path) -> None:
    """Refuse a folder that is a run's own, or that holds something else.

    Raises:
      UserError: names it.
    """
    if (folder / output.RUN_FILE).exists():
        raise UserError(f"output: {folder} holds a run of its own; name another folder for the sweep")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output: {folder} is a file; name a folder")
    names = [entry.name for entry in folder.iterdir()] if folder.exists() else []
    if names and not (folder / RECORD).exists():
        raise UserError(f"output: {folder} holds other things ({sorted(names)[0]}, ...); name a new or empty folder")


# ---------------------------------------------------------------------------------------------- devices


def shares(jobs: int, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """What each of the runs that go on side by side is told of the devices: an equal share of the host's GPUs.

    Raises:
      UserError: they cannot be shared out evenly, or are TPUs, which one process holds.
    """
    if jobs == 1 or environment.get("JAX_PLATFORMS") == "cpu":
        return [{} for _ in range(jobs)]
    if any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*")):
        raise UserError(f"{COMMAND_LINE}: --jobs {jobs}: a TPU host runs one process at a time; leave --jobs out")
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    here = [path.name.removeprefix("nvidia") for path in sorted(Path("/dev").glob("nvidia[0-9]*"))]
    gpus = [name for name in visible.split(",") if name] if visible is not None else here
    if len(gpus) % jobs or (gpus and len(gpus) < jobs):
        raise UserError(f"{COMMAND_LINE}: --jobs {jobs}: {len(gpus)} GPUs cannot be shared out evenly; give a divisor")
    each = len(gpus) // jobs
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * each : (i + 1) * each])} if gpus else {} for i in range(jobs)]


# ---------------------------------------------------------------------------------------------- runs


class Running(NamedTuple):
    """A process that trains a point, on one of the shares of the devices."""

    point: Point
    process: subprocess.Popen
    share: int


def run_all(
    points: Sequence[Point], devices: Sequence[Mapping[str, str]], say: Callable[[str], None]
) -> dict[str, int]:
    """Train every point, as many at a time as there are shares of the devices; exit codes by name.

    The second begins when the first has its caches, which the others then find. What ends this ends the runs: they save
    and stop.
    """
    waiting, running, codes = list(points), list[Running](), {}
    try:
        while waiting or running:
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                codes[one.point.name] = one.process.returncode
                say(f"{one.point.name}: {_ended(one.process.returncode)}")
            free = [share for share in range(len(devices)) if share not in {one.share for one in running}]
            if waiting and free and all(_has_begun(one.point.folder) for one in running):
                point = waiting.pop(0)
                say(f"run {len(points) - len(waiting)} of {len(points)}: {point.name}")
                running.append(Running(point, _started(point, devices[free[0]], len(devices) > 1), free[0]))
            time.sleep(POLL_SECONDS)
    except BaseException as error:
        number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
        for one in running:
            one.process.send_signal(number)
        for one in running:
            one.process.wait()
        raise
    return codes


def _has_begun(folder: Path) -> bool:
    file = folder / METRICS_FILE
    return file.exists() and file.stat().st_size > 0


def _started(point: Point, devices: Mapping[str, str], to_file: bool) -> subprocess.Popen:
    """`dpo_jax.train` in a session of its own, so that a Ctrl-C reaches it once, from here."""
    command, environment = [sys.executable, "-m", "dpo_jax.train", *point.words], {**os.environ, **devices}
    if not to_file:
        return subprocess.Popen(command, env=environment, start_new_session=True)
    with point.folder.with_name(f"{point.name}.log").open("ab") as log:
        return subprocess.Popen(command, env=environment, start_new_session=True, stdout=log, stderr=log)


def _ended(code: int) -> str:
    words = {0: "done", 75: "stopped and saved", 130: "stopped and saved"}
    return words.get(code, f"failed with exit code {code}")


# ---------------------------------------------------------------------------------------------- results


class PointResult(NamedTuple):
    """What came of a point: its metrics, of held-out data those of the step that is exported, of training the last; and
    how it ended ("done" or why not)."""

    point: Point
    metrics: Mapping[str, float]
    ended: str


def result_of(point: Point, code: int) -> PointResult:
    """Read from the run's own records."""
    file = point.folder / METRICS_FILE
    best = (output.recorded(point.folder).get("best") or {}) if code == 0 else {}
    metrics: dict[str, Any] = {}
    for record in read_records(file) if file.exists() else []:
        late = best and record["step"] > best["step"]
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        metrics |= {name: value for name, value in numbers.items() if not (late and name.startswith(MEASURED))}
    return PointResult(point, metrics, _ended(code))


PREFERRED = ("eval_win_rate", "eval_pass_rate", "eval_rewards/accuracies", "rewards/accuracies", "loss")
"""Metrics that say which run is best, where none is named: the first that every run has. A held-out loss is not among
them, as the losses of different objectives have different units."""


def check_metric(asked: str | None) -> None:
    """Refuse a metric that has no better and worse, before anything is trained."""
    if asked is not None and held_out_of(asked)[1] not in BETTER:
        raise UserError(f"{COMMAND_LINE}: --metric {short(asked)}: choose one of {', '.join(BETTER)}, or eval_ of one")


def metric_of_best(run: Run, axes: Sequence[Axis]) -> str | None:
    """The metric by which each run chooses its best step, and so the one among the runs, as the records call it. None
    where they choose by none, or by different ones, or by one that different objectives have in different units."""
    keys = [axis.key for axis in axes]
    if run.checkpoint.best is None or "checkpoint.best" in keys:
        return None
    name = recorded(run.checkpoint.best)
    in_units = held_out_of(name)[1].startswith(("loss", "rewards/margins"))
    return None if in_units and any(key.partition(".")[0] == "objective" for key in keys) else name


def metric_for(results: Sequence[PointResult], asked: str | None, best: str | None = None) -> str | None:
    """The metric that the runs are sorted by: the one asked for, or the first that all finished ones have of the one of
    `metric_of_best` and PREFERRED.

    Raises:
      UserError: no run has the one that is asked for, or it has no better and worse.
    """
    check_metric(asked)
    known = {name for result in results for name in result.metrics}
    if asked is not None and known and asked not in known:
        near = [name for name in sorted(known) if name.startswith("eval")] or sorted(known)
        raise UserError(f"{COMMAND_LINE}: --metric {short(asked)}: no run has it; there are {', '.join(near[:20])}")
    done = [result for result in results if result.ended == "done"]
    found = (
        name
        for name in ([best] if best else []) + [*PREFERRED]
        if done and all(name in result.metrics for result in done)
    )
    return asked or next(found, None)


def ranked(results: Sequence[PointResult], metric: str | None) -> list[PointResult]:
    """The runs, the best by the metric first; those that did not end, or lack it, last."""

    def key(result: PointResult) -> tuple[bool, float]:
        value = result.metrics.get(metric) if metric else None
        missing = value is None or result.ended != "done"
        return missing, 0.0 if metric is None or value is None else -goodness(metric, value)

    return sorted(results, key=key)


COLUMNS = (
    ("eval_win_rate", "win rate", "{:.1%}"),
    ("eval_pass_rate", "pass rate", "{:.1%}"),
    ("eval_rewards/accuracies", "accuracy", "{:.1%}"),
    ("eval_rewards/margins", "margin", "{:+z.3f}"),
    ("eval_kl", "kl", "{:.4f}"),
    ("eval_loss", "held-out loss", "{:.4f}"),
    ("loss", "training loss", "{:.4f}"),
)
"""What the table shows of each run, where any run has it: metric, heading, format."""


def table(axes: Sequence[Axis], results: Sequence[PointResult], metric: str | None) -> list[list[str]]:
    """The runs as rows of text under a heading, in the order given; the metric they are sorted by first."""
    shown = [column for column in COLUMNS if any(column[0] in result.metrics for result in results)]
    if metric is not None and all(name != metric for name, *_ in shown):
        shown.insert(0, (metric, metric, "{:.4g}"))
    shown.sort(key=lambda column: column[0] != metric)
    rows = [[*(axis.key for axis in axes), *(heading for _, heading, _ in shown), ""]]
    for result in results:
        cells = [form.format(result.metrics[name]) if name in result.metrics else "-" for name, _, form in shown]
        ended = "" if result.ended == "done" else result.ended
        rows.append([*(result.point.values[axis.key] for axis in axes), *cells, ended])
    return rows


def record(folder: Path, run: Run, axes: Sequence[Axis], results: Sequence[PointResult], metric: str | None) -> None:
    """Write down what is swept, and what came of each run so far, the best first."""
    runs = [
        {"folder": result.point.name, "values": dict(result.point.values), "ended": result.ended}
        | ({"metrics": {name: result.metrics.get(name) for name, *_ in COLUMNS if name in result.metrics}})
        for result in results
    ]
    known = {
        "axes": {axis.key: list(axis.values) for axis in axes},
        "settings": config.dump(run),
        "metric": metric,
        "runs": runs,
    }
    write_whole(folder / RECORD, json.dumps(known, indent=2, ensure_ascii=False) + "\n")
