"""`train --dry-run`: what training would say, before it costs anything."""

import re
from fractions import Fraction

import pytest
from safetensors.numpy import load_file

from dpo_jax import sharding, train
from dpo_jax.hf import checkpoint
from dpo_jax.planning import machine
from dpo_jax.run.dry_run import evaluations_left
from dpo_jax.run.evaluator import Evaluator
from tests.support.tiny_folders import write_folder
from tests.support.tiny_rows import byte_tokenizer, write, yes_or_no


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small model, and a run of two steps on it that is finished; what both said is kept."""
    root = tmp_path_factory.mktemp("dry")
    tokenizer = byte_tokenizer()
    write_folder(root / "model", num_hidden_layers=1, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(root / "model")
    write(root / "train.jsonl", *yes_or_no(12))
    write(root / "held.jsonl", *yes_or_no(4))
    return root


@pytest.fixture(autouse=True)
def _small_products(monkeypatch):
    monkeypatch.setitem(machine.MATMUL_SIZE, "cpu", 64)


def arguments(world, name, *more):
    given = {"model.path": world / "model", "data.train": world / "train.jsonl", "output": world / name, "steps": 2}
    given |= {"data.eval": world / "held.jsonl", "batch.pairs": 4, "batch.micro_tokens": 512, "data.max_length": 128}
    return [*(f"{key}={value}" for key, value in given.items()), *more]


def test_it_says_what_training_says_then_and_neither_writes_nor_compiles_nor_reads_weights(world, capsys, monkeypatch):
    with monkeypatch.context() as forbidden:
        for owner, name in ((sharding.Compiled, "lower"), (sharding.Compiled, "__call__"), (checkpoint, "load_hf")):
            forbidden.setattr(owner, name, lambda *_, **__: pytest.fail("a dry run costs nothing"))
        before = sorted(world.rglob("*"))
        assert train.main(["--dry-run", *arguments(world, "run")]) == 0
        assert sorted(world.rglob("*")) == before
    dry = capsys.readouterr().out
    assert train.main(arguments(world, "run")) == 0
    said = capsys.readouterr().out
    shared = dry.partition(f"{world / 'model'}: ")[0].splitlines()
    assert any("12 rows read: 12 kept" in line for line in shared) and "2 steps of 4 pairs" in shared[-1]
    assert [line for line in shared if line not in said.splitlines()] == []
    weights = load_file(world / "run" / "model" / "model.safetensors")
    (parameters,) = re.findall(r"model: ([\d,]+) parameters", dry)
    assert int(parameters.replace(",", "")) == sum(leaf.size for leaf in weights.values())
    for item in ("parameters", "optimizer", "activations", "together", "fits: ", "disk: ", "time of products"):
        assert item in dry

    assert train.main([*arguments(world, "run"), "--dry-run"]) == 0
    assert "finished already" in capsys.readouterr().out
    assert train.main([*arguments(world, "run", "optimizer.schedule=constant"), "--dry-run"]) == 2
    assert "holds a run with another setting, optimizer.schedule" in capsys.readouterr().err
    more = arguments(world, "run", "checkpoint.allow_change=[steps]")
    assert train.main([*more, "steps=6", "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert "goes on after step 2" in dry and re.search(
        r"time of 4 steps: .*, at [\d.e-]+ s each as measured so far", dry
    )


def test_it_says_what_a_bucket_will_hold_and_asks_nobody(world, capsys):
    more = arguments(world, "elsewhere", "checkpoint.folder=gs://pairs/run")
    assert train.main(["--dry-run", *more]) == 0
    said = capsys.readouterr().out
    assert (
        re.search(r"gs://pairs/run: 2 checkpoints of [\d.]+ \w+ and one that is written", said) and "disk: " not in said
    )
    assert not (world / "elsewhere").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["batch.pairs=13"], "batch.pairs: 13 is more than the 12 examples"),
        (["model.path=/nowhere/at/all"], "/nowhere/at/all"),
        (["optimizer.warmup_steps=9"], "optimizer.warmup_steps"),
        (["data.train=none.jsonl"], "none.jsonl"),
    ],
)
def test_it_refuses_what_training_refuses_in_the_same_words(world, capsys, more, says):
    found = []
    for dry in ([], ["--dry-run"]):
        assert train.main([*arguments(world, "other", *more), *dry]) == 2
        found.append(capsys.readouterr().err)
    assert found[0] == found[1] and says in found[0]


def test_a_run_that_does_not_fit_is_told_by_the_exit_code(world, capsys, monkeypatch):
    monkeypatch.setattr(machine, "memory_of_a_device", lambda: 1 << 18)
    assert train.main([*arguments(world, "small"), "--dry-run"]) == 1
    assert "does not fit: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "speeds, said", [({"bfloat16": 20.0, "float32": 61.0}, True), ({"bfloat16": 60.0, "float32": 61.0}, False)]
)
def test_a_dtype_that_is_slow_on_this_device_is_named_with_the_faster(world, capsys, monkeypatch, speeds, said):
    monkeypatch.setattr(machine, "matmul_gflops", lambda device, dtype: speeds[dtype])
    assert train.main([*arguments(world, "slow", "model.compute_dtype=bfloat16"), "--dry-run"]) == 0
    line = "in float32 a product is 3.0 times as fast here: model.compute_dtype=float32"
    assert (line in capsys.readouterr().out) == said


@pytest.mark.parametrize("every", [None, Fraction(1), Fraction(3), Fraction(5, 2), Fraction(40)])
def test_evaluations_are_counted_as_they_will_be_made(every):
    evaluator = object.__new__(Evaluator)
    evaluator._held_out, evaluator._prompts, evaluator._every = {"": None}, None, every
    for made in range(11):
        due = sum(evaluator.due(step, 10) for step in range(made + 1 if made else 0, 11))
        assert evaluations_left(every, 10 - made, 10) == due


def test_it_speaks_of_one_process_and_is_refused_where_several_were_started(world, capsys, monkeypatch):
    for name, value in {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert train.main(["--dry-run", *arguments(world, "other")]) == 2
    said = capsys.readouterr()
    assert "2 were started" in said.err and "dpo_jax.plan" in said.err and not said.out
