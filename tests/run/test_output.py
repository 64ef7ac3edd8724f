"""The output folder: what a killed run leaves is its own, and is swept; what is somebody else's is never touched."""

import dataclasses
import json
import socket
import subprocess
import sys
import uuid

import pytest

from dpo_jax.config.run import Run
from dpo_jax.errors import UserError
from dpo_jax.objectives.settings import ObjectiveSettings
from dpo_jax.objectives.table import OBJECTIVES, Objective
from dpo_jax.processes.here import Failure, here
from dpo_jax.run import output
from dpo_jax.run.continuing import DATA, PAIRS, STEPS, Past, own_objectives
from dpo_jax.training.settings import CheckpointSettings
from tests.support.encoding import encoded_rows
from tests.support.tiny_rows import byte_tokenizer


def run_in(folder):
    return Run.model_validate({"model": {"path": "m"}, "data": {"train": "d"}, "output": str(folder)})


def left_over(name):
    """As `files.write_whole` calls a file before it is moved into place."""
    return f".{name}.{uuid.uuid4().hex}.tmp"


@pytest.mark.parametrize("name", ["run.json", "data.json", "metrics.jsonl"])
def test_a_run_that_was_killed_before_its_first_file_stood_goes_on(tmp_path, name):
    (tmp_path / left_over(name)).write_text("half")
    with output.opened(run_in(tmp_path)) as folder:
        assert sorted(path.name for path in folder.iterdir()) == [".lock"]


