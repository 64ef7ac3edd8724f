"""A run that is killed before a file operation, or whose disk is full from one on, ends with the same bits."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.support.tiny_rows import write, yes_or_no
from tests.support.worlds import write_model


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("cc") is None, reason="the library that counts file operations wants a C compiler")
def test_killed_and_full_runs_end_with_the_same_bits(tmp_path):
    """At a few of the operations of each kind of file: data, metrics, checkpoints, the export."""
    write_model(tmp_path / "model", "llama", num_hidden_layers=2)
    rows = write(tmp_path / "train.jsonl", *yes_or_no(8))
    run = tmp_path / "run.yaml"
    run.write_text(
        f"model: {{path: {tmp_path / 'model'}}}\ndata: {{train: {rows}}}\nbatch: {{pairs: 4, micro_tokens: 256}}\n"
        "steps: 3\ncheckpoint: {every: 1}\noptimizer: {learning_rate: 1.0e-3}\n"
    )
    command = [
        sys.executable,
        str(ROOT / "tools" / "file_faults.py"),
        str(run),
        "--kill",
        "1-200:40",
        "--full",
        "5-205:50",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--work", str(tmp_path / "work")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 of 10 cases as they must be" in done.stdout
