"""The whole job with an adapter: what comes out, what it takes, and going on from it."""

import functools
import itertools
import json
import math
import os
import shutil
import signal
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from dpo_jax import convert, evaluate, load_hf, logits, train
from dpo_jax.hf import verify
from dpo_jax.hf.configs import read_spec
from dpo_jax.reporting.journal import Journal, read_records
from tests.support import packed_weights
from tests.support.tiers import by_day
from tests.support.tiny_folders import write_folder
from tests.support.tiny_rows import byte_tokenizer, write

IDS = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root, tokenizer = tmp_path_factory.mktemp("adapter"), byte_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "vocab_size": 300}
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}
    write_folder(root / "model", "llama", "bfloat16", **ends, **sizes, tie_word_embeddings=False)
    tokenizer.save_pretrained(str(root / "model"))
    rows = [
        {"prompt": f"Say {n}", "chosen": "yes " * (n % 2 + 1), "rejected": "no" * (n % 3 + 1)} for n in range(11, 25)
    ]
    write(root / "train.jsonl", *rows)
    return root


def arguments(world, output, *more):
    given = {"model.path": world / "model", "data.train": world / "train.jsonl", "data.cache": world / "cache"}
    given |= {"data.eval": world / "train.jsonl", "data.max_length": 64, "batch.pairs": 4, "steps": 3}
    given |= {"optimizer.learning_rate": 0.02, "optimizer.warmup_steps": 0, "log.tensorboard": "false"}
    given |= {"log.report": "false"}  # a page takes longer than the steps
    return [f"{key}={value}" for key, value in given.items()] + [f"output={world / output}", *more]


def ran(world, output, *more):
    assert train.main(arguments(world, output, *more)) == 0
    return world / output


@pytest.fixture(scope="module")
def done(world):
    return ran(world, "done", "adapter.rank=4", "adapter.dropout=0.1", "export.kind=both")


FEW = ("adapter.rank=4", "adapter.dropout=0.1", "checkpoint.every=1", "optimizer.epsilon=1e-3")
"""With an epsilon that is no less than most gradients: by Adam's own, one of 10,000 that is 0 but for rounding has gone
the other way by its sign, which moved the next loss by 2e-4."""


@pytest.fixture(scope="module")
def in_few_bits(world):
    """The run of a base in so many bits, run when it is first asked for."""
    return functools.cache(lambda few: ran(world, f"whole {few}", *FEW, f"model.quantise={few}"))


def bytes_of(folder, name="adapter_model.safetensors"):
    return {key: tensor.tobytes() for key, tensor in load_file(folder / name).items()}


def losses(folder):
    return [record["loss"] for record in read_records(folder / "metrics.jsonl") if "loss" in record]


def test_the_base_is_left_and_both_folders_are_one_function(world, done):
    """To 1e-4 of logits of about 10: the merged folder is rounded to float32 here, not to the base's bfloat16."""
    before = (world / "model" / "model.safetensors").read_bytes()
    adapted = load_hf(world / "model", adapter=done / "adapter")
    found = logits(adapted.spec, adapted.params, IDS)
    base = load_hf(world / "model")
    assert np.abs(found - logits(base.spec, base.params, IDS)).max() > 0.1
    assert (
        convert.main(["merge", str(world / "model"), str(done / "adapter"), str(done / "exact"), "--dtype=float32"])
        == 0
    )
    exact = load_hf(done / "exact")
    np.testing.assert_allclose(found, logits(exact.spec, exact.params, IDS), atol=1e-4)
    merged, rounded = load_file(done / "model" / "model.safetensors"), load_file(done / "exact" / "model.safetensors")
    for name, tensor in rounded.items():  # added in float32, and rounded once
        np.testing.assert_array_equal(merged[name], tensor.astype(merged[name].dtype), err_msg=name)
    assert (world / "model" / "model.safetensors").read_bytes() == before


