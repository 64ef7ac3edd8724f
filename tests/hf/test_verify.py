"""`convert check` passes a folder that comes back as it was, and says of every kind of damage where it is."""

import json
import shutil
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file

from dpo_jax.errors import UserError
from dpo_jax.hf import tensors, verify
from dpo_jax.hf.checkpoint import save_hf
from dpo_jax.hf.configs import read_spec
from dpo_jax.hf.verify import Verification, check
from tests.conftest import ROOT
from tests.support.reward_folders import torch_folder
from tests.support.tiers import MIXERS, by_day
from tests.support.tiny_folders import write_folder

TENSORS, FILES, SUMS = "tensors", "files", "SHA256SUMS"
KEYS, SAME, OURS = "PyTorch, tensors", "PyTorch, logits", "PyTorch and JAX, logits"
NAME = "model.layers.1.mlp.up_proj.weight"
FAMILIES = sorted(
    {path.parent.name for place in (ROOT.parent, ROOT) for path in place.glob("shared/families/*/config.json")}
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify") / "m"
    return write_folder(folder, "llama", shards=2, num_hidden_layers=2, architectures=["LlamaForCausalLM"])


def torch_or_skip() -> None:
    pytest.importorskip("torch")


def differing(report: Verification) -> dict[str, str]:
    """What was found in the comparisons that failed."""
    return {one.what: one.found for one in report.checks if one.ok is False}


def exporting(monkeypatch, damage, **options) -> None:
    """From now on an export is written with `options`, and damaged before it is compared."""

    def save(model, folder, like):
        save_hf(model, folder, like, **options)
        damage(folder)

    monkeypatch.setattr(verify, "save_hf", save)


# ------------------------------------------------------------------------------------------------ what is sound


@pytest.mark.parametrize(
    ("family", "dtype", "shards"),
    [("llama", "float32", 1), ("mistral", "bfloat16", 3), ("qwen2", "float16", 1), ("qwen3", "bfloat16", 2)],
)
def test_a_sound_folder_passes_every_comparison(family, dtype, shards, tmp_path):
    torch_or_skip()
    folder = write_folder(tmp_path / "m", family, dtype, shards, num_hidden_layers=2)
    report = check(folder)
    assert report.ok, report
    assert [one.what for one in report.checks] == [TENSORS, FILES, SUMS, "left behind", KEYS, SAME, OURS]
    assert [one.ok for one in report.checks] == [True, True, True, None, True, True, True]
    assert report.checks[3].found == "pytorch_model.bin"


def test_a_reward_model_is_compared_by_its_scores(tmp_path):
    torch_or_skip()
    folder = torch_folder(tmp_path / "m", "qwen3")
    (folder / "generation_config.json").write_text("{}")  # a reward model generates nothing, and loses it
    lines: list[str] = []
    report = check(folder, say=lines.append)
    assert report.ok and report.checks[-1].what == "PyTorch and JAX, scores", report
    assert report.checks[-2].what == "PyTorch, scores" and len(lines) == 1 + len(report.checks)
    scores, _ = verify.torch_logits(folder, verify.token_rows(96, 0))
    assert scores.shape == (verify.ROWS, 1) and np.ptp(scores) > 0.1


@pytest.mark.parametrize("family", by_day(FAMILIES, MIXERS) or ["none"])
def test_a_folder_that_pytorch_wrote_comes_back(family, shared):
    report = check(shared / "families" / family, torch=False)
    assert report.ok, report


def test_a_folder_that_pytorch_wrote_has_its_logits(shared):
    torch_or_skip()
    report = check(shared / "families" / "llama")
    assert report.ok and report.checks[-1].what == OURS, report


def test_token_rows_are_fixed_and_hold_no_padding():
    rows = verify.token_rows(7, 3)
    assert rows.shape == (verify.ROWS, verify.LENGTH) and (rows == verify.token_rows(7, 3)).all()
    assert set(rows.ravel().tolist()) == {0, 1, 2, 4, 5, 6}
    assert set(verify.token_rows(7).ravel().tolist()) == set(range(7))


# ------------------------------------------------------------------------------------------------ what is damaged


def test_one_bit_that_the_writer_got_wrong_is_seen(source, monkeypatch):
    """The export's own digests fit, since they are of what was written: only the source knows better."""
    torch_or_skip()
    real = tensors.write_tensors

    def write(path, infos, metadata, fetch):
        def flipped(name):
            array = np.array(fetch(name))
            if name == NAME:
                array.view(np.uint32)[3, 2] ^= 1 << 20
            return array

        return real(path, infos, metadata, flipped)

    monkeypatch.setattr(tensors, "write_tensors", write)
    found = differing(check(source))
    assert {TENSORS, SAME} <= found.keys() <= {TENSORS, SAME, OURS}
    assert found[TENSORS] == f"1 of 21: {NAME} (bytes)"


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"])
def test_a_file_that_was_dropped_is_named(name, source, monkeypatch):
    exporting(monkeypatch, lambda folder: (folder / name).unlink())
    found = differing(check(source, torch=False))
    assert found == {FILES: f"1 of 7: {name} (missing)", SUMS: f"does not fit {name}"}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", tensors.INDEX, "LICENSE"])
def test_a_file_with_another_byte_is_named(name, source, monkeypatch):
    exporting(monkeypatch, lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + b"\n"))
    found = differing(check(source, torch=False))
    assert found == {FILES: f"1 of 7: {name} (bytes)", SUMS: f"does not fit {name}"}


