"""`train` on hundreds of hostile folders: one line each, within 30 seconds and 2 GB; see hostile_sweep.py."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.support.hostile_sweep import cases


@pytest.mark.nightly
@pytest.mark.parametrize(("part", "least"), [("pads more", 2), ("", 500)])
def test_a_hostile_folder_is_one_line_soon_and_in_little_memory(part, least, tmp_path):
    argv = [sys.executable, "-m", "tests.support.hostile_sweep", str(tmp_path / "w"), part]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, timeout=3600)
    found = [json.loads(line) for line in done.stdout.splitlines()[:-1]]
    assert len(found) == sum(part in name for name in cases()) >= least, done.stderr[-2000:]
    assert [one for one in found if one["fault"]] == []
