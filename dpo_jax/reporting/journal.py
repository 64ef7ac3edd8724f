"""What a run writes down while it goes on: `metrics.jsonl` (the truth), TensorBoard, other services, and the terminal.

Names are TRL's (`rewards/margins`, `logps/chosen`, ...); `eval_` stands before what was measured on held-out pairs.
"""

import contextlib
import datetime
import functools
import importlib
import json
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, SupportsFloat

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from dpo_jax.errors import UserError, one_line, printable, redacted
from dpo_jax.files import naming, write_whole
from dpo_jax.processes.here import here
from dpo_jax.reporting.metrics import OLD_NAMES, PREFIX, TERMINAL, in_a_line, recorded, table
from dpo_jax.reporting.notes import Notes, Page
from dpo_jax.reporting.settings import LogSettings

METRICS_FILE = "metrics.jsonl"

PLAIN_LINES = 200
"""Most step lines of a run on a terminal that cannot redraw, unless it is told otherwise."""


class Writer(Protocol):
    """Somewhere metrics go."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take over the metrics of a step; more of the same step may follow."""

    def close(self) -> None:
        """Finish."""


def read_records(path: Path | str) -> list[dict[str, Any]]:
    """Records of a `metrics.jsonl`. A last line that was not written to its end (the process was killed) is left out.

    Raises:
      UserError: another line is not a record.
    """
    records = []
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line break is empty, or torn
        try:
            record = json.loads(line)
            known = isinstance(record, dict) and isinstance(record.get("step"), int)
        except (ValueError, RecursionError):
            known = False
        if not known:
            raise UserError(f"{path}:{number}: is not a record of metrics; restore the file or move it away")
        records.append({_now_called(name): value for name, value in record.items()})
    return records


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


class TensorBoard:
    """Event files beside `metrics.jsonl`; a resumed run hides the events of the steps that it repeats."""

    def __init__(self, folder: Path, resume_step: int):
        """Write into `folder/tensorboard`."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2 as events
        from tensorboardX.summary import scalar

        event, log = (getattr(events, name) for name in ("Event", "SessionLog"))
        self._event, self._scalar, first = event, scalar, resume_step + 1
        (folder / "tensorboard").mkdir(exist_ok=True)
        # not its SummaryWriter, whose thread has nobody to tell that a disk is full; and with a suffix, since two files
        # that begin in the same second would be one, and the older one lost
        self._writer = EventsWriter(str(folder / "tensorboard" / "events"), filename_suffix=f".{first}")
        self._writer.write_event(event(wall_time=time.time(), step=first, session_log=log(status=log.START)))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the finite metrics as scalars."""
        for name, value in metrics.items():
            if math.isfinite(value):
                summary = self._scalar(name, value)
                self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class Service:
    """wandb, or trackio, which has the same functions."""

    def __init__(self, name: str, folder: Path, resume_step: int):
        """Begin a run named after the output folder, or go on with it."""
        try:
            self._module = importlib.import_module(name)
        except ModuleNotFoundError:
            raise UserError(
                f"log.loggers: {name}: is not installed; pip install 'dpo_jax[loggers]', or leave it out"
            ) from None
        mark = folder / f"{name}_run"
        run = mark.read_text() if resume_step >= 0 and mark.exists() else uuid.uuid4().hex[:12]
        mark.write_text(run)
        # trackio knows a run by its name, wandb by its id
        options = {"id": run, "dir": str(folder)} if name == "wandb" else {}
        self._module.init(project="dpo_jax", name=f"{folder.resolve().name}-{run}", resume="allow", **options)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the finite metrics."""
        self._module.log({name: value for name, value in metrics.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        """End the run."""
        self._module.finish()


class Guarded:
    """A writer that the run does not depend on: when it fails, it is left out from then on, with one warning."""

    def __init__(self, name: str, make: Callable[[], Writer], warn: Callable[[str], None]):
        """Make the writer. That its package is missing is an error at once, not a warning later."""
        self._name, self._warn, self._writer = name, warn, None
        self._attempt(lambda: setattr(self, "_writer", make()))

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except UserError:
            raise
        except Exception as error:  # a service may raise anything; a night of training must not end with it
            self._writer = None
            self._warn(f"warning: {self._name} is switched off: {type(error).__name__}: {error}")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write, if the writer still works."""
        if (writer := self._writer) is not None:
            self._attempt(lambda: writer.write(step, metrics))

    def close(self) -> None:
        """Close, if the writer still works."""
        if (writer := self._writer) is not None:
            self._attempt(writer.close)


