"""Signals that ask a run to stop."""

import signal
from typing import Any


class Interrupts:
    """Ctrl-C and SIGTERM ask the loop to stop after the step it is in; a second Ctrl-C stops at once."""

    def __init__(self):
        """Nothing has been asked yet."""
        self.asked: int | None = None

    def __enter__(self) -> "Interrupts":
        """Listen."""
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        """Listen no more."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number
