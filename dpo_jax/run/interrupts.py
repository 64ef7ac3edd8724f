"""Signals that ask a run to stop."""

import signal
from typing import Any

ASKING = ("SIGINT", "SIGTERM", "SIGHUP")
"""The last one, of a terminal that is closed, is no signal of Windows, and stays ignored under nohup."""


class Interrupts:
    """Ctrl-C, SIGTERM and SIGHUP ask the loop to stop after the step it is in; a second Ctrl-C stops at once."""

    def __init__(self):
        """Nothing has been asked yet."""
        self.asked: int | None = None

    def __enter__(self) -> "Interrupts":
        """Listen."""
        numbers = [getattr(signal, name) for name in ASKING if hasattr(signal, name)]
        heard = [n for n in numbers if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._ask) for number in heard}
        return self

    def __exit__(self, *_: Any) -> None:
        """Listen no more."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number
