"""Public data sets: each shape is read as the right pairs, by its name and as a copy; what is nearly it is refused."""

import re

import pytest
import yaml

from dpo_jax.data.encode import encode
from dpo_jax.data.known import KNOWN_SETS, named, recognised
from dpo_jax.data.layouts import Record
from dpo_jax.data.messages import is_chat
from dpo_jax.data.report import KINDS, UNRANKED, Report
from dpo_jax.data.sources import read_rows
from dpo_jax.errors import UserError
from tests.support.encoding import records, settings
from tests.support.known_shapes import SHAPES, Shape, answer, question, write_parquet
from tests.support.tiny_rows import GOOD, byte_tokenizer, write

by_name = pytest.mark.parametrize("shape", SHAPES, ids=[shape.name for shape in SHAPES])


def pairs(found: list[Record]) -> list:
    """The pairs of records as shapes have them, in their order."""

    def plain(part):
        return tuple((turn["role"], turn["content"]) for turn in part) if is_chat(part) else part

    def text(completion):
        return completion[-1]["content"] if is_chat(completion) else completion

    return [
        (plain(record.prompt), text(record.completions[pair.chosen]), pair.label > 0)
        if pair.single
        else (plain(record.prompt), text(record.completions[pair.chosen]), text(record.completions[pair.rejected]))
        for record in found
        for pair in record.pairs
    ]


def check(shape: Shape, found: list[Record], report: Report) -> None:
    assert sorted(pairs(found), key=repr) == sorted(shape.expected(), key=repr)
    unranked = {kind: count for kind, count in report.counts.items() if KINDS[kind] == UNRANKED}
    assert (unranked, report.bad, report.joined) == (shape.unranked, 0, shape.joined)
    assert report.joined + report.unranked + len(found) == report.rows


def test_there_are_twenty_five_shapes_and_one_of_each_known_set():
    assert len([shape for shape in SHAPES if len(shape.near) >= 3]) >= 25
    for known in KNOWN_SETS:
        assert any(known in named(shape.name.split(":")[0]) for shape in SHAPES), known.title


@by_name
def test_a_copy_of_any_name_is_read_as_the_right_pairs(tmp_path, shape):
    for path in (
        write(tmp_path / "rows.jsonl", *shape.rows()),
        write_parquet(tmp_path / "rows.parquet", shape.rows()),
    ):
        report = Report()
        check(shape, records(path, report=report), report)
        assert not any("unknown" in line for line in report.lines())


@by_name
def test_a_name_asks_the_hub_for_the_right_split_and_is_read_the_same(tmp_path, monkeypatch, shape):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(name, configuration, *, split, data_dir=None):
        calls.append((name, configuration, split, data_dir))
        return datasets.Dataset.from_list(shape.rows())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    report = Report()
    check(shape, records(shape.name, report=report), report)
    assert calls == [shape.called or (shape.name, None, "train", None)]


