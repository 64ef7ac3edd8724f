"""What the README and the pages of configs/ show is what the code says."""

import inspect
import pkgutil
import re

import numpy as np
import pytest

import dpo_jax
from dpo_jax.config import rounds
from dpo_jax.config import run as config
from dpo_jax.config.console import COMMANDS
from dpo_jax.config.run import FIELDS
from dpo_jax.errors import UserError
from dpo_jax.hf.configs import WRAPPERS
from dpo_jax.hf.families import FAMILIES
from dpo_jax.objectives.table import OBJECTIVES, RECIPES
from dpo_jax.reporting.metrics import METRICS
from tests.conftest import ROOT
from tests.test_floors import FLOORS
from tools import bench_table, pages
from tools.benching import records

README, GUIDE = (ROOT / "README.md").read_text(), (ROOT / "configs/GUIDE.md").read_text()


@pytest.mark.parametrize("page", pages.pages())
def test_a_page_is_what_the_code_says(page):
    assert pages.pages()[page] == (ROOT / page).read_text(), "run python tools/pages.py"


def test_pages_have_every_setting_metric_and_objective():
    settings, metrics = (pages.pages()[f"configs/{name}.md"] for name in ("README", "METRICS"))
    wanted = [*sorted(FIELDS, key=lambda key: "." in key), *rounds.FIELDS]
    assert re.findall(r"^\| `([\w.]+)` \|", settings, re.MULTILINE) == wanted
    assert re.findall(r"^\| `([^`]+)` \|", metrics, re.MULTILINE) == list(METRICS)
    rows = pages.objectives().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [*OBJECTIVES, *RECIPES]


def test_every_metric_has_a_unit():
    assert all(found.means and found.unit for found in METRICS.values())
    nats = [name for name, found in METRICS.items() if found.unit == "nats"]
    assert {"rewards/margins", "logps/chosen", "drift/rejected"} <= set(nats)
    # the unit stands in its own column, once
    assert not [name for name, found in METRICS.items() if "in nats" in found.means]


@pytest.mark.parametrize("text", ["a|b", "layers/.* (0 to 3) or .*", "<think>, <b>"])
def test_no_character_of_a_cell_is_markup(text):
    (row,) = pages.table(("head",), (pages.cell(text),)).splitlines()[2:]
    unescaped = re.sub(r"\\([|*])", "", row[2:-2])
    assert not set("|*<") & set(unescaped.replace("&lt;", ""))
    assert re.sub(r"\\([|*])", r"\1", row[2:-2]).replace("&lt;", "<") == text


def test_a_page_without_a_place_for_a_table_is_refused():
    with pytest.raises(UserError, match="has no lines <!-- objectives -->"):
        pages.replaced("README.md", "nothing", {"objectives": "x"})


@pytest.mark.parametrize("page", bench_table.PAGES)
def test_the_tables_of_timings_are_those_of_the_records(page):
    text = (ROOT / page).read_text()
    assert bench_table.updated(page, text, records.read()) == text, "run python tools/bench_table.py"


def test_every_family_is_named_and_no_other():
    models = GUIDE.partition("\n## Models")[2].partition("\n## ")[0]
    table = "\n".join(line for line in models.splitlines() if line.startswith("| "))
    assert set(re.findall(r"`(\w+)`", table)) - {"model_type"} == {*FAMILIES, *WRAPPERS}
    assert f"[{len(FAMILIES) + len(WRAPPERS)} types]" in README
    assert f"and {len({*OBJECTIVES, *RECIPES}) - 1} other objectives" in README


def test_the_worked_example_of_a_tutorial(capsys):
    """Policy 0.7 and 0.3, reference 0.3 and 0.7: log(7/3) - log(3/7) = 1.6946 nats; a tutorial's 1.20 mixes bases."""
    (block,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "1.6946" in code)
    exec(compile(block, "README.md", "exec"), {})
    first, _ = capsys.readouterr().out.splitlines()
    losses, margins = (float(number) for number in re.findall(r"\[([\d.]+)\]", first))
    assert margins == pytest.approx(np.log(7 / 3) - np.log(3 / 7), abs=1e-6) == pytest.approx(1.6946, abs=5e-5)
    assert losses == pytest.approx(np.log1p(np.exp(-margins)), abs=1e-6)
    assert f"losses {losses:.4f}, margins {margins:.4f}" in block


def test_a_run_of_ones_own_is_ten_lines_that_are_right(tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(block)
    assert len(block.splitlines()) == 10
    assert config.load([str(tmp_path / "mine.yaml")]).output == "runs/mine"


def test_what_a_reader_from_trl_is_told_are_settings():
    """Every setting that the README names with its section is one."""
    named = set(
        re.findall(
            r"`((?:model|data|batch|objective|adapter|reference|optimizer|mesh|evaluation|checkpoint|log|export)\.\w+)",
            README,
        )
    )
    assert {"batch.pairs", "reference.update_every", "export.push"} <= named
    assert named - set(FIELDS) == set()


def test_every_command_is_in_the_table():
    rows = re.findall(
        r"^\| `(\w+)[ `]", README.partition("<!-- commands -->")[2].partition("<!-- /commands -->")[0], re.MULTILINE
    )
    assert set(rows) == COMMANDS.keys()


def anchors(text: str) -> set[str]:
    """Of the headings of a page, as they are made for links."""
    heads = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize(
    "page", ["README.md", "configs/GUIDE.md", "configs/README.md", "configs/METRICS.md", "dpo_jax/README.md"]
)
def test_a_page_is_narrow_and_its_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")] == []
    for link in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 220


def test_every_folder_has_a_place_in_the_readmes_tree():
    tree = README.partition("## The tree")[2].split("```")[1]
    folders = {path.parent.name for path in (ROOT / "dpo_jax").glob("*/*.py")}
    assert folders == set(re.findall(r"\b(\w+)/", tree)) & folders
    assert {name for floor in FLOORS for name in floor} - COMMANDS.keys() <= set(re.findall(r"\w+", tree))


def test_every_module_has_a_place_in_the_packages_page_and_no_other_is_named():
    tree = (ROOT / "dpo_jax/README.md").read_text().split("```")[1]
    named = set(re.findall(r"\b\w+\.py\b", tree))
    modules = {path.name for path in (ROOT / "dpo_jax").rglob("*.py") if "backends" not in path.parts}
    assert named == modules - {"__init__.py"}


@pytest.mark.parametrize("public", dpo_jax.__all__)
def test_a_name_with_dots_in_a_public_docstring_exists(public):
    ours = {module.name for module in pkgutil.iter_modules(dpo_jax.__path__)}
    text = inspect.getdoc(getattr(dpo_jax, public)) or ""
    for name in re.findall(r"`([a-z_]+(?:\.\w+)+)", text):
        first, _, rest = name.partition(".")
        assert first not in ours, f"{name}: begin with dpo_jax."
        if first == "dpo_jax" and rest != "json":
            assert pkgutil.resolve_name(name) is not None
