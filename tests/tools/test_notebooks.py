"""The notebooks of configs/ are whole, show what they did, and run."""

import ast
import json
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tools import notebooks

PATHS = sorted(notebooks.FOLDER.glob("*.ipynb"))
RUNNER = """
import io, json, sys

class Screen(io.StringIO):  # a notebook's output is no file, either
    def isatty(self): return False

names, shown = {"__name__": "__main__"}, sys.stdout
sys.stdout = Screen()
for cell in json.load(open(sys.argv[1]))["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), sys.argv[1], "exec"), names)
sys.stdout = shown
print(json.dumps([names["result"].before, names["result"].after]))
"""


def cells(path):
    return notebooks.read(path)["cells"]


def code(path):
    return [cell for cell in cells(path) if cell["cell_type"] == "code"]


def test_there_are_three():
    assert [path.stem for path in PATHS] == ["first_dpo", "from_pytorch_and_back", "your_own_objective"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_is_as_the_tool_writes_it(path):
    notebook = notebooks.read(path)
    assert (notebook["nbformat"], cells(path)[0]["cell_type"]) == (4, "markdown")
    assert path.read_text() == notebooks.written(notebook)
    assert path.stat().st_size < 300_000


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_cell_was_run_in_order_without_an_error(path):
    assert [cell["execution_count"] for cell in code(path)] == list(range(1, len(code(path)) + 1))
    for cell in code(path):
        ends = ast.parse("".join(cell["source"])).body[-1]
        kinds = [output["output_type"] for output in cell["outputs"]]
        assert "error" not in kinds
        assert not isinstance(ends, ast.Expr) or "execute_result" in kinds


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_nothing_of_a_machine_is_shown(path):
    text = json.dumps([output for cell in code(path) for output in cell["outputs"] if "image/png" not in str(output)])
    assert not re.search(r"(?<![\w.])/(root|home|tmp|work|Users|usr|opt|var)/|[A-Z]:\\\\|stderr", text)


@pytest.mark.nightly
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_its_model_gets_better(path, tmp_path):
    if path.stem == "from_pytorch_and_back":
        pytest.importorskip("torch")
    folder = tmp_path / "configs" / "notebooks"
    shutil.copytree(ROOT / "configs" / "quickstart", folder.parent / "quickstart")
    folder.mkdir()
    ran = subprocess.run(
        [sys.executable, "-c", RUNNER, str(path)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    before, after = json.loads(ran.stdout.splitlines()[-1])
    assert after["eval_rewards/margins"] > before["eval_rewards/margins"] + 0.01
    assert after["eval_loss"] < before["eval_loss"]
