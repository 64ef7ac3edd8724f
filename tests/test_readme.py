"""What the README shows is what the code says."""

import re

import numpy as np
import pytest

from dpo_jax.hf.configs import WRAPPERS
from dpo_jax.hf.families import FAMILIES
from dpo_jax.reporting.metrics import METRICS
from tests.conftest import ROOT
from tools import bench_table
from tools.benching import records
from tools.readme_tables import TABLES, updated

README = (ROOT / "README.md").read_text()


def test_the_tables_of_objectives_and_commands_are_the_codes():
    assert all(README.count(f"<!-- {name} -->\n|") == 1 for name in TABLES)
    assert updated(README) == README, "run python tools/readme_tables.py"


@pytest.mark.parametrize("page", bench_table.PAGES)
def test_the_tables_of_timings_are_those_of_the_records(page):
    text = (ROOT / page).read_text()
    assert bench_table.updated(page, text, records.read()) == text, "run python tools/bench_table.py"


def test_every_family_is_named_and_no_other():
    models = README.partition("## Point it at a model")[2].partition("\n## ")[0]
    table = "\n".join(line for line in models.splitlines() if line.startswith("| "))
    assert set(re.findall(r"`(\w+)`", table)) - {"model_type"} == {*FAMILIES, *WRAPPERS}


def test_the_worked_example_of_a_tutorial(capsys):
    """Policy 0.7 and 0.3, reference 0.3 and 0.7: log(7/3) - log(3/7) = 1.6946 nats; a tutorial's 1.20 mixes bases."""
    (block,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "1.6946" in code)
    exec(compile(block, "README.md", "exec"), {})
    first, _ = capsys.readouterr().out.splitlines()
    losses, margins = (float(number) for number in re.findall(r"\[([\d.]+)\]", first))
    assert margins == pytest.approx(np.log(7 / 3) - np.log(3 / 7), abs=1e-6) == pytest.approx(1.6946, abs=5e-5)
    assert losses == pytest.approx(np.log1p(np.exp(-margins)), abs=1e-6)
    assert f"losses {losses:.4f}, margins {margins:.4f}" in block


def test_every_metric_is_explained():
    missing = [name for name, text in METRICS.items() if f"| `{name}` | {text} |" not in README]
    assert missing == []


def test_every_module_has_a_place_in_the_tree_and_no_other_is_named():
    tree = README.partition("## The tree")[2].split("```")[1]
    named = set(re.findall(r"\b\w+\.py\b", tree.partition("configs/")[0]))
    modules = {path.name for path in (ROOT / "dpo_jax").rglob("*.py") if "backends" not in path.parts}
    assert named == modules - {"__init__.py"}
