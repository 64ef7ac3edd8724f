"""Runs that keep, export and name their best step: the same one wherever they were killed; and held-out prompts."""

import json
import random
import shutil
import time

import pytest
from safetensors.numpy import load_file

from dpo_jax import convert, evaluate, preview, train
from dpo_jax.reporting.journal import Journal, read_records
from dpo_jax.run import result
from dpo_jax.training.checkpoints import Checkpoints
from tests.support.tiers import night
from tests.support.tiny_rows import write, yes_or_no
from tests.support.worlds import write_model
from tools import kill_resume

STEPS, BEST, LAST = 8, 2, 6
"""What the run is to have, the step with the least loss on pairs that say the opposite, and where patience ends."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model in bfloat16, pairs to train on, others like them, and others that prefer what is rejected here."""
    root = tmp_path_factory.mktemp("world")
    write_model(root / "model", num_hidden_layers=1, dtype="bfloat16")
    rows = yes_or_no(24)
    write(root / "train.jsonl", *rows[:14])
    write(root / "alike.jsonl", *rows[14:18])
    opposite = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[12:20]]
    write(root / "opposite.jsonl", *opposite)
    return root


def arguments(world, output, *more):
    given = {
        "model.path": world / "model",
        "data.train": world / "train.jsonl",
        "data.eval.alike": world / "alike.jsonl",
        "data.eval.opposite": world / "opposite.jsonl",
        "data.cache": world / "cache",
        "batch.pairs": 4,
        "batch.micro_tokens": 256,
        "steps": STEPS,
        "optimizer.learning_rate": 1e-3,
        "optimizer.warmup_steps": 0,
        "evaluation.every": 2,
        "evaluation.patience": 2,
        "checkpoint.best": "eval/opposite/loss",
        "checkpoint.every": 3,
        "checkpoint.keep": 1,
        "log.report": False,  # a page takes longer than the steps
        "output": output,
    }
    return [f"{key}={value}" for key, value in given.items()] + list(more)


@pytest.fixture(scope="module")
def finished(world):
    assert train.main(arguments(world, world / "finished")) == 0
    return world / "finished"


def evaluations(folder):
    return result.evaluations(folder)


def known(folder):
    return json.loads((folder / "run.json").read_text())


def test_the_run_stops_and_exports_its_best_step(world, finished, capsys):
    found = evaluations(finished)
    losses = {step: metrics["eval/opposite/loss"] for step, metrics in found.items()}
    assert list(losses) == [0, 2, 4, LAST] and losses[BEST] < losses[4] < losses[LAST]
    assert max(record["step"] for record in read_records(finished / "metrics.jsonl")) == LAST
    best = {"metric": "eval/opposite/loss", "step": BEST, "value": losses[BEST]}
    assert (known(finished)["best"], known(finished)["stopped"]) == (best, LAST)
    about = json.loads((finished / "model" / "dpo_jax.json").read_text())
    assert (about["best"], about["stopped"]) == (best, LAST) and about["metrics"] == found[BEST]
    said = [
        f"stopped after step {LAST}: no better eval/opposite/loss since step {BEST} (evaluation.patience)",
        f"exported: step {BEST}, the best by eval/opposite/loss ({losses[BEST]:.4g}); the last, step {LAST}, has "
        f"{losses[LAST]:.4g}",
        f"no step was better than the start, which has {losses[0]:.4g}",
    ]
    card = (finished / "model" / "README.md").read_text()
    assert all(line in card for line in said)
    kept = sorted(int(path.name) for path in (finished / "checkpoints").iterdir() if path.name.isdigit())
    assert kept == [BEST, LAST]  # neither is a multiple of checkpoint.every alone, and checkpoint.keep is 1
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"}
    capsys.readouterr()
    assert train.main(arguments(world, finished)) == 0
    out = capsys.readouterr().out
    assert "finished already" in out and all(line in out for line in said)
    assert f"alike: loss         0.6931 -> {found[BEST]['eval/alike/loss']:.4f}" in out
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"}


