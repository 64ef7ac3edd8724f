"""What there is to wait for: how long something has taken so far, and how long a run still takes."""

import collections
import contextvars
import datetime
import threading
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Protocol, runtime_checkable

FIRST = 30.0
"""Seconds after which a log is told that something still goes on; then each time that it took twice as long."""
FEW = 20
"""Steps that an estimate looks at, at least, where so many were made; else at the latter half of those that were."""
PAUSES = 3
"""Newest pauses that an estimate looks at."""


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: `0:00:45`."""
    return str(datetime.timedelta(seconds=int(seconds)))


class TimeLeft:
    """Seconds that are left of a run.

    Steps and pauses (evaluations) are counted apart, as the next pause is known to come and the mean of both together
    jumps at each one. The first step since the start, which may compile, is not looked at.
    """

    def __init__(self, total: int, every: Fraction | None = None):
        """Of a run of so many steps, which pauses each `every` steps and after the last."""
        self._total, self._every = total, every
        self._marks: collections.deque[tuple[int, float]] = collections.deque()  # step, and seconds of steps up to it
        self._pauses: collections.deque[float] = collections.deque(maxlen=PAUSES)
        self._first: int | None = None
        self._last: float | None = None
        self._paused = False

    def step(self, step: int, now: float) -> None:
        """A step was made by then."""
        since = 0.0 if self._last is None or not self._marks else now - self._last
        self._first = step if self._first is None else self._first
        self._marks.append((step, (self._marks[-1][1] if self._marks else 0.0) + since))
        window = max(FEW, (step - self._first) // 2)
        while len(self._marks) > 2 and self._marks[1][0] <= step - window:
            self._marks.popleft()
        self._last = now

    def pause(self, now: float) -> None:
        """A pause ended then; the first may have been before any step."""
        if self._last is not None:
            if not self._paused and self._marks:
                self._pauses.clear()  # what was measured before the first step has compiled
                self._paused = True
            self._pauses.append(now - self._last)
        self._last = now

    def seconds(self) -> float | None:
        """The estimate; None before there is anything to go by."""
        if len(self._marks) < 2:
            return None
        (first, began), (last, ended) = self._marks[0], self._marks[-1]
        left = (self._total - last) * (ended - began) / (last - first)
        return left + self._pauses_from(last) * (sum(self._pauses) / len(self._pauses) if self._pauses else 0.0)

    def _pauses_from(self, step: int) -> int:
        """Pauses from this step on, which its own, if it has one, is still before."""
        before_the_last = 0 if self._every is None else (self._total - 1) // self._every - (step - 1) // self._every
        return max(int(before_the_last), 0) + 1


@runtime_checkable
class TimerLike(Protocol):
    """A `threading.Timer`."""

    daemon: bool

    def start(self) -> None:
        """Let it run."""

    def cancel(self) -> None:
        """Stop it."""


class Waiting:
    """Says now and then, in a log, that something still goes on: a compiler, a kernel or a disk says nothing itself."""

    def __init__(self, say: Callable[[str], Any], timer: Callable[..., TimerLike] = threading.Timer):
        """Nothing goes on yet."""
        self._say, self._timer, self._lock = say, timer, threading.Lock()
        self._what = ""
        self._alarm: TimerLike | None = None

    def begin(self, what: str) -> None:
        """From now on, this goes on."""
        self.end()
        with self._lock:
            self._what = what
            self._set(FIRST, FIRST)

    def now(self, what: str) -> None:
        """It has come so far."""
        self._what = what

    def end(self) -> None:
        """It is done."""
        with self._lock:
            self._what = ""
            if self._alarm is not None:
                self._alarm.cancel()
                self._alarm = None

    def _set(self, seconds: float, at: float) -> None:
        """Ring after so many seconds, when it has taken `at` seconds."""
        context = contextvars.copy_context()  # where this thread is silent, so is the alarm's
        alarm = self._timer(seconds, lambda: context.run(self._ring, alarm, at))
        alarm.daemon = True
        self._alarm = alarm
        alarm.start()

    def _ring(self, alarm: TimerLike, at: float) -> None:
        with self._lock:
            if alarm is not self._alarm:  # it was too late to cancel it
                return
            self._say(f"{self._what}: {clock(at)} so far")
            self._set(at, 2 * at)
