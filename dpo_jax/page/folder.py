"""What a run's folder says of the run, read again: nothing is trusted, and nothing that is missing or damaged is fatal.

What is wrong with a file is a line of `damaged`, which the page shows.
"""

import dataclasses
import functools
import io
import json
import math
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.errors import UserError, one_line, public
from dpo_jax.reporting.journal import METRICS_FILE, each_record
from dpo_jax.reporting.metrics import evaluations_in
from dpo_jax.reporting.notes import NOTES_FILE, read_notes

RUN_FILE, DATA_FILE = "run.json", "data.json"
ANSWERS, REWARDS, VERDICTS = "answers", "evaluations", "verdicts"
EXPORTS = {"merged": "model", "adapter": "adapter"}
RECORD = "dpo_jax.json"
MOST_BYTES = 1 << 28
"""Of a file of answers or rewards that is read."""
Columns = dict[str, tuple["array[int]", "array[float]"]]
"""Of each metric, the steps at which it was recorded, and the values."""


class Curve(NamedTuple):
    """A metric over the steps at which it was recorded; nan where it was not finite."""

    steps: np.ndarray
    values: np.ndarray

    def __bool__(self) -> bool:
        """Whether there is anything to show."""
        return bool(np.isfinite(self.values).any())

    @property
    def last(self) -> float:
        """The newest value; nan where there is none."""
        return float(self.values[-1]) if len(self.values) else math.nan

    @property
    def first(self) -> float:
        """The oldest value; nan where there is none."""
        return float(self.values[0]) if len(self.values) else math.nan


class Measured(NamedTuple):
    """What a run recorded: each metric over the steps, and what was measured on held-out data, by step."""

    curves: dict[str, Curve]
    evaluations: dict[int, dict[str, Any]]


class Rewards(NamedTuple):
    """Held-out rewards after a step, by set ("" is the only one): those of chosen and of rejected answers, in nats."""

    step: int
    sets: dict[str, tuple[np.ndarray, np.ndarray]]


