"""Rows encoded as a run encodes them, for the tests of what becomes of them."""

import dataclasses
from pathlib import Path

import numpy as np

from dpo_jax.data.encode import collect
from dpo_jax.data.encoded import Encoded
from dpo_jax.data.report import Report
from dpo_jax.data.settings import DataSettings
from tests.support.tiny_rows import write


def settings(**changes) -> DataSettings:
    return DataSettings(train="x", **{"max_length": 512, **changes})


def encoded_rows(folder: Path, tokenizer, *rows, **changes) -> tuple[Encoded, Report]:
    return collect(str(write(folder / "rows.jsonl", *rows)), tokenizer, settings(**changes))


def assert_equal(one: tuple[Encoded, Report], other: tuple[Encoded, Report]) -> None:
    """Two results are the same, but for where they came from."""
    for field in dataclasses.fields(Encoded):
        first, second = getattr(one[0], field.name), getattr(other[0], field.name)
        assert np.array_equal(first, second) and getattr(first, "dtype", 0) == getattr(second, "dtype", 0), field.name
    reports = [{**report.to_dict(), "cache": ""} for _, report in (one, other)]
    assert reports[0] == reports[1]
