"""Attention within packed forests is the plain formula: over all pairs of slots, with a mask; forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import sharding
from dpo_jax.model.attention import TILE, Bounds, VisibilityRules, alibi_slopes, attend_seen, visible
from dpo_jax.model.backends import xla
from dpo_jax.model.backends.dispatch import PackedRows, attend
from tests.support.attention import (
    RULES,
    SHAPES,
    WINDOWS,
    as_rules,
    assert_close,
    forest,
    inputs,
    measured,
    slopes_of,
    wanted,
)
from tests.support.tiers import by_day


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("shape", by_day(SHAPES, {"wide values"}))
def test_blocks_are_the_plain_formula(rules, window, shape):
    """Also the gradients, of queries, keys, values and sinks; whatever comes back for padding has no part in it."""
    layout, arrays, slope = inputs(shape)

    def by_blocks(arrays):
        query, key, value, sinks = arrays
        return attend(query, key, value, layout, as_rules(rules, sinks), window=window)

    # sums of 8 to 200 terms of size 1 in another order; a wrong mask or factor is off by 1e-2 at least
    assert_close(measured(by_blocks, arrays, slope), wanted(shape, rules, window), 2e-5)


@pytest.mark.parametrize("tile", [32, 100, 256])
@pytest.mark.parametrize("window", WINDOWS)
def test_tiles_change_nothing(tile, window):
    """Of any size: they divide the row, do not, or hold all of it."""
    layout, arrays, slope = inputs("wide values")
    bounds = Bounds(texts=6, branches=3, tile=tile)

    def by_tiles(arrays):
        query, key, value, sinks = arrays
        return attend(query, key, value, layout, as_rules("everything", sinks), window=window, bounds=bounds)

    # as above
    assert_close(measured(by_tiles, arrays, slope), wanted("wide values", "everything", window), 2e-5)


def test_a_row_of_one_block_is_the_plain_formula():
    layout = forest([[(9, 3, 4), (2, 5)]], 30)
    arrays = tuple(jax.random.normal(jax.random.key(i), (1, 30, 2, 8)) for i in range(3))
    found = attend(*arrays, layout, VisibilityRules(0.3), window=4)
    want = attend_seen(*arrays, visible(layout, 4), VisibilityRules(0.3))
    np.testing.assert_array_equal(found, want)  # it is the same computation


def blocks_of(plan):
    """The numbers of the blocks of keys that each block of queries needs, by row."""
    keys, count = np.asarray(plan.keys), np.asarray(plan.count)
    return [[keys[row, i, :n].tolist() for i, n in enumerate(counts)] for row, counts in enumerate(count)]


@pytest.mark.parametrize("window", [None, 1, 20, 64])
def test_only_blocks_with_something_to_see_are_computed(window):
    layout, *_ = inputs("grouped")
    plan = xla.prepare(layout, window)
    count = plan.layout.group.shape[1] // TILE
    seen = np.asarray(visible(plan.layout, window)).reshape(3, count, TILE, count, TILE).any(axis=(2, 4))
    for row, found in enumerate(blocks_of(plan)):
        for block, keys in enumerate(found):
            wanted = np.flatnonzero(seen[row, block]).tolist()
            assert keys == sorted(keys) and set(wanted) <= set(keys)
            assert window is not None or keys == wanted


def test_a_branch_skips_the_branch_before_it():
    plan = xla.prepare(forest([[(128, 128, 128)], [(100, 300)]], 448), None)
    assert blocks_of(plan)[0][:6] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5]]
    assert blocks_of(plan)[1][:7] == [list(range(n)) for n in range(1, 8)]


def test_a_window_skips_what_lies_before_it_in_a_long_prompt():
    """Completions of a prompt of 300, seen through 20 tokens, need the end of it, or their own start."""
    plan = xla.prepare(forest([[(300, 20, 80)]], 400), 20)
    assert blocks_of(plan)[0] == [[0], [0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [5, 6]]


@functools.cache
def compiled(length: int):
    layout = forest([[(150, 40, 60)] * (length // 250)], length)

    def total(arrays, layout):
        return (attend(*arrays, layout, VisibilityRules(0.25)) ** 2).sum()

    arrays = tuple(jax.random.normal(jax.random.key(i), (1, length, 2, 8)) for i in range(3))
    run = jax.jit(jax.value_and_grad(total)).lower(arrays, layout).compile()
    return run, arrays, layout


def test_no_array_is_the_square_of_a_long_row():
    """Of 4096 slots a mask of bytes would take 16 MiB, and scores of one head 64."""
    run, *_ = compiled(4096)
    assert "4096,4096" not in run.as_text()
    assert run.memory_analysis().temp_size_in_bytes < 4 * 2**20


def test_the_same_inputs_give_the_same_bits():
    run, arrays, layout = compiled(512)
    one, other = run(arrays, layout), run(arrays, layout)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def on_devices(where):
    """What is measured of rows that are placed so."""
    layout, arrays, slope = inputs("grouped")
    layout, arrays, slope = jax.tree.map(
        lambda x: x if x.ndim == 1 else jnp.concatenate([x, x[:1]]), (layout, arrays, slope)
    )

    def attended(arrays):
        query, key, value, sinks = arrays
        ready = PackedRows.of(layout, [7], activations=where)
        return ready.attend(query, key, value, 7, as_rules("everything", sinks))

    return measured(attended, arrays, slope)


@functools.cache
def on_one_device():
    return on_devices(None)


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2}, {"fsdp": 1, "tensor": 4}])
def test_devices_change_nothing(sizes):
    """Rows and heads on devices of their own, and the gradient of sinks summed over rows; two heads over four devices
    stay whole."""
    # a device's own sums have the same order; the gradient of sinks is a sum over rows
    assert_close(on_devices(sharding.rows(sharding.make_mesh(**sizes))), on_one_device(), 1e-6)


def test_slopes_of_more_heads_than_a_power_of_two():
    """Six heads: four of the sequence for four, and two of that for eight (arXiv:2108.12409, appendix A)."""
    np.testing.assert_allclose(alibi_slopes(6, 1.0), [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125])
    assert slopes_of(6).shape == (6,)


def test_slopes_of_scores_are_multiplied_in_the_dtype_of_computation():
    """A GPU's matrix units multiply no float32; in float32 nothing is rounded."""
    x = jnp.ones((1, 8, 2, 4), jnp.bfloat16)
    seen = jnp.tril(jnp.ones((1, 8, 8), bool))

    def total(query, key, value):
        return attend_seen(query, key, value, seen, VisibilityRules(0.5)).astype(jnp.float32).sum()

    for dtype in (jnp.bfloat16, jnp.float32):
        jaxpr = jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(*(x.astype(dtype),) * 3)
        products = [one for one in jaxpr.eqns if one.primitive.name == "dot_general"]
        assert len(products) == 6 and {v.aval.dtype for one in products for v in one.invars} == {jnp.dtype(dtype)}
