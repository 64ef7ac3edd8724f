"""Every objective has the same loss and gradient however a step is laid out: micro-batches, devices, packing."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import logits, sharding, trees
from dpo_jax.data.batches import Batches
from dpo_jax.data.examples import as_examples
from dpo_jax.model.attention import causal
from dpo_jax.model.decoder import Execution, cast, hidden, init_params, scalar_scores
from dpo_jax.model.weights import Weights
from dpo_jax.objectives.mixture import Progress
from dpo_jax.objectives.pairs import Pairs, Ranking, Sums
from dpo_jax.objectives.table import OBJECTIVES
from dpo_jax.objectives.terms import make_terms
from dpo_jax.preference.loss import TrainingObjective, loss_and_gradient, measure
from tests.support.forests import SPEC, random_encoded
from tests.support.tiers import by_pairs

SCALAR = dataclasses.replace(SPEC, scalar_head=True)
ENCODED = random_encoded(units=70, completions=(2, 3), seed=3, soft=True, longest=18)
ENTRIES = 60
STEP = 1
MOMENT = Progress(0.25)
VARIANTS = [
    {"name": "sigmoid", "beta": 0.3, "beta_end": 0.1, "label_smoothing": 0.1},
    {"name": "sigmoid", "ld_alpha": 0.3},
    {"name": "sigmoid", "weighting": "wpo"},
    {"name": "sigmoid", "reference_free": True, "beta": 0.02},
    {"name": "sft", "weighting": "wpo_clamped"},
    {"name": "ipo", "divergence": "js_divergence"},
    {"name": "sigmoid_norm", "divergence": "forward_kl", "ld_alpha": 0.0},
    {"name": "hinge", "divergence": "alpha_divergence", "divergence_alpha": 0.3, "beta": 0.01},
]
"""Every modifier, beside every objective as it comes."""


def kinds():
    """Problems that are compiled as one: their terms by name, the data they see, and the model they train."""
    rows = [{"name": name} for name in OBJECTIVES] + VARIANTS
    for kind, wide, model in (
        ("pairs", False, "language"),
        ("pairs", True, "language"),
        ("rankings", False, "language"),
        ("unpaired", True, "language"),
        ("pairs", False, "reward"),
    ):
        yield [
            row
            for row in rows
            if OBJECTIVES[row["name"]].model == model
            and OBJECTIVES[row["name"]].scope == ("step" if wide else "pair")
            and OBJECTIVES[row["name"]].data in (kind, "chosen" if kind == "pairs" else kind)
        ]


KINDS = {"per pair": 0, "over the step": 1, "rankings": 2, "single completions": 3, "reward model": 4}
TERMS = {name: make_terms(list(kinds())[number]) for name, number in KINDS.items()}


@functools.cache
def weights_of(name):
    spec = SCALAR if name == "reward model" else SPEC
    trees_of = [jax.tree.map(lambda leaf: 3 * leaf, init_params(spec, jax.random.key(seed))) for seed in (0, 1)]
    if spec.scalar_head:
        trees_of[0]["score"]["kernel"] = jax.random.normal(jax.random.key(2), (spec.width, 1))
    return spec, trees_of


@functools.cache
def entries_of(name):
    kind = {"rankings": "rankings", "single completions": "unpaired"}.get(name, "pairs")
    return as_examples(ENCODED, kind, objective=name, max_length=64)


def batches_of(name, micro, devices, share):
    """Batches whose step comes in (at least) so many micro-batches: 1, 2 or 4."""
    for micro_tokens in (4096, 320, 256, 192, 160, 128, 96, 80, 64, 48, 32):
        batches = Batches(
            entries_of(name),
            2 * ENTRIES if name == "single completions" else ENTRIES,  # fewer prompts have them
            devices,
            2,
            share_prompts=share,
            micro_tokens=micro_tokens,
            rankings=name == "rankings",
        )
        if int(batches.at(STEP).micro_batches) >= micro:
            return batches
    raise AssertionError(f"no layout with {micro} micro-batches on {devices} devices")


def one_by_one(name, run):
    """Loss and gradient of each term by itself: one compilation, a weight of 1 at each term in turn."""
    found = {}
    for number, term in enumerate(TERMS[name]):
        loss, gradient = jax.device_get(run(np.eye(len(TERMS[name]), dtype=np.float32)[number]))
        found[number, term.name] = float(loss), trees.paths(gradient)
    return found


def weighed(name, weights):
    return tuple(dataclasses.replace(term, weight=weights[i]) for i, term in enumerate(TERMS[name]))


@functools.cache
def laid_out(name, micro, devices, share):
    spec, (policy, reference) = weights_of(name)
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    placed = [jax.device_put(tree, sharding.param_shardings(tree, mesh)) for tree in (policy, reference)]
    execution = Execution(remat="attention", activations=sharding.rows(mesh))
    batch = sharding.place(batches_of(name, micro, devices, share).at(STEP), mesh)

    @jax.jit
    def step(weights, params, live, batch):
        problem = TrainingObjective(spec, weighed(name, weights), execution=execution, statistics=False)
        loss, _, gradient, _ = loss_and_gradient(problem, Weights(params), batch, live, MOMENT)
        return loss, gradient

    live = None if spec.scalar_head else placed[1]
    return one_by_one(name, lambda weights: step(weights, placed[0], live, batch))


# ------------------------------------------------------------------------------------------ the plainest route


def padded_rows(encoded):
    """Every completion behind its prompt in a row of its own: ids, and where the completion's tokens are."""
    width = 64
    ids = np.zeros((encoded.num_completions, width), np.int32)
    scored = np.zeros(ids.shape, bool)
    for c in range(encoded.num_completions):
        text = [*encoded.prompt(c), *encoded.completion(c)]
        ids[c, : len(text)] = text
        scored[c, len(encoded.prompt(c)) : len(text)] = True
    return ids, scored


