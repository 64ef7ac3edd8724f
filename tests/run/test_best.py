"""Which step is the best, when a run gives up, and that both follow from the evaluations alone."""

import json
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.config import run as config
from dpo_jax.errors import UserError
from dpo_jax.intervals import is_at, steps_between
from dpo_jax.reporting.metrics import BETTER, METRICS
from dpo_jax.run.best import Best, MetricWatch, best_lines, watch_of

VALUES = st.lists(st.one_of(st.sampled_from([0.25, 0.5, 0.75]), st.just(math.nan)), max_size=8)


@pytest.mark.parametrize(("metric", "sign"), [("eval_loss", -1), ("eval_rewards/accuracies", 1), ("pass_rate", 1)])
@given(values=VALUES)
def test_the_best_is_the_first_of_the_best_values(metric, sign, values):
    watch, name = MetricWatch(metric), metric.removeprefix("eval_")
    better = [watch.take(3 * place, {name: value}) for place, value in enumerate(values, 1)]
    finite = [(sign * value, -place) for place, value in enumerate(values, 1) if not math.isnan(value)]
    if not finite:
        assert watch.best is None and not any(better)
        return
    value, place = max(finite)
    assert watch.best == Best(watch.metric, -3 * place, sign * value)
    best_so_far = [max(finite[: i + 1]) for i in range(len(finite))]
    assert sum(better) == len(set(best_so_far))  # each step that was the best for a while, and no other
    assert watch.waited == len(values) + place


@given(values=VALUES, patience=st.integers(1, 3), cut=st.integers(0, 8))
def test_a_run_that_goes_on_gives_up_where_one_that_was_never_stopped_does(values, patience, cut):
    whole = MetricWatch("eval_loss", patience)
    for step, value in enumerate(values, 1):
        whole.take(step, {"loss": value})
        waits = [v for v in values[:step]]
        best = min((v for v in waits if not math.isnan(v)), default=None)
        since = step - (waits.index(best) + 1 if best is not None else 0)
        assert whole.gave_up == (since >= patience)
    first = MetricWatch("eval_loss", patience)
    for step, value in enumerate(values[:cut], 1):
        first.take(step, {"loss": value})
    kept = json.loads(json.dumps(first.record(), allow_nan=False))["watched"]
    again = MetricWatch(kept["metric"], patience, {int(step): value for step, value in kept["evaluations"].items()})
    for step, value in list(enumerate(values, 1))[cut:]:
        again.take(step, {"loss": value})
    assert (again.best, again.waited, again.record()) == (whole.best, whole.waited, whole.record())


def test_the_start_is_looked_at_and_is_no_step():
    watch = MetricWatch("eval/helpful/rewards/margins")
    assert not watch.take(0, {"loss": 0.7, "eval/helpful/rewards/margins": 9.0}) and watch.best is None
    with pytest.raises(
        UserError, match=r"best: eval/helpful/rewards/margins: is not measured .* choose one of eval_loss"
    ):
        MetricWatch("eval/helpful/rewards/margins").take(0, {"loss": 0.7})
    with pytest.raises(UserError, match="did you mean eval_rewards/margins"):
        MetricWatch("eval_rewards/margins_p10").take(0, {"rewards/margins": 0.7})


def test_the_same_step_measured_again_counts_once():
    watch = MetricWatch("eval_loss", 2)
    assert [watch.take(step, {"loss": value}) for step, value in ((1, 0.5), (2, 0.6), (2, 0.6))] == [True, False, False]
    assert watch.waited == 1 and not watch.gave_up


def run_with(*more: str):
    given = ("model.path=m", "data.train=d", "output=o", "data.eval=e", "evaluation.every=1")
    return config.load([*given, "checkpoint.best=eval_loss", *more])


def written(tmp_path, *values):
    lines = [{"step": step, "eval_loss": value, "eval_kl": -value} for step, value in enumerate(values)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_that_watched_nothing_before_looks_into_its_records(tmp_path):
    said = []
    written(tmp_path, 0.1, 0.5, 0.3, 0.4)
    watch = watch_of(run_with(), tmp_path, {"records": 4}, [2, 3], said.append)
    assert watch.best == Best("eval_loss", 2, 0.3) and watch.waited == 1 and not said
    watch = watch_of(run_with(), tmp_path, {"records": 4}, [1, 3], said.append)
    assert watch.best == Best("eval_loss", 3, 0.4) and "step 2, the best by eval_loss, is not there" in said[0]
    watched = {"watched": {"metric": "eval_kl", "evaluations": {"1": 5.0}}}
    assert watch_of(run_with(), tmp_path, watched, [2, 3], said.append).best == Best("eval_loss", 2, 0.3)


def test_what_a_checkpoint_knows_goes_before_the_records(tmp_path):
    written(tmp_path, 0.1)
    watched = {"watched": {"metric": "eval_loss", "evaluations": {"1": 0.5, "2": None}}}
    watch = watch_of(run_with(), tmp_path, watched, [1, 2], print)
    assert watch.best == Best("eval_loss", 1, 0.5) and watch.waited == 1
    assert watch_of(run_with(), tmp_path, {}, [], print).evaluations == {}  # a new run over an old file of records
    assert watch_of(run_with("checkpoint.best=null"), tmp_path, watched, [1], print) is None


def test_the_end_says_what_is_exported_and_what_the_last_and_the_start_had():
    evaluations = {0: {"eval_loss": 0.69}, 4: {"eval_loss": 0.4}, 8: {"eval_loss": 0.45}}
    best = Best("eval_loss", 4, 0.4)
    assert best_lines(None, None, evaluations) == []
    assert best_lines(best, None, evaluations) == [
        "exported: step 4, the best by eval_loss (0.4); the last, step 8, has 0.45"
    ]
    assert (
        best_lines(best, 8, evaluations)[0]
        == "stopped after step 8: no better eval_loss since step 4 (evaluation.patience)"
    )
    worse = {0: {"eval_loss": 0.3}, **evaluations, 0.5: {}} | {0: {"eval_loss": 0.3}}
    assert best_lines(best, None, {step: m for step, m in worse.items() if m})[1] == (
        "no step was better than the start, which has 0.3"
    )
    assert len(best_lines(Best("eval_pass_rate", 4, 0.9), None, {0: {"eval_pass_rate": 0.5}})) == 1


def test_every_metric_that_can_be_chosen_by_is_explained():
    assert set(BETTER) - {"win_rate"} <= set(METRICS)  # which is explained where it is measured


@given(st.integers(1, 40), st.integers(1, 12))
def test_steps_are_counted_as_they_are_given(every, step):
    assert is_at(step, steps_between(every, 100, 7)) == (step % every == 0)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["1 epoch", "0.5 epochs", ".25 epochs", "2 epochs", "0.1 epochs"]),
    st.integers(1, 20),
    st.integers(1, 5),
)
def test_epochs_are_evaluated_after_the_step_that_ends_one(text, examples, pairs):
    part = Fraction(text.split()[0]) * examples
    every = steps_between(text, examples, pairs)
    ended = [part * number for number in range(1, 12 * pairs * 10 + 1)]
    for step in range(1, 12):
        ends = any((step - 1) * pairs < seen <= step * pairs for seen in ended)
        assert is_at(step, every) == ends
