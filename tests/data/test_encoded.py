"""The folder that keeps encoded data: hits, misses, and damage."""

import dataclasses
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_jax import files
from dpo_jax.data import cache
from dpo_jax.data import encode as encode_module
from dpo_jax.data.cache import SETTINGS
from dpo_jax.data.encode import collect, encode
from dpo_jax.data.encoded import Encoded, head, of_units
from dpo_jax.data.layouts import Pair
from dpo_jax.data.settings import DataSettings
from dpo_jax.data.truncation import Cut
from dpo_jax.data.units import COLUMNS, Builder, Unit, joined
from dpo_jax.errors import UserError
from dpo_jax.files import held
from tests.support.encoding import assert_equal, settings
from tests.support.forests import random_encoded
from tests.support.tiny_rows import CHAT, CHATML, GOOD, byte_tokenizer, write


@pytest.fixture
def cached(tmp_path):
    path = write(tmp_path / "rows.jsonl", CHAT, GOOD, {**GOOD, "prompt": "p" * 30, "label": 0.3}, b"{")
    tokenizer = byte_tokenizer(template="{{ mood }}" + CHATML)

    def run(tokenizer=tokenizer, first=None, path=path, **changes):
        return collect(str(path), tokenizer, settings(**changes), tmp_path / "cache", first=first)

    return run, path, tmp_path / "cache"


def test_a_cached_result_is_the_same_and_is_not_made_again(cached, monkeypatch):
    run, _, folder = cached
    made = run()
    monkeypatch.setattr(encode_module, "codec", None)  # nothing may be tokenised
    read = run()
    assert_equal(made, read)
    assert made[1].cache.startswith("made, kept in") and read[1].cache.startswith("read from")
    (entry,) = folder.iterdir()
    assert {path.name for path in entry.iterdir()} == {"about.json", *(f"{name}.npy" for name in COLUMNS)}


def test_everything_that_the_result_depends_on_makes_a_new_entry(cached, tmp_path):
    run, path, folder = cached
    template = tmp_path / "template.jinja"
    template.write_text(CHATML + " ", "utf-8")
    changed = {
        "layout": {"layout": "pair"},
        "max_length": {"max_length": 20},
        "truncation": {"truncation": "keep_end"},
        "ending": {"ending": "template"},
        "control_tokens": {"control_tokens": "tokens"},
        "score_tool_results": {"score_tool_results": True},
        "max_characters": {"max_characters": 20},
        "columns": {"columns": {"prompt": "prompt", "chosen": "rejected", "rejected": "chosen"}},
        "as_chat": {"as_chat": True},
        "chat_template_kwargs": {"chat_template_kwargs": {"mood": "calm"}},
    }
    assert sorted(changed) == sorted(SETTINGS)
    # Settings that are left: which sources and where the cache is (arguments here), and what acts after encoding.
    others = {"train", "eval", "cache", "first", "shuffle", "max_bad_fraction", "template", "workers"}
    others |= {"eval_fraction", "stream"}
    assert set(DataSettings.model_fields) == {*SETTINGS, *others}
    runs = [*changed.values(), {"template": str(template)}, {"first": 2}, {"tokenizer": byte_tokenizer(bos=True)}]
    entries = 0
    for change in ({}, *runs):
        assert run(**change)[1].cache.startswith("made, kept in"), change
        entries += 1
        assert len(list(folder.iterdir())) == entries
    assert run(max_bad_fraction=0.5)[1].cache.startswith("read from")
    path.write_bytes(path.read_bytes().replace(b"yes", b"yep"))
    assert run()[1].cache.startswith("made, kept in")


