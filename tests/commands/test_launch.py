"""The recipes of configs/launch start one run of two processes: run here with stand-ins for what a cluster has."""

import argparse
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.tiny_rows import write, yes_or_no
from tests.support.worlds import write_model

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "configs" / "launch"

SRUN = """#!/bin/bash
# a stand-in for srun: two tasks of this machine, as Slurm tells them of themselves
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NODELIST=127.0.0.1 SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 SLURM_LOCALID=0 SLURM_STEP_NUM_NODES=2
pids=()
for number in 0 1; do SLURM_PROCID=$number "$@" & pids+=($!); done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
"""
SCONTROL = '#!/bin/bash\necho "$@" >> "$ASKED"\n'
SSH = """#!/bin/bash
# a stand-in for ssh: the command is run here, the host is only a name
while [[ $1 == -* ]]; do [[ $1 == -o ]] && shift; shift; done
shift
exec bash -c "$*"
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A small run, as a file of settings without an output."""
    root = tmp_path_factory.mktemp("world")
    write_model(root / "model", num_hidden_layers=1)
    write(root / "train.jsonl", *yes_or_no(8))
    settings = {
        "model": {"path": str(root / "model")},
        "data": {"train": str(root / "train.jsonl")},
        "batch": {"pairs": 4},
        "log": {"report": False, "tensorboard": False},
        "steps": 2,
    }
    (root / "run.yaml").write_text(yaml.safe_dump(settings))
    return root / "run.yaml"


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Commands of a cluster, in place of those that are not here."""
    folder = tmp_path / "bin"
    folder.mkdir()
    python = f'#!/bin/bash\nexec {sys.executable} "$@"\n'
    for name, text in {"python": python, "srun": SRUN, "scontrol": SCONTROL, "ssh": SSH}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    return folder


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def is_one_run_of_two(output, said):
    assert (output / "model" / "model.safetensors").exists(), said
    assert said.count("2 processes on 1 host") == 1, said


def ran(command, **more):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False, **more)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.nightly
def test_slurm(config, stand_ins, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", str(free_port() - (65535 - 2**12 + 1)))  # JAX makes the port of it
    code, said = ran(["bash", LAUNCH / "slurm.sbatch", config, f"output={tmp_path / 'run'}"])
    assert code == 0, said
    is_one_run_of_two(tmp_path / "run", said)
    assert not (tmp_path / "asked").exists()


def test_slurm_queues_again_what_stopped_or_lost_a_host(stand_ins, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    kills = [
        (code, starts, starts < 20) for code in (76, 128 + signal.SIGABRT, 128 + signal.SIGKILL) for starts in (0, 20)
    ]
    for code, starts, again in ((0, 0, False), (2, 0, False), (75, 0, True), (75, 99, True), *kills):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(starts))
        (stand_ins / "srun").write_text(f"#!/bin/bash\nexit {code}\n")
        (tmp_path / "asked").unlink(missing_ok=True)
        assert ran(["bash", LAUNCH / "slurm.sbatch", "run.yaml"])[0] == code
        assert (tmp_path / "asked").exists() == again
        assert not again or (tmp_path / "asked").read_text() == "requeue 7\n"


@pytest.mark.nightly
def test_ssh(config, stand_ins, tmp_path, monkeypatch):
    monkeypatch.setenv("PORT", str(free_port()))
    code, said = ran([LAUNCH / "ssh.sh", "127.0.0.1 127.0.0.2", config, f"output={tmp_path / 'a run'}"])
    assert code == 0, said
    is_one_run_of_two(tmp_path / "a run", said)


def together(commands, environments):
    """All at once; what they said."""
    running = [
        subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **own}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command, own in zip(commands, environments, strict=True)
    ]
    said = "".join(one.communicate(timeout=600)[0] for one in running)
    assert [one.returncode for one in running] == [0] * len(running), said
    return said


@pytest.mark.nightly
def test_skypilot(config, stand_ins, tmp_path):
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    own = {"SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2", "SKYPILOT_NUM_NODES": str(task["num_nodes"])}
    own |= {"CONFIG": str(config), "OUTPUT": str(tmp_path / "run")}
    commands = [["bash", "-c", task["run"]]] * 2
    said = together(commands, [{**own, "SKYPILOT_NODE_RANK": str(number)} for number in (0, 1)])
    is_one_run_of_two(tmp_path / "run", said)


@pytest.mark.nightly
def test_jobset(config, stand_ins, tmp_path):
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = pod["template"]["spec"]["containers"][0]
    given = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert (
        given["JAX_COORDINATOR_ADDRESS"] == f"{jobset['metadata']['name']}-train-0-0.{jobset['metadata']['name']}:29500"
    )
    assert given["JAX_NUM_PROCESSES"] == str(pod["completions"]) == str(pod["parallelism"])
    given["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{free_port()}"
    program, (asked, output) = container["command"][:-2], container["command"][-2:]
    assert (ROOT / asked).exists() and output.startswith("output=")
    (rule,) = pod["podFailurePolicy"]["rules"]
    assert {75, 76, 128 + signal.SIGABRT, 128 + signal.SIGKILL} <= {*rule["onExitCodes"]["values"]}
    environments = [{**given, "JAX_PROCESS_ID": str(number)} for number in (0, 1)]
    said = together([[*program, str(config), f"output={tmp_path / 'run'}"]] * 2, environments)
    is_one_run_of_two(tmp_path / "run", said)


def test_skypilot_reads_its_file():
    """SkyPilot's own reader, which refuses what it does not know; which clouds have what is not asked."""
    sky = pytest.importorskip("sky", reason="skypilot is not installed")
    task = sky.Task.from_yaml(str(LAUNCH / "sky.yaml"))
    task.expand_and_validate_file_mounts()
    task.validate_run()
    assert task.num_nodes == 2 and list(task.storage_mounts) == ["/shared"]
    (resources,) = task.resources
    assert resources.job_recovery["recover_on_exit_codes"] == [75]
    assert resources.accelerators == {"H100": 8}


def test_xpk_reads_its_command():
    """XPK's own reader of what `tpu.sh` says of it."""
    core = pytest.importorskip("xpk.parser.core", reason="xpk is not installed")
    found = re.search(r"xpk (workload create .*?\\\n#.*)\n", (LAUNCH / "tpu.sh").read_text())
    assert found is not None
    parser = argparse.ArgumentParser()
    core.set_parser(parser)
    given = parser.parse_args(shlex.split(found[1].replace("\\\n#", "")))
    assert (given.tpu_type, given.docker_image) == ("v5litepod-16", "dpo_jax:tpu")
    assert given.command.startswith("python -m dpo_jax.train ")


@pytest.mark.parametrize("name", ["slurm.sbatch", "ssh.sh", "tpu.sh"])
def test_a_script_is_one(name):
    assert subprocess.run(["bash", "-n", LAUNCH / name], check=False).returncode == 0
    assert name == "slurm.sbatch" or os.access(LAUNCH / name, os.X_OK)


def test_the_image_holds_what_is_here():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    extras = set(re.findall(r"EXTRA=(\w+)", "\n".join(lines)))
    assert (
        extras == {"cuda", "tpu"} <= set(re.findall(r"^(\w[\w-]*) = \[", (ROOT / "pyproject.toml").read_text(), re.M))
    )
    assert f"STOPSIGNAL {signal.SIGTERM.name}" in lines
