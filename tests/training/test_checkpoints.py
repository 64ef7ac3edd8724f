"""A checkpoint comes back bit for bit, or its damage is noticed and an older one is used."""

import functools
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dpo_jax.errors import UserError
from dpo_jax.processes.here import Here
from dpo_jax.training import folder as folders
from dpo_jax.training import steps
from dpo_jax.training.checkpoints import Checkpoints, damage_of, read_part
from dpo_jax.training.folder import Folder
from dpo_jax.training.settings import CheckpointSettings
from dpo_jax.trees import paths
from tests.support.threads import Store, everywhere
from tests.support.tiers import by_day


def rows_sharding(devices: int) -> NamedSharding:
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    return NamedSharding(mesh, PartitionSpec("data"))


@functools.cache
def a_state(seed: int, *, devices: int = 1):
    """Parameters in two dtypes, their AdamW state, and a counter; arrays split by rows."""
    rng, array = np.random.default_rng(seed), jax.ShapeDtypeStruct
    params = {
        "block": {"kernel": array((8, 12), jnp.float32), "scale": array((8,), jnp.float32)},
        "embed": array((16, 4), jnp.bfloat16),
    }
    state = {
        "params": params,
        "opt": jax.eval_shape(optax.adamw(1e-3).init, params),
        "step": array((), jnp.int32),
    }
    return jax.tree.map(
        lambda x: jax.device_put((100 * rng.standard_normal(x.shape)).astype(x.dtype), x.sharding),
        abstract(state, devices=devices),
    )


def abstract(state, *, devices: int = 1):
    rows = rows_sharding(devices)
    replicated = NamedSharding(rows.mesh, PartitionSpec())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows if x.ndim else replicated), state
    )


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, a), b in zip(paths(left).items(), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype, path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def opened(folder: Path, said: list[str] | None = None, **settings) -> Checkpoints:
    return Checkpoints(folder, CheckpointSettings(**settings), say=(said if said is not None else []).append)


def with_steps(folder: Path, *steps: int, **settings) -> Path:
    with opened(folder, **settings) as checkpoints:
        for step in steps:
            checkpoints.save(step, a_state(step), {"step": step})
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"sealed"}


def test_restore_inverts_save(tmp_path):
    state, record = a_state(3), {"step": 3, "seed": 0, "loss": 0.1, "rows": [1, 2], "name": "é", "none": None}
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(3, state, record)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest() == 3
        assert checkpoints.read_record(3) == record
        restored, found = checkpoints.restore(3, abstract(state))
    assert found == record
    assert_same(restored, state)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_restores_onto_other_devices(tmp_path, devices):
    state = a_state(1, devices=4)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        target = abstract(state, devices=devices)
        restored, _ = checkpoints.restore(1, target)
    assert_same(restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, target)


def test_training_that_goes_on_does_not_change_what_is_saved(tmp_path):
    train = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = train({"w": jnp.zeros((512, 512)), "step": jnp.int32(0)})
    with opened(tmp_path, keep=9) as checkpoints:
        for step in range(1, 5):
            checkpoints.save(step, state, {})
            for _ in range(5):
                state = train(state)
        for step in range(1, 5):
            restored, _ = checkpoints.restore(step, jax.tree.map(lambda x: x, state))
            assert int(restored["step"]) == 1 + 5 * (step - 1)
            assert float(restored["w"].min()) == float(restored["w"].max()) == 1 + 5 * (step - 1)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"keep": 1}, {6}),
        ({"keep": 2}, {5, 6}),
        ({"keep": 1, "keep_every": 2}, {2, 4, 6}),
        ({"keep": 9}, set(range(1, 7))),
    ],
)
def test_keep_rules(tmp_path, settings, kept):
    assert names(with_steps(tmp_path, *range(1, 7), **settings)) == {str(step) for step in kept}


