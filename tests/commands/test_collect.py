"""`collect` and `rounds` as whole commands: on the quickstart's model, killed and given again, and refused."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dpo_jax import collect, rounds, train
from dpo_jax.data.layouts import detect, to_record
from tests.commands.test_sample import make
from tests.support.tiny_rows import write
from tests.tools.test_bench import ROOT

MODEL = str(ROOT / "configs" / "quickstart" / "model")
PROMPTS = ROOT / "configs" / "quickstart" / "prompts.jsonl"


def some(folder: Path, count: int) -> str:
    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()[:count]]
    return str(write(folder / "prompts.jsonl", *rows))


def test_answers_of_the_quickstarts_model_are_told_apart_by_its_rule(tmp_path, capsys):
    words = [MODEL, "--prompts", some(tmp_path, 12), "--judge", "rule", "--output", str(tmp_path / "out")]
    words += ["--max-new-tokens", "24", "--json"]
    assert collect.main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["prompts"] == 12 and result["answers"] == 48
    assert 0 < result["mean_score"] < result["mean_best_score"] <= 1  # it answers well about half of the time
    rows = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == result["rows"] == 12 - result["tied"] - result["all_the_same"]
    for line, row in enumerate(rows, 1):
        assert (row["score_chosen"], row["score_rejected"]) == (1.0, 0.0)
        assert len(to_record(row, detect(row), file="pairs.jsonl", line=line).pairs) == 1
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert collect.main(words) == 0 and json.loads(capsys.readouterr().out) == result
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before | {
        ".lock": (tmp_path / "out" / ".lock").stat().st_mtime_ns
    }
    assert collect.main([*words, "--seed", "1"]) == 2
    assert "was made by other settings (sampling.seed: 0 -> 1)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--answers", "1"], "--answers 1: must be a whole number >= 2"),
        (["--temperature", "0"], "--temperature 0.0: must be a number > 0"),
        (["--pairs", "some"], "invalid choice: 'some'"),
        (["--judge", "reward:nowhere"], "name one who judges"),
        (["--output", "pairs.jsonl"], "--output pairs.jsonl: is the name of a file; name a folder"),
    ],
)
def test_a_wrong_option_is_one_line_before_anything_is_loaded(words, says, tmp_path, capsys):
    given = ["nowhere", "--prompts", "nothing.jsonl", "--judge", "rule", "--output", str(tmp_path / "out"), *words]
    assert collect.main(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line and not (tmp_path / "out").exists()


def test_the_rule_needs_patterns(tmp_path, capsys):
    prompts = str(write(tmp_path / "prompts.jsonl", {"prompt": "Hi"}))
    assert collect.main([MODEL, "--prompts", prompts, "--judge", "rule", "--output", str(tmp_path / "out")]) == 2
    assert "prompts.jsonl:1" in capsys.readouterr().err


@pytest.mark.parametrize("as_chat", [False, True])
def test_prompts_that_are_texts_go_without_the_template_which_is_said_or_become_messages(tmp_path, capsys, as_chat):
    prompts = str(write(tmp_path / "prompts.jsonl", *({"prompt": f"What is {n} plus 1?", "good": "."} for n in (1, 2))))
    words = [MODEL, "--prompts", prompts, "--judge", "rule", "--output", str(tmp_path / "out"), "--answers", "2"]
    assert collect.main([*words, "--max-new-tokens", "8", *["--as-chat"] * as_chat]) == 0
    assert ("chat template; --as-chat makes messages" in capsys.readouterr().err) != as_chat
    row = json.loads((tmp_path / "out" / "answers.jsonl").read_text().splitlines()[0])
    text = "What is 1 plus 1?"
    assert row["prompt"] == ([{"role": "user", "content": text}] if as_chat else text)


# ---------------------------------------------------------------------------------------------- rounds


def settings(folder: Path, count: int, **more: object) -> list[str]:
    found = {"output": folder / "rounds", "rounds.prompts": some(folder, count), "rounds.batch_size": 16} | more
    return [str(ROOT / "configs" / "rounds.yaml"), *(f"{key}={value}" for key, value in found.items())]


def table_of(folder: Path) -> list[dict]:
    return json.loads((folder / "rounds" / "rounds.json").read_text())["table"]


def files(folder: Path) -> dict[str, bytes]:
    """What rounds leave and what does not tell the time."""
    kept = ("pairs.jsonl", "answers.jsonl", "record.json", "rounds.json", "model.safetensors")
    held = {path for path in folder.rglob("*") if path.name in kept or path.parent.name == "held-out"}
    held = {path for path in held if "checkpoints" not in path.parts}
    return {str(path.relative_to(folder)): path.read_bytes() for path in held if path.is_file()}


def number_of_files(folder: Path) -> int:
    """By which it is seen how far rounds have come; a folder may be removed while it is looked at."""
    return sum(len(inner) + len(names) for _, inner, names in os.walk(folder / "rounds"))


def two_rounds(folder: Path) -> tuple[Path, list[str]]:
    """A small model, and the words that make two rounds of it, each held to the first model."""
    model = make(folder / "tiny")
    prompts = write(folder / "p.jsonl", *({"prompt": f"{n} and?", "good": "[a-m]"} for n in range(8)))
    words = [str(ROOT / "configs" / "rounds.yaml"), f"model.path={model}", f"rounds.prompts={prompts}"]
    words += ["rounds.max_new_tokens=3", "rounds.held_out=null", "rounds.number=2", "output=rounds", "batch.pairs=1"]
    words += ["log.tensorboard=false", "rounds.reference=first", "rounds.temperature=2.0", "steps=2", "epochs=null"]
    return model, words


@pytest.mark.nightly
@pytest.mark.parametrize("reference", ["first", "start"])
def test_rounds_of_an_adapter_are_the_commands_in_turn(tmp_path, monkeypatch, reference):
    """The second round answers with the first one's adapter, goes on from it, and is held to the base or to it."""
    monkeypatch.chdir(tmp_path)
    model, words = two_rounds(tmp_path)
    adapter = ["adapter.rank=2", "optimizer.learning_rate=0.01", "adapter.lr_ratio=4", "log.report=false"]
    assert rounds.main([*words, *adapter, f"rounds.reference={reference}"]) == 0
    last = tmp_path / "rounds" / "round-1" / "adapter"
    again = [str(model), "--adapter", str(last), "--prompts", str(tmp_path / "p.jsonl"), "--judge", "rule"]
    again += ["--max-new-tokens", "3", "--temperature", "2.0", "--seed", "1", "--batch-size", "64", "--output", "again"]
    assert collect.main(again) == 0
    second = tmp_path / "rounds" / "round-2"
    pairs = (tmp_path / "again" / "pairs.jsonl").read_bytes()
    assert (second / "collected" / "pairs.jsonl").read_bytes() == pairs
    kept = [word for word in words[1:] if not word.startswith(("rounds.", "output=", "model.path="))]
    config = yaml.safe_load((ROOT / "configs" / "rounds.yaml").read_text())
    own = {key: value for key, value in config.items() if key not in ("rounds", "output", "model")}
    (tmp_path / "by_hand.yaml").write_text(yaml.safe_dump(own))
    by_hand = ["by_hand.yaml", *kept, f"model.path={model}", f"adapter.path={last}", *adapter[1:], "output=by_hand"]
    by_hand += ["data.train=again/pairs.jsonl", f"reference.adapter={'base' if reference == 'first' else 'start'}"]
    assert train.main(by_hand) == 0
    weights = Path("adapter") / "adapter_model.safetensors"
    assert (second / weights).read_bytes() == (tmp_path / "by_hand" / weights).read_bytes()
    assert (second / weights).read_bytes() != (last / "adapter_model.safetensors").read_bytes()


