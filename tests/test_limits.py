"""Work within limits: what a process may die of is said, and what runs here is stopped."""

import contextlib
import signal
import subprocess
import sys

import pytest

from dpo_jax import limits
from dpo_jax.errors import UserError
from dpo_jax.limits import Died, bounded, tried
from tests.support import pieces
from tests.support.tiers import night


def test_a_try_gives_its_result():
    assert tried(pieces.doubled, [1, "\u00e9"]) == [1, "\u00e9"] * 2


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raise", r"fails \(ValueError: unlucky\)"),
        ("exit", "ends its process .exit code 3"),
        ("abort", "ends its process .signal 6"),
        night("loop", "is not done after 5 s"),
        ("memory", "wants more than 512 MiB"),
        ("write", "fails|ends its process"),
    ],
)
def test_how_a_try_ended_is_said(how, says, capfd):
    with pytest.raises(Died, match=says):
        tried(pieces.ending, how, seconds=5.0, memory=512 << 20)
    assert capfd.readouterr() == ("", "")


def test_python_code_is_stopped_in_this_process():
    with pytest.raises(UserError, match="it is not done after 0.2 s"), bounded("it", seconds=0.2):
        while True:
            pass
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded on Linux only")
def test_memory_is_bounded_in_this_process():
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(UserError, match="it wants more than 64 MiB"), bounded("it", seconds=9.0, room=64 << 20):
        bytearray(200 << 20)
    assert resource.getrlimit(resource.RLIMIT_AS) == before and len(bytearray(200 << 20))


def test_what_ends_in_time_is_left_alone():
    with bounded("it", seconds=9.0):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 8
    with pytest.raises(KeyError), bounded("it", seconds=9.0):
        raise KeyError
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


ALARMS = """
import signal
from dpo_jax import limits
from dpo_jax.errors import UserError
limits.AGAIN, stopped = 5e-5, 0
for _ in range(500):
    try:
        with limits.bounded("it", seconds=0.001):
            while True:
                pass
    except UserError:
        stopped += 1
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
print(stopped)
"""


def test_an_alarm_that_comes_again_while_the_first_is_on_its_way_changes_nothing():
    """Every 50 us, so that some come between the block and what catches the error; alone, as what checks the types of
    functions here is on that way too."""
    done = subprocess.run([sys.executable, "-c", ALARMS], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "500\n"), done.stderr


@contextlib.contextmanager
def on_the_way():
    """A frame that runs between a block's own code and what stands around it."""
    yield sys._getframe(1)


def test_an_alarm_raises_in_a_blocks_own_code_alone():
    with on_the_way() as between:
        limits._late(signal.SIGALRM, between)
    with pytest.raises(limits._Late):
        limits._late(signal.SIGALRM, sys._getframe())
