"""The processes of a run find each other by JAX's distributed runtime, or it is said who is missing."""

import errno
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.processes.places import Place
from dpo_jax.processes.watch import RETRY

LOOK_SECONDS = 0.2
SAID_SECONDS = 10.0
"""After so long a process says what it waits for."""
ANSWER_SECONDS = 2.0
MOST_SECONDS = 3500
"""JAX's service aborts all processes after an hour."""
STAYS_SECONDS = 3
"""By which the others wait longer than process 0, which counts them."""
LONGER = 60
"""Seconds that JAX may take beyond the time of this module, so that it does not abort the process first."""

_joined = threading.Event()
_joined.set()
"""Whether no join is under way."""


class NotTogether(UserError):
    """Not all processes came in time."""

    code = RETRY


def join(place: Place, seconds: int, connect: Callable[[int], None]) -> None:
    """Return when all processes have come.

    Whatever waits in C++ hears no signal, so it waits in a thread, and Ctrl-C, SIGTERM and the time count at once.

    Args:
      place: of this process.
      seconds: that they may take.
      connect: begins JAX's runtime within so many seconds; returns when all processes have joined it.

    Raises:
      NotTogether: not all of them came in time.
      UserError: the address cannot be used.
    """
    _check_port(place)
    seconds = min(seconds, MOST_SECONDS)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            connect(seconds + LONGER)
        except BaseException as error:
            failed.append(error)
        _joined.set()

    _joined.clear()
    began, said = time.monotonic(), False
    threading.Thread(target=work, name="join", daemon=True).start()
    while not _joined.wait(LOOK_SECONDS):
        waited = time.monotonic() - began
        if waited > SAID_SECONDS and not said:
            print(f"waiting for the other processes of this run: {missing(place)}", file=sys.stderr, flush=True)
            said = True
        if waited > seconds + (STAYS_SECONDS if place.process else 0):
            raise NotTogether(f"{_who(place)} within {seconds} s (distributed.start_timeout): {missing(place)}")
    if failed:
        why = re.sub(r"\s+", " ", str(failed[0]))[:200]
        raise UserError(f"{_who(place)}: {why}") from failed[0]


def leave(error: BaseException, code: int) -> None:
    """End this process where it still waits for the others: JAX's runtime would end with pages of its own. Returns
    where it does not."""
    if _joined.is_set():
        return
    if not isinstance(error, UserError) and code == RETRY:
        traceback.print_exception(error)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _who(place: Place) -> str:
    return (
        f"distributed: process {place.process} of {place.processes} (by {place.told_by}) did not find the others at "
        f"{place.coordinator}"
    )


def missing(place: Place) -> str:
    """What can be seen of why not all processes are there: on process 0 from where it is spoken to, on another whether
    that answers."""
    host, _, port = place.coordinator.rpartition(":")
    if place.process == 0:
        there = _callers(int(port))
        hosts = f" ({', '.join(f'{count} from {address}' for address, count in there.items())})" if there else ""
        return f"{there.total()} of {place.processes - 1} have called{hosts}"
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except OSError as error:
        return f"nothing answers at {place.coordinator} ({error.strerror or error})"
    return f"{place.coordinator} answers, and another process is missing; process 0 says who has called"


def _callers(port: int) -> Counter[str]:
    """Addresses from which others are connected to a port of this process, and how many."""
    import psutil

    connections = [one for one in psutil.Process().net_connections("tcp") if one.status == psutil.CONN_ESTABLISHED]
    own = {_plain(one.laddr) for one in connections if one.raddr.port == port}  # the first client of its own store
    callers = (_plain(one.raddr) for one in connections if one.laddr.port == port)
    return Counter(address for address, number in callers if (address, number) not in own)


def _plain(end: Any) -> tuple[str, int]:
    """Address and port of an end of a connection."""
    return end.ip.removeprefix("::ffff:"), end.port


def _check_port(place: Place) -> None:
    """Of process 0: that its port is free. JAX would wait for whatever program has it.

    Raises:
      UserError: it is not.
    """
    if place.process:
        return
    port = int(place.coordinator.rpartition(":")[2])
    try:
        with socket.create_server(("", port)):
            return
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            return  # JAX is the judge of what it can use
        raise UserError(
            f"distributed: process 0 cannot listen on port {port} ({os.strerror(error.errno)}): another program has "
            f"it, or only the system may; give all processes another port of {place.coordinator}"
        ) from error
