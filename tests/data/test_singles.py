"""Rows with one completion, soft labels and ranks: how they reach the arrays, and what the report says of them."""

import numpy as np
import pytest

from dpo_jax.data.encode import collect
from dpo_jax.data.encoded import of_units
from dpo_jax.data.messages import shared_length
from dpo_jax.data.truncation import TRUNCATIONS
from dpo_jax.objectives.terms import make_terms
from dpo_jax.run.data import Data, labels_line
from tests.support.encoding import encoded_rows, settings
from tests.support.tiny_rows import CHAT, GOOD, MESSAGES, assistant, byte_tokenizer, user, write


def test_a_single_completion_is_what_the_pair_has_of_it(tmp_path):
    tokenizer = byte_tokenizer()
    rows = [GOOD, CHAT, {**GOOD, "prompt": "Hi" * 9, "system": "Be"}]
    pairs, _ = encoded_rows(tmp_path, tokenizer, *rows, max_length=50)
    for part in ("chosen", "rejected"):
        singles = [{**row, "completion": row[part], "label": part == "chosen"} for row in rows]
        singles = [{name: row[name] for name in row if name not in ("chosen", "rejected")} for row in singles]
        encoded, report = encoded_rows(tmp_path, tokenizer, *singles, max_length=50)
        assert (report.kept, report.pairs, report.singles) == (3, 0, 3)
        assert report.undesirable == (0 if part == "chosen" else 3)
        assert encoded.chosen.tolist() == encoded.rejected.tolist() == encoded.pair_unit.tolist() == [0, 1, 2]
        assert encoded.label.tolist() == [part == "chosen"] * 3 and encoded.single.all()
        for index, pair in enumerate(getattr(pairs, part).tolist()):
            assert encoded.completion(index).tolist() == pairs.completion(pair).tolist()
            one, other = encoded.prompt(index).tolist(), pairs.prompt(pair).tolist()
            # the longer of two answers leaves the prompt of a pair less room: its middle is shorter
            same = shared_length(one, other) + shared_length(one[::-1], other[::-1])
            assert same >= min(len(one), len(other))
        assert encoded.truncated.tolist() == [False, False, True] and encoded.sequence_lengths().max() == 50


@pytest.mark.parametrize("rule", sorted(TRUNCATIONS))
@pytest.mark.parametrize("layout", ["unpaired", "completion", "messages"])
def test_no_truncation_drops_a_single_completion_for_being_like_itself(tmp_path, rule, layout):
    row = {"prompt": [user("p")], "completion": [assistant("c" * 40)], "label": 0}
    if layout == "messages":
        row = {"messages": row["prompt"] + row["completion"]}
    if layout == "completion":
        del row["label"]
    encoded, report = encoded_rows(tmp_path, byte_tokenizer(), row, row, truncation=rule, max_length=30)
    assert (report.kept, report.bad, report.too_long, encoded.num_units) == (2, 0, 0, 2)
    assert report.files[str(tmp_path / "rows.jsonl")]["layout"] == layout
    assert report.counts.pop("duplicate completion") == 1
    assert set(report.counts) <= {"prompt truncated", "completion truncated"}
    assert encoded.truncated.all() and encoded.sequence_lengths().tolist() == [30, 30]


def test_a_completion_that_is_once_desirable_and_once_not_is_noted(tmp_path):
    good, bad = {"prompt": "p", "completion": "c", "label": 1}, {"prompt": "p", "completion": "c", "label": 0}
    other = {"prompt": "q", "completion": "c", "label": 0}
    _, report = encoded_rows(tmp_path, byte_tokenizer(), good, other, bad, good)
    assert report.counts == {"conflicting completion": 2, "duplicate completion": 1} and report.kept == 4
    path = f"{tmp_path}/rows.jsonl"
    assert report.examples["conflicting completion"] == [
        f"{path}:3: desirable at {path}:1",
        f"{path}:4: undesirable at {path}:3",
    ]
    assert report.examples["duplicate completion"] == [f"{path}:4: the same as {path}:1"]