def test_an_old_step_stays_until_a_newer_one_is_sealed(tmp_path, monkeypatch):
    with_steps(tmp_path, 1, keep=1)

    def full(place, step, table):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("dpo_jax.training.folder.Folder.seal", full)
    with pytest.raises(UserError, match="No space left"), opened(tmp_path, keep=1) as checkpoints:
        checkpoints.save(2, a_state(2), {})
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1


def test_saving_a_saved_step_again_does_nothing(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, a_state(1), {"first": True})
        checkpoints.save(1, a_state(1), {"first": False})
        assert checkpoints.read_record(1) == {"first": True}
    with opened(tmp_path) as checkpoints, pytest.raises(UserError, match="exists already"):
        checkpoints.save(1, a_state(1), {})


def damages(file: Path, rng: random.Random):
    """The file with single bits flipped, cut, grown, emptied and gone."""
    whole = file.read_bytes()
    for _ in range(4):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        yield bytes(flipped)
    yield whole[: rng.randrange(len(whole))]
    yield whole + b"\n"
    yield b""
    yield None


def test_every_damage_is_noticed_and_the_older_step_used(tmp_path):
    step = with_steps(tmp_path, 1, 2) / "2"
    rng, said, tried = random.Random(0), [], 0
    with opened(tmp_path, said) as checkpoints:
        for file in sorted(path for path in step.rglob("*") if path.is_file()):
            whole = file.read_bytes()
            for damaged in damages(file, rng):
                file.unlink() if damaged is None else file.write_bytes(damaged)
                assert checkpoints.latest() == 1, (file, damaged, whole)
                tried += 1
                for aside in tmp_path.glob("2.bad-*"):
                    aside.rename(step)
                file.write_bytes(whole)
        assert len(said) == tried >= 100
        assert checkpoints.latest() == 2
        assert_same(checkpoints.restore(1, abstract(a_state(1)))[0], a_state(1))


def test_a_damaged_step_is_renamed_named_and_never_deleted(tmp_path):
    data = next((with_steps(tmp_path, 1, 2) / "2").glob("state/ocdbt.process_0/d/*"))
    data.write_bytes(b"x" + data.read_bytes()[1:])
    said = []
    with opened(tmp_path, said) as checkpoints:
        with pytest.raises(UserError, match="other bytes than were saved"):
            checkpoints.restore(2, abstract(a_state(2)))
        assert checkpoints.latest() == 1
        checkpoints.save(2, a_state(2), {})
        assert checkpoints.latest() == 2
    (aside,) = tmp_path.glob("2.bad-*")
    assert (aside / data.relative_to(tmp_path / "2")).read_bytes().startswith(b"x")
    assert len(said) == 1
    assert aside.name in said[0] and data.name in said[0]


def test_a_step_that_is_named_is_kept_beside_those_of_the_settings(tmp_path):
    """The best one so far, which may be older than all that are kept."""
    with opened(tmp_path, keep=1) as checkpoints:
        for step, also in ((1, None), (2, 1), (3, 1), (4, 3)):
            checkpoints.save(step, a_state(step), {}, also=also)
            checkpoints.wait()
            assert checkpoints.kept() == sorted({step, also or step})


def test_no_part_of_a_damaged_step_is_read(tmp_path):
    data = next((with_steps(tmp_path, 1) / "1").glob("state/ocdbt.process_0/d/*"))
    part = {"step": abstract(a_state(1))["step"]}
    assert_same(read_part(steps.at(tmp_path), 1, part), {"step": a_state(1)["step"]})
    data.write_bytes(b"x" + data.read_bytes()[1:])
    with pytest.raises(UserError, match=f"1 cannot be used .*{data.name}"):
        read_part(steps.at(tmp_path), 1, part)


def test_a_damaged_record_is_not_read(tmp_path):
    record = with_steps(tmp_path, 1) / "1" / "record" / "metadata"
    record.write_text("{}")
    with opened(tmp_path) as checkpoints, pytest.raises(UserError, match="1 cannot be used .*record/metadata"):
        checkpoints.read_record(1)