def token_tables(params, ids, scored):
    """Log-probability and WPO's alignment of each token of each row, 0 where it is not scored."""
    logs = jax.nn.log_softmax(logits(SPEC, params, jnp.asarray(ids))[:, :-1])
    picked = jnp.take_along_axis(logs, jnp.asarray(ids)[:, 1:, None], axis=-1)[..., 0]
    collision = jnp.log(jnp.exp(2 * logs).sum(axis=-1))
    mask = jnp.asarray(scored[:, 1:])
    return jnp.where(mask, picked, 0.0), jnp.where(mask, picked - collision, 0.0)


def padded_pairs(encoded, numbers, noise, params, reference, spec):
    """What the objectives see of the numbered entries, from padded rows."""
    ids, scored = padded_rows(encoded)
    mask = scored[:, 1:]
    lengths = mask.sum(axis=1)
    chosen, rejected = encoded.chosen[numbers], encoded.rejected[numbers]
    if spec.scalar_head:
        states = hidden(spec, params, jnp.asarray(ids), causal(*ids.shape))
        last = np.asarray([len(encoded.prompt(c)) + len(encoded.completion(c)) - 1 for c in range(len(lengths))])
        policy = scalar_scores(spec, params, states[np.arange(len(last)), last])
        tokens = others = jnp.zeros(mask.shape)
        sums, aligned = (policy, jnp.zeros_like(policy)), jnp.zeros(mask.shape)
    else:
        (tokens, aligned), (others, _) = token_tables(params, ids, scored), token_tables(reference, ids, scored)
        sums = tokens.sum(axis=1), others.sum(axis=1)
    shortest = np.minimum(lengths[chosen], lengths[rejected])
    early = {side: mask[c].cumsum(axis=1) <= shortest[:, None] for side, c in (("w", chosen), ("l", rejected))}

    def shared(table, side, which):
        return jnp.where(early[side], table[which], 0.0).sum(axis=1)

    first = [np.flatnonzero(encoded.completion_unit == u) for u in encoded.pair_unit[numbers]]
    width = max(map(len, first))
    rank = np.asarray([[*encoded.rank[c], *[-1] * (width - len(c))] for c in first], np.int32)
    places = np.asarray([[*c, *[0] * (width - len(c))] for c in first])
    mean = aligned.sum(axis=1) / jnp.maximum(lengths, 1).astype(jnp.float32)
    f32 = functools.partial(jnp.asarray, dtype=jnp.float32)
    return Pairs(
        sums[0][chosen],
        sums[0][rejected],
        sums[1][chosen],
        sums[1][rejected],
        f32(lengths[chosen]),
        f32(lengths[rejected]),
        margin=f32(encoded.margin[numbers]),
        label=f32(encoded.label[numbers]),
        weight=f32(encoded.weight[numbers]),
        real=jnp.ones(len(numbers), bool),
        noise=f32(noise),
        shared=Sums(
            shared(tokens, "w", chosen),
            shared(tokens, "l", rejected),
            shared(others, "w", chosen),
            shared(others, "l", rejected),
        ),
        alignment=(mean[chosen], mean[rejected]),
        ranking=Ranking(sums[0][places], sums[1][places], jnp.asarray(rank)),
    )