def test_rounds_go_on_from_each_other_and_finished_ones_are_not_done_again(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, words = two_rounds(tmp_path)
    assert rounds.main(words) == 0
    first = files(tmp_path / "rounds")
    assert {"round-1/collected/pairs.jsonl", "round-2/model/model.safetensors"} <= set(first)
    facts = json.loads((tmp_path / "rounds" / "round-2" / "run.json").read_text())["settings"]
    assert facts["model"]["path"] == "rounds/round-1/model" and facts["reference"]["path"] == str(model)
    capsys.readouterr()
    assert rounds.main(words) == 0
    assert "answers" not in capsys.readouterr().out.replace("answers tie", "")
    assert files(tmp_path / "rounds") == first
    assert rounds.main([*words, "rounds.answers=5"]) == 2
    assert "holds rounds of other settings (rounds.answers: 4 -> 5)" in capsys.readouterr().err


@pytest.mark.nightly
def test_three_rounds_teach_the_undecided_model_without_its_pairs(tmp_path):
    done = subprocess.run([sys.executable, "-m", "dpo_jax.rounds", *settings(tmp_path, 702)], cwd=ROOT)
    assert done.returncode == 0
    scores = [row["score"] for row in table_of(tmp_path)]
    assert scores[0] < 0.5 and scores[-1] >= 0.9


@pytest.mark.nightly
def test_rounds_that_are_killed_at_random_moments_end_with_the_same_bytes(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    more = {"rounds.number": 2, "rounds.held_out": some(tmp_path, 8), "batch.pairs": 8}
    command = [sys.executable, "-m", "dpo_jax.rounds"]
    assert subprocess.run([*command, *settings(whole, 48, **more)], cwd=ROOT).returncode == 0
    words, kills = [*command, *settings(killed, 48, **more)], 0
    for moment in sorted(random.Random(0).sample(range(2, number_of_files(whole)), 8)):
        process = subprocess.Popen(words, cwd=ROOT, start_new_session=True)
        while process.poll() is None and number_of_files(killed) < moment:
            time.sleep(0.01)
        kills += process.poll() is None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert kills > 3
    assert subprocess.run(words, cwd=ROOT).returncode == 0
    before, found = files(whole / "rounds"), files(killed / "rounds")
    told = ("rounds.json", "record.json")  # these have the paths of models in them, which differ
    differ = [name for name in before if before[name] != found.get(name) and not name.endswith(told)]
    assert not differ and before.keys() == found.keys()
    assert table_of(whole) == table_of(killed)
