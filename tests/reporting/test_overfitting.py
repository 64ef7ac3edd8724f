"""The alarm for a held-out loss that rises while the training loss falls: when it speaks, and that noise does not."""

import math

import numpy as np
import pytest

from dpo_jax.reporting.overfitting import HELD_OUT, Overfitting
from tests.reporting.test_alarms import watch

EVERY, EVALUATIONS = 20, 12


def course(held_out, training, *, noise=0.08, seed=0, swing=0.0):
    """Records of a run: both losses by the number of the evaluation, with a step's noise and an evaluation's swing."""
    rng = np.random.default_rng(seed)
    yield 0, {HELD_OUT: held_out(0.0)}
    for step in range(1, EVERY * EVALUATIONS + 1):
        yield step, {"loss": training(step / EVERY) + noise * rng.normal()}
        if step % EVERY == 0:
            yield step, {HELD_OUT: held_out(step / EVERY) + swing * rng.normal()}


def said(records) -> list[str]:
    alarm, lines = Overfitting(), []
    for step, metrics in records:
        if line := alarm.take(step, metrics):
            lines.append(f"{step}: {line}")
            break
    return lines


def valley(t):
    return 0.55 + 0.02 * (t - 4) ** 2 / 4


def falling(t):
    return 0.69 * math.exp(-0.1 * t)


def test_it_names_both_figures_and_the_best_step():
    (line,) = said(course(valley, falling))
    assert line.startswith("140: eval_loss rose from 0.5500 after step 80, which was the best, to 0.5950, in each of 3")
    assert "while the training loss fell from 0.5" in line and "checkpoint.best=eval_loss" in line


@pytest.mark.parametrize("seed", range(40))
def test_healthy_runs_are_left_alone(seed):
    """Both fall; the held-out loss comes to rest and swings from evaluation to evaluation; the training loss rests."""
    for held_out, training, swing in (
        (lambda t: 0.4 + 0.3 * math.exp(-t), falling, 0.004),
        (lambda t: 0.6, falling, 0.004),
        (lambda t: 0.6 * math.exp(-0.05 * t), falling, 0.01),
        (valley, lambda t: 0.5, 0.0),  # rises, but nothing is learned by heart: the data differ
    ):
        assert said(course(held_out, training, seed=seed, swing=swing)) == []


@pytest.mark.parametrize(
    "values",
    [
        [0.5, 0.6],  # one evaluation is no course
        [0.5, 0.6, 0.7],
        [0.5, 0.6, 0.7, 0.65],  # not in each of the last three
        [0.5, 0.501, 0.502, 0.503],  # by next to nothing
        [0.4, 0.5, 0.45, 0.5, 0.6, 0.7][1:3] + [0.3, 0.6, 0.5, 0.55],
        [0.3, 0.6, 0.5, 0.52, 0.54, 0.56],  # rises, but from a step that was not the best
        [0.5, None, 0.6, math.nan],
    ],
)
def test_fewer_evaluations_say_nothing(values):
    records = []
    for number, value in enumerate(values):
        records += [(20 * number + step, {"loss": 0.7 - 0.001 * (20 * number + step)}) for step in range(1, 21)]
        records.append((20 * number + 20, {HELD_OUT: value}))
    assert said(records) == []


def test_few_training_losses_are_not_believed():
    records = [
        (step, {name: value}) for step in range(1, 6) for name, value in (("loss", 1 / step), (HELD_OUT, 1.0 * step))
    ]
    assert said(records) == []


def test_it_is_one_of_a_runs_alarms_and_is_said_once_also_by_a_run_that_goes_on():
    records = list(course(valley, falling))
    whole, lines = watch(EVERY * EVALUATIONS, 8, start=None), []
    for step, metrics in records:
        lines += whole.take(step, metrics)
    assert len(lines) == 1 and lines[0].startswith("alarm: step 140: eval_loss rose")
    for cut in (50, 140, len(records) // 2, len(records)):
        again = watch(EVERY * EVALUATIONS, 8, start=None)
        again.replay({"step": step, **metrics} for step, metrics in records[:cut])
        after = [line for step, metrics in records[cut:] for line in again.take(step, metrics)]
        spoken = [step for step, _ in records].index(140) + 1  # the step's own record, then the evaluation
        assert after == (lines if cut <= spoken else [])
