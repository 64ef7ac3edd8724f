"""What the processes of a run agree on: decisions of process 0, values that must be the same, and who waits for whom.

All goes through the key-value store of JAX's coordination service, which process 0 holds. Every process calls the same
functions in the same order. In a run of one process each of them does nothing but call what it was given.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from dpo_jax.errors import UserError

T = TypeVar("T")
SLICE_MS = 1000
"""How long one question to the store may take; it is asked again as long as everybody lives."""
SEEN_SECONDS = 10.0
"""How long a file that another host has written may take to be seen on a shared file system."""
DIFFER = "the processes of this run differ"
"""How it begins when one of them has something else."""
ENDED = "ended"
"""Key of the first failure of any process."""


@runtime_checkable
class Store(Protocol):
    """What is used of JAX's distributed client."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        """Set a value; raises where there is one and it may not be overwritten."""

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        """The value, once there is one; raises DEADLINE_EXCEEDED."""
        ...

    def key_value_try_get(self, key: str) -> str:
        """The value; raises NOT_FOUND."""
        ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        """All keys that begin like this, with their values."""
        ...


class Stage(NamedTuple):
    """What a process is doing, and since when (`time.monotonic`)."""

    name: str
    since: float
    limit: int | None
    """Seconds that it may take; None while it waits for others, who have limits of their own."""


class Failure(NamedTuple):
    """Why a run of several processes ended, as all of them are told."""

    process: int
    host: str
    code: int
    why: str

    def line(self) -> str:
        """As it is said by a process that is not the cause."""
        return f"process {self.process} ({self.host}) ended the run: {self.why}"


