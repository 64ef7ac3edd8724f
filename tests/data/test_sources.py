"""What a source may be: packed files and files under any name, and the splits of folders."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

from dpo_jax.data.sources import hub_name, read_rows, tables
from dpo_jax.errors import UserError
from tests.support.tiny_rows import CHAT, GOOD, write

ROWS = [{**GOOD, "prompt": f"Hi {number}"} for number in range(3)]
LINES = b"\n".join(json.dumps(row).encode() for row in ROWS)


def zstd(data: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.compress(data, codec="zstd", asbytes=True)


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress, zstd])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.json.zst", "rows.txt", "rows"])
def test_rows_are_read_whatever_packs_them_and_whatever_their_name(tmp_path, name, pack):
    path = tmp_path / name
    path.write_bytes(pack(b"\xef\xbb\xbf\n" + LINES + b"\n\n{"))
    rows = list(read_rows(str(path)))
    assert [(row.line, row.value) for row in rows[:3]] == [(number + 2, row) for number, row in enumerate(ROWS)]
    assert (rows[3].line, rows[3].value.kind) == (6, "not JSON")
    if not name.startswith("rows.jsonl"):
        path.write_bytes(pack(b"[" + LINES.replace(b"\n", b",\n") + b"]"))
        assert [(row.line, row.value) for row in read_rows(str(path))] == list(enumerate(ROWS, 1))


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstd])
def test_a_packed_file_that_was_cut_is_refused_by_name(tmp_path, pack):
    path, data = tmp_path / "rows.jsonl.gz", pack(b"\n".join([LINES] * 300))
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"rows.jsonl.gz: cannot be unpacked \(.*\); fetch the file again"):
        list(read_rows(str(path)))


@pytest.mark.parametrize("name", ["rows.csv", "rows.TSV", "rows.xlsx"])
def test_a_table_without_types_is_refused_with_a_command_that_converts_it(tmp_path, name):
    (tmp_path / name).write_text("prompt,chosen,rejected\na,b,c\n")
    with pytest.raises(UserError, match=r"convert it: python -c") as caught:
        tables(str(tmp_path / name))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ folders


def found(source: str) -> list[str]:
    return [str(Path(table.name).name) for table in tables(source)]


def folder(path: Path, *names: str, readme: str | None = None) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        write(path / name, GOOD)
    if readme is not None:
        (path / "README.md").write_text(readme)
    return path


PREFERENCES = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train_prefs
    path: data/train_prefs-*
  - split: test_prefs
    path: data/test_prefs-*
- config_name: other
  data_files: other/*
---
"""


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("b.jsonl", "a.jsonl", "c.jsonl.gz"), {None: "a b c", "train": "a b c"}),
        (("only_test.jsonl",), {None: "only_test", "test": "only_test"}),
        (("train.jsonl", "test.jsonl"), {"train": "train", "test": "test"}),
        (
            ("x-train-0.jsonl", "x-train-1.jsonl", "x-dev.jsonl"),
            {"train": "x-train-0 x-train-1", "validation": "x-dev"},
        ),
        (("train/a.jsonl", "test/b.jsonl"), {"train": "a", "test": "b"}),
        (
            ("data/odd-00000-of-00001.jsonl", "data/train-00000-of-00001.jsonl"),
            {"odd": "odd-00000-of-00001", "train": "train-00000-of-00001"},
        ),
    ],
)
def test_a_folder_has_the_splits_that_datasets_gives_it(tmp_path, names, splits):
    path = folder(tmp_path / "rows", *names)
    (path / "train_log.txt").write_text("no rows at all")
    for split, files in splits.items():
        assert [name.split(".")[0] for name in found(f"{path}:{split}" if split else str(path))] == files.split()
    if None not in splits:
        with pytest.raises(UserError, match="holds several splits; give one of ") as caught:
            found(str(path))
        assert all(f"{path}:{split}" in str(caught.value) for split in splits)
    with pytest.raises(UserError, match="no split 'no'; give"):
        found(f"{path}:no")


def test_a_clone_of_a_hub_data_set_has_the_splits_of_its_readme(tmp_path):
    path = folder(
        tmp_path,
        "data/train_prefs-0.jsonl",
        "data/test_prefs-0.jsonl",
        "data/x.jsonl",
        "other/y.jsonl",
        readme=PREFERENCES,
    )
    assert found(f"{path}:train_prefs") == ["train_prefs-0.jsonl"]
    assert found(f"{path}:test_prefs") == ["test_prefs-0.jsonl"]
    assert found(f"{path}:other:train") == ["y.jsonl"]
    with pytest.raises(UserError, match="several splits; give one of .*:train_prefs, .*:test_prefs, .*:other:train"):
        found(str(path))


@pytest.mark.parametrize("bad", ["/etc/*", "../*.jsonl", "https://example.org/a.jsonl", "nowhere/a.jsonl"])
def test_a_readme_that_names_what_is_not_in_the_folder_is_refused(tmp_path, bad):
    write(tmp_path / "a.jsonl", GOOD)
    path = folder(
        tmp_path / "rows", "a.jsonl", readme=f"---\nconfigs:\n- config_name: default\n  data_files: {bad}\n---\n"
    )
    with pytest.raises(UserError, match="splits cannot be told"):
        found(str(path))


def test_files_of_a_split_keep_their_layouts_and_names(tmp_path):
    path = folder(tmp_path / "rows", "train-a.jsonl", "test-a.jsonl")
    write(path / "train-b.jsonl", CHAT)
    assert [(row.file, row.line) for row in read_rows(f"{path}:train")] == [
        (str(path / "train-a.jsonl"), 1),
        (str(path / "train-b.jsonl"), 1),
    ]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("org/name", "org/name"),
        ("org/name:test", "org/name"),
        ("org/name:en:train[:10%]", "org/name"),
        ("name", "name"),
        ("here.jsonl", None),
        ("here", None),
        ("here:train", None),
        ("gone.jsonl.gz", None),
        ("./org/name", None),
    ],
)
def test_only_data_sets_of_the_hub_have_a_name_there(tmp_path, monkeypatch, source, name):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "here", "train.jsonl")
    write(tmp_path / "here.jsonl", GOOD)
    assert hub_name(source) == name
