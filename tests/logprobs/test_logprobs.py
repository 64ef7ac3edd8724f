"""The linear form equals the plain one, and holds no [tokens, vocabulary] array."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dpo_jax import linear_logprobs, sequence_logprobs, token_logprobs
from dpo_jax.errors import UserError
from dpo_jax.logprobs.tokens import linear_scores


def problem(n=7, width=16, vocab=97, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = jax.random.normal(keys[0], (n, width)).astype(dtype)
    head = jax.random.normal(keys[1], (width, vocab)).astype(dtype)
    bias = jax.random.normal(keys[2], (vocab,)).astype(dtype)
    return hidden, head, jax.random.randint(keys[3], (n,), 0, vocab), bias


def plain(hidden, head, targets, bias=None, softcap=None):
    logits = jnp.dot(hidden, head, preferred_element_type=jnp.float32)
    logits = logits if bias is None else logits + bias[None].astype(jnp.float32)
    return token_logprobs(logits if softcap is None else softcap * jnp.tanh(logits / softcap), targets)


@pytest.mark.parametrize("vocab", [1, 33, 64])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_value_and_gradient_are_those_of_log_softmax(vocab, softcap, with_bias):
    hidden, head, targets, bias = problem(vocab=vocab)
    bias = bias if with_bias else None
    cotangent = jnp.arange(1.0, 8.0)

    def value(form):
        return lambda *args: (form(*args) * cotangent).sum()

    def linear(hidden, head, bias):
        return linear_logprobs(hidden, head, targets, bias=bias, softcap=softcap, chunk=32)

    def whole(hidden, head, bias):
        return plain(hidden, head, targets, bias, softcap)

    argnums = (0, 1, 2) if with_bias else (0, 1)
    (logps, ours), (wanted, theirs) = (
        jax.jit(lambda *args, form=form: (form(*args), jax.grad(value(form), argnums)(*args)))(hidden, head, bias)
        for form in (linear, whole)
    )
    np.testing.assert_allclose(logps, wanted, rtol=1e-5, atol=1e-5)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)  # sums of 97 float32 products in another order


def test_a_tied_head_gets_the_embeddings_gradient():
    hidden, head, targets, _ = problem()
    embedding = head.T
    ours = jax.grad(lambda e: linear_logprobs(hidden, e.T, targets, chunk=32).sum())(embedding)
    theirs = jax.grad(lambda e: plain(hidden, e.T, targets).sum())(embedding)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_bfloat16_inputs_keep_float32_sums():
    hidden, head, targets, _ = problem(n=64, width=64, vocab=1000, dtype=jnp.bfloat16)
    exact = plain(hidden.astype(jnp.float32), head.astype(jnp.float32), targets)
    # products of bfloat16 are exact in float32, so only the order of the sums differs
    np.testing.assert_allclose(linear_logprobs(hidden, head, targets, chunk=256), exact, rtol=1e-5, atol=1e-4)


def test_no_array_has_both_a_token_and_a_vocabulary_axis():
    n, vocab = 48, 1009
    hidden, head, targets, _ = problem(n=n, vocab=vocab)

    def loss(hidden, head):
        return linear_logprobs(hidden, head, targets, chunk=128).sum()

    text = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(hidden, head).as_text()
    shapes = {tuple(map(int, found.split("x"))) for found in re.findall(r"tensor<((?:\d+x)+\d+)x", text + "x")}
    shapes |= {tuple(map(int, s.split("x")[:-1])) for s in re.findall(r"tensor<((?:\d+x)+[a-z]\w*)>", text)}
    assert (16, vocab) in shapes or (vocab, 16) in shapes
    assert not [shape for shape in shapes if n in shape and vocab in shape]


def test_it_composes_with_vmap():
    hidden, head, targets, _ = problem()
    stacked = jax.vmap(lambda h, t: linear_logprobs(h, head, t, chunk=32))(
        jnp.stack([hidden, -hidden]), jnp.stack([targets] * 2)
    )
    np.testing.assert_allclose(stacked[1], plain(-hidden, head, targets), rtol=1e-5, atol=1e-5)


def test_statistics_are_those_of_the_whole_distribution():
    hidden, head, targets, _ = problem()
    scores = linear_scores(hidden, head.T, targets, chunk=32, statistics=True, collision=True)
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    shares = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    np.testing.assert_allclose(scores.entropy, -(shares * np.log(shares)).sum(1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scores.mean_logit, logits.mean(1), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(scores.top1, logits.argmax(1))
    np.testing.assert_allclose(scores.collision, np.log(np.square(shares).sum(1)), rtol=1e-5, atol=1e-5)


def test_the_first_of_equals_is_the_most_probable():
    scores = linear_scores(jnp.ones((1, 2)), jnp.ones((9, 2)), jnp.asarray([3]), chunk=4, statistics=True)
    assert scores.top1[0] == 0


def test_sequence_logprobs_shift_by_one_and_ignore_the_first_position():
    logits = jax.random.normal(jax.random.key(0), (2, 5, 11))
    tokens = jax.random.randint(jax.random.key(1), (2, 5), 0, 11)
    mask = jnp.asarray([[0, 0, 1, 1, 0], [1, 1, 0, 0, 1]])
    logs = np.asarray(jax.nn.log_softmax(logits))
    first = logs[0, 1, tokens[0, 2]] + logs[0, 2, tokens[0, 3]]
    second = logs[1, 0, tokens[1, 1]] + logs[1, 3, tokens[1, 4]]  # the token in position 0 has nothing before it
    np.testing.assert_allclose(sequence_logprobs(logits, tokens, mask), [first, second], rtol=1e-6)
    np.testing.assert_allclose(
        sequence_logprobs(logits, tokens, mask, average=True), [first / 2, second / 2], rtol=1e-6
    )


def test_padding_may_be_nan():
    logits = jnp.zeros((1, 4, 3)).at[0, 2:].set(jnp.nan)
    tokens, mask = jnp.zeros((1, 4), jnp.int32), jnp.asarray([[0, 0, 1, 0]])
    value, grad = jax.value_and_grad(lambda x: sequence_logprobs(x, tokens, mask).sum())(logits)
    assert value == pytest.approx(-np.log(3)) and np.isfinite(grad[0, 1]).all() and (grad[0, 2:] == 0).all()


@pytest.mark.parametrize(("dtype", "vocab"), [("uint8", 256), ("uint8", 300), ("int8", 200), ("uint16", 1 << 16)])
def test_ids_of_a_narrow_dtype_are_the_same_ids(dtype, vocab):
    """Of 256 bytes, all of which an uint8 can say, none has a vocabulary that an uint8 can say."""
    ids = jnp.array([0, 65, 99, 127])
    hidden, head = jax.random.normal(jax.random.key(0), (4, 3)), jax.random.normal(jax.random.key(1), (3, vocab))
    for found in (lambda ids: token_logprobs(hidden @ head, ids), lambda ids: linear_logprobs(hidden, head, ids)):
        np.testing.assert_array_equal(found(ids.astype(dtype)), found(ids))
    value = sequence_logprobs(hidden @ head, ids.astype(dtype), jnp.ones(4, bool))
    np.testing.assert_array_equal(value, sequence_logprobs(hidden @ head, ids, jnp.ones(4, bool)))
    assert np.isfinite(value)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunk", [2, 3, 4, 4096])
def test_logits_of_minus_infinity_may_fill_a_chunk(chunk, frozen):
    hidden, head, targets, bias = problem(vocab=9)
    bias, targets = bias.at[:4].set(-jnp.inf), targets % 5 + 4

    def loss(hidden, form):
        return form(hidden).sum()

    def fused(hidden):
        return linear_logprobs(hidden, head, targets, bias=bias, chunk=chunk, frozen=frozen)

    def whole(hidden):
        return plain(hidden, head, targets, bias)

    np.testing.assert_allclose(fused(hidden), whole(hidden), rtol=1e-5, atol=1e-5)
    slopes = [jax.grad(loss)(hidden, form) for form in (fused, whole)]
    np.testing.assert_allclose(*slopes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [3, 4096])
@pytest.mark.parametrize("bound", [None, 5.0])
def test_it_composes_with_a_callers_shard_map(chunk, bound):
    """With JAX's check of what differs over the axes on, which its users have on."""
    hidden, head, targets, bias = problem(n=8)
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))

    def of_a_device(hidden, head, targets, bias):
        return linear_logprobs(hidden, head, targets, bias=bias, chunk=chunk, softcap=bound)

    specs = (P("rows"), P(), P("rows"), P())
    mapped = jax.shard_map(of_a_device, mesh=mesh, in_specs=specs, out_specs=P("rows"))
    np.testing.assert_allclose(
        mapped(hidden, head, targets, bias), plain(hidden, head, targets, bias, bound), rtol=1e-5
    )

    def slopes(form):
        return jax.grad(lambda *given: form(given[0], given[1], targets, given[2]).sum(), (0, 1, 2))(hidden, head, bias)

    for found, wanted in zip(slopes(mapped), slopes(of_a_device), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_numbers_of_the_head_must_be_known_when_compiling():
    hidden, head, targets, _ = problem()
    one, other = (linear_logprobs(hidden, head, targets, scale=scale) for scale in (2.0, jnp.float32(2.0)))
    np.testing.assert_array_equal(one, other)
    with pytest.raises(UserError, match=r"^chunk: 0: must be at least 1, such as 4096$"):
        linear_logprobs(hidden, head, targets, chunk=0)
    with pytest.raises(UserError, match=r"^scale: .*: must be a number that is known when compiling"):
        jax.jit(lambda scale: linear_logprobs(hidden, head, targets, scale=scale))(2.0)


def test_one_row_is_a_row_of_many():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 5, 11))
    tokens, mask = jnp.arange(30).reshape(2, 3, 5) % 11, jnp.arange(30).reshape(2, 3, 5) % 3 > 0
    flat = sequence_logprobs(*(array.reshape(6, *array.shape[2:]) for array in (logits, tokens, mask)))
    np.testing.assert_array_equal(sequence_logprobs(logits, tokens, mask), flat.reshape(2, 3))
    np.testing.assert_array_equal(sequence_logprobs(logits[0, 0], tokens[0, 0], mask[0, 0]), flat[0])
    np.testing.assert_array_equal(jax.vmap(sequence_logprobs)(logits[0], tokens[0], mask[0]), flat[:3])