@pytest.mark.parametrize(
    ("shape", "names"),
    [(shape, names) for shape in SHAPES for names in shape.near],
    ids=[f"{shape.name}-{'-'.join(names.values())}" for shape in SHAPES for names in shape.near],
)
def test_the_nearest_wrong_shapes_are_refused_with_a_mapping_that_works(tmp_path, shape, names):
    rows = [row for row in shape.like(names) if row.get("status") != "tie"]
    path = write(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(UserError) as caught:
        records(path)
    said = str(caught.value)
    assert said.startswith(f"{path}:1: ") and "\n" not in said and len(said) < len(str(path)) + 600
    assert all(name in said for name in names.values() if name in rows[0])
    columns = yaml.safe_load(re.search(r"data\.columns=(\{.*?\})", said)[1])
    columns = {name: tuple(given) if isinstance(given, list) else given for name, given in columns.items()}
    settings(columns=columns)
    report = Report()
    found = records(path, columns=columns, report=report)
    assert sorted(pairs(found), key=repr) == sorted(shape.expected(), key=repr)
    assert report.bad == 0


@by_name
def test_a_shape_is_recognised_as_one_set_and_by_its_own_name(shape):
    row, name = shape.rows()[0], shape.name.split(":")[0]
    fitting = [known for known in KNOWN_SETS if known.marks and known.fits(row)]
    assert len(fitting) <= 1 and all(known in named(name) for known in fitting)
    assert recognised(row) == (fitting[0] if fitting else None)


def test_a_column_of_its_own_under_a_name_of_the_layout_is_never_hidden(tmp_path):
    row = {"system": "Be brief.", "question": "no", "chosen": "a", "rejected": "b", "prompt": "p"}
    (found,) = records(write(tmp_path / "rows.jsonl", row))
    assert found.prompt[1] == {"role": "user", "content": "p"}


HUB = {  # the files of some data sets, and what their cards say of them
    "nvidia/HelpSteer2": ("train validation preference/preference", ""),
    "nvidia/HelpSteer3": (
        "preference/train preference/validation edit/train",
        "- config_name: preference\n  data_files:\n  - {split: validation, path: preference/validation*}",
    ),
    "Anthropic/hh-rlhf": ("helpful-base/train harmless-base/train harmless-base/test", ""),
    "HuggingFaceH4/ultrafeedback_binarized": (
        "data/train_sft-0 data/train_prefs-0",
        "- config_name: default\n  data_files:\n  - {split: train_prefs, path: data/train_prefs-*}",
    ),
    "snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset": (
        "data/1 data/2",
        "- config_name: default\n  data_files:\n  - {split: train_iteration_1, path: data/1*}",
    ),
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Folders like those of the Hub, which `datasets` reads as it reads those."""
    datasets = pytest.importorskip("datasets")
    load = datasets.load_dataset

    def load_dataset(name, configuration, **how):
        files, card = HUB[name]
        for file in files.split():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            write(tmp_path / name / f"{file}.jsonl", {**GOOD, "prompt": file})
        (tmp_path / name / "README.md").write_text(f"---\nconfigs:\n{card}\n---\n" if card else "")
        return load(str(tmp_path / name), configuration, cache_dir=str(tmp_path / "cache"), **how)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("nvidia/HelpSteer2", "train"),
        ("nvidia/HelpSteer2:validation", "validation"),
        ("nvidia/HelpSteer2:preference:train", "preference/preference"),
        ("nvidia/HelpSteer3:preference:validation", "preference/validation"),
        ("Anthropic/hh-rlhf:harmless-base:test", "harmless-base/test"),
        ("HuggingFaceH4/ultrafeedback_binarized", "data/train_prefs-0"),
    ],
)
def test_a_name_reads_the_file_that_the_hub_has_for_it(hub, source, file):
    assert [row.value["prompt"] for row in read_rows(source)] == [file]


def test_a_set_without_the_usual_split_is_refused_with_those_it_has(hub):
    with pytest.raises(UserError, match=r"Unknown split \"train\"\. Should be one of \['train_iteration_1'\]"):
        list(read_rows("snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset"))


def test_what_the_run_says_goes_before_what_is_known(tmp_path):
    shape = next(shape for shape in SHAPES if shape.name == "nvidia/HelpSteer2")
    path = write(tmp_path / "rows.jsonl", *shape.rows())
    other = pairs(records(path, columns={"score": "correctness"}))
    assert other == [(question(n), answer(n, 1), answer(n, 0)) for n in (1, 2)]
    report = Report()
    alone = records(path, layout="completion", columns={"completion": "response"}, report=report)
    assert len(alone) == 6 and "known" not in report.files[str(path)]


def test_a_prompt_that_is_not_in_the_conversations_can_be_left_unread(tmp_path):
    shape = SHAPES[1]
    path = write(tmp_path / "rows.jsonl", *({**row, "prompt": "A title"} for row in shape.rows()))
    with pytest.raises(UserError, match="3 prompt not a prefix .*data.layout=implicit does not read it"):
        encode(str(path), byte_tokenizer(), settings())
    report = Report()
    assert pairs(records(path, layout="implicit", report=report)) == shape.expected()
    assert "prompt" in report.files[str(path)]["unused"]


@pytest.mark.parametrize("as_chat", [False, True])
def test_hh_rlhf_is_text_or_a_chat_as_the_run_says(tmp_path, as_chat):
    shape = next(shape for shape in SHAPES if shape.name.startswith("Anthropic"))
    path = write(tmp_path / "rows.jsonl", *shape.rows())
    found = pairs(records(path, as_chat=as_chat))
    chats = [((("user", question(n)),), answer(n, 0), answer(n, 1)) for n in (1, 2, 3)]
    assert found == (chats if as_chat else shape.expected())


@pytest.mark.parametrize("name", ["berkeley-nest/Nectar", "nvidia/HelpSteer2", "openbmb/UltraFeedback"])
def test_ranked_texts_become_chats_as_well(tmp_path, name):
    shape = next(shape for shape in SHAPES if shape.name == name)
    found = pairs(records(write(tmp_path / "rows.jsonl", *shape.rows()), as_chat=True))
    assert len(found) == len(shape.expected())
    assert {prompt for prompt, _, _ in found} <= {(("user", question(n)),) for n in (1, 2, 3)}


def test_a_known_set_goes_through_the_tokenizer_and_the_report_says_what_it_is(tmp_path):
    shape = next(shape for shape in SHAPES if shape.name == "OpenAssistant/oasst1")
    path = write_parquet(tmp_path / "rows.parquet", shape.rows())
    encoded, report = encode(str(path), byte_tokenizer(), settings())
    assert (encoded.num_units, encoded.num_pairs, report.kept) == (6, 12, 6)
    lines = report.lines()
    assert lines[0] == (
        "39 rows read: 6 kept (12 pairs), 0 bad, 0 left out as too long, 18 without preference, "
        "15 joined with others into ranked rows"
    )
    assert lines[1].startswith(f"{path}: 39 rows, layout tree; known as OpenAssistant/oasst1; columns not used: ")
    assert f"without preference: missing parent: 3\n  {path}:11: a message before it is left out" in "\n".join(lines)
