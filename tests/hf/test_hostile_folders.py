"""A folder is somebody else's: what is wrong with it is one line that names it, and nothing outside it is opened.

`hostile_folders.py` has the table of them; here it is gone through, and its more delicate entries are turned over.
"""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from dpo_jax import convert
from dpo_jax.errors import UserError
from dpo_jax.hf import tensors
from dpo_jax.hf.checkpoint import load_hf, save_hf, scheme_of
from dpo_jax.hf.configs import read_spec
from dpo_jax.hf.mapping import claim
from dpo_jax.hf.tensors import Tensors, local_folder
from tests.conftest import ROOT
from tests.support.hostile_folders import HOSTILE, sound_folder
from tests.support.tiny_folders import write_folder, write_index

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return {
        "single": write_folder(tmp_path_factory.mktemp("single") / "m", num_hidden_layers=2, tie_word_embeddings=True),
        "sharded": sound_folder(tmp_path_factory.mktemp("sharded") / "m"),
    }


@pytest.fixture
def single(sound, tmp_path):
    return Path(shutil.copytree(sound["single"], tmp_path / "a" / "m"))


@pytest.fixture
def sharded(sound, tmp_path):
    return Path(shutil.copytree(sound["sharded"], tmp_path / "b" / "m"))


def opened(folder: Path) -> Tensors:
    """What load_hf does before it reads the first tensor."""
    spec, source = read_spec(folder), Tensors(folder)
    claim(spec, source.infos, str(folder), scheme_of(spec, folder))
    return source


def refused(folder: Path, *parts: str) -> None:
    """Both the checks and load_hf itself refuse the folder, in one line that holds all the parts."""
    for act in (opened, load_hf):
        with pytest.raises(UserError) as caught:
            act(folder)
        assert "\n" not in str(caught.value)
        assert all(part in str(caught.value) for part in parts), str(caught.value)


def weight_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def test_the_folders_are_sound_before_they_are_spoiled(single, sharded):
    assert len(opened(single).infos) == len(opened(sharded).infos) - 1


# ------------------------------------------------------------------------------------------------ the table


def command(folder: Path) -> list[str]:
    return ["check", str(folder), "--no-torch", "--keep", str(folder.parent / "export")]


def is_one_line(line: str, says: tuple[str, ...]) -> bool:
    return line.startswith("error: ") and line.count("\n") == 1 and line.endswith("\n") and all(s in line for s in says)


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_folder_is_refused_in_one_line(kind, sharded, capsys):
    HOSTILE[kind].spoil(sharded)
    assert convert.main(command(sharded)) == 2
    err = capsys.readouterr().err
    assert is_one_line(err, HOSTILE[kind].says), err
    assert not (sharded / "ran").exists() and not list(sharded.parent.glob("*export*"))


@pytest.mark.nightly
def test_the_true_command_refuses_in_one_line(tmp_path):
    kinds = ("index: a path upwards", "header: truncated", "weights: a pickle only", "config: code of its own")
    running = {}
    for i, kind in enumerate(kinds):
        (tmp_path / str(i)).mkdir()
        HOSTILE[kind].spoil(folder := sound_folder(tmp_path / str(i) / "m"))
        argv = [sys.executable, "-m", "dpo_jax.convert", *command(folder)]
        running[kind] = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    for kind, process in running.items():
        out, err = process.communicate(timeout=300)
        assert (process.returncode, out) == (2, "") and is_one_line(err, HOSTILE[kind].says), (kind, out, err)
    assert not list(tmp_path.glob("*/m/ran")) and not list(tmp_path.glob("*/*export*"))


# ------------------------------------------------------------------------------------------------ files and links


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "a/../../outside.safetensors",
        "..\\outside.safetensors",
        "sub/x.safetensors",
        ".hidden.safetensors",
        "x.safetensors\0",
        "x.safetensors\n",
        "x.bin",
        "",
        7,
        None,
    ],
)
def test_an_index_leads_nowhere_but_into_its_folder(name, sharded):
    shutil.copy(sharded / FIRST, sharded.parent / "outside.safetensors")
    write_index(sharded, {tensor: name for tensor in weight_map(sharded)})
    refused(sharded, INDEX, "is followed")


@pytest.mark.parametrize("linked", [FIRST, INDEX, "config.json"])
def test_a_link_out_of_the_folder_is_refused(linked, sharded):
    outside = sharded.parent / "outside"
    (sharded / linked).rename(outside)
    (sharded / linked).symlink_to(outside)
    refused(sharded, linked, "leads out of its folder")


def test_a_link_inside_the_folder_is_followed(sharded):
    (sharded / FIRST).rename(sharded / "kept")
    (sharded / FIRST).symlink_to("kept")
    opened(sharded)


