"""The kit for machines with accelerators: each part ends by itself, and records become tables."""

import gzip
import json

import pytest

from tools import device_kit
from tools.device import attention, parts, report, steps
from tools.device.parts import Place


@pytest.fixture
def few_parts(monkeypatch, tmp_path):
    """A kit whose parts are in a module of their own, since each runs in a process of its own."""
    (tmp_path / "sitecustomize.py").write_text(
        "from tools.device import parts\n"
        "import time\n"
        "def fails(place): raise RuntimeError('no such kernel')\n"
        "def hangs(place): time.sleep(600)\n"
        "parts.PARTS = {'fails': (fails, 60), 'hangs': (hangs, 60), 'works': (lambda place: {'found': 3}, 60)}\n"
    )
    return tmp_path


def test_a_part_that_fails_or_hangs_takes_no_other_with_it(few_parts, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", f"{few_parts}:{device_kit.ROOT}")
    names = ("fails", "hangs", "works")
    monkeypatch.setattr(parts, "PARTS", dict.fromkeys(names, (len, 30.0)))
    monkeypatch.setitem(parts.PARTS, "hangs", (len, 8.0))
    out = tmp_path / "out"
    device_kit.run(out, names, 600.0, True)
    found = json.loads((out / "kit.json").read_text("utf-8"))["parts"]
    assert found["fails"]["failed"] == "exit code 1; see kit.log"
    assert found["hangs"]["failed"] == "not done after 8 s"
    assert found["works"]["found"] == 3
    assert "no such kernel" in (out / "kit.log").read_text("utf-8")


def test_a_part_without_time_left_says_so(tmp_path):
    device_kit.run(tmp_path, ["versions"], 1.0, True)
    assert json.loads((tmp_path / "kit.json").read_text("utf-8"))["parts"]["versions"] == {"failed": "no time left"}


def test_every_size_is_a_model_that_is_known():
    """A timed part names one of the sizes, and settings that a run takes."""
    names = {name for name in parts.PARTS if name[0].isdigit()}
    assert {name.split()[0] for name in names} <= set(steps.models.SIZES)


def test_a_backend_is_held_against_the_plain_formula():
    found = attention.compared("xla", attention.Case(4, 2, 16, window=20), "float32")
    assert max(found["errors"].values()) < 1e-6 and found["repeats"]
    assert set(found["errors"]) == {"values", "queries", "keys", "values' gradient"}


def test_a_backend_that_cannot_run_here_says_why():
    assert attention.numerics("cudnn") == {"failed": "cudnn runs on gpu and the devices are of platform cpu"}


def test_kernels_are_counted_on_the_device_alone(tmp_path):
    about = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "name": "process_name", "pid": 2, "args": {"name": "/host:CPU"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 7, "args": {"name": "Stream #7(Compute)"}},
        {"ph": "M", "name": "thread_name", "pid": 2, "tid": 7, "args": {"name": "Stream of a host"}},
    ]
    ran = [{"ph": "X", "name": name, "pid": pid, "tid": 7, "dur": 1500} for name, pid in (("a", 1), ("a", 1), ("b", 2))]
    (tmp_path / "x.trace.json.gz").write_bytes(gzip.compress(json.dumps({"traceEvents": about + ran}).encode()))
    found = steps.kernels(tmp_path)
    assert found == {"ms": 3.0, "launches": 2, "kernels": [{"kernel": "a", "ms": 3.0, "launches": 2}]}


def test_records_become_tables(tmp_path):
    work = {"size": "1B", "pairs": 8, "settings": [], "warmup": 1}
    step = {"work": work, "seconds": 0.5, "useful_tflops": 300.0, "device_peak_bytes": 2**31, "first_step": 40.0}
    step["trace"] = {"ms": 900.0, "launches": 2000, "kernels": [{"kernel": "a", "ms": 1.0, "launches": 2}] * 50}
    walls = {f"{name} {n}": [9.0, s, s, 0.0] for n in (1, 2) for name, s in (("dpo_jax", 1.0), ("trl", 4.0 * n))}
    said = {"worst_difference": 0.01, "device_peak_bytes": 2**30}
    beside = {"work": work, "summary": {"dpo_jax": said, "trl": said}, "seconds": walls}
    errors = {"errors": {"values": 2e-3}, "plain": {"values": 1e-3}, "repeats": True}
    found = {
        "1B": step,
        "beside TRL": beside,
        "numerics cudnn": {"heads of 64, bfloat16": errors},
        "8B": {"failed": "x"},
    }
    record = {"kind": "device", "commit": "abc", "quick": False, "hardware": {"gpus": ["NVIDIA H100"]}, "parts": found}
    (tmp_path / "kit.json").write_text(json.dumps(record), "utf-8")
    report.keep(tmp_path, tmp_path / "runs.jsonl")
    (kept,) = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text("utf-8").splitlines()]
    assert len(kept["parts"]["1B"]["trace"]["kernels"]) == report.SHOWN_KERNELS
    assert "| 1B: 1B, 8 pairs, as it comes | 0.500 | 300 | 2.0 GiB | 450, 1,000 | 40 s | H100 | abc |" in report.steps(
        [kept]
    )
    assert "| cudnn, bfloat16 | 1 | 2.0e-03 | 1.0e-03 | H100 |" in report.attention([kept])
    assert [line.split(" | ")[3] for line in report.beside([kept]).splitlines()[2:]] == ["4.00x", "8.00x"]
    assert report.steps([kept | {"quick": True}]).count("\n") == 2  # what was only tried is shown nowhere


@pytest.mark.nightly  # a program of 4 layers and two shapes, compiled for the reference and for the step
def test_a_quick_step_runs_to_its_end(tmp_path):
    """The whole way, on whatever device there is: random model, pairs, the run's own step, the profiler's file."""
    place = Place(tmp_path, tmp_path, quick=True)
    found = parts.step(steps.Work("0.6B"), "0.6B", place)
    assert "failed" not in found, found
    assert len(found["losses"]) == 7 and found["useful_tflops"] > 0 and found["seconds"] > 0