def test_peft_reads_the_adapter_as_the_same_function(world, done):
    """To 1e-4 of logits of about 10, of PyTorch's base in float32."""
    pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns PEFT of names that it will take back
        theirs, _ = verify.torch_logits(world / "model", np.asarray(IDS), done / "adapter")
    adapted = load_hf(world / "model", adapter=done / "adapter")
    np.testing.assert_allclose(logits(adapted.spec, adapted.params, IDS), theirs, atol=1e-4)


def test_checkpoints_hold_the_factors_and_their_moments_alone(done):
    tree = ocp.StandardCheckpointer().metadata(done / "checkpoints" / "3" / "state").item_metadata.tree
    held = {part: sum(math.prod(x.shape) for x in jax.tree.leaves(tree[part])) for part in ("params", "optimizer")}
    factors = sum(math.prod(x.shape) for x in load_file(done / "adapter" / "adapter_model.safetensors").values())
    assert held["params"] == factors and held["optimizer"] == 2 * factors + 1  # two moments, and Adam's count


def test_a_new_adapter_starts_at_the_constant_and_moves(done):
    """The reference's numbers come from another program than the step's: to 1e-6."""
    found = losses(done)
    assert found[0] == pytest.approx(math.log(2), abs=1e-6) and found[-1] < found[0]


def test_the_same_command_again_changes_nothing(world, done, capsys):
    before = bytes_of(done / "adapter")
    ran(world, "done", "adapter.rank=4", "adapter.dropout=0.1", "export.kind=both")
    assert "finished already: the adapter is in" in capsys.readouterr().out and bytes_of(done / "adapter") == before


@pytest.mark.parametrize("few", by_day(["nf4", "int8"], {"nf4"}))
def test_going_on_is_never_having_stopped(world, in_few_bits, monkeypatch, few):
    more, whole = (*FEW, f"model.quantise={few}"), in_few_bits(few)
    with monkeypatch.context() as patch:
        honest = Journal.step

        def step(self, now, metrics):
            honest(self, now, metrics)
            os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(Journal, "step", step)
        assert train.main(arguments(world, f"parts {few}", *more)) == 75
    assert bytes_of(ran(world, f"parts {few}", *more) / "adapter") == bytes_of(whole / "adapter")


MESHES = [("mesh.data=2", "mesh.fsdp=2"), ("mesh.tensor=2",), ("reference.mode=live",)]


@pytest.mark.nightly
@pytest.mark.parametrize(("more", "few"), [*itertools.product(MESHES, ("null", "nf4"))])
def test_devices_and_the_kind_of_reference_are_invisible(world, in_few_bits, more, few):
    """Losses to 1e-5 of a run on four devices that share the weights, on a base in four bits as well."""
    one = in_few_bits(few)
    found = ran(world, f"{few} {' '.join(more)}", *FEW, f"model.quantise={few}", *more)
    assert losses(found) == pytest.approx(losses(one), abs=1e-5)


@pytest.mark.parametrize(("reference", "constant"), [("start", True), ("base", False)])
@pytest.mark.parametrize("mode", by_day(["cached", "live"], {"cached"}))
def test_going_on_from_an_adapter(world, done, reference, constant, mode):
    path = f"adapter.path={done / 'adapter'}"
    found = ran(world, f"on {reference} {mode}", path, f"reference.adapter={reference}", f"reference.mode={mode}")
    assert (losses(found)[0] == pytest.approx(math.log(2), abs=1e-6)) == constant
    before, after = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (done, found))
    assert before.keys() == after.keys() and any((before[name] != after[name]).any() for name in before)


def test_a_run_from_an_adapter_begins_with_that_adapter(world, done):
    """Its first evaluation is what `evaluate --adapter` says of it."""
    found = ran(world, "evaluated", f"adapter.path={done / 'adapter'}", "reference.adapter=base")
    (first, *_) = [record for record in read_records(found / "metrics.jsonl") if "eval_rewards/margins" in record]
    record = [x for x in read_records(done / "metrics.jsonl") if "eval_rewards/margins" in x][-1]
    kept = "eval_unrounded/rewards/margins" if "eval_unrounded/rewards/margins" in record else "eval_rewards/margins"
    assert first["eval_rewards/margins"] == pytest.approx(record[kept], abs=2e-6)


