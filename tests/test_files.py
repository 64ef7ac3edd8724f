"""Whole files, digests, and sizes in words."""

import hashlib
import os

import pytest

from dpo_jax import files


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0.00 KiB"), (512, "0.50 KiB"), (2**20 / 10, "0.10 MiB"), (2**20, "1.00 MiB"), (2**30 / 10 - 1, "102.40 MiB")]
    + [(2**30 / 10 + 1, "0.10 GiB"), (3 * 2**40, "3,072.00 GiB")],
)
def test_sizes_are_said_in_the_unit_of_which_there_is_a_tenth(count, text):
    assert files.size_text(count) == text


def test_digests_are_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"\xc3\xa4")
    expected = hashlib.sha256(b"\xc3\xa4").hexdigest()
    assert files.file_digest(tmp_path / "a") == files.digest_of("ä") == files.digest_of(b"\xc3\xa4") == expected


@pytest.mark.parametrize(("start", "size"), [(0, 10), (3, 4), (8, 9), (10, 1), (0, 0)])
def test_the_digest_of_a_piece_is_of_its_bytes(tmp_path, start, size):
    (tmp_path / "a").write_bytes(bytes(range(10)))
    expected = hashlib.sha256(bytes(range(10))[start : start + size]).hexdigest()
    assert files.piece_digest(tmp_path / "a", start, size) == expected


def test_a_file_that_is_written_again_or_replaced_has_another_state(tmp_path):
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_text("one"), other.write_text("two")
    known = files.state_of(path)
    assert files.state_of(path) == known and known[0] == 3
    os.utime(path, ns=(0, known[1] + 1))
    assert files.state_of(path) != known
    os.utime(other, ns=(0, known[1]))
    other.replace(path)
    assert files.state_of(path)[:2] == known[:2] and files.state_of(path) != known


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    files.write_whole(tmp_path / "a", "old")

    def fails(*_):
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fails)
        with pytest.raises(OSError, match="no room"):
            files.write_whole(tmp_path / "a", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}
    files.write_whole(tmp_path / "a", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new"}
