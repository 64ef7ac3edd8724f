"""The same command again, over a run that is finished, damaged, or to be longer: nothing is lost, nothing is silent."""

import itertools
import json
import shutil
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file

from dpo_jax import convert, train
from dpo_jax.reporting.journal import Journal, read_records
from dpo_jax.reporting.metrics import TIME_FIELDS
from dpo_jax.training import loss_scale
from tests.support.tiers import by_day, by_pairs
from tests.support.tiny_rows import write, yes_or_no
from tests.support.worlds import write_model

STEPS = 4
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("again")
    write_model(root / "model", "llama", "bfloat16", num_hidden_layers=2)
    rows = yes_or_no(24)
    write(root / "train.jsonl", *rows[:16])
    write(root / "grown.jsonl", *rows[:20])
    write(root / "eval.jsonl", *rows[20:])
    return root


def arguments(world, output, *more):
    given = {
        "model.path": world / "model",
        "data.train": world / "train.jsonl",
        "data.eval": world / "eval.jsonl",
        "data.cache": world / "cache",
        "batch.pairs": 4,
        "batch.micro_tokens": 256,
        "steps": STEPS,
        "optimizer.learning_rate": 1e-3,
        "optimizer.schedule": "constant",
        "optimizer.warmup_steps": 0,
        "checkpoint.every": 2,
        "export.rounding": "nearest",
        "evaluation.every": "null",
        "log.report": False,  # a page takes longer than the steps
        "output": output,
    }
    given |= dict(word.split("=", 1) for word in more)
    return [f"{key}={value}" for key, value in given.items()]


def run(world, output, *more):
    assert train.main(arguments(world, output, *more)) == 0
    return output