class Here:
    """This process, among those of its run."""

    def __init__(
        self, store: Store | None = None, process: int = 0, count: int = 1, *, timeout: int = 300, slow: int = 1800
    ):
        """Process `process` of `count`. A step may take `timeout` seconds, anything else `slow`."""
        self._store, self.process, self.count = store, process, count
        self.timeout, self.slow = timeout, slow
        self.host = socket.gethostname()
        self._calls: dict[str, int] = {}
        self.stage = Stage("starting", time.monotonic(), slow)
        self.numbers: dict[str, float] = {}
        """What process 0 may know of this one: seconds, bytes."""
        self.heard: dict[int, dict[str, float]] = {}
        """On process 0, the `numbers` of each process as it last told them."""
        self.on_failure: Callable[[Failure], None] | None = None
        self._leaving = threading.Lock()

    @property
    def owns(self) -> bool:
        """Whether this is process 0, which writes and decides."""
        return self.process == 0

    @property
    def store(self) -> Store:
        """The store of a run of several processes."""
        assert self._store is not None, "a run of one process has nobody to agree with"
        return self._store

    # ------------------------------------------------------------------------------------------ what it is doing

    def doing(self, name: str, *, step: bool = False) -> None:
        """Something begins, or has come on: the time that it may take is counted from now."""
        self.stage = Stage(name, time.monotonic(), self.timeout if step else self.slow)

    def moved(self) -> None:
        """What it is doing has come on."""
        self.stage = self.stage._replace(since=time.monotonic())

    @contextlib.contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """In the block this process waits for another one, which has a limit of its own."""
        before = self.stage
        self.stage = Stage(f"{before.name}, waiting for {name}", time.monotonic(), None)
        try:
            yield
        finally:
            self.stage = before._replace(since=time.monotonic())

    # ------------------------------------------------------------------------------------------ agreement

    def decide(self, name: str, decision: Callable[[], T]) -> T:
        """What process 0 decides, on every process; it must be something that JSON can say.

        Raises:
          UserError: process 0 refuses; on all processes the same.
        """
        if self.count == 1:
            return decision()
        key = self._key(name)
        if not self.owns:
            with self.waiting(f"process 0 ({name})"):
                told = json.loads(self._get(key))
            if "refused" in told:
                raise UserError(told["refused"])
            return told["decided"]
        try:
            found = decision()
        except UserError as error:
            self.store.key_value_set(key, json.dumps({"refused": str(error)}))
            raise
        self.store.key_value_set(key, json.dumps({"decided": found}))
        return found

    def everyone(self, name: str, value: object, *, beside: bool = False) -> list[Any]:
        """What each process says, by its number, on every process; all wait for the last one.

        A thread `beside` the main one says nothing of what the process is doing.
        """
        if self.count == 1:
            return [value]
        key, waiting = self._key(name), contextlib.nullcontext if beside else self.waiting
        self.store.key_value_set(f"{key}/{self.process}", json.dumps(value))
        if self.owns:
            said = []
            for process in range(self.count):
                with waiting(f"process {process} ({name})"):
                    said.append(json.loads(self._get(f"{key}/{process}")))
            self.store.key_value_set(f"{key}/all", json.dumps(said))
            return said
        with waiting(f"all processes ({name})"):
            return json.loads(self._get(f"{key}/all"))

    def by_turns(
        self, name: str, items: Sequence[Any], work: Callable[[Sequence[Any]], Iterable[Any]], *, beside: bool = False
    ) -> list[Any]:
        """What `work` makes of each item, in their order, on every process; each has every so-manieth of them to do.

        All give the same items. What comes of one must be something that JSON can say.
        """
        told = self.everyone(name, list(work(items[self.process :: self.count])), beside=beside)
        return [told[number % self.count][number // self.count] for number in range(len(items))]

    def meet(self, name: str) -> None:
        """Return once every process has come here."""
        self.everyone(name, None)

    def come(self, name: str, seconds: float) -> bool:
        """Whether every process comes here within so many seconds; nobody waits for longer."""
        if self.count == 1:
            return True
        key, until = self._key(name), time.monotonic() + seconds
        with contextlib.suppress(Exception):  # the store is gone with process 0
            self.store.key_value_set(f"{key}/{self.process}", "here")
            while len(self.store.key_value_dir_get(f"{key}/")) < self.count:
                if time.monotonic() > until:
                    return False
                time.sleep(0.1)
            return True
        return False

    def all_of(self, name: str, holds: bool) -> bool:
        """Whether something holds on every process."""
        return all(self.everyone(name, holds))

    def same(self, name: str, values: Mapping[str, Any]) -> None:
        """Return once every process has said what these are.

        Raises:
          UserError: a process has another value of one of them than process 0; on all processes the same.
        """
        said = self.everyone(name, {"host": self.host, "values": dict(values)})
        first = said[0]
        for process, other in enumerate(said[1:], 1):
            keys = [*first["values"], *(key for key in other["values"] if key not in first["values"])]
            for key in keys:
                mine, theirs = (one["values"].get(key) for one in (first, other))
                if mine != theirs:
                    raise UserError(
                        f"{name}: {key} is {mine} on process 0 ({first['host']}) and {theirs} on process {process} "
                        f"({other['host']}); start all processes with the same command, files and versions"
                    )

    def in_turn(self, name: str, work: Callable[[], T]) -> T:
        """The work of every process: first that of process 0, then that of the others, who find what it left behind.

        Raises:
          UserError: process 0 cannot do it.
        """
        if self.count == 1:
            return work()
        kept: list[T] = []
        self.decide(name, lambda: kept.append(work()))
        return kept[0] if self.owns else work()

    def shares(self, name: str, folder: Path) -> bool:
        """Whether a folder, which process 0 makes if need be, is the same one for every process.

        Process 0 writes a file into it for a moment, and the others look for it.
        """
        if self.count == 1:
            return True
        token = Path(self.decide(name, lambda: str(_token(folder))))
        found = self.all_of(f"{name} seen", is_seen(folder / token.name))
        if self.owns:
            token.unlink(missing_ok=True)
        return found

    def _key(self, name: str) -> str:
        self._calls[name] = self._calls.get(name, -1) + 1
        return f"dpo_jax/{name}/{self._calls[name]}"

    def _get(self, key: str) -> str:
        """A value, once there is one. It is waited for as long as need be: who is waited for has a limit of its own,
        and whoever is dead ends the run (see `watch`)."""
        while True:
            try:
                return self.store.blocking_key_value_get(key, SLICE_MS)
            except Exception as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    # ------------------------------------------------------------------------------------------ ends

    def failed(self, code: int, why: str) -> Failure:
        """Tell all processes that this one ends, and why; what is told first counts, and is returned."""
        mine = Failure(self.process, self.host, code, why)
        with contextlib.suppress(Exception):  # there is a failure already, or the store is gone
            self.store.key_value_set(ENDED, json.dumps(mine))
        return self.failure() or mine

    def failure(self) -> Failure | None:
        """Why the run ended, if it did."""
        try:
            return Failure(*json.loads(self.store.key_value_try_get(ENDED)))
        except Exception:
            return None

    def leaves(self) -> bool:
        """Whether it is the caller that ends this process; False if another thread does so already."""
        return self._leaving.acquire(blocking=False)

    def recorded(self, failure: Failure) -> None:
        """Let the owner of the output folder write down why the run ended."""
        if self.owns and self.on_failure is not None:
            with contextlib.suppress(Exception):  # whatever happens, this process ends now
                self.on_failure(failure)


def _token(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    token = folder / f".shared.{uuid.uuid4().hex}.tmp"
    token.write_text(f"{socket.gethostname()} {os.getpid()}\n")
    return token


def is_seen(path: Path) -> bool:
    """Whether what another host has written is there, once it has had time to be seen."""
    until = time.monotonic() + SEEN_SECONDS
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


_alone = Here()
_now = [_alone]


def here() -> Here:
    """This process, among those of its run."""
    return _now[-1]


def stand(place: Here | None) -> None:
    """From now on this process is there; None: alone."""
    _now[:] = [_alone if place is None else place]
