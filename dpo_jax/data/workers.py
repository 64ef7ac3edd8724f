"""A function over many pieces of work in processes of their own, with the results in the order of the work.

Each process is a fresh interpreter that imports what it needs and nothing of the main program (no jax, no `__main__`),
and ends by itself as soon as this process is gone, however that ended: its end of the pipe is closed then.
"""

import os
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from multiprocessing.connection import Connection, Pipe
from typing import Generic, TypeVar

from dpo_jax.errors import UserError

C = TypeVar("C")
W = TypeVar("W")
R = TypeVar("R")
SECONDS = 900
"""Longest that a piece of work may take, which takes a second."""
MOST = 16
"""Processes that are started unless told otherwise: more would wait for the one that reads the files."""


def processes(wanted: int | None) -> int:
    """How many processes to use: as many as wanted, or (None) one for each core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(cores, MOST) if wanted is None else wanted


def in_order(
    function: Callable[[C, W], R], context: C, work: Iterable[W], *, workers: int, alone: int
) -> Generator[R, None, None]:
    """`function(context, piece)` for each piece of work, in its order.

    The first pieces are done in this process, so that little work pays for no other process.

    Args:
      function: of a module; it and its arguments and results go through pipes.
      context: what is the same for all pieces; sent once.
      work: the pieces. They are taken as they are needed, some in advance.
      workers: processes; with fewer than two all is done in this one.
      alone: pieces that are done in this process before others are started.

    Raises:
      UserError: what the function raises, at its piece; or a process ended before its work was done.
    """
    pieces = iter(work)
    for piece in islice(pieces, alone) if workers > 1 else pieces:
        yield function(context, piece)
    first = list(islice(pieces, 1))
    if first:
        yield from _shared(function, context, _chained(first, pieces), workers)


def _chained(first: list[W], rest: Iterator[W]) -> Iterator[W]:
    yield from first
    yield from rest


def _shared(function: Callable[[C, W], R], context: C, pieces: Iterator[W], workers: int) -> Iterator[R]:
    """One thread for each process; a thread hands over a piece, and waits for its result."""
    crew = _Crew(function, context)
    pool = ThreadPoolExecutor(workers, "workers", initializer=crew.hire)
    try:
        results: deque[Future[R]] = deque(_submitted(pool, crew, islice(pieces, 2 * workers)))
        while results:
            yield results.popleft().result()
            results.extend(_submitted(pool, crew, islice(pieces, 1)))
    finally:  # also where the caller wants no more, and on Ctrl-C
        crew.dismiss()
        pool.shutdown(cancel_futures=True)


def _submitted(pool: ThreadPoolExecutor, crew: "_Crew[W, R]", pieces: Iterator[W]) -> Iterator[Future[R]]:
    """A result to come for each piece. What taking one raises comes in its turn, after the results of those before."""
    try:
        for piece in pieces:
            yield pool.submit(crew.do, piece)
    except UserError as error:
        failed: Future[R] = Future()
        failed.set_exception(error)
        yield failed


class _Crew(Generic[W, R]):
    """The processes, one for each thread that calls `hire`."""

    def __init__(self, function: Callable[[C, W], R], context: C):
        self._task = (function, context)
        self._mine = threading.local()
        self._all: list[tuple[subprocess.Popen, Connection]] = []
        self._lock = threading.Lock()
        self._dismissed = False

    def hire(self) -> None:
        """Start this thread's process."""
        ours, theirs = Pipe()
        with self._lock, theirs:
            if self._dismissed:
                ours.close()
                return
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", f"from {__name__} import serve; serve({theirs.fileno()})"],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # A tokenizer's own threads would get into each other's way: there is a process for each core.
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(sys.path)},
                process_group=0,  # Ctrl-C is for this process, which ends the others
            )
            self._all.append((process, ours))
        self._mine.process, self._mine.pipe = process, ours
        self._mine.fresh = True

    def do(self, piece: W) -> R:
        """The result of a piece, from this thread's process."""
        pipe: Connection = self._mine.pipe
        try:
            if self._mine.fresh:
                self._mine.fresh = False
                pipe.send(self._task)
            pipe.send(piece)
            if not pipe.poll(SECONDS):
                raise UserError(
                    f"data.workers: a process that tokenises is not done with its rows after {SECONDS} s; look for "
                    "very long rows, or for a tokenizer that does not end"
                )
            result, error, trace = pipe.recv()
        except (EOFError, OSError):
            raise UserError(self._died()) from None
        if error is not None:
            raise error
        if trace is not None:
            raise RuntimeError(f"a worker process failed:\n{trace}")
        return result

    def _died(self) -> str:
        code = self._mine.process.wait()
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return (
            f"data.workers: a process that tokenises ended in the middle of its work ({how}); free some memory, or set "
            "data.workers=1"
        )

    def dismiss(self) -> None:
        """End all processes, whatever they are doing."""
        with self._lock:
            self._dismissed = True
            for process, _ in self._all:
                process.kill()
        for process, pipe in self._all:
            process.wait()
            pipe.close()


def serve(descriptor: int) -> None:
    """What a process does: take pieces off its pipe and put results on it, until the pipe is closed."""
    with Connection(descriptor) as pipe:
        try:
            function, context = pipe.recv()
            while True:
                piece = pipe.recv()
                pipe.send(_answer(function, context, piece))
        except (EOFError, OSError):
            return


def _answer(function: Callable[[C, W], R], context: C, piece: W) -> tuple[R | None, UserError | None, str | None]:
    try:
        return function(context, piece), None, None
    except UserError as error:
        return None, error, None
    except Exception:  # shown where it is waited for
        return None, None, traceback.format_exc()
