"""What the machine refuses to do with a file is one line that names it, whatever the file is for, and costs nothing."""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_jax import train
from tests.support.tiers import by_day
from tests.support.tiny_rows import write, yes_or_no
from tests.support.worlds import write_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("paths")
    write_model(root / "model", "llama", num_hidden_layers=2)
    write(root / "train.jsonl", *yes_or_no(8))
    return root


class Capabilities(ctypes.Structure):
    """As capset(2) takes them, of version 3: effective, permitted and inheritable, each in two halves."""

    _fields_ = [
        (f"{name}{half}", ctypes.c_uint32) for half in (0, 1) for name in ("effective", "permitted", "inherits")
    ]


@contextlib.contextmanager
def bound_by_permissions():
    """Root, too, may open only what the mode of a file allows: this thread is without CAP_DAC_OVERRIDE and
    CAP_DAC_READ_SEARCH."""
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)
    known = Capabilities()
    assert libc.capget(header, ctypes.byref(known)) == 0
    before = known.effective0
    known.effective0 = before & ~0b110
    assert libc.capset(header, ctypes.byref(known)) == 0
    try:
        yield
    finally:
        known.effective0 = before
        libc.capset(header, ctypes.byref(known))


def below_a_file(root):
    (root / "file").write_text("mine")
    return root / "file" / "run"


def dangling(root):
    (root / "link").symlink_to(root / "gone" / "far")
    return root / "link"


def loop(root):
    (root / "loop").symlink_to(root / "loop")
    return root / "loop"


def shut(root):
    (root / "shut").mkdir(mode=0)
    return root / "shut" / "run"


def read_only(root):
    (root / "still").mkdir(mode=0o555)
    return root / "still" / "run"


def taken(name):
    def make(root):
        (root / "run" / name).mkdir(parents=True)
        (root / "run" / "run.json").write_text("{}") if name != "run.json" else None
        return root / "run"

    return make


def as_file(name):
    def make(root):
        (root / "run").mkdir()
        (root / "run" / name).write_text("mine")
        return root / "run"

    return make


OUTPUTS = {
    "below a file": (below_a_file, "file"),
    "too long": (lambda root: root / ("x" * 300), "File name too long"),
    "dangling": (dangling, "link"),
    "a loop": (loop, "loop"),
    "in a shut folder": (shut, "shut"),
    "in a read-only folder": (read_only, "still"),
    "below /proc": (lambda root: Path("/proc/none/run"), "/proc/none"),
    "metrics.jsonl is a folder": (taken("metrics.jsonl"), "metrics.jsonl"),
    "run.json is a folder": (taken("run.json"), "run.json"),
    "data.json is a folder": (taken("data.json"), "data.json"),
    "checkpoints is a file": (as_file("checkpoints"), "checkpoints"),
    "cache is a file": (as_file("cache"), "cache"),
    ".lock is a folder": (taken(".lock"), ".lock"),
}


def refused(argv, capsys):
    capsys.readouterr()
    with bound_by_permissions():
        assert train.main([str(word) for word in argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def arguments(world, **more):
    given = {"model.path": world / "model", "data.train": world / "train.jsonl", "batch.pairs": 4, "steps": 1} | more
    return [f"{key}={value}" for key, value in given.items()]


@pytest.mark.parametrize("kind", OUTPUTS)
def test_an_output_that_cannot_be_is_one_line(world, tmp_path, capsys, kind):
    make, named = OUTPUTS[kind]
    line = refused(arguments(world, output=make(tmp_path)), capsys)
    assert line.startswith("error: ") and named in line, line


def unreadable(root):
    (root / "shut.jsonl").write_text("{}")
    (root / "shut.jsonl").chmod(0)
    return root / "shut.jsonl"


def folder(root):
    (root / "folder").mkdir()
    return root / "folder"


INPUTS = {
    "data.train": {"unreadable": unreadable, "a folder": folder, "dangling": dangling, "a loop": loop},
    "data.cache": {"below a file": below_a_file, "in a read-only folder": read_only},
    "evaluation.answers": {"unreadable": unreadable, "a folder": folder},
    "data.template": {"unreadable": unreadable, "a folder": folder},
}


@pytest.mark.parametrize(("key", "kind"), [(key, kind) for key, kinds in INPUTS.items() for kind in kinds])
def test_an_input_that_cannot_be_read_is_one_line(world, tmp_path, capsys, key, kind):
    path = INPUTS[key][kind](tmp_path)
    line = refused(arguments(world, output=tmp_path / "run", **{key: path}), capsys)
    assert line.startswith("error: ") and str(path) in line, line


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "README.md", "LICENSE", "."])
def test_a_model_file_that_cannot_be_read_is_one_line_before_anything_is_trained(world, tmp_path, capsys, name):
    copy = shutil.copytree(world / "model", tmp_path / "model")
    for extra in ("README.md", "LICENSE"):
        (copy / extra).write_text("words")
    (copy / name).chmod(0)
    line = refused(arguments(world, **{"output": tmp_path / "run", "model.path": copy}), capsys)
    (copy / name).chmod(0o755)
    assert line.startswith("error: ") and str(copy) in line, line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


STREAMS = {
    "stdout closed": ">&-",
    "stderr closed": "2>&-",
    "stdin closed": "<&-",
    "all closed": "<&- >&- 2>&-",
    "stdout full": ">/dev/full",
    "stderr full": "2>/dev/full",
    "nobody reads": "| true",
    "both in a closed pipe": "2>&1 | true",
}
WANTED = {"stdout full": {2}, "nobody reads": {0, 141}, "both in a closed pipe": {0, 141}}
"""Exit codes, where they are not 0."""


@pytest.mark.parametrize("kind", by_day(list(STREAMS), ["stdout full"]))
def test_closed_and_full_streams_spoil_no_model(world, tmp_path, kind):
    """The model is whole, or the command says in one line why it is not."""
    words = " ".join(arguments(world, output=tmp_path / "run", **{"checkpoint.every": 1, "log.tensorboard": "false"}))
    script = f'set -o pipefail; "{sys.executable}" -m dpo_jax.train {words} {STREAMS[kind]}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode in WANTED.get(kind, {0}), (done.returncode, done.stderr)
    assert "Traceback" not in done.stdout + done.stderr and len(done.stderr.splitlines()) <= 1
    assert done.returncode != 0 or (tmp_path / "run" / "model" / "SHA256SUMS").exists()
