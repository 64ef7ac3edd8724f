"""Folders are read and written tensor by tensor: what that takes beyond the model stays below two of its files."""

import sys
import weakref

import pytest

from dpo_jax.hf import tensors
from dpo_jax.hf.checkpoint import load_hf, save_hf
from tests.support.tiny_folders import write_folder
from tools.export_memory import in_a_process_of_its_own


def test_a_tensor_is_let_go_before_the_next_one_is_fetched(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "source", dtype="bfloat16", shards=2)
    alive: list[weakref.ref] = []
    held = []
    real = tensors.write_tensors

    def write(path, infos, metadata, fetch):
        def counted(name):
            held.append(sum(one() is not None for one in alive))
            array = fetch(name)
            alive.append(weakref.ref(array))
            return array

        return real(path, infos, metadata, counted)

    monkeypatch.setattr(tensors, "write_tensors", write)
    save_hf(load_hf(source), tmp_path / "export", source)
    assert len(held) == len(tensors.Tensors(source).infos) and not any(held)


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps the peak of a process")
def test_import_and_export_take_less_than_two_files_beyond_the_model():
    """The model, in float32, is as large as eight of its files; about one of them was measured."""
    peaks = in_a_process_of_its_own(shards=4, dtype="bfloat16")
    assert peaks.model > 7 * peaks.shard and peaks.ok, peaks
