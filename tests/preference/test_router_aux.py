"""The load-balancing loss of experts in training: transformers' value, whatever the layout, and its exact gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import trees
from dpo_jax.data.batches import Batches
from dpo_jax.hf.checkpoint import load_hf
from dpo_jax.hf.configs import quiet
from dpo_jax.model.attention import causal
from dpo_jax.model.decoder import Execution, hidden_and_routing, init_params
from dpo_jax.model.experts import load_balance
from dpo_jax.model.spec import MLP, Experts
from dpo_jax.model.weights import Weights
from dpo_jax.preference.loss import TrainingObjective, loss_and_gradient
from dpo_jax.run.first_step import preference_loss
from tests.support.forests import SPEC, random_encoded
from tests.support.tiers import by_day

MIXED = dataclasses.replace(SPEC.layers[1], mlp=None, experts=Experts(4, 2, 12, shared=MLP(8), shared_gate=True))
SPARSE = dataclasses.replace(SPEC, layers=(SPEC.layers[0], MIXED, MIXED), router_aux=0.5)
ENCODED = random_encoded(units=9, completions=(2, 2), seed=3)
LAYOUTS = {"one micro-batch": {"micro_tokens": 4096}, "several": {"micro_tokens": 64}}
LAYOUTS |= {"a prompt for each completion": {"micro_tokens": 64, "share_prompts": False}}


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda leaf: 6 * leaf, init_params(SPARSE, jax.random.key(0)))


@functools.cache
def stepping(weight):
    return jax.jit(functools.partial(loss_and_gradient, TrainingObjective(SPARSE, router_aux=weight, statistics=False)))


def padded(encoded):
    """Every text in a row of its own, and which of its slots are text."""
    texts = [[*encoded.prompt(c), *encoded.completion(c)] for c in range(encoded.num_completions)]
    ids = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    return jnp.asarray(ids), jnp.asarray([[i < len(text) for i in range(ids.shape[1])] for text in texts], jnp.float32)


def directly(params):
    """The loss of the plainest route: rows as they are, weights of 1 and 0."""
    ids, real = padded(ENCODED)
    _, routing = hidden_and_routing(SPARSE, params, ids, causal(*ids.shape), real)
    return load_balance(*routing)


@pytest.mark.parametrize("layout", by_day(LAYOUTS, {"several"}))
def test_value_and_gradient_are_those_of_separate_rows(params, layout):
    batch = Batches(ENCODED, ENCODED.num_pairs, 1, 1, **LAYOUTS[layout]).at(0)
    assert (int(batch.micro_batches) > 1) == (layout != "one micro-batch")
    (without, _, plain, _), (loss, metrics, gradient, _) = (
        stepping(weight)(Weights(params), batch, params) for weight in (0.0, 0.5)
    )
    value, slope = jax.jit(jax.value_and_grad(directly))(params)
    assert float(metrics["aux_loss"]) == pytest.approx(float(value), rel=1e-5)
    assert float(loss) == pytest.approx(float(without) + 0.5 * float(value), rel=1e-5)
    added = jax.tree.map(lambda one, other: one - other, gradient, plain)
    for name, leaf in trees.paths(slope).items():
        # float32 sums in another order, and a difference of two gradients that are as large as this one
        scale = float(np.abs(trees.paths(gradient)[name]).max()) + 1e-6
        np.testing.assert_allclose(trees.paths(added)[name], 0.5 * leaf, rtol=1e-3, atol=2e-5 * scale, err_msg=name)


@pytest.mark.nightly
def test_devices_change_nothing(params):
    from dpo_jax import sharding

    found = []
    for devices in (1, len(jax.devices())):
        mesh = sharding.make_mesh(devices=jax.devices()[:devices])
        placed = jax.device_put(params, sharding.param_shardings(params, mesh))
        problem = TrainingObjective(
            SPARSE, router_aux=0.5, statistics=False, execution=Execution(activations=sharding.rows(mesh))
        )
        batch = sharding.place(Batches(ENCODED, ENCODED.num_pairs, devices, 1, micro_tokens=256).at(0), mesh)
        loss, metrics, _, _ = jax.jit(functools.partial(loss_and_gradient, problem))(Weights(placed), batch, placed)
        found.append((float(loss), float(metrics["aux_loss"])))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_weight_0_leaves_it_out(params):
    batch = Batches(ENCODED, ENCODED.num_pairs, 1, 1).at(0)
    assert "aux_loss" not in stepping(0.0)(Weights(params), batch, params)[1]
    metrics = {"loss": 0.7 + 0.5 * 2.0, "aux_loss": 2.0}
    assert preference_loss(TrainingObjective(SPARSE, router_aux=0.5), metrics) == pytest.approx(0.7)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "olmoe"])
def test_the_value_is_that_of_transformers(family, shared):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder = shared / "families" / family
    rng = np.random.default_rng(0)
    ids, lengths = rng.integers(3, 96, (3, 20)).astype(np.int32), np.array([20, 7, 13])
    real = np.arange(20)[None, :] < lengths[:, None]
    with quiet(), torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        tokens, mask = torch.tensor(ids.astype(np.int64)), torch.tensor(real.astype(np.int64))
        wanted = float(theirs(tokens, attention_mask=mask, output_router_logits=True).aux_loss)
    model = load_hf(folder)
    _, routing = hidden_and_routing(
        model.spec, model.params, jnp.asarray(ids), causal(3, 20), jnp.asarray(real, jnp.float32)
    )
    assert float(load_balance(*routing)) == pytest.approx(wanted, rel=1e-4)
    assert model.spec.router_aux == pytest.approx(theirs.config.router_aux_loss_coef)
