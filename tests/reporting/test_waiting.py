"""What a log is told while something goes on, and how long a run still takes. Time is made up here."""

import random
from fractions import Fraction

import pytest

from dpo_jax.reporting.waiting import FIRST, TimeLeft, Waiting


class Timers:
    """Timers that ring when they are told to."""

    def __init__(self):
        self.set: list = []

    def __call__(self, seconds, ring):
        self.set.append(self)
        self.seconds, self.ring = seconds, ring
        return Timer(self, seconds, ring)


class Timer:
    daemon = False

    def __init__(self, timers, seconds, ring):
        self.seconds, self.ring, self.alive, timers.set[-1] = seconds, ring, True, self

    def start(self):
        assert self.daemon  # a process that ends does not wait for it

    def cancel(self):
        self.alive = False


def test_what_goes_on_is_said_each_time_that_it_took_twice_as_long():
    said, timers = [], Timers()
    waiting = Waiting(said.append, timers)
    waiting.begin("compiling 1/3")
    waiting.now("compiling 2/3")
    for _ in range(4):
        timers.set[-1].ring()
    assert said == [
        f"compiling 2/3: 0:0{minutes}:{seconds:02} so far" for minutes, seconds in ((0, 30), (1, 0), (2, 0), (4, 0))
    ]
    times = [timer.seconds for timer in timers.set]
    assert times[0] == FIRST and [sum(times[:n]) for n in (1, 2, 3, 4)] == [FIRST * 2**n for n in range(4)]


def test_what_has_ended_is_not_spoken_of_even_by_a_timer_that_rang_too_late_to_be_cancelled():
    said, timers = [], Timers()
    waiting = Waiting(said.append, timers)
    waiting.begin("compiling")
    late = timers.set[-1]
    waiting.begin("evaluating")
    assert not late.alive
    late.ring()
    waiting.end()
    timers.set[-1].ring()
    assert said == []


def estimates(total: int, every: int | None, step_of, pause: float, after: int = 0) -> list[tuple[int, float, float]]:
    """Of a made-up run: step, seconds that are left by the estimate, and those that really are."""
    left = TimeLeft(total, None if every is None else Fraction(every))
    now, moments, ends = 1000.0, [], 0.0
    if every is not None:
        now += 9 * pause  # the first evaluation compiles
        left.pause(now)
    for step in range(after + 1, total + 1):
        now += step_of(step) + (50.0 if step == after + 1 else 0.0)  # so does the first step
        left.step(step, now)
        moments.append((step, left.seconds(), now))
        if every is not None and (step % every == 0 or step == total):
            now += pause
            left.pause(now)
        ends = now
    return [(step, guess, ends - at) for step, guess, at in moments if guess is not None]


@pytest.mark.parametrize("every", [None, 7, 100])
@pytest.mark.parametrize("after", [0, 150])
def test_the_estimate_settles(every, after):
    """Steps of 2 s, each 20 % more or less, and evaluations of 30 s: after a tenth of the run the estimate is within
    10 % of what is left, or half a minute, and moves between two steps by no more than a step and 3 %."""
    draw = random.Random(0)
    found = estimates(600, every, lambda step: 2.0 * draw.uniform(0.8, 1.2), 30.0, after)
    settled = [row for row in found if row[0] > after + 60 and (every is None or row[0] > after + every)]
    for step, guess, true in settled:
        assert guess == pytest.approx(true, rel=0.1, abs=30.0), step
    for (_, one, before), (_, other, now) in zip(settled, settled[1:], strict=False):
        assert abs((one - other) - (before - now)) <= 2.0 + 0.03 * one


def test_a_machine_that_becomes_slower_is_believed():
    found = estimates(1000, None, lambda step: 1.0 if step <= 300 else 3.0, 0.0)
    step, guess, true = next(row for row in found if row[0] == 650)
    assert guess == pytest.approx(true, rel=0.02)


def test_slow_steps_have_an_estimate_as_soon_as_there_are_two():
    (first, *_) = estimates(10, None, lambda step: 900.0, 0.0)
    assert first[0] == 2 and first[1] == pytest.approx(first[2])


def test_nothing_is_left_after_the_last_step_but_what_comes_after_it():
    assert estimates(50, None, lambda step: 2.0, 0.0)[-1][1] == 0.0
