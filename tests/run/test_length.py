"""How long a run is: every pair of its epochs is seen, and its rate is never 0."""

import pytest

from dpo_jax.errors import UserError
from dpo_jax.run.data import length_line, number_of_steps
from dpo_jax.training.optimizer import check_warmup, schedule, warmup_steps
from dpo_jax.training.settings import OptimizerSettings


@pytest.mark.parametrize(
    ("examples", "pairs", "epochs", "steps"),
    [(128, 64, 1.0, 2), (127, 64, 1.0, 2), (64, 64, 1.0, 1), (702, 32, 4.0, 88)],
)
def test_every_pair_of_an_epoch_is_seen(examples, pairs, epochs, steps):
    found = number_of_steps(examples, pairs, steps=None, epochs=epochs)
    assert found == steps
    assert found * pairs >= epochs * examples > (found - 1) * pairs
    assert number_of_steps(examples, pairs, steps=7, epochs=None) == 7


def test_what_the_last_step_takes_of_the_next_pass_is_said():
    assert length_line(127, 64, 2) == (
        "2 steps of 64 pairs: 1.01 passes over the data; the last step ends with 1 pair of the next pass"
    )
    assert length_line(128, 64, 2) == "2 steps of 64 pairs: 1.00 passes over the data"
    assert length_line(127, 64, 2, "single answers") == (
        "2 steps of 64 single answers: 1.01 passes over the data; the last step ends with 1 single answer of the next"
        " pass"
    )
    assert length_line(1000, 64, 3) == "3 steps of 64 pairs: 0.19 passes over the data"


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 87])
def test_no_step_has_a_rate_of_0_unless_it_was_asked_for(steps):
    settings = OptimizerSettings(learning_rate=1.0)
    check_warmup(settings, steps)
    rates = [float(schedule(settings, steps)(step)) for step in range(steps)]
    assert min(rates) > 0 and max(rates) == 1.0


def test_a_warm_up_as_long_as_the_run_is_refused():
    settings = OptimizerSettings(warmup_steps=3)
    assert warmup_steps(settings, 3) == 3
    with pytest.raises(UserError, match="optimizer.warmup_steps: 3 is no less than the 3 steps of the run"):
        check_warmup(settings, 3)
    check_warmup(settings, 4)
