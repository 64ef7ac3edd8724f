"""Adapters that TRL 1.16 trained with PEFT, step by step: losses, gradients of factors, and the final adapter."""

import dataclasses
import functools
import json

import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from dpo_jax import trees
from dpo_jax.data.batches import Batches
from dpo_jax.hf import adapters as folders
from dpo_jax.hf.checkpoint import entries_of, scheme_of
from dpo_jax.hf.peft import read_adapter
from dpo_jax.hf.tensors import Tensors
from dpo_jax.model import adapters
from dpo_jax.model.decoder import abstract_params, stacks
from dpo_jax.model.weights import Weights, divided, what_matches
from dpo_jax.objectives.terms import make_terms
from dpo_jax.preference.loss import TrainingObjective, loss_and_gradient
from dpo_jax.training.optimizer import apply_updates, make_optimizer, to_float32
from dpo_jax.training.settings import OptimizerSettings
from dpo_jax.training.step import fresh_state, make_step
from tests.support.tiers import by_day
from tools.parity import encoded_rows, open_folder, trls_rate

VARIANTS = ("all_linear", "bias", "continue_ipo", "continue_ref_is_base", "continue_ref_is_start", "continue_rpo")
VARIANTS += ("dora", "lora", "rslora")
OBJECTIVES = {"continue_ipo": [{"name": "ipo"}], "continue_rpo": [{"name": "sigmoid"}, {"name": "sft", "weight": 0.5}]}
SUFFIXES = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude"}


@pytest.fixture(scope="module")
def parity(shared, tmp_path_factory):
    return open_folder(shared / "trl_parity", tmp_path_factory.mktemp("rows"))


class Golden:
    """One of TRL's runs: where it starts, and what it says."""

    def __init__(self, parity, folder):
        self.folder, self.log = folder, json.loads((folder / "steps.json").read_text())
        self.spec, base = parity.policy.spec, parity.path / "model"
        self.entries, self.scheme, self.base = entries_of(self.spec, base), scheme_of(self.spec, base), Tensors(base)
        self.shapes = {path: leaf.shape for path, leaf in trees.paths(abstract_params(self.spec)).items()}
        start = self.read("start")
        layers = {name: numbers for name, _, numbers in stacks(self.spec)}
        self.adapter = folders.described(start.factors, self.entries, layers)
        factors = folders.to_leaves(start.factors, self.adapter, self.shapes, self.entries)
        whole = (r"(layers/\d+/.*norm|final_norm)/scale",) if start.replaced else ()
        weights = divided(parity.policy.params, what_matches(self.spec, whole, "modules_to_save"))
        frozen = trees.joined(weights.frozen, adapters.constants(self.adapter))
        self.weights = Weights(trees.joined(weights.trained, factors), frozen, weights.rows)
        name = folder.name
        goes_on = name.startswith("continue") and name != "continue_ref_is_base"
        self.reference = self.weights.params if goes_on else adapters.without(self.weights.params)
        blocks = [dict(block) for block in OBJECTIVES.get(name, [{"name": "sigmoid"}])]
        blocks[0]["beta"] = self.log["settings"]["beta"]
        self.objective = TrainingObjective(self.spec, make_terms(blocks))

    def read(self, name):
        return read_adapter(self.folder / name, self.spec, self.scheme, self.base)

    def factors(self, trained, *, unscaled=False):
        made = self.adapter
        if unscaled:
            ones = {path: one._replace(scales=(1.0,) * len(one.scales)) for path, one in made.changes.items()}
            made = dataclasses.replace(made, changes=ones)
        return folders.to_factors(made, trees.paths(jax.device_get(trained)), self.entries)

    def optimizer(self):
        given = self.log["settings"]
        names = {"max_grad_norm": "clip_norm", "learning_rate": "learning_rate", "weight_decay": "weight_decay"}
        own = {ours: given[theirs] for theirs, ours in names.items()}
        return OptimizerSettings(**own, warmup_steps=given["warmup_steps"], schedule="linear")


