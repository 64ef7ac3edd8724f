"""How many processes do the work is invisible in what comes out, and none of them outlives it."""

import os
import signal

import psutil
import pytest

from dpo_jax.data import encode as encode_module
from dpo_jax.data import workers
from dpo_jax.data.encode import EncodingRules, collect
from dpo_jax.data.records import RowRules, stretches
from dpo_jax.data.report import Report
from dpo_jax.data.settings import DataSettings
from dpo_jax.data.sources import tables
from dpo_jax.data.templates import codec
from dpo_jax.errors import UserError
from tests.support import pieces
from tests.support.bad_rows import BAD_ROWS
from tests.support.encoding import assert_equal
from tests.support.tiny_rows import CHAT, GOOD, IMPLICIT, RANKED, UNPAIRED, byte_tokenizer, write


def gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(("processes", "alone"), [(0, 3), (1, 3), (2, 3), (3, 0), (2, 40)])
def test_results_come_in_the_order_of_the_work(processes, alone):
    found = workers.in_order(pieces.numbered, "x", range(12), workers=processes, alone=alone)
    assert list(found) == [("x", piece) for piece in range(12)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Good and bad rows of every kind, repeated, in files of several layouts."""
    folder = tmp_path_factory.mktemp("rows")
    bad = [row for good, row, _ in BAD_ROWS if good is GOOD]
    pairs = [{**GOOD, "prompt": f"p{n % 7}", "chosen": f"c{n % 3}", "rejected": f"c{n % 2}"} for n in range(20)]
    write(folder / "a.jsonl", b"{", *pairs, *bad, {**GOOD, "chosen": "y" * 90})
    write(folder / "b.jsonl", *[RANKED, {**RANKED, "ranks": [2, 1]}] * 3)
    write(folder / "c.jsonl", *[CHAT] * 4)
    write(folder / "d.jsonl", *[UNPAIRED, {**UNPAIRED, "label": False}] * 2)
    write(folder / "e.jsonl", IMPLICIT)
    return str(folder)


@pytest.mark.parametrize("first", [None, 23])
def test_the_number_of_processes_is_invisible_in_data_and_report(files, monkeypatch, first):
    monkeypatch.setattr(encode_module, "CHUNK", 5)
    monkeypatch.setattr(encode_module, "ALONE", 1)

    def run(processes):
        settings = DataSettings(train="x", max_length=64, workers=processes)
        return collect(files, byte_tokenizer(), settings, first=first)

    alone, shared = run(1), run(3)
    assert_equal(alone, shared)
    assert alone[1].lines() == shared[1].lines() and list(alone[1].counts) == list(shared[1].counts)
    if first is None:
        assert {"conflicting pair", "duplicate pair", "completion truncated"} <= set(alone[1].counts)


@pytest.mark.parametrize("size", [1, 4, 512])
def test_rows_of_a_call_are_invisible_in_data_and_report(files, monkeypatch, size):
    settings = DataSettings(train="x", max_length=64, workers=0)
    whole = collect(files, byte_tokenizer(), settings)
    monkeypatch.setattr(encode_module, "CHUNK", size)
    made = collect(files, byte_tokenizer(), settings)
    assert_equal(whole, made)


@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_raised_comes_at_its_piece(processes):
    seen = []
    with pytest.raises(UserError, match="piece 13: unlucky"):
        for _, piece in workers.in_order(pieces.numbered, "x", range(20), workers=processes, alone=0):
            seen.append(piece)
    assert seen == list(range(13))


def test_what_the_work_itself_raises_comes_after_the_results_before_it():
    def work():
        yield from range(5)
        raise UserError("rows.json:9: not JSON")

    found = workers.in_order(pieces.numbered, "x", work(), workers=2, alone=0)
    assert [next(found)[1] for _ in range(5)] == list(range(5))
    with pytest.raises(UserError, match="not JSON"):
        next(found)


def test_a_fault_of_ours_in_a_process_keeps_its_traceback():
    with pytest.raises(RuntimeError, match=r"in numbered(.|\n)*KeyError: 17"):
        list(workers.in_order(pieces.numbered, "x", [17], workers=2, alone=0))


def test_a_process_that_dies_is_one_line():
    with pytest.raises(UserError, match=r"^data.workers: .* \(killed by signal 9\); .*data.workers=1$"):
        list(workers.in_order(pieces.dies_at, 7, range(20), workers=2, alone=0))


def test_who_wants_no_more_leaves_no_process_behind():
    found = workers.in_order(pieces.process_of, None, range(50), workers=3, alone=0)
    seen = {next(found) for _ in range(10)}
    assert os.getpid() not in seen and not any(map(gone, seen))
    found.close()
    assert all(map(gone, seen))


@pytest.fixture
def listens_to_ctrl_c():
    """A shell's background jobs ignore it, and so would tests that run in one: they would wait for ever."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_no_process_behind(listens_to_ctrl_c):
    before = set(psutil.Process().children())
    with pytest.raises(KeyboardInterrupt):
        list(workers.in_order(pieces.interrupts, None, [0, 1, 0, 0], workers=2, alone=0))
    assert set(psutil.Process().children()) <= before


def test_little_work_starts_no_process(monkeypatch):
    monkeypatch.setattr(workers, "_Crew", None)
    found = workers.in_order(pieces.process_of, None, range(3), workers=4, alone=3)
    assert set(found) == {os.getpid()}


def test_a_process_that_tokenises_imports_no_jax(files):
    tokenizer = byte_tokenizer()
    coder = codec(tokenizer, template=None, control_tokens="text", ending="terminator")
    rows = stretches(tables(files), rules=RowRules(), first=None, report=Report(), size=512)
    rules = EncodingRules(coder, "keep_completion", 64, 4096)
    assert not any(workers.in_order(pieces.modules_after, rules, rows, workers=2, alone=0))
