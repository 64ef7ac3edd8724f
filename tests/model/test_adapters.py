"""Low-rank factors beside kernels: what they change, what they leave, and noise that only a token's place decides."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import logits, sharding, trees
from dpo_jax.data.batches import Batches
from dpo_jax.model import adapters, quantised
from dpo_jax.model.adapters import AdapterSpec, LowRank
from dpo_jax.model.decoder import Execution, abstract_params, init_params
from dpo_jax.model.weights import Weights
from dpo_jax.objectives.mixture import Progress
from dpo_jax.objectives.table import OBJECTIVES
from dpo_jax.objectives.terms import make_terms
from dpo_jax.preference.loss import TrainingObjective, loss_and_gradient
from dpo_jax.training.optimizer import make_optimizer
from dpo_jax.training.settings import OptimizerSettings
from dpo_jax.training.step import fresh_state, make_step
from tests.support.forests import SPEC, random_encoded
from tests.support.tiers import by_day, by_pairs

ENCODED = random_encoded(units=30, completions=(2, 3), seed=3, longest=18)
KERNELS = [path for path in trees.paths(abstract_params(SPEC)) if path.endswith("/kernel")]
SHAPES = {path: leaf.shape for path, leaf in trees.paths(abstract_params(SPEC)).items()}
DROPOUT = 0.1
MOMENT = Progress(0.25, key=jnp.uint32(7))


def adapter(rank=3, *, dropout=0.0, dora=False, scale=2.0):
    """Of every kernel; those of attention share one A, as where a folder has them in one tensor."""

    def of(path):
        layers, *_ = SHAPES[path]
        shared = {"key": "query", "value": "query"}.get(path.split("/")[-2])
        owner = path if shared is None else path.replace(path.split("/")[-2], shared)
        return LowRank((rank,) * layers, (scale,) * layers, owner)

    return AdapterSpec({path: of(path) for path in KERNELS}, dropout, dora)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda leaf: 3 * leaf, init_params(SPEC, jax.random.key(0)))


def adapted(params, made, *, key=None, size=0.2):
    """Weights of an adapter on a base; with a `key` both factors are random, not only A."""
    factors = adapters.fresh(made, SHAPES, jax.random.key(1))
    if key is not None:
        factors = jax.tree.map(lambda x: x + size * jax.random.normal(jax.random.key(key), x.shape), factors)
    weights = Weights(factors, trees.joined(params, adapters.constants(made)))
    if made.dora:
        magnitudes = adapters.magnitudes(weights.params, abstract_params(SPEC))
        weights = dataclasses.replace(weights, trained=trees.joined(factors, magnitudes))
    return weights


def nf4(params):
    """The tree with its kernels in 4 bits, and the same numbers as arrays."""
    kept, plain = {}, {}
    for path, leaf in trees.paths(params).items():
        kept[path] = plain[path] = leaf
        if path in KERNELS:
            codes = quantised.quantise(np.asarray(leaf).swapaxes(-1, -2), "nf4")
            made = {name: jnp.asarray(array) for name, array in codes.items()}
            kept |= {f"{path}/{name}": array for name, array in made.items()}
            plain[path] = quantised.QuantisedKernel.of(made, leaf.shape[-2:]).dequantised(jnp.float32)
            del kept[path]
    return trees.from_paths(kept), trees.from_paths(plain)


TOKENS = jnp.arange(40, dtype=jnp.int32).reshape(2, 20)


def test_a_new_adapter_changes_nothing_to_the_bit(params):
    found = logits(SPEC, adapted(params, adapter()).params, TOKENS)
    np.testing.assert_array_equal(found, logits(SPEC, params, TOKENS))


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_what_it_adds_to_the_kernels(params, dora):
    """To 2e-5 of logits of about 10: the products are summed in another order."""
    weights = adapted(params, adapter(dora=dora), key=2)
    if dora:
        grown = {p: x * 1.1 if p.endswith("magnitude") else x for p, x in trees.paths(weights.trained).items()}
        weights = dataclasses.replace(weights, trained=trees.from_paths(grown))
    found = logits(SPEC, weights.params, TOKENS)
    merged = adapters.folded(weights.params, abstract_params(SPEC))
    assert trees.paths(merged).keys() == trees.paths(params).keys()
    np.testing.assert_allclose(found, logits(SPEC, merged, TOKENS), atol=2e-5)
    assert np.abs(found - logits(SPEC, params, TOKENS)).max() > 0.1


def test_the_base_is_what_is_left_without_the_factors(params):
    base = adapters.without(adapted(params, adapter(), key=2).params)
    assert all(leaf is trees.paths(base)[path] for path, leaf in trees.paths(params).items())


@pytest.mark.nightly
def test_layers_without_an_adapter_and_smaller_ranks_stay_zero_under_adam(params):
    """Zeros in both factors are zeros of both gradients, so that no optimizer moves them."""
    ranks = (0, 2) if SHAPES[KERNELS[0]][0] == 2 else (2,)
    layered = {p: LowRank(ranks[-SHAPES[p][0] :], (1.0,) * SHAPES[p][0], p) for p in KERNELS}
    wider = {
        p: (one._replace(ranks=(*one.ranks[:-1], 3)) if i % 2 else one) for i, (p, one) in enumerate(layered.items())
    }
    made = AdapterSpec(wider)
    weights = adapted(params, made)
    settings = OptimizerSettings(learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.1)
    optimizer = make_optimizer(settings)
    step = jax.jit(make_step(TrainingObjective(SPEC), optimizer, optax.constant_schedule(0.1), steps=4))
    state, batches = fresh_state(weights.trained, optimizer), Batches(ENCODED, 10, 1, 4)
    for number in range(4):
        state, _ = step(state, Weights({}, weights.frozen), params, batches.at(number))
    for path, change in made.changes.items():
        a, b = (np.asarray(trees.paths(state["trained"])[adapters.beside(path, name)]) for name in "ab")
        for layer, rank in enumerate(change.ranks):
            assert not a[layer][:, rank:].any() and not b[layer][rank:].any()
            assert rank == 0 or (a[layer][:, :rank].any() and b[layer][:rank].any())


# ---------------------------------------------------------------------------------------------- layouts


LAYOUTS = {
    "one row a prompt": {"share": False, "micro": 4096, "devices": 1},
    "micro-batches": {"share": True, "micro": 80, "devices": 1},
    "two devices": {"share": True, "micro": 4096, "devices": 2},
    "four devices, micro-batches": {"share": True, "micro": 64, "devices": 4},
}


@functools.cache
def solved(kind, base, share, micro, devices):
    params = jax.tree.map(lambda leaf: 3 * leaf, init_params(SPEC, jax.random.key(0)))
    params = nf4(params)[0] if base == "nf4" else params
    weights = adapted(params, adapter(dropout=DROPOUT), key=2, size=0.05)
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    placed = Weights(*(jax.device_put(t, sharding.param_shardings(t, mesh)) for t in (weights.trained, weights.frozen)))
    objective = TrainingObjective(
        SPEC,
        make_terms([{"name": kind}]),
        execution=Execution(remat="attention", activations=sharding.rows(mesh)),
        dropout=DROPOUT,
        statistics=False,
    )
    batch = Batches(ENCODED, 30, devices, 2, share_prompts=share, micro_tokens=micro).at(1)
    solve = jax.jit(functools.partial(loss_and_gradient, objective))
    reference = adapters.without(placed.params)
    loss, _, gradient, _ = solve(placed, sharding.place(batch, mesh), reference, MOMENT)
    return float(loss), trees.paths(jax.device_get(gradient)), int(batch.micro_batches)


BY_DAY = (("four devices, micro-batches", "sigmoid", "plain"),)


@pytest.mark.parametrize(
    ("layout", "kind", "base"),
    by_pairs(
        (
            (layout, kind, base)
            for layout in LAYOUTS
            for kind, base in (("sigmoid", "plain"), ("sigmoid", "nf4"), ("aot", "plain"))
        ),
        BY_DAY,
    ),
)
def test_noise_is_a_tokens_own_wherever_it_stands(layout, kind, base):
    """Loss to 1e-5 and gradient to 1e-5 of its largest number, with dropout: prompts alone or shared, one micro-batch
    or several, one device or more."""
    loss, gradient, _ = solved(kind, base, True, 4096, 1)
    other, slope, micro = solved(kind, base, **LAYOUTS[layout])
    assert (micro > 1) == ("micro-batches" in layout)
    assert other == pytest.approx(loss, abs=1e-5)
    largest = max(float(np.abs(leaf).max()) for leaf in gradient.values())
    for path, leaf in gradient.items():
        np.testing.assert_allclose(slope[path], leaf, atol=1e-5 * max(largest, 1.0), err_msg=path)


def test_noise_is_there_and_another_at_each_step(params):
    weights = adapted(params, adapter(dropout=DROPOUT), key=2)
    batch = Batches(ENCODED, 10, 1, 1).at(0)

    def loss(dropout, key):
        objective = TrainingObjective(SPEC, dropout=dropout)
        return float(
            jax.jit(functools.partial(loss_and_gradient, objective))(weights, batch, params, Progress(key=key))[0]
        )

    plain = loss(0.0, jnp.uint32(7))
    one, other = loss(DROPOUT, jnp.uint32(7)), loss(DROPOUT, jnp.uint32(8))
    assert len({plain, one, other}) == 3 and loss(DROPOUT, jnp.uint32(7)) == one
    assert loss(DROPOUT, None) == plain


def test_dropped_numbers_are_a_tenth_and_the_mean_stays():
    """Over 262,144 numbers: the share to 4 standard deviations, 0.0023; of two channels, or tokens, no more are dropped
    together than by chance (correlation of 4,096 numbers to 5 standard deviations, 0.08)."""
    position = jnp.broadcast_to(jnp.arange(1024), (4, 1024))
    noise = adapters.token_noise(jnp.uint32(3), jnp.arange(4)[:, None] + 0 * position, position, DROPOUT)
    assert noise is not None
    found = np.asarray(adapters._dropped(jnp.ones((4, 1024, 64)), noise.tokens, jnp.uint32(5), DROPOUT))
    assert (found == 0).mean() == pytest.approx(DROPOUT, abs=0.0023)
    assert set(np.unique(found)) == {np.float32(0), np.float32(1 / (1 - DROPOUT))}
    together = np.corrcoef((found.reshape(-1, 64) == 0).T)
    assert np.abs(together - np.eye(64)).max() < 0.08
    other = np.asarray(adapters._dropped(jnp.ones((4, 1024, 64)), noise.tokens, jnp.uint32(6), DROPOUT))
    assert abs(np.corrcoef((found == 0).ravel(), (other == 0).ravel())[0, 1]) < 0.01


# ---------------------------------------------------------------------------------------------- quantised bases


def test_a_quantised_base_is_the_model_of_its_dequantised_kernels(params):
    """Forward to 2e-5 of logits of about 10; the gradient of the factors to 1e-6 of its largest."""
    kept, plain = nf4(params)
    made = adapter()
    np.testing.assert_allclose(logits(SPEC, kept, TOKENS), logits(SPEC, plain, TOKENS), atol=2e-5)
    batch = Batches(ENCODED, 10, 1, 1).at(0)
    solve = jax.jit(functools.partial(loss_and_gradient, TrainingObjective(SPEC)))
    losses, gradients = zip(
        *(solve(adapted(base, made, key=2), batch, adapters.without(base))[::2] for base in (kept, plain)), strict=True
    )
    assert float(losses[0]) == pytest.approx(float(losses[1]), abs=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), *gradients)


# ---------------------------------------------------------------------------------------------- objectives


CONSTANT = [name for name in OBJECTIVES if OBJECTIVES[name].model == "language" and OBJECTIVES[name].data != "rankings"]


@pytest.mark.parametrize("name", by_day(CONSTANT, ("sigmoid", "ipo", "simpo", "aot")))
def test_the_first_loss_of_a_new_adapter_is_the_objectives_constant(params, name):
    """Against its own base as a live reference: policy and reference differ by rounding alone."""
    objective = TrainingObjective(SPEC, make_terms([{"name": name}]), dropout=DROPOUT)
    if objective.start_constant is None or objective.data == "unpaired":
        pytest.skip("its first loss is no constant of pairs")
    plain = dataclasses.replace(
        ENCODED,
        weight=np.ones_like(ENCODED.weight),
        margin=np.zeros_like(ENCODED.margin),
        label=np.ones_like(ENCODED.label),
    )
    weights = adapted(params, adapter(dropout=DROPOUT))
    solve = jax.jit(functools.partial(loss_and_gradient, objective))
    loss = solve(weights, Batches(plain, 10, 1, 1).at(0), adapters.without(weights.params), MOMENT)[0]
    assert float(loss) == pytest.approx(objective.start_constant, abs=2e-6)
