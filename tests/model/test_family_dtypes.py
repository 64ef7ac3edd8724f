"""Folders as hubs have them, bfloat16 with a few float32 vectors: what was not trained comes back bit for bit."""

import functools
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dpo_jax.data.batches import Batches
from dpo_jax.hf.checkpoint import load_hf, save_hf
from dpo_jax.hf.tensors import Tensors
from dpo_jax.model.decoder import Model
from dpo_jax.model.weights import Weights
from dpo_jax.preference.loss import TrainingObjective
from dpo_jax.training.optimizer import make_optimizer
from dpo_jax.training.settings import OptimizerSettings
from dpo_jax.training.step import fresh_state, make_step
from tests.support.family_models import KINDS, LENGTH, own, read, reloaded, scratch
from tests.support.forests import random_encoded, settled
from tests.support.tiers import by_day

pytest.importorskip("torch")
ENCODED = random_encoded(units=3, completions=(2, 2), vocab=88, seed=7, longest=12)
WIDE = re.compile(r".*(A_log|dt_bias|e_score_correction_bias|router\.scale|per_expert_scale)")
"""Tensors that hubs keep in float32."""
STILL = re.compile(r".*(e_score_correction_bias|layer_scalar|act_fn\.(beta|eps))")
"""Buffers, which no training moves."""
RATE = 0.01
"""Of the second step. Adam's first step moves by the rate itself, and weight decay of 1 by a hundredth of the number,
which is more than the rounding of a bfloat16."""


@functools.cache
def halved(name: str) -> Path:
    """The folder in bfloat16."""
    folder = scratch(f"{name}-bfloat16")
    shutil.copytree(own(name).path, folder)
    tensors = {
        tensor: array if WIDE.fullmatch(tensor) else array.astype(ml_dtypes.bfloat16)
        for tensor, array in read(own(name).path).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@functools.cache
def trained(name: str) -> list[Model]:
    """The model as it came, after a step of the project's own at rate 0, and after one more at `RATE`."""
    model = load_hf(halved(name))
    optimizer = make_optimizer(OptimizerSettings(weight_decay=1.0))
    share = model.spec.can_share_prompt(LENGTH)
    batches = Batches(ENCODED, ENCODED.num_pairs, 1, 2, share_prompts=share)
    step = jax.jit(make_step(TrainingObjective(model.spec), optimizer, lambda count: jnp.where(count == 0, 0.0, RATE)))
    states = [settled(fresh_state(model.params, optimizer))]
    for number in range(2):
        state, metrics = step(states[-1], Weights({}), model.params, batches.at(number))
        assert np.isfinite(metrics["loss"]) and metrics["skipped_steps"] == 0
        states.append(state)
    return [Model(model.spec, state["trained"]) for state in states]


DAY = ("qwen3_5_text", "opt_narrow")
"""Leaves that stay in float32, and a model of no rotation."""


def bits(folder: Path) -> dict[str, tuple]:
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in read(folder).items()}


@pytest.mark.parametrize("name", by_day(KINDS, DAY))
@pytest.mark.parametrize("steps", by_day([0, 1], [1]), ids=["no step", "a step at rate 0"])
def test_what_did_not_move_comes_back_bit_for_bit(name, steps, tmp_path):
    save_hf(trained(name)[steps], tmp_path / "export", halved(name))
    assert Tensors(tmp_path / "export").infos == Tensors(halved(name)).infos
    assert bits(tmp_path / "export") == bits(halved(name))


@pytest.mark.parametrize("name", by_day(KINDS, DAY))
def test_a_step_moves_all_but_buffers_and_keeps_dtypes(name, tmp_path):
    """Every tensor moves, by its gradient or, as an expert that no token chose, by weight decay."""
    save_hf(trained(name)[2], tmp_path / "export", halved(name))
    before, after = bits(halved(name)), bits(tmp_path / "export")
    assert Tensors(tmp_path / "export").infos == Tensors(halved(name)).infos
    for tensor, was in before.items():
        assert (after[tensor] == was) == bool(STILL.fullmatch(tensor)), tensor
    _, info = reloaded(tmp_path / "export")
    assert not any(info.values()), info


def test_hubs_float32_tensors_are_among_them():
    kept = {tensor for name in KINDS for tensor in read(halved(name)) if WIDE.fullmatch(tensor)}
    assert {tensor.rpartition(".")[2] for tensor in kept} == {
        "A_log", "dt_bias", "e_score_correction_bias", "scale", "per_expert_scale",
    }  # fmt: skip
