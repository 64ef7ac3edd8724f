"""Alarms: healthy runs of any size raise none, a sick run raises its own and once, and a resumed run says the same.

Runs are simulated pair by pair: each step draws its pairs' log-ratios, and every metric is what the step would record.
"""

import json
import math
import re
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dpo_jax.reporting.health import Alarms, Course, Smooth
from dpo_jax.reporting.settings import AlarmSettings

LN2 = math.log(2)
KINDS = {
    "flat": "next to nothing is learned",
    "chance": "no better than chance",
    "reversed": "far below chance",
    "stuck": "is exactly",
    "chosen": "/chosen fell by",
    "kl": "leaves the reference",
    "memorised": "memorised",
    "gradient": "times what it was",
    "ruined": "left the reference altogether",
    "still": "grad_norm is exactly 0",
}
OF_THE_REFERENCE = ("drift/chosen", "drift/rejected", "kl", "rewards/accuracies", "rewards/margins")


def kind(line: str) -> str:
    (found,) = [name for name, words in KINDS.items() if words in line]
    return found


def watch(steps: int, pairs: int, start: float | None = LN2, **more) -> Alarms:
    bounds = AlarmSettings().model_dump(exclude={"enabled"})
    run = {"start": start, "warmup_steps": math.ceil(steps / 10), "total_steps": steps, "pairs": pairs}
    return Alarms(**(run | bounds | more))


def progress(steps: int) -> np.ndarray:
    """Share of all learning done before each step, for a linear warm-up over a tenth and a linear fall to 0."""
    warmup = math.ceil(steps / 10)
    at = np.arange(steps)
    rate = np.where(at < warmup, at / warmup, (steps - at) / (steps - warmup))
    return np.concatenate([[0.0], np.cumsum(rate)[:-1]]) / rate.sum()


class Shape(NamedTuple):
    """What a simulated run comes to at its end."""

    clear: float  # mean margin in standard deviations: 0.25 gives accuracy 0.6, 2 gives 0.98
    spread: float  # standard deviation of the margins, in nats of reward
    chosen: float = 0.0  # change of chosen completions, in nats per token
    rejected: float | None = None  # the same of rejected ones; None: both fall, margins are as said
    gradient: float = 1.0  # factor of the gradient's norm in the last half
    tail: float = 0.4  # log-deviation of a pair's gradient
    length: float = 150.0
    beta: float = 0.1


def simulate(seed: int, steps: int, pairs: int, **shape) -> list[dict[str, float]]:
    """Records of a run; the policy starts at the reference, and learns as fast as the learning rate lets it."""
    clear, spread, chosen, rejected, gradient, tail, length, beta = Shape(**shape)
    rng = np.random.default_rng(seed)
    size = (steps, pairs)
    share = progress(steps)[:, None]
    lengths = np.maximum(1, rng.lognormal(math.log(length), 0.6, (2, *size)).round())
    falls = (chosen, chosen if rejected is None else rejected)
    drift = [fall * share * tokens * rng.lognormal(0, 0.3, size) for fall, tokens in zip(falls, lengths, strict=True)]
    gap = spread * share * rng.normal(clear, 1.0, size) / beta
    ratio_chosen, ratio_rejected = drift[0] + 0.3 * gap, drift[1] - 0.7 * gap
    margin = beta * (gap if rejected is None else ratio_chosen - ratio_rejected)
    norms = rng.lognormal(0, tail, size) / (1 + np.exp(margin))
    late = np.where(np.arange(steps) < steps / 2, 1.0, gradient)[:, None]
    log_ratios = np.stack([ratio_chosen, ratio_rejected]) / lengths
    pairwise = {
        "loss": np.logaddexp(0, -margin),
        "rewards/accuracies": margin > 0,
        "rewards/margins": margin,
        "drift/chosen": ratio_chosen,
        "drift/rejected": ratio_rejected,
        "logps/chosen": ratio_chosen - rng.normal(1.2, 0.3, size) * lengths[0],
        "logps/rejected": ratio_rejected - rng.normal(1.2, 0.3, size) * lengths[1],
        "lengths/chosen": lengths[0],
        "lengths/rejected": lengths[1],
        "kl": (np.expm1(-log_ratios) + log_ratios).mean(0),
    }
    columns = {name: values.mean(1) for name, values in pairwise.items()}
    columns["grad_norm"] = np.sqrt(np.mean((late * norms) ** 2, 1))
    columns["learning_rate"] = np.full(steps, 5e-6)
    return [dict(zip(columns, map(float, row), strict=True)) for row in zip(*columns.values(), strict=True)]


