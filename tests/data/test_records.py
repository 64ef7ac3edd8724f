"""Rows from files: every format, and everything that can be wrong with a row."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.data.encode import collect, encode
from dpo_jax.data.layouts import detect, to_record
from dpo_jax.data.messages import BadRow
from dpo_jax.data.report import BAD, KINDS, MERGED, NOTED, TOO_LONG, UNRANKED, Report
from dpo_jax.data.settings import LAYOUTS as NAMES
from dpo_jax.data.settings import DataSettings
from dpo_jax.data.sources import read_rows, tables
from dpo_jax.errors import UserError
from tests.support.bad_rows import BAD_ROWS
from tests.support.encoding import records
from tests.support.tiny_rows import (
    CHAT,
    CHATML,
    COMPLETION,
    GOOD,
    HI,
    IDS,
    IMPLICIT,
    MESSAGES,
    NO,
    OPENAI,
    RANKED,
    SCORED,
    SHAREGPT,
    TREE,
    UNPAIRED,
    YO,
    assistant,
    byte_tokenizer,
    write,
)

# ------------------------------------------------------------------------------------------------ bad rows

TEMPLATE = "{% if boom %}{{ raise_exception('boom') }}{% endif %}" + CHATML
SETTINGS = DataSettings(train="x", max_length=128)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(template=TEMPLATE)


@pytest.mark.parametrize(("good", "bad", "kind"), BAD_ROWS, ids=[f"{i}-{row[2]}" for i, row in enumerate(BAD_ROWS)])
def test_a_bad_row_is_counted_and_named_and_the_others_are_kept(tmp_path, tokenizer, good, bad, kind):
    path = write(tmp_path / "rows.jsonl", good, b"", bad, good)
    before = path.read_bytes()
    encoded, report = collect(str(path), tokenizer, SETTINGS)
    dropped = {name: count for name, count in report.counts.items() if KINDS[name] != NOTED}
    assert dropped == {kind: 1} and KINDS[kind] == BAD
    (example,) = report.examples[kind]
    assert example.startswith(f"{path}:3: ") and "\n" not in example and len(example) < len(str(path)) + 260
    assert (report.rows, report.kept, report.bad, encoded.num_units) == (3, 2, 1, 2)
    assert encoded.line.tolist() == [1, 4]
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]


def test_there_are_sixty_bad_rows_and_every_class_of_them_is_met():
    assert len(BAD_ROWS) >= 60
    assert {*(kind for _, _, kind in BAD_ROWS), MERGED} == {kind for kind, effect in KINDS.items() if effect == BAD}


@pytest.mark.parametrize("end", [" ", "\n"])
def test_a_prompt_whose_only_token_reaches_into_the_answer_is_not_called_empty(tmp_path, end):
    tokenizer = byte_tokenizer(merges=(("a", "b"),))
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for layout in ("auto", "pair"):
        with pytest.raises(UserError) as caught:
            encode(str(write(tmp_path / "rows.jsonl", row)), tokenizer, DataSettings(train="x", layout=layout))
        for words in ("rows.jsonl:1", "reaches into an answer", "a space or a line break", "data.as_chat=true"):
            assert words in str(caught.value)
        assert "empty" not in str(caught.value)
    mended = write(tmp_path / "rows.jsonl", {**row, "prompt": f"a{end}"})
    assert encode(str(mended), tokenizer, SETTINGS)[0].num_pairs == 1
    path = write(tmp_path / "rows.jsonl", row)
    assert encode(str(path), tokenizer, SETTINGS.model_copy(update={"as_chat": True}))[0].num_pairs == 1


def test_rows_of_messages_without_a_template_are_told_of_a_file_that_is_there(tmp_path):
    with pytest.raises(UserError, match="data.template=") as caught:
        encode(str(write(tmp_path / "rows.jsonl", CHAT)), byte_tokenizer(template=None), SETTINGS)
    plain = re.search("data.template=(.*)", str(caught.value))[1]
    assert Path(plain).is_file() and Path(plain).name == "plain.jinja"


def test_too_many_bad_rows_stop_the_run_with_one_line_that_names_the_largest_classes(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", *[GOOD] * 97, b"{", b"{", {**GOOD, "chosen": ""})
    with pytest.raises(UserError) as caught:
        encode(str(path), tokenizer, SETTINGS)
    message = str(caught.value)
    assert "\n" not in message and "3 of 100 rows" in message and "data.max_bad_fraction" in message
    assert f"2 not JSON (first: {path}:98: " in message and f"1 empty completion (first: {path}:100: " in message
    encode(str(path), tokenizer, SETTINGS.model_copy(update={"max_bad_fraction": 0.03}))


def test_no_rows_left_is_an_error_whatever_the_fraction(tmp_path, tokenizer):
    generous = SETTINGS.model_copy(update={"max_bad_fraction": 1.0})
    for rows in ([], [{**GOOD, "chosen": ""}]):
        with pytest.raises(UserError, match=r"0 rows left of \d"):
            encode(str(write(tmp_path / "rows.jsonl", *rows)), tokenizer, generous)


# ------------------------------------------------------------------------------------------------ files


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n  \n" + json.dumps(CHAT).encode())
    report = Report()
    assert [record.line for record in records(path, report=report)] == [1, 4]
    assert report.counts == {"byte-order mark": 1}


def test_elements_of_a_json_array_have_the_line_that_they_begin_on(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(
        '\ufeff[\n {"prompt": "a",\n  "chosen": "b", "rejected": "c"},\n\n 5, {"a": 1, "a": 2}\n]\n', "utf-8"
    )
    rows = list(read_rows(str(path)))
    assert [(row.line, getattr(row.value, "kind", None)) for row in rows] == [
        (2, None),
        (5, None),
        (5, "duplicate key"),
    ]
    assert rows[0].value == {"prompt": "a", "chosen": "b", "rejected": "c"} and rows[1].value == 5
    (tmp_path / "empty.json").write_text(" [ ] ")
    assert list(read_rows(str(tmp_path / "empty.json"))) == []


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        (b'{"prompt": "a",\n"chosen": "b"}', 1, "neither a JSON array nor one JSON object per line (Expecting"),
        (b'\n"text"', 2, "neither a JSON array nor one JSON object per line"),
        (b'[\n{"a": 1}\n{"a": 2}]', 3, "expected a comma"),
        (b'[\n{"a": 1},\n]', 3, "not JSON"),
        (b'[\n{"a": 1},\n{"a": ', 3, "not JSON"),
        (b"[1]\n2", 1, "after the array"),
        (b"[1", 1, "expected a comma"),
        (b'[\n"\xff"]', 2, "invalid UTF-8"),
        (b"[\n" + b"[" * 100_000, 2, "cannot be read"),
    ],
)
def test_a_broken_json_array_is_refused_with_its_line(tmp_path, text, line, what):
    path = tmp_path / "rows.json"
    path.write_bytes(text)
    with pytest.raises(UserError) as caught:
        list(read_rows(str(path)))
    assert str(caught.value).startswith(f"{path}:{line}: ") and what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parquet_arrow_and_saved_data_sets_give_the_same_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [CHAT, {**CHAT, "chosen": [assistant("é")]}]
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(str(tmp_path / "rows.parquet"))
    datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(str(tmp_path / "both"))
    data.select([1, 0]).save_to_disk(str(tmp_path / "saved"))
    arrow = next((tmp_path / "both" / "train").glob("*.arrow"))
    expected = [(record.prompt, record.completions) for record in records(write(tmp_path / "rows.jsonl", *rows))]

    def found(source):
        return [(record.prompt, record.completions) for record in records(source)]

    assert found(tmp_path / "rows.parquet") == found(arrow) == found(f"{tmp_path / 'both'}:train") == expected
    assert found(f"{tmp_path / 'both'}:test") == expected[1:]
    assert found(tmp_path / "saved") == expected[::-1]
    both = f"{tmp_path / 'both'}"
    for source, what in ((f"{both}:dev", "no split 'dev'"), (both, "holds several splits")):
        with pytest.raises(UserError) as caught:
            found(source)
        assert str(caught.value) == f"{source}: {what}; give one of {both}:train, {both}:test"
    datasets.DatasetDict(dev=data).save_to_disk(str(tmp_path / "one"))
    assert found(tmp_path / "one") == expected


def test_arrow_files_with_a_footer_and_texts_that_are_not_utf8(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    raw = pyarrow.array([b"fine", b"\xff\xfe", b"fine too"]).cast(pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    table = pyarrow.table({"prompt": text, "chosen": ["a"] * 3, "rejected": ["b"] * 3})
    with pyarrow.ipc.new_file(str(tmp_path / "rows.arrow"), table.schema) as file:
        file.write_table(table)
    report = Report()
    assert [record.line for record in records(tmp_path / "rows.arrow", report=report)] == [1, 3]
    assert report.examples["invalid UTF-8"][0].startswith(f"{tmp_path}/rows.arrow:2: ")


def test_a_folder_is_its_files_in_order_and_each_file_has_its_own_layout(tmp_path):
    write(tmp_path / "b.jsonl", GOOD)
    write(tmp_path / "a.jsonl", {**OPENAI, "weigth": 3})
    (tmp_path / "README.md").write_text("about")
    report = Report()
    assert [Path(record.file).name for record in records(tmp_path, report=report)] == ["a.jsonl", "b.jsonl"]
    assert [about["layout"] for about in report.files.values()] == ["openai", "pair"]
    assert report.files[str(tmp_path / "a.jsonl")]["unused"] == ["weigth"]
    assert "columns not used: weigth" in "\n".join(report.lines())


def test_a_given_layout_is_used_instead_of_the_detected_one(tmp_path):
    both = {**GOOD, "completions": ["x", "y"], "ranks": [2, 1]}
    path = write(tmp_path / "rows.jsonl", both)
    assert records(path)[0].completions == ("x", "y")
    assert records(path, layout="pair")[0].completions == ("yes", "no")


def test_only_the_first_rows_are_read(tmp_path):
    report = Report()
    path = write(tmp_path / "rows.jsonl", GOOD, b"{", CHAT, GOOD)
    assert [record.line for record in records(path, path, first=3, report=report)] == [1, 3]
    assert report.rows == 3


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("{}/rows.jsnol", "did you mean {}/rows.jsonl?"),
        ("{}/no/rows.jsonl", "no such file or folder"),
        ("./nothing", "no such file or folder"),
        ("{}/rows.csv", "pandas.read_csv('{0}/rows.csv').to_json('{0}/rows.jsonl', orient='records', lines=True)"),
        ("{}/rows.bin", "files that can be read are .jsonl"),
        ("{}/empty", "holds no .jsonl"),
        ("{}/empty:test", "holds no .jsonl"),
    ],
)
def test_a_source_that_is_not_there_is_refused(tmp_path, source, what):
    write(tmp_path / "rows.jsonl", GOOD)
    (tmp_path / "rows.csv").touch()
    (tmp_path / "rows.bin").write_bytes(b"PK")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        tables(source.format(tmp_path))
    assert what.format(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("org/name", ("org/name", None, "train")),
        ("org/name:test", ("org/name", None, "test")),
        ("name:train[:10%]", ("name", None, "train[:10%]")),
        ("org/name:en:test", ("org/name", "en", "test")),
    ],
)
def test_names_of_hub_data_sets(monkeypatch, source, call):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(name, configuration, *, split):
        calls.append((name, configuration, split))
        return datasets.Dataset.from_list([GOOD])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [(row.file, row.line, row.value) for row in read_rows(source)] == [(source, 1, GOOD)]
    assert calls == [call]


def test_files_that_are_not_what_their_name_says_are_refused(tmp_path):
    for name in ("rows.parquet", "rows.arrow"):
        (tmp_path / name).write_bytes(b"not that at all")
        with pytest.raises(UserError, match=f"{name}: not a"):
            list(read_rows(str(tmp_path / name)))


# ------------------------------------------------------------------------------------------------ many rows

VALUES = [
    None,
    True,
    0,
    -1.5,
    "",
    " ",
    "text",
    "\ud800",
    "a\0",
    [],
    {},
    [[]],
    [1],
    ["a"],
    HI,
    YO,
    NO,
    HI + YO,
    HI[0],
    YO[0],
]
VALUES += [{"messages": HI}, {"messages": 5}, [{"from": "human", "value": "q"}], {"from": "gpt", "value": "a"}, [1, 2]]
VALUES += [
    [{"role": "assistant", "tool_calls": [5]}],
    [{"role": "tool", "content": "x"}],
    10**400,
    {"a": {"b": [None]}},
]
COLUMNS = ["prompt", "chosen", "rejected", "conversations", "input", "preferred_output", "non_preferred_output"]
COLUMNS += [
    "prompt_ids",
    "chosen_ids",
    "rejected_ids",
    "completions",
    "responses",
    "ranks",
    "scores",
    "system",
    "tools",
]
COLUMNS += ["chat_template_kwargs", "weight", "margin", "completion", "messages", "label", "score", "best", "strength"]
COLUMNS += ["parent_id", "role", "text", "rank", "deleted"]


def malformed(generator: random.Random) -> bytes:
    """A row of a random layout with some columns replaced, and now and then some bytes."""
    rows = [GOOD, CHAT, IDS, RANKED, OPENAI, SHAREGPT, IMPLICIT, UNPAIRED, COMPLETION, MESSAGES, SCORED, *TREE, {}]
    row = {**generator.choice(rows), **{generator.choice(COLUMNS): generator.choice(VALUES) for _ in range(3)}}
    data = bytearray(json.dumps(row).encode())
    for _ in range(generator.choice([0, 0, 0, 1, 3])):
        data[generator.randrange(len(data))] = generator.choice(
            [0x00, 0x22, 0x5C, 0x7B, 0xFF, generator.randrange(256)]
        )
    return bytes(data).replace(b"\n", b" ")


@pytest.mark.parametrize("layout", ["auto", *NAMES])
def test_no_malformed_row_escapes_and_the_counts_add_up(tmp_path, tokenizer, layout):
    generator = random.Random(layout)
    path = write(tmp_path / "rows.jsonl", *(malformed(generator) for _ in range(1500)))
    settings = SETTINGS.model_copy(update={"layout": layout})
    encoded, report = collect(str(path), tokenizer, settings)
    counted = report.kept + report.bad + report.too_long + report.unranked + report.joined
    assert report.rows == 1500 == counted
    for effect, total in ((BAD, report.bad), (TOO_LONG, report.too_long), (UNRANKED, report.unranked)):
        assert sum(count for kind, count in report.counts.items() if KINDS[kind] == effect) == total
    assert (encoded.num_units, encoded.num_pairs) == (report.kept, report.pairs + report.singles)
    assert encoded.single.sum() == report.singles >= report.undesirable == (encoded.label[encoded.single] == 0).sum()
    assert all(line.isprintable() for line in report.lines())
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


@settings(max_examples=25)
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5), lambda x: st.lists(x, max_size=3)))
def test_any_value_in_a_column_gives_a_record_or_a_bad_row(value):
    for row in (GOOD, CHAT, IDS, RANKED, OPENAI, SHAREGPT, IMPLICIT, UNPAIRED, COMPLETION, MESSAGES):
        for name in (*row, "system", "tools", "chat_template_kwargs", "weight", "margin", "label"):
            try:
                record = to_record({**row, name: value}, detect(row), file="f", line=1)
            except BadRow as error:
                assert error.kind in KINDS
            else:
                assert record.pairs and np.isfinite([pair.weight for pair in record.pairs]).all()
                assert all(
                    0 <= pair.label <= 1 and pair.single == (len(record.completions) == 1) for pair in record.pairs
                )