@pytest.mark.parametrize("lost", ["data", "manifest.json", "everything"])
def test_a_run_that_lost_its_only_step_never_starts_from_scratch(tmp_path, lost):
    step = with_steps(tmp_path, 1) / "1"
    if lost == "data":
        next(step.glob("state/d/*")).write_bytes(b"")
    elif lost == "manifest.json":
        (step / lost).unlink()
    else:
        shutil.rmtree(step)
    for _ in range(2):
        with opened(tmp_path) as checkpoints, pytest.raises(UserError, match=re.escape(str(tmp_path))):
            checkpoints.latest()


def lacking_an_entry(step: Path) -> str:
    """The manifest with one of its files taken out, as it would be written."""
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["files"].popitem()
    return json.dumps(manifest, indent=1, sort_keys=True) + "\n"


@pytest.mark.parametrize("kind", ["an entry less", "deep", "a list", "another step's"])
def test_a_manifest_stands_for_its_own_step_and_all_of_its_files(tmp_path, kind):
    step, said = with_steps(tmp_path, 1, 2) / "2", []
    if kind == "another step's":
        step.rename(tmp_path / "7")
    else:
        text = {"an entry less": lacking_an_entry(step), "deep": "[" * 100_000, "a list": "[]\n"}[kind]
        (step / "manifest.json").write_text(text)
    with opened(tmp_path, said) as checkpoints:
        assert checkpoints.latest() == 1
    assert "is damaged (" + ("it is of step 2" if kind == "another step's" else "manifest.json was changed") in said[0]


def test_a_newer_step_that_is_gone_is_said(tmp_path):
    said = []
    shutil.rmtree(with_steps(tmp_path, 1, 2) / "2")
    with opened(tmp_path, said) as checkpoints:
        assert checkpoints.latest() == 1
    assert said == [f"checkpoint {tmp_path / '2'} was saved and is gone; step 1 is used"]


def test_the_newest_record_that_verifies_is_read_without_touching_anything(tmp_path):
    assert steps.newest_record(steps.at(tmp_path / "none")) is None
    with_steps(tmp_path, 1, 2)
    assert steps.newest_record(steps.at(tmp_path)) == (2, {"step": 2})
    (tmp_path / "2" / "record" / "metadata").write_text('{"step": 3}')
    before = names(tmp_path)
    assert steps.newest_record(steps.at(tmp_path)) == (1, {"step": 1}) and names(tmp_path) == before


def test_stray_entries_are_ignored(tmp_path):
    with_steps(tmp_path, 1)
    (tmp_path / "99").mkdir()
    (tmp_path / "97").write_text("a file")
    for name in ("-5", "007", "3.5", "notes", "5.bad"):
        (tmp_path / name).mkdir()
    (tmp_path / "98").symlink_to(tmp_path / "1")
    strays = names(tmp_path)
    with opened(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.save(2, a_state(2), {})
        assert checkpoints.latest() == 2
        assert names(tmp_path) == strays - {"1"} | {"2"}


@pytest.mark.parametrize("kind", ["folder", "file", "symlink"])
def test_a_stray_in_the_way_is_moved_not_deleted(tmp_path, kind):
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "text").write_text("keep me")
    stray = tmp_path / "checkpoints" / "2"
    stray.parent.mkdir()
    match kind:
        case "folder":
            shutil.copytree(tmp_path / "else", stray)
        case "file":
            stray.write_text("keep me")
        case "symlink":
            stray.symlink_to(tmp_path / "else")
    with opened(stray.parent) as checkpoints:
        checkpoints.save(2, a_state(2), {})
        assert checkpoints.latest() == 2
    (aside,) = stray.parent.glob("2.stray-*")
    assert (aside if kind == "file" else aside / "text").read_text() == "keep me"