def test_what_is_no_token_has_no_probability():
    """JAX takes the last row for -1, and PyTorch's users have -100 where nothing is scored; each gave a number."""
    hidden, head, targets = jnp.ones((4, 4)), jnp.eye(4, 10), jnp.array([0, 10, -1, -100])
    direct, fused = token_logprobs(hidden @ head, targets), linear_logprobs(hidden, head, targets)
    for found in (direct, fused):
        np.testing.assert_array_equal(np.isnan(found), [False, True, True, True])
    value = sequence_logprobs((hidden @ head)[None], targets[None], jnp.array([[1, 0, 0, 0]]))
    np.testing.assert_array_equal(value, [0.0])  # what is not scored may be any number
    slopes = jax.grad(lambda x: jnp.nansum(linear_logprobs(x, head, targets)))(hidden)
    assert np.isfinite(slopes).all() and not slopes[1:].any()


SHAPES = """
from jax.numpy import ones
from dpo_jax import sequence_logprobs
for tokens, mask in (((2, 4), (2, 4)), ((1, 5), (2, 5)), ((2, 5), (2, 4))):
    try:
        sequence_logprobs(ones((2, 5, 7)), ones(tokens, int), ones(mask, int))
    except ValueError as error:
        print(error)
"""


def test_tokens_and_masks_of_other_rows_or_positions_are_refused_by_name():
    """In a process where annotations are not checked, as a user's."""
    done = subprocess.run([sys.executable, "-c", SHAPES], capture_output=True, text=True, timeout=100)
    lines, end = done.stdout.splitlines(), "beside logits of (2, 5, 7); give one for each row and position, (2, 5)"
    assert lines == [
        f"tokens: has the shape (2, 4) {end}",
        f"tokens: has the shape (1, 5) {end}",
        f"completion_mask: has the shape (2, 4) {end}",
    ], done.stderr
