"""What is installed with the package: what it imports, each with a reason, and nothing else."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

from tests.conftest import ROOT

TEXT = (ROOT / "pyproject.toml").read_text()
PROJECT = tomllib.loads(TEXT)["project"]


def plain(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def imported() -> set[str]:
    """Names of what the package imports from outside, wherever it stands, also by `importlib.import_module("name")`."""
    found = set()
    for file in (ROOT / "dpo_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                found |= {a.value.split(".")[0] for a in node.args if isinstance(a, ast.Constant)}
    return found - {"dpo_jax", *sys.stdlib_module_names}


def test_what_is_required_is_imported_and_what_is_imported_is_required_or_an_extra():
    homes = {name: {plain(home) for home in found} for name, found in packages_distributions().items()}
    required = {plain(requirement) for requirement in PROJECT["dependencies"]}
    extras = {plain(requirement) for extra in PROJECT["optional-dependencies"].values() for requirement in extra}
    used = {home for name in imported() for home in homes.get(name, {plain(name)})}
    assert required - used == set()
    # jaxlib is jax's own half; optional packages are looked for where they are used
    assert used - required - extras - {"jaxlib"} == set()


def test_every_dependency_says_why_it_is_there():
    block = TEXT.partition("dependencies = [\n")[2].partition("\n]\n")[0].splitlines()
    assert len(block) == len(PROJECT["dependencies"])
    assert [line for line in block if not re.fullmatch(r'  "[^"]+",  # \S.{4,}', line)] == []


def test_training_begins_without_the_packages_that_few_runs_need():
    """SciPy alone takes a second; a run that judges nothing, or draws its page at its end, does not wait for it."""
    late = "{'scipy', 'matplotlib', 'jinja2', 'transformers', 'datasets', 'pyarrow', 'pandas', 'torch'}"
    code = f"import sys, dpo_jax.train, dpo_jax.run.prepare; sys.exit(str({late} & sys.modules.keys() or '') or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