def test_the_report_says_what_was_read(tmp_path):
    ranked = {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 2, 3]}
    unpaired = [{"prompt": "p", "completion": "c" * size, "label": size > 1} for size in (1, 2, 3)]
    files = [[GOOD], [ranked], unpaired, [MESSAGES]]
    paths = [str(write(tmp_path / f"{index}.jsonl", *rows)) for index, rows in enumerate(files)]
    _, mixed = collect(paths, byte_tokenizer(), settings())
    assert mixed.lines()[0].startswith(
        "6 rows read: 6 kept (4 pairs, 4 single completions, 1 of them undesirable), 0 bad"
    )
    assert list(mixed.lengths) == ["prompt", "chosen", "rejected", "completion", "prompt + completion"]
    assert (mixed.lengths["completion"]["min"], mixed.lengths["completion"]["max"]) == (2, 4)
    _, alone = collect(paths[3], byte_tokenizer(), settings())
    assert "1 kept (1 single completions), " in alone.lines()[0]
    assert list(alone.lengths) == ["prompt", "completion", "prompt + completion"]
    _, pairs = collect(paths[:2], byte_tokenizer(), settings())
    assert "2 kept (4 pairs), " in pairs.lines()[0] and "completion" not in pairs.lengths


def test_soft_labels_and_ranks_reach_the_arrays(tmp_path):
    tied = {"prompt": "p", "completions": ["a", "b", "c", "d"], "scores": [1, 5, 3, 3], "label": 0.75}
    encoded, _ = encoded_rows(tmp_path, byte_tokenizer(), {**GOOD, "label": 0.25}, GOOD, {**GOOD, "label": None})
    assert encoded.label.tolist() == [0.25, 1, 1] and encoded.rank.tolist() == [0, 1] * 3
    encoded, _ = encoded_rows(tmp_path, byte_tokenizer(), tied)
    assert encoded.label.tolist() == [0.75] * 5 and encoded.rank.tolist() == [3, 0, 1, 1]


@pytest.mark.parametrize(
    ("completions", "ranks"),
    [
        (["a", "same", "same<eos>", "d"], [0, 1, 1, 3]),
        (["same", "b", "same<eos>", "d"], [0, 1, 2, 3]),
        (["same", "same<eos>", "c"], [0, 0, 2]),
    ],
)
def test_completions_of_equal_tokens_have_ranks_that_no_pair_contradicts(tmp_path, completions, ranks):
    row = {"prompt": "p", "completions": completions, "ranks": list(range(len(completions)))}
    encoded, report = encoded_rows(tmp_path, byte_tokenizer(), row)
    assert report.counts["pair left out of a ranked row"] == 1
    assert encoded.rank.tolist() == ranks
    assert (encoded.rank[encoded.chosen] < encoded.rank[encoded.rejected]).all()


LABELLED = {"prompt": "p", "completion": "c"}


@pytest.mark.parametrize(
    ("rows", "kept", "objective", "said"),
    [
        ([MESSAGES] * 3, 3, "kto", ("no row has a label", "all 3 answers", "use objective.name=sft")),
        ([MESSAGES] * 3, 3, "sft", None),
        ([{**LABELLED, "label": 1}] * 3, 3, "kto", None),  # the report says it
        ([{**LABELLED, "label": 1}] * 3 + [{**LABELLED, "label": 0}], 4, "kto", None),
        (
            [{**LABELLED, "label": 1}] * 3 + [{**LABELLED, "label": 0}],
            3,
            "kto",
            ("3 answers", "wants some undesirable"),
        ),
    ],
)
def test_labels_that_are_all_alike_are_said_once(tmp_path, rows, kept, objective, said):
    encoded, report = encoded_rows(tmp_path, byte_tokenizer(), *rows)
    encoded = of_units(encoded, np.arange(len(rows)) < kept)  # as where the others are held out
    line = labels_line(Data(encoded, {}, 0, {"data.train": report.to_dict()}), make_terms([{"name": objective}]))
    assert line is None if said is None else line and line.startswith("data.train: ")
    assert all(words in (line or "") for words in said or ())
