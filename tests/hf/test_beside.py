"""What lies beside a model's tensors: all of it comes along, and none of it may lead elsewhere."""

import json
import os
import shutil

import pytest

from dpo_jax.errors import UserError
from dpo_jax.hf import beside, tensors
from dpo_jax.hf.bounds import MOST_LAYERS, check
from dpo_jax.hf.checkpoint import load_hf, save_hf
from dpo_jax.hf.configs import read_spec
from dpo_jax.hf.tokenizer import load_tokenizer
from tests.support.tiny_folders import write_folder
from tests.support.tiny_rows import byte_tokenizer

PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


@pytest.fixture
def folder(tmp_path):
    made = write_folder(tmp_path / "m", num_hidden_layers=1, vocab_size=300)
    byte_tokenizer().save_pretrained(made)
    return made


def test_everything_that_is_not_weights_comes_along(folder, tmp_path):
    new = (*PROCESSORS, "model_card.png", "sub/prompt.txt", "tokens.tiktoken", "MODEL-LICENSE")
    for name in (
        *new,
        ".gitattributes",
        ".cache/x.json",
        "old.bin",
        "a.gguf",
        "optimizer.pt",
        "checkpoint-5/state.json",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(os.urandom(9))
    (folder / "checkpoint-5" / "model.safetensors").write_bytes(b"")
    (folder / "linked").symlink_to("sub")
    save_hf(load_hf(folder), tmp_path / "export", folder)
    there = {path.relative_to(tmp_path / "export").as_posix() for path in (tmp_path / "export").rglob("*")}
    assert set(new) <= there and all(
        (folder / name).read_bytes() == (tmp_path / "export" / name).read_bytes() for name in new
    )
    assert not [name for name in there if name.startswith((".", "old", "a.gguf", "optimizer", "checkpoint", "linked"))]
    listed = (tmp_path / "export" / "SHA256SUMS").read_text()
    assert all(f"  {name}\n" in listed for name in new)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE", "README.md"]
)
@pytest.mark.parametrize("use", [load_tokenizer, beside.files])
def test_a_link_out_of_the_folder_is_refused_when_it_is_loaded(name, use, folder):
    (folder / name).rename(folder.parent / "outside")
    (folder / name).symlink_to(folder.parent / "outside")
    with pytest.raises(UserError, match=f"{name} leads out of its folder"):
        use(folder)


def test_a_snapshot_of_the_hub_s_cache_is_loaded_through_its_links(folder, tmp_path):
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "abc"
    shutil.copytree(folder, snapshot)
    (cache / "blobs").mkdir()
    for number, path in enumerate([path for path in sorted(snapshot.rglob("*")) if path.is_file()]):
        path.rename(cache / "blobs" / str(number))
        path.symlink_to(cache / "blobs" / str(number))
    assert beside.files(snapshot) == beside.files(folder)
    load_tokenizer(snapshot)


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("tokenizer_config.json", {"model_max_length": "x"}, "model_max_length is 'x', not a number"),
        ("tokenizer_config.json", {"chat_template": 7}, "chat_template"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": 1}}, "cannot be loaded"),
        ("tokenizer_config.json", {"eos_token": ["a"]}, "cannot be loaded"),
        ("tokenizer.json", {"model": None}, "tokenizer.json: the tokenizer cannot be loaded: it fails"),
        ("tokenizer.json", {"padding": 1}, "tokenizer.json: the tokenizer cannot be loaded: it fails"),
        ("config.json", {"hidden_size": True}, "config.json: .*hidden_size"),
        ("config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
    ],
)
def test_a_tokenizer_of_odd_types_is_one_line(file, changes, says, folder, capfd):
    (folder / "chat_template.jinja").unlink()
    shutil.rmtree(folder / "additional_chat_templates")
    table = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps({**table, **changes}))
    with pytest.raises(UserError, match=says) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value) and capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/a.jinja"])
def test_a_template_of_200_megabytes_is_not_read(name, folder):
    (folder / name).parent.mkdir(exist_ok=True)
    with (folder / name).open("wb") as file:
        file.truncate(200 << 20)
    with pytest.raises(UserError, match=f"{name} has {200 << 20} bytes, more than"):
        load_tokenizer(folder)


def test_a_template_that_does_not_end_is_refused_with_its_folder(folder):
    (folder / "chat_template.jinja").write_text("{{ 'a'|center(10**10) }}")
    with pytest.raises(UserError, match=f"{folder}: the chat template wants more than"):
        load_tokenizer(folder)


def test_the_tokenizer_is_tried_again_only_when_a_file_has_changed(folder, monkeypatch):
    asked = []
    monkeypatch.setattr("dpo_jax.hf.tokenizer.tried", lambda function, path: asked.append(path))
    load_tokenizer(folder)
    load_tokenizer(folder)
    assert len(asked) == 1
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes() + b" ")
    load_tokenizer(folder)
    assert len(asked) == 2


def test_a_run_s_folder_is_told_from_a_model_s(folder, tmp_path):
    folder.rename(tmp_path / "model")
    for use in (load_tokenizer, read_spec):
        with pytest.raises(
            UserError, match=f"{tmp_path} is the folder of a run, with its model in {tmp_path / 'model'}"
        ):
            use(tmp_path)


@pytest.mark.parametrize(
    "table",
    [
        {"num_hidden_layers": MOST_LAYERS + 1},
        {"text_config": {"n_layer": 1e9}},
        {"vision_config": [{"depth": 10**9}]},
        {"hidden_size": 2**31},
        {"id": {"_num_labels": 10**6}},
        {"a": [1, [2, 10**5000]]},
        {"a": float("inf")},
    ],
)
def test_a_number_that_nothing_is_built_by_is_refused(table, tmp_path):
    with pytest.raises(UserError, match="a model has at most"):
        check(table, tmp_path)


def test_large_numbers_of_other_kinds_pass(tmp_path):
    check({"model_max_length": 10**30, "num_hidden_layers": 512, "rope_theta": 1e9, "layer_norm_eps": 1e-5}, tmp_path)
    check({"vocab_size_per_layer_input": 262144, "hidden_size": 2**20, "attention_dropout": False}, tmp_path)


def test_an_export_says_what_it_is_of_and_the_base_is_not_read_for_what_is_given(folder, monkeypatch):
    said = json.loads(beside.record("org/base", folder, ())["dpo_jax.json"])
    assert (said["base_model"], said["base_digest"]) == ("org/base", tensors.weights_digest(folder))
    monkeypatch.setattr(tensors, "weights_digest", lambda folder: pytest.fail("all of the base was read"))
    assert beside.record("org/base", folder, {"dpo_jax.json"}) == {}
