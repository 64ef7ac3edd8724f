"""Laws of the gated delta rule: chunks are the recurrence, packing is invisible, pieces are the whole."""

import functools

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax.model import delta
from dpo_jax.model import spec as specs
from dpo_jax.model.delta import GatedDeltaNet, empty_memory
from dpo_jax.sharding import make_mesh

SPEC = specs.GatedDelta(key_heads=2, value_heads=4, key_dim=8, value_dim=6, kernel=4, norm=specs.Norm(1e-6))
WIDTH = 12
ROWS, LENGTH = 4, 150  # two whole chunks and a part of one


@functools.cache
def net():
    """The layer's graph, and fresh parameters."""
    return nnx.split(GatedDeltaNet(SPEC, WIDTH, rngs=nnx.Rngs(0)))


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@functools.cache
def random_params():
    """Parameters that all matter: strengths around a half, heads that forget at once and heads that hardly do."""
    leaves, structure = jax.tree.flatten(net()[1])
    params = jax.tree.unflatten(structure, [0.5 * draw(i, *leaf.shape) for i, leaf in enumerate(leaves)])
    params["decay_rate"][...] = jnp.log(jnp.array([0.003, 0.1, 1.0, 16.0]))
    return params


@jax.jit
def apply(params, x, text, memory=None):
    return nnx.merge(net()[0], params)(x, text, memory)


rule = jax.jit(delta.gated_delta)


@jax.jit
def gradients(params, x, text, weights):
    """Of `sum(y * weights)`, by the parameters and by x; and y."""

    def total(params, x):
        y, _ = nnx.merge(net()[0], params)(x, text)
        return (y * weights).sum(), y

    return jax.grad(total, argnums=(0, 1), has_aux=True)(params, x)


def close(got, expected, tolerance: float = 1e-5) -> None:
    """Two trees are the same, to a part of the largest entry of each leaf."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(np.abs(b).max()))


def numbered(lengths: list[int], total: int = LENGTH) -> np.ndarray:
    """[2, 3] in a row of 7 is 1 1 2 2 2 0 0."""
    text = np.repeat(np.arange(len(lengths)) + 1, lengths)
    return np.pad(text, (0, total - len(text))).astype(np.int32)


# ---- the oracle: one text, token by token, in float64


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def unit(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def projected(params, x):
    """Queries, keys, values, strengths and decays of each token of one text, with keys for each value head."""
    leaf = jax.tree.map(lambda each: np.asarray(each, np.float64), nnx.to_pure_dict(params))
    inputs, kernel = x @ leaf["mixed"]["kernel"], leaf["conv"]["kernel"]
    inputs = np.pad(inputs, ((SPEC.kernel - 1, 0), (0, 0)))
    mixed = np.stack([(inputs[t : t + SPEC.kernel] * kernel.T).sum(0) for t in range(len(x))])
    mixed = mixed * sigmoid(mixed)
    keys = SPEC.key_heads * SPEC.key_dim
    query, key = (mixed[:, i * keys : (i + 1) * keys].reshape(-1, SPEC.key_heads, SPEC.key_dim) for i in (0, 1))
    query, key = (unit(each).repeat(SPEC.value_heads // SPEC.key_heads, axis=1) for each in (query, key))
    value = mixed[:, 2 * keys :].reshape(-1, SPEC.value_heads, SPEC.value_dim)
    decay = -np.exp(leaf["decay_rate"]) * np.log1p(np.exp(x @ leaf["decay"]["kernel"] + leaf["decay_bias"]))
    return query, key, value, sigmoid(x @ leaf["strength"]["kernel"]), decay


def recurrence(params, x):
    """The layer on one text, as the paper's equation 10 states it."""
    x = np.asarray(x, np.float64)
    state, outputs = np.zeros((SPEC.value_heads, SPEC.key_dim, SPEC.value_dim)), []
    for q, k, v, b, g in zip(*projected(params, x), strict=True):
        state = np.exp(g)[:, None, None] * state
        correction = b[:, None] * (v - np.einsum("hcv,hc->hv", state, k))
        state = state + k[:, :, None] * correction[:, None, :]
        outputs.append(np.einsum("hcv,hc->hv", state, q) * SPEC.key_dim**-0.5)
    leaf = jax.tree.map(lambda each: np.asarray(each, np.float64), nnx.to_pure_dict(params))
    mixed = np.stack(outputs)
    mixed = mixed / np.sqrt(np.square(mixed).mean(-1, keepdims=True) + SPEC.norm.epsilon) * leaf["norm"]["scale"]
    gate = x @ leaf["gate"]["kernel"]
    return (mixed.reshape(len(x), -1) * gate * sigmoid(gate)) @ leaf["output"]["kernel"]


