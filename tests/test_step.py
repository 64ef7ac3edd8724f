"""A step is its pairs: packing, shared prompts, micro-batches and devices are invisible; and TRL steps the same way."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dpo_jax import logits, sharding, trees
from dpo_jax.data.batches import Batches
from dpo_jax.data.encode import encode
from dpo_jax.data.settings import DataSettings
from dpo_jax.hf.checkpoint import load_hf
from dpo_jax.hf.mapping import names
from dpo_jax.hf.tokenizer import load_tokenizer
from dpo_jax.losses import OBJECTIVES
from dpo_jax.metrics import means
from dpo_jax.model.decoder import Execution, init_params
from dpo_jax.model.preference import Problem, evaluate_batch
from dpo_jax.model.scoring import score_batch
from dpo_jax.model.spec import DecoderSpec
from dpo_jax.training.optimizer import decay_mask, make_optimizer, schedule
from dpo_jax.training.settings import OptimizerSettings
from dpo_jax.training.step import fresh_state, loss_and_gradient, make_step
from tests.forests import random_encoded

SPEC = DecoderSpec(
    vocab_size=50,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    mlp_width=24,
    norm_epsilon=1e-6,
    windows=(None, 6),
)
ENCODED = random_encoded(units=9, completions=(2, 4), seed=3)
LAYOUTS = {  # devices, share prompts, slots of a micro-batch
    "one device, everything in one micro-batch": (1, True, 4096),
    "one device, many micro-batches": (1, True, 64),
    "prompts computed anew for each completion": (1, False, None),
    "two devices": (2, True, 64),
    "four devices, prompts not shared": (4, False, None),
}


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda leaf: 3 * leaf, init_params(SPEC, jax.random.key(0)))


@pytest.fixture(scope="module")
def reference():
    return init_params(SPEC, jax.random.key(1))


def text_logprobs(params, encoded):
    """Each completion's log-probability from its own row, by the plainest route: all logits, log-softmax, sum."""
    values = []
    for completion in range(encoded.num_completions):
        prompt, answer = encoded.prompt(completion), encoded.completion(completion)
        ids = np.zeros((1, 24), np.int32)  # padded behind, which a causal model does not see
        ids[0, : len(prompt) + len(answer)] = [*prompt, *answer]
        logs = jax.nn.log_softmax(logits(SPEC, params, jnp.asarray(ids))[0])
        values.append(sum(float(logs[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)))
    return np.asarray(values)


@functools.cache
def small():
    return random_encoded(units=4, completions=(2, 3), seed=5, longest=8)


def test_packed_scores_are_those_of_separate_rows(params):
    batches = Batches(small(), small().num_pairs, 2, 1, micro_tokens=64)
    mesh = sharding.make_mesh(devices=jax.devices()[:2])
    batch = batches.at(0)
    scored = np.asarray(jax.jit(functools.partial(score_batch, SPEC))(params, sharding.place(batch, mesh)))
    used = batch.ids >= 0
    np.testing.assert_allclose(scored[used], text_logprobs(params, small())[batch.ids[used]], rtol=1e-5, atol=1e-4)


@functools.cache
def measured(layout, objective):
    """Loss, gradient and metrics of one step in one layout; the first test that asks pays for the compilation."""
    devices, share, micro_tokens = LAYOUTS[layout]
    policy = jax.tree.map(lambda leaf: 3 * leaf, init_params(SPEC, jax.random.key(0)))
    other = init_params(SPEC, jax.random.key(1))
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    placed = [jax.device_put(tree, sharding.param_shardings(tree, mesh)) for tree in (policy, other)]
    batch = Batches(ENCODED, 12, devices, 2, share_prompts=share, micro_tokens=micro_tokens).at(1)
    execution = Execution(remat="attention", activations=sharding.rows(mesh))
    problem = Problem(
        SPEC, objective, beta=0.3, label_smoothing=0.1 if objective == "sigmoid" else 0.0, execution=execution
    )
    found = jax.jit(functools.partial(loss_and_gradient, problem))(placed[0], sharding.place(batch, mesh), placed[1])
    loss, metrics, gradient = found
    return float(loss), jax.device_get(means(metrics)), trees.paths(jax.device_get(gradient)), int(batch.micro_batches)


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_layout_is_invisible(layout, objective):
    loss, metrics, gradient, _ = measured(next(iter(LAYOUTS)), objective)
    ours, measured_here, slope, _ = measured(layout, objective)
    assert ours == pytest.approx(loss, rel=1e-5)
    norm = np.sqrt(sum(np.square(leaf.astype(np.float64)).sum() for leaf in gradient.values()))
    error = np.sqrt(sum(np.square((slope[name] - leaf).astype(np.float64)).sum() for name, leaf in gradient.items()))
    assert error <= 1e-5 * norm
    for name, value in metrics.items():
        np.testing.assert_allclose(measured_here[name], value, rtol=5e-5, atol=1e-6, err_msg=name)


def test_the_layouts_differ():
    assert [measured(layout, "sft")[3] > 1 for layout in list(LAYOUTS)[:2]] == [False, True]


def test_evaluation_measures_the_loss_of_training(params, reference):
    batch = Batches(ENCODED, 12, 1, 2).at(1)
    problem = Problem(SPEC, beta=0.3, label_smoothing=0.1)
    found = means(jax.jit(functools.partial(evaluate_batch, problem))(params, batch, reference))
    assert float(found["loss"]) == pytest.approx(measured(next(iter(LAYOUTS)), "sigmoid")[0], rel=1e-5)


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(params, reference):
    settings = OptimizerSettings(learning_rate=1e-2, weight_decay=0.1)
    optimizer = make_optimizer(settings)
    step = jax.jit(make_step(Problem(SPEC), optimizer, schedule(settings, 10)))
    state = fresh_state(params, optimizer)
    good = Batches(ENCODED, 12, 1, 2).at(0)
    state, _ = step(state, reference, good)
    bad = good._replace(weight=np.where(good.real, np.float32(np.nan), good.weight))
    after, metrics = step(state, reference, bad)
    for name in ("params", "optimizer"):
        jax.tree.map(np.testing.assert_array_equal, after[name], state[name])
    assert (int(after["step"]), int(after["skipped"]), int(after["streak"])) == (2, 1, 1)
    assert float(metrics["nonfinite_streak"]) == 1
    again, _ = step(after, reference, good)
    assert int(again["streak"]) == 0 and not np.array_equal(
        again["params"]["embed"]["embedding"], state["params"]["embed"]["embedding"]
    )


def test_every_leaf_decays_or_not_and_norms_and_biases_do_not(params):
    mask = trees.paths(decay_mask(params))
    assert all(decays == name.endswith(("kernel", "embedding")) for name, decays in mask.items())
    with pytest.raises(ValueError, match="weight decay.*'blocks/new'"):
        decay_mask({"blocks": {"new": jnp.zeros(1)}})


@pytest.mark.parametrize(
    ("name", "rates"), [("constant", [0, 0.5, 1, 1, 1, 1]), ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]), ("cosine", None)]
)
def test_schedules(name, rates):
    rate = schedule(OptimizerSettings(learning_rate=1.0, schedule=name, warmup_steps=2), 6)
    found = [float(rate(step)) for step in range(6)]
    if rates is None:
        rates = [0, 0.5, *(0.5 * (1 + np.cos(np.pi * np.arange(4) / 4)))]
    np.testing.assert_allclose(found, rates, rtol=1e-6)


