"""Checkpoints in an object store: the laws of those on a disk, and what is a store's own. The store is a stand-in."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import stores
from dpo_jax.errors import UserError
from dpo_jax.training import steps
from dpo_jax.training.checkpoints import Checkpoints, read_part
from dpo_jax.training.settings import CheckpointSettings
from tests.support.object_store import empty_store
from tests.support.tiers import by_day

pytest.importorskip("gcsfs", reason="extra gcs is not installed")


@pytest.fixture
def store():
    with empty_store() as store:
        yield store


ADDRESS = "gs://pairs/runs/first"


def opened(tmp_path, said=None, **settings):
    steps.keep_in(tmp_path / "checkpoints", ADDRESS)
    say = print if said is None else said.append
    return Checkpoints(
        tmp_path / "checkpoints", CheckpointSettings(**settings), say=say, records=("m.jsonl", "a/*.jsonl")
    )


def a_state(step):
    rng = np.random.default_rng(step)
    return {
        "weights": {"w": jnp.asarray(rng.standard_normal((6, 5)), jnp.float32), "b": jnp.ones(3, jnp.bfloat16) * step},
        "step": jnp.int32(step),
    }


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


def with_steps(tmp_path, *saved, **settings):
    with opened(tmp_path, **settings) as checkpoints:
        for step in saved:
            checkpoints.save(step, a_state(step), {"step": step})


def first_parts(store):
    return {name.removeprefix("runs/first/").split("/")[0] for name in store.names("pairs")} - {"sealed", "records"}


def test_restore_inverts_save_and_the_disk_has_only_the_address(store, tmp_path):
    with_steps(tmp_path, 3)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [steps.ELSEWHERE]
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest() == 3 and checkpoints.kept() == [3]
        assert checkpoints.entries(3) == {"weights", "step"}
        state, record = checkpoints.restore(3, abstract(a_state(3)))
        part = read_part(checkpoints.place, 3, {"weights": abstract(a_state(3)["weights"])})
    assert same(state, a_state(3)) and record == {"step": 3} and same(part["weights"], a_state(3)["weights"])
    assert steps.newest_record(steps.at(tmp_path / "checkpoints")) == (3, {"step": 3})


@pytest.mark.parametrize(("settings", "kept"), [({}, {5, 6}), ({"keep": 1, "keep_every": 2}, {2, 4, 6})])
def test_old_steps_go_once_a_newer_one_is_sealed(store, tmp_path, settings, kept):
    with_steps(tmp_path, *range(1, 7), **settings)
    assert first_parts(store) == {str(step) for step in kept}


DAMAGES = ("gone", "other bytes", "cut", "manifest gone", "manifest changed", "other number")


@pytest.mark.parametrize("damage", by_day(DAMAGES, ["other bytes", "manifest changed"]))
def test_damage_is_noticed_by_what_the_store_says_and_the_older_step_used(store, tmp_path, damage):
    with_steps(tmp_path, 1, 2)
    data = next(name for name in store.names("pairs") if re.search(r"/2/state/ocdbt.process_0/d/", name))
    manifest, said = "runs/first/2/manifest.json", []
    if damage == "gone":
        del store.objects["pairs", data]
    elif damage == "other bytes":
        store.put(("pairs", data), bytes(len(store.objects["pairs", data].data)))
    elif damage == "cut":
        store.put(("pairs", data), store.objects["pairs", data].data[:-1])
    elif damage == "manifest gone":
        del store.objects["pairs", manifest]
    elif damage == "manifest changed":
        table = json.loads(store.objects["pairs", manifest].data)
        store.put(("pairs", manifest), json.dumps({**table, "files": {}}).encode())
    else:
        for name in [name for name in store.names("pairs") if name.startswith("runs/first/2/")]:
            store.objects["pairs", name.replace("/2/", "/4/")] = store.objects.pop(("pairs", name))
    with opened(tmp_path, said) as checkpoints:
        assert checkpoints.latest() == 1
        assert same(checkpoints.restore(1, abstract(a_state(1)))[0], a_state(1))
        checkpoints.save(2, a_state(2), {})
        assert checkpoints.latest() == 2
    assert said
    if damage not in ("manifest gone", "other number"):  # never deleted, and said what it is
        assert any(re.match(r"2\.bad-", name) for name in first_parts(store))


def test_a_folder_that_has_lost_all_its_steps_is_no_new_run(store, tmp_path):
    with_steps(tmp_path, 1)
    for name in store.names("pairs"):
        if "/1/" in name:
            del store.objects["pairs", name]
    with opened(tmp_path) as checkpoints, pytest.raises(UserError, match="though the run had saved some"):
        checkpoints.latest()


@pytest.mark.parametrize("left", ["state/d/0", "state/commit_success.txt", "commit_success.txt"])
def test_what_a_killed_run_was_writing_is_no_step_and_gives_way(store, tmp_path, left):
    with_steps(tmp_path, 1)
    store.put(("pairs", f"runs/first/2/{left}"), b"half")
    said = []
    with opened(tmp_path, said) as checkpoints:
        assert checkpoints.latest() == 1 and "never finished" in said[0]
        checkpoints.save(2, a_state(2), {})
        assert checkpoints.latest() == 2
    assert first_parts(store) == {"1", "2"} and ("pairs", "runs/first/2/state/d/0") not in store.objects


def test_a_kill_while_a_step_is_removed_leaves_one_that_was_never_finished(store, tmp_path, monkeypatch):
    with_steps(tmp_path, 1, 2)
    delete = stores.Store.delete

    def killed(self, names):
        delete(self, [*names][:1])
        raise SystemExit

    monkeypatch.setattr(stores.Store, "delete", killed)
    with pytest.raises(SystemExit):
        steps.at(tmp_path / "checkpoints").remove(1)
    monkeypatch.undo()
    said = []
    with opened(tmp_path, said, keep=9) as checkpoints:
        assert checkpoints.kept() == [2] and steps.at(tmp_path / "checkpoints").is_unfinished(1)
        assert checkpoints.latest() == 2 and said == []
        checkpoints.save(3, a_state(3), {})
    assert first_parts(store) == {"2", "3"}


def test_what_is_not_ours_is_moved_and_never_deleted(store, tmp_path):
    store.put(("pairs", "runs/first/2/thesis.tex"), b"years")
    with_steps(tmp_path, 2)
    kept = [name for name in store.names("pairs") if name.endswith("thesis.tex")]
    assert len(kept) == 1 and re.search(r"/2\.stray-", kept[0]) and store.objects["pairs", kept[0]].data == b"years"


def test_a_second_run_at_the_same_address_is_found_out(store, tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, a_state(1), {})
        checkpoints.wait()
        with_steps(tmp_path, 5)  # which began after step 1 and goes its own way
        with pytest.raises(UserError, match=r"checkpoint\.folder: another run writes to gs://pairs/runs/first"):
            checkpoints.save(2, a_state(2), {})
            checkpoints.wait()


def test_a_disk_that_has_lost_the_records_gets_them_back(store, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.jsonl").write_text('{"b": 2}\n')
    (tmp_path / "m.jsonl").write_text('{"a": 1}\n{"hal')
    with_steps(tmp_path, 1)
    for name in ("m.jsonl", "a/0.jsonl"):
        (tmp_path / name).unlink()
    (tmp_path / "m.jsonl").write_text("newer\n")  # what is there stays
    steps.at(tmp_path / "checkpoints").bring_records(tmp_path)
    assert (tmp_path / "m.jsonl").read_text() == "newer\n" and (tmp_path / "a/0.jsonl").read_text() == '{"b": 2}\n'
    (tmp_path / "m.jsonl").unlink()
    store.put(("pairs", "runs/first/records/../../escaped"), b"by whoever may write to the bucket")
    steps.at(tmp_path / "checkpoints").bring_records(tmp_path)
    assert not list(tmp_path.parent.parent.glob("escaped")) and not list(tmp_path.parent.glob("escaped"))
    assert (tmp_path / "m.jsonl").read_text() == '{"a": 1}\n'


def test_a_run_keeps_its_place(store, tmp_path):
    steps.keep_in(tmp_path / "new", ADDRESS)
    steps.keep_in(tmp_path / "new", ADDRESS)
    for other in (None, "gs://pairs/runs/second"):
        with pytest.raises(UserError, match=rf"^checkpoint\.folder: .* are in {ADDRESS}; set it to that"):
            steps.keep_in(tmp_path / "new", other)
    with Checkpoints(tmp_path / "old", CheckpointSettings()) as checkpoints:
        checkpoints.save(1, a_state(1), {})
    with pytest.raises(UserError, match=r"this run has checkpoints in .*old; leave it out"):
        steps.keep_in(tmp_path / "old", ADDRESS)


def test_a_store_that_refuses_is_one_line(store, tmp_path):
    store.shut = 403
    with pytest.raises(UserError, match=r"^checkpoint\.folder: gs://pairs/runs/first: .*credentials[^\n]*$"):
        opened(tmp_path)


def test_a_store_that_refuses_in_the_middle_is_one_line_and_keeps_what_it_has(store, tmp_path, monkeypatch):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, a_state(1), {})
        checkpoints.wait()
        store.shut = 403
        with pytest.raises(UserError, match="[^\n]*check the network[^\n]*"):
            checkpoints.save(2, a_state(2), {})
            checkpoints.wait()
        store.shut = None
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(stores.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs gcsfs; pip install 'dpo_jax\[gcs\]'"):
        steps.at(ADDRESS)


@pytest.mark.parametrize("wrong", ["s3://pairs/run", "/scratch/run", "gs://", "gs://pairs", "gs://pairs/", "pairs/run"])
def test_only_an_address_of_a_bucket_is_one(wrong):
    with pytest.raises(ValueError, match=r"must be gs://BUCKET/PATH"):
        CheckpointSettings(folder=wrong)
    assert CheckpointSettings(folder=f"{ADDRESS}/").folder == ADDRESS


def test_the_store_may_give_either_checksum():
    there = stores.Store(ADDRESS, "checkpoint.folder")
    assert there._about("x", {"size": "3", "crc32c": "A", "md5Hash": "B"}) == (3, "A")
    assert there._about("x", {"size": 3, "md5Hash": "B"}) == (3, "B")
    with pytest.raises(UserError, match=r"checkpoint\.folder: .* no checksum of x"):
        there._about("x", {"size": 3})