def said(alarms: Alarms, records: list[dict[str, float]]) -> list[str]:
    return [line for step, record in enumerate(records, 1) for line in alarms.take(step, record)]


def without(records, *names: str) -> list[dict[str, float]]:
    return [{name: value for name, value in record.items() if name not in names} for record in records]


HEALTHY = {
    "clear": {"clear": 2.0, "spread": 0.5},
    "noisy labels": {"clear": 0.25, "spread": 0.3},
    "hard pairs": {"clear": 0.4, "spread": 0.5, "chosen": -0.1, "tail": 1.0},
    "both fall, as they do": {"clear": 1.0, "spread": 1.0, "chosen": -0.25},
    "well separated": {"clear": 1.5, "spread": 2.0, "tail": 1.0},
    "short answers": {"clear": 2.0, "spread": 0.3, "length": 10.0},
}
SICK = {
    "flat": {"clear": 1.0, "spread": 2e-3},
    "chance": {"clear": 0.0, "spread": 0.5},
    "reversed": {"clear": -1.5, "spread": 0.5},
    "chosen": {"clear": 1.0, "spread": 0.5, "chosen": -0.7},
    "kl": {"clear": 0.0, "spread": 0.0, "rejected": -2.5, "length": 20.0, "beta": 0.02},
    "gradient": {"clear": 1.0, "spread": 0.5, "gradient": 30.0},
    "memorised": {"clear": 6.0, "spread": 1.5},
}


# With more seeds and sizes, once: no alarm of 8,700 healthy runs, and of 875 sick ones each its own and no other.
@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize(("steps", "pairs"), [(60, 8), (250, 32), (400, 1), (150, 256)])
def test_a_healthy_run_raises_none(name, steps, pairs):
    for seed in range(2):
        records = simulate(seed, steps, pairs, **HEALTHY[name])
        assert said(watch(steps, pairs), records) == []
        assert said(watch(steps, pairs, start=None), without(records, *OF_THE_REFERENCE)) == []


@pytest.mark.parametrize("name", SICK)
@pytest.mark.parametrize(("steps", "pairs"), [(300, 32), (1500, 2), (200, 256)])
def test_a_sick_run_raises_its_own_alarm_once(name, steps, pairs):
    lines = said(watch(steps, pairs), simulate(1, steps, pairs, **SICK[name]))
    assert [kind(line) for line in lines] == [name]
    assert re.match(r"alarm: step \d+: ", lines[0])
    assert len(lines[0]) < 215 and lines[0].isprintable()  # 220, were the step number longer


