"""Processes that wait for each other at the start: who is missing is said, the port is free, signals are heard."""

import _thread
import contextlib
import signal
import socket
import subprocess
import sys
import threading

import pytest

from dpo_jax.errors import UserError
from dpo_jax.processes import joining
from dpo_jax.processes.joining import NotTogether, join, missing
from dpo_jax.processes.places import Place
from dpo_jax.processes.watch import RETRY


@pytest.fixture
def port():
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def never():
    """A connection that is never made, as long as the test runs."""
    come = threading.Event()
    yield lambda seconds: come.wait() and None
    come.set()
    joining._joined.wait(20)


def place(port, process, processes=3):
    return Place(f"127.0.0.1:{port}", processes, process)


def test_it_returns_when_all_have_come_and_jax_is_given_more_time_than_they_have(port):
    given = []
    join(place(port, 0), 20, given.append)
    join(place(port, 1), 7200, given.append)
    assert given[0] > 20 and given[1] <= 3600  # JAX's own service aborts after an hour


@pytest.mark.parametrize("process, seen", [(0, "0 of 2 have called"), (1, "nothing answers at 127.0.0.1")])
def test_who_waited_in_vain_says_for_whom_and_how_long(port, never, process, seen):
    with pytest.raises(NotTogether, match=seen) as found:
        join(place(port, process), 0, never)
    assert f"process {process} of 3" in str(found.value) and "within 0 s (distributed.start_timeout)" in str(
        found.value
    )
    assert found.value.code == RETRY and "\n" not in str(found.value)


def test_what_jax_says_is_one_line(port):
    def refuses(seconds):
        raise RuntimeError("no\nsuch\thost")

    with pytest.raises(UserError, match="did not find the others at .*: no such host"):
        join(place(port, 1), 20, refuses)


def test_a_port_that_another_program_has_is_refused_at_once(port):
    asked = []
    with socket.create_server(("", port)):
        with pytest.raises(UserError, match=f"cannot listen on port {port} .*give all processes another port"):
            join(place(port, 0), 20, asked.append)
        assert not asked
        join(place(port, 1), 20, asked.append)  # where process 0 listens


def test_a_ctrl_c_is_heard_while_jax_waits(port, never):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job of a script's background has none
    try:
        threading.Timer(0.05, _thread.interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            join(place(port, 1), 60, never)
    finally:
        signal.signal(signal.SIGINT, before)


CALL = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))):
    print("there", flush=True)
    input()
"""


def test_process_0_counts_who_has_called_and_not_itself(port):
    with contextlib.ExitStack() as opened:
        server = opened.enter_context(socket.create_server(("127.0.0.1", port)))
        opened.enter_context(socket.create_connection(("127.0.0.1", port)))
        opened.enter_context(server.accept()[0])
        assert missing(place(port, 0)) == "0 of 2 have called"
        assert "answers, and another process is missing" in missing(place(port, 1))
        opened.enter_context(server.accept()[0])
        command = [sys.executable, "-c", CALL, str(port)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None and other.stdout.readline() == b"there\n"
            opened.enter_context(server.accept()[0])
            assert missing(place(port, 0)) == "1 of 2 have called (1 from 127.0.0.1)"
            other.communicate(b"\n")


def test_a_process_that_still_waits_leaves_at_once(port, never, monkeypatch):
    codes = []
    monkeypatch.setattr(joining.os, "_exit", codes.append)
    joining.leave(UserError("x"), 2)
    assert codes == []
    with pytest.raises(NotTogether) as found:
        join(place(port, 1), 0, never)
    joining.leave(found.value, RETRY)
    assert codes == [RETRY]