def test_links_of_the_hub_cache_lead_into_its_own_blobs_only(sharded, tmp_path):
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "abc"
    snapshot.parent.mkdir()
    sharded.rename(snapshot)
    for i, path in enumerate(p for p in list(snapshot.iterdir()) if p.is_file()):
        path.rename(cache / "blobs" / str(i))
        path.symlink_to(f"../../blobs/{i}")
    opened(snapshot)
    save_hf(load_hf(snapshot), tmp_path / "export", snapshot)
    assert not any(path.is_symlink() for path in (tmp_path / "export").rglob("*"))
    (snapshot / FIRST).unlink()
    (snapshot / FIRST).symlink_to("../../../elsewhere")
    (tmp_path / "elsewhere").write_bytes(b"x")
    refused(snapshot, FIRST, "leads out of its folder")


def test_a_folder_that_is_no_snapshot_has_no_blobs(sharded):
    blobs = sharded.parent.parent / "blobs"
    blobs.mkdir()
    (sharded / FIRST).rename(blobs / "0")
    (sharded / FIRST).symlink_to("../../blobs/0")
    refused(sharded, FIRST, "leads out of its folder")


def test_a_file_beside_the_weights_that_leads_outside_is_not_copied(single, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("key")
    (single / "tokenizer.json").unlink()
    (single / "tokenizer.json").symlink_to(secret)
    model = load_hf(single)
    with pytest.raises(UserError, match="tokenizer.json leads out of its folder"):
        save_hf(model, tmp_path / "export", single)
    assert not (tmp_path / "export").exists()


def test_what_is_not_a_regular_file_is_refused(sharded):
    (sharded / FIRST).unlink()
    (sharded / FIRST).mkdir()
    refused(sharded, FIRST, "not a regular file")
    (sharded / FIRST).rmdir()
    os.mkfifo(sharded / FIRST)
    refused(sharded, FIRST, "not a regular file")
    (sharded / FIRST).unlink()
    (sharded / FIRST).symlink_to("nowhere")
    refused(sharded, FIRST, "not a regular file")


# ------------------------------------------------------------------------------------------------ missing and twice


def test_missing_files_are_named(single, sharded):
    (sharded / SECOND).unlink()
    refused(sharded, SECOND, "is missing")
    (single / "model.safetensors").unlink()
    (single / "pytorch_model.bin").unlink()
    refused(single, "has neither model.safetensors")
    (single / "config.json").unlink()
    refused(single, "config.json is missing")


def test_a_folder_that_is_not_there_is_named(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise ConnectionError("offline\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    (tmp_path / "file").write_text("x")
    for name, part in [
        (str(tmp_path / "none"), "there is no folder"),
        (tmp_path / "none", "there is no folder"),
        ("../up", "there is no folder"),
        ("a/b/c", "there is no folder"),
        ("", "is not a model folder|config.json"),
        ("org/name", "the hub did not give a model of that name .ConnectionError: offline"),
        (str(tmp_path / "file"), "is a file, not a model folder"),
    ]:
        with pytest.raises(UserError, match=part) as caught:
            load_hf(name)
        assert "\n" not in str(caught.value)


def test_a_hub_id_is_downloaded_without_pickles(single, monkeypatch):
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **kw: asked.update({name: kw}) or str(single)
    )
    assert local_folder("org/name") == single
    patterns = asked["org/name"]["allow_patterns"]
    assert "*.safetensors" in patterns and not any("bin" in pattern or "py" in pattern for pattern in patterns)


def test_a_tensor_in_two_shards_is_refused(sharded):
    twice = load_file(sharded / FIRST)
    name = next(iter(twice))
    save_file({**load_file(sharded / SECOND), name: twice[name]}, sharded / SECOND)
    refused(sharded, name, FIRST, SECOND)


def test_an_index_and_its_files_must_agree(sharded):
    table = weight_map(sharded)
    name = next(name for name, file in table.items() if file == FIRST)
    write_index(sharded, {**table, name: SECOND})
    refused(sharded, name, SECOND, "does not hold it")
    write_index(sharded, {**table, "model.extra.weight": FIRST})
    refused(sharded, "model.extra.weight", "does not hold it")
    write_index(sharded, {other: file for other, file in table.items() if other != name})
    refused(sharded, name, "does not list")


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "layer", "transposed"])
def test_tensors_must_be_those_of_the_config(change, single):
    arrays = load_file(single / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    match change:
        case "missing":
            del arrays[name]
        case "extra":
            name = "model.layers.1.self_attn.q_proj.bias"
            arrays[name] = np.zeros(32, np.float32)
        case "layer":
            name = "model.layers.2.mlp.up_proj.weight"
            arrays[name] = arrays["model.layers.1.mlp.up_proj.weight"]
        case "shape":
            arrays[name] = arrays[name][:-1]
        case "transposed":
            arrays[name] = np.ascontiguousarray(arrays[name].T)
    save_file(arrays, single / "model.safetensors")
    refused(single, name, str(single))


def test_a_head_that_is_not_tied_must_be_there(single):
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    refused(single, "'lm_head.weight' is missing")


def test_a_tied_head_with_other_numbers_is_refused(single):
    """PyTorch would not tie them; training one of the two would be another model than the one it loads."""
    arrays = load_file(single / "model.safetensors")
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"] + 1
    save_file(arrays, single / "model.safetensors")
    with pytest.raises(UserError, match="'lm_head.weight' differs from 'model.embed_tokens.weight'"):
        load_hf(single)


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.float64, ml_dtypes.float8_e4m3fn, np.bool_])
def test_only_plain_floating_point_weights_are_read(dtype, single):
    arrays = load_file(single / "model.safetensors")
    arrays["model.norm.weight"] = np.ones(32).astype(dtype)
    save_file(arrays, single / "model.safetensors")
    refused(single, "model.norm.weight", "dequantise or convert")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_damaged_weight_is_named(value, dtype, single):
    arrays = load_file(single / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    arrays[name] = arrays[name].astype(dtype)
    arrays[name][3, 2] = value
    save_file(arrays, single / "model.safetensors")
    with pytest.raises(UserError, match=f"{name}' has 1 values that are NaN or infinite"):
        load_hf(single)


# ------------------------------------------------------------------------------------------------ broken files


def header(table: dict, size: int = 0) -> bytes:
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * size


def one(**changes) -> dict:
    return {"model.norm.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


BROKEN = {
    "empty": b"",
    "short": b"abc",
    "length bomb": struct.pack("<Q", 1 << 62) + b"{}",
    "length past the end": struct.pack("<Q", 100) + b"{}",
    "not json": struct.pack("<Q", 8) + b"notjson!",
    "offsets past the end": header(one(data_offsets=[0, 8]), 4),
    "size and shape differ": header(one(shape=[3]), 8),
    "shape bomb": header(one(shape=[2**40, 2**40]), 8),
    "negative": header(one(shape=[-2]), 8),
    "unknown dtype": header(one(dtype="F7"), 8),
    "hole": header(one(data_offsets=[8, 16]), 16),
    "left over": header(one(), 16),
    "pickle": pickle.dumps([1, 2, 3]),
    "html": b"<!doctype html><html>404</html>",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named(kind, single):
    (single / "model.safetensors").write_bytes(BROKEN[kind])
    refused(single, "model.safetensors", "not a whole safetensors file")


@given(st.floats(0, 1, exclude_max=True))
@settings(max_examples=20, deadline=None)
def test_a_truncated_file_is_named(sound, tmp_path_factory, part):
    folder = Path(shutil.copytree(sound["single"], tmp_path_factory.mktemp("t") / "m"))
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: int(part * len(data))])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        opened(folder)


@given(st.integers(0), st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_a_flipped_bit_in_a_header_is_refused_or_harmless(sound, tmp_path_factory, where, bit):
    folder = Path(shutil.copytree(sound["single"], tmp_path_factory.mktemp("f") / "m"))
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    data[where % (8 + size)] ^= 1 << bit
    path.write_bytes(data)
    wanted = {name: info[1:] for name, info in Tensors(sound["single"]).infos.items()}
    try:
        source = opened(folder)
    except UserError as error:
        assert "\n" not in str(error)
        return
    # Only free text of the header may have changed unnoticed.
    assert {name: info[1:] for name, info in source.infos.items()} == wanted


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "7", '"x"', "[" * 100_000, '{"a": 1, "a": 2}', b"\xff\xfe{}", '{"weight_map": []}', "{}"],
    ids=lambda text: str(text)[:12],
)
def test_json_that_is_not_as_it_must_be_is_named(name, text, sharded):
    (sharded / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(sharded, name)


def test_a_huge_json_file_is_not_read(sharded, monkeypatch):
    monkeypatch.setattr(tensors, "MAX_JSON_BYTES", 10)
    refused(sharded, "config.json", "more than the 10")


def test_text_from_a_folder_stays_on_its_line(single):
    arrays = load_file(single / "model.safetensors")
    save_file({**arrays, "evil\n\x1b[2Jname": np.zeros(1, np.float32)}, single / "model.safetensors")
    refused(single, "evil\\n\\x1b[2Jname")


def test_nothing_is_said_on_the_terminal(single, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_hf(single)
    assert capfd.readouterr() == ("", "")