def each_alone(params, x, lengths: list[int]):
    stops = np.cumsum(lengths)
    return np.concatenate([recurrence(params, x[stop - n : stop]) for n, stop in zip(lengths, stops, strict=True)])


def cut(lengths: list[int]) -> list[int]:
    """As many of the lengths as fit into a row."""
    stops = np.cumsum(lengths)
    return [n for n, stop in zip(lengths, stops, strict=True) if stop <= LENGTH] or [LENGTH]


# ---- laws


@settings(max_examples=25, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 6), st.integers(1, LENGTH)), min_size=1, max_size=12).map(cut))
@example([LENGTH])
@example([64, 64])  # boundaries between chunks
@example([63, 1, 1, 70])  # and about them
@example([20, 100, 1, 1, 1])  # a text over three chunks that ends inside one
def test_every_text_of_a_row_is_the_recurrence_over_it_alone(lengths):
    x = draw(7, 2, LENGTH, WIDTH)
    text = jnp.stack([numbered(lengths), numbered(lengths[::-1])])
    y, memory = apply(random_params(), x, text)
    assert memory is None
    assert jnp.isfinite(y).all()
    for row, order in enumerate((lengths, lengths[::-1])):
        close(y[row, : sum(order)], each_alone(random_params(), x[row], order))


def test_packing_is_invisible_to_gradients():
    lengths = [70, 3, 1, 50]
    x, weights = draw(1, ROWS, LENGTH, WIDTH), draw(2, ROWS, LENGTH, WIDTH)
    text = jnp.stack([numbered(lengths)] + [numbered([])] * (ROWS - 1))
    weights = jnp.where(text[..., None] > 0, weights, 0)  # outputs at padding mean nothing
    (of_params, of_x), _ = gradients(random_params(), x, text, weights)

    stops = np.cumsum(lengths)
    alone = [(slice(stop - n, stop), n) for n, stop in zip(lengths, stops, strict=True)]
    rows = np.zeros((2, len(lengths), LENGTH, WIDTH), np.float32)
    for number, (place, n) in enumerate(alone):
        rows[0][number, :n], rows[1][number, :n] = x[0, place], weights[0, place]
    (expected, of_rows), _ = gradients(random_params(), rows[0], np.stack([numbered([n]) for n in lengths]), rows[1])
    close(of_params, expected)
    close(of_x[0, : stops[-1]], np.concatenate([of_rows[number, :n] for number, (_, n) in enumerate(alone)]))
    assert not of_x[0, stops[-1] :].any() and not of_x[1:].any()


@pytest.mark.parametrize("length", [2, LENGTH])
def test_layer_and_gradient_are_those_of_transformers(length):
    torch = pytest.importorskip("torch")
    from transformers import Qwen3_5TextConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

    config = Qwen3_5TextConfig(
        hidden_size=WIDTH,
        linear_num_key_heads=SPEC.key_heads,
        linear_num_value_heads=SPEC.value_heads,
        linear_key_head_dim=SPEC.key_dim,
        linear_value_head_dim=SPEC.value_dim,
        linear_conv_kernel_dim=SPEC.kernel,
        rms_norm_eps=SPEC.norm.epsilon,
        layer_types=["linear_attention"],
        num_hidden_layers=1,
    )
    params = jax.tree.map(jnp.asarray, random_params())
    params["decay_rate"][...] = jnp.log(jnp.array([0.003, 0.1, 1.0, 2.0]))  # theirs loses digits where decay is strong
    theirs = Qwen3_5GatedDeltaNet(config, 0).float()  # pyright: ignore[reportArgumentType]
    leaves = {
        ("mixed", "kernel"): (theirs.in_proj_qkv.weight, lambda w: w.T),
        ("gate", "kernel"): (theirs.in_proj_z.weight, lambda w: w.T),
        ("strength", "kernel"): (theirs.in_proj_b.weight, lambda w: w.T),
        ("decay", "kernel"): (theirs.in_proj_a.weight, lambda w: w.T),
        ("conv", "kernel"): (theirs.conv1d.weight, lambda w: w[:, 0]),
        ("decay_rate",): (theirs.A_log, lambda w: w),
        ("decay_bias",): (theirs.dt_bias, lambda w: w),
        ("norm", "scale"): (theirs.norm.weight, lambda w: w),
        ("output", "kernel"): (theirs.out_proj.weight, lambda w: w.T),
    }
    ours = dict(nnx.to_flat_state(params))
    assert set(ours) == set(leaves)
    with torch.no_grad():
        for path, (weight, turn) in leaves.items():
            turn(weight).copy_(torch.tensor(np.asarray(ours[path][...])))
    x, weights = draw(3, ROWS, length, WIDTH), draw(4, ROWS, length, WIDTH)
    there = torch.tensor(np.asarray(x), requires_grad=True)
    output = theirs(there)
    (output * torch.tensor(np.asarray(weights))).sum().backward()

    (of_params, of_x), y = gradients(params, x, jnp.ones((ROWS, length), jnp.int32), weights)
    close(y, output.detach().numpy(), 1e-4)
    close(of_x, there.grad.numpy(), 1e-4)
    gradient = dict(nnx.to_flat_state(of_params))
    close({p: gradient[p][...] for p in leaves}, {p: t(w.grad).numpy() for p, (w, t) in leaves.items()}, 1e-4)


