"""A sweep's grid, its folders, its share of the devices and its table; what it trains is in commands/test_sweep.py."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpo_jax.config.run import Run
from dpo_jax.errors import UserError
from dpo_jax.run import sweeping
from dpo_jax.run.sweeping import Axis, Point, PointResult

GIVEN = ("model.path=m", "data.train=d.jsonl", "output=out")


def refusal(call, *arguments):
    with pytest.raises(UserError) as refused:
        call(*arguments)
    return str(refused.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("0.1", ["0.1"]),
        ("0.1, 0.3 ,1e-3", ["0.1", "0.3", "1e-3"]),
        ("[a,b],[c]", ["[a,b]", "[c]"]),
        ("{a: [1,2], b: 3},null", ["{a: [1,2], b: 3}", "null"]),
        ('"a,b",c', ['"a,b"', "c"]),
        ("it's,fine", ["it's", "fine"]),
        ("a,,b", ["a", "", "b"]),
        ("", [""]),
    ],
)
def test_commas_divide_values_where_nothing_holds_them(text, parts):
    assert sweeping.parts_of(text) == parts


def test_words_with_several_values_are_axes_and_the_others_stay():
    words = [*GIVEN, "objective.beta=0.1,0.3", "--data.max-length=64,128", "data.eval=[a.jsonl,b.jsonl]"]
    axes, rest = sweeping.axes_of(words)
    assert axes == [Axis("objective.beta", ("0.1", "0.3")), Axis("data.max_length", ("64", "128"))]
    assert rest == [*GIVEN, "data.eval=[a.jsonl,b.jsonl]"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "nothing to sweep"),
        (("objective.beta=0.1,,0.3",), "objective.beta: a value is missing between two commas"),
        (("objective.beta=0.1,0.1",), "objective.beta: a value is given twice"),
        (("objective.beta=0.1,0.3", "objective.beta=0.2"), "objective.beta: is given twice"),
        (("objective.beta=0.1,0.3", "objective.beta=0.2,0.5"), "objective.beta: is given twice"),
        (("output=a,b",), "output: is of the whole sweep"),
        (("data.cache=a,b",), "data.cache: is of the whole sweep"),
    ],
)
def test_what_cannot_be_swept_is_said(words, said):
    assert said in refusal(sweeping.axes_of, words)


def test_there_is_a_run_for_each_combination_in_a_folder_of_its_own(tmp_path):
    axes = [Axis("objective.beta", ("0.1", "0.3")), Axis("optimizer.learning_rate", ("1e-5", "2e-5", "5e-5"))]
    points = sweeping.points_of(axes, GIVEN, tmp_path, "cache")
    values = [tuple(point.values.values()) for point in points]
    assert values == list(itertools.product(axes[0].values, axes[1].values))
    assert points[0].name == "beta=0.1,learning_rate=1e-5" and points[0].folder == tmp_path / points[0].name
    assert len({point.folder for point in points}) == 6
    assert points[1].words[-2:] == (f"output={json.dumps(str(points[1].folder))}", 'data.cache="cache"')


def test_every_wrong_setting_of_every_run_is_said_once():
    axes = [Axis("objective.beta", ("0.1", "-1")), Axis("batch.pairs", ("0", "4", "x"))]
    lines = refusal(sweeping.check, axes, [*GIVEN, "model.nmae=x"]).splitlines()
    assert len(lines) == len(set(lines)) == 4 and sum("model.nmae" in line for line in lines) == 1
    assert (
        sum("objective.beta: -1" in line for line in lines) == 1 and sum("batch.pairs" in line for line in lines) == 2
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"a.x": "1", "b.x": "2"}, {"a.x": "2", "b.x": "1"}),
        ({"a.x": "a/b"}, {"a.x": "a-b"}),
        ({"a.x": "p" * 200}, {"a.x": "p" * 199 + "q"}),
        ({"a.x": "../../etc"}, {"a.x": "..-..-etc"}),
    ],
)
def test_other_values_have_another_folder_which_stays_below_the_sweeps(first, second):
    names = [sweeping.name_of(values) for values in (first, second)]
    assert names[0] != names[1] and not any("/" in name or len(name) > 100 for name in names)


def test_a_folder_that_is_something_else_is_left_alone(tmp_path):
    sweeping.check_folder(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds other things (notes.txt" in refusal(sweeping.check_folder, tmp_path)
    (tmp_path / sweeping.RECORD).write_text("{}")
    sweeping.check_folder(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    assert "holds a run of its own" in refusal(sweeping.check_folder, tmp_path)
    assert "is a file" in refusal(sweeping.check_folder, tmp_path / "notes.txt")


def test_gpus_are_shared_out_evenly_or_not_at_all():
    given = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    assert sweeping.shares(1, given) == [{}]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in sweeping.shares(2, given)] == ["4,5", "6,7"]
    assert "4 GPUs cannot be shared out evenly" in refusal(sweeping.shares, 3, given)
    assert "4 GPUs cannot be shared out evenly" in refusal(sweeping.shares, 8, given)
    assert sweeping.shares(3, {"JAX_PLATFORMS": "cpu"}) == [{}, {}, {}]


def result(name, ended="done", **metrics):
    return PointResult(Point(name, {"objective.beta": name}, (), Path(name)), metrics, ended)


def test_the_best_run_is_first_and_those_that_did_not_end_are_last():
    values = {"a": 0.7, "b": 0.9, "c": 1.0}
    runs = [result(name, "failed" if name == "c" else "done", pass_rate=value) for name, value in values.items()]
    runs.append(result("d"))
    assert [one.point.name for one in sweeping.ranked(runs, "pass_rate")] == ["b", "a", "c", "d"]


@pytest.mark.parametrize("name", ["loss", "eval_loss", "eval/helpful/loss", "eval_kl"])
def test_less_of_some_metrics_is_better(name):
    runs = [result("a", **{name: 0.7}), result("b", **{name: 0.2})]
    assert [one.point.name for one in sweeping.ranked(runs, name)] == ["b", "a"]


def test_runs_are_sorted_by_what_all_of_them_have_and_a_wrong_name_is_refused():
    runs = [result("a", loss=1.0, **{"eval_pass_rate": 0.5, "eval_rewards/accuracies": 0.5})]
    runs.append(result("b", loss=1.0, **{"eval_rewards/accuracies": 0.5}))
    assert sweeping.metric_for(runs, None) == "eval_rewards/accuracies"
    assert sweeping.metric_for(runs[:1], None) == "eval_pass_rate"
    assert sweeping.metric_for(runs, "loss") == "loss"
    assert "no run has it; there are eval_pass_rate" in refusal(sweeping.metric_for, runs, "eval_loss")
    assert "choose one of loss, " in refusal(sweeping.metric_for, runs, "eval_lengths/chosen")
    assert sweeping.metric_for([], None) is None


@pytest.mark.parametrize(
    ("best", "key", "metric"),
    [
        ("eval_loss", "optimizer.learning_rate", "eval_loss"),
        ("pass_rate", "optimizer.learning_rate", "eval_pass_rate"),
        ("eval/helpful/loss", "optimizer.learning_rate", "eval/helpful/loss"),
        ("eval_loss", "objective.beta", None),
        ("eval/helpful/rewards/margins_p50", "objective", None),
        ("eval_logps/accuracies", "objective.name", "eval_logps/accuracies"),
        ("eval_loss", "checkpoint.best", None),
        (None, "optimizer.learning_rate", None),
    ],
)
def test_runs_are_sorted_by_what_each_chooses_its_best_step_by(best, key, metric):
    """But not by a loss or margin where the objective is swept, since each has its own unit."""
    run = Run.model_construct(checkpoint=SimpleNamespace(best=best))
    assert sweeping.metric_of_best(run, [Axis(key, ("a", "b"))]) == metric


def test_the_metric_of_the_best_step_comes_before_others_and_after_the_one_that_is_asked_for():
    both = {"eval_loss": 0.5, "eval_rewards/accuracies": 0.9}
    runs = [result("a", "done", **both), result("b", "done", **both)]
    assert sweeping.metric_for(runs, None, "eval_loss") == "eval_loss"
    assert sweeping.metric_for(runs, "eval_rewards/accuracies", "eval_loss") == "eval_rewards/accuracies"
    assert sweeping.metric_for(
        [*runs, result("c", "done", loss=1.0, **{"eval_rewards/accuracies": 1.0})], None, "eval_loss"
    ) == ("eval_rewards/accuracies")


def test_the_table_has_a_row_for_each_run_under_the_metric_that_sorts_it():
    runs = [result("0.1", eval_loss=0.5), result("0.3", "stopped and saved")]
    rows = sweeping.table([Axis("objective.beta", ("0.1", "0.3"))], runs, "eval_loss")
    assert rows == [
        ["objective.beta", "held-out loss", ""],
        ["0.1", "0.5000", ""],
        ["0.3", "-", "stopped and saved"],
    ]


def test_a_run_that_exports_its_best_step_is_judged_by_that_step(tmp_path):
    records = [{"step": step, name: step / 10} for step in (2, 4) for name in ("loss", "eval_loss")]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    point = Point("a", {}, (), tmp_path)
    assert sweeping.result_of(point, 0).metrics == {"step": 4, "loss": 0.4, "eval_loss": 0.4}
    known = {"settings": {}, "facts": {}, "best": {"metric": "eval_loss", "step": 2, "value": 0.2}}
    (tmp_path / "run.json").write_text(json.dumps(known))
    assert sweeping.result_of(point, 0).metrics == {"step": 4, "loss": 0.4, "eval_loss": 0.2}