@functools.cache
def padded(name):
    spec, (policy, reference) = weights_of(name)
    batches = batches_of(name, 1, 1, True)
    numbers, noise = batches.pairs_of(STEP), batches._noise(STEP)

    @jax.jit
    def run(weights, params):
        def loss(params):
            params = cast(params, jnp.float32)
            pairs = padded_pairs(entries_of(name), numbers, noise, params, reference, spec)
            return measure(weighed(name, weights), pairs, MOMENT)[0]

        return jax.value_and_grad(loss)(params)

    return one_by_one(name, lambda weights: run(weights, policy))


LAYOUTS = [  # every two of: micro-batches 1, 2, 4; devices 1, 2, 4; prompts shared or not
    (1, 1, True),
    (2, 1, False),
    (4, 1, True),
    (1, 2, False),
    (2, 2, True),
    (4, 2, False),
    (1, 4, True),
    (2, 4, False),
]


DAY = [(name, (2, 2, True)) for name in KINDS]
"""Every kind where all is at once: micro-batches, devices, shared prompts."""


@pytest.mark.parametrize(
    "name,layout",
    by_pairs(itertools.product(KINDS, LAYOUTS), DAY),
    ids=lambda x: x if isinstance(x, str) else f"{x[0]}_micro-{x[1]}_devices-{'shared' if x[2] else 'whole'}",
)
def test_every_objective_is_that_of_padded_rows(name, layout):
    """1e-5, and 2e-5 of gradients, whose norm is compared: float32 sums in another order, 1.1e-5 was seen."""
    plain, found = padded(name), laid_out(name, *layout)
    for key, (loss, gradient) in plain.items():
        ours, slope = found[key]
        assert ours == pytest.approx(loss, rel=1e-5), key
        norm = np.sqrt(sum(np.square(leaf.astype(np.float64)).sum() for leaf in gradient.values()))
        error = np.sqrt(sum(np.square((slope[n] - leaf).astype(np.float64)).sum() for n, leaf in gradient.items()))
        assert norm > 0 and error <= 2e-5 * norm, (key, error / norm)


def test_every_objective_and_every_modifier_is_among_them():
    assert {term.name for terms in TERMS.values() for term in terms} == set(OBJECTIVES)


def test_the_layouts_differ():
    counts = [int(batches_of("per pair", *layout).at(STEP).micro_batches) for layout in LAYOUTS]
    assert counts[0] == 1 and all(count >= layout[0] for count, layout in zip(counts, LAYOUTS, strict=True))
