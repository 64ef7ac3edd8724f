"""The page of a run that goes on: drawn again now and then, and never a reason for the run to stop."""

import time
from collections.abc import Callable
from pathlib import Path

from dpo_jax.errors import one_line
from dpo_jax.page.render import PAGE, write_page

LEAST_SECONDS = 60.0
"""Between two drawings while a run goes on."""
SHARE = 0.01
"""Of a run's time that drawing may take, at most."""


class Page:
    """Draws a run's page in its folder, at most every LEAST_SECONDS and for no more than a SHARE of the time."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic):
        """The page of this folder's run; `clock` gives seconds."""
        self._folder, self._clock = folder, clock
        self._next, self._failed = clock(), False

    def refresh(self, say: Callable[[str], None]) -> None:
        """Draw it, if the last time is long ago."""
        if self._clock() >= self._next:
            self._draw(say)

    def end(self, say: Callable[[str], None]) -> None:
        """Draw it as it is to stay."""
        self._draw(say)

    def _draw(self, say: Callable[[str], None]) -> None:
        began = self._clock()
        try:
            write_page(self._folder)
        except Exception as error:  # whatever is wrong with a picture is no reason to lose a night of training
            if not self._failed:
                say(f"{PAGE} could not be drawn ({one_line(error)}); the run does not need it")
            self._failed = True
        ended = self._clock()
        self._next = ended + max(LEAST_SECONDS, (ended - began) / SHARE)