@pytest.mark.parametrize("name", ["tokens.npy", "rank.npy", "about.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_a_damaged_entry_is_made_again_and_said_so(cached, name, damage):
    run, _, folder = cached
    made = run()
    path = next(folder.iterdir()) / name
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        at = data.index(b'"kept": ') + 8 if name == "about.json" else len(data) // 2
        data[at] ^= 1
        path.write_bytes({"flip": bytes(data), "cut": bytes(data[: at // 2]), "empty": b""}[damage])
    again = run()
    assert again[1].cache.startswith("made again, the one kept in") and "damaged" in again[1].cache
    assert_equal(made, again)
    assert run()[1].cache.startswith("read from")


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 700])
def test_what_is_kept_part_by_part_is_what_is_joined_in_memory(tmp_path, monkeypatch, rows, mapped):
    if mapped:
        monkeypatch.setattr("dpo_jax.data.cache.IN_MEMORY", 0)
    path = str(write(tmp_path / "rows.jsonl", *[{**GOOD, "prompt": f"p{number}"} for number in range(rows)], b"{"))
    more = str(write(tmp_path / "more.jsonl", *[{**GOOD, "prompt": f"q{number}"} for number in range(rows)], b"{"))
    sources, options = [path, more], settings(max_bad_fraction=1.0)
    kept, whole = (collect(sources, byte_tokenizer(), options, cache) for cache in (tmp_path / "cache", None))
    assert_equal(kept, whole)
    assert kept[0].num_pairs == 2 * rows
    if rows:
        assert kept[0].tokens.flags.writeable != mapped


def test_mapped_data_stays_readable_when_its_entry_is_made_again_or_deleted(cached, monkeypatch):
    monkeypatch.setattr("dpo_jax.data.cache.IN_MEMORY", 0)
    run, _, folder = cached
    first, _ = run()
    before = first.tokens.tolist()
    entry = next(folder.iterdir())
    (entry / "about.json").write_text("{}")
    run()
    shutil.rmtree(folder)
    assert first.tokens.tolist() == before


@pytest.mark.parametrize("before", ["nothing", "damaged"])
def test_of_two_that_make_the_same_entry_the_later_one_takes_what_stands_there(cached, monkeypatch, before):
    run, _, folder = cached
    if before == "damaged":
        run()
        next(folder.glob("data-*/rank.npy")).write_bytes(b"")
    move, others = cache._move, []

    def moved(source, target):
        if not others:
            others.append(None)
            others[0] = run()  # another process, at the last moment
        return move(source, target)

    monkeypatch.setattr(cache, "_move", moved)
    made = run()
    assert_equal(made, others[0])
    assert len(list(folder.iterdir())) == 1 and run()[1].cache.startswith("read from")


def test_what_a_killed_process_had_begun_is_swept_and_what_a_living_one_has_is_not(cached):
    run, _, folder = cached
    dead, alive, fresh = (folder / f".data-x.{letter * 32}.tmp" for letter in "abc")
    for path in (dead, alive, fresh):
        path.mkdir(parents=True)
    (dead / ".lock").touch()
    with held(alive):
        run()
        assert alive.exists() and fresh.exists() and not dead.exists()
    assert not (alive / ".lock").exists()


def test_a_folder_whose_holder_ends_while_it_is_looked_at_is_not_swept(tmp_path, monkeypatch):
    folder, flock = tmp_path / f".data-x.{'a' * 32}.tmp", files.fcntl.flock
    folder.mkdir()
    holder = held(folder)
    holder.__enter__()

    def ends_first(lock, how):
        holder.__exit__(None, None, None)
        flock(lock, how)

    monkeypatch.setattr(files.fcntl, "flock", ends_first)
    files.sweep_unheld(tmp_path)
    assert list(folder.iterdir()) == []  # it is there, and nothing of ours in it


def test_an_error_of_reading_is_not_taken_for_one_of_the_cache(cached, monkeypatch):
    run, path, folder = cached

    def fails(*_):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(encode_module, "encode_rows", fails)
    with pytest.raises(OSError, match="rows.jsonl"):
        run()
    assert list(folder.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_refused(cached, tmp_path):
    run, _, folder = cached
    folder.write_text("a file")
    with pytest.raises(UserError, match=r"data.cache=.*cannot be written"):
        run()


def test_a_cached_result_is_checked_against_the_fraction_of_today(tmp_path):
    path = str(write(tmp_path / "rows.jsonl", GOOD, b"{"))
    encode(path, byte_tokenizer(), settings(max_bad_fraction=0.5), tmp_path / "cache")
    with pytest.raises(UserError, match="1 of 2 rows are bad"):
        encode(path, byte_tokenizer(), settings(max_bad_fraction=0.4), tmp_path / "cache")


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "p", "completion": "a", "label": True}, {"prompt": "p", "completion": "a", "label": False}],
        [{"messages": CHAT["prompt"] + CHAT["chosen"]}] * 2,
        [{"prompt": "p", "completions": ["a", "b", "c"], "scores": [1, 1, 2], "label": 0.7, "margin": 2}],
    ],
)
def test_a_round_trip_keeps_labels_ranks_and_counts(tmp_path, rows):
    path = str(write(tmp_path / "rows.jsonl", *rows))
    made, read = (collect(path, byte_tokenizer(), settings(), tmp_path / "cache") for _ in range(2))
    assert read[1].cache.startswith("read from")
    assert_equal(made, read)
    assert read[1].pairs + read[1].singles == read[0].num_pairs == 2


def test_each_completion_has_its_own_part_of_the_list_of_scored_tokens(tmp_path):
    path = str(write(tmp_path / "rows.jsonl", CHAT, GOOD, {"prompt": "p", "completions": ["a"] * 2, "ranks": [1, 2]}))
    encoded, _ = collect(path, byte_tokenizer(), settings())
    parts = [range(start, start + length) for start, length in zip(*starts_and_lengths(encoded), strict=True)]
    assert [place for part in parts for place in part] == list(range(encoded.num_scored))
    assert encoded.scored_start.dtype == np.int64 and encoded.scored_start is encoded.scored_start


def starts_and_lengths(encoded: Encoded) -> tuple[list[int], list[int]]:
    return encoded.scored_start.tolist(), encoded.completion_length.tolist()


@given(st.data())
def test_what_is_not_scored_is_a_mask_over_the_tokens_as_spans(case):
    """Joined, one part after another; of all units, of the first ones and of some."""
    length, start = st.integers(1, 12), st.integers(0, 14)
    texts = st.lists(st.tuples(length, st.lists(st.tuples(start, start), max_size=4)), min_size=2, max_size=4)
    parts = case.draw(st.lists(st.lists(texts, min_size=1, max_size=3), min_size=1, max_size=3))
    whole, masks = joined(built(units) for units in parts), []
    for units in parts:
        masks += [[mask_of(*text) for text in unit[1:]] for unit in units]
    assert scored(whole) == [mask for unit in masks for mask in unit]
    kept = np.asarray(case.draw(st.lists(st.booleans(), min_size=len(masks), max_size=len(masks))))
    some = of_units(whole, kept)
    assert scored(some) == [mask for unit, stays in zip(masks, kept, strict=True) if stays for mask in unit]
    first = head(whole, 1)
    assert scored(first) == masks[0] and (first.unscored_end <= len(first.tokens)).all()


def built(units: list[list[tuple[int, list[tuple[int, int]]]]]) -> Encoded:
    """Units of texts, each a length and ranges of it that are not scored; the first text is the prompt."""
    builder = Builder("rows.jsonl")
    for line, ((prompt, _), *answers) in enumerate(units, 1):
        completions, unscored = [[7] * size for size, _ in answers], [ranges for _, ranges in answers]
        pair = Pair(chosen=0, rejected=len(answers) - 1)
        unit = Unit([7] * prompt, completions, unscored, (pair,), "rows.jsonl", line, keys=(line, line))
        cuts = [kept_of(size) for size, _ in answers]
        builder.add(unit, Cut([0] * len(cuts), [cut.start for cut in cuts], [len(cut) for cut in cuts]))
    return builder.build()


def kept_of(length: int) -> range:
    """What is kept of a completion; of a longer one, neither its beginning nor its end."""
    return range(length // 4, length - length // 5)


def mask_of(length: int, ranges: list[tuple[int, int]]) -> list[bool]:
    return [not any(start <= place < end for start, end in ranges) for place in kept_of(length)]


def scored(encoded: Encoded) -> list[list[bool]]:
    """Of each completion, said in two ways that have to agree."""
    masks = [encoded.scored_of(completion).tolist() for completion in range(encoded.num_completions)]
    assert [sum(mask) for mask in masks] == encoded.scored_length.tolist()
    return masks


def test_the_list_of_scored_tokens_may_be_longer_than_an_int32_counts():
    encoded = random_encoded(units=3)
    long = dataclasses.replace(encoded, completion_length=np.full_like(encoded.completion_length, 2**30))
    assert long.scored_start.tolist() == [number * 2**30 for number in range(6)] and long.num_scored == 6 * 2**30


def test_a_pair_comes_from_the_row_of_its_unit():
    encoded = random_encoded(units=4, completions=(3, 3))
    assert [encoded.origin(pair) for pair in (0, 2, 3, 11)] == [f"made up:{line}" for line in (1, 1, 2, 4)]
