"""Laws of kernels kept in 4 and 8 bits, and what bitsandbytes makes of the same numbers."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from dpo_jax.errors import UserError
from dpo_jax.model import grouped_gpu, grouped_tpu
from dpo_jax.model.grouped import grouped_dot
from dpo_jax.model.kernels import dense
from dpo_jax.model.quantised import (
    BLOCK,
    KINDS,
    TABLES,
    QuantisedKernel,
    _gathered,
    _grouped_blocks,
    _grouped_whole,
    _selected,
    kept,
    kept_shapes,
    kind_of,
    quantise,
    quantised_dense,
    quantised_grouped_dot,
)

FOUR_BITS = [
    *(f"{kind}_{rest}" for kind in ("nf4", "fp4") for rest in ("float32", "bfloat16", "float16")),
    *("nf4_ragged", "nf4_zeros_and_outliers", "nf4_double_bfloat16", "fp4_double_bfloat16"),
]
SHAPES = [(3, 64), (5, 128), (10, 50), (7, 9), (1, 1), (1, 64), (2, 32)]
"""(outputs, inputs): rows of whole blocks, blocks across rows, an odd number of values, less than a block."""


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def kernel_of(leaf, shape: tuple[int, int]) -> QuantisedKernel:
    """The kernel of a dict of NumPy arrays; `shape` is (outputs, inputs)."""
    return QuantisedKernel.of(jax.tree.map(jnp.asarray, leaf), (shape[1], shape[0]))


def dequantised(leaf, shape: tuple[int, int], dtype=jnp.float32) -> np.ndarray:
    """The values as a weight (outputs, inputs)."""
    return np.asarray(jax.jit(lambda kernel: kernel.dequantised(dtype))(kernel_of(leaf, shape))).swapaxes(-1, -2)


def same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    np.testing.assert_array_equal(*(np.ascontiguousarray(x).view(np.uint8) for x in (got, expected)))


# ---------------------------------------------------------------------------------------------- bitsandbytes


def golden(shared: Path, name: str) -> dict[str, np.ndarray]:
    """The tensors that bitsandbytes wrote of a case, where they are at hand."""
    file = shared / "adapters" / "bnb" / "tensors.safetensors"
    if not file.exists():
        pytest.skip("the tensors that bitsandbytes wrote are not on this machine")
    start = f"{name}."
    return {key.removeprefix(start): x for key, x in load_file(file).items() if key.startswith(start)}


@pytest.mark.parametrize("name", FOUR_BITS)
def test_four_bits_are_those_of_bitsandbytes(shared, name):
    case, kind = golden(shared, name), name[:3]
    leaf = quantise(case["input"], kind)
    same_bits(leaf[kind].reshape(-1), case["weight"].reshape(-1))
    if case["weight.absmax"].dtype == np.float32:
        same_bits(leaf["absmax"].reshape(-1), case["weight.absmax"])
        same_bits(dequantised(leaf, case["input"].shape, case["dequantized"].dtype), case["dequantized"])


@pytest.mark.parametrize("name", [*FOUR_BITS, "nf4_double_float32", "nf4_block128", "nf4_bf16_storage"])
def test_what_bitsandbytes_stored_is_kept_and_dequantised_as_there(shared, name):
    case, kind, block = golden(shared, name), name[:3], 128 if "block128" in name else BLOCK
    absmax = case["weight.absmax"]
    if absmax.dtype == np.uint8:
        state = case[f"weight.quant_state.bitsandbytes__{kind}"].tobytes().decode()
        offset = np.float32(float(state.split('"nested_offset": ')[1].split("}")[0].split(",")[0]))
        scales = np.repeat(case["weight.nested_absmax"], 256)[: absmax.size]
        absmax = case["weight.nested_quant_map"][absmax] * scales + offset
    leaf = kept(kind, case["weight"].reshape(-1).view(np.uint8), absmax, case["dequantized"].shape, block)
    same_bits(dequantised(leaf, case["dequantized"].shape, case["dequantized"].dtype), case["dequantized"])


def test_eight_bits_are_those_of_bitsandbytes(shared):
    case = golden(shared, "int8")
    leaf = quantise(case["input"], "int8")
    same_bits(leaf["int8"], case["weight"])
    same_bits(leaf["absmax"], case["SCB"])
    same_bits(dequantised(leaf, case["input"].shape, case["dequantized"].dtype), case["dequantized"])


# ---------------------------------------------------------------------------------------------- laws of the codes


def bound(weight: np.ndarray, kind: str) -> np.ndarray:
    """Half of the widest gap between neighbours of the table, times the absmax that a value is scaled by."""
    if kind == "int8":
        return np.broadcast_to(np.abs(weight).max(axis=1, keepdims=True) / 254, weight.shape)
    flat = np.pad(weight.reshape(-1), (0, -weight.size % BLOCK)).reshape(-1, BLOCK)
    gap = np.diff(np.sort(TABLES[kind])).max() / 2
    return (
        (np.abs(flat).max(axis=1, keepdims=True) * np.full(BLOCK, gap)).reshape(-1)[: weight.size].reshape(weight.shape)
    )


@pytest.mark.parametrize("kind", KINDS)
@given(st.sampled_from(SHAPES), st.integers(0, 99), st.floats(-20, 20))
@settings(max_examples=8)
def test_a_value_moves_by_half_a_gap_at_most_and_then_stays(kind, shape, seed, power):
    weight = draw(seed, *shape) * np.float32(2.0**power)
    leaf = quantise(weight, kind)
    assert {name: (x.shape, x.dtype) for name, x in leaf.items()} == {
        name: (x.shape, x.dtype) for name, x in kept_shapes(kind, shape[::-1]).items()
    }
    back = dequantised(leaf, shape)
    assert (np.abs(back - weight) <= bound(weight, kind) * 1.000001).all()
    again = quantise(back, kind)
    # 127 times bitsandbytes' 1 / 127 is not one in float32, so an absmax of 8 bits moves in its last place
    np.testing.assert_allclose(dequantised(again, shape), back, rtol=2.5e-7 if kind == "int8" else 0)
    if kind != "fp4":  # which has two codes for zero
        np.testing.assert_array_equal(again[kind], leaf[kind])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_nearest_value_is_taken_and_of_two_the_lower(kind):
    levels = np.sort(TABLES[kind])
    levels = levels[np.diff(levels, prepend=-2) > 0]
    middle = (levels[1:] + levels[:-1]) / np.float32(2)
    scaled = np.concatenate([middle, np.nextafter(middle, np.float32(2)), np.nextafter(middle, np.float32(-2))])
    weight = np.pad(scaled, (0, BLOCK - scaled.size), constant_values=1.0)[None]
    back = dequantised(quantise(weight, kind), (1, BLOCK))[0, : scaled.size].reshape(3, -1)
    np.testing.assert_array_equal(back, [levels[:-1], levels[1:], levels[:-1]])


def test_the_first_of_two_codes_is_in_the_high_half():
    weight = np.zeros((1, 64), np.float32)
    weight[0, :3] = (1.0, -1.0, 0.5626170039176941)
    leaf = quantise(weight, "nf4")
    assert list(leaf["nf4"][0, :3]) == [0xF0, 0xD7, 0x77]
    assert list(leaf["absmax"][0]) == [1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind):
    for shape in SHAPES:
        leaf = quantise(np.zeros(shape, np.float32), kind)
        assert (leaf["absmax"] == 0).all()
        assert (dequantised(leaf, shape) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_how_a_weight_is_cut_up_to_be_quantised_changes_nothing(kind, monkeypatch):
    weight = draw(0, 12, 96)
    leaf = quantise(weight, kind)
    monkeypatch.setattr("dpo_jax.model.quantised.AT_ONCE", 128)
    again = quantise(weight, kind)
    assert all((x == leaf[name]).all() for name, x in again.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 64), (10, 50)])
def test_a_stack_is_its_parts(kind, shape):
    weights = draw(1, 2, 3, *shape)
    leaf = quantise(weights, kind)
    parts = [[quantise(weights[i, j], kind) for j in range(3)] for i in range(2)]
    for name, x in leaf.items():
        np.testing.assert_array_equal(x, [[part[name] for part in row] for row in parts])
    whole = dequantised(leaf, shape)
    for i in range(2):
        for j in range(3):
            np.testing.assert_array_equal(whole[i, j], dequantised(parts[i][j], shape))
    stack = kernel_of(leaf, shape)
    mapped = jax.vmap(jax.vmap(lambda kernel: kernel.dequantised(jnp.float32)))(stack)
    np.testing.assert_array_equal(mapped.swapaxes(-1, -2), whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_values_are_rounded_once(kind, dtype):
    for shape in ((5, 128), (10, 50)):
        leaf = quantise(draw(2, *shape), kind)
        same_bits(dequantised(leaf, shape, dtype), dequantised(leaf, shape).astype(dtype))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_both_ways_to_look_codes_up_are_the_table(kind):
    codes = jnp.arange(16, dtype=jnp.uint8).reshape(2, 8)
    for look in (_gathered, _selected):
        same_bits(np.asarray(look(codes, kind=kind)).reshape(-1), TABLES[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(kind, value):
    weight = draw(0, 4, 64)
    weight[2, 5] = value
    with pytest.raises(UserError, match=r"shape \[4, 64\].*not finite"):
        quantise(weight, kind)


def test_arrays_of_another_kernel_are_refused():
    leaf = quantise(draw(0, 4, 64), "nf4")
    with pytest.raises(ValueError, match="nf4 of a weight of shape"):
        kept("nf4", leaf["nf4"], leaf["absmax"], (4, 128))
    with pytest.raises(ValueError, match="absmax of a weight of shape"):
        kept("nf4", leaf["nf4"], leaf["absmax"][:3], (4, 64))
    with pytest.raises(ValueError, match="block of 32"):
        kept("nf4", leaf["nf4"], leaf["absmax"], (4, 64), block=32)
    with pytest.raises(ValueError, match="nf4 of a kernel"):
        kernel_of(leaf, (2, 128))
    with pytest.raises(ValueError, match="no quantised kernel"):
        kernel_of({"nf4": leaf["nf4"]}, (4, 64))
    assert kind_of(leaf) == "nf4"
    assert kind_of({"kernel": leaf}) is None
    assert kind_of(leaf["nf4"]) is None


# ---------------------------------------------------------------------------------------------- laws of products


def relative(got, expected) -> float:
    return float(np.abs(np.asarray(got) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(24, 64), (10, 50)])
def test_a_product_and_its_gradient_are_those_of_the_dequantised_kernel(kind, shape):
    kernel = kernel_of(quantise(draw(3, *shape), kind), shape)
    x, dy = jnp.asarray(draw(4, 2, 5, shape[1])), jnp.asarray(draw(5, 2, 5, shape[0]))
    y, back = jax.vjp(lambda x: quantised_dense(x, kernel), x)
    expected, expected_back = jax.vjp(lambda x: dense(x, kernel.dequantised(x.dtype)), x)
    assert relative(y, expected) < 1e-6
    assert relative(back(dy)[0], expected_back(dy)[0]) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape, sizes", [((24, 64), (3, 0, 40, 7)), ((10, 50), (0, 0, 50, 0)), ((24, 64), (1, 0, 1, 0))]
)
def test_grouped_products_and_their_gradients_are_those_of_the_dequantised_kernels(kind, shape, sizes):
    kernel = kernel_of(quantise(draw(6, 4, *shape), kind), shape)
    rows, counts = sum(sizes), jnp.asarray(sizes, jnp.int32)
    x, dy = jnp.asarray(draw(7, rows, shape[1])), jnp.asarray(draw(8, rows, shape[0]))
    y, back = jax.vjp(lambda x: quantised_grouped_dot(x, kernel, counts), x)
    expected, expected_back = jax.vjp(lambda x: grouped_dot(x, kernel.dequantised(x.dtype), counts), x)
    assert relative(y, expected) < 1e-6
    assert relative(back(dy)[0], expected_back(dy)[0]) < 1e-6


@pytest.mark.parametrize("module", [grouped_tpu, grouped_gpu])
def test_the_grouped_product_of_an_accelerators_kernels_is_the_same(module):
    product = functools.partial(module.product, interpret=True)
    kernel = kernel_of(quantise(draw(6, 3, 24, 64), "nf4"), (24, 64))
    sizes = jnp.asarray((5, 0, 9), jnp.int32)
    for axis, width in ((2, 64), (1, 24)):
        x = jnp.asarray(draw(7, 14, width))
        found = _grouped_whole(product, x, kernel, sizes, axis=axis)
        assert relative(found, _grouped_blocks(x, kernel, sizes, axis=axis)) < 1e-6


LAYERS, WIDTH, RANK, TOKENS = 8, 512, 8, 32
WEIGHTS = LAYERS * WIDTH * WIDTH * 2
"""Bytes of the eight weights in bfloat16."""
BODIES = {
    "none": lambda layer: layer,
    "dots": functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "block": jax.checkpoint,
}


def stacked(kind: str, product, body: str = "none"):
    """The loss of eight scanned layers with an adapter each, and its arguments."""
    leaf = quantise(draw(9, LAYERS, WIDTH, WIDTH) / 30, kind)
    a, b = jnp.full((LAYERS, WIDTH, RANK), 0.01, jnp.bfloat16), jnp.zeros((LAYERS, RANK, WIDTH), jnp.bfloat16)

    @BODIES[body]
    def layer(x, leaves):
        kernel, (a, b) = leaves
        return x + jnp.tanh(product(x, kernel) + (x @ a) @ b), None

    def loss(adapter, kernel, x):
        return jnp.square(jax.lax.scan(layer, x, (kernel, adapter))[0].astype(jnp.float32)).sum()

    return loss, ((a, b), kernel_of(leaf, (WIDTH, WIDTH)), jnp.ones((TOKENS, WIDTH), jnp.bfloat16))


def residuals(loss, adapter, kernel, x) -> list[jax.Array]:
    return jax.tree.leaves(jax.vjp(lambda adapter: loss(adapter, kernel, x), adapter)[1])


def temporary_bytes(loss, *arguments) -> int:
    return jax.jit(jax.grad(loss)).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("body", BODIES)
def test_the_backward_pass_keeps_no_dequantised_weight(kind, body):
    loss, arguments = stacked(kind, quantised_dense, body)
    floats = [leaf for leaf in residuals(loss, *arguments) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert max(leaf.nbytes for leaf in floats) < WEIGHTS / LAYERS
    assert temporary_bytes(loss, *arguments) < 1.25 * WEIGHTS


def test_without_that_all_weights_are_kept():
    """What the law above is held against: the product that JAX differentiates by itself. A CPU keeps them in bfloat16
    from jax 0.12 on, and as float32 too before."""
    loss, arguments = stacked("nf4", lambda x, kernel: x @ kernel.dequantised(x.dtype))
    assert max(leaf.nbytes for leaf in residuals(loss, *arguments)) == WEIGHTS
    assert temporary_bytes(loss, *arguments) > 1.25 * WEIGHTS


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_dequantised_one_at_a_time(kind):
    """The temporaries of a product and its gradient are those of a few experts of 32."""
    experts, width = 32, 256
    kernel = kernel_of(quantise(draw(10, experts, width, width), kind), (width, width))
    x, sizes = jnp.ones((64, width)), jnp.full(experts, 2, jnp.int32)

    def loss(x, kernel):
        return jnp.square(quantised_grouped_dot(x, kernel, sizes)).sum()

    assert temporary_bytes(loss, x, kernel) < experts * width * width * 4 / 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", ["outputs", "inputs"])
def test_codes_that_are_split_over_devices_give_the_same_product(kind, axis):
    shape = (8, 256)
    kernel = kernel_of(quantise(draw(11, *shape), kind), shape)
    x, dy = jnp.asarray(draw(12, 3, shape[1])), jnp.asarray(draw(13, 3, shape[0]))
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    split = P("fsdp") if axis == "outputs" else P(None, "fsdp")
    kept_whole = axis == "inputs" and kind == "int8"  # has one absmax for the whole row
    places = dataclasses.replace(
        kernel, codes=NamedSharding(mesh, split), absmax=NamedSharding(mesh, P() if kept_whole else split)
    )

    @jax.jit
    def both(x, kernel, dy):
        y, back = jax.vjp(lambda x: quantised_dense(x, kernel), x)
        return y, back(dy)[0]

    expected = both(x, kernel, dy)
    found = both(x, jax.device_put(kernel, places), dy)
    assert relative(found[0], expected[0]) < 1e-6
    assert relative(found[1], expected[1]) < 1e-6
