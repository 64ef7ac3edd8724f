"""The run reports the model that it leaves: what rounding to the folder's dtype takes from the training is said."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from dpo_jax import convert, evaluate, train
from dpo_jax.hf import tensors
from dpo_jax.reporting.journal import read_records
from dpo_jax.run import written
from tests.support.tiny_rows import write, yes_or_no
from tests.support.worlds import write_model

UNROUNDED = "eval_unrounded/rewards/margins"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder whose tensors are bfloat16, and pairs."""
    root = tmp_path_factory.mktemp("written")
    write_model(root / "model", "llama", "bfloat16", num_hidden_layers=2)
    rows = yes_or_no(20)
    write(root / "train.jsonl", *rows[:14])
    write(root / "eval.jsonl", *rows[14:])
    return root


def trained(world, name, *more):
    """A run at a rate whose updates are smaller than half a digit of most bfloat16 weights."""
    given = [
        "log.report=false",  # a page takes longer than the steps
        "batch.pairs=4",
        "batch.micro_tokens=256",
        "steps=4",
        "optimizer.learning_rate=1e-5",
        f"output={world / name}",
    ]
    given += [
        f"model.path={world / 'model'}",
        f"data.train={world / 'train.jsonl'}",
        f"data.eval={world / 'eval.jsonl'}",
    ]
    given += [f"data.cache={world / 'cache'}", *more]
    assert train.main(given) == 0
    return read_records(world / name / "metrics.jsonl")[-1]


def measured(world, folder, capsys):
    """Margin of an exported folder, by a command of its own."""
    capsys.readouterr()
    call = [str(folder), str(world / "eval.jsonl"), "--reference", str(world / "model"), "--json"]
    assert evaluate.main(call) == 0
    return json.loads(capsys.readouterr().out)["rewards/margins"]


def test_the_last_evaluation_is_of_the_folder_that_is_left(world, capsys, monkeypatch):
    monkeypatch.setattr(
        tensors, "PIECE_BYTES", 64
    )  # so that tensors have several pieces, and a last one that is shorter
    last = trained(world, "same", "export.rounding=nearest")
    said = capsys.readouterr().out
    margin, before = last["eval_rewards/margins"], last[UNROUNDED]
    # sums of the same numbers in another order; before rounding the margin is several times as large
    assert measured(world, world / "same" / "model", capsys) == pytest.approx(margin, rel=1e-4, abs=1e-6)
    assert abs(margin) < 0.7 * abs(before)
    assert (
        f"held-out margin {before:+.3g} before and {margin:+.3g} after rounding to the dtype of the source; to" in said
    )
    old, new = (load_file(world / part / "model.safetensors") for part in ("model", "same/model"))
    moved = sum(int((old[name] != new[name]).sum()) for name in old)
    total = sum(value.size for value in old.values())
    assert 0 < moved < 0.5 * total and f"{moved / total:.1%} of the {total:,} weights moved" in said


def test_a_float32_export_keeps_all_of_it(world, capsys):
    same = trained(world, "same", "export.rounding=nearest")
    capsys.readouterr()
    last = trained(world, "wide", "export.dtype=float32")
    said = capsys.readouterr().out
    assert UNROUNDED not in last and "after rounding" not in said
    assert last["eval_rewards/margins"] == pytest.approx(same[UNROUNDED], rel=1e-5)
    folder = world / "wide" / "model"
    assert measured(world, folder, capsys) == pytest.approx(last["eval_rewards/margins"], rel=1e-4, abs=1e-6)
    assert {str(value.dtype) for value in load_file(folder / "model.safetensors").values()} == {"float32"}
    assert json.loads((folder / "config.json").read_text("utf-8"))["dtype"] == "float32"


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (0.5, 0.49, "held-out margin +0.5 before and +0.49 after rounding to bfloat16"),
        (0.5, 0.1, "held-out margin +0.5 before and +0.1 after rounding to bfloat16; to keep it all set export.dtype"),
        (None, 0.1, None),  # nothing was rounded
    ],
)
def test_remedies_are_said_where_little_is_left(before, after, words):
    record = {"eval_rewards/margins": after} | ({} if before is None else {UNROUNDED: before})
    said = written.margin_line(record, "bfloat16")
    assert said is None if words is None else said.startswith(words)
    assert words is None or ("export.dtype=float32" in said) == ("export.dtype" in words)


def test_rounding_is_that_of_the_export(world):
    """To nearest even, as NumPy casts."""
    values = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    found = written._rounded({"a": values, "b": values}, (("a", (8, 7)),), None)
    wanted = values.astype(load_file(world / "model" / "model.safetensors")["model.norm.weight"].dtype)
    np.testing.assert_array_equal(np.asarray(found["a"]), wanted.astype(np.float32))
    np.testing.assert_array_equal(np.asarray(found["b"]), values)


@pytest.mark.nightly
def test_an_export_that_is_rounded_at_random_is_the_model_that_was_measured_and_keeps_the_mean(world, capsys):
    """To nearest half of the margin and more is lost here; at random only what noise takes."""
    trained(world, "wide", "export.dtype=float32")
    last = trained(world, "random")
    margin, before = last["eval_rewards/margins"], last[UNROUNDED]
    assert measured(world, world / "random" / "model", capsys) == pytest.approx(margin, rel=1e-4, abs=1e-6)
    exact, kept = (load_file(world / name / "model" / "model.safetensors") for name in ("wide", "random"))
    start = load_file(world / "model" / "model.safetensors")
    moves = [
        np.concatenate([(each[n].astype(np.float64) - start[n].astype(np.float64)).ravel() for n in start])
        for each in (exact, kept)
    ]
    # the projection of what was kept on what was learned: 1 on average, with the noise of 34,720 roundings
    assert moves[1] @ moves[0] / (moves[0] @ moves[0]) == pytest.approx(1, abs=0.1)
    assert abs(margin - before) < 0.5 * abs(before)
    assert convert.main(["export", str(world / "random"), str(world / "again")]) == 0
    assert (world / "again" / "model.safetensors").read_bytes() == (
        world / "random" / "model" / "model.safetensors"
    ).read_bytes()