class AnsweredStep(NamedTuple):
    """What a model answered after a step; a row's `verdicts` are what judges said of it, by their labels."""

    step: int
    rows: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run as its folder has it. `written` is when something was last recorded, in seconds since 1970."""

    path: Path
    known: Mapping[str, Any]
    data: Mapping[str, Any]
    measured: Measured
    notes: list[dict[str, Any]]
    answers: list[AnsweredStep]
    rewards: list[Rewards]
    export: Mapping[str, Any]
    written: float
    damaged: list[str]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def settings(self) -> Mapping[str, Any]:
        """The run's settings, as `config.dump` gives them; empty where nothing says them."""
        return self.known.get("settings", {})

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the run depends on beside its settings."""
        return self.known.get("facts", {})

    @property
    def finished(self) -> bool:
        """Whether it was trained to its end, and exported."""
        return bool(self.known.get("finished"))

    @property
    def step(self) -> int:
        """The last step of which there is a record."""
        return max((int(curve.steps.max()) for curve in self.measured.curves.values()), default=0)

    @property
    def steps(self) -> int | None:
        """How many the run has, if that is known."""
        found = self.facts.get("number of steps")
        return found if isinstance(found, int) else None

    @property
    def best(self) -> int | None:
        """The step that is exported in place of the last one, if the run chose one."""
        step = _mapping(self.known.get("best")).get("step")
        return step if isinstance(step, int) else None

    def curve(self, name: str) -> Curve:
        """A metric of the steps, or with its `eval` prefix of the evaluations."""
        return self.measured.curves.get(name, Curve(np.zeros(0, np.int64), np.zeros(0)))

    @property
    def metrics(self) -> list[str]:
        """Names of all that was measured."""
        return list(self.measured.curves)

    @functools.cached_property
    def sets(self) -> list[str]:
        """Names of the held-out sets; "" is the one that has no name."""
        named = dict.fromkeys(name.split("/", 2)[1] for name in self.metrics if re.match("eval/[^/]+/.", name))
        return ([""] if any(name.startswith("eval_") for name in self.metrics) else []) + list(named)

    def held_out(self, name: str, which: str = "") -> Curve:
        """A metric of a held-out set."""
        return self.curve(f"eval_{name}") if not which else self.curve(f"eval/{which}/{name}")


def read(folder: Path | str) -> RunFolder:
    """What the folder of a run has of it.

    Raises:
      UserError: it is no run's.
    """
    path, damaged = Path(folder), []
    if not any((path / name).exists() for name in (RUN_FILE, METRICS_FILE)):
        raise UserError(f"{folder}: holds no run (neither {RUN_FILE} nor {METRICS_FILE}); name the output of a run")
    known = _object(path / RUN_FILE, damaged)
    best = _mapping(known.get("best")).get("step")
    exported = next((path / name for name in EXPORTS.values() if (path / name / RECORD).is_file()), None)
    return RunFolder(
        path,
        {**known, **{name: _mapping(known.get(name)) for name in ("settings", "facts")}},
        _object(path / DATA_FILE, damaged),
        _measured(path / METRICS_FILE, damaged),
        read_notes(path / NOTES_FILE),
        _answers(path / ANSWERS, best, damaged),
        _rewards(path / REWARDS, best, damaged),
        {} if exported is None else _object(exported / RECORD, damaged),
        max((file.stat().st_mtime for name in (METRICS_FILE, RUN_FILE) if (file := path / name).exists()), default=0.0),
        damaged,
    )


def lines_of(run: RunFolder, name: str) -> list[str]:
    """Lines that the report of a run's data has under a name, as they may be shown."""
    found = run.data.get(name)
    return [public(line) for line in found if isinstance(line, str)] if isinstance(found, list) else []


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _object(path: Path, damaged: list[str]) -> Mapping[str, Any]:
    try:
        return _mapping(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        damaged.append(f"{path.name} cannot be read: {public(one_line(error))}")
        return {}


def _measured(path: Path, damaged: list[str]) -> Measured:
    """The records by metric: as objects, those of a long run would take a hundred times their numbers' bytes."""
    columns: Columns = {}
    try:
        evaluations = evaluations_in(_kept(each_record(path), columns))
    except FileNotFoundError:
        return Measured({}, {})
    except (OSError, UserError, OverflowError) as error:
        damaged.append(f"{path.name} cannot be read: {public(one_line(error))}")
        return Measured({}, {})
    curves = {name: Curve(np.array(steps), np.array(values)) for name, (steps, values) in columns.items()}
    return Measured(curves, evaluations)


def _kept(records: Iterable[dict[str, Any]], columns: Columns) -> Iterator[dict[str, Any]]:
    """The same records, once their numbers stand in `columns`: of a metric, the steps and the values."""
    for record in records:
        for name, value in record.items():
            if name != "step" and (value is None or isinstance(value, int | float)):
                steps, values = columns.setdefault(name, (array("q"), array("d")))
                steps.append(record["step"])
                values.append(float(value) if value is not None and math.isfinite(value) else math.nan)
        yield record


def _numbered(folder: Path, ending: str) -> list[tuple[int, Path]]:
    """Files `STEP.ending` of a folder, in the order of their steps."""
    found = [path for path in folder.glob(f"*.{ending}") if re.fullmatch(r"\d{1,12}", path.stem)]
    return sorted((int(path.stem), path) for path in found)


def _first_and_last(files: list[tuple[int, Path]], best: object) -> list[tuple[int, Path]]:
    """Those of the first step, and of the best one if that is known, or else of the newest."""
    after = [file for file in files if file[0] == best] or files[-1:]
    return list(dict.fromkeys([*files[:1], *after]))


def _answers(folder: Path, best: object, damaged: list[str]) -> list[AnsweredStep]:
    found = []
    for step, path in _first_and_last(_numbered(folder, "jsonl"), best):
        rows, verdicts = _rows(path, damaged), folder.with_name(VERDICTS)
        for file in (verdicts / path.name, *sorted(verdicts.glob(f"*/{path.name}"))):
            said = _rows(file, damaged)
            if len(said) == len(rows):
                label = "" if file.parent == verdicts else file.parent.name
                both = zip(rows, said, strict=True)
                rows = [{**row, "verdicts": {**row.get("verdicts", {}), label: one}} for row, one in both]
        if rows:
            found.append(AnsweredStep(step, rows))
    return found


def _rows(path: Path, damaged: list[str]) -> list[dict[str, Any]]:
    """Objects of a file of JSON lines; none where there is no such file."""
    try:
        lines = _limited(path).decode("utf-8", "replace").split("\n")
        return [row for line in lines if line.strip() and isinstance(row := json.loads(line), dict)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        damaged.append(f"{path.parent.name}/{path.name} cannot be read: {public(one_line(error))}")
        return []


def _rewards(folder: Path, best: object, damaged: list[str]) -> list[Rewards]:
    found = []
    for step, path in _first_and_last(_numbered(folder, "npz"), best):
        try:
            with np.load(io.BytesIO(_limited(path)), allow_pickle=False) as file:
                sides = {name: np.asarray(file[name], np.float64) for name in file.files}
            names = dict.fromkeys(name.rpartition("/")[0] for name in sides)
            both = [[sides[f"{name}/{side}".lstrip("/")] for name in names] for side in ("chosen", "rejected")]
            found.append(Rewards(step, dict(zip(names, zip(*both, strict=True), strict=True))))
        except Exception as error:  # a zip file that was tampered with raises nearly anything
            damaged.append(f"{REWARDS}/{path.name} cannot be read: {public(one_line(error))}")
    return found


def _limited(path: Path) -> bytes:
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"has {path.stat().st_size:,} bytes, and {MOST_BYTES:,} are read at most")
    return path.read_bytes()
