"""Data sets of the Hub, downloaded by `datasets` or read where they lie, from a stand-in for it."""

import random

import pyarrow
import pytest
from pyarrow import parquet

from dpo_jax.data import encode as encode_module
from dpo_jax.data import together
from dpo_jax.data.encode import collect
from dpo_jax.data.readers import value_of
from dpo_jax.data.sources import tables
from dpo_jax.errors import UserError
from tests.support.encoding import settings
from tests.support.hub_stand_in import Hub, serving, use
from tests.support.threads import everywhere
from tests.support.tiny_rows import GOOD, byte_tokenizer, write

NAME = "ada/pairs"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serving() as far:
        use(monkeypatch, far, tmp_path / "home")
        yield far


def rows_of(name: str, count: int) -> list[dict[str, str]]:
    """Rows that do not pack well, or all of them would come with the first bytes."""
    noise = random.Random(name)
    return [{**GOOD, "prompt": f"{name} {n}", "source": noise.randbytes(20_000).hex()} for n in range(count)]


def publish(hub: Hub, folder, files: dict[str, int]) -> str:
    """A data set of Parquet files of so many rows, six to a row group; returns its commit."""
    for file, count in files.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows_of(path.stem, count)), path, row_group_size=6)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nPairs.\n")
    return hub.add(NAME, folder)


def read(source: str, *, stream: bool) -> list[tuple[int, object]]:
    return [(row.line, value_of(row)) for table in tables(source, stream=stream) for row in table.rows()]


def test_a_stream_has_the_rows_of_what_is_downloaded(hub, tmp_path):
    publish(hub, tmp_path / "set", {"data/train-0.parquet": 20, "data/train-1.parquet": 3, "data/test-0.parquet": 2})
    whole, streamed = (read(NAME, stream=stream) for stream in (False, True))
    assert [line for line, _ in whole] == list(range(1, 24))
    assert [line for line, _ in streamed] == [*range(1, 21), *range(1, 4)]  # of each file
    assert (
        [value for _, value in whole]
        == [value for _, value in streamed]
        == rows_of("train-0", 20) + rows_of("train-1", 3)
    )
    assert read(f"{NAME}:test", stream=False) == read(f"{NAME}:test", stream=True)


def test_files_of_a_stream_are_named_in_the_report_and_known_by_their_commit(hub, tmp_path):
    folder = tmp_path / "set"
    first = publish(hub, folder, {"data/train-0.parquet": 3})
    options = settings(stream=True)
    made, again = (collect(NAME, byte_tokenizer(), options, tmp_path / "cache") for _ in range(2))
    assert list(made[1].files) == [f"{NAME}/data/train-0.parquet"] and made[0].num_pairs == 3
    assert again[1].cache.startswith("read from")
    second = publish(hub, folder, {"data/train-0.parquet": 4})
    assert first != second and collect(NAME, byte_tokenizer(), options, tmp_path / "cache")[0].num_pairs == 4


def test_a_stream_fetches_the_row_groups_that_are_wanted(hub, tmp_path, monkeypatch):
    publish(hub, tmp_path / "set", {"data/train-0.parquet": 60})
    size = (tmp_path / "set" / "data" / "train-0.parquet").stat().st_size
    monkeypatch.setattr("fsspec.spec.AbstractBufferedFile.DEFAULT_BLOCK_SIZE", 2**12)  # read ahead less than a group
    hub.sent = 0
    found, report = collect(NAME, byte_tokenizer(), settings(stream=True), first=5)
    assert (found.num_pairs, report.rows) == (5, 5) and size / 10 < hub.sent < size / 5


def test_each_process_fetches_its_share(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(encode_module, "CHUNK", 3)
    monkeypatch.setattr(together, "RUN", 2)  # six rows, which are a row group
    monkeypatch.setattr("fsspec.spec.AbstractBufferedFile.DEFAULT_BLOCK_SIZE", 2**12)
    publish(hub, tmp_path / "set", {"data/train-0.parquet": 60})
    size = (tmp_path / "set" / "data" / "train-0.parquet").stat().st_size
    options, hub.sent = settings(stream=True, workers=1), 0
    found = everywhere(lambda place: collect(NAME, byte_tokenizer(), options, tmp_path / "cache", place=place), 5)
    assert [one[0].num_pairs for one in found] == [60] * 5
    assert hub.sent < size * (1 + 5 / 10)  # each looks at the first row group, for the layout


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (f"{NAME}:test", r"^ada/pairs:test: no split 'test' for data.stream; give one of train$"),
        (f"{NAME}:train[:2]", r"for data.stream; a slice cannot be a stream: take data.first, or give one of train$"),
        ("ada/nothing", r"^ada/nothing: no such file, and not a data set that the Hub gives: "),
        ("ada/lines", r"^ada/lines: train.jsonl is not Parquet, and cannot be a stream; set data.stream=false$"),
    ],
)
def test_what_cannot_be_a_stream_is_refused(hub, tmp_path, source, said):
    publish(hub, tmp_path / "set", {"data/train-0.parquet": 3})
    (tmp_path / "lines").mkdir()
    write(tmp_path / "lines" / "train.jsonl", GOOD)
    hub.add("ada/lines", tmp_path / "lines")
    with pytest.raises(UserError, match=said) as caught:
        tables(source, stream=True)
    assert "\n" not in str(caught.value)
    assert source != "ada/lines" or read(source, stream=False) == [(1, GOOD)]


def test_a_hub_that_fails_in_the_middle_is_said(hub, tmp_path):
    publish(hub, tmp_path / "set", {"data/train-0.parquet": 20})
    rows = [row for table in tables(NAME, stream=True) for row in table.rows()]
    hub.faults["GET /datasets/ada/pairs/resolve"] = 403
    with pytest.raises(UserError, match=r"^ada/pairs/data/train-0.parquet: cannot be fetched: .*403.*; start again$"):
        value_of(rows[0])