@pytest.mark.parametrize("pieces", [[1] * 6, [5, 1, 1, 70, 2]], ids=str)
def test_reading_in_pieces_is_reading_at_once(pieces):
    """Three texts, of which padding stands before the first token: none, two tokens, and the whole first piece."""
    length = sum(pieces)
    x = draw(5, 3, length, WIDTH)
    text = (jnp.arange(length)[None, :] >= jnp.array([0, min(2, pieces[0]), pieces[0]])[:, None]).astype(jnp.int32)
    expected, _ = apply(random_params(), x, text)
    _, at_once = apply(random_params(), x, text, empty_memory(SPEC, 3, jnp.float32))
    memory, parts, start = empty_memory(SPEC, 3, jnp.float32), [], 0
    for size in pieces:
        part, memory = apply(random_params(), x[:, start : start + size], text[:, start : start + size], memory)
        parts.append(part)
        start += size
    real = (text > 0)[..., None]
    close(jnp.where(real, jnp.concatenate(parts, axis=1), 0), jnp.where(real, expected, 0))
    close(memory, at_once)


@pytest.mark.parametrize("padding", [3, 90])
def test_padding_before_a_text_leaves_the_memory_as_if_it_were_not_there(padding):
    x, empty = draw(5, 2, 40, WIDTH), empty_memory(SPEC, 2, jnp.float32)
    y, expected = apply(random_params(), x, jnp.ones((2, 40), jnp.int32), empty)
    padded = jnp.pad(x, ((0, 0), (padding, 0), (0, 0)), constant_values=3.0)
    text = jnp.pad(jnp.ones((2, 40), jnp.int32), ((0, 0), (padding, 0)))
    got, memory = apply(random_params(), padded, text, empty)
    close(got[:, padding:], y)
    close(memory, expected)
    _, untouched = apply(random_params(), padded[:, :padding], text[:, :padding], empty)
    assert not any(leaf.any() for leaf in untouched)


def test_strong_decay_and_padding_give_finite_gradients():
    """About -50 for each token and head, and a row that is padding alone."""
    params = jax.tree.map(jnp.asarray, random_params())
    params["decay_rate"][...], params["decay_bias"][...] = jnp.full((4,), jnp.log(16.0)), jnp.full((4,), 3.1)
    x, text = draw(8, ROWS, LENGTH, WIDTH), jnp.stack([numbered(each) for each in ([LENGTH], [40, 50], [], [9])])
    found = gradients(params, x, text, draw(9, ROWS, LENGTH, WIDTH))
    for leaf in jax.tree.leaves(found):
        assert jnp.isfinite(leaf).all()
    close(found[1][0], recurrence(params, x[0]))


def test_a_strong_decay_rounds_nothing_off_of_what_follows():
    """A head that forgets all at some tokens and nothing at others, as a difference of running sums could not state."""
    key, value = (draw(i, 1, 64, 1, 4) / 2 for i in (1, 2))
    decay = jnp.where(jnp.arange(64) <= 40, -200.0, -1e-2)[None, :, None]
    strength, text, empty = jnp.full((1, 64, 1), 0.5), jnp.ones((1, 64), jnp.int32), jnp.zeros((1, 1, 4, 4))
    mixed, state = rule(key, key, value, strength, decay, text, empty)
    key, value, strength, decay, text = (each[:, 40:] for each in (key, value, strength, decay, text))
    expected, last = rule(key, key, value, strength, decay, text, empty)
    close(mixed[:, 40:], expected, 2e-6)
    close(state, last, 2e-6)


def test_tokens_that_repeat_lose_no_digits():
    """Equal keys that are neither weakened nor forgotten: powers of I + A would need 18 digits."""
    key = jnp.full((1, 64, 1, 4), 0.5)
    strength, decay = jnp.ones((1, 64, 1)), jnp.zeros((1, 64, 1))
    value, text = draw(1, 1, 64, 1, 3), jnp.ones((1, 64), jnp.int32)
    mixed, _ = rule(key, key, value, strength, decay, text, jnp.zeros((1, 1, 4, 3)))
    close(mixed, value / 2)  # each value replaces the one before it; queries are divided by sqrt(4)