def test_half_an_export_and_half_a_cache_are_swept_and_nothing_else(tmp_path):
    folder = tmp_path / "run"
    for name in (".model.tmp-123", ".model.old-9", "cache", "model", "wandb"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text("x")
    (folder / "cache" / left_over("data-abc.npz")).write_text("half")
    elsewhere = tmp_path / "precious"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("mine")
    (folder / ".model.tmp-7").symlink_to(elsewhere)
    with output.opened(run_in(folder)):
        assert sorted(path.name for path in folder.iterdir()) == [".lock", "cache", "model", "wandb"]
        assert [path.name for path in (folder / "cache").iterdir()] == ["file"]
    assert (elsewhere / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["thesis.txt", ".notes.tmp", ".model.tmp-x", ".run.json.tmp"])
def test_what_no_run_writes_is_a_stranger(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="holds other things"), output.opened(run_in(tmp_path)):
        pass
    assert (tmp_path / name).read_text() == "mine"


def test_a_run_that_goes_on_is_not_swept_by_another(tmp_path):
    with output.opened(run_in(tmp_path)):
        (tmp_path / left_over("metrics.jsonl")).write_text("half")
        with pytest.raises(UserError, match="in use by another run"), output.opened(run_in(tmp_path)):
            pass
        assert len(list(tmp_path.glob(".metrics.jsonl.*.tmp"))) == 1


HOLDS = "import sys, time; from dpo_jax.run import output; from tests.run.test_output import run_in\n"
HOLDS += "with output.opened(run_in(sys.argv[1])): print('held', flush=True); time.sleep(600)"


def killed_while_it_held(folder):
    """A process that was killed while it had the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    process.kill()
    process.communicate()
    return process.pid


def ends(folder):
    return json.loads((folder / "run.json").read_text()).get("ends", [])


def test_a_start_that_was_killed_is_told_by_the_next_one_and_kept(tmp_path, capsys):
    """A process that is killed can write nothing any more, and the others of its run do not hold the folder."""
    run = run_in(tmp_path)
    output.record_run(run, tmp_path, {})
    pid = killed_while_it_held(tmp_path)
    with output.opened(run):
        said = capsys.readouterr().out
        assert f"process {pid} of {socket.gethostname()}" in said and "ended without a word" in said
        output.record_run(run, tmp_path, {})
        assert [end["why"].split(":")[0] for end in ends(tmp_path)] == ["process 0 ended without a word"]
    with output.opened(run):
        assert capsys.readouterr().out == ""
    assert len(ends(tmp_path)) == 1


def test_a_start_that_ends_with_a_word_is_not_taken_for_a_killed_one(tmp_path, capsys):
    """Refused, interrupted, or ended with its cause in the record while the process does not come back."""
    run = run_in(tmp_path)
    output.record_run(run, tmp_path, {})
    for error in (UserError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)), output.opened(run):
            raise error
    with output.opened(run):
        failed = here().on_failure
        assert failed is not None
        failed(Failure(1, "b", 76, "the wheel came off"))
        assert (tmp_path / ".lock").read_bytes() == b""
    with output.opened(run):
        assert capsys.readouterr().out == ""
    assert [(end["process"], end["why"]) for end in ends(tmp_path)] == [(1, "the wheel came off")]


@pytest.mark.parametrize("text", ["", "x", "[1]", "[" * 900, "{}", '["a", "b", "c"]'])
def test_a_lock_with_other_words_in_it_says_nothing(tmp_path, capsys, text):
    (tmp_path / ".lock").write_text(text)
    with output.opened(run_in(tmp_path)):
        assert capsys.readouterr().out == ""


@pytest.mark.parametrize("what", ["checkpoints/10", "model"])
def test_a_run_that_learned_something_is_held_to_its_settings_and_facts_and_no_other(tmp_path, what):
    """One that was refused in the middle of its start, for damaged weights say, is begun again with other ones."""
    train, _ = encoded_rows(tmp_path, byte_tokenizer(), {"prompt": "a", "chosen": "b", "rejected": "c"})
    first, other = run_in(tmp_path), run_in(tmp_path).model_copy(update={"seed": 7})
    output.record_run(first, tmp_path, {"digest of the weights at the start": "a"})
    Past.of(tmp_path).check_settings(other)
    output.record_run(other, tmp_path, {"digest of the weights at the start": "b"})
    (tmp_path / what).mkdir(parents=True)
    past = Past.of(tmp_path)
    with pytest.raises(UserError, match="digest of the weights at the start was b and is now a; restore it"):
        past.check_facts(other, {"digest of the weights at the start": "a"}, train)
    with pytest.raises(UserError, match="another setting, seed: 7 -> 0"):
        past.check_settings(first)
    past.check_settings(first.model_copy(update={"checkpoint": CheckpointSettings(allow_change=("seed",))}))
    accepting = CheckpointSettings(allow_change=("data.train",))
    changed = first.model_copy(update={"checkpoint": accepting})
    with pytest.raises(UserError, match=r"accept it with checkpoint.allow_change=\[data.train,seed\]"):
        past.check_settings(changed)


def plus(number):
    return Objective(value=lambda pairs, **_: pairs + number, equation="", paper="", reference="unused")


@pytest.mark.parametrize("what", ["checkpoints/10", "model"])
def test_a_run_is_held_to_the_function_of_an_objective_that_a_user_added(tmp_path, monkeypatch, what):
    train, _ = encoded_rows(tmp_path, byte_tokenizer(), {"prompt": "a", "chosen": "b", "rejected": "c"})
    monkeypatch.setitem(OBJECTIVES, "mine", plus(1))
    run = run_in(tmp_path).model_copy(update={"objective": ObjectiveSettings(name="mine")})
    facts = own_objectives(run)
    assert [*facts] == ["digest of objective mine"] and own_objectives(run_in(tmp_path)) == {}
    output.record_run(run, tmp_path, facts)
    (tmp_path / what).mkdir(parents=True)
    past = Past.of(tmp_path)
    monkeypatch.setitem(OBJECTIVES, "mine", plus(1))
    assert past.changes(run) == []
    monkeypatch.setitem(OBJECTIVES, "mine", plus(2))
    with pytest.raises(UserError, match="another setting, objective.name: mine .*as another function.*another output"):
        past.check_settings(run)
    accepting = run.model_copy(update={"checkpoint": CheckpointSettings(allow_change=("objective.name",))})
    past.check_settings(accepting)
    past = dataclasses.replace(past, step=3)
    assert past.check_facts(accepting, {STEPS: 5, PAIRS: 1, DATA: "a", **own_objectives(run)}, train) == []
    with pytest.raises(UserError, match=r"finished after 3 steps, and the changed settings \(objective.name\)"):
        dataclasses.replace(past, finished=True).check_facts(run, {STEPS: 3, PAIRS: 1, DATA: "a"}, train)
    assert "from step 4 on: objective.name: mine" in past.changed_by(accepting, [])[0]


def test_a_run_of_an_earlier_version_goes_on_under_a_function_and_not_in_the_place_of_the_packages(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(OBJECTIVES, "mine", plus(1))
    for name, goes_on in (("mine", True), ("sigmoid", False)):
        run = run_in(tmp_path / name).model_copy(update={"objective": ObjectiveSettings(name=name)})
        (tmp_path / name / "model").mkdir(parents=True)
        output.record_run(run, tmp_path / name, {STEPS: 5})
        assert Past.of(tmp_path / name).changes(run) == []
        monkeypatch.setitem(OBJECTIVES, name, plus(2))
        assert (Past.of(tmp_path / name).changes(run) == []) is goes_on


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "[" * 100_000, '{"settings": {}}', '{"settings": [], "facts": {}}', "\xff", '{"settings": 1}'],
)
def test_a_damaged_record_is_one_line_where_something_would_be_lost_and_nothing_where_not(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    assert output.recorded(tmp_path) == {}
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="run.json is damaged, and no checkpoint has what it said; restore it"):
        output.recorded(tmp_path)
