"""A silent run silences itself alone, and leaves sys.stdout what it was, however many there are."""

import contextlib
import io
import sys
import threading

import pytest

from dpo_jax.python.silence import Sieve, aloud, silent
from dpo_jax.reporting.waiting import Waiting


class Silence:
    """`silent` in a thread of its own, which does what it is told."""

    def __init__(self):
        self._go, self._done, self._within = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._within.wait(10)

    def _run(self):
        with silent():
            print("from a silent thread")
            self._within.set()
            assert self._go.wait(10)
            print(end=self._last)

    def end(self, last="still silent"):
        self._last = last
        self._go.set()
        self._thread.join(10)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_overlapping_silences_end_in_any_order_and_others_are_heard(capsys, order):
    before = sys.stdout
    some = [Silence() for _ in order]
    for number in order:
        print(f"heard {number}")
        some[number].end()
    assert sys.stdout is before
    assert capsys.readouterr().out.splitlines() == [f"heard {number}" for number in order]


def test_a_silence_within_another_and_what_is_said_aloud(capsys):
    before = sys.stdout
    with silent():
        with silent():
            print("dropped")
            with aloud():
                print("heard")
        print("dropped too", flush=True)
        sys.stdout.writelines(["dropped", "\n"])
        assert not sys.stdout.isatty()
    assert sys.stdout is before and capsys.readouterr().out == "heard\n"


def test_a_redirection_is_what_is_silenced_and_comes_back():
    before, mine = sys.stdout, io.StringIO()
    with contextlib.redirect_stdout(mine):
        with silent():
            print("dropped")
        print("kept")
    assert sys.stdout is before and mine.getvalue() == "kept\n"


def test_a_redirection_outlives_the_silence_that_it_began_in(capsys):
    before, mine = sys.stdout, io.StringIO()
    one = Silence()
    with contextlib.redirect_stdout(mine):
        with silent():
            print("dropped")
        print("kept")
        one.end("")
    print("and this is heard")  # by what the redirection put back, which then gives its place up
    assert sys.stdout is before and mine.getvalue() == "kept\n"
    assert capsys.readouterr().out == "and this is heard\n"


def test_the_silence_ends_where_an_error_is_raised():
    before = sys.stdout
    with pytest.raises(KeyError), silent():
        raise KeyError
    assert sys.stdout is before and not isinstance(before, Sieve)


def test_an_alarm_of_a_silent_thread_is_silent(capsys, monkeypatch):
    monkeypatch.setattr("dpo_jax.reporting.waiting.FIRST", 0.01)
    rung = threading.Event()

    def say(text):
        print(text)
        rung.set()

    waiting = Waiting(say)
    with silent():
        waiting.begin("compiling")
        assert rung.wait(10)
        waiting.end()
    assert capsys.readouterr().out == ""
    waiting.begin("compiling")
    rung.clear()
    assert rung.wait(10)
    waiting.end()
    assert "compiling" in capsys.readouterr().out