def test_what_is_exported_is_what_was_measured(world, finished, tmp_path, capsys):
    """In bfloat16: the measured weights are the rounded ones. The folder is measured here in one program for both sides
    and there in another, which moves a float32 loss by its last digits."""
    found = evaluations(finished)[BEST]
    assert found["eval_unrounded/rewards/margins"] != found["eval_rewards/margins"]
    argv = [str(finished / "model"), str(world / "opposite.jsonl"), "--reference", str(world / "model"), "--json"]
    capsys.readouterr()
    assert evaluate.main(argv) == 0
    measured = json.loads(capsys.readouterr().out)
    for metric in ("loss", "rewards/margins", "rewards/margins_p10", "logps/chosen", "entropy"):
        assert measured[metric] == pytest.approx(found[f"eval/opposite/{metric}"], rel=2e-5, abs=1e-6)
    weights = finished / "model" / "model.safetensors"
    for target, more, same in (("best", (), True), ("last", ("--step", str(LAST)), False)):
        assert convert.main(["export", str(finished), str(tmp_path / target), *more]) == 0
        assert f"the model after step {BEST if same else LAST}" in capsys.readouterr().out
        assert (weights.read_bytes() == (tmp_path / target / "model.safetensors").read_bytes()) == same


class Killed(BaseException):
    """Nothing in the package looks at this."""


def kill_at(patch, where: str, step: int) -> None:
    """Let the next run end in the middle: before or after that step's evaluation is written, when its checkpoint is
    begun, or before the export."""
    evaluation, save, write = Journal.evaluation, Checkpoints.save, result.write

    def measured(self, number, metrics):
        if where != "unmeasured" or number != step:
            evaluation(self, number, metrics)
        if where in ("measured", "unmeasured") and number == step:
            raise Killed

    def saved(self, number, *arguments, **more):
        save(self, number, *arguments, **more)
        if where == "saved" and number == step:
            raise Killed

    def written(*arguments, **more):
        if where == "exporting":
            raise Killed
        return write(*arguments, **more)

    patch.setattr(Journal, "evaluation", measured)
    patch.setattr(Checkpoints, "save", saved)
    patch.setattr(result, "write", written)


@pytest.mark.parametrize(
    ("where", "step"),
    [
        night("measured", BEST),
        night("unmeasured", 4),
        night("saved", BEST),
        night("measured", LAST),
        night("saved", LAST),
        ("exporting", LAST),
    ],
)
def test_a_run_that_ends_anywhere_and_goes_on_has_the_same_best(world, finished, tmp_path, where, step):
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, where, step)
        with pytest.raises(Killed):
            train.main(arguments(world, tmp_path / "run"))
    assert train.main(arguments(world, tmp_path / "run")) == 0
    assert kill_resume.differences(finished, tmp_path / "run") == []


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_a_finished_run_goes_on_under_more_patience_and_exports_another_step_when_told(world, copied, capsys):
    assert train.main(arguments(world, copied, "evaluation.patience=null")) == 0
    assert (
        max(evaluations(copied)) == STEPS and known(copied)["best"]["step"] == BEST and "stopped" not in known(copied)
    )
    weights = [(path / "model" / "model.safetensors").read_bytes() for path in (copied, copied.parent / "run")]
    capsys.readouterr()
    assert train.main(arguments(world, copied, "checkpoint.best=null")) == 0
    assert "best" not in known(copied) and "the model is exported again" in capsys.readouterr().out
    assert (copied / "model" / "model.safetensors").read_bytes() != weights[0]
    assert json.loads((copied / "model" / "dpo_jax.json").read_text())["metrics"] == evaluations(copied)[STEPS]


def test_a_best_checkpoint_that_is_lost_is_said_and_the_last_can_be_had(world, copied, capsys):
    shutil.rmtree(copied / "checkpoints" / str(BEST))
    shutil.rmtree(copied / "model")
    assert train.main(arguments(world, copied)) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: checkpoint.best: step {BEST} is the best by eval/opposite/loss, and its weights are"
    )
    assert "checkpoint.best=null" in error and error.count("\n") == 1
    assert train.main(arguments(world, copied, "checkpoint.best=null")) == 0
    assert (copied / "model").is_dir()


