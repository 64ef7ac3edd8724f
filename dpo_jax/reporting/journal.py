"""What a run writes down while it goes on: `metrics.jsonl` (the truth), TensorBoard, other services, and the terminal.

Names are TRL's (`rewards/margins`, `logps/chosen`, ...); `eval_` stands before what was measured on held-out pairs.
"""

import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, SupportsFloat

from rich.console import Console

from dpo_jax.errors import UserError, one_line
from dpo_jax.files import naming, write_whole
from dpo_jax.processes.here import here
from dpo_jax.reporting.loggers import SERVICES, About, Guarded, Logger, TensorBoard
from dpo_jax.reporting.metrics import OLD_NAMES, PREFIX, in_a_line, recorded
from dpo_jax.reporting.notes import Notes, PageWriter
from dpo_jax.reporting.seen import SeenEvaluation
from dpo_jax.reporting.settings import LogSettings
from dpo_jax.reporting.terminal import LiveTerminal, PlainTerminal, Silent, redraws
from dpo_jax.reporting.waiting import TimeLeft

METRICS_FILE = "metrics.jsonl"


class Background(NamedTuple):
    """What a journal knows of its run, beside where it is written and how long it is.

    Attributes:
      settings: by name, as plain values that may be sent away.
      every: steps between evaluations.
      page: of the run.
    """

    settings: Mapping[str, Any] = {}
    every: Fraction | None = None
    page: PageWriter | None = None


UNKNOWN = Background()