def test_dora_and_whole_leaves_come_out_merged(world, capsys):
    more = (
        "adapter.rank=4",
        "adapter.dora=true",
        "adapter.targets=[q_proj,v_proj]",
        'adapter.modules_to_save=[".*norm/scale"]',
    )
    found = ran(world, "dora", *more)
    assert not (found / "adapter").exists()
    before, after = (load_file(folder / "model.safetensors") for folder in (world / "model", found / "model"))
    moved = {name for name in before if (before[name] != after[name]).any()}
    assert moved == {name for name in before if "norm" in name or "q_proj" in name or "v_proj" in name}
    assert train.main(arguments(world, "dora", *more, "export.kind=adapter")) == 2
    assert "export.kind" in capsys.readouterr().err


def test_an_earlier_checkpoint_is_exported_as_an_adapter(world, capsys):
    more = ("adapter.rank=4", "checkpoint.every=1", "checkpoint.keep=3")
    found = ran(world, "kept", *more)
    assert convert.main(["export", str(found), str(world / "second"), "--step", "2"]) == 0
    assert convert.main(["export", str(found), str(world / "third")]) == 0
    second, third = bytes_of(world / "second"), bytes_of(world / "third")
    assert third == bytes_of(found / "adapter") and second != third and second.keys() == third.keys()


@pytest.mark.nightly
def test_bitsandbytes_own_codes_are_kept(world, tmp_path):
    """A folder in nf4 is trained on in nf4: the very run of its dequantised folder that is quantised again."""
    folder = shutil.copytree(world / "model", tmp_path / "packed")
    packed_weights.pack(folder, packed_weights.four_bits)
    assert convert.main(["export", str(folder), str(tmp_path / "plain"), "--dtype=float32"]) == 0
    own = ran(world, "own codes", "adapter.rank=4", f"model.path={folder}")
    again = ran(world, "codes again", "adapter.rank=4", f"model.path={tmp_path / 'plain'}", "model.quantise=nf4")
    assert losses(own) == losses(again) and bytes_of(own / "adapter") == bytes_of(again / "adapter")


REFUSED = {
    "adapter.targets=q_porj": "did you mean q_proj",
    "adapter.targets=.*nothing": "matches no module",
    "adapter.layers=[9]": "the model's layers are 0 to",
    "adapter.targets=default adapter.dora=1": "adapter.dora",
    "adapter.alpha=0": "adapter.alpha",
    "model.freeze=[embed/.*]": "model.freeze",
    "optimizer.param_dtype=bfloat16": "optimizer.param_dtype",
    "reference.adapter=base": "there is no adapter.path",
    "adapter.rank=null adapter.dropout=0.1": "nothing is adapted",
    "adapter.rank=null model.quantise=nf4": "adapter.rank",
    "adapter.rank=null export.kind=merged": "export.kind",
    "adapter.modules_to_save=[layers/0/mlp/up/kernel]": "leave one out",
    "adapter.rank=null adapter.path=/nowhere": "adapter.path",
}


@pytest.mark.parametrize("settings", REFUSED)
def test_what_cannot_be_adapted_is_one_line(world, tmp_path, capsys, settings):
    assert train.main(arguments(world, tmp_path / "run", "adapter.rank=4", *settings.split(" "))) in (1, 2)
    said = capsys.readouterr().err.strip()
    assert REFUSED[settings] in said and "Traceback" not in said and len(said.splitlines()) == 1


def test_a_low_rate_is_said(world, capsys):
    ran(world, "low", "adapter.rank=4", "optimizer.learning_rate=5e-7", "steps=1")
    assert "is low for an adapter" in capsys.readouterr().out
    settings = json.loads((world / "low" / "run.json").read_text())["settings"]
    assert settings["optimizer"]["learning_rate"] == 5e-7


def test_evaluate_compares_base_and_adapter(world, done, capsys):
    line = [str(world / "model"), str(world / "train.jsonl"), "--adapter", str(done / "adapter"), "--json"]
    assert evaluate.main([*line, "--reference", str(world / "model"), "--max-length", "64"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rewards/margins"] > 0 and read_spec(world / "model").vocab_size == 300
