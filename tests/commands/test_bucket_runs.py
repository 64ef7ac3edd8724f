"""Runs whose checkpoints lie in an object store: no disk need be shared, and none need last. A stand-in serves it."""

import json
import shutil
import signal

import pytest

from dpo_jax import train
from dpo_jax.files import file_digest
from dpo_jax.reporting.journal import read_records
from tests.support.hosts import Hosts
from tests.support.object_store import empty_store, served
from tests.support.worlds import settings_in, write_world

pytest.importorskip("gcsfs", reason="extra gcs is not installed")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model folder, and files of pairs and questions."""
    return write_world(tmp_path_factory.mktemp("world"), 14, 6, shards=2)


def words(world, output, *more):
    given = settings_in(world) | {"optimizer.schedule": "constant", "output": output}
    return [*(f"{key}={value}" for key, value in given.items()), *more]


def weights(output):
    return {path.name: file_digest(path) for path in sorted((output / "model").glob("*.safetensors"))}


def trained(world, output, *more):
    assert train.main(words(world, output, *more)) == 0
    return weights(output)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The weights of a run that kept all on its disk."""
    return trained(world, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def store():
    with empty_store() as store:
        yield store


@pytest.mark.nightly
def test_a_run_goes_on_from_a_disk_that_is_lost(world, whole, store, tmp_path, capsys):
    place = "checkpoint.folder=gs://pairs/runs/lost"
    trained(world, tmp_path / "run", "steps=3", place)
    before = read_records(tmp_path / "run" / "metrics.jsonl")
    shutil.rmtree(tmp_path / "run")
    assert trained(world, tmp_path / "elsewhere", place) == whole
    assert "resumed after step 3" in capsys.readouterr().out
    after = read_records(tmp_path / "elsewhere" / "metrics.jsonl")
    assert [row for row in after if row["step"] <= 3 and "loss" in row] == [row for row in before if "loss" in row]
    assert after[0]["step"] == 0 and (tmp_path / "elsewhere" / "answers" / "0.jsonl").exists()
    assert json.loads((tmp_path / "elsewhere" / "run.json").read_text())["finished"]
    assert train.main(words(world, tmp_path / "elsewhere")) == 2  # without its place
    assert "checkpoint.folder: those of this run are in gs://pairs/runs/lost" in capsys.readouterr().err


@pytest.mark.nightly
def test_a_killed_run_goes_on_on_another_machine(world, tmp_path):
    def start(name, *more):
        command = ["-m", "dpo_jax.train", *words(world, tmp_path / name, *more)]
        return Hosts(command, tmp_path / f"{name}.logs", processes=1, environment=served()[1])

    alone = start("alone")
    assert alone.ends() == [0], alone.said()
    for number, moment in enumerate(("step 3/6", "step 5/6", "exporting")):
        place = f"checkpoint.folder=gs://pairs/runs/killed{number}"
        first = start(f"first{number}", place)
        assert first.until(lambda moment=moment, first=first: moment in first.said())
        first.send(0, signal.SIGKILL)
        first.ends()
        again = start(f"again{number}", place)
        assert again.ends() == [0], again.said()
        assert number == 0 or "resumed after step" in again.said()  # step 2 may not have been sealed yet
        assert weights(tmp_path / f"again{number}") == weights(tmp_path / "alone")


@pytest.mark.nightly
@pytest.mark.parametrize("more", [(), ("adapter.rank=2", "checkpoint.best=eval_loss", "export.kind=merged")])
def test_hosts_without_a_common_disk_give_the_bytes_of_one_and_go_on_from_new_disks(world, tmp_path, more):
    own = [
        "evaluation.judge=rule",
        "log.report=false",
        "distributed.timeout=20",
        "distributed.start_timeout=300",
        *more,
    ]
    alone = Hosts(
        ["-m", "dpo_jax.train", *words(world, tmp_path / "alone", *own)],
        tmp_path / "alone.logs",
        processes=1,
        devices=2,
    )
    assert alone.ends() == [0], alone.said()
    place = f"checkpoint.folder=gs://pairs/runs/apart{len(more)}"

    def start(name):
        command = ["-m", "dpo_jax.train", *words(world, "run", place, *own)]
        return Hosts(command, tmp_path / f"{name}.logs", environment=served()[1], apart=tmp_path / name)

    first = start("first")
    assert first.until(lambda: "step 5/6" in first.said()), first.said()
    first.send(1, signal.SIGKILL)
    assert all(code != 0 for code in first.ends())
    again = start("again")
    assert again.ends() == [0, 0], (again.said(0), again.said(1))
    assert "each host has a run of its own" in again.said(0) and "resumed after step" in again.said(0)
    assert weights(tmp_path / "again" / "0" / "run") == weights(tmp_path / "alone")
    assert not (tmp_path / "again" / "1" / "run" / "model").exists()