def each_record(path: Path | str) -> Iterator[dict[str, Any]]:
    """Records of a `metrics.jsonl`, one after the other. A last line that was not written to its end (the process was
    killed) is left out.

    Raises:
      UserError: another line is not a record.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return  # torn
            try:
                record = json.loads(line)
                known = isinstance(record, dict) and isinstance(record.get("step"), int)
            except (ValueError, RecursionError):
                known = False
            if not known:
                raise UserError(f"{path}:{number}: is not a record of metrics; restore the file or move it away")
            yield {_now_called(name): value for name, value in record.items()}


def read_records(path: Path | str) -> list[dict[str, Any]]:
    """All of `each_record`."""
    return list(each_record(path))


def _now_called(name: str) -> str:
    """The name of a metric, which an earlier version may have called otherwise."""
    plain = name.removeprefix(PREFIX)
    return name.removesuffix(plain) + OLD_NAMES[plain] if plain in OLD_NAMES else name


def _encoded(record: Mapping[str, Any]) -> str:
    """A line of JSON. nan and inf, which JSON does not have, are null, and the record says so."""
    broken = {name: None for name, value in record.items() if not math.isfinite(value)}
    return json.dumps({**record, **broken, **({"nonfinite": True} if broken else {})}, allow_nan=False) + "\n"


class MetricsFile:
    """`metrics.jsonl`: a JSON object per record, flushed as it is written."""

    def __init__(self, folder: Path, resume_step: int, *, measures_again: bool = False):
        """Go on after step `resume_step`: what was recorded of later steps is dropped, so no step is there twice;
        nor is that step's evaluation, where it `measures_again`."""
        self._path = path = folder / METRICS_FILE
        old = read_records(path) if resume_step >= 0 and path.exists() else []
        kept = [record for record in old if record["step"] <= resume_step]
        self.found = len(kept)
        if measures_again:
            kept = [record for record in kept if record["step"] < resume_step or "loss" in record]
        self.records = len(kept)
        write_whole(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in kept))
        self._handle = open(path, "a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a record."""
        with naming(self._path):
            self._handle.write(_encoded({"step": step, **metrics}))
            self._handle.flush()
        self.records += 1

    def sync(self) -> None:
        """Bring what was written down to the disk."""
        with naming(self._path):
            os.fsync(self._handle.fileno())

    def close(self) -> None:
        """Close the file."""
        with naming(self._path):
            self._handle.close()


class Journal:
    """Everything a run writes down, as a context manager. Only process 0 of a run writes; on others all is silent.

    So that a resumed run's `metrics.jsonl` is that of a run that was never interrupted, record a step and its
    evaluation before the checkpoint of that step is saved.
    """

    def __init__(
        self,
        folder: Path | str,
        total_steps: int,
        settings: LogSettings,
        resume_step: int = -1,
        *,
        process: int = 0,
        console: Console | None = None,
        began: float | None = None,
        background: Background = UNKNOWN,
    ):
        """Write into `folder`, from the start (-1) or after step `resume_step`; the command `began` then, or now."""
        self.began, self.folder = time.perf_counter() if began is None else began, Path(folder)
        self._every, self._total = settings.every, total_steps
        self._loggers: list[Guarded] = []
        self._file: MetricsFile | None = None
        self._time_left = TimeLeft(total_steps, background.every)
        self._notes: Notes | None = None
        self._page, self._last = background.page if process == 0 else None, max(resume_step, 0)
        self._terminal: PlainTerminal | LiveTerminal | Silent = Silent()
        if process != 0:
            return
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        self._notes = Notes(folder, resume_step)
        screen = console or Console()
        self._terminal = (
            LiveTerminal(screen, total_steps, resume_step)
            if redraws(screen)
            else PlainTerminal(screen, total_steps, settings.every)
        )
        name = settings.name or folder.resolve().name
        about = About(settings.project, name, settings.tags, background.settings, folder, resume_step >= 0)
        makers: dict[str, Callable[[], Logger]] = {
            service: functools.partial(SERVICES[service], about) for service in settings.loggers
        }
        self._loggers = [Guarded(service, make, self.note) for service, make in makers.items()]
        self._file = MetricsFile(folder, resume_step, measures_again=resume_step >= total_steps)
        if settings.tensorboard:  # after the file, which may be refused
            self._loggers.append(Guarded("TensorBoard", functools.partial(TensorBoard, folder, resume_step), self.note))

    def __enter__(self) -> "Journal":
        """The journal itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Close all that is written to, whatever ended the run, and leave a page of it, unless there is no time."""
        self._terminal.close()
        if self._file is not None:
            self._file.close()
        for logger in self._loggers:
            logger.close()
        if isinstance(error, Exception) and self._notes is not None:
            self._notes.write(self._last, f"ended by {one_line(error)}")
        if self._page is not None and (kind is None or issubclass(kind, Exception)):
            self._page.end(self.note)

    @property
    def records(self) -> int:
        """Records in `metrics.jsonl`; 0 in all processes but the first."""
        return self._file.records if self._file else 0

    @property
    def found(self) -> int:
        """Records of the steps that are made, as this journal found them when it began."""
        return self._file.found if self._file else 0

    def sync(self) -> None:
        """Bring `metrics.jsonl` down to the disk, so that no checkpoint knows more than it."""
        if self._file:
            self._file.sync()

    def due(self, step: int) -> bool:
        """Whether a step (1, 2, ... total) is to be recorded: the first, the last, and each `log.every` steps."""
        return step in (1, self._total) or step % self._every == 0

    def at_most(self, lines: int) -> None:
        """Show about so many steps at most, where each is a line."""
        if isinstance(self._terminal, PlainTerminal):
            self._terminal.at_most(lines)

    def phase(self, text: str) -> None:
        """Say what is being done: `compiling`, `reference log-probabilities 3/10`."""
        here().doing(text)
        self._terminal.phase(text)

    def step(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Record a step."""
        numbers = _numbers(metrics)
        self._write(step, numbers)
        self._time_left.step(step, time.monotonic())
        self._terminal.step(step, numbers, self._time_left.seconds())

    def evaluation(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Record what was measured on held-out data after a step, each name as `metrics.recorded` makes it; show where
        that is possible what else was found, as the folder has it."""
        numbers = _numbers(metrics)
        self._time_left.pause(time.monotonic())
        self._write(step, {recorded(name): number for name, number in numbers.items()})
        if self._loggers:
            seen = SeenEvaluation.of(self.folder, step)
            for logger in self._loggers:
                logger.show(step, seen)
        self._terminal.note(f"evaluation after step {step}  {in_a_line(numbers)}")

    def note(self, line: str) -> None:
        """Show a line on the terminal, and keep it."""
        self._terminal.note(line)
        if self._notes is not None:
            self._notes.write(self._last, line)

    def show(self) -> None:
        """Draw the page again, if there is one and it is old."""
        if self._page is not None:
            self._page.refresh(self.note)

    def _write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._last = step
        if self._file is not None:
            self._file.write(step, numbers)
        for logger in self._loggers:
            logger.write(step, numbers)


def _numbers(metrics: Mapping[str, SupportsFloat]) -> dict[str, float]:
    return {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
