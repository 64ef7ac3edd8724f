"""Where each process keeps its part in a folder of its own, a step counts if all have it, and nobody decides alone."""

import shutil
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dpo_jax.errors import UserError
from dpo_jax.training import arrays, steps
from dpo_jax.training.checkpoints import Checkpoints, read_part
from dpo_jax.training.folder import Folder
from dpo_jax.training.settings import CheckpointSettings
from tests.support.threads import everywhere

PROCESSES = 3
NOTHING = lambda: None  # noqa: E731


def a_run(folder, *saved, keep=9):
    """Steps in a folder for each process, as each has sealed them."""
    for process in range(PROCESSES):
        with Checkpoints(folder / str(process), CheckpointSettings(keep=keep)) as checkpoints:
            for step in saved:
                checkpoints.save(step, {"w": jnp.full((4,), step)}, {"step": step})
    return folder


@pytest.fixture
def latest(monkeypatch):
    """What each process finds to be the newest step, and what the first one says."""
    now = threading.local()

    def found(folder, work=Checkpoints.latest):
        said = []
        monkeypatch.setattr("dpo_jax.training.checkpoints.here", lambda: now.place)
        monkeypatch.setattr("dpo_jax.processes.here.SEEN_SECONDS", 0.1)
        monkeypatch.setattr(
            arrays, "manager", lambda *_, **__: SimpleNamespace(close=NOTHING, wait_until_finished=NOTHING)
        )

        def one(place):
            now.place = place
            with Checkpoints(folder / str(place.process), CheckpointSettings(), say=said.append) as checkpoints:
                assert not checkpoints.place.shared
                return work(checkpoints)

        return everywhere(one, PROCESSES), said

    return found


def names(folder, process):
    return {path.name.split("-")[0] for path in (folder / str(process)).iterdir()} - {"sealed"}


def test_the_newest_step_is_one_that_all_have(tmp_path, latest):
    assert latest(a_run(tmp_path, 2, 4)) == ([4] * 3, [])


@pytest.mark.parametrize("loser", [0, 1])
def test_a_step_that_one_has_lost_is_set_aside_by_all(tmp_path, latest, loser):
    folder = a_run(tmp_path, 2, 4)
    (folder / str(loser) / "4").rename(folder / str(loser) / "4.mine")
    found, said = latest(folder)
    assert found == [2] * 3
    assert f"(process {loser} does not have it); {'renamed to 4.bad-' if loser else 'looking for'}" in said[0]
    assert names(folder, loser) == {"2", "4.mine"}
    assert all(names(folder, process) == {"2", "4.bad"} for process in {0, 1, 2} - {loser})


@pytest.mark.parametrize("whose", range(PROCESSES))
def test_a_step_that_is_damaged_in_one_folder_is_set_aside_by_all(tmp_path, latest, whose):
    folder = a_run(tmp_path, 2, 4)
    with open(folder / str(whose) / "4" / "record" / "metadata", "ab") as file:
        file.write(b" ")
    found, said = latest(folder)
    assert found == [2] * 3 and f"process {whose}: record/metadata has 12 bytes instead of 11" in said[0]
    assert all(names(folder, process) == {"2", "4.bad"} for process in range(3))


@pytest.mark.parametrize("before", [(), (2,)])
def test_a_step_that_not_all_had_sealed_was_never_finished(tmp_path, latest, before):
    # Killed between one's seal and another's: nobody has written down that it is the newest.
    folder = a_run(tmp_path, *before, 4)
    (folder / "1" / "4" / "manifest.json").unlink()
    for process in range(PROCESSES):
        (folder / str(process) / "sealed").unlink()
        for step in before:
            (folder / str(process) / "sealed").write_text(f"{step}\n")
    found, said = latest(folder)
    assert found == [max(before, default=None)] * 3 and "4 was never finished; it is ignored" in said[0]
    assert not any((folder / str(process) / "4" / "manifest.json").exists() for process in range(3))


def test_a_host_that_has_lost_everything_is_no_reason_to_begin_again(tmp_path, latest):
    folder = a_run(tmp_path, 2)
    shutil.rmtree(folder / "2")
    found, _ = latest(folder)
    assert all(isinstance(one, UserError) and "though the run had saved some" in str(one) for one in found)
    assert [*folder.glob("0/2.bad-*/manifest.json")]  # whole, should the other come back


def test_a_step_is_the_newest_once_all_have_sealed_it(tmp_path, latest, monkeypatch):
    folder, order = a_run(tmp_path, 2), []
    seal, mark = Folder.seal, Folder.mark

    def slowly(place, step, table):
        if place.root.name == "1":
            time.sleep(0.2)
        seal(place, step, table)
        order.append("seal")

    monkeypatch.setattr(Folder, "seal", slowly)
    monkeypatch.setattr(Folder, "mark", lambda place, step: order.append("mark") or mark(place, step))
    latest(folder, lambda checkpoints: checkpoints._finish(2, None))
    assert order == ["seal"] * 3 + ["mark"] * 3


def test_folders_of_several_runs_are_refused(tmp_path, latest):
    folder = a_run(tmp_path, 2)
    (folder / "1" / "2").rename(tmp_path / "gone")
    with Checkpoints(folder / "1", CheckpointSettings()) as checkpoints:
        checkpoints.save(2, {"w": jnp.zeros(4)}, {"step": 2, "seed": 1})
    found, _ = latest(folder)
    assert all("the digest of its record is" in str(one) and "process 1" in str(one) for one in found)


def test_a_part_is_told_from_the_whole(tmp_path):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    rows, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
    tree = {"rows": jax.ShapeDtypeStruct((4, 3), jnp.float32, sharding=rows)}
    tree["whole"] = jax.ShapeDtypeStruct((4,), jnp.bfloat16, sharding=whole)
    assert arrays.leaves(tree, shared=False) == {"rows": "float32[4, 3]", "whole": "bfloat16[4]"}
    held = {jax.devices()[0]: (slice(None), slice(0, 2)), jax.devices()[1]: (slice(None), slice(0, 2))}
    half = SimpleNamespace(addressable_devices_indices_map=lambda shape: held)
    leaf = SimpleNamespace(shape=(4, 3), dtype=jnp.dtype("float32"), sharding=half)
    said = arrays.leaves({"rows": leaf}, shared=False)["rows"]
    assert said == "float32[4, 3] {0:4, 0:2}" and arrays.is_part(said)


def test_a_part_is_not_read_as_a_whole(tmp_path, monkeypatch):
    sharding = NamedSharding(jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec())
    state = {"trained": {"w": jax.device_put(jnp.zeros(4), sharding)}}
    with monkeypatch.context() as other:
        other.setattr(arrays, "leaves", lambda tree, *, shared: {"trained/w": "float32[4] {0:2}"})
        with Checkpoints(tmp_path, CheckpointSettings()) as checkpoints:
            checkpoints.save(1, state, {})
    with pytest.raises(UserError, match="it holds one host's part, as each kept its own"):
        read_part(steps.at(tmp_path), 1, state)
    with Checkpoints(tmp_path, CheckpointSettings()) as checkpoints:
        with pytest.raises(UserError, match="and the same hosts in the same order"):
            checkpoints.restore(1, state)
