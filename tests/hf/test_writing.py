"""Files of tensors that several processes write at once: the folder that one process writes, each file by one."""

import itertools
import json
import threading

import jax
import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st

from dpo_jax.errors import UserError
from dpo_jax.hf import checkpoint, tensors, writing
from dpo_jax.hf.checkpoint import load_hf, save_hf
from dpo_jax.hf.configs import read_spec
from dpo_jax.hf.shards import MAX_BYTES, by_file, split, spread
from dpo_jax.hf.tensors import TensorInfo, Tensors
from dpo_jax.model.decoder import Model
from tests.support.hub_llama_configs import KIN
from tests.support.threads import everywhere
from tests.support.tiny_folders import write_folder

SHARD = 30_000
"""Bytes of a file: the small folder then has several."""


def infos(**sizes):
    return {file: {f"{file}.{n}": TensorInfo(file, "F32", (size,)) for n in range(2)} for file, size in sizes.items()}


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_files_are_shared_out_by_their_bytes(count):
    files = infos(a=5, b=1, c=4, d=2, e=3)
    by = writing.writers(files, count)
    load = [
        sum(2 * {"a": 5, "b": 1, "c": 4, "d": 2, "e": 3}[file] for file in by if by[file] == p) for p in range(count)
    ]
    assert sorted(by) == sorted(files) and max(load) - min(load) == 2 * {1: 0, 2: 1, 3: 0, 8: 5}[count]
    assert sum(load) == 30
    found = list(writing.gathered(files, by))
    assert sorted(found) == sorted((file, name) for file, part in files.items() for name in part)
    for process in range(count):  # each process meets its own files one after the other, as it writes them
        mine = [one for one in found if by[one[0]] == process]
        assert mine == [(file, name) for file in files if by[file] == process for name in files[file]]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    source = write_folder(tmp_path_factory.mktemp("writing") / "source")
    model = load_hf(source)
    return source, Model(model.spec, jax.tree.map(lambda leaf: leaf * 1.5, model.params))


def saved(monkeypatch, small, target, count, seen=None, limit=SHARD):
    """What `save_hf` gives each of so many processes, and who wrote which file."""
    source, model = small
    at, wrote = threading.local(), {}
    real, finds = tensors.write_tensors, checkpoint.is_seen

    def write(path, *rest):
        wrote[path.name] = threading.current_thread()  # its number may be another thread's later
        return real(path, *rest)

    def one(place):
        at.place = place
        return save_hf(model, target, source, max_shard_bytes=limit)

    for module in (checkpoint, writing):
        monkeypatch.setattr(module, "here", lambda: at.place)
    monkeypatch.setattr(checkpoint, "is_seen", lambda path: finds(path) and at.place.process != seen)
    monkeypatch.setattr(tensors, "write_tensors", write)
    return everywhere(one, count), wrote


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("count", [2, 3, 16])
def test_several_processes_write_the_folder_of_one(count, small, tmp_path, monkeypatch):
    source, model = small
    alone = save_hf(model, tmp_path / "one", source, max_shard_bytes=SHARD)
    said, wrote = saved(monkeypatch, small, tmp_path / "several", count)
    assert said == [alone, *[None] * (count - 1)] and alone.weights > 0
    assert contents(tmp_path / "several") == contents(tmp_path / "one")
    files = [name for name in contents(tmp_path / "one") if name.endswith(".safetensors")]
    assert len(files) >= 4 and len(set(wrote.values())) == min(count, len(files))
    assert {path.name for path in tmp_path.iterdir()} == {"one", "several"}


@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_process_has_a_file_to_write_where_the_source_has_several(count, tmp_path, monkeypatch):
    source = write_folder(tmp_path / "source", shards=2)
    model = load_hf(source)
    model = Model(model.spec, jax.tree.map(lambda leaf: leaf * 1.5, model.params))
    alone = save_hf(model, tmp_path / "one", source)
    said, wrote = saved(monkeypatch, (source, model), tmp_path / "several", count, limit=None)
    assert said == [alone, *[None] * (count - 1)] and len(wrote) == len(set(wrote.values())) == count
    one, several = (Tensors(tmp_path / name) for name in ("one", "several"))
    assert list(one.infos) == list(several.infos)
    for name in one.infos:
        np.testing.assert_array_equal(one.read(name), several.read(name))
    assert (contents(tmp_path / "one") == contents(tmp_path / "several")) == (count == 2)


