"""Gradients of what many tokens share are added in float32, whatever the dtype of computation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import trees
from dpo_jax.model import decoder
from dpo_jax.model.attention import causal
from dpo_jax.model.layers import biased, lookup
from dpo_jax.model.spec import Experts
from tests.support.specs import plain_spec

ROWS, SLOTS, FREQUENT = 512, 64, 7
"""32,768 positions, of which one token has 5 %."""
ROUNDING = 2.0**-8
"""A bfloat16 has 8 digits, so it is within this of the number that it stands for, relative to it."""


def shared(op: str):
    """The gradient of what 32,768 positions share, in bfloat16, and the same terms added in float64."""
    slope = (1.0 + 0.3 * jax.random.normal(jax.random.key(1), (ROWS, SLOTS, 8))).astype(jnp.bfloat16)
    wide = np.asarray(slope, np.float64)
    if op == "bias":
        x, bias = jnp.zeros(slope.shape, jnp.bfloat16), jnp.zeros(8, jnp.bfloat16)
        return jax.jit(lambda bias: jax.vjp(lambda b: biased(x, b), bias)[1](slope)[0])(bias), wide.sum((0, 1))
    ids, table = tokens(), jnp.zeros((50, 8), jnp.bfloat16)
    found = jax.jit(lambda table, ids: jax.vjp(lambda t: lookup(t, ids), table)[1](slope)[0])(table, ids)
    total = np.zeros((50, 8))
    np.add.at(total, np.asarray(ids), wide)
    return found, total


def tokens() -> jax.Array:
    """Token ids, uniform but for one that has 5 % of the positions."""
    rng = np.random.default_rng(0)
    ids = rng.integers(8, 50, (ROWS, SLOTS))
    return jnp.asarray(np.where(rng.random(ids.shape) < 0.05, FREQUENT, ids), jnp.int32)


@pytest.mark.parametrize("op", ["bias", "lookup"])
def test_a_sum_over_many_tokens_is_rounded_once(op):
    """Of terms of one sign, which are the worst: added in bfloat16, sums of more than 256 of them stand still."""
    found, total = shared(op)
    assert found.dtype == jnp.bfloat16
    # one rounding of the sum; that of 32,768 float32 terms is off by less than 1e-4 of it
    np.testing.assert_allclose(np.asarray(found, np.float64), total, rtol=ROUNDING + 1e-4)


DENSE = plain_spec(width=16, layers=1, heads=2, mlp_width=16, qkv_bias=True, output_bias=True, positions=SLOTS)
MIXED = dataclasses.replace(DENSE.layers[0], mlp=None, experts=Experts(4, 2, 16, bias=True, router_bias=True))
SPECS = {"dense": DENSE, "experts": dataclasses.replace(DENSE, layers=(MIXED,))}


@functools.cache
def gradient(name: str, dtype: str) -> dict[str, np.ndarray]:
    """By leaf, of the mean of the hidden states along a slope that has a mean; weights are bfloat16 numbers."""
    spec, ids = SPECS[name], tokens()
    params = decoder.cast(decoder.init_params(spec, jax.random.key(0)), jnp.bfloat16)
    slope = 1.0 + jax.random.normal(jax.random.key(2), (ROWS, SLOTS, 16))

    def total(params):
        return (decoder.hidden(spec, params, ids, causal(ROWS, SLOTS)).astype(jnp.float32) * slope).mean()

    found = jax.jit(jax.grad(total))(decoder.cast(params, jnp.dtype(dtype)))
    return {path: np.asarray(leaf, np.float64) for path, leaf in trees.paths(found).items()}


@pytest.mark.parametrize("name", SPECS)
def test_every_leaf_in_bfloat16_has_the_gradient_of_float32(name):
    """Also the row of the frequent token."""
    narrow, wide = gradient(name, "bfloat16"), gradient(name, "float32")
    leaves = {path: (narrow[path], leaf) for path, leaf in wide.items() if np.linalg.norm(leaf) > 0}
    leaves["the frequent token"] = tuple(each["embed/embedding"][FREQUENT] for each in (narrow, wide))
    # what bfloat16 activations leave of a gradient; a sum in bfloat16 was off by up to 98 %
    errors = {path: np.linalg.norm(a - b) / np.linalg.norm(b) for path, (a, b) in leaves.items()}
    assert max(errors.values()) < 0.03, errors
