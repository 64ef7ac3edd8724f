"""A step is its pairs: what a step measures, moves and remembers; and TRL steps the same way."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dpo_jax import logits, sharding, trees
from dpo_jax.data.batches import Batches
from dpo_jax.data.examples import as_examples
from dpo_jax.hf.checkpoint import entries_of
from dpo_jax.model.decoder import init_params
from dpo_jax.model.weights import Weights
from dpo_jax.objectives.mixture import as_measured
from dpo_jax.objectives.table import OBJECTIVES
from dpo_jax.objectives.terms import make_terms
from dpo_jax.preference import heldout as preference
from dpo_jax.preference.loss import TrainingObjective, evaluate_batch, loss_and_gradient
from dpo_jax.preference.scoring import score_batch
from dpo_jax.training.optimizer import decay_mask, make_optimizer, schedule
from dpo_jax.training.settings import OptimizerSettings
from dpo_jax.training.step import MovingReference, fresh_state, make_step, progress_of
from tests.conftest import ROOT
from tests.support.forests import SPEC, random_encoded, settled
from tests.support.tiers import by_day, night
from tools import parity

ENCODED = random_encoded(units=9, completions=(2, 4), seed=3)
MANY = random_encoded(units=40, completions=(2, 3), seed=4)


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
    score = jax.jit(functools.partial(score_batch, SPEC))
    tokens = preference.token_logprobs(score, params, batches.sweep(), functools.partial(sharding.place, mesh=mesh))
    sums = np.add.reduceat(tokens.astype(np.float64), small().scored_start)
    np.testing.assert_allclose(sums, text_logprobs(params, small()), rtol=1e-5, atol=1e-4)


def one_step(problem, params, reference, encoded=None, pairs=12, **layout):
    batch = Batches(encoded or ENCODED, pairs, 1, 2, **layout).at(1)
    loss, metrics, gradient, _ = jax.jit(functools.partial(loss_and_gradient, problem))(
        Weights(params), batch, reference
    )
    return float(loss), jax.device_get(metrics), jax.device_get(gradient)


def test_metrics_do_not_depend_on_the_layout(params, reference):
    problem = TrainingObjective(SPEC, make_terms([{"name": "rpo", "beta": 0.3, "label_smoothing": 0.1}]))
    layouts = {"micro_tokens": 4096}, {"micro_tokens": 64, "share_prompts": False}
    assert [int(Batches(MANY, 40, 1, 2, **layout).at(1).micro_batches) > 1 for layout in layouts] == [False, True]
    (_, whole, _), (_, parts, _) = (one_step(problem, params, reference, MANY, 40, **layout) for layout in layouts)
    assert {"entropy", "kl", "drift/chosen", "rewards/margins_p50", "objective/sft"} <= set(whole)
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, rtol=5e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("block", "kind"), [({"name": "sigmoid", "ld_alpha": 0.3}, "pairs"), ({"name": "plackett_luce"}, "rankings")]
)
def test_two_passes_are_one_pass(params, reference, monkeypatch, block, kind):
    """What looks at the whole step is scored first, then again with a gradient; a loss of pairs may go either way."""
    encoded = as_examples(MANY, kind, objective=block["name"], max_length=64)
    problem = TrainingObjective(SPEC, make_terms([block]))
    layout = {"micro_tokens": 64, "rankings": kind == "rankings"}
    loss, _, gradient = one_step(problem, params, reference, encoded, 20, **layout)
    wide = dataclasses.replace(OBJECTIVES[block["name"]], scope="step")
    monkeypatch.setitem(OBJECTIVES, block["name"], wide)
    assert problem.step_wide
    again, _, slope = one_step(problem, params, reference, encoded, 20, **layout)
    assert again == pytest.approx(loss, rel=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7), slope, gradient)


def test_evaluation_measures_the_loss_of_training(params, reference):
    """Also where the loss sorts all pairs, and where the sweep takes them in several batches."""
    problem = TrainingObjective(SPEC, make_terms([{"name": "aot", "beta": 0.3}, {"name": "sft", "weight": 0.1}]))
    everything = ENCODED.num_pairs
    step = jax.jit(functools.partial(loss_and_gradient, problem))
    loss, metrics, _, _ = step(Weights(params), Batches(ENCODED, everything, 1, 1).at(0), reference)
    collect = jax.jit(functools.partial(evaluate_batch, problem))
    seen = preference.look(
        lambda weights, batch: collect(weights, batch, reference),
        Weights(params),
        Batches(ENCODED, 5, 1, 1).sweep(),
        lambda batch: batch,
    )
    found = preference.measured(seen, preference.measurement(as_measured(problem.terms)))
    assert found["loss"] == pytest.approx(float(loss), rel=1e-5)
    for name, value in metrics.items():
        np.testing.assert_allclose(found[name], value, rtol=5e-5, atol=1e-6, err_msg=name)


def test_a_reference_computed_ahead_is_the_live_one(params, reference):
    problem = TrainingObjective(SPEC, make_terms([{"name": "sigmoid", "ld_alpha": 0.5}]))
    score = jax.jit(functools.partial(score_batch, SPEC))
    tokens = preference.token_logprobs(score, reference, Batches(ENCODED, 5, 1, 1).sweep(), lambda batch: batch)
    assert np.isfinite(tokens).all()
    live, _, _ = one_step(problem, params, reference)
    batch = Batches(ENCODED, 12, 1, 2, reference=tokens).at(1)
    assert float(jax.jit(functools.partial(loss_and_gradient, problem))(Weights(params), batch)[0]) == pytest.approx(
        live, rel=1e-5
    )


@pytest.mark.parametrize("rate", [night(1.0), 0.6])
def test_a_moving_reference_moves_when_it_is_due_and_only_then(params, reference, rate):
    """TR-DPO: reference <- rate * policy + (1 - rate) * reference."""
    optimizer = make_optimizer(OptimizerSettings())
    moving = MovingReference(every=2, rate=rate)
    step = jax.jit(make_step(TrainingObjective(SPEC), optimizer, lambda step: 1e-2, steps=4, moving=moving))
    state, batches = settled(fresh_state(params, optimizer, reference=reference)), Batches(ENCODED, 12, 1, 4)
    for number in range(4):
        before = state["reference"]
        state, _ = step(state, Weights({}), None, batches.at(number))
        wanted = before
        if number % 2:
            wanted = jax.tree.map(lambda old, new: (1 - rate) * old + rate * new, before, state["trained"])
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), state["reference"], wanted)


def test_what_an_objective_remembers_goes_from_step_to_step(params, reference):
    problem = TrainingObjective(SPEC, make_terms([{"name": "beta_dpo", "momentum": 0.75, "keep_fraction": 1.0}]))
    optimizer = make_optimizer(OptimizerSettings(learning_rate=0.0))
    step = jax.jit(make_step(problem, optimizer, lambda step: 0.0))
    state, batch = (
        settled(fresh_state(params, optimizer, remembers=problem.remembers)),
        Batches(ENCODED, 12, 1, 2).at(1),
    )
    pairs = jax.jit(functools.partial(evaluate_batch, problem))(Weights(params), batch, reference)[0]
    gaps = (pairs.policy_chosen - pairs.reference_chosen - pairs.policy_rejected + pairs.reference_rejected)[pairs.real]
    for remembered in (0.25, 0.25 * 0.75 + 0.25):
        state, _ = step(state, Weights({}), reference, batch)
        np.testing.assert_allclose(
            state["memory"], [remembered * gaps.mean(), remembered * gaps.std(ddof=1)], rtol=1e-4
        )


def test_a_step_takes_the_rate_of_its_own_number(params, reference):
    settings = OptimizerSettings(learning_rate=1e-2, schedule="linear", warmup_steps=1)
    optimizer, rates = make_optimizer(settings), schedule(settings, 4)
    step = jax.jit(make_step(TrainingObjective(SPEC), optimizer, rates))
    state, batch, moves = settled(fresh_state(params, optimizer)), Batches(ENCODED, 12, 1, 2).at(0), []
    for number in range(2):
        before = state["trained"]["embed"]["embedding"]
        state, metrics = step(state, Weights({}), reference, batch)
        assert float(metrics["learning_rate"]) == float(rates(number))
        moves.append(float(np.abs(state["trained"]["embed"]["embedding"] - before).max()))
    # Adam's first two steps, of one gradient, go as far as the rate
    np.testing.assert_allclose(moves, [float(rates(0)), float(rates(1))], rtol=0.2)


def test_what_is_drawn_is_a_function_of_the_seed_and_of_the_number_of_the_step(params, reference):
    """Seen by how updates of bfloat16 weights are rounded."""
    settings = OptimizerSettings(learning_rate=1e-4, schedule="constant", warmup_steps=0)
    optimizer, batch = make_optimizer(settings), Batches(ENCODED, 12, 1, 2).at(0)
    state = settled(fresh_state(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), optimizer))
    objective, rates = TrainingObjective(SPEC), schedule(settings, 4)

    def drawn(seed, *numbers):
        step = jax.jit(make_step(objective, optimizer, rates, seed=seed))
        states = ({**state, "step": jnp.int32(number)} for number in numbers)
        return [
            np.asarray(step(one, Weights({}), reference, batch)[0]["trained"]["embed"]["embedding"]) for one in states
        ]

    first, again, later = drawn(0, 0, 0, 1)
    (other,) = drawn(1, 0)
    assert (first == again).all() and (first != later).any() and (first != other).any()


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(params, reference):
    settings = OptimizerSettings(learning_rate=1e-2, weight_decay=0.1)
    optimizer = make_optimizer(settings)
    step = jax.jit(make_step(TrainingObjective(SPEC), optimizer, schedule(settings, 10)))
    state = settled(fresh_state(params, optimizer))
    good = Batches(ENCODED, 12, 1, 2).at(0)
    state, _ = step(state, Weights({}), reference, good)
    bad = dataclasses.replace(good, weight=np.where(good.real, np.float32(np.nan), good.weight))
    steep = dataclasses.replace(good, margin=np.where(good.real, np.float32(np.inf), good.margin))
    for batch, slopes in ((bad, False), (steep, True)):  # a loss may be infinite and its gradient not
        after, metrics = step(state, Weights({}), reference, batch)
        assert not np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]) == slopes
        for name in ("trained", "optimizer"):
            jax.tree.map(np.testing.assert_array_equal, after[name], state[name])
        assert (int(after["step"]), int(after["skipped"]), int(after["consecutive_nonfinite"])) == (2, 1, 1)
        assert float(metrics["nonfinite_streak"]) == 1
    again, _ = step(after, Weights({}), reference, good)
    assert int(again["consecutive_nonfinite"]) == 0 and not np.array_equal(
        again["trained"]["embed"]["embedding"], state["trained"]["embed"]["embedding"]
    )


def test_progress_goes_from_the_first_step_to_the_last():
    assert [float(progress_of({"step": jnp.int32(step)}, 5).share) for step in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert float(progress_of({"step": jnp.int32(0)}, 1).share) == 0


def test_the_ratio_of_rates_is_that_of_b_to_all_else():
    """LoRA+, arXiv:2402.12354: the first step of Adam goes as far for each number, but for B's."""
    params = trees.from_paths({f"mlp/up/lora/{name}": jnp.ones((2, 2)) for name in ("a", "b", "magnitude")})
    optimizer = make_optimizer(OptimizerSettings(clip_norm=None), lr_ratio=4.0)
    with jax.numpy_dtype_promotion("standard"):
        directions, _ = optimizer.update(params, optimizer.init(params), params, norm=jnp.float32(1))
    far = {path.rpartition("/")[2]: float(jnp.abs(leaf).max()) for path, leaf in trees.paths(directions).items()}
    assert far == pytest.approx({"a": 1, "b": 4, "magnitude": 1}, rel=1e-5)