@pytest.mark.parametrize("place", [1, 30, 64, 100])
def test_no_output_depends_on_a_later_token(place):
    weights = jnp.where(jnp.arange(LENGTH)[None, :, None] < place, draw(2, ROWS, LENGTH, WIDTH), 0)
    (_, of_x), _ = gradients(
        random_params(), draw(1, ROWS, LENGTH, WIDTH), jnp.ones((ROWS, LENGTH), jnp.int32), weights
    )
    assert not of_x[:, place:].any()
    assert (jnp.abs(of_x[:, place - 1]) > 0).all()


def test_devices_change_neither_value_nor_gradient():
    mesh = make_mesh(data=2, fsdp=2)
    x, weights = draw(1, ROWS, LENGTH, WIDTH), draw(2, ROWS, LENGTH, WIDTH)
    text = jnp.stack([numbered(each) for each in ([LENGTH], [40, 60, 5], [3, 64], [])])
    expected = gradients(random_params(), x, text, weights)
    split = NamedSharding(mesh, P(("data", "fsdp")))
    params = jax.device_put(random_params(), NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        got = gradients(params, *(jax.device_put(each, split) for each in (x, text, weights)))
    close(got, expected)
    assert got[1].sharding.spec[0] == ("data", "fsdp")  # y stayed where its rows are


def test_half_precision_stays_outside():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params())
    x, text = draw(1, 2, 9, WIDTH).astype(jnp.bfloat16), jnp.ones((2, 9), jnp.int32)
    y, memory = apply(half, x, text, empty_memory(SPEC, 2, jnp.bfloat16))
    assert (y.dtype, memory.conv.dtype, memory.state.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    close(y[0].astype(jnp.float32), recurrence(random_params(), x[0]), 0.03)  # weights and projections round to 8 bits


# ---- products on accelerators


def halves(x):
    """What bfloat16 keeps of x, and of the rest."""
    upper = x.astype(jnp.bfloat16).astype(jnp.float32)
    return upper, (x - upper).astype(jnp.bfloat16).astype(jnp.float32)


def three_passes(a, b, precision):
    """`a @ b` as accelerators compute it, which a CPU's compiler refuses to."""
    if precision != delta.THREE_PASSES:
        return jnp.matmul(a, b, precision=precision)
    (a, a_rest), (b, b_rest) = halves(a), halves(b)
    return a @ b_rest + a_rest @ b + a @ b


def test_three_products_of_bfloat16_are_far_below_its_rounding(monkeypatch):
    """1e-4 of the largest output, where bfloat16 itself rounds to 2e-3; and the last state."""
    keys = [draw(i, 1, 100, 2, 16) for i in range(2)]
    keys = [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in keys]
    strength, decay = jax.nn.sigmoid(draw(3, 1, 100, 2)), -0.1 * jnp.abs(draw(4, 1, 100, 2))
    args = *keys, draw(2, 1, 100, 2, 16), strength, decay, jnp.ones((1, 100), jnp.int32), draw(5, 1, 2, 16, 16)
    exact = rule(*args)
    monkeypatch.setattr(delta, "_matmul", three_passes)
    got = jax.jit(functools.partial(delta.gated_delta, precision=delta.THREE_PASSES))(*args)
    for a, b in zip(got, exact, strict=True):
        assert 0 < jnp.abs(a - b).max() <= 1e-4 * jnp.abs(b).max()


@pytest.mark.parametrize(
    ("platform", "dtype", "passes"),
    [("cpu", "bfloat16", 0), ("tpu", "bfloat16", 3), ("gpu", "bfloat16", 3), ("gpu", "float32", 0)],
)
def test_products_are_in_three_passes_where_they_would_be_slow(platform, dtype, passes):
    """All of the rule, forward and backward; in float32 they are float32, and on a CPU always."""
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), random_params())
    x, text = draw(0, 1, 70, WIDTH).astype(dtype), jnp.ones((1, 70), jnp.int32)

    def total(params, x):
        y, _ = nnx.merge(net()[0], params)(x, text, platform=platform)
        return y.astype(jnp.float32).sum()

    program = jax.jit(jax.grad(total)).trace(params, x)
    of_rule = [eqn for eqn in products(program.jaxpr.jaxpr) if eqn.params["precision"] is not None]
    assert len(of_rule) > 20
    assert {eqn.params["precision"] == delta.THREE_PASSES for eqn in of_rule} == {passes == 3}


def products(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for inner in jex.core.jaxprs_in_params(eqn.params):
            yield from products(inner)