def changed(state, path: str, leaf):
    state = dict(state)
    state[path] = leaf
    return state


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda s: changed(s, "step", s["step"].astype(jnp.int16)), r"step is int32\[\] there and int16\[\] here"),
        (
            lambda s: jax.tree.map(lambda x: x.astype(jnp.bfloat16), s),
            r"leaf opt/0/count is int32\[\] there and bfloat16\[\] here",
        ),
        (lambda s: changed(s, "step", jnp.zeros((2,), jnp.int32)), r"int32\[\] there and int32\[2\] here"),
        (lambda s: changed(s, "more", jnp.int32(1)), "more is missing there"),
        (lambda s: {"params": s["params"], "opt": s["opt"]}, "step is int32.* missing here"),
    ],
    ids=["integer", "every dtype", "shape", "more", "fewer"],
)
def test_a_target_that_differs_is_refused_in_one_line(tmp_path, target, message):
    state = a_state(1)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        with pytest.raises(UserError, match=message) as refusal:
            checkpoints.restore(1, target(state))
    assert "\n" not in str(refusal.value)


def test_a_full_disk_is_one_line_and_keeps_what_is_there(tmp_path, caplog):
    with_steps(tmp_path, 1)
    big = {"w": jax.random.normal(jax.random.key(0), (512, 512))}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(tmp_path) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limit[1]))
        try:
            checkpoints.save(2, big, {})
            with pytest.raises(UserError, match="cannot write checkpoint .*/2: File too large") as refusal:
                checkpoints.save(3, big, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert "\n" not in str(refusal.value)
        assert not caplog.records
        assert names(tmp_path) == {"1"}
        assert checkpoints.latest() == 1
        checkpoints.save(2, big, {})
        assert checkpoints.latest() == 2


def test_an_error_inside_the_block_is_not_hidden_by_a_failed_save(tmp_path, monkeypatch):
    said = []

    def full(place, step, table):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("dpo_jax.training.folder.Folder.seal", full)
    with pytest.raises(ZeroDivisionError), opened(tmp_path, said) as checkpoints:
        checkpoints.save(1, a_state(1), {})
        raise ZeroDivisionError
    assert "No space left" in said[0]


def test_an_error_in_one_of_several_processes_does_not_wait_for_a_save_that_the_others_never_end(tmp_path, monkeypatch):
    # Whoever was to end it too may be gone, and all are to hear at once why.
    monkeypatch.setattr("dpo_jax.training.checkpoints._PARTING_SECONDS", 0.1)
    goes_on = threading.Event()
    checkpoints = opened(tmp_path)
    finish = checkpoints._finish
    monkeypatch.setattr(checkpoints, "_finish", lambda *given: (goes_on.wait(), finish(*given)))
    with pytest.raises(RuntimeError, match="our own"), checkpoints:
        checkpoints.save(1, a_state(1), {})
        monkeypatch.setattr("dpo_jax.training.checkpoints.here", lambda: Here(Store(), process=1, count=2))
        raise RuntimeError("our own")
    monkeypatch.undo()
    goes_on.set()
    checkpoints.close()


def test_an_error_of_all_processes_does_not_lose_the_save_that_is_under_way(tmp_path, monkeypatch):
    store, checkpoints, goes_on = Store(), opened(tmp_path), threading.Event()
    finish = checkpoints._finish
    monkeypatch.setattr(checkpoints, "_finish", lambda *given: (goes_on.wait(), finish(*given)))
    store.key_value_set("dpo_jax/an error/0/0", "here")  # process 0 ends with one as well
    for name in ("files", "digests"):
        store.key_value_set(f"dpo_jax/{name} of a checkpoint/0/all", "[{}]")
    threading.Timer(0.5, goes_on.set).start()
    with pytest.raises(RuntimeError, match="of all"), checkpoints:
        checkpoints.save(1, a_state(1), {})
        monkeypatch.setattr("dpo_jax.training.checkpoints.here", lambda: Here(store, process=1, count=2))
        raise RuntimeError("of all")
    assert checkpoints._good == {1}


@pytest.mark.parametrize("count", [2, 5])
def test_processes_seal_and_check_a_step_together_and_each_reads_its_share(tmp_path, monkeypatch, count):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, a_state(1), {})
    folder, read, digest = checkpoints.place, [], folders._digest
    sealed = json.loads((tmp_path / "1" / "manifest.json").read_text())["files"]
    (tmp_path / "1" / "manifest.json").unlink()
    monkeypatch.setattr(folders, "_digest", lambda path: read.append(path) or digest(path))
    first = everywhere(lambda place: folder.looked_at(1, place), count)[0]
    assert {name: list(about) for name, about in first.items()} == sealed
    assert len(read) == len(set(read)) == len(sealed)

    folder.seal(1, first)
    for name in sealed:
        path = tmp_path / "1" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        found = [folder.damage(1, process=process, processes=count) for process in range(count)]
        assert [one for one in found if one] == [f"{name} has other bytes than were saved"]
        path.write_bytes(whole)
    assert folder.damage(1) is None


