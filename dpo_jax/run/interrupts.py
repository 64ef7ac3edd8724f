"""Signals that ask a run to stop, on any of its processes."""

import functools
import signal
import sys
import threading
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo_jax import sharding
from dpo_jax.config.command import ENDING
from dpo_jax.processes.here import here

AGAIN = 0.05
"""Seconds after which a Ctrl-C that Python dropped is sent again."""


class Interrupts:
    """Ctrl-C, SIGTERM and SIGHUP ask the loop to stop after the step it is in; a second Ctrl-C stops at once.

    Python lets the main thread alone listen, so a loop in another thread is not asked.
    """

    def __init__(self, mesh: Mesh | None = None):
        """Nothing has been asked yet; `mesh` is that of a run of several processes."""
        self.asked: int | None = None
        self._agreed: int | None = None
        self._mesh, self._under_way = mesh if here().count > 1 else None, None

    def __enter__(self) -> "Interrupts":
        """Listen."""
        is_main = threading.current_thread() is threading.main_thread()
        # a signal that is ignored, as SIGHUP is under nohup, stays so
        ending = [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, *ending) if is_main}
        self._hook = sys.unraisablehook
        if is_main:
            sys.unraisablehook = self._again
        return self

    def __exit__(self, *_: object) -> None:
        """Listen no more."""
        if self._before:
            sys.unraisablehook = self._hook
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def stop(self) -> int | None:
        """The signal after which the run stops now; of several processes the one that they agreed on."""
        return self.asked if self._mesh is None else self._agreed

    def agree(self) -> None:
        """Agree with the other processes on whether to stop; every one of them calls once a step.

        It is by what they knew a step before, so that nobody waits for it.
        """
        if self._mesh is not None:
            before, self._under_way = self._under_way, _largest(self._mesh, self.asked or 0)
            self._agreed = None if before is None else int(before) or None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number

    def _again(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """Send a Ctrl-C again, a little later, where Python drops what it raises, as at the end of an object."""
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            self._hook(unraisable)
        else:
            threading.Timer(AGAIN, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()


def _largest(mesh: Mesh, number: int) -> jax.Array:
    """The largest of what the processes say; it is under way when this returns."""
    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    said = jax.make_array_from_callback((mesh.size,), split, lambda index: np.full(1, number, np.int32))
    return _reduced(mesh)(said)


@functools.cache
def _reduced(mesh: Mesh) -> Any:
    return jax.jit(jnp.max, out_shardings=sharding.replicated(mesh))
