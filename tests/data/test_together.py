"""However many processes tokenise together, all have what one has by itself."""

import dataclasses

import numpy as np
import pytest

from dpo_jax.data import encode as encode_module
from dpo_jax.data import together
from dpo_jax.data.encode import collect
from dpo_jax.errors import UserError
from tests.support.encoding import assert_equal, settings
from tests.support.threads import everywhere
from tests.support.tiny_rows import CHAT, GOOD, byte_tokenizer, write


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two files of many pieces, with bad rows, duplicates, pairs that contradict each other, rankings and chats."""
    monkeypatch.setattr(encode_module, "CHUNK", 3)
    monkeypatch.setattr(together, "RUN", 2)
    ranked = {"prompt": "r", "completions": ["a", "b", "c"], "ranks": [2, 0, 1]}
    rows = [b"{" if n % 7 == 3 else {**GOOD, "prompt": f"p{n % 11}"} for n in range(40)]
    rows += [{**GOOD, "prompt": "p1", "chosen": GOOD["rejected"], "rejected": GOOD["chosen"]}, CHAT]
    first = write(tmp_path / "first.jsonl", *rows)
    return [str(first), str(write(tmp_path / "second.jsonl", *[{**ranked, "prompt": f"r{n}"} for n in range(10)]))]


def all_of(files, folder, count, **changes):
    options = settings(max_bad_fraction=1.0, **changes)
    return everywhere(lambda place: collect(files, byte_tokenizer(), options, folder, place=place), count)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_all_have_what_one_has_and_nothing_is_left_behind(files, tmp_path, count):
    alone = collect(files, byte_tokenizer(), settings(max_bad_fraction=1.0), tmp_path / "alone")
    found = all_of(files, tmp_path / "shared", count)
    for one in found:
        assert_equal(alone, one)
    assert found[0][1].counts == alone[1].counts and found[0][1].examples == alone[1].examples
    assert "conflicting pair" in alone[1].counts and "duplicate pair" in alone[1].counts
    assert found[0][1].cache.startswith("made, kept in") and found[1][1].cache.startswith("read from")
    (entry,) = (tmp_path / "shared").iterdir()
    (other,) = (tmp_path / "alone").iterdir()
    assert entry.name == other.name
    assert {path.name: path.read_bytes() for path in entry.glob("*.npy")} == {
        path.name: path.read_bytes() for path in other.glob("*.npy")
    }


@pytest.mark.parametrize("count", [1, 2, 7])
def test_pieces_are_numbered_as_they_are_shared(count):
    for process in range(count):
        own = [piece for piece in range(200) if together._whose(piece, count) == process]
        assert own == [together._number(turn, process, count) for turn in range(len(own))]


def test_each_row_is_tokenised_by_one_process(files, tmp_path, monkeypatch):
    seen, whole = [], encode_module.encode_rows
    monkeypatch.setattr(encode_module, "encode_rows", lambda rules, piece: seen.append(piece) or whole(rules, piece))
    all_of(files, tmp_path, 4, workers=1)
    lines = [(row.file, row.line) for piece in seen for row in piece.rows]
    assert len(lines) == len(set(lines)) == 52


def test_what_is_kept_is_read_by_all_and_checked_by_the_first(files, tmp_path, monkeypatch):
    first = all_of(files, tmp_path, 3)
    monkeypatch.setattr(encode_module, "in_order", None)  # nothing may be tokenised
    again = all_of(files, tmp_path, 3)
    assert all(report.cache.startswith("read from") for _, report in again)
    assert_equal(first[0], again[2])
    monkeypatch.undo()
    next(tmp_path.glob("data-*/rank.npy")).write_bytes(b"")
    assert all_of(files, tmp_path, 3)[0][1].cache.startswith("made again")


def test_a_cache_that_cannot_be_written_is_refused_by_all(files, tmp_path):
    def fails(place):
        folder = tmp_path / "a file"
        if place.owns:
            folder.write_text("mine")
        place.meet("written")
        return collect(files, byte_tokenizer(), settings(max_bad_fraction=1.0), folder, place=place)

    # Only process 0 writes the entry; the shares of others go beside it, which is refused as well.
    for error in everywhere(fails, 2):
        assert isinstance(error, UserError) and "data.cache" in str(error), error


def test_one_that_does_not_see_what_process_0_wrote_says_so(files, tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_jax.processes.here.SEEN_SECONDS", 0.1)
    all_of(files, tmp_path / "0", 1)

    def own(place):
        folder = tmp_path / str(place.process)
        return collect(files, byte_tokenizer(), settings(max_bad_fraction=1.0), folder, place=place)

    found = everywhere(own, 2)
    assert found[0][1].cache.startswith("read from")
    assert "process 1" in str(found[1]) and "does not see" in str(found[1])


def test_processes_that_see_other_data_are_refused_before_a_row_is_tokenised(files, tmp_path, monkeypatch):
    other = write(tmp_path / "other.jsonl", GOOD)
    monkeypatch.setattr(encode_module, "in_order", None)  # nothing may be tokenised

    def reads(place):
        sources = files if place.owns else [str(other)]
        return collect(sources, byte_tokenizer(), settings(max_bad_fraction=1.0), tmp_path / "cache", place=place)

    for error in everywhere(reads, 3):
        assert "differ: files of the data" in str(error) and "on process 1" in str(error)
    assert not (tmp_path / "cache").exists()


def test_processes_of_one_host_share_its_cores(monkeypatch):
    monkeypatch.setattr(encode_module, "processes", lambda wanted: 16 if wanted is None else wanted)

    def found(place):
        place.host = "b" if place.process == 5 else "a"
        return encode_module._workers(None, place), encode_module._workers(7, place)

    assert everywhere(found, 6) == [(3, 7)] * 5 + [(16, 7)]


@pytest.mark.parametrize("desirable", [None, True, False])
def test_a_share_comes_back_from_its_file(files, desirable):
    parts = []

    def made(rules, piece):
        parts.append(whole(rules, piece))
        return parts[-1]

    whole, encode_module.encode_rows = encode_module.encode_rows, made
    try:
        collect(files, byte_tokenizer(), settings(max_bad_fraction=1.0, workers=1))
    finally:
        encode_module.encode_rows = whole
    part = next(part for part in parts if part.sightings)
    part = part._replace(sightings=[one._replace(desirable=desirable) for one in part.sightings])
    again = together.from_bytes(together.to_bytes(part))
    assert again._replace(encoded=None) == part._replace(encoded=None)
    for field in dataclasses.fields(part.encoded):
        one, other = (getattr(each.encoded, field.name) for each in (part, again))
        np.testing.assert_array_equal(one, other) if field.name != "files" else None
    assert again.encoded.files == part.encoded.files