def test_every_leaf_decays_or_not_and_norms_and_biases_do_not(params):
    mask = trees.paths(decay_mask(params))
    assert all(decays == name.endswith(("kernel", "embedding")) for name, decays in mask.items())
    with pytest.raises(ValueError, match="weight decay.*'blocks/new'"):
        decay_mask({"blocks": {"new": jnp.zeros(1)}})


@pytest.mark.parametrize(
    ("name", "rates"),
    [("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]), ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]), ("cosine", None)],
)
def test_schedules(name, rates):
    """No step has a rate of 0."""
    rate = schedule(OptimizerSettings(learning_rate=1.0, schedule=name, warmup_steps=2), 6)
    found = [float(rate(step)) for step in range(6)]
    if rates is None:
        rates = [1 / 3, 2 / 3, *(0.5 * (1 + np.cos(np.pi * np.arange(4) / 4)))]
    np.testing.assert_allclose(found, rates, rtol=1e-6)


# ---------------------------------------------------------------------------------------------- TRL's own numbers


@pytest.fixture(scope="module")
def trl(shared, tmp_path_factory):
    return parity.open_folder(shared / "trl_parity", tmp_path_factory.mktemp("parity"))


def cases(name):
    """Cases of the shared folder's file, to be had when tests are collected; none where there is no such folder."""
    found = [folder / "trl_parity" / name for folder in (ROOT.parent / "shared", ROOT / "shared")]
    table = next((json.loads(path.read_text()) for path in found if path.is_file()), {})
    return [case for case in table.get("traj", table) if not case.startswith("_")] or ["no folder"]


CASES = {"sigmoid", "aot", "ipo_js_divergence", "sigmoid_wpo", "sigmoid_ld0.5", "mpo", "sigmoid_maxlen12_keep_end"} | {
    "no folder"
}
"""One of each kind: of pairs, of a step, a divergence, weights, cut lengths, a mixture, cut texts."""


@pytest.mark.parametrize("case", by_day(cases("golden.json"), CASES))
def test_loss_gradient_and_every_metric_are_trls(trl, case):
    """Tolerances and their reasons stand in tools/parity.py."""
    golden = json.loads((trl.path / "golden.json").read_text())[case]
    lines = list(parity.compare_case(trl, case, golden))
    assert lines and [line for line in lines if line.missed] == []


@pytest.mark.parametrize("loss_type", by_day(cases("trajectory.json"), CASES))
def test_eight_steps_of_adamw_are_trls(trl, loss_type):
    log = json.loads((trl.path / "trajectory.json").read_text())["traj"][loss_type]
    lines = list(parity.compare_trajectory(trl, loss_type, log))
    assert len(lines) == 8 and [line for line in lines if line.missed] == []


def test_a_wrong_number_is_a_miss():
    assert parity.Line("", "loss", 1.0, 1.0 + 2e-5, parity.LOSS).missed
    assert parity.Line("", "loss", 1.0, float("nan"), parity.LOSS).missed
    assert not parity.Line("", "loss", 1.0, 1.0 + 5e-6, parity.LOSS).missed


def test_the_whole_gradient_is_trls(trl):
    encoded = parity.encoded_rows(trl, {})
    batch = Batches(encoded, 6, 1, 1, order="file").at(0)
    run = jax.jit(functools.partial(loss_and_gradient, TrainingObjective(trl.policy.spec)))
    ours = trees.paths(run(Weights(trl.policy.params), batch, trl.reference.params)[2])
    theirs = load_file(trl.path / "grad_sigmoid.safetensors")
    for entry in entries_of(trl.policy.spec, trl.path / "model"):
        want = theirs[entry.name]
        np.testing.assert_allclose(entry.of(ours), want, rtol=1e-4, atol=1e-4 * np.abs(want).max(), err_msg=entry.name)


def test_the_weights_after_eight_steps_are_trls(trl):
    settings = OptimizerSettings.model_validate(parity.TRAJECTORY)
    optimizer, encoded = make_optimizer(settings), parity.encoded_rows(trl, {})
    step = jax.jit(make_step(TrainingObjective(trl.policy.spec), optimizer, parity.trls_rate(settings, 8), steps=8))
    state = settled(fresh_state(trl.policy.params, optimizer))
    for number in range(8):
        state, _ = step(state, Weights({}), trl.reference.params, Batches(encoded, 6, 1, 8, order="file").at(number))
    final, leaves = load_file(trl.path / "final_sigmoid_8steps.safetensors"), trees.paths(state["trained"])
    for entry in entries_of(trl.policy.spec, trl.path / "model"):
        # Adam divides by the root of tiny second moments, so a rounding of the gradient becomes a visible step:
        # weights move by up to 8 x 5e-3, and 1e-3 of one step is 5e-6
        np.testing.assert_allclose(entry.of(leaves), final[entry.name], atol=5e-5, err_msg=entry.name)
