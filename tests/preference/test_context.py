"""A step whose rows are split over devices has the loss and the gradient of one device, whatever mixes its tokens."""

import functools

import jax
import numpy as np
import pytest

from dpo_jax import sharding, trees
from dpo_jax.data.batches import Batches
from dpo_jax.model.decoder import Execution
from dpo_jax.model.weights import Weights
from dpo_jax.preference.loss import TrainingObjective, loss_and_gradient
from tests.support.family_models import ours, own
from tests.support.forests import random_encoded
from tests.support.tiers import by_day

pytest.importorskip("torch")
MESHES = {
    "context 4": {"fsdp": 1, "context": 4},
    "tensor 2, context 2": {"fsdp": 1, "tensor": 2, "context": 2},
    "fsdp 2, context 2": {"fsdp": 2, "context": 2},
    "fsdp 2, tensor 2": {"fsdp": 2, "tensor": 2},
}
KINDS = ("qwen2", "qwen3_5_text", "gpt_oss", "deepseek_v3", "gemma4_text", "bloom", "opt_narrow", "qwen3_moe_windowed")
DAY = {"qwen2"}
"""The quickest to compile; logits of the others on such meshes: `model/test_family_sharding.py`."""


@functools.cache
def step_of(name, mesh):
    """Loss and gradient by leaf, on one device or on a mesh."""
    model, sizes = ours(own(name).path), MESHES.get(mesh, {"fsdp": 1})
    devices = sharding.make_mesh(**sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])
    encoded = random_encoded(units=12, completions=(2, 2), vocab=80, seed=5, longest=24)
    share = model.spec.can_share_prompt(64)
    batches = Batches(encoded, 8, sharding.batch_shards(devices), 1, share_prompts=share, micro_tokens=192)
    batch = sharding.place(batches.at(0), devices)
    execution = Execution(activations=sharding.activations(devices), head=sharding.head_split(devices))
    objective = TrainingObjective(model.spec, execution=execution, statistics=False)
    places = sharding.param_shardings(model.params, devices)
    params = jax.device_put(model.params, places)

    @functools.partial(jax.jit, out_shardings=(None, places))
    def run(params, batch):
        loss, _, gradient, _ = loss_and_gradient(objective, Weights(params), batch)
        return loss, gradient

    loss, gradient = run(params, batch)
    return float(loss), {path: np.asarray(leaf) for path, leaf in trees.paths(gradient).items()}


@pytest.mark.parametrize("mesh", by_day(MESHES, {"tensor 2, context 2"}))
@pytest.mark.parametrize("name", by_day(KINDS, DAY))
def test_devices_that_share_rows_are_invisible(name, mesh):
    (loss, gradient), (wanted, slopes) = step_of(name, mesh), step_of(name, None)
    assert abs(loss - wanted) <= 1e-5 * max(1.0, abs(wanted))
    largest = max(float(np.abs(leaf).max()) for leaf in slopes.values())
    for path, leaf in slopes.items():
        allowed = 1e-4 * float(np.abs(leaf).max()) + 1e-6 * largest  # float32 sums in another order
        np.testing.assert_allclose(gradient[path], leaf, rtol=0, atol=allowed, err_msg=path)
