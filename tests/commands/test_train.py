"""The whole job on a tiny model: what it writes, that stopping is invisible, and what it refuses."""

import json
import os
import re
import shutil
import signal
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from dpo_jax import evaluate, train
from dpo_jax.objectives.pairs import LossOutput
from dpo_jax.objectives.table import OBJECTIVES, Objective, Setting
from dpo_jax.reporting.journal import Journal, read_records
from dpo_jax.reporting.metrics import METRICS, TIME_FIELDS
from dpo_jax.run.trainer import Trainer
from dpo_jax.training import reference as references
from dpo_jax.training import steps
from dpo_jax.training.checkpoints import Checkpoints
from tests.support.tiers import night
from tests.support.tiny_folders import write_folder
from tests.support.tiny_rows import assistant, user, write
from tests.support.worlds import write_world

STEPS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model folder and files of pairs, the second of them held out."""
    root = write_world(tmp_path_factory.mktemp("world"), 14, 6)
    ranked = [
        {"prompt": f"Say {n}", "completions": ["yes", "no " * (n % 4 + 1), "perhaps"], "ranks": [1, 3, 2]}
        for n in range(1, 13)
    ]
    write(root / "ranked.jsonl", *ranked)
    single = [{"prompt": f"Say {n}", "completion": "yes " * (n % 3 + 1), "label": n % 2 == 0} for n in range(1, 15)]
    write(root / "single.jsonl", *single)
    write(root / "told.jsonl", *({"messages": [user(f"Say {n}"), assistant("yes")]} for n in range(1, 13)))
    return root


def arguments(world, output, *more):
    given = {
        "model.path": world / "model",
        "data.train": world / "train.jsonl",
        "data.eval": world / "eval.jsonl",
        "data.cache": world / "cache",
        "batch.pairs": 4,
        "batch.micro_tokens": 256,  # all steps have one shape, so that one program is compiled
        "steps": STEPS,
        "optimizer.learning_rate": 1e-3,
        "optimizer.warmup_steps": 0,
        "checkpoint.every": 2,
        "evaluation.every": 3,
        "log.report": False,  # a page takes longer than the steps
        "output": output,
    }
    return [f"{key}={value}" for key, value in given.items()] + list(more)


@pytest.fixture(scope="module")
def finished(world):
    output = world / "finished"
    answers = (f"evaluation.answers={world / 'answers.jsonl'}", "evaluation.max_new_tokens=4")
    assert train.main(arguments(world, output, *answers, "log.report=true")) == 0
    assert (output / "report.html").stat().st_size > 10_000
    return output


def steps_of(folder):
    return [record for record in read_records(folder / "metrics.jsonl") if "loss" in record]


def lasting(folder):
    """Records without what the clock decides."""
    drop = {name for field in TIME_FIELDS for name in (field, f"eval_{field}")}
    return [{k: v for k, v in r.items() if k not in drop} for r in read_records(folder / "metrics.jsonl")]


def test_a_run_records_every_step_by_trls_names(finished):
    records = steps_of(finished)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    names = (
        "loss grad_norm learning_rate epoch num_tokens entropy mean_token_accuracy rewards/chosen rewards/rejected "
        "rewards/margins rewards/accuracies logps/chosen logps/rejected logits/chosen logits/rejected lengths/chosen "
        "lengths/rejected kl truncated dropped step_seconds pairs_per_second tokens_per_second memory_bytes"
    )
    assert set(names.split()) <= set(records[0])
    known = {*METRICS, "step", "objective/sigmoid", "objective/sigmoid_margin"}  # each is explained there
    written = {name.removeprefix("eval_") for record in read_records(finished / "metrics.jsonl") for name in record}
    assert written <= known
    assert records[0]["loss"] == pytest.approx(np.log(2), abs=1e-4) and records[-1]["loss"] < 0.68
    assert records[-1]["epoch"] == pytest.approx(STEPS * 4 / 14)


def test_it_evaluates_at_the_start_on_the_way_and_at_the_end(finished):
    evaluations = [record for record in read_records(finished / "metrics.jsonl") if "eval_loss" in record]
    assert [record["step"] for record in evaluations] == [0, 3, STEPS]
    assert evaluations[0]["eval_loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert all(record["eval_pass_rate"] in (0.0, 1.0) for record in evaluations)


def test_passes_over_the_data_are_saved_after_the_step_that_ends_one(world, tmp_path):
    words = ("checkpoint.every=0.75 epochs", "checkpoint.keep=9", "steps=7", "evaluation.every=null", "data.eval=null")
    assert train.main(arguments(world, tmp_path / "run", *words)) == 0
    kept = steps.kept(steps.at(tmp_path / "run" / "checkpoints"))
    assert kept == [3, 6, 7]  # of 14 pairs, 4 a step: 10.5, 21, and the end


def test_the_result_is_a_folder_like_the_one_it_came_from(world, finished):
    old, new = (load_file(folder / "model.safetensors") for folder in (world / "model", finished / "model"))
    assert {k: (v.shape, v.dtype) for k, v in old.items()} == {k: (v.shape, v.dtype) for k, v in new.items()}
    assert any((old[name] != new[name]).any() for name in old)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (world / "model" / name).read_bytes() == (finished / "model" / name).read_bytes()
    card = (finished / "model" / "README.md").read_text()
    assert "dpo" in card and "\ndatasets:" not in card  # its pairs lie on this machine


def test_running_it_again_changes_nothing(world, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"}
    answers = (f"evaluation.answers={world / 'answers.jsonl'}", "evaluation.max_new_tokens=4")
    assert train.main(arguments(world, finished, *answers)) == 0
    assert "finished already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"}


def counted(world, output, *more):
    """A run that evaluates at the start and at the end, and what XLA compiles between its second step and its end.

    Saving is left out: the first save compiles the slices that it writes.
    """
    events, late = [], []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
    step, evaluation, save = Journal.step, Journal.evaluation, Checkpoints.save

    def warm(self, number, metrics):
        if number == 2:
            events.clear()
        step(self, number, metrics)

    def done(self, number, metrics):
        late.extend(name for name in events if number == STEPS and "backend_compile" in name)
        evaluation(self, number, metrics)

    def saved(self, *args):
        before = len(events)
        save(self, *args)
        del events[before:]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", saved)
        patch.setattr(Journal, "step", warm)
        patch.setattr(Journal, "evaluation", done)
        assert train.main(arguments(world, output, "evaluation.every=null", *more)) == 0
    jax.monitoring.clear_event_listeners()
    return output, late


@pytest.fixture(scope="module")
def plain(world):
    """A run without answers, whose steps have several shapes."""
    return counted(world, world / "plain", *SHAPES)


def test_nothing_compiles_after_warm_up(plain, moving):
    assert plain[1] == moving[1] == []


@pytest.fixture(scope="module")
def moving(world):
    """A run whose reference moves and whose objective remembers earlier steps: both must be in its checkpoints."""
    return counted(world, world / "moving", *MOVING)


SHAPES = ("batch.micro_tokens=null",)
MOVING = ("reference.update_every=2", "objective.name=beta_dpo", "objective.beta_end=0.3")


@pytest.mark.parametrize(
    ("number", "more", "code"),
    [night(signal.SIGTERM, SHAPES, 75), night(signal.SIGINT, SHAPES, 130), (signal.SIGTERM, MOVING, 75)],
)
def test_stopping_and_going_on_is_never_having_stopped(world, plain, moving, tmp_path, monkeypatch, number, more, code):
    original, whole = Journal.step, (moving if more == MOVING else plain)[0]

    def step(self, now, metrics):
        original(self, now, metrics)
        if now == 3:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "step", step)
        assert train.main(arguments(world, tmp_path / "run", "evaluation.every=null", *more)) == code
    assert not (tmp_path / "run" / "model").exists()
    assert train.main(arguments(world, tmp_path / "run", "evaluation.every=null", *more)) == 0
    assert lasting(tmp_path / "run") == lasting(whole)
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (tmp_path / "run", whole)]
    assert weights[0] == weights[1]


def test_a_reference_that_moves_is_near_again_and_beta_rises(moving):
    records = steps_of(moving[0])
    drift = [abs(record["drift/chosen"]) for record in records]
    assert drift[2] < drift[1] and drift[4] < drift[3]  # moved after steps 2 and 4
    np.testing.assert_allclose([record["beta"] for record in records], np.linspace(0.1, 0.3, STEPS), rtol=1e-6)


def same_losses(one, other, rel):
    return [r["loss"] for r in steps_of(one)] == [pytest.approx(r["loss"], rel=rel) for r in steps_of(other)]


@pytest.mark.parametrize(
    "more",
    [
        night(("mesh.data=4", "mesh.fsdp=1")),
        ("mesh.fsdp=2", "mesh.tensor=2"),
        ("reference.mode=live", "model.scan_layers=false"),
    ],
    ids=["replicated", "tensor parallel", "live reference, unrolled"],
)
def test_devices_and_the_kind_of_reference_are_invisible(world, plain, tmp_path, more):
    """Six steps of Adam amplify the float32 reassociation of 1e-6 that devices make; 1e-4 holds with room."""
    assert train.main(arguments(world, tmp_path / "run", "evaluation.every=null", "data.eval=null", *more)) == 0
    assert same_losses(plain[0], tmp_path / "run", 1e-4)


def test_a_step_leaves_nothing_of_the_old_state(world, tmp_path, monkeypatch):
    """Weights and moments are written over the old ones; of a state that is kept, a device would hold two."""
    original, left = Trainer.step, []

    def step(self, state, batch):
        found = original(self, state, batch)
        left.extend(path for path, leaf in jax.tree.leaves_with_path(state) if not leaf.is_deleted())
        return found

    monkeypatch.setattr(Trainer, "step", step)
    assert train.main(arguments(world, tmp_path / "run", "evaluation.every=null", "data.eval=null", "steps=2")) == 0
    assert left == []


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("settings", "rel"),
    [
        (("optimizer.name=lion", "optimizer.learning_rate=1e-4"), 1e-4),
        (("optimizer.name=adafactor", "optimizer.param_dtype=bfloat16"), 1e-3),
    ],
    ids=["lion", "adafactor, bfloat16 weights"],
)
def test_devices_are_invisible_to_other_optimizers_too(world, tmp_path, settings, rel):
    """As above; a weight in bfloat16 may be rounded the other way where a gradient differs at all: 2^-8 of it."""
    found = {"replicated": ("mesh.data=4", "mesh.fsdp=1"), "split": ("mesh.fsdp=2", "mesh.tensor=2")}
    for name, mesh in found.items():
        argv = arguments(world, tmp_path / name, "evaluation.every=null", "data.eval=null", *mesh, *settings)
        assert train.main(argv) == 0
    losses = [record["loss"] for record in steps_of(tmp_path / "split")]
    assert same_losses(tmp_path / "replicated", tmp_path / "split", rel) and losses[-1] < losses[0]


def test_a_model_alone_says_which_answer_it_finds_more_likely_and_nothing_of_rewards(world, finished, capsys):
    last = [record for record in read_records(finished / "metrics.jsonl") if "eval_loss" in record][-1]
    capsys.readouterr()
    assert evaluate.main([str(finished / "model"), str(world / "eval.jsonl"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["logps/accuracies"] == last["eval_logps/accuracies"]
    assert found["logps/chosen"] == pytest.approx(last["eval_logps/chosen"], rel=1e-5)
    assert not [name for name in found if name.startswith(("rewards/", "loss", "kl", "drift"))]
    assert evaluate.main([str(finished / "model"), str(world / "eval.jsonl"), "--beta", "0.2"]) == 2
    assert "--beta is of rewards, which need a --reference" in capsys.readouterr().err


def test_evaluate_takes_settings_of_data_as_its_messages_advise_them(world, finished, tmp_path, capsys):
    rows = [json.loads(line) for line in (world / "eval.jsonl").read_text().splitlines()]
    names = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps({names[name]: row[name] for name in names}) + "\n" for row in rows))
    model, capsys_text = str(finished / "model"), capsys.readouterr
    assert evaluate.main([model, str(world / "eval.jsonl"), "--json"]) == 0
    expected = json.loads(capsys_text().out)
    assert evaluate.main([model, str(mine), "--json"]) == 2
    said = capsys_text().err
    mapping = "data.columns={prompt: question, chosen: good, rejected: bad}"
    assert f"write '{mapping}', or" in said
    assert evaluate.main([model, str(mine), mapping, "--json"]) == 0
    assert json.loads(capsys_text().out) == expected
    behind = [model, "--batch", "4", str(mine), "--json", mapping, "--max-samples", "3", "data.shuffle=false"]
    assert evaluate.main(behind) == 0 and json.loads(capsys_text().out)["pairs"] == 3
    assert evaluate.main([model, "--json"]) == 2 and "PAIRS" in capsys_text().err
    wrong = ["data.layot=pair", "data.train=x", "optimizer.learning_rate=1", "model.remat=foo"]
    assert evaluate.main([model, str(mine), *wrong]) == 2
    lines = [line.removeprefix("error: command line: ") for line in capsys_text().err.splitlines()]
    assert lines[0] == "data.layot: no such setting; did you mean data.layout?"
    assert lines[1] == "data.train: give it as PAIRS"
    assert lines[2] == "optimizer.learning_rate: is not used here; leave it out"
    assert lines[3].startswith('model.remat: "foo": must be one of auto')


@pytest.mark.nightly
def test_evaluate_takes_another_objective_or_says_what_that_needs(world, finished, tmp_path, capsys):
    model, pairs, start = str(finished / "model"), str(world / "eval.jsonl"), str(world / "model")
    for name in ("simpo", "orpo", "sft"):  # of the model alone, so that its loss means something
        assert evaluate.main([model, pairs, f"objective.name={name}", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["loss"] > 0
    assert evaluate.main([model, pairs, "objective.name=ipo", "--json"]) == 0
    assert "loss" not in json.loads(capsys.readouterr().out)
    labelled = tmp_path / "kto.jsonl"
    rows = [json.loads(line) for line in (world / "eval.jsonl").read_text().splitlines()]
    write(
        labelled, *({"prompt": r["prompt"], "completion": r["chosen"], "label": n % 2 == 0} for n, r in enumerate(rows))
    )
    assert evaluate.main([model, str(labelled), "objective.name=kto"]) == 2
    error = capsys.readouterr().err
    assert "objective.name=kto" in error and "--reference" in error and error.count("\n") == 1
    assert evaluate.main([model, str(labelled), "objective.name=kto", "--reference", start, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] > 0


def test_evaluate_measures_what_training_measured(world, finished, capsys):
    argv = [str(finished / "model"), str(world / "eval.jsonl"), "--reference", str(world / "model"), "--json"]
    assert evaluate.main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    last = [record for record in read_records(finished / "metrics.jsonl") if "eval_loss" in record][-1]
    assert found["pairs"] == 6 and found["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    assert found["rewards/accuracies"] == last["eval_rewards/accuracies"]


def run_on(world, output, file, *more):
    """A short run on another file of training rows, with its last record."""
    argv = [a for a in arguments(world, output, "evaluation.every=null") if not a.startswith("data.")]
    assert train.main([*argv, f"data.train={world / file}", *more]) == 0
    return steps_of(output)


@pytest.mark.nightly
def test_a_ranking_is_learned_as_one(world, tmp_path):
    records = run_on(world, tmp_path / "run", "ranked.jsonl", "objective.name=plackett_luce")
    assert records[0]["loss"] == pytest.approx(np.log(3) + np.log(2), abs=1e-4)  # 1/3 for the best, then 1/2
    assert records[-1]["loss"] < records[0]["loss"] and records[-1]["rewards/margins"] > 0


def test_single_completions_are_learned_as_desirable_or_not(world, tmp_path, capsys):
    records = run_on(world, tmp_path / "run", "single.jsonl", "objective.name=kto", "steps=12")
    assert records[0]["loss"] == pytest.approx(0.5, abs=1e-4)
    assert records[-1]["loss"] < 0.5 and {"rewards/chosen", "rewards/rejected", "objective/kto_baseline"} <= set(
        records[0]
    )
    good = [{"prompt": f"Say {n}", "completion": "yes " * n, "label": True} for n in range(1, 7)]
    write(world / "good.jsonl", *good)
    for record in run_on(world, tmp_path / "good", "good.jsonl", "objective.name=kto"):
        assert "rewards/rejected" not in record and "nonfinite" not in record and None not in record.values()
    said = capsys.readouterr().out
    assert "compiling the reference for data.train\n" in said and "log-probabilities of data.train 1/" in said
    assert " steps of 4 single answers: " in said
    argv = [a for a in arguments(world, tmp_path / "no") if not a.startswith("data.")] + [
        "evaluation.every=null",
        f"data.train={world / 'single.jsonl'}",
    ]
    assert "objective.name=sigmoid compares two completions" in refused(argv, capsys)


@pytest.mark.nightly
def test_fine_tuning_on_the_answers_is_a_stage_before_dpo(world, tmp_path):
    """The paper's way to a reference: the chosen answers are learned first, then the result is policy and reference."""
    first = run_on(world, tmp_path / "first", "told.jsonl", "objective.name=sft")
    assert first[-1]["loss"] < first[0]["loss"] and "rewards/margins" not in first[0]
    argv = arguments(world, tmp_path / "second", "evaluation.every=null", f"model.path={tmp_path / 'first' / 'model'}")
    assert train.main(argv) == 0
    assert steps_of(tmp_path / "second")[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)