def _labelled(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    return [(label, form.format(metrics[name])) for name, label, form in TERMINAL if name in metrics]


def _put(console: Console, line: str) -> None:
    """Print a whole line. A terminal that went away, or lacks a letter, does not stop a run."""
    letters = line.encode(console.encoding, "backslashreplace").decode(console.encoding)
    with contextlib.suppress(OSError, ValueError):
        print(letters, file=console.file, flush=True)


class PlainTerminal:
    """One line now and then, for logs and terminals that cannot redraw."""

    def __init__(self, console: Console, total_steps: int, every: int):
        """Show at most about `PLAIN_LINES` steps of the run, and the first and the last."""
        self._console, self._total, self._phase, self._recorded = console, total_steps, "", every
        self.at_most(PLAIN_LINES)
        self._first: tuple[int, float] | None = None

    def at_most(self, lines: int) -> None:
        """Show at most about so many steps, and the first and the last."""
        self._every = self._recorded * math.ceil(self._total / (lines * self._recorded))

    def phase(self, text: str) -> None:
        """Say what begins. A phase that only counts on (`reference 3/10`) says nothing new."""
        kind = re.sub(r"\d+", "#", text)
        if kind and kind != self._phase:
            self.note(text)
        self._phase = kind

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a step if its turn has come."""
        now = time.monotonic()
        first, began = self._first = self._first or (step, now)
        if step in (first, self._total) or step % self._every == 0:
            left = (self._total - step) * (now - began) / max(step - first, 1)
            tail = f"  left {datetime.timedelta(seconds=int(left))}" if step > first else ""
            shown = "  ".join(f"{label} {value:>7}" for label, value in _labelled(metrics))
            self.note(f"step {step:>{len(str(self._total))}}/{self._total}  {shown}{tail}")

    def note(self, line: str) -> None:
        """Print a line."""
        _put(self._console, printable(redacted(line)))

    def close(self) -> None:
        """Nothing is left to do."""


class LiveTerminal:
    """A progress bar that is drawn again in place."""

    def __init__(self, console: Console, total_steps: int, resume_step: int):
        """A bar that appears with the first phase or step."""
        self._room = max(console.width - 45, 0)  # what the phase, the count and the time leave
        bar = [BarColumn(bar_width=20)] if console.width >= 120 else []
        left = [TimeElapsedColumn(), TimeRemainingColumn()] if console.width >= 70 else []
        words = [TextColumn(f"{{task.fields[{field}]}}", markup=False) for field in ("phase", "metrics")]
        self._progress = Progress(words[0], *bar, MofNCompleteColumn(), words[1], *left, console=console)
        done = max(resume_step, 0)
        self._task: TaskID = self._progress.add_task("", total=total_steps, completed=done, phase="", metrics="")

    def phase(self, text: str) -> None:
        """Show what is being done, left of the bar."""
        self._progress.start()
        self._progress.update(self._task, phase=printable(text))

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Move the bar."""
        self._progress.start()
        self._progress.update(self._task, completed=step, phase="training", metrics=self._fitting(metrics))

    def _fitting(self, metrics: Mapping[str, float]) -> str:
        text = ""
        for label, value in _labelled(metrics):
            longer = f"{text}  {label} {value}".lstrip()
            text = longer if len(longer) <= self._room else text
        return text

    def note(self, line: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(Text(printable(redacted(line))), soft_wrap=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._progress.stop()


class Silent:
    """The terminal of a process that is not the first: nothing."""

    def phase(self, text: str) -> None:
        """Say nothing."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show nothing."""

    def note(self, line: str) -> None:
        """Print nothing."""

    def close(self) -> None:
        """Nothing is left to do."""


def _redraws(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal


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
        page: Page | None = None,
    ):
        """Write into `folder`, from the start (-1) or after step `resume_step`; the command `began` then, or now."""
        self.began, self.folder = time.perf_counter() if began is None else began, Path(folder)
        self._every, self._total = settings.every, total_steps
        self._writers: list[Writer] = []
        self._file: MetricsFile | None = None
        self._notes: Notes | None = None
        self._page, self._last = page if process == 0 else None, max(resume_step, 0)
        self._terminal: PlainTerminal | LiveTerminal | Silent = Silent()
        if process != 0:
            return
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        self._notes = Notes(folder, resume_step)
        screen = console or Console()
        self._terminal = (
            LiveTerminal(screen, total_steps, resume_step)
            if _redraws(screen)
            else PlainTerminal(screen, total_steps, settings.every)
        )
        guarded = [
            Guarded(name, functools.partial(Service, name, folder, resume_step), self.note) for name in settings.loggers
        ]
        self._file = MetricsFile(folder, resume_step, measures_again=resume_step >= total_steps)
        if settings.tensorboard:
            guarded.append(Guarded("TensorBoard", functools.partial(TensorBoard, folder, resume_step), self.note))
        self._writers = [self._file, *guarded]

    def __enter__(self) -> "Journal":
        """The journal itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Close all that is written to, whatever ended the run, and leave a page of it, unless there is no time."""
        self._terminal.close()
        for writer in self._writers:
            writer.close()
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
        self._terminal.step(step, numbers)

    def evaluation(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Record what was measured on held-out data after a step, each name as `metrics.recorded` makes it."""
        numbers = _numbers(metrics)
        self._write(step, {recorded(name): number for name, number in numbers.items()})
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
        for writer in self._writers:
            writer.write(step, numbers)


def _numbers(metrics: Mapping[str, SupportsFloat]) -> dict[str, float]:
    return {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}


def summary(before: Mapping[str, Any], after: Mapping[str, Any], *, console: Console | None = None) -> None:
    """Print two records of held-out data side by side; a row that neither has is left out."""
    screen = console or Console()
    rows = table(before, after)
    if not rows:
        return
    if _redraws(screen):
        grid = Table("", Column("before", justify="right"), Column("after", justify="right"))
        for row in rows:
            grid.add_row(*row)
        screen.print(grid)
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for label, old, new in rows:
        _put(screen, f"{label:<{widths[0]}}  {old:>{widths[1]}} -> {new:>{widths[2]}}")