def test_a_metric_that_this_run_does_not_have_is_refused_before_its_first_step(world, tmp_path, capsys):
    more = ("objective.name=sft", "checkpoint.best=eval_rewards/accuracies", "evaluation.patience=null")
    assert train.main(arguments(world, tmp_path / "run", *more)) == 2
    assert "checkpoint.best: eval_rewards/accuracies: is not measured by this run; " in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


FRACTION = ("data.eval=null", "data.eval_fraction=0.3", "checkpoint.best=eval_loss")


def test_a_share_of_the_prompts_is_held_out_and_said(world, tmp_path, capsys):
    argv = arguments(world, tmp_path / "run", *FRACTION, "steps=2", "evaluation.every=1")
    assert train.main(argv) == 0
    counts = json.loads((tmp_path / "run" / "data.json").read_text())["data.eval_fraction"]
    assert counts["train"]["prompts"] + counts["held_out"]["prompts"] == 14
    held = counts["held_out"]
    line = f"held out by prompt: {held['prompts']} prompts ({held['pairs']} pairs); for training: "
    assert line in capsys.readouterr().out
    assert known(tmp_path / "run")["facts"]["number of pairs"] == counts["train"]["pairs"]
    assert list(evaluations(tmp_path / "run")) == [0, 1, 2]
    assert train.main([*argv, "data.eval_fraction=0.5"]) == 2
    assert "data.eval_fraction: 0.3 -> 0.5" in capsys.readouterr().err
    assert preview.main(argv) == 0
    shown = capsys.readouterr().out
    assert line in shown and f"pair 1 of {counts['held_out']['pairs']}" in shown


def test_prompts_that_are_on_both_sides_are_said(world, tmp_path, capsys):
    assert preview.main(arguments(world, tmp_path / "run")) == 0
    out = capsys.readouterr().out
    assert "data.eval.opposite: 2 of 8 prompts are also in data.train" in out and "data.eval.alike: " not in out


@pytest.mark.nightly
@pytest.mark.parametrize("more", [(), FRACTION], ids=["sets", "fraction"])
def test_real_kills_at_random_moments(world, tmp_path, more):
    """SIGKILL, as `tools/kill_resume.py` does it: half of them at any moment, half while a checkpoint is written."""
    words = [word for word in arguments(world, "") if not word.startswith("output=")]
    program = kill_resume.Program("dpo_jax.train", [*words, *more], tmp_path / "log.txt")
    began = time.monotonic()
    kill_resume.expect_success(program.start(tmp_path / "whole"), program)
    assert "best" in known(tmp_path / "whole")
    kills = kill_resume.draw_kills(8, time.monotonic() - began, random.Random(0))
    assert kill_resume.killed_runs(program, tmp_path / "whole", tmp_path, kills) == []


def test_weights_and_named_ends_are_what_kill_resume_compares(finished, copied):
    assert kill_resume.differences(finished, copied) == []
    run = known(copied)
    (copied / "run.json").write_text(json.dumps({**run, "best": {**run["best"], "step": 4}}))
    assert any("run.json" in line for line in kill_resume.differences(finished, copied))
    assert load_file(copied / "model" / "model.safetensors")


@pytest.mark.nightly
def test_what_was_measured_by_another_objective_is_not_compared(world, tmp_path, capsys):
    """A loss of another objective, or beta, may be less and says nothing; the best begins again, which is said."""
    plain = ("evaluation.patience=null", "optimizer.schedule=constant", "steps=4", "checkpoint.best=eval/alike/loss")
    assert train.main(arguments(world, tmp_path / "run", *plain)) == 0
    assert "exported: step 4" in capsys.readouterr().out  # beta 0.1
    more = (*plain[:2], "steps=6", plain[3], "objective.name=ipo", "checkpoint.allow_change=[objective.name]")
    assert train.main(arguments(world, tmp_path / "run", *more)) == 0
    said = capsys.readouterr().out
    assert "of another objective.name until now" in said and "exported: step 6" in said
    found = [r for r in read_records(tmp_path / "run" / "metrics.jsonl") if "eval/alike/loss" in r]
    losses = {record["step"]: record["eval/alike/loss"] for record in found}
    assert losses[6] > losses[4]  # which would have been exported