@pytest.mark.parametrize("name", by_day(VARIANTS, ("continue_ref_is_base", "dora")))
def test_a_run_is_trls_with_peft(parity, shared, name):
    """The first loss to 1e-5 and every gradient to 1e-4; each of 8 steps to 1e-4, the final adapter to 5e-5."""
    golden = Golden(parity, shared / "adapters" / "dpo" / name)
    encoded = encoded_rows(parity, {})
    solve = jax.jit(functools.partial(loss_and_gradient, golden.objective))
    batch = Batches(encoded, encoded.num_pairs, 1, 1, order="file").at(0)
    loss, _, gradient, _ = solve(golden.weights, batch, golden.reference)
    assert float(loss) == pytest.approx(golden.log["first_batch_loss"], abs=1e-5)
    ours, seen = golden.factors(gradient, unscaled=True), 0
    for tensor, theirs in load_file(golden.folder / "grad1.safetensors").items():
        module, _, suffix = tensor.removeprefix("base_model.model.").rpartition(".lora_")
        if part := SUFFIXES.get(
            f"lora_{suffix}".removesuffix(".weight") if "magnitude" in suffix else f"lora_{suffix}"
        ):
            np.testing.assert_allclose(getattr(ours[f"{module}.weight", None], part), theirs, atol=1e-4)
            seen += 1
    assert seen == sum(2 + (one.magnitude is not None) for one in ours.values())
    found, state = by_trls_step(golden, encoded) if name == "continue_rpo" else by_step(golden, encoded)
    assert found == pytest.approx([step["loss"] for step in golden.log["steps"][:8]], abs=1e-4)
    final, trained = golden.read("final"), golden.factors(state)
    for key, factor in final.factors.items():
        for part in ("a", "b", "magnitude"):
            theirs = getattr(factor, part)
            assert theirs is None or np.abs(getattr(trained[key], part) - theirs).max() <= 5e-5
    leaves = trees.paths(dataclasses.replace(golden.weights, trained=state).params)
    entries = {entry.name: entry for entry in golden.entries}
    for tensor, theirs in final.replaced.items():
        np.testing.assert_allclose(entries[tensor].of(leaves), theirs, atol=5e-5)


def by_step(golden, encoded):
    """Losses of 8 steps, and what is trained after them."""
    settings, steps = golden.optimizer(), golden.log["settings"]["max_steps"]
    optimizer = make_optimizer(settings)
    step = jax.jit(make_step(golden.objective, optimizer, trls_rate(settings, steps), steps=steps))
    state, found = fresh_state(golden.weights.trained, optimizer), []
    for number in range(8):
        batch = Batches(encoded, encoded.num_pairs, 1, 8, order="file").at(number)
        state, metrics = step(state, dataclasses.replace(golden.weights, trained={}), golden.reference, batch)
        found.append(float(metrics["loss"]))
    return found, state["trained"]


def by_trls_step(golden, encoded):
    """The same where TRL's loss of a step is the mean of its micro-batches': a mean over tokens is not that."""
    settings, steps = golden.optimizer(), golden.log["settings"]["max_steps"]
    optimizer, rate = make_optimizer(settings), trls_rate(settings, steps)
    solve = jax.jit(functools.partial(loss_and_gradient, golden.objective))
    halves = [Batches(encoded, 3, 1, 2, order="file").at(number) for number in range(2)]
    weights, moments, found = golden.weights, optimizer.init(to_float32(golden.weights.trained)), []
    for number in range(8):
        parts = [solve(weights, half, golden.reference)[::2] for half in halves]
        gradient = jax.tree.map(lambda one, other: (one + other) / 2, parts[0][1], parts[1][1])
        with jax.numpy_dtype_promotion("standard"):
            directions, moments = optimizer.update(gradient, moments, weights.trained, norm=optax.tree.norm(gradient))
        trained = apply_updates(weights.trained, directions, jax.numpy.float32(rate(number)), jax.random.key(0))
        weights = dataclasses.replace(weights, trained=trained)
        found.append(float(sum(loss for loss, _ in parts) / 2))
    return found, weights.trained
