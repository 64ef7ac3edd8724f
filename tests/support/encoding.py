"""Rows encoded as a run encodes them, for the tests of what becomes of them."""

import dataclasses
from pathlib import Path

import numpy as np

from dpo_jax.data.encode import collect
from dpo_jax.data.encoded import Encoded
from dpo_jax.data.layouts import Record
from dpo_jax.data.messages import BadRow
from dpo_jax.data.records import RowRules, read_record, stretches
from dpo_jax.data.report import Report
from dpo_jax.data.settings import DataSettings
from dpo_jax.data.sources import tables
from tests.support.tiny_rows import write


def settings(**changes) -> DataSettings:
    return DataSettings(train="x", **{"max_length": 512, **changes})


def encoded_rows(folder: Path, tokenizer, *rows, **changes) -> tuple[Encoded, Report]:
    return collect(str(write(folder / "rows.jsonl", *rows)), tokenizer, settings(**changes))


def records(*paths, report=None, first=None, **how) -> list[Record]:
    report, rules = report or Report(), RowRules(**how)
    opened = tables([str(path) for path in paths])
    found = []
    for stretch in stretches(opened, rules=rules, first=first, report=report, size=2):
        for row in stretch.rows:
            record = read_record(row, stretch, rules)
            report.note(row.notes, file=row.file, line=row.line)
            if isinstance(record, BadRow):
                report.drop(record.kind, record.reason, file=row.file, line=row.line)
            else:
                found.append(record)
    return found


def assert_equal(one: tuple[Encoded, Report], other: tuple[Encoded, Report]) -> None:
    """Two results are the same, but for where they came from."""
    for field in dataclasses.fields(Encoded):
        first, second = getattr(one[0], field.name), getattr(other[0], field.name)
        assert np.array_equal(first, second) and getattr(first, "dtype", 0) == getattr(second, "dtype", 0), field.name
    reports = [{**report.to_dict(), "cache": ""} for _, report in (one, other)]
    assert reports[0] == reports[1]
