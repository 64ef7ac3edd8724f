"""The command: `export`, `check` and `push`, their exit codes, and one line for what cannot be done."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dpo_jax import convert
from dpo_jax.hf import push, tensors, verify
from dpo_jax.hf.tensors import Tensors
from tests.conftest import ROOT
from tests.support.tiny_folders import write_folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert") / "m"
    return write_folder(folder, dtype="float16", num_hidden_layers=2, architectures=["LlamaForCausalLM"])


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=ROOT, env=dict(os.environ))


def bits(folder: Path, dtype: np.dtype | None = None) -> dict[str, tuple]:
    """Every tensor of a folder, rounded to `dtype`."""
    opened = Tensors(folder)
    arrays = {name: opened.read(name) for name in opened.infos}
    if dtype is not None:
        arrays = {name: array.astype(np.float32).astype(dtype) for name, array in arrays.items()}
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()}


def test_an_export_is_the_same_unless_told_otherwise(source, tmp_path, capsys):
    assert convert.main(["export", str(source), str(tmp_path / "same")]) == 0
    assert capsys.readouterr().out == f"wrote and verified {tmp_path / 'same'}\n"
    assert (tmp_path / "same/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    changes = ["--dtype", "bfloat16", "--max-shard-gb", "3e-5"]
    assert convert.main(["export", str(source), str(tmp_path / "narrow"), *changes]) == 0
    assert bits(tmp_path / "narrow") == bits(source, tensors.DTYPES["BF16"])
    config = json.loads((tmp_path / "narrow/config.json").read_text())
    assert config == {**json.loads((source / "config.json").read_text()), "dtype": "bfloat16"}
    assert len(list((tmp_path / "narrow").glob("*.safetensors"))) > 1
    for line in (tmp_path / "narrow/SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((tmp_path / "narrow" / name).read_bytes()).hexdigest() == digest


def test_what_cannot_be_exported_is_one_line(source, tmp_path, capsys):
    for argv in ([str(source), str(source)], [str(tmp_path / "none"), "x"], [str(source), "x", "--max-shard-gb", "0"]):
        assert convert.main(["export", *argv]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_a_check_keeps_the_export_where_it_is_wanted_and_nowhere_else(source, monkeypatch, tmp_path, capsys):
    pytest.importorskip("torch", reason="without PyTorch the check says so, whatever is asked")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(verify.tempfile, "tempdir", str(temporary))
    assert convert.main(["check", str(source), "--no-torch"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "21 tensors; writes 42.31 KiB to a temporary folder in" in out[0] and "takes 84.62 KiB of memory" in out[0]
    assert out[-2:] == ["-        logits                   not compared, as asked", "the export is the original"]
    assert convert.main(["check", str(source), "--no-torch", "--keep", str(tmp_path / "kept")]) == 0
    assert (tmp_path / "kept" / "config.json").is_file() and not list(temporary.iterdir())
    assert "writes 42.31 KiB to " + str(tmp_path / "kept") in capsys.readouterr().out


def test_a_check_that_fails_gives_one_as_its_exit_code(source, monkeypatch, capsys):
    save = verify.save_hf
    monkeypatch.setattr(verify, "save_hf", lambda *args: (save(*args), (args[1] / "LICENSE").unlink()))
    assert convert.main(["check", str(source), "--no-torch"]) == 1
    out, err = capsys.readouterr()
    assert "DIFFERS  files                    1 of 6: LICENSE (missing)\n" in out and err == ""
    assert out.endswith("the export is NOT the original\n")


@pytest.mark.nightly
def test_the_true_check_says_nothing_but_its_report(source):
    pytest.importorskip("torch")
    done = run("-m", "dpo_jax.convert", "check", str(source))
    assert (done.returncode, done.stderr) == (0, "") and len(done.stdout.splitlines()) == 9


@pytest.mark.nightly
def test_the_true_export_says_nothing_but_its_report(source, tmp_path):
    done = run("-m", "dpo_jax.convert", "export", str(source), str(tmp_path / "out"))
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == f"wrote and verified {tmp_path / 'out'}\n"


def test_help_needs_neither_jax_nor_transformers():
    code = (
        "import sys; from dpo_jax import convert\n"
        "for argv in (['-h'], ['export', '-h'], ['check', '--help'], ['push', '-h']):\n"
        "    try: convert.main(argv)\n"
        "    except SystemExit as done: assert done.code == 0\n"
        "assert not {'jax', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    done = run("-c", code)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("usage: ") == 4


def test_a_push_hands_over_what_it_was_told(monkeypatch, capsys):
    told = []
    monkeypatch.setattr(push, "push", lambda *args, **options: told.append((args, options)) or "https://hub/x")
    assert convert.main(["push", "folder", "me/x"]) == 0
    assert convert.main(["push", "folder", "me/x", "--public", "--revision", "beta"]) == 0
    assert told == [
        (("folder", "me/x"), {"private": True, "revision": None}),
        (("folder", "me/x"), {"private": False, "revision": "beta"}),
    ]
    assert capsys.readouterr().out == "https://hub/x\nhttps://hub/x\n"


@pytest.mark.parametrize("argv", [[], ["copy", "a", "b"], ["export", "a"], ["check"], ["push", "a"], ["a", "b"]])
def test_what_is_not_an_action_is_refused(argv, capsys):
    assert convert.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: command line: ") and err.count("\n") == 1