def test_damage_that_one_process_finds_all_know_of(tmp_path, monkeypatch):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, a_state(1), {})
    now = threading.local()
    monkeypatch.setattr("dpo_jax.training.checkpoints.here", lambda: now.place)

    def damage(place):
        now.place = place
        return damage_of(checkpoints.place, 1)

    assert everywhere(damage, 3) == [None] * 3
    with open(next((tmp_path / "1" / "state" / "d").iterdir()), "ab") as file:
        file.write(b"x")
    first, *others = everywhere(damage, 3)
    assert "bytes instead of" in first and others == [first] * 2


def test_what_a_host_does_not_see_yet_process_0_looks_at(tmp_path, monkeypatch):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, a_state(1), {})
    sealed = json.loads((tmp_path / "1" / "manifest.json").read_text())["files"]
    (tmp_path / "1" / "manifest.json").unlink()
    blind = Folder(tmp_path / "elsewhere")
    found = everywhere(lambda place: (checkpoints.place if place.owns else blind).looked_at(1, place), 3)
    assert {name: list(about) for name, about in found[0].items()} == sealed


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="checkpoint"):
            opened(folder)


KILLED = """
import os, sys, time
import jax.numpy as jnp
from dpo_jax.training import checkpoints as module
from dpo_jax.training.folder import Folder
from dpo_jax.training.settings import CheckpointSettings
root, moment = sys.argv[1:]
state = lambda step: {"w": jnp.full((64, 64), step, jnp.float32)}
opened = lambda name: module.Checkpoints(f"{root}/{name}", CheckpointSettings(), say=print)
with opened("second") as checkpoints:
    checkpoints.save(1, state(1), {})
rename = os.rename
def die_at_commit(source, target, **kwargs):
    if str(target).endswith("/second/2"):
        os._exit(9)
    if not str(target).endswith("/first/1"):
        rename(source, target, **kwargs)
def die_at_seal(place, step, table):
    if str(place.at(step)).endswith("/second/2"):
        os._exit(9)
    raise SystemExit
if moment == "commit":
    os.rename = die_at_commit
else:
    Folder.seal = die_at_seal
first, second = opened("first"), opened("second")
assert second.latest() == 1
first.save(1, state(1), {})
while not os.path.exists(f"{root}/first/1/commit_success.txt") and moment == "seal":
    time.sleep(0.01)
second.save(2, state(2), {})
if moment == "start":
    os._exit(9)
second.wait()
"""


@pytest.mark.parametrize("moment", by_day(["start", "commit", "seal"], ["commit"]))
def test_a_kill_while_saving_loses_that_step_only(tmp_path, moment):
    code = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), moment], check=False).returncode
    assert code == 9
    # The run that comes next saves the lost step again, or saves at other steps.
    for name, before, lost, after in (("first", None, 1, 1), ("second", 1, 2, 7)):
        with opened(tmp_path / name) as checkpoints:
            found = checkpoints.latest()
            assert found == before or (moment == "start" and found == lost)
            checkpoints.save(after, a_state(after), {})
            assert checkpoints.latest() == after
            assert names(tmp_path / name) == {str(step) for step in (found, after) if step}