def test_a_reward_model_is_trained_exported_and_measured(world, tmp_path, capsys):
    assert train.main(arguments(world, tmp_path / "run", "objective.name=reward", "optimizer.learning_rate=1e-2")) == 0
    records = steps_of(tmp_path / "run")
    assert records[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and records[-1]["loss"] < 0.6
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["data"]["ending"] == "template"
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "run" / "model"), str(world / "eval.jsonl"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    last = [record for record in read_records(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in record][-1]
    assert found["rewards/accuracies"] == last["eval_rewards/accuracies"] > 0.5
    assert found["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)


def test_an_objective_of_ones_own_is_a_function_and_a_row(world, tmp_path, monkeypatch):
    def mine(pairs, *, beta, slack):
        gap = beta * (pairs.policy_chosen - pairs.policy_rejected)
        return LossOutput(losses=jax.nn.relu(slack - gap), margins=gap)

    settings = {"beta": Setting(0.1, above=0), "slack": Setting(1.0, least=0)}
    row = Objective(value=mine, equation="", paper="", settings=settings, reference="unused")
    monkeypatch.setitem(OBJECTIVES, "mine", row)
    own = "objective=[{name: mine, slack: 2}]"
    assert train.main(arguments(world, tmp_path / "run", "evaluation.every=null", "data.eval=null", own)) == 0
    records = steps_of(tmp_path / "run")
    assert records[-1]["loss"] < records[0]["loss"] and records[0]["objective/mine"] == records[0]["loss"]


@pytest.mark.nightly
def test_a_mixture_is_a_list_of_objectives(world, tmp_path):
    mixture = "objective=[{name: sigmoid, weight: 0.8}, {name: bco_pair, weight: 0.2}, {name: sft}]"
    assert train.main(arguments(world, tmp_path / "list", "evaluation.every=null", mixture)) == 0
    assert train.main(arguments(world, tmp_path / "name", "evaluation.every=null", "objective.name=mpo")) == 0
    assert lasting(tmp_path / "list") == lasting(tmp_path / "name")


def test_a_column_that_the_objective_would_ignore_is_refused(world, tmp_path, capsys):
    rows = [{"prompt": "Say", "chosen": "yes", "rejected": "no" * n, "margin": 0.5 * n} for n in range(1, 7)]
    write(tmp_path / "rows.jsonl", {**rows[0], "margin": 0}, *rows[1:])
    argv = [a for a in arguments(world, tmp_path / "run", "evaluation.every=null") if not a.startswith("data.")]
    line = refused([*argv, f"data.train={tmp_path / 'rows.jsonl'}", "objective.name=ipo"], capsys)
    assert "rows.jsonl:2: has a margin (as have 5 examples" in line and "objective.name=ipo would ignore" in line
    assert (tmp_path / "run" / "data.json").exists()  # what was read is told all the same


@pytest.mark.nightly
def test_an_alarm_is_said_once_and_changes_nothing(world, tmp_path, capsys):
    still = ("optimizer.learning_rate=0", "steps=40", "checkpoint.every=40", "data.eval=null", "evaluation.every=null")
    assert train.main(arguments(world, tmp_path / "run", *still)) == 0
    assert capsys.readouterr().out.count("alarm: ") == 1
    assert train.main(arguments(world, tmp_path / "quiet", *still, "alarms.enabled=false")) == 0
    assert "alarm: " not in capsys.readouterr().out
    assert lasting(tmp_path / "run") == lasting(tmp_path / "quiet")


def refused(argv, capsys):
    """The one line of a refusal."""
    assert train.main(argv) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    (line,) = captured.err.splitlines()
    return line


@pytest.mark.parametrize(
    "more",
    [
        ("log.loggers=[wandb]",),
        ("evaluation.answers=bare.jsonl", "evaluation.judge=rule"),
        ("evaluation.answers=bare.jsonl", "checkpoint.best=pass_rate"),
    ],
)
def test_what_is_named_and_not_there_is_refused_before_the_folder_is_made(world, tmp_path, capsys, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    write(tmp_path / "bare.jsonl", {"prompt": "Hi"})
    line = refused(arguments(world, tmp_path / "no", *more), capsys)
    bare = f"bare.jsonl:1: missing column: no 'good', which {more[-1]} needs: what a good answer matches"
    assert (bare if len(more) > 1 else "log.loggers: wandb: is not installed; pip install wandb") in line
    assert not (tmp_path / "no").exists()


@pytest.mark.nightly
def test_prompts_without_a_pattern_are_answered_and_seen_and_have_no_pass_rate(world, tmp_path, capsys):
    """As for a judge that needs none; a pattern was asked of every prompt."""
    bare = write(tmp_path / "bare.jsonl", {"prompt": "Hi"}, {"prompt": "Yo"})
    more = ("evaluation.max_new_tokens=4", "steps=1", "log.report=true", "evaluation.every=null")
    assert train.main(arguments(world, tmp_path / "run", *more, f"evaluation.answers={bare}")) == 0
    assert "pass rate" not in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run" / "answers" / "1.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Hi", "Yo"] and all("good" not in row for row in rows)
    assert "2 of 2 questions." in (tmp_path / "run" / "report.html").read_text()
    assert not any("pass_rate" in name for row in read_records(tmp_path / "run" / "metrics.jsonl") for name in row)
    write(bare, {"prompt": "Hi"}, {"prompt": "Yo", "good": "a"})
    line = refused(arguments(world, tmp_path / "no", f"evaluation.answers={bare}"), capsys)
    assert f"{bare}:1: missing column: no 'good', which {bare}:2 has" in line


def test_other_mathematics_in_the_same_folder_is_refused_with_the_difference(world, plain, capsys):
    argv = arguments(world, plain[0], "evaluation.every=null", "objective.beta=0.2")
    line = refused(argv, capsys)
    assert "objective.beta: 0.1 -> 0.2" in line and "allow_change" in line


def test_other_data_under_the_same_name_is_refused(world, plain, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(plain[0], output)
    known = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps({**known, "finished": False}))
    lines = (world / "train.jsonl").read_text().splitlines()
    changed = tmp_path / "train.jsonl"
    changed.write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    argv = [a for a in arguments(world, output, "evaluation.every=null") if not a.startswith("data.train")]
    known["settings"]["data"]["train"] = str(changed)
    (output / "run.json").write_text(json.dumps({**known, "finished": False}))
    assert "digest of the training data" in refused([*argv, f"data.train={changed}"], capsys)


def test_a_folder_with_other_things_in_it_is_left_alone(world, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert "thesis.txt" in refused(arguments(world, tmp_path), capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.txt"]


def test_a_reference_that_is_not_the_policy_is_noticed_at_the_first_step(world, tmp_path, capsys, monkeypatch):
    honest = references.cached
    monkeypatch.setattr(references, "cached", lambda *args: honest(*args) - np.arange(args[2], dtype=np.float32))
    line = refused(arguments(world, tmp_path / "run", "evaluation.every=null", "data.eval=null"), capsys)
    assert "0.693147" in line and "step 1" in line


def test_a_run_that_diverges_stops_and_names_its_rows(world, tmp_path, capsys):
    argv = arguments(world, tmp_path / "run", "evaluation.every=null", "data.eval=null", "optimizer.learning_rate=1e30")
    line = refused([*argv, "log.max_nonfinite=1"], capsys)
    assert "not finite for 2 steps" in line and "train.jsonl:" in line


@pytest.mark.parametrize("held_out", [False, True])
def test_a_token_without_a_row_in_the_embedding_is_refused(world, tmp_path, capsys, held_out):
    """The tokenizer was given a token, and the model no row for it: it would read another token's."""
    folder = tmp_path / "model"
    shutil.copytree(world / "model", folder)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.add_tokens([f"<new {number}>" for number in range(300 - len(tokenizer) + 2)])
    tokenizer.save_pretrained(str(folder))
    good = [{"prompt_ids": [20, 21], "chosen_ids": [22, n], "rejected_ids": [23]} for n in range(30, 38)]
    bad = {"prompt_ids": [20, 21], "chosen_ids": [22, 300], "rejected_ids": [23]}
    new = [write(tmp_path / "new.jsonl", *good, bad), write(tmp_path / "old.jsonl", *good)]
    train_file, eval_file = reversed(new) if held_out else new
    argv = arguments(world, tmp_path / "run", f"model.path={folder}", f"data.train={train_file}")
    line = refused([*argv, f"data.eval={eval_file}", f"data.cache={tmp_path / 'cache'}"], capsys)
    assert re.search(
        r"new.jsonl:9: token 300 \(.*\) has no row in the model's embedding, whose rows are 0 to 299", line
    )
    assert ("as 1 tokens of data.eval" if held_out else "as 1 tokens of data.train") in line
    call = [str(folder), str(new[0]), "--reference", str(folder)]
    assert evaluate.main(call) == 2
    assert "new.jsonl:9: token 300" in capsys.readouterr().err


def test_a_run_whose_last_step_was_not_finite_is_not_done(world, tmp_path, capsys):
    """Three of them in a row are allowed, but not at the end: what they leave is exported by no command."""
    argv = arguments(world, tmp_path / "run", "evaluation.every=null", "data.eval=null", "optimizer.learning_rate=1e30")
    argv.append("steps=3")
    line = refused(argv, capsys)
    assert "the last 2 of 3 steps were not finite, so nothing is exported" in line
    assert "the last 2 of 3 steps were not finite, so nothing is exported" in refused(argv, capsys)  # also once more
    assert not (tmp_path / "run" / "model").exists()


def test_too_few_pairs_and_a_vocabulary_of_another_size(world, tmp_path, capsys):
    assert "batch.pairs: 40" in refused(arguments(world, tmp_path / "a", "batch.pairs=40"), capsys)
    write_folder(tmp_path / "other", vocab_size=280)
    line = refused(arguments(world, tmp_path / "b", f"reference.path={tmp_path / 'other'}"), capsys)
    assert "reference.path" in line and "280" in line


@pytest.mark.nightly
@pytest.mark.parametrize("more", [("optimizer.param_dtype=bfloat16",), ("optimizer.name=adafactor", *MOVING)])
def test_weights_in_bfloat16_and_other_optimizers_stop_and_go_on(world, tmp_path, monkeypatch, more):
    """The same bytes come out, and the folder that is written is like the one that was read."""
    argv = ("evaluation.every=null", "data.eval=null", *more)
    assert train.main(arguments(world, tmp_path / "whole", *argv)) == 0
    original = Journal.step

    def step(self, now, metrics):
        original(self, now, metrics)
        if now == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "step", step)
        assert train.main(arguments(world, tmp_path / "run", *argv)) == 75
    assert train.main(arguments(world, tmp_path / "run", *argv)) == 0
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1]
    records = steps_of(tmp_path / "whole")
    assert records[0]["loss"] == pytest.approx(np.log(2), abs=1e-4) and records[-1]["loss"] < records[0]["loss"]
