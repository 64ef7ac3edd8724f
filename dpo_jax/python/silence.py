"""What one run prints, kept from the screen: no thread but its own becomes silent, and redirections stay what they are.

A stream stands in the place of sys.stdout while any run is silent. It drops what is written from a context that is
marked as silent, and hands everything else on to the stream that it stands for. A thread that a run starts, and that
may print, is started in a copy of the run's context. What is not kept from it is a redirection of sys.stdout that
another thread begins in the middle of a silent run: until it ends it stands for the whole process, as Python has it.
"""

import collections
import contextlib
import io
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

_SILENT: ContextVar[bool] = ContextVar("silent", default=False)
_LOCK = threading.Lock()
"""Of sys.stdout, and of how many runs need a stream in its place."""
_LEFT: collections.deque[Any] = collections.deque(maxlen=16)
"""Streams that gave their place up lately: `print` in the middle of a line still writes to one that it does not own."""


class _Nothing(io.RawIOBase):
    """Bytes go nowhere."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        return len(data)


_NOWHERE = io.TextIOWrapper(io.BufferedWriter(_Nothing()), encoding="utf-8", errors="backslashreplace")


class Sieve:
    """A stream for sys.stdout: that which it stands for, or nowhere, by the context of who writes."""

    def __init__(self, stream: Any):
        """Stand for a stream; nobody needs it yet."""
        self.stream, self.users = stream, 0

    def write(self, text: str) -> int:
        """Write to the stream, or drop it."""
        return self._now().write(text)

    def flush(self) -> None:
        """Flush what was written to."""
        self._now().flush()

    def __getattr__(self, name: str) -> Any:
        """Everything else is the stream's own."""
        return getattr(self._now(), name)

    def leave(self) -> None:
        """Give its place back if nobody needs it; somebody who redirected sys.stdout meanwhile may have put it back."""
        if not self.users and sys.stdout is self:
            _LEFT.append(self)
            sys.stdout = self.stream

    def _now(self) -> Any:
        if not self.users:
            self.leave()
        return _NOWHERE if _SILENT.get() else self.stream


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Nothing that this context prints is seen. Others may be inside at a time, and leave in any order."""
    with _LOCK:
        here = sys.stdout
        sieve = here if isinstance(here, Sieve) else Sieve(here)
        sieve.users += 1
        if here is not None:  # or nothing that is printed is seen anyway
            sys.stdout = sieve
    token = _SILENT.set(True)
    try:
        yield
    finally:
        _SILENT.reset(token)
        with _LOCK:
            sieve.users -= 1
            sieve.leave()


@contextlib.contextmanager
def aloud() -> Iterator[None]:
    """Inside `silent`, as if outside it."""
    token = _SILENT.set(False)
    try:
        yield
    finally:
        _SILENT.reset(token)
