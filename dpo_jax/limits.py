"""Work on what a stranger wrote, within limits of time, memory and output: in a process of its own, or in this one.

A tokenizer's regular expressions and a chat template are programs. What they may do to a process (never end, take all
memory, abort) is tried first in one that may die; what passes there is run here, and may still be stopped.
"""

import contextlib
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from dpo_jax.errors import UserError, one_line

SECONDS = 8.0
"""Of a processor, for a try in another process."""
WAITING = 6
"""Times as long a try may take by the clock, on a machine that has other things to do; what never ends computes."""
MEMORY = 2 << 30
"""Bytes of address space for a try; a vocabulary of 260,000 tokens takes 0.7 GiB."""
ROOM = 1 << 30
"""Bytes that work in this process may take beyond what it has."""
ONE_THREAD = ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_ARENA_MAX")
"""Each thread reserves address space, of which there is little."""


class Died(Exception):
    """A try ended badly: says how, in words that go on after "the tokenizer ..."."""


def tried(function: Callable[[Any], Any], argument: object, *, seconds: float = SECONDS, memory: int = MEMORY) -> Any:
    """`function(argument)` in a fresh process, which may take so much time and address space and write no file.

    Args:
      function: of a module; its argument and result are JSON.
      argument: what it is called with.
      seconds: how much of a processor's time it may take.
      memory: bytes of address space; not limited where the system cannot do that.

    Raises:
      Died: it took more, raised something, or its process ended.
    """
    task = json.dumps([function.__module__, function.__qualname__, argument, seconds, memory])
    program = f"from {__name__} import _serve; _serve()"
    path = os.pathsep.join(sys.path)
    env = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", **dict.fromkeys(ONE_THREAD, "1")}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", program],
            input=task.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=env,
            timeout=WAITING * seconds,
            process_group=0,  # Ctrl-C is for this process
        )
    except subprocess.TimeoutExpired:
        raise Died(f"is not done after {seconds:g} s") from None
    if code := done.returncode:
        if -code in (getattr(signal, "SIGXCPU", 0), signal.SIGKILL):
            raise Died(f"is not done after {seconds:g} s")
        raise Died(f"ends its process ({f'signal {-code}' if code < 0 else f'exit code {code}'})")
    result, failure = json.loads(done.stdout)
    if failure is not None:
        raise Died(failure)
    return result


def _serve() -> None:
    """What the process of a try does."""
    module, name, argument, seconds, memory = json.loads(sys.stdin.buffer.read())
    _limit(seconds, memory)
    result, failure = None, None
    try:
        result = getattr(importlib.import_module(module), name)(argument)
    except MemoryError:
        failure = f"wants more than {memory >> 20} MiB"
    except BaseException as error:  # a panic of Rust is no Exception
        failure = f"fails ({one_line(error)[:300]})"
    os.write(1, json.dumps([result, failure]).encode())
    os._exit(0)


def _limit(seconds: float, memory: int) -> None:
    try:
        import resource
    except ImportError:  # Windows, which has none
        return
    wanted = {"RLIMIT_AS": memory, "RLIMIT_CPU": math.ceil(seconds), "RLIMIT_CORE": 0, "RLIMIT_FSIZE": 0}
    for name, limit in wanted.items():
        with contextlib.suppress(ValueError, OSError):  # macOS has limits that it does not let one set
            resource.setrlimit(getattr(resource, name), (limit, limit))


# ---------------------------------------------------------------------------------------------- in this process


AGAIN = 0.1
"""Seconds after which it is said again that time is up, should that have come where nothing can be raised."""
_BETWEEN = frozenset(
    function.__code__.co_filename for function in (tried, contextlib.contextmanager, weakref.WeakValueDictionary.pop)
)
"""Files of code that runs between a block's own and what catches its error, or that loses what is raised in it."""


class _Late(BaseException):
    """Time is up; no Exception, so that nothing on the way catches it."""


@contextlib.contextmanager
def bounded(what: str, *, seconds: float, room: int = ROOM) -> Iterator[None]:
    """Ends the block if it takes longer than that, or more memory; Python code that is, not one long call of C.

    Nothing is bounded outside of the main thread, where no command runs a stranger's code; and memory only on Linux.

    Raises:
      UserError: it took more; begins with `what`.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGALRM) != signal.SIG_DFL:
        yield
        return
    try:
        with _roof(room), _timer(seconds):
            yield
    except _Late:
        raise UserError(f"{what} is not done after {seconds:g} s; give a template that ends") from None
    except MemoryError:
        raise UserError(f"{what} wants more than {room >> 20} MiB; give a template that writes less") from None


@contextlib.contextmanager
def _timer(seconds: float) -> Iterator[None]:
    signal.signal(signal.SIGALRM, _late)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _late(_: int, frame: FrameType | None) -> None:
    if frame is None or frame.f_code.co_filename not in _BETWEEN:
        raise _Late


@contextlib.contextmanager
def _roof(room: int) -> Iterator[None]:
    """No more address space than the process has now, and some room."""
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    limit = pages * resource.getpagesize() + room
    if soft != resource.RLIM_INFINITY and soft <= limit:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
