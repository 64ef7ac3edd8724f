"""Rows in memory become the file that somebody would have written of them."""

import datetime
import json

import datasets
import numpy as np
import pytest

from dpo_jax.data.sources import read_rows
from dpo_jax.errors import UserError
from dpo_jax.python import rows
from tests.support.tiny_rows import CHAT, GOOD, IDS, RANKED, UNPAIRED


class Broken(Exception):
    pass


ENDLESS = {"prompt": []}
ENDLESS["prompt"].append(ENDLESS)


def values(path):
    return [row.value for row in read_rows(str(path))]


@pytest.mark.parametrize("row", [CHAT, GOOD, IDS, RANKED, UNPAIRED], ids=["chat", "text", "ids", "ranked", "single"])
def test_rows_come_back_as_they_were(tmp_path, row):
    assert values(rows.keep([row, row], tmp_path, "train")) == [row, row]


def test_a_list_a_data_set_and_an_iterator_are_the_same_file(tmp_path):
    some = [{**GOOD, "prompt": f"Grüße {number} \u2028"} for number in range(3)]
    files = {rows.keep(made, tmp_path, "train") for made in (some, iter(some), datasets.Dataset.from_list(some))}
    assert len(files) == 1 and values(*files) == some
    assert [path.name for path in tmp_path.iterdir()] == [path.name for path in files]


def test_lists_by_column_are_rows(tmp_path):
    columns = {"prompt": ["a", "b"], "chosen": ["yes", "no"], "rejected": ["no", "yes"]}
    kept = values(rows.keep(columns, tmp_path, "train"))
    assert kept == [
        {"prompt": "a", "chosen": "yes", "rejected": "no"},
        {"prompt": "b", "chosen": "no", "rejected": "yes"},
    ]


def test_other_rows_are_another_file(tmp_path):
    assert rows.keep([GOOD], tmp_path, "train") != rows.keep([GOOD, GOOD], tmp_path, "train")


def test_arrays_and_their_numbers_are_lists_and_numbers(tmp_path):
    ids = {"prompt_ids": np.array([70, 71]), "chosen_ids": np.array([71]), "rejected_ids": [np.int64(72)]}
    assert values(rows.keep([{**ids, "weight": np.float32(0.5)}], tmp_path, "train")) == [
        {"prompt_ids": [70, 71], "chosen_ids": [71], "rejected_ids": [72], "weight": 0.5}
    ]


def test_what_json_has_not_is_left_out_of_its_row_and_told(tmp_path):
    left = {}
    some = [
        {**GOOD, "when": datetime.date(2024, 1, 1), "raw": b"x", "n": np.int64(3), "ids": np.array([1, 2])},
        {
            "prompt": [{"role": "user", "content": "Hi", "at": np.datetime64("2024-01-01")}],
            "tags": [{1}],
            "n": np.True_,
        },
        {**GOOD, ("a", "b"): 1},
    ]
    assert values(rows.keep(some, tmp_path, "train", left)) == [
        {**GOOD, "n": 3, "ids": [1, 2]},
        {"prompt": [{"role": "user", "content": "Hi"}], "n": True},
        GOOD,
    ]
    assert left == {
        "when": "(first in row 1, of type date)",
        "raw": "(first in row 1, of type bytes)",
        "prompt[0].at": "(first in row 2, of type date)",
        "tags": "(first in row 2, of type set)",
        "('a', 'b')": "(first in row 3, of type tuple, which names no column)",
    }


@pytest.mark.parametrize(
    ("said", "adds"),
    [
        ("row 1: no 'prompt' (columns: a)", "prompt was"),
        ("columns a, b fit no layout", "prompt was; prompt[0].content was"),
        ("prompt[0] has no content", "prompt[0].content was"),
        ("the prompt is empty", None),
    ],
)
def test_an_error_about_a_column_that_was_left_out_says_so(said, adds):
    with pytest.raises(UserError) as caught, rows.explained({"prompt": "was", "prompt[0].content": "was"}):
        raise UserError(said)
    assert str(caught.value) == said + (f"; left out as JSON has no such value: {adds}" if adds else "")


@pytest.mark.parametrize("made", [np.array, list, tuple])
def test_columns_may_be_arrays(tmp_path, made):
    columns = {"prompt": made(["a", "b"]), "score": made([1.5, 2.0])}
    assert values(rows.keep(columns, tmp_path, "train")) == [
        {"prompt": "a", "score": 1.5},
        {"prompt": "b", "score": 2.0},
    ]


def test_half_a_character_is_left_to_the_reader_to_name(tmp_path):
    (row,) = values(rows.keep([{**GOOD, "chosen": "\ud83d"}], tmp_path, "train"))
    assert row["chosen"] == "\ud83d"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "holds no row"),
        ([GOOD, "text"], 'row 2 is of type str, not a dict of columns such as {"prompt"'),
        ([GOOD, {"prompt": datetime.date(2026, 1, 1)}], "row 2 cannot be written as JSON (TypeError: date is neither"),
        ([ENDLESS], "row 1 cannot be written as JSON (ValueError: Circular"),
        ([{("a", "b"): 1}], "row 1 cannot be written as JSON"),
        (7, "is of type int; give a path, or rows"),
        ({"prompt": ["a"], "chosen": ["b", "c"]}, "columns must be of the same length: prompt has 1, chosen has 2"),
        ({"train": datasets.Dataset.from_list([GOOD])}, "is a dict whose 'train' is no list; give rows, lists"),
    ],
)
def test_what_is_no_row_is_refused_and_nothing_is_left(tmp_path, given, said):
    with pytest.raises(UserError) as caught:
        rows.keep(given, tmp_path, "train")
    assert str(caught.value).startswith("train: ") and said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_an_iterator_raises_is_raised_and_nothing_is_left(tmp_path):
    def broken():
        yield GOOD
        raise Broken

    with pytest.raises(Broken):
        rows.keep(broken(), tmp_path, "train")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("named", ["a.jsonl", ["a.jsonl", "b.jsonl"], None, 0.5, True])
def test_a_path_is_no_rows(named, tmp_path):
    assert not rows.are_rows(named) and not rows.are_rows(tmp_path)


@pytest.mark.parametrize("some", [[], [GOOD], ["a.jsonl", GOOD], iter([GOOD]), datasets.Dataset.from_list([GOOD])])
def test_rows_are_rows(some):
    assert rows.are_rows(some)


def test_the_file_is_plain_json_lines(tmp_path):
    text = rows.keep([GOOD], tmp_path, "train").read_text()
    assert text == json.dumps(GOOD) + "\n"