def refused(world, output, capsys, *more):
    capsys.readouterr()
    assert train.main(arguments(world, output, *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture(scope="module")
def finished(world):
    return run(world, world / "finished")


@pytest.fixture
def copied(finished, tmp_path):
    """The finished run, to be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


def weights(output):
    return (output / "model" / WEIGHTS).read_bytes()


def lasting(output):
    """Records without what the clock and the memory decide."""
    drop = {name for field in TIME_FIELDS for name in (field, f"eval_{field}")}
    return [{k: v for k, v in r.items() if k not in drop} for r in read_records(output / "metrics.jsonl")]


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def as_file(model):
    shutil.rmtree(model)
    model.write_text("mine")


DAMAGES = {
    "a bit": lambda model: flip(model / WEIGHTS),
    "the weights": lambda model: (model / WEIGHTS).unlink(),
    "the tokenizer": lambda model: (model / "tokenizer.json").write_text("{}"),
    "the sums": lambda model: (model / "SHA256SUMS").unlink(),
    "everything": shutil.rmtree,
    "emptied": lambda model: [shutil.rmtree(path) if path.is_dir() else path.unlink() for path in model.iterdir()],
    "a file": as_file,
}


@pytest.mark.parametrize("damage", by_day(list(DAMAGES), ["everything", "a file"]))
def test_a_damaged_export_is_made_again_and_what_stood_there_is_kept(world, finished, copied, capsys, damage):
    model = copied / "model"
    DAMAGES[damage](model)
    stood = model.is_file() or (model.is_dir() and any(model.iterdir()))
    run(world, copied)
    assert "the model is exported again" in capsys.readouterr().out
    assert weights(copied) == weights(finished) and lasting(copied) == lasting(finished)
    assert len(list(copied.glob("model.changed-*"))) == stood
    run(world, copied)
    assert "finished already" in capsys.readouterr().out


def test_a_card_that_was_written_on_stays(world, copied, capsys):
    card = copied / "model" / "README.md"
    card.write_text("my words")
    run(world, copied)
    assert "finished already" in capsys.readouterr().out and card.read_text() == "my words"


def test_a_damaged_export_without_checkpoints_is_one_line(world, copied, capsys):
    shutil.rmtree(copied / "checkpoints")
    run(world, copied)  # nothing needs them
    flip(copied / "model" / WEIGHTS)
    assert "finished run and none of its checkpoints" in refused(world, copied, capsys)


def test_another_dtype_of_the_export_is_exported_and_measured(world, copied, capsys):
    run(world, copied, "export.dtype=float32")
    said = capsys.readouterr().out
    assert "exported again, by {'dtype': 'float32'" in said and "has lost" not in said
    assert {value.dtype.name for value in load_file(copied / "model" / WEIGHTS).values()} == {"float32"}
    last = [record for record in read_records(copied / "metrics.jsonl") if "eval_loss" in record][1:]
    assert [record["step"] for record in last] == [STEPS]
    assert "eval_unrounded/rewards/margins" not in last[0]  # nothing is rounded
    shown = run(world, copied, "export.dtype=float32") and capsys.readouterr().out
    assert "finished already" in shown


def stopped(world, output, monkeypatch, *more, after=2):
    """A run that is told to stop once this step is written down."""
    original = Journal.step

    def step(self, now, metrics):
        original(self, now, metrics)
        if now == after:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "step", step)
        assert train.main(arguments(world, output, *more)) == 75
    return output


LONGER = {
    "steps": ((), ("steps=6",)),
    "epochs": (("steps=null", "epochs=1"), ("steps=null", "epochs=1.5")),
    "float16": (("model.compute_dtype=float16",), ("model.compute_dtype=float16", "steps=6")),
    "more data": (("data.shuffle=false",), ("data.shuffle=false", "data.train=GROWN", "steps=5")),
}


@pytest.mark.parametrize(
    ("kind", "when"),
    by_pairs(
        list(itertools.product(LONGER, ["finished", "stopped"])),
        [("more data", "stopped")],
    ),
)
def test_a_longer_run_is_the_run_that_was_so_long_from_the_start(world, tmp_path, monkeypatch, kind, when):
    """To the bit: with the given micro-batches all steps have one shape, so that one program makes them all."""
    short, long = ([word.replace("GROWN", str(world / "grown.jsonl")) for word in words] for words in LONGER[kind])
    if when == "finished":
        run(world, tmp_path / "run", *short)
    else:
        stopped(world, tmp_path / "run", monkeypatch, *short)
    run(world, tmp_path / "run", *long)
    whole = run(world, world / f"whole {kind}", *long)
    assert weights(tmp_path / "run") == weights(whole)
    rows = [[{**r, "epoch": 0} for r in lasting(each) if "loss" in r] for each in (tmp_path / "run", whole)]
    assert rows[0] == rows[1]  # an epoch was less before there were more data


@pytest.mark.nightly
def test_a_length_that_would_have_changed_the_past_is_refused_unless_it_is_accepted(world, tmp_path, capsys):
    falling = "optimizer.schedule=linear"
    output = run(world, tmp_path / "run", falling)
    line = refused(world, output, capsys, falling, "steps=6")
    assert "holds a run of 4 steps; with 6, under optimizer.schedule=linear, the 4 steps already made" in line
    assert "checkpoint.allow_change=[steps]" in line
    run(world, output, falling, "steps=6", "checkpoint.allow_change=[steps]")
    rates = [record["learning_rate"] for record in lasting(output) if "loss" in record]
    assert len(rates) == 6 and rates[5] == pytest.approx(1e-3 / 6) and rates[3] == pytest.approx(1e-3 / 4)
    changed = "from step 5 on: the run is to have 6 steps in place of 4, which checkpoint.allow_change accepts"
    assert changed in (output / "model" / "README.md").read_text()
    run(world, output, falling, "steps=6")  # accepted once, it is the run's own


@pytest.mark.nightly
def test_a_warm_up_that_would_have_been_longer_is_named_and_the_one_that_was_made_can_be_kept(world, tmp_path, capsys):
    warm = ("optimizer.warmup_steps=null", "optimizer.warmup_fraction=0.5")
    output = run(world, tmp_path / "run", *warm)
    line = refused(world, output, capsys, *warm, "steps=6")
    assert "optimizer.warmup_fraction=0.5 (3 steps of warm-up in place of 2)" in line and "\n" not in line.strip()
    names = "[optimizer.warmup_steps,optimizer.warmup_fraction]"
    kept = "optimizer.warmup_steps=2", "optimizer.warmup_fraction=null", f"checkpoint.allow_change={names}"
    assert all(word in line for word in kept)
    run(world, output, *kept, "steps=6")
    assert weights(output) == weights(run(world, tmp_path / "whole", kept[0], "steps=6"))


@pytest.mark.nightly
def test_what_is_changed_on_the_way_is_said_in_the_record_the_card_and_once(world, copied, capsys):
    more = ("steps=6", "optimizer.learning_rate=1e-4", "checkpoint.allow_change=[optimizer.learning_rate]")
    run(world, copied, *more)
    line = "from step 5 on: optimizer.learning_rate: 0.001 -> 0.0001"
    assert line in capsys.readouterr().out
    assert json.loads((copied / "run.json").read_text())["changed"] == [line]
    assert line in (copied / "model" / "README.md").read_text()
    run(world, copied, *more, "steps=7")
    assert line not in capsys.readouterr().out and line in (copied / "model" / "README.md").read_text()


@pytest.mark.parametrize(
    ("word", "key"), [("optimizer.name=adafactor", "optimizer.name"), ("model.freeze=[embed/.*]", "model.freeze")]
)
def test_what_no_checkpoint_can_become_is_refused_before_anything_is_written(world, copied, capsys, word, key):
    before = (copied / "run.json").read_bytes()
    for more in ((), ("steps=6", f"checkpoint.allow_change=[{key}]")):
        line = refused(world, copied, capsys, word, *more)
        assert key in line and "name another output" in line and "allow_change" not in line
    assert (copied / "run.json").read_bytes() == before


@pytest.mark.nightly
def test_the_remedies_of_a_finished_run_are_whole(world, tmp_path, capsys):
    falling = ("optimizer.schedule=linear", "objective.beta=0.3")
    output = run(world, tmp_path / "run", falling[0])
    line = refused(world, output, capsys, *falling)
    remedy = "checkpoint.allow_change=[objective.beta,steps]"
    assert "give more steps" in line and remedy in line
    run(world, output, *falling, "steps=6", remedy)
    line = refused(world, output, capsys, *falling, "steps=6", "model.path=/else")
    assert "start from that" in line and "the same model elsewhere" in line


@pytest.mark.nightly
def test_another_kind_of_export_is_said_as_that(world, tmp_path, capsys):
    output = tmp_path / "run"
    words = [word for word in arguments(world, output, "adapter.rank=2") if "rounding" not in word]
    assert train.main(words) == 0
    capsys.readouterr()
    assert train.main([*words, "export.kind=both"]) == 0
    said = capsys.readouterr().out
    assert "in place of" in said and "is missing or was changed" not in said and (output / "model").exists()


def test_settings_that_come_with_another_objective_are_not_told_apart(world, copied, capsys):
    line = refused(world, copied, capsys, "objective.name=simpo", "seed=3")
    assert "\n" not in line.strip() and "objective.gamma" not in line and "objective.label_smoothing" not in line
    assert 'objective.name: "sigmoid" -> "simpo"' in line and "seed: 0 -> 3" in line
    assert "name another output" in line and "give more steps" in line  # the run is finished
    accepted = "checkpoint.allow_change=[objective.name,reference.mode]"
    run(world, copied, "objective.name=simpo", "steps=5", accepted)


@pytest.mark.nightly
def test_overflows_while_the_loss_scale_falls_stop_no_run(world, tmp_path, capsys, monkeypatch):
    """Not even one that stops at the first step that is not finite; a run that had no other steps exports nothing."""
    monkeypatch.setattr(loss_scale, "START", 2.0**20)
    words = ("model.compute_dtype=float16", "log.max_nonfinite=0", "data.eval=null")
    line = refused(world, tmp_path / "run", capsys, *words, "steps=2")
    assert "none of 2 steps changed anything" in line and "it is 262144 now" in line and "give more steps" in line
    assert not (tmp_path / "run" / "model").exists()
    run(world, tmp_path / "run", *words, "steps=16")
    records = lasting(tmp_path / "run")
    finite = [record["grad_norm"] is not None for record in records]
    skipped = 16 - sum(finite)
    assert finite == sorted(finite) and 2 < skipped < 16
    scales = [2.0 ** (20 - min(step, skipped)) for step in range(16)]
    assert [record["loss_scale"] for record in records] == scales
    assert all(record["loss"] < 0.7 for record in records) and records[-1]["skipped_steps"] == skipped
    assert (
        f"{skipped} of 16 steps were not finite and changed nothing, as happens in float16" in capsys.readouterr().out
    )
    assert weights(tmp_path / "run") != (world / "model" / WEIGHTS).read_bytes()


def test_a_run_may_be_told_to_go_on_in_float16(world, copied, capsys):
    other = ("model.compute_dtype=float16", "steps=6")
    assert 'model.compute_dtype: "auto" -> "float16"' in refused(world, copied, capsys, *other)
    run(world, copied, *other, "checkpoint.allow_change=[model.compute_dtype]")
    scales = [record.get("loss_scale") for record in lasting(copied) if "loss" in record]
    assert scales == [None] * 4 + [loss_scale.START] * 2


def test_data_that_would_have_changed_the_past_are_refused_unless_they_are_accepted(world, copied, capsys):
    grown = f"data.train={world / 'grown.jsonl'}"
    line = refused(world, copied, capsys, grown, "steps=5")
    assert "digest of the training data" in line and "16 -> 20 pairs" in line and "allow_change=[data.train]" in line
    run(world, copied, grown, "steps=5", "checkpoint.allow_change=[data.train]")
    assert "have changed (16 -> 20 pairs), which checkpoint.allow_change accepts" in capsys.readouterr().out


@pytest.mark.nightly
def test_a_reference_that_has_become_another_is_refused_unless_it_is_accepted(world, tmp_path, capsys):
    other = shutil.copytree(world / "model", tmp_path / "other")
    output = run(world, tmp_path / "run", f"reference.path={other}")
    flip(other / WEIGHTS)
    for more in ((), ("steps=6",)):  # a run that is finished, and one that is to go on
        line = refused(world, output, capsys, f"reference.path={other}", *more)
        assert "digest of the weights of the reference was" in line and "restore it" in line
    third = shutil.copytree(other, tmp_path / "third")
    run(world, output, f"reference.path={third}", "steps=6", "checkpoint.allow_change=[reference.path]")


def test_what_trains_no_further_is_refused(world, copied, capsys):
    assert "has made 4 steps, more than the 2" in refused(world, copied, capsys, "steps=2")
    line = refused(world, copied, capsys, "objective.beta=0.3", "checkpoint.allow_change=[objective.beta]")
    assert "finished after 4 steps, and the changed settings (objective.beta) train no further" in line


@pytest.mark.parametrize("text", by_day([None, "[]", "{", "[" * 100_000, '{"settings": 3, "facts": {}}'], [None, "[]"]))
def test_what_a_lost_record_said_is_in_the_checkpoints(world, finished, copied, capsys, text):
    (copied / "run.json").unlink() if text is None else (copied / "run.json").write_text(text)
    assert "objective.beta: 0.1 -> 0.2" in refused(world, copied, capsys, "objective.beta=0.2")
    moved = shutil.copytree(world / "model", copied.parent / "model")
    flip(moved / WEIGHTS)
    more = (f"model.path={moved}", "checkpoint.allow_change=[model.path]")
    assert "digest of the weights at the start was" in refused(world, copied, capsys, *more)
    run(world, copied)
    said = "is missing" if text is None else "is damaged"
    assert f"run.json {said}; what it said is taken from checkpoint 4" in capsys.readouterr().out
    assert weights(copied) == weights(finished)
    assert json.loads((copied / "run.json").read_text())["finished"]


@pytest.mark.parametrize("kept", by_day([0, 2], [2]))
def test_records_that_are_gone_are_said(world, tmp_path, monkeypatch, capsys, kept):
    output = stopped(world, tmp_path / "run", monkeypatch)
    lines = (output / "metrics.jsonl").read_text().splitlines(keepends=True)
    (output / "metrics.jsonl").write_text("".join(lines[:kept]))
    run(world, output)
    assert f"metrics.jsonl has lost {len(lines) - kept} of the {len(lines)} records" in capsys.readouterr().out


def test_any_kept_checkpoint_is_exported_as_a_run_that_ended_there(world, finished, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(finished.parent)  # a run is named as its settings name it, from where the command is given
    short = run(world, tmp_path / "short", "steps=2")
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert convert.main(["export", finished.name, str(tmp_path / "two"), "--step", "2"]) == 0
    assert "the model after step 2" in capsys.readouterr().out
    assert (tmp_path / "two" / WEIGHTS).read_bytes() == weights(short)
    assert json.loads((tmp_path / "two" / "dpo_jax.json").read_text())["step"] == 2
    assert convert.main(["export", str(finished), str(tmp_path / "all"), "--dtype", "float32"]) == 0
    exact, rounded = load_file(tmp_path / "all" / WEIGHTS), load_file(finished / "model" / WEIGHTS)
    assert all(exact[name].dtype == np.float32 for name in exact)
    assert all((exact[name].astype(rounded[name].dtype) == rounded[name]).all() for name in exact)
    assert any((exact[name] != rounded[name].astype(np.float32)).any() for name in exact)
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_what_is_no_checkpoint_of_a_run_is_one_line(world, copied, tmp_path, capsys):
    def said(*argv):
        assert convert.main(["export", *map(str, argv)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    capsys.readouterr()
    assert "has no checkpoint of step 3; kept are [2, 4]" in said(copied, tmp_path / "new", "--step", 3)
    assert "is not the output folder of a run" in said(world / "model", tmp_path / "new", "--step", 3)
    flip(next((copied / "checkpoints" / "4").glob("state/d/*")))
    assert "checkpoints/4 cannot be used (state/d/" in said(copied, tmp_path / "new")
    flip(world / "model" / WEIGHTS)
    try:
        assert "digest of the weights at the start was" in said(copied, tmp_path / "new", "--step", 2)
    finally:
        flip(world / "model" / WEIGHTS)
    assert not (tmp_path / "new").exists()


def test_a_secret_in_a_path_is_in_no_file_and_no_path_of_ours_in_the_model(world, tmp_path, monkeypatch, capsys):
    secret = "hf_" + "a" * 24
    data = shutil.copy(world / "train.jsonl", tmp_path / f"{secret}.jsonl")
    more = (f"data.train={data}", f"data.cache={tmp_path / 'run' / 'cache'}")
    stopped(world, tmp_path / "run", monkeypatch, *more)
    run(world, tmp_path / "run", *more)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
    assert [path for path in files if path.parent.name == "model" and str(tmp_path).encode() in path.read_bytes()] == []
    assert secret not in capsys.readouterr().out


def test_an_output_that_vanishes_is_one_line_and_begins_again(world, finished, tmp_path, monkeypatch, capsys):
    original = Journal.step

    def step(self, now, metrics):
        original(self, now, metrics)
        if now == 1:
            shutil.rmtree(tmp_path / "run")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "step", step)
        line = refused(world, tmp_path / "run", capsys)
    assert str(tmp_path / "run") in line and line.startswith("error: ")
    assert weights(run(world, tmp_path / "run")) == weights(finished)
