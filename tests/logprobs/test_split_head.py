"""A head that is split over devices, or frozen, says what the whole one says, and no device ever has all of it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax import linear_logprobs, sharding
from dpo_jax.logprobs.fused import HeadSplit, TokenScores
from dpo_jax.logprobs.tokens import linear_scores
from tests.support.exchanges import collectives
from tests.support.tiers import by_day

MESHES = {
    "tensor 2, fsdp 2": (1, 2, 2, 1),
    "tensor 4": (1, 1, 4, 1),
    "fsdp 4": (1, 4, 1, 1),
    "data 2, fsdp 2": (2, 2, 1, 1),
    "fsdp 2, context 2": (1, 2, 1, 2),
}
DAY = {"tensor 2, fsdp 2", "tensor 4", "fsdp 2, context 2"}
COTANGENT = jnp.linspace(-1.0, 2.0, 8)


def problem(vocab, width=16, n=8):
    keys = jax.random.split(jax.random.key(vocab), 4)
    hidden, rows = jax.random.normal(keys[0], (n, width)), jax.random.normal(keys[1], (vocab, width))
    return hidden, rows, jax.random.normal(keys[2], (vocab,)), jax.random.randint(keys[3], (n,), 0, vocab)


def measured(targets, **options):
    """Scores, and the gradient of a weighted sum of log-probabilities along hidden states, rows and bias."""

    def loss(hidden, rows, bias):
        scores = linear_scores(hidden, rows, targets, bias=bias, **options)
        return (scores.logps * COTANGENT).sum(), scores

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))


ASKED = dict(chunk=32, statistics=True, collision=True, softcap=4.0, scale=0.7)


@functools.cache
def on_one_device(vocab, frozen):
    hidden, rows, bias, targets = problem(vocab)
    return measured(targets, **ASKED, frozen=frozen)(hidden, rows, bias)


@pytest.mark.parametrize("mesh", by_day(MESHES, DAY))
@pytest.mark.parametrize("vocab", [5, 101])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_split_head_is_the_whole_head(mesh, vocab, frozen):
    """Also where the vocabulary is odd, even where a device is left without any of it."""
    data, fsdp, tensor, context = MESHES[mesh]
    devices = sharding.make_mesh(data, fsdp, tensor, jax.devices()[:4], context=context)
    hidden, rows, bias, targets = problem(vocab)
    slopes, scores = on_one_device(vocab, frozen)
    split = sharding.head_split(devices)
    split_slopes, split_scores = measured(targets, **ASKED, frozen=frozen, split=split)(hidden, rows, bias)
    # float32 sums of up to 128 terms of order one in another order
    for name, want in scores._asdict().items():
        np.testing.assert_allclose(getattr(split_scores, name), want, rtol=1e-6, atol=2e-6, err_msg=name)
    for ours, whole in zip(split_slopes, slopes, strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-6, atol=2e-6)
    assert not frozen or not np.any(split_slopes[1])


def test_sizes_that_the_axes_do_not_divide_are_whole_on_each_device():
    mesh = sharding.make_mesh(1, 4, 1, jax.devices()[:4])
    hidden, rows, bias, targets = problem(101, width=6)
    whole = measured(targets, chunk=32)(hidden, rows, bias)
    for names in (("data", "fsdp"), ()):  # tokens that are split over the width's axis, and tokens that are not
        split = HeadSplit(mesh, names, "tensor", ("fsdp",))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-6),
            measured(targets, chunk=32, split=split)(hidden, rows, bias),
            whole,
        )
    hidden, rows, bias, targets = problem(101)
    split, whole = HeadSplit(mesh, (), None, ("fsdp",)), measured(targets, chunk=32)(hidden, rows, bias)
    found = measured(targets, chunk=32, split=split)(hidden, rows, bias)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-6), found, whole)
    frozen = measured(targets, chunk=32, split=split, frozen=True)(hidden, rows, bias)
    np.testing.assert_allclose(frozen[0][0], whole[0][0], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("mesh", by_day(MESHES, DAY))
@pytest.mark.parametrize("vocab", [512, 509])
@pytest.mark.parametrize("frozen", [False, True])
def test_no_device_gathers_the_head_or_the_logits(mesh, vocab, frozen):
    """The largest thing that moves is a chunk of the head; an odd vocabulary's gradient alone is put together whole,
    because such a head lies whole on each device."""
    data, fsdp, tensor, context = MESHES[mesh]
    devices = sharding.make_mesh(data, fsdp, tensor, jax.devices()[:4], context=context)
    width, chunk, n = 48, 32, 8
    hidden, rows, bias, targets = problem(vocab, width, n)
    split = sharding.head_split(devices)
    places = sharding.param_shardings({"head": {"embedding": rows, "bias": bias}}, devices)["head"]
    assert split is not None
    tokens = NamedSharding(devices, P(split.tokens))
    run = jax.jit(
        lambda h, w, b, t: measured(t, chunk=chunk, split=split, frozen=frozen)(h, w, b)[0],
        in_shardings=(tokens, places["embedding"], places["bias"], tokens),
        out_shardings=(tokens, places["embedding"], places["bias"]),
    )
    text = run.lower(hidden, rows, bias, targets).compile().as_text()
    moved, own = collectives(text), -(-vocab // tensor)
    largest = max(size for _, size in moved)
    assert largest <= (chunk if vocab % tensor == 0 or frozen else own * tensor) * width, moved
    local = n // (data * fsdp * context)
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\w\d+\[(\d+(?:,\d+)+)\]", text)}
    assert not [shape for shape in shapes if {local, n} & set(shape) and {vocab, own} & set(shape)]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.6])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_frozen_head_gives_hidden_states_the_same_gradient(softcap, scale, with_bias):
    hidden, rows, bias, targets = problem(101)
    bias = bias if with_bias else None

    def slope(frozen):
        def loss(hidden, rows):
            options = dict(bias=bias, scale=scale, softcap=softcap, chunk=32, frozen=frozen)
            return (linear_logprobs(hidden, rows.T, targets, **options) * COTANGENT).sum()

        return jax.jit(jax.grad(loss, (0, 1)))(hidden, rows)

    (trained, _), (frozen, none) = slope(False), slope(True)
    np.testing.assert_allclose(frozen, trained, rtol=1e-5, atol=2e-6)  # float32 sums of 101 products in another order
    assert not none.any()


def test_a_frozen_head_costs_two_products():
    """One for the logits and one for the slope; the backward pass makes none."""
    hidden, rows, _, targets = problem(64)

    def products(frozen, where):
        slope = jax.grad(lambda *x: linear_logprobs(x[0], x[1].T, targets, chunk=64, frozen=frozen).sum(), where)
        return str(jax.make_jaxpr(slope)(hidden, rows)).count("dot_general")

    assert (products(True, 0), products(False, (0, 1))) == (2, 4)


def test_bfloat16_states_get_a_frozen_heads_slope_within_their_rounding():
    hidden, rows, _, targets = problem(101)
    narrow = hidden.astype(jnp.bfloat16), rows.astype(jnp.bfloat16)
    wide = tuple(x.astype(jnp.float32) for x in narrow)

    def slope(hidden, rows):
        form = lambda h: (linear_logprobs(h, rows.T, targets, chunk=32, frozen=True) * COTANGENT).sum()  # noqa: E731
        return jax.grad(form)(hidden)

    # shares are rounded to 8 bits before they weigh rows, and the result once more
    np.testing.assert_allclose(slope(*narrow).astype(np.float32), slope(*wide), rtol=2**-7, atol=2**-7)


def test_what_is_not_asked_for_is_not_computed_on_devices_either():
    mesh = sharding.make_mesh(1, 2, 2, jax.devices()[:4])
    hidden, rows, _, targets = problem(64)
    found = linear_scores(hidden, rows, targets, split=sharding.head_split(mesh))
    assert isinstance(found, TokenScores) and not any(np.any(x) for x in (found.entropy, found.mean_logit, found.top1))
