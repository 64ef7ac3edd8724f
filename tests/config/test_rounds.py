"""Settings of rounds: a run's, and a block on top; what is wrong with either is named at once."""

import subprocess
import sys
from pathlib import Path

import pytest

from dpo_jax.config import rounds
from dpo_jax.errors import UserError

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "rounds.yaml"
GOOD = """\
model: {path: models/tiny}
output: runs/rounds
rounds:
  prompts: prompts.jsonl
  judge: rule
  answers: 8
"""


@pytest.fixture
def good(tmp_path) -> str:
    (tmp_path / "good.yaml").write_text(GOOD)
    return str(tmp_path / "good.yaml")


def test_the_block_is_read_beside_the_runs_settings(good):
    run, settings = rounds.load([good, "rounds.number=5", "optimizer.learning_rate=1e-5"])
    assert (settings.answers, settings.number, settings.judge.name) == (8, 5, "rule")
    assert (settings.pairs, settings.reference, settings.held_out) == ("best_worst", "start", None)
    assert run.model.path == "models/tiny" and run.optimizer.learning_rate == 1e-5


def test_a_judge_is_a_name_or_a_block(good):
    server = ["rounds.judge=null", "rounds.judge.name=reward:runs/r/model"]
    assert rounds.load([good, *server])[1].judge.name == "reward:runs/r/model"
    assert rounds.load([good, "rounds.judge=reward:m"])[1].judge.name == "reward:m"


def test_the_config_of_the_repository_loads():
    run, settings = rounds.load([str(CONFIG)])
    assert settings.number == 3 and run.model.path == "configs/quickstart/model"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rounds.anwers=3"], "command line: rounds.anwers: no such setting; did you mean rounds.answers?"),
        (["rounds.answers=1"], "command line: rounds.answers: 1: must be a whole number"),
        (["rounds.temperature=0"], "rounds.temperature: 0: must be a number > 0"),
        (["rounds.judge=oracle"], "command line: rounds.judge: must be rule, reward:FOLDER"),
        (["rounds.judge.nme=rule"], "rounds.judge.nme: no such setting; did you mean rounds.judge.name?"),
        (["rounds.reference=last"], "rounds.reference: last: must be one of start, first"),
        (["data.train=pairs.jsonl"], "data.train: each round trains on what it has collected; leave it out"),
        (["reference.path=other"], "reference.path: rounds.reference says which model it is"),
        (
            ["adapter.rank=8", "adapter.dora=true"],
            "the next round goes on from its folder, which adapter.dora has none",
        ),
        (["adapter.rank=8", "export.kind=merged"], "export.kind: merged: the next round goes on from the adapter"),
        (["adapter.path=a", "rounds.reference=first"], "rounds.reference: first: would be a second adapter"),
        (["adapter.path=a", "reference.adapter=base"], "reference.adapter: rounds.reference says which it is"),
        (["rounds.prompts=null"], "rounds.prompts: None: must be text"),
        (["optimizer.learning_rat=1"], "optimizer.learning_rat: no such setting; did you mean"),
    ],
)
def test_a_mistake_is_a_line(words, message, good):
    with pytest.raises(UserError) as caught:
        rounds.load([good, *words])
    assert message in str(caught.value)


def test_all_mistakes_are_told_together(good):
    with pytest.raises(UserError) as caught:
        rounds.load([good, "rounds.answers=x", "rounds.number=0", "batch.pairs=0"])
    assert len(str(caught.value).splitlines()) == 3


def test_what_is_missing_is_named(tmp_path):
    (tmp_path / "bare.yaml").write_text("model: {path: m}\noutput: o\n")
    with pytest.raises(UserError) as caught:
        rounds.load([str(tmp_path / "bare.yaml")])
    assert "rounds.prompts: not given: file of" in str(caught.value)
    assert "rounds.judge: not given: who judges" in str(caught.value)


def test_help_names_the_block():
    done = subprocess.run([sys.executable, "-m", "dpo_jax.rounds", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("rounds.prompts", "rounds.judge.name", "model.path"))
