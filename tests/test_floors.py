"""Imports point down. The floors of the design, read from the source with ast."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "dpo_jax"

# Floor by floor, each folder or loose module. A module imports lower floors and its own folder.
FLOORS = (
    ("errors", "files", "intervals", "limits", "settings", "stores", "trees"),
    ("objectives", "logprobs", "processes"),
    ("model", "data", "sharding"),
    ("hf", "preference"),
    ("training", "evaluation", "reporting", "planning"),
    ("config",),
    ("page",),
    ("run",),
    ("train", "evaluate", "sample", "convert", "preview", "doctor", "plan", "winrate", "sweep", "report", "recipes"),
    ("collect", "rounds", "python"),
    ("__main__",),
)
BASE = FLOORS[0]
ARRAYS = {f"objectives.{name}" for name in ("pairwise", "stepwise", "metrics", "mixture")} | {
    f"logprobs.{name}" for name in ("tokens", "fused")
}
HELP = {
    "errors",
    "files",
    "settings",
    "objectives.table",
    "objectives.terms",
    "config.run",
    "__main__",
    "config.command",
    "config.completion",
    "config.console",
    "config.rounds",
    "config.elsewhere",
    "config.keywords",
}
NUMERIC = {"jax", "jaxtyping", "numpy"}
FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch", "tensorflow"}
COMPARES = {"hf.verify"}
"""What holds our numbers against PyTorch's may import torch, when it is asked to."""


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


def place(module: str) -> tuple[int, str]:
    """Floor and folder of a module such as `model.rope`; the loose modules of floor 0 know each other."""
    folder = module.split(".")[0]
    for floor, folders in enumerate(FLOORS):
        if folder in folders:
            return floor, "base" if folder in BASE else folder
    raise AssertionError(f"dpo_jax/{module.replace('.', '/')}.py is on no floor; claim it in FLOORS")


def imports(tree: ast.AST, nodes: Iterator[ast.AST] | None = None) -> Iterator[str]:
    """Full names of what is imported anywhere in a tree; `from a import b` gives `a.b`."""
    for node in nodes or ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import_time(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: all but the bodies of functions."""
    for child in ast.iter_child_nodes(tree):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from at_import_time(child)


def faults(module: str, source: str) -> list[str]:
    """What a module's source does that the design forbids."""
    tree = ast.parse(source)
    found = [*upward(module, tree), *unsafe(tree, FORBIDDEN - {"torch"} if module in COMPARES else FORBIDDEN)]
    outside = {name.split(".")[0] for name in imports(tree)} - {"dpo_jax", *sys.stdlib_module_names}
    early = {name.split(".")[0] for name in imports(tree, at_import_time(tree))}
    if module in ARRAYS and outside - NUMERIC:
        found.append(f"imports {sorted(outside - NUMERIC)}; the core knows arrays only")
    if "torch" in early:
        found.append("imports torch before it is needed")
    if module.startswith("data.") and (outside & {"jax", "flax"} or "transformers" in early):
        found.append("data/ never imports jax or flax, and transformers only when it needs it")
    if module in HELP or module.endswith(".settings"):
        found += [f"imports {name}; --help must not" for name in outside & {"jax", "flax", "transformers", "numpy"}]
    return found


def upward(module: str, tree: ast.AST) -> Iterator[str]:
    floor, folder = place(module)
    for name in imports(tree):
        if name.startswith("dpo_jax.") and name != "dpo_jax.__version__":
            other_floor, other_folder = place(name.removeprefix("dpo_jax."))
            if not (other_floor < floor or other_folder == folder):
                yield f"imports {name} of floor {other_floor} ({other_folder}) from floor {floor} ({folder})"


def unsafe(tree: ast.AST, forbidden: set[str]) -> Iterator[str]:
    yield from (f"imports {name}" for name in imports(tree) if name.split(".")[0] in forbidden)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "extractall":
            yield "extractall"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in ("eval", "exec", "__import__", "os.system"):
            yield f"calls {called}"
        if called in ("yaml.load", "yaml.load_all") and "Safe" not in ast.unparse(node):
            yield "yaml.load without a safe loader"
        yield from (
            f"{option}=True"
            for option in ("shell", "allow_pickle", "trust_remote_code")
            if options.get(option) == "True"
        )


FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if file.name != "__init__.py"]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_module_imports_only_what_lies_below(file):
    assert faults(name_of(file), file.read_text()) == []


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("__init__.py")), ids=lambda file: file.parent.name)
def test_importing_a_folder_costs_nothing(file):
    tree = ast.parse(file.read_text())
    assert set(imports(tree)) <= {"importlib"}
    assert ast.get_docstring(tree)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("objectives.pairwise", "import dpo_jax.config.run"),
        ("objectives.pairwise", "import optax"),
        ("objectives.metrics", "def f():\n    import flax"),
        ("model.rope", "from dpo_jax.sharding import mesh"),
        ("model.rope", "from dpo_jax.data import records"),
        ("data.records", "from dpo_jax.trees import paths\nimport jax"),
        ("data.records", "import transformers"),
        ("data.records", "def f():\n    import jax.numpy as jnp"),
        ("training.step", "from dpo_jax.evaluation.generate import x"),
        ("objectives.mixture", "from dpo_jax.logprobs.fused import x"),
        ("training.step", "from dpo_jax.config.run import Run"),
        ("hf.tensors", "from dpo_jax.training import state"),
        ("train", "from dpo_jax.evaluate import main"),
        ("config.run", "import numpy"),
        ("hf.tensors", "import pickle"),
        ("hf.tensors", "from torch import load"),
        ("hf.tensors", "def f():\n    import torch"),
        ("hf.verify", "import torch"),
        ("hf.verify", "def f():\n    import pickle"),
        ("hf.tensors", "eval('1')"),
        ("hf.tensors", "yaml.load(text, Loader=yaml.Loader)"),
        ("hf.tensors", "subprocess.run('ls', shell=True)"),
        ("hf.tensors", "tarfile.open(path).extractall()"),
        ("hf.tensors", "np.load(path, allow_pickle=True)"),
    ],
)
def test_each_kind_of_fault_is_seen(module, source):
    assert faults(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("objectives.pairwise", "import jax.numpy as jnp\nfrom jaxtyping import Float\nimport math"),
        ("data.tokens", "def f():\n    from transformers import AutoTokenizer"),
        ("hf.tensors", "from dpo_jax.model.spec import DecoderSpec\nfrom dpo_jax.sharding import mesh"),
        ("hf.verify", "def f():\n    import torch"),
        ("train", "from dpo_jax.config.run import Run\nfrom dpo_jax.training.step import x"),
        ("config.run", "yaml.load(text, Loader=SafeLoader)"),
    ],
)
def test_what_is_allowed_passes(module, source):
    assert faults(module, source) == []


def test_a_module_that_nobody_placed_is_a_fault():
    with pytest.raises(AssertionError, match="claim it"):
        place("utils")
