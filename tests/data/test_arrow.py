"""Rows of tables are decoded where they are wanted, which is invisible in what they are."""

import gc
import pickle

import pyarrow
import pytest
from pyarrow import parquet

from dpo_jax.data import arrow, together
from dpo_jax.data import encode as encode_module
from dpo_jax.data.encode import collect
from dpo_jax.data.readers import reader_of, value_of
from dpo_jax.errors import UserError
from tests.support.encoding import assert_equal, settings
from tests.support.threads import everywhere
from tests.support.tiny_rows import byte_tokenizer

ROWS = [{"prompt": f"p{n}", "chosen": "y" * (n % 5 + 1), "rejected": "n"} for n in range(60)]


@pytest.fixture(params=["small groups", "large groups", "stream", "file"])
def table(request, tmp_path, monkeypatch):
    """A file of sixty rows that are decoded four at a time."""
    monkeypatch.setattr(arrow, "DECODED", 4)
    rows = pyarrow.Table.from_pylist(ROWS)
    if "groups" in request.param:
        monkeypatch.setattr(arrow, "SMALL", 6 if request.param == "small groups" else 5)
        parquet.write_table(rows, path := tmp_path / "rows.parquet", row_group_size=6)
        return path
    make = pyarrow.ipc.new_stream if request.param == "stream" else pyarrow.ipc.new_file
    with make(str(path := tmp_path / "rows.arrow"), rows.schema) as file:
        file.write_table(rows, max_chunksize=5)
    return path


def read(path):
    return list(reader_of(path, str(path))(path, str(path)))


def test_rows_are_the_same_late_and_in_another_process(table):
    rows = read(table)
    gc.collect()  # the file is closed
    assert [row.line for row in rows] == list(range(1, 61))
    sent = pickle.loads(pickle.dumps(rows[20:40]))
    assert [value_of(row) for row in rows] == ROWS and [value_of(row) for row in sent] == ROWS[20:40]
    again = pickle.loads(pickle.dumps(rows[20:40]))  # after they were decoded here
    assert [value_of(row) for row in again] == ROWS[20:40]


def test_what_is_sent_of_small_row_groups_is_where_they_are(tmp_path):
    wide = pyarrow.table({"prompt": ["p" * 5000] * 512})
    parquet.write_table(wide, path := tmp_path / "rows.parquet", row_group_size=200)
    rows = read(path)
    value_of(rows[0])
    assert len(pickle.dumps(rows)) < 32 * 512


def test_a_file_that_is_written_again_meanwhile_is_refused(tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path := tmp_path / "rows.parquet")
    rows = read(path)
    parquet.write_table(pyarrow.Table.from_pylist(ROWS[:50]), path)
    with pytest.raises(UserError, match=r"rows.parquet: was changed while it was read; start again"):
        value_of(rows[0])


def test_damage_inside_a_file_is_named(tmp_path):
    table = pyarrow.Table.from_pylist(ROWS)
    parquet.write_table(table, path := tmp_path / "rows.parquet", row_group_size=20, compression="snappy")
    place = parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[place : place + 30] = b"\xff" * 30
    path.write_bytes(data)
    rows = read(path)
    assert value_of(rows[3]) == ROWS[3]
    with pytest.raises(UserError, match=r"rows.parquet: not a Parquet file that can be read: "):
        value_of(rows[25])


def test_of_parquet_each_process_reads_its_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(encode_module, "CHUNK", 3)
    monkeypatch.setattr(together, "RUN", 2)  # six rows, which are a row group
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path := tmp_path / "rows.parquet", row_group_size=6)
    opened, whole = [], arrow._RowGroup.rows

    def rows(group, start, count):
        opened.append((id(group), group.number))
        return whole(group, start, count)

    monkeypatch.setattr(arrow._RowGroup, "rows", rows)
    options = settings(workers=1)
    found = everywhere(lambda place: collect(str(path), byte_tokenizer(), options, tmp_path / "c", place=place), 5)
    numbers = sorted(number for _, number in set(opened))
    assert numbers == [0] * 5 + list(range(1, 10))  # all look at the first, for the layout
    assert_equal(found[3], collect(str(path), byte_tokenizer(), options, tmp_path / "alone"))
