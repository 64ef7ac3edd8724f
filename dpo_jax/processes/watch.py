"""A thread that tells the other processes that this one lives, and ends it when one of them does not.

What the runtime notices by itself is a process that is dead or has been stopped, after a while and with an abort. Here
a process that hangs is noticed too, whoever it is that it keeps waiting, and each process ends with the cause.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from dpo_jax.processes.here import Failure, Here

BEAT_SECONDS = 1.0
RETRY = 76
"""Exit code of a process that ends because of another one, or of a fault that may pass: run the same command again."""
STAYS_SECONDS = 3.0
"""How long process 0 is still there once it has told why it ends."""
SILENT_SECONDS = 3.0
"""Without a beat for so long, a process is taken for silent where another has waited for it in vain."""
LOST_SECONDS = 5.0
"""How long the store of process 0 may not answer."""


class Beat(NamedTuple):
    """What process 0 has heard of a process."""

    number: int
    stage: str
    waits: bool
    """Whether it waits for another process."""
    numbers: dict[str, float]


class Watch:
    """Two threads: one that beats and looks for failures, and one that ends this process when it must."""

    def __init__(self, place: Here):
        """Of this process."""
        self._place, self._number, self._stopped = place, 0, threading.Event()
        # all have joined the runtime when this begins, so one that is dead before its first beat is missed in time too
        self._heard = {
            process: (Beat(0, "joined the run", False, {}), time.monotonic()) for process in range(place.count)
        }
        self._answered = time.monotonic()
        self._moved: tuple[Any, float] = (None, time.monotonic())
        self._threads = [
            threading.Thread(target=self._watch, args=(look,), name=look.__name__, daemon=True)
            for look in (self._look, self._late)
        ]

    def start(self) -> None:
        """Begin to beat."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Beat no more; returns when no question to the store is under way."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(BEAT_SECONDS * 10)

    def silent(self, seconds: float) -> list[int]:
        """Processes that are not heard of in the next so many seconds."""
        before = self._beats()
        self._stopped.wait(seconds)
        after = self._beats()
        return sorted(process for process, beat in after.items() if before.get(process) == beat)

    def _watch(self, look: Callable[[], Failure | None]) -> None:
        """Look again and again, and end the process when there is a failure."""
        while not self._stopped.wait(BEAT_SECONDS):
            try:
                failure = look()
            except Exception:  # of whatever kind the store raises; how long there has been no answer is looked at too
                continue
            if failure is not None and not self._stopped.is_set():
                leave_at_once(self._place, failure)

    def _late(self) -> Failure | None:
        """What this process does, or an answer of process 0, has taken too long."""
        return self._too_long() or self._unanswered()

    def _look(self) -> Failure | None:
        """Say that this process lives; why the run ended, if it did."""
        place, stage = self._place, self._place.stage
        self._number += 1
        beat = [self._number, stage.name, stage.limit is None, place.numbers]
        place.store.key_value_set(f"beats/{place.process}", json.dumps(beat), allow_overwrite=True)
        failure = place.failure() or (self._others() if place.owns else None)
        self._answered = time.monotonic()
        return failure

    def _unanswered(self) -> Failure | None:
        """Process 0 does not answer any more."""
        place, late = self._place, time.monotonic() - self._answered
        if late <= place.timeout:
            return None
        why = f"process 0 has not answered for {late:.0f} s (distributed.timeout)"
        return Failure(place.process, place.host, RETRY, why)

    def _too_long(self) -> Failure | None:
        """Of this process: what it does has taken longer than it may."""
        stage, now = self._place.stage, time.monotonic()
        if stage.limit is None or now - stage.since <= stage.limit:
            return None
        setting = "distributed.timeout" if stage.limit == self._place.timeout else "distributed.start_timeout"
        why = f"{stage.name} has taken more than {stage.limit:.0f} s ({setting})"
        if now - self._answered > LOST_SECONDS:
            return Failure(self._place.process, self._place.host, RETRY, why)
        return self._place.failed(RETRY, why + self._who_is_late())

    def _who_is_late(self) -> str:
        """Which of the others say nothing any more, and what those do that do something else."""
        place, silent = self._place, self.silent(SILENT_SECONDS)
        words = {True: "is not heard of any more; it last said", False: "does"}
        others = sorted(
            f"process {process} {words[process in silent]}: {beat.stage}"
            for process, beat in self._beats().items()
            if process != place.process and (process in silent or beat.stage != place.stage.name)
        )
        return f"; {'; '.join(others[:4])}" if others else ""

    def _beats(self) -> dict[int, Beat]:
        found = self._place.store.key_value_dir_get("beats/")
        return {int(key.rsplit("/", 1)[-1]): Beat(*json.loads(value)) for key, value in found}

    def _others(self) -> Failure | None:
        """Of process 0: one that is not heard of any more, or all that wait for each other."""
        now, place, beats = time.monotonic(), self._place, self._beats()
        place.heard = {process: beat.numbers for process, beat in beats.items()}
        for process, beat in beats.items():
            if process not in self._heard or self._heard[process][0].number != beat.number:
                self._heard[process] = (beat, now)
        for process, (beat, when) in self._heard.items():
            if now - when > place.timeout and process != place.process:
                why = f"was not heard of for {now - when:.0f} s (distributed.timeout); it last said: {beat.stage}"
                return self._told(process, why)
        return self._deadlock(beats, now)

    def _deadlock(self, beats: dict[int, Beat], now: float) -> Failure | None:
        said = sorted((process, beat.stage) for process, beat in beats.items())
        if not all(beat.waits for beat in beats.values()) or self._moved[0] != said:
            self._moved = (said, now)
        if now - self._moved[1] <= self._place.slow:
            return None
        return self._place.failed(
            RETRY, f"all processes wait for each other: {'; '.join(f'process {p}: {s}' for p, s in said[:4])}"
        )

    def _told(self, process: int, why: str) -> Failure:
        """A failure of a process that cannot say so itself."""
        place = self._place
        return place.failed(RETRY, f"process {process} {why}")


def leave_at_once(place: Here, failure: Failure, code: int | None = None) -> None:
    """End this process with what is to be said, and without waiting for any other to end.

    Process 0 stays for a moment, as the others hear of the failure from its store.
    """
    if not place.leaves():
        threading.Event().wait()
    if code is None:
        print(f"error: {failure.line()}", file=sys.stderr, flush=True)
    _show_what_hangs(place)
    place.recorded(failure)
    if place.owns:
        time.sleep(STAYS_SECONDS)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(failure.code if code is None else code)


def _show_what_hangs(place: Here) -> None:
    """Where all threads are, if this process has been at one thing for long: it may be what the others waited for."""
    late = time.monotonic() - place.stage.since
    if place.stage.limit is not None and late > 0.8 * place.timeout:
        print(f"{place.stage.name}: for {late:.0f} s, all threads:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
