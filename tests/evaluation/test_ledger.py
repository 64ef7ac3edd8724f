"""A file that only grows: what is in it stays, whatever happens while a line is written."""

import errno

import pytest

from dpo_jax.errors import UserError
from dpo_jax.evaluation.ledger import Ledger


def test_rows_come_back_and_a_cut_line_is_taken_off(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    with Ledger(path) as ledger:
        ledger.add({"a": "ü\n\x1b"})
        ledger.add({"a": 2})
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        with Ledger(path) as ledger:
            assert ledger.rows == [{"a": "ü\n\x1b"}, {"a": 2}][: whole[:size].count(b"\n")]
            ledger.add({"b": 3})
        with Ledger(path) as ledger:
            assert ledger.rows[-1] == {"b": 3} and len(ledger.rows) == 1 + whole[:size].count(b"\n")


def test_one_process_writes_at_a_time(tmp_path):
    with Ledger(tmp_path / "rows.jsonl"), pytest.raises(UserError, match="another process"):
        Ledger(tmp_path / "rows.jsonl")


def test_a_line_that_somebody_spoiled_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\nnonsense\n{"a": 2}\n')
    with pytest.raises(UserError, match="rows.jsonl:2: is no JSON"):
        Ledger(path)


def test_a_full_disk_leaves_no_half_a_line(tmp_path, monkeypatch):
    with Ledger(tmp_path / "rows.jsonl") as ledger:
        ledger.add({"a": 1})
        real = ledger._file

        class Full:
            def write(self, data):
                if len(data) < 5:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return real.write(data[:4])

            def __getattr__(self, name):
                return getattr(real, name)

        monkeypatch.setattr(ledger, "_file", Full())
        with pytest.raises(OSError, match="rows.jsonl"):
            ledger.add({"a": 2})
        monkeypatch.undo()
        ledger.add({"a": 3})
        assert ledger.rows == [{"a": 1}, {"a": 3}]
    with Ledger(tmp_path / "rows.jsonl") as again:
        assert again.rows == [{"a": 1}, {"a": 3}]
