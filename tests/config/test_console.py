"""One command for all: what it lists, starts and completes, and what its help costs."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dpo_jax
from dpo_jax import __main__ as console
from dpo_jax.config.console import COMMANDS, program
from tests.conftest import ROOT

LIGHT = {"sample", "convert", "doctor", "plan", "report"}
"""Commands whose arguments are no settings, so that they do not even need pydantic to say what they take."""
HEAVY = {
    *("jax", "jaxlib", "flax", "optax", "orbax", "numpy", "scipy", "pandas", "pyarrow", "matplotlib", "rich", "jinja2"),
    *("transformers", "tokenizers", "safetensors", "huggingface_hub", "datasets", "tensorboardX", "torch", "psutil"),
}
"""What takes long to import and no help needs: a list of modules, as a clock says another thing on every machine."""


def test_the_table_has_every_command_and_no_other():
    """A command is a module of the package that can be run and has a function `main`."""
    found = set()
    for file in (ROOT / "dpo_jax").glob("*.py"):
        tree = ast.parse(file.read_text())
        runs = any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)
        if runs and any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found.add(file.stem)
    assert found - {"__main__"} == COMMANDS.keys()


def test_every_help_is_the_commands_own_and_imports_nothing_heavy():
    """One process, the lightest first: whatever one imports is still there when the next is asked."""
    order = sorted(COMMANDS, key=lambda name: name not in LIGHT)
    code = f"""
import contextlib, io, sys
from dpo_jax import __main__ as console
seen = set()
def ask(*argv):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        console.main(argv)
    heavy = {HEAVY!r} | ({{"pydantic", "yaml"}} if argv[0] in {LIGHT | {"--help"}!r} else set())
    assert not heavy & sys.modules.keys(), (argv, heavy & sys.modules.keys())
    return out.getvalue()
top = ask("--help")
for name, (_, says) in console.COMMANDS.items():
    assert f"  {{name}} " in top and says in top, name
for name in {order!r}:
    text = ask(name, "--help")
    assert text.startswith(f"usage: dpo-jax {{name}} "), text[:80]
    words = " ".join(text.split())
    assert name == "convert" or console.COMMANDS[name].says in words, name
    assert text not in seen
    seen.add(text)
"""
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.argv[0] = 'dpo-jax'\n{code}"], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_importing_the_package_imports_nothing_else():
    code = "import sys; before = set(sys.modules); import dpo_jax; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {name.split(".")[0] for name in done.stdout.split()} <= {"dpo_jax", "importlib", "warnings"}


@pytest.mark.parametrize(
    ("started", "command", "said"),
    [
        ("/usr/local/bin/dpo-jax", "train", "dpo-jax train"),
        ("dpo-jax.exe", "", "dpo-jax"),
        ("/site-packages/dpo_jax/__main__.py", "train", "python -m dpo_jax train"),
        ("/site-packages/dpo_jax/__main__.py", "", "python -m dpo_jax"),
        ("/site-packages/dpo_jax/train.py", "train", "python -m dpo_jax.train"),
        ("/home/me/__main__.py", "train", "python -m dpo_jax.train"),
    ],
)
def test_usage_says_what_was_typed(monkeypatch, started, command, said):
    monkeypatch.setattr(sys, "argv", [started])
    assert program(command) == said


def test_what_is_no_command_is_one_line(capsys):
    assert console.main(["trian", "x.yaml"]) == 2
    assert capsys.readouterr().err == "error: command line: trian: no such command; did you mean train?\n"
    assert console.main(["\x1b[2J" + "x" * 200]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "\\x1b[2J" in line and "--help lists them" in line and len(line) < 200
    assert console.main(["--verison"]) == 2
    assert capsys.readouterr().err.startswith("error: command line: unrecognized arguments: --verison; see ")


def test_nothing_asked_is_answered_with_the_list(capsys):
    assert console.main([]) == 2
    said = capsys.readouterr().out
    assert [name for name in COMMANDS if f"\n  {name} " not in said] == []


def test_the_version_names_what_the_numbers_depend_on(capsys):
    with pytest.raises(SystemExit) as ended:
        console.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"dpo_jax {dpo_jax.__version__} (Python 3.")


def test_a_commands_exit_code_and_errors_are_its_own(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert console.main(["train", "none.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: none.yaml: No such file or directory; ")


# ---------------------------------------------------------------------------------------------- completion


def completed(folder: Path, line: str) -> list[str]:
    """What a shell would be told of the line, by argcomplete's own protocol."""
    answer = folder / "answer"
    answer.write_text("")
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    done = subprocess.run(
        [sys.executable, "-m", "dpo_jax"], env={**os.environ, "PYTHONPATH": str(ROOT), **asked}, cwd=folder, check=False
    )
    assert done.returncode == 0
    return [word.rstrip() for word in answer.read_text().split("\n")]


def test_what_a_shell_completes(tmp_path):
    pytest.importorskip("argcomplete")
    (tmp_path / "my runs").mkdir()
    for name in ("run.yaml", "run.txt"):
        (tmp_path / name).write_text("")
    assert completed(tmp_path, "dpo-jax ") == [*COMMANDS]
    assert completed(tmp_path, "dpo-jax --v") == ["--version"]
    assert completed(tmp_path, "dpo-jax convert export --dtype b") == ["bfloat16"]
    assert completed(tmp_path, "dpo-jax plan run.yaml --chip h") == ["h100", "h200"]
    assert completed(tmp_path, "dpo-jax plan run.yaml mesh.f") == ["mesh.fsdp="]
    assert completed(tmp_path, "dpo-jax train ru") == ["run.yaml"]
    assert completed(tmp_path, "dpo-jax train objective.name=or") == ["objective.name=orpo"]
    assert completed(tmp_path, "dpo-jax train data.shuffle=") == ["data.shuffle=true", "data.shuffle=false"]
    assert completed(tmp_path, "dpo-jax sweep --m") == ["--metric"]


def test_a_real_bash_completes_a_value_after_its_equals_sign(tmp_path):
    pytest.importorskip("argcomplete")
    stub = tmp_path / "dpo-jax"
    stub.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dpo_jax "$@"\n')
    stub.chmod(0o755)
    script = """
eval "$(dpo-jax --completion bash)"
COMP_LINE='dpo-jax train optimizer.schedule=c' COMP_POINT=34 COMP_TYPE=9 COMP_CWORD=3
_python_argcomplete dpo-jax
printf '%s\\n' "${COMPREPLY[@]}"
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=True)
    # `=` ends a word of readline's, which therefore has what stands before it
    assert done.stdout.split() == ["constant", "cosine"]


def test_completion_without_its_library_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    assert console.main(["--completion", "bash"]) == 2
    assert "pip install argcomplete" in capsys.readouterr().err
