"""Signals that ask a run to stop."""

import signal
import threading
from typing import Any

from dpo_jax.config.command import ENDING


class Interrupts:
    """Ctrl-C, SIGTERM and SIGHUP ask the loop to stop after the step it is in; a second Ctrl-C stops at once.

    Python lets the main thread alone listen, so a loop in another thread is not asked.
    """

    def __init__(self):
        """Nothing has been asked yet."""
        self.asked: int | None = None

    def __enter__(self) -> "Interrupts":
        """Listen."""
        here = threading.current_thread() is threading.main_thread()
        # a signal that is ignored, as SIGHUP is under nohup, stays so
        ending = [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, *ending) if here}
        return self

    def __exit__(self, *_: Any) -> None:
        """Listen no more."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number
