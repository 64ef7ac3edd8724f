"""What a run shows while it goes on: a bar that is drawn again, or lines for a log; and what came of it."""

import contextlib
import math
import re
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column, Table
from rich.text import Text

from dpo_jax.errors import printable, redacted
from dpo_jax.reporting.metrics import TERMINAL, shown, table
from dpo_jax.reporting.waiting import Waiting, clock

PLAIN_LINES = 200
"""Most step lines of a run on a terminal that cannot redraw, unless it is told otherwise."""
TRAINING = "training"


def _labelled(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    return [(label, shown(metrics, name, form)) for name, label, form in TERMINAL if name in metrics]


def put(console: Console, line: str) -> None:
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
        self._first: int | None = None
        self._waiting = Waiting(self.note)

    def at_most(self, lines: int) -> None:
        """Show at most about so many steps, and the first and the last."""
        self._every = self._recorded * math.ceil(self._total / (lines * self._recorded))

    def phase(self, text: str) -> None:
        """Say what begins, and now and then that it goes on. A phase that only counts on (`reference 3/10`) is still
        the same."""
        kind = re.sub(r"\d+", "#", text)
        if kind == self._phase:
            self._waiting.now(text)
            return
        self._phase = kind
        if kind:
            self.note(text)
            self._waiting.begin(text)

    def step(self, step: int, metrics: Mapping[str, float], left: float | None = None) -> None:
        """Show a step if its turn has come, and the seconds that are left of the run."""
        self._waiting.end()
        self._first = step if self._first is None else self._first
        if step in (self._first, self._total) or step % self._every == 0:
            tail = "" if left is None else f"  left {clock(left)}"
            said = "  ".join(f"{label} {value:>7}" for label, value in _labelled(metrics))
            self.note(f"step {step:>{len(str(self._total))}}/{self._total}  {said}{tail}")

    def note(self, line: str) -> None:
        """Print a line."""
        put(self._console, printable(redacted(line)))

    def close(self) -> None:
        """Nothing is waited for any more."""
        self._waiting.end()


class Phase(ProgressColumn):
    """What is being done, and for how long."""

    def render(self, task: Task) -> Text:
        """Its words, and from the first second on its time; the steps of training have a count of their own."""
        phase, elapsed = task.fields["phase"], task.get_time() - task.fields["began"]
        return Text(f"{phase} {clock(elapsed)}" if phase not in ("", TRAINING) and elapsed >= 1 else phase)


class LiveTerminal:
    """A progress bar that is drawn again in place."""

    def __init__(self, console: Console, total_steps: int, resume_step: int):
        """A bar that appears with the first phase or step."""
        self._room = max(console.width - 45, 0)  # what the phase, the count and the time leave
        bar = [BarColumn(bar_width=20)] if console.width >= 120 else []
        words = {name: TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in ("metrics", "left")}
        times = [TimeElapsedColumn(), words["left"]] if console.width >= 70 else []
        phase = Phase(table_column=Column(no_wrap=True))
        self._progress = Progress(phase, *bar, MofNCompleteColumn(), words["metrics"], *times, console=console)
        done, began = max(resume_step, 0), self._progress.get_time()
        empty: dict[str, Any] = {"phase": "", "metrics": "", "left": "", "began": began}
        self._task: TaskID = self._progress.add_task("", total=total_steps, completed=done, **empty)

    def phase(self, text: str) -> None:
        """Show what is being done, left of the bar."""
        self._progress.start()
        self._progress.update(self._task, phase=printable(text), began=self._progress.get_time())

    def step(self, step: int, metrics: Mapping[str, float], left: float | None = None) -> None:
        """Move the bar, and show the seconds that are left."""
        self._progress.start()
        fitting, tail = self._fitting(metrics), "" if left is None else f"left {clock(left)}"
        self._progress.update(self._task, completed=step, phase=TRAINING, metrics=fitting, left=tail)

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

    def step(self, step: int, metrics: Mapping[str, float], left: float | None = None) -> None:
        """Show nothing."""

    def note(self, line: str) -> None:
        """Print nothing."""

    def close(self) -> None:
        """Nothing is left to do."""


def redraws(console: Console) -> bool:
    """Whether this is a terminal on which lines can be drawn again."""
    return console.is_terminal and not console.is_dumb_terminal


def summary(before: Mapping[str, Any], after: Mapping[str, Any], *, console: Console | None = None) -> None:
    """Print two records of held-out data side by side; a row that neither has is left out."""
    screen = console or Console()
    rows = table(before, after)
    if not rows:
        return
    if redraws(screen):
        grid = Table("", Column("before", justify="right"), Column("after", justify="right"))
        for row in rows:
            grid.add_row(*row)
        screen.print(grid)
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for label, old, new in rows:
        put(screen, f"{label:<{widths[0]}}  {old:>{widths[1]}} -> {new:>{widths[2]}}")
