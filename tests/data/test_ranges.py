"""However many processes look at a file together, its rows and digest are those of one, and each reads its share."""

import builtins
import pickle
import threading
from collections import Counter

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as tried
from hypothesis import strategies as st

from dpo_jax.data import ranges
from dpo_jax.data.ranges import RangedFile
from dpo_jax.data.readers import read_lines, value_of
from dpo_jax.data.sources import tables
from dpo_jax.errors import UserError
from dpo_jax.processes.here import Here
from tests.support.threads import everywhere
from tests.support.tiny_rows import GOOD, write

LINES = st.lists(
    st.sampled_from(
        [b"", b"  ", b"\r", b'{"a": 1}', b'{"b": "\xc3\xa9"}\r', b"{", b"\xff", b'{"c": "%s"}' % (b"x" * 90)]
    )
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(ranges, "PIECE", 32)
    monkeypatch.setattr(ranges, "SIGNED", 8)
    monkeypatch.setattr(ranges, "GROUP", 3)


def seen(rows):
    return [(row.file, row.line, repr(value_of(row)), row.notes) for row in rows]


@pytest.mark.parametrize("count", [2, 3, 5])
@tried(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(lines=LINES, ends=st.booleans())
@example(lines=[b"{}"] * 40, ends=True)
@example(lines=[b"x" * 200, b"", b"{}"], ends=False)
def test_rows_by_ranges_are_the_rows(tmp_path, count, lines, ends):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * ends)

    def looks(place):
        file = RangedFile(path, "rows", True)
        digest = file.digest(place)
        found = pickle.loads(pickle.dumps(list(file.rows() or ())))  # as for workers
        return digest, seen(found)

    alone = RangedFile(path, "rows", True).digest(Here())
    assert everywhere(looks, count) == [(alone, seen(read_lines(path, "rows")))] * count


def test_the_digest_is_of_every_byte(tmp_path):
    path = write(tmp_path / "rows.jsonl", *[GOOD] * 5)
    data, digests = path.read_bytes(), set()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        digests.add(RangedFile(path, "rows", True).digest(Here()))
    path.write_bytes(data)
    digests.add(RangedFile(path, "rows", True).digest(Here()))
    path.write_bytes(data + b"\n")
    assert len(digests | {RangedFile(path, "rows", True).digest(Here())}) == len(data) + 2


def test_each_process_reads_its_share_of_the_file_and_of_its_rows_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(ranges, "PIECE", 4096)
    path, read = write(tmp_path / "rows.jsonl", *[{**GOOD, "prompt": f"{n:04}"} for n in range(4000)]), Counter[int]()

    class Counted:
        def __init__(self, path, mode):
            self._file = builtins.open(path, mode)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

        def __getattr__(self, name):
            def counted(*arguments):
                found = getattr(self._file, name)(*arguments)
                read[threading.get_ident()] += len(found) if isinstance(found, bytes) else 0
                return found

            return counted

    monkeypatch.setattr(ranges, "open", Counted, raising=False)

    def reads(place):
        (table,) = tables(str(path))
        before = read[threading.get_ident()]
        table.digest(place)
        looked = read[threading.get_ident()]
        rows = list(table.rows())
        assert read[threading.get_ident()] == looked and len(rows) == 4000
        mine = [value_of(row)["prompt"] for row in rows[place.process * 1000 : (place.process + 1) * 1000]]
        return mine, looked - before, read[threading.get_ident()] - looked

    size = path.stat().st_size
    found = everywhere(reads, 4)
    assert [prompt for mine, *_ in found for prompt in mine] == [f"{n:04}" for n in range(4000)]
    for _, looked, wanted in found:  # 8 bytes of each piece are looked at by all; a few lines are read twice
        assert looked <= size / 4 * 1.1 and wanted <= size / 4 * 1.1


def test_another_file_of_that_name_is_refused(tmp_path):
    for name, rows in (("0", [GOOD] * 9), ("1", [GOOD] * 8)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "rows.jsonl", *rows)

    def looks(place):
        return RangedFile(tmp_path / str(place.process) / "rows.jsonl", "rows.jsonl", True).digest(place)

    assert all("rows.jsonl is" in str(found) and "on process 1" in str(found) for found in everywhere(looks, 2))


def test_a_file_that_changes_meanwhile_is_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", *[GOOD] * 9)

    def reads(place):
        (table,) = tables(str(path))
        table.digest(place)
        place.meet("looked")
        if place.owns:
            path.write_bytes(path.read_bytes() + b"{}\n")
        place.meet("changed")
        return [value_of(row) for row in table.rows()]

    found = everywhere(reads, 2)
    assert all(isinstance(one, UserError) and "was changed while it was read" in str(one) for one in found)


@pytest.mark.parametrize("name, content", [("a.jsonl", b"\xef\xbb\xbf{}\n{}\n"), ("a.json", b"[{},\n{}]")])
def test_what_has_no_plain_lines_is_read_by_all(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)

    def reads(place):
        (table,) = tables(str(tmp_path / name))
        table.digest(place)
        return seen(table.rows())

    assert everywhere(reads, 2) == [reads(Here())] * 2
