"""`python -m dpo_jax.sweep` as it is called: runs that share caches, a table, and the same command again."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dpo_jax import sweep
from tests.support.tiny_rows import write, yes_or_no
from tests.support.worlds import write_model

pytestmark = pytest.mark.nightly


@pytest.fixture
def arguments(tmp_path):
    write_model(tmp_path / "model", "llama", "bfloat16", num_hidden_layers=2)
    rows = yes_or_no(24)
    write(tmp_path / "train.jsonl", *rows[:16])
    write(tmp_path / "eval.jsonl", *rows[16:])
    given = {
        "model.path": tmp_path / "model",
        "data.train": tmp_path / "train.jsonl",
        "data.eval": tmp_path / "eval.jsonl",
        "batch.pairs": 4,
        "steps": 4,
        "optimizer.warmup_steps": 0,
        "checkpoint.every": 2,
        "log.tensorboard": "false",
        "output": tmp_path / "swept",
    }
    return [f"{key}={value}" for key, value in given.items()]


def test_runs_share_their_caches_and_the_same_command_again_finds_them_done(arguments, tmp_path, capfd):
    words = [*arguments, "objective.beta=0.1,0.5", "optimizer.learning_rate=1e-3"]
    assert sweep.main(words) == 0
    first = capfd.readouterr().out
    folder = tmp_path / "swept"
    assert "sorted by eval_rewards/accuracies, the best first" in first
    assert "beta=0.5" in (folder / "report.html").read_text()
    for name in ("beta=0.1", "beta=0.5"):
        assert (folder / name / "model" / "model.safetensors").exists() and not (folder / name / "cache").exists()
    kept = sorted(path.name for path in (folder / "cache").iterdir())
    assert sum("reference" in name for name in kept) == 2, kept  # of training pairs and of held-out ones, by one run
    record = json.loads((folder / "sweep.json").read_text())
    assert record["axes"] == {"objective.beta": ["0.1", "0.5"]} and len(record["runs"]) == 2
    assert sweep.main(words) == 0
    assert capfd.readouterr().out.count("this run is finished already") == 2
    assert json.loads((folder / "sweep.json").read_text()) == record


def test_one_that_fails_is_said_and_the_others_are_trained_side_by_side(arguments, tmp_path, capfd):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("no json\n")
    words = [word for word in arguments if not word.startswith("data.train")]
    words += [f"data.train={tmp_path / 'train.jsonl'},{broken}", "--jobs", "2"]
    assert sweep.main(words) == 1
    said = capfd.readouterr().out
    assert "failed with exit code 2" in said
    logs = sorted((tmp_path / "swept").glob("*.log"))
    assert len(logs) == 2 and any("not JSON" in log.read_text() for log in logs)


def test_a_signal_stops_the_runs_which_the_same_command_goes_on_with(arguments, tmp_path):
    words = [word for word in arguments if not word.startswith("steps")]
    command = [sys.executable, "-m", "dpo_jax.sweep", *words, "steps=60", "objective.beta=0.1,0.5"]
    running = subprocess.Popen(command, env={**os.environ}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    first = tmp_path / "swept" / "beta=0.1"
    while not (first / "checkpoints" / "2").exists() and running.poll() is None:
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    said = running.communicate()[1].decode()
    assert running.returncode == 75, said
    assert not (first / "model").exists()
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    assert (first / "model").exists() and (tmp_path / "swept" / "beta=0.5" / "model").exists()