def test_a_model_in_one_file_stays_in_one(small, tmp_path, monkeypatch):
    _, wrote = saved(monkeypatch, small, tmp_path / "several", 3, limit=None)
    assert list(wrote) == [tensors.SINGLE]


@drawn(sizes=st.lists(st.integers(1, 30), min_size=2, max_size=9), count=st.integers(3, 9), cut=st.integers(1, 8))
def test_files_are_as_equal_as_the_order_of_tensors_allows(sizes, count, cut):
    cut = min(cut, len(sizes) - 1)
    given = {str(n): TensorInfo(f"{n >= cut}", "F32", (size,)) for n, size in enumerate(sizes)}
    files = by_file(spread(given, count))
    assert [name for part in files.values() for name in part] == list(given) and len(files) <= count
    most = max(writing.size_of_file(part) for part in files.values()) // 4
    ways = itertools.combinations(range(1, len(sizes)), min(count, len(sizes)) - 1)
    assert most == min(max(sum(sizes[a:b]) for a, b in itertools.pairwise([0, *cuts, len(sizes)])) for cuts in ways)


def test_eight_hosts_write_an_eighth_each_of_an_8b_model(tmp_path):
    """Four files in the hub's folder: a host of the four that wrote had 2.46 of an equal part."""
    (tmp_path / "config.json").write_text(json.dumps(KIN["Llama-3.1-8B-Instruct"]))
    entries = checkpoint.entries_of(read_spec(tmp_path), tmp_path)
    infos = {entry.name: TensorInfo(tensors.SINGLE, "BF16", entry.shape) for entry in entries}
    files = by_file(spread(split(infos, MAX_BYTES), 8))
    loads = [writing.size_of_file(part) for part in files.values()]
    assert len(loads) == 8 and max(loads) <= 1.2 * sum(loads) / 8


def test_where_one_process_does_not_see_the_folder_the_first_writes_all_of_it(small, tmp_path, monkeypatch):
    source, model = small
    alone = save_hf(model, tmp_path / "one", source, max_shard_bytes=SHARD)
    said, wrote = saved(monkeypatch, small, tmp_path / "several", 3, seen=2)
    assert said == [alone, None, None] and len(set(wrote.values())) == 1
    assert contents(tmp_path / "several") == contents(tmp_path / "one")


def test_a_folder_that_is_not_free_is_refused_on_every_process(small, tmp_path, monkeypatch):
    (tmp_path / "several").mkdir()
    (tmp_path / "several" / "mine").write_text("x")
    said, wrote = saved(monkeypatch, small, tmp_path / "several", 3)
    assert all(isinstance(one, UserError) and "is not empty" in str(one) for one in said) and not wrote


def test_a_weight_that_cannot_be_written_ends_every_process(small, tmp_path, monkeypatch):
    source, model = small
    bad = Model(model.spec, jax.tree.map(lambda leaf: leaf.at[-1].set(np.nan), model.params))
    said, _ = saved(monkeypatch, (source, bad), tmp_path / "several", 3)
    assert all(isinstance(one, UserError) and "NaN" in str(one) for one in said) and not list(tmp_path.iterdir())


def test_what_ends_the_writing_is_raised_where_the_tensors_come_from():
    files = infos(a=2, b=2)

    def write(file, fetch):
        fetch(f"{file}.0")
        raise OSError("No space left on device")

    def one(place):
        writing_here.place = place
        try:
            return writing.write_all(files, writing.writers(files, 2), write, lambda name: np.zeros(2, np.float32))
        except OSError as error:
            return str(error)

    writing_here = threading.local()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "here", lambda: writing_here.place)
        assert everywhere(one, 2) == ["No space left on device"] * 2
