"""The doctor: it sees what is there, and each thing in the way comes with its remedy."""

import copy
import json

import jax
import pytest

from dpo_jax import doctor
from dpo_jax.planning import machine

HEALTHY = {
    "versions": {"python": "3.12.1", "os": "Linux", **dict.fromkeys(doctor.PACKAGES, "1.0"), "jax": "0.12.0"},
    "accelerators": [],
    "devices": [
        {
            "device": "cpu:0",
            "kind": "cpu",
            "platform": "cpu",
            "memory_bytes": None,
            "gflops_float32": 1.0,
            "gflops_bfloat16": 2.0,
        }
    ],
    "host": {
        "processors": 2,
        "memory_bytes": 8 << 30,
        "memory_free_bytes": 4 << 30,
        "disk_bytes": 99 << 30,
        "disk_free_bytes": 50 << 30,
        "compile_cache": "/cache",
    },
}
GPU = {**HEALTHY["devices"][0], "device": "cuda:0", "platform": "gpu", "memory_bytes": 80 << 30}


def found(**changes) -> list[doctor.Finding]:
    """Problems of the healthy report after changes `section__key=value` (or `section=value`)."""
    report = copy.deepcopy(HEALTHY)
    for path, value in changes.items():
        *outer, last = path.split("__")
        (report[outer[0]] if outer else report)[last] = value
    return doctor.problems(report)


def test_a_healthy_machine_has_no_problems():
    assert found() == []
    assert found(devices=[GPU], accelerators=["NVIDIA GPU"], versions__jax="0.10.2") == []


@pytest.mark.parametrize(
    ("changes", "what", "remedy", "broken"),
    [
        ({"versions__flax": None}, "flax is not installed", "pip install flax", True),
        ({"accelerators": ["NVIDIA GPU"]}, "NVIDIA GPU, but jax sees none", "dpo_jax[cuda]", True),
        ({"accelerators": ["TPU"]}, "TPU, but jax sees none", "dpo_jax[tpu]", True),
        ({"versions__jax": "0.10.2"}, "a step in bfloat16 is slower", "float32", False),
        ({"versions__jax": "0.9.9"}, "a step in bfloat16 is slower", "float32", False),
        ({"host__disk_free_bytes": 1 << 30}, "only 1.00 GiB of disk", "set output", False),
        ({"host__compile_cache": None}, "not kept", "JAX_ENABLE_COMPILATION_CACHE", False),
        ({"devices": [], "failure": "RuntimeError: no backend"}, "RuntimeError: no backend", "reinstall jax", True),
    ],
)
def test_each_problem_has_its_remedy(changes, what, remedy, broken):
    (problem,) = found(**changes)
    assert what in problem.what and remedy in problem.remedy and problem.broken is broken
    assert str(problem).startswith("broken: " if broken else "advice: ") and "\n" not in str(problem)


def test_jax_that_fails_beside_an_accelerator_names_the_extra():
    (problem,) = found(devices=[], failure="RuntimeError: no cuda", accelerators=["NVIDIA GPU"])
    assert "dpo_jax[cuda]" in problem.remedy and problem.broken


def test_accelerators_are_seen_in_the_device_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.accelerators_present(tmp_path) == []
    (tmp_path / "nvidiactl").touch()
    assert doctor.accelerators_present(tmp_path) == []
    (tmp_path / "nvidia0").touch()
    (tmp_path / "accel0").touch()
    assert doctor.accelerators_present(tmp_path) == ["NVIDIA GPU", "TPU"]
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert doctor.accelerators_present(tmp_path / "nothing") == ["NVIDIA GPU"]


def test_speed_is_operations_over_seconds(monkeypatch):
    clock = iter([0.0, 0.0, 1.0, 3.0, 3.5, 3.5, 4.0, 9.0])  # start; then: time left? began, ended
    monkeypatch.setitem(machine.MATMUL_SIZE, "cpu", 100)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    # two products, of 2 and 0.5 seconds, of 2 x 100^3 operations each
    assert machine.matmul_gflops(jax.devices()[0], "float32", seconds=5.0) == pytest.approx(0.004)


def test_json_describes_this_machine(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(machine.MATMUL_SIZE, "cpu", 64)
    code = doctor.main(["--json", str(tmp_path)])
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["jax"] == jax.__version__
    assert [device["device"] for device in report["devices"]] == [str(device) for device in jax.devices()]
    assert all(device["gflops_float32"] > 0 and device["gflops_bfloat16"] > 0 for device in report["devices"])
    assert report["host"]["disk_free_bytes"] > 0 and report["host"]["memory_bytes"] > 0
    assert code == any(problem["broken"] for problem in report["problems"])


def test_text_names_every_package_and_problem(monkeypatch, capsys, tmp_path):
    report = copy.deepcopy(HEALTHY) | {"devices": [GPU]}
    report["versions"]["flax"] = None
    report["problems"] = [doctor.dataclasses.asdict(problem) for problem in doctor.problems(report)]
    monkeypatch.setattr(doctor, "examine", lambda folder: report)
    assert doctor.main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(report["versions"])]] == list(report["versions"])
    assert "80.00 GiB" in next(line for line in lines if line.startswith("cuda:0"))
    assert lines[-1] == "broken: flax is not installed; pip install flax"


def test_jax_that_cannot_start_is_a_finding_not_a_crash(monkeypatch, capsys, tmp_path):
    def devices():
        raise RuntimeError("no backend\nmore")

    monkeypatch.setattr(doctor, "devices", devices)
    assert doctor.main([str(tmp_path)]) == 1
    assert "broken: jax cannot compute here: RuntimeError: no backend; " in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_refused(capsys):
    assert doctor.main(["nowhere"]) == 2
    assert (
        capsys.readouterr().err == "error: command line: nowhere: no such folder; see python -m dpo_jax.doctor --help\n"
    )
