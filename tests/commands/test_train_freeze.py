"""The whole job with some leaves frozen: what comes out, and what it takes."""

import functools
import math
import os
import signal

import jax
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from dpo_jax import train
from dpo_jax.reporting.journal import Journal
from tests.support.tiers import by_day
from tests.support.tiny_folders import write_folder
from tests.support.tiny_rows import byte_tokenizer, write


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root, tokenizer = tmp_path_factory.mktemp("freeze"), byte_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "vocab_size": 300}
    write_folder(root / "model", "llama", "bfloat16", **ends, tie_word_embeddings=False)
    tokenizer.save_pretrained(str(root / "model"))
    rows = [
        {"prompt": f"Say {n}", "chosen": "yes " * (n % 2 + 1), "rejected": "no" * (n % 3 + 1)} for n in range(11, 25)
    ]
    write(root / "train.jsonl", *rows)
    return root


def arguments(world, output, *more):
    given = {"model.path": world / "model", "data.train": world / "train.jsonl", "data.cache": world / "cache"}
    given |= {"data.max_length": 64, "batch.pairs": 4, "steps": 2, "output": world / output}
    given |= {"optimizer.learning_rate": 0.1, "optimizer.warmup_steps": 0, "log.tensorboard": "false"}
    given |= {"log.report": "false"}  # a page takes longer than the steps
    return [f"{key}={value}" for key, value in given.items()] + list(more)


@pytest.fixture(scope="module")
def whole(world):
    """Bytes of a run in a dtype where nothing is frozen, which is run when it is first asked for."""

    @functools.cache
    def run(dtype):
        return ran(world, f"whole {dtype}", f"optimizer.param_dtype={dtype}")[1]

    return run


def ran(world, output, *more):
    assert train.main(arguments(world, output, *more)) == 0
    exported = load_file(world / output / "model" / "model.safetensors")
    return exported, saved(world / output / "checkpoints" / "2" / "state")


def saved(folder):
    """Bytes of the parameters and of the optimizer in a checkpoint; those of its files differ from run to run."""
    tree = ocp.StandardCheckpointer().metadata(folder).item_metadata.tree
    sizes = {
        part: sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree[part])) for part in tree
    }
    return sizes["params"], sizes["optimizer"]


PARTS = {
    "all but the head": (["embed/.*", "layers/.*", "final_norm/.*"], lambda name: name == "lm_head.weight"),
    "first half": (["layers/[01]/.*"], lambda name: not name.startswith(("model.layers.0.", "model.layers.1."))),
}


@pytest.mark.parametrize("part", by_day(PARTS, ["first half"]))
@pytest.mark.parametrize("dtype", by_day(["float32", "bfloat16"], {"bfloat16"}))
def test_frozen_tensors_come_back_bit_for_bit_and_are_not_saved(world, whole, part, dtype):
    before = load_file(world / "model" / "model.safetensors")
    patterns, moves = PARTS[part]
    freeze = f"model.freeze={patterns}".replace("'", '"')
    after, held = ran(world, f"{part} {dtype}", freeze, f"optimizer.param_dtype={dtype}")
    assert {name for name in before if before[name].tobytes() != after[name].tobytes()} == set(filter(moves, before))
    share = sum(before[name].size for name in before if moves(name)) / sum(tensor.size for tensor in before.values())
    # norms stay float32 and the optimizer keeps a count, so bytes are not shared quite as the elements are
    assert held == pytest.approx([size * share for size in whole(dtype)], rel=0.02)


@pytest.mark.nightly
def test_going_on_is_never_having_stopped(world, monkeypatch):
    freeze = ('model.freeze=["layers/[01]/.*"]', "checkpoint.every=1")
    whole, _ = ran(world, "whole run", *freeze)
    with monkeypatch.context() as patch:
        honest = Journal.step

        def step(self, now, metrics):
            honest(self, now, metrics)
            os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(Journal, "step", step)
        assert train.main(arguments(world, "parts", *freeze)) == 75
    again, _ = ran(world, "parts", *freeze)
    assert {name: tensor.tobytes() for name, tensor in again.items()} == {n: t.tobytes() for n, t in whole.items()}