QUICKSTART = """
1 0.6931 0.3125 -2.4e-08 -3e-09 4.7e-15 0.6476
3 0.6928 0.9062 0.0005453 -0.0001567 1.096e-07 0.5764
6 0.6893 0.9688 0.005161 -0.00258 1.075e-05 0.5578
9 0.6825 0.9375 0.01559 -0.005942 9.546e-05 0.5471
12 0.6677 1 0.0308 -0.0209 0.0004433 0.6105
15 0.6619 0.9688 0.04024 -0.02353 0.0007038 0.5734
18 0.6498 0.9688 0.04492 -0.04447 0.001328 0.5345
21 0.63 1 0.06706 -0.06478 0.002491 0.5845
24 0.6182 1 0.07362 -0.08395 0.005506 0.5398
27 0.6015 1 0.07239 -0.1228 0.007519 0.5248
30 0.6023 1 0.09267 -0.09892 0.004552 0.581
33 0.5907 1 0.07757 -0.1427 0.008969 0.549
36 0.5797 1 0.09208 -0.1521 0.008505 0.5291
39 0.5742 1 0.0804 -0.1795 0.01234 0.5111
42 0.572 0.9688 0.0658 -0.1991 0.01614 0.624
45 0.5615 1 0.07783 -0.2103 0.01256 0.4333
48 0.5647 0.9688 0.07071 -0.2143 0.02015 0.6038
51 0.5384 1 0.07619 -0.2703 0.02174 0.7057
54 0.5508 0.9688 0.06088 -0.2591 0.0247 0.6279
57 0.5644 1 0.08494 -0.1971 0.01651 0.6385
60 0.5463 0.9688 0.04326 -0.2846 0.03079 0.6671
63 0.5213 1 0.05487 -0.3454 0.0414 0.5858
66 0.5118 1 0.06397 -0.3567 0.07075 0.6694
69 0.4683 1 0.06611 -0.4842 0.09526 0.8744
72 0.5208 1 0.06856 -0.346 0.09026 0.6451
75 0.4882 1 0.05632 -0.4398 0.1036 0.7925
78 0.4922 0.9688 0.03283 -0.4481 0.1063 0.8639
81 0.5133 0.9688 0.05083 -0.3722 0.07124 0.7207
84 0.5056 1 0.03144 -0.4018 0.0848 0.722
87 0.5002 1 -0.007852 -0.4743 0.1245 0.666
"""
"""Every third step of the quickstart: loss, accuracy, chosen and rejected reward, kl, gradient norm (beta is 0.1)."""


@pytest.mark.parametrize("every", [1, 3])
def test_the_quickstart_raises_none(every):
    alarms = watch(87, 32, every=every)
    for row in QUICKSTART.split("\n")[1:-1]:
        step, loss, rate, chosen, rejected, kl, norm = map(float, row.split())
        metrics = {"loss": loss, "rewards/accuracies": rate, "rewards/margins": chosen - rejected, "kl": kl}
        drift = {"drift/chosen": 10 * chosen, "drift/rejected": 10 * rejected}
        lengths = {"lengths/chosen": 12.7, "lengths/rejected": 11.7}
        assert alarms.take(int(step), {**metrics, **drift, **lengths, "grad_norm": norm}) == []


AT_REST = {"loss": LN2, "rewards/accuracies": 0.0, "rewards/margins": 0.0, "kl": 0.0, "drift/chosen": 0.0}
MOVING = {"loss": 0.5, "rewards/accuracies": 0.9, "rewards/margins": 0.5, "kl": 0.05, "lengths/chosen": 10.0}


def test_a_frozen_policy_is_flat_and_not_reversed_although_no_chosen_reward_is_greater():
    lines = said(watch(100, 32), [AT_REST] * 100)
    assert [kind(line) for line in lines] == ["flat"]
    assert said(watch(100, 32, start=None), [AT_REST] * 100) == []


def test_the_flat_loss_is_said_only_long_after_warm_up_and_names_the_learning_rate():
    records = [{**AT_REST, "learning_rate": min(step, 10) * 1e-9} for step in range(100)]
    assert said(watch(100, 32), records[:39]) == []
    (line,) = said(watch(100, 32), records)
    assert line.startswith("alarm: step 40: ") and "optimizer.learning_rate (1e-08 at most)" in line