def test_a_file_too_many_is_named(source, monkeypatch):
    exporting(monkeypatch, lambda folder: (folder / "notes.txt").write_text("x"))
    assert differing(check(source, torch=False))[FILES] == "1 of 7: notes.txt (extra)"


def test_another_dtype_is_named(source, monkeypatch):
    torch_or_skip()
    exporting(monkeypatch, lambda folder: None, dtype="bfloat16", max_shard_bytes=10**9)
    found = differing(check(source))
    assert "21 of 21: " in found[TENSORS] and "(dtype F32 became BF16)" in found[TENSORS]
    assert "config.json (bytes)" in found[FILES] and found[SAME].startswith("original and export differ by ")
    assert KEYS not in found and SUMS not in found


def test_tensors_in_other_files_are_named(source, monkeypatch):
    exporting(monkeypatch, lambda folder: None, max_shard_bytes=10**9)
    found = differing(check(source, torch=False))
    assert "(file model-00001-of-00002.safetensors became model.safetensors)" in found[TENSORS]
    assert found[FILES] == f"1 of 7: {tensors.INDEX} (missing)"


def rewritten(folder: Path, change) -> None:
    """The file that holds NAME, written again after `change`, and the index with it."""
    index = json.loads((folder / tensors.INDEX).read_text())
    file = index["weight_map"][NAME]
    arrays = load_file(folder / file)
    change(arrays)
    save_file(arrays, folder / file, metadata={"format": "pt"})
    others = {name: other for name, other in index["weight_map"].items() if other != file}
    index["weight_map"] = others | dict.fromkeys(arrays, file)
    (folder / tensors.INDEX).write_text(json.dumps(index))


def test_a_tensor_with_another_name_is_named(source, monkeypatch):
    torch_or_skip()

    def rename(arrays):
        arrays["model.layers.1.mlp.upper.weight"] = arrays.pop(NAME)

    exporting(monkeypatch, lambda folder: rewritten(folder, rename))
    found = differing(check(source))
    assert found[TENSORS] == f"2 of 21: {NAME} (missing), model.layers.1.mlp.upper.weight (extra)"
    assert f"missing_keys {NAME}" in found[KEYS] and "unexpected_keys model.layers.1.mlp.upper.weight" in found[KEYS]


def test_another_shape_is_named(source, monkeypatch):
    def shorten(arrays):
        arrays[NAME] = arrays[NAME][:-1]

    exporting(monkeypatch, lambda folder: rewritten(folder, shorten))
    found = differing(check(source, torch=False))
    assert found[TENSORS] == f"1 of 21: {NAME} (shape (48, 32) became (47, 32))"


def test_a_lost_shard_is_named_and_pytorch_cannot_run_it(source, monkeypatch):
    torch_or_skip()
    exporting(monkeypatch, lambda folder: (folder / "model-00002-of-00002.safetensors").unlink())
    found = differing(check(source))
    assert "model-00002-of-00002.safetensors is missing" in found[TENSORS]
    assert found["PyTorch"].startswith("cannot run it: ") and "\n" not in found["PyTorch"]


@pytest.mark.parametrize("wrong", [lambda x: x + 0.1, lambda x: x * np.nan, lambda x: x[:, :-1]])
def test_logits_of_ours_that_are_not_pytorchs_are_seen(wrong, source, monkeypatch):
    torch_or_skip()
    real = verify.our_logits
    monkeypatch.setattr(verify, "our_logits", lambda model, rows: wrong(real(model, rows)))
    assert differing(check(source)).keys() == {OURS}


def test_an_adapter_beside_the_model_is_refused_as_training_refuses_it(source, tmp_path):
    folder = Path(shutil.copytree(source, tmp_path / "m"))
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    for use in (check, read_spec):
        with pytest.raises(UserError, match="an adapter of elsewhere beside a model.*convert merge"):
            use(folder)


def test_a_processor_that_is_lost_is_named(source, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(source, tmp_path / "m"))
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        (folder / name).write_text("{}")
    assert "processor_config.json" in next(one.found for one in check(folder).checks if one.what == FILES)
    save = verify.save_hf
    monkeypatch.setattr(verify, "save_hf", lambda *a: (save(*a), (a[1] / "preprocessor_config.json").unlink()))
    assert "preprocessor_config.json (missing)" in differing(check(folder, torch=False))[FILES]


# ------------------------------------------------------------------------------------------------ room


def test_without_torch_it_says_how_to_have_it(source, monkeypatch):
    monkeypatch.setattr(verify, "has_torch", lambda: False)
    report = check(source)
    assert report.ok and report.checks[-1].found == "not compared, PyTorch is not installed: pip install torch"


def test_no_room_is_said_before_anything_is_read(source, monkeypatch, tmp_path):
    torch_or_skip()
    monkeypatch.setattr(verify, "load_hf", lambda *_: pytest.fail("it was read"))
    memory = psutil.virtual_memory()._replace(available=1000)
    with monkeypatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: memory)
        with pytest.raises(UserError, match="takes 84.62 KiB of host memory and 0.98 KiB are available; --no-torch"):
            check(source)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 500))
        with pytest.raises(UserError, match="takes 84.62 KiB and 0.49 KiB are free in .*; --keep"):
            check(source)
        with pytest.raises(UserError, match="are free in .*; give a folder on a larger disk"):
            check(source, keep=tmp_path / "a" / "b")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        check(source, keep=tmp_path / "mine")