# ---------------------------------------------------------------------------------------------- TRL's own numbers


@pytest.fixture(scope="module")
def parity(shared, tmp_path_factory):
    folder = shared / "trl_parity"
    rows = tmp_path_factory.mktemp("parity") / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in json.loads((folder / "batch.json").read_text())["rows"]))
    data = DataSettings(train=str(rows), truncation="keep_start")
    encoded, _ = encode(str(rows), load_tokenizer(str(folder / "model")), data)
    models = load_hf(folder / "model"), load_hf(folder / "ref")
    return folder, encoded, models


def sigmoid_run(parity, settings, steps):
    """Metrics of each step over the six pairs, and the last parameters."""
    _, encoded, (policy, reference) = parity
    optimizer = make_optimizer(settings)
    step = jax.jit(make_step(Problem(policy.spec), optimizer, schedule(settings, steps)))
    state, found = fresh_state(policy.params, optimizer), []
    for number in range(steps):
        state, metrics = step(state, reference.params, Batches(encoded, 6, 1, steps, order="file").at(number))
        found.append({name: float(value) for name, value in metrics.items()})
    return found, state["params"]


@pytest.fixture(scope="module")
def trajectory(parity):
    settings = OptimizerSettings(learning_rate=5e-3, schedule="linear", warmup_steps=2, weight_decay=0.01)
    return sigmoid_run(parity, settings, 8)


def test_loss_and_every_metric_are_trls(parity, trajectory):
    golden = json.loads((parity[0] / "golden.json").read_text())["sigmoid"]
    ours = trajectory[0][0]
    assert ours["loss"] == pytest.approx(golden["loss"], rel=1e-5)
    assert ours["grad_norm"] == pytest.approx(golden["grad_norm"], rel=1e-4)
    for name in set(golden["metrics"]) - {"num_tokens"}:
        # 5e-5: what float64 NumPy and TRL's own float32 differ by is 2.4e-5 (small differences of large sums)
        assert ours[name] == pytest.approx(golden["metrics"][name], rel=5e-5, abs=1e-7), name


def test_the_whole_gradient_is_trls(parity):
    folder, encoded, (policy, reference) = parity
    batch = Batches(encoded, 6, 1, 1, order="file").at(0)
    _, _, gradient = jax.jit(functools.partial(loss_and_gradient, Problem(policy.spec)))(
        policy.params, batch, reference.params
    )
    ours, theirs = trees.paths(gradient), load_file(folder / "grad_sigmoid.safetensors")
    for entry in names(policy.spec):
        leaf = np.asarray(ours[entry.leaf] if entry.layer is None else ours[entry.leaf][entry.layer])
        want = theirs[entry.name]
        np.testing.assert_allclose(
            entry.transform.pack(leaf), want, rtol=1e-4, atol=1e-4 * np.abs(want).max(), err_msg=entry.name
        )


def test_eight_steps_of_adamw_are_trls(parity, trajectory):
    folder = parity[0]
    theirs = json.loads((folder / "trajectory.json").read_text())["traj"]["sigmoid"]
    ours, params = trajectory
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["learning_rate"] == pytest.approx(other["learning_rate"], rel=1e-6)
        assert one["rewards/margins"] == pytest.approx(other["rewards/margins"], rel=1e-3)
    final, leaves = load_file(folder / "final_sigmoid_8steps.safetensors"), trees.paths(params)
    for entry in names(parity[2][0].spec):
        leaf = np.asarray(leaves[entry.leaf] if entry.layer is None else leaves[entry.leaf][entry.layer])
        # Adam divides by the root of tiny second moments, so a rounding of the gradient becomes a visible step:
        # weights move by up to 8 x 5e-3, and 1e-3 of one step is 5e-6
        np.testing.assert_allclose(entry.transform.pack(leaf), final[entry.name], atol=5e-5, err_msg=entry.name)