@pytest.mark.parametrize(("total", "settled", "memory"), [(60, 26, 20), (1000, 400, 225), (20000, 5600, 1000)])
def test_long_after_warm_up_is_a_third_of_the_rest_or_less(total, settled, memory):
    course = Course(LN2, total // 10, total, 8, 1)
    assert (course.settled, course.memory) == (settled, memory)


@pytest.mark.parametrize("every", [1, 4])
def test_warm_up_counts_for_nothing_and_steps_are_not_records(every):
    warming = {"loss": 0.8, "rewards/accuracies": 0.9, "kl": 0.0}
    by_chance = {"loss": 0.8, "rewards/accuracies": 0.5, "kl": 0.1}
    for after, expected in ((AT_REST, {400: "flat"}), (by_chance, {400: "chance"}), (MOVING, {})):
        alarms = watch(600, 256, warmup_steps=300, every=every)
        steps = range(every, 601, every)
        found = {step: alarms.take(step, warming if step <= 300 else after) for step in steps}
        assert {step: kind(line) for step, lines in found.items() for line in lines} == expected


@pytest.mark.parametrize("moved", [{"rewards/margins": 0.05}, {"kl": 0.02}])
def test_a_loss_at_its_start_is_no_alarm_where_the_policy_moved(moved):
    right = {"rewards/accuracies": 0.7}
    assert said(watch(100, 32), [AT_REST | right | moved] * 100) == []
    assert len(said(watch(100, 32), [AT_REST | right] * 100)) == 1


def test_what_has_one_cause_is_said_once():
    """Random labels and hardly any movement: loss and accuracy say the same, and only one of them speaks."""
    lines = said(watch(300, 256), simulate(0, 300, 256, clear=0.0, spread=0.02))
    assert [kind(line) for line in lines] == ["flat"]


def test_few_pairs_say_nothing_of_accuracy():
    assert said(watch(300, 1), simulate(0, 300, 1, **SICK["chance"])) == []


def test_few_pairs_say_nothing_even_if_their_accuracy_never_varies():
    records = [{**MOVING, "rewards/accuracies": 0.5, "rewards/margins": 0.1 * (step % 2)} for step in range(100)]
    assert said(watch(100, 2), records) == []
    assert [kind(line) for line in said(watch(100, 64), records)] == ["chance"]


def test_a_little_below_chance_is_not_called_reversed():
    records = [{**MOVING, "rewards/accuracies": 0.47, "rewards/margins": -0.1 * (step % 2)} for step in range(100)]
    assert [kind(line) for line in said(watch(100, 512), records)] == ["chance"]


def test_accuracy_tells_of_learning_only_for_pairs_with_a_reference_or_a_reward_model():
    """Without either, chosen completions may be the likelier ones half of the time for any reason."""
    records = without(simulate(0, 300, 32, **SICK["chance"]), "drift/chosen", "drift/rejected", "kl")
    assert said(watch(300, 32, start=None), records) == []
    of_examples = [{**record, "kl": 0.01, "objective/kto_baseline": 0.0} for record in records]
    assert said(watch(300, 32, start=None), of_examples) == []
    of_rewards = without(records, "logps/chosen", "logps/rejected")
    assert [kind(line) for line in said(watch(300, 32, start=None), of_rewards)] == ["chance"]


def test_an_accuracy_that_never_moves_while_the_loss_does_is_stuck():
    """16 pairs in all, each step has all of them, one is never learned."""
    falling = [{**MOVING, "loss": 0.6 - 0.002 * step, "rewards/accuracies": 15 / 16} for step in range(150)]
    lines = said(watch(150, 16), falling)
    assert [kind(line) for line in lines] == ["stuck"]
    assert said(watch(150, 16), [{**record, "loss": 0.6} for record in falling]) == []
    assert said(watch(150, 16), [{**record, "rewards/accuracies": 1.0} for record in falling]) == []


def test_without_a_reference_chosen_completions_are_compared_with_their_own_start():
    records = without(simulate(0, 400, 8, clear=1.0, spread=0.5, chosen=-2.0), *OF_THE_REFERENCE)
    lines = said(watch(400, 8, start=None), records)
    assert [kind(line) for line in lines] == ["chosen"]
    assert "logps/chosen" in lines[0]


def test_a_policy_that_starts_far_from_its_reference_is_compared_with_where_it_started():
    far = [{**MOVING, "drift/chosen": -30.0, "kl": 5.0}] * 200
    assert said(watch(200, 8, start=None), far) == []
    assert [kind(line) for line in said(watch(200, 8), far)] == ["chosen"]
    fallen = [{**MOVING, "drift/chosen": -40.0, "kl": 5.0}] * 50
    assert [kind(line) for line in said(watch(200, 8, start=None), far[:100] + fallen)] == ["chosen"]


def test_an_uncertain_start_is_no_ground_for_an_alarm():
    uncertain = [{**MOVING, "logps/chosen": (-10.0, 0.0)[step % 2]} for step in range(10)]
    later = [{**MOVING, "logps/chosen": -14.0}] * 90
    assert said(watch(100, 8, start=None), uncertain + later) == []
    certain = [{**MOVING, "logps/chosen": -5.0}] * 10
    assert [kind(line) for line in said(watch(100, 8, start=None), certain + later)] == ["chosen"]


def test_drift_is_counted_per_token():
    long = [{**MOVING, "drift/chosen": -30.0, "lengths/chosen": 100.0}] * 100
    assert said(watch(100, 8), long) == []


def test_the_bounds_are_those_given():
    fallen = [{**MOVING, "drift/chosen": -0.04 * step, "kl": 0.004 * step} for step in range(100)]
    assert said(watch(100, 8), fallen) == []
    assert [kind(line) for line in said(watch(100, 8, chosen_drift=0.2), fallen)] == ["chosen"]
    assert [kind(line) for line in said(watch(100, 8, kl=0.2), fallen)] == ["kl"]


def test_divergence_is_not_said_where_chosen_completions_fell():
    records = [{**MOVING, "drift/chosen": -0.2 * step, "kl": 1e-4 * step**2} for step in range(300)]
    assert [kind(line) for line in said(watch(300, 8), records)] == ["chosen"]
    assert [kind(line) for line in said(watch(300, 8), without(records, "drift/chosen"))] == ["kl"]


def test_a_start_without_divergence_does_not_delay_the_alarm():
    (line,) = said(watch(100, 8), [{**MOVING, "kl": 4e-15}] + [{**MOVING, "kl": 1.1**step} for step in range(99)])
    assert line.startswith("alarm: step 37: ")  # 44, did the logarithm of 4e-15 count in full


def test_a_large_divergence_that_does_not_grow_is_no_alarm():
    rng = np.random.default_rng(0)
    assert said(watch(500, 8), [{**MOVING, "kl": float(kl)} for kl in rng.lognormal(1.5, 0.5, 500)]) == []


FAR_AWAY = {"kl": 560.0, "loss": 2.0, "rewards/accuracies": 0.3, "learning_rate": 1e3}


@pytest.mark.parametrize("start", [LN2, None])
@pytest.mark.parametrize("kl", [560.0, math.inf, None])
def test_a_policy_that_is_far_from_its_reference_is_said_once_though_it_goes_no_further(start, kl):
    """In a record null stands for what overflowed, and the alarms say the same when they read it again."""
    drift = {"drift/chosen": -80.0, "lengths/chosen": 14.0}
    records = [{**AT_REST, "learning_rate": 2e2}, *([{**FAR_AWAY, **drift, "kl": kl}] * 60)]
    lines = said(watch(61, 32, start=start), records)
    assert [kind(line) for line in lines] == ["ruined"]
    assert lines[0].startswith("alarm: step 9: ") and len(lines[0]) < 220
    for words in (
        "560 nats" if kl == 560 else "too large",
        "alarms.kl is 1)",
        "with optimizer.learning_rate=100 or less",
    ):
        assert words in lines[0]
    assert lines[0].count(": ") == 3  # what was seen stands before the third, where a verdict cuts it


def test_what_began_far_from_its_reference_or_was_not_finite_is_not_ruined():
    assert said(watch(60, 8, start=None), without([FAR_AWAY] * 60, "rewards/accuracies")) == []
    assert said(watch(60, 8), [{**MOVING, "kl": None, "loss": None}] * 60) == []
    assert said(watch(60, 8), [{**MOVING, "kl": 560.0 if step % 8 else 1.0} for step in range(60)]) == []


def test_a_gradient_of_exactly_0_is_said_once_and_not_where_it_may_be_so():
    still = {**MOVING, "grad_norm": 0.0, "learning_rate": 1e-3}
    (line,) = said(watch(60, 8), [still] * 60)
    assert line.startswith("alarm: step 8: grad_norm is exactly 0 since step 1, the loss 0.5")
    assert "optimizer.learning_rate" in line and len(line) < 220
    (still,) = without([still], "rewards/accuracies")
    for legal in ({"learning_rate": 0.0}, {"loss": 0.0}, {"loss": -0.0}, {"grad_norm": 1e-30}, {"grad_norm": None}):
        assert said(watch(60, 8), [{**still, **legal}] * 60) == []
    assert said(watch(60, 8), [{**still, "grad_norm": float(step % 8 == 7)} for step in range(60)]) == []


def test_single_records_of_any_size_are_no_alarm():
    records = [dict(MOVING, grad_norm=0.5) for _ in range(300)]
    for step in range(40, 300, 30):
        records[step] |= {"kl": 1e9, "grad_norm": 1e9, "loss": 50.0, "rewards/accuracies": 0.0}
    assert said(watch(300, 32), records) == []


def test_gradients_that_vanish_and_return_are_no_explosion():
    norms = [0.5] * 100 + [1e-4] * 100 + [1.0] * 100
    assert said(watch(300, 32), [{**MOVING, "grad_norm": norm} for norm in norms]) == []


def test_gradients_that_grow_slowly_are_no_explosion():
    records = [{**MOVING, "grad_norm": 0.1 * 1.01**step} for step in range(600)]
    assert said(watch(600, 32), records) == []


def test_memorised_means_without_an_error_and_for_long():
    learned = {**MOVING, "loss": 0.01, "rewards/accuracies": 1.0, "rewards/margins": 5.0}
    wrong = {**learned, "rewards/accuracies": 0.99}
    assert said(watch(300, 32), ([learned] * 19 + [wrong]) * 15) == []
    assert said(watch(300, 4), [learned] * 49) == []
    assert [kind(line) for line in said(watch(300, 4), [learned] * 50)] == ["memorised"]
    assert said(watch(300, 4), [{**learned, "loss": 0.05}] * 100) == []


def test_nothing_is_said_of_what_is_not_known():
    for metrics in ({}, {"loss": None}, {"loss": math.nan, "kl": math.inf, "grad_norm": None}, {"eval_loss": 0.7}):
        assert said(watch(100, 8), [metrics] * 100) == []


RESUMED = {name: simulate(0, 120, 64, **run) for name, run in (SICK | HEALTHY).items()}


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(sorted(RESUMED)), stopped=st.integers(0, 120), every=st.sampled_from([1, 2]))
def test_a_resumed_run_says_what_one_that_was_never_stopped_says(name, stopped, every):
    book = [{"step": step, **record} for step, record in enumerate(RESUMED[name], 1) if step % every == 0]
    for number, record in enumerate(book):
        if number % 7 == 3:
            record |= {"loss": None, "grad_norm": None, "nonfinite": True}
    book.insert(0, {"step": 0, "eval_loss": 0.7, "eval_kl": 3.0})
    book = json.loads(json.dumps(book))
    whole, resumed = watch(120, 64, every=every), watch(120, 64, every=every)
    lines = [(record["step"], line) for record in book for line in whole.take(record["step"], record)]
    resumed.replay(record for record in book if record["step"] <= stopped)
    later = [record for record in book if record["step"] > stopped]
    found = [(record["step"], line) for record in later for line in resumed.take(record["step"], record)]
    assert found == [(step, line) for step, line in lines if step > stopped]


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=40), st.sampled_from([3.0, 10.0, math.inf]))
def test_a_smooth_mean_is_the_weighted_mean_and_its_error_that_of_weighted_values(values, horizon):
    mean = Smooth(horizon)
    for value in values:
        mean.take(value)
    weights = np.exp(-np.arange(len(values))[::-1] / horizon)
    expected = np.average(values, weights=weights)
    np.testing.assert_allclose(mean.mean, expected, atol=1e-9)
    count = weights.sum() ** 2 / (weights**2).sum()
    variance = np.average((np.array(values) - expected) ** 2, weights=weights) / (1 - 1 / count)
    np.testing.assert_allclose(mean.count, count)
    np.testing.assert_allclose(mean.deviation**2, variance, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(mean.error, mean.deviation / math.sqrt(count))


def test_the_mean_of_too_few_values_is_not_believed():
    mean = Smooth(10.0)
    assert mean.error == math.inf
    for _ in range(7):
        mean.take(0.5)
        assert not mean.within(0.5, 1.0)
    for _ in range(3):
        mean.take(0.5)
    assert mean.within(0.5, 1e-9) and not mean.within(0.6, 0.09)


@pytest.mark.parametrize("name", ["chosen_drift", "kl"])
def test_a_bound_is_above_zero(name):
    with pytest.raises(ValidationError):
        AlarmSettings(**{name: 0.0})
