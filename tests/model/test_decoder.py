"""The decoder as a function: its options change nothing, and a forest is what its separate texts are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import logits, trees
from dpo_jax.errors import UserError
from dpo_jax.model import decoder
from dpo_jax.model.attention import Layout, causal
from dpo_jax.model.decoder import Execution, Model, abstract_params, cast, empty_cache, init_params
from dpo_jax.model.kernels import dense
from dpo_jax.model.spec import HeadNorm, Norm
from tests.support.specs import plain_spec
from tests.support.tiers import by_day

SPEC = plain_spec(
    width=16,
    layers=3,
    heads=4,
    mlp_width=24,
    head_dim=8,
    qkv_bias=True,
    head_norm=HeadNorm(Norm(1e-6)),
    windows=(None, 4, None),
)
hidden = jax.jit(decoder.hidden, static_argnums=(0, 4))
extend = jax.jit(decoder.extend, static_argnums=0)
TOLERANCE = dict(rtol=2e-5, atol=2e-5)  # float32 sums of 16 to 24 terms in another order, over three layers


@pytest.fixture(scope="module")
def params():
    noise = jax.tree.map(
        lambda leaf: 0.2 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), abstract_params(SPEC)
    )
    return jax.tree.map(jnp.add, init_params(SPEC, jax.random.key(0)), noise)


def tokens(batch, length, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, SPEC.vocab_size)


@functools.partial(jax.jit, static_argnums=1)
def measured(params, execution):
    """The sum of squares of all states, and its gradient."""

    def total(params):
        return (decoder.hidden(SPEC, params, tokens(2, 9), causal(2, 9), execution) ** 2).sum()

    return jax.value_and_grad(total)(params)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("remat", by_day(["none", "attention", "dots", "names", "block", "offload"], ["none", "block"]))
def test_execution_changes_neither_value_nor_gradient(params, scan, remat):
    want, gradient = measured(params, Execution())
    value, ours = measured(params, Execution(scan, remat))
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for name, leaf in trees.paths(ours).items():
        scale = float(jnp.abs(trees.paths(gradient)[name]).max())
        np.testing.assert_allclose(leaf, trees.paths(gradient)[name], rtol=1e-4, atol=1e-5 * scale, err_msg=name)


def test_a_forest_is_its_texts(params):
    """Prompt p with branches a and b, and a second tree, equal four separate rows; also under a sliding window."""
    p, a, b, q = (tokens(1, n, seed=n)[0] for n in (6, 5, 7, 3))
    row = jnp.concatenate([p, a, b, q, jnp.zeros(2, jnp.int32)])[None]
    group = jnp.asarray([[1] * 18 + [2] * 3 + [0] * 2])
    branch = jnp.asarray([[0] * 6 + [1] * 5 + [2] * 7 + [0] * 5])
    position = jnp.asarray([[*range(6), *range(6, 11), *range(6, 13), *range(3), 0, 1]])
    packed = hidden(SPEC, params, row, Layout(group, branch, position))[0]
    for text, slots in (
        (jnp.concatenate([p, a]), slice(6, 11)),
        (jnp.concatenate([p, b]), slice(11, 18)),
        (q, slice(18, 21)),
    ):
        alone = hidden(SPEC, params, text[None], causal(1, len(text)))[0]
        np.testing.assert_allclose(packed[slots], alone[-(slots.stop - slots.start) :], **TOLERANCE)


def test_a_cache_remembers_what_was_read(params):
    ids = tokens(2, 10)
    whole = hidden(SPEC, params, ids, causal(2, 10))
    cache = empty_cache(SPEC, 2, 12, jnp.float32)
    positions = causal(2, 10).position
    parts = []
    for start, stop in ((0, 6), (6, 7), (7, 10)):
        states, cache = extend(SPEC, params, ids[:, start:stop], positions[:, start:stop], cache)
        parts.append(states)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, **TOLERANCE)


def test_padding_before_a_prompt_is_not_seen(params):
    ids = tokens(1, 5)
    padded = jnp.concatenate([jnp.full((1, 3), 7, jnp.int32), ids], axis=1)
    positions = jnp.asarray([[-1, -1, -1, 0, 1, 2, 3, 4]])
    states, _ = extend(SPEC, params, padded, positions, empty_cache(SPEC, 1, 8, jnp.float32))
    np.testing.assert_allclose(states[:, 3:], hidden(SPEC, params, ids, causal(1, 5)), **TOLERANCE)


def test_later_tokens_change_nothing_before_them(params):
    ids = tokens(1, 8)
    changed = ids.at[0, 5].set((ids[0, 5] + 1) % SPEC.vocab_size)
    one, other = logits(SPEC, params, ids), logits(SPEC, params, changed)
    np.testing.assert_array_equal(one[:, :5], other[:, :5])
    assert (one[:, 5:] != other[:, 5:]).any()


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int16, np.uint32, np.int64, np.uint64, list])
def test_ids_of_any_integer_dtype_are_the_same_ids(params, kind):
    ids, given = np.array([[5, 1], [2, 3]]), [[5, 1], [2, 3]]
    given = given if kind is list else ids.astype(kind)
    np.testing.assert_array_equal(logits(SPEC, params, given), logits(SPEC, params, jnp.asarray(ids, jnp.int32)))
    np.testing.assert_array_equal(Model(SPEC, params).logits(given), logits(SPEC, params, given))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_no_ids_have_no_logits(params, shape):
    for ids in (np.zeros(shape, np.int64), np.zeros(shape)):
        assert logits(SPEC, params, ids).shape == (*shape, SPEC.vocab_size)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([1, 5], "are of shape [2]; give ids of tokens as rows [B, T]"),
        (3, "are of shape []; give ids"),
        ([[1, 2], [3]], "are rows of different lengths"),
        ([[1.0, 2.0]], "are of dtype float64; give ids"),
        ([[True, False]], "are of dtype bool"),
        ([[1, 2], [3, -100]], "[1, 1] is -100, and the model's ids are 0 to"),
        ([[1, SPEC.vocab_size], [-1, 0]], f"[0, 1] is {SPEC.vocab_size}, and"),
        (np.array([[2**63]], np.uint64), f"[0, 0] is {2**63}, and"),
    ],
)
def test_what_is_no_row_of_ids_is_refused(params, ids, said):
    with pytest.raises(UserError) as caught:
        Model(SPEC, params).logits(ids)
    assert str(caught.value).startswith(f"logits: tokens: {said}") and "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [-100, SPEC.vocab_size])
def test_an_unknown_id_in_a_traced_function_makes_nan_from_its_position_on(params, wrong):
    ids = jnp.array([[1, 2, wrong, 3], [1, 2, 4, 3]])
    found = jax.jit(lambda ids: logits(SPEC, params, ids))(ids)
    assert jnp.isnan(found[0, 2:]).all()
    want = logits(SPEC, params, jnp.array([[1, 2, 4, 3]] * 2))
    np.testing.assert_allclose(found[0, :2], want[0, :2], rtol=1e-6)
    np.testing.assert_allclose(found[1], want[1], rtol=1e-6)


def test_a_model_is_shown_in_a_line(params):
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert repr(Model(SPEC, params)) == (
        f"Model(3 layers, width 16, {SPEC.vocab_size} tokens: {count:,} parameters, float32)"
    )
    assert "parameters" in repr(Model(SPEC, abstract_params(SPEC)))


def test_a_tied_head_is_the_embedding(params):
    tied = dataclasses.replace(SPEC, tied=True)
    copied = {**params, "head": {"embedding": params["embed"]["embedding"]}}
    without = {name: leaf for name, leaf in params.items() if name != "head"}
    np.testing.assert_allclose(logits(tied, without, tokens(1, 4)), logits(SPEC, copied, tokens(1, 4)), rtol=1e-6)


def test_a_soft_cap_bounds_the_logits(params):
    capped = dataclasses.replace(SPEC, logit_softcap=0.5)
    assert float(jnp.abs(logits(capped, params, tokens(1, 4))).max()) < 0.5


def test_casting_leaves_norm_scales(params):
    dtypes = {name: leaf.dtype for name, leaf in trees.paths(cast(params, jnp.bfloat16)).items()}
    assert all((dtype == jnp.float32) == name.endswith("/scale") for name, dtype in dtypes.items())


def test_dense_has_the_gradients_of_a_matrix_product():
    x, kernel = jax.random.normal(jax.random.key(0), (2, 3, 4)), jax.random.normal(jax.random.key(1), (4, 5))
    ours = jax.grad(lambda x, k: (dense(x, k) ** 2).sum(), (0, 1))(x, kernel)
    theirs = jax.grad(lambda x, k: (jnp.einsum("bti,io->bto", x, k) ** 2).sum(), (0, 1))(x, kernel)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
