"""Laws of grouped products: a loop over blocks of rows, and the kernels that take its place on accelerators."""

import contextlib
import dataclasses
import functools

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax import sharding
from dpo_jax.errors import UserError
from dpo_jax.model import grouped, grouped_blocks, grouped_gpu, grouped_tpu
from dpo_jax.model.spec import Experts
from dpo_jax.run import models
from tests.support.specs import plain_spec


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def close(got, expected, tolerance: float = 1e-5) -> None:
    """Two trees are the same, to a part of the largest entry of each leaf (or of one, where that is larger)."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = (np.asarray(leaf.astype(jnp.float32)) for leaf in (a, b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, np.abs(b).max(initial=0.0)))


def by_row(x, w, sizes):
    """One product for each row."""
    owner = jnp.repeat(jnp.arange(len(w)), sizes, total_repeat_length=len(x))
    return jnp.einsum("nd,ndf->nf", x, w[owner])


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(product, sizes, x, w, out):
    """A product, and its gradients for x and w where the output's is `out`."""
    y, pull = jax.vjp(lambda x, w: product(x, w, sizes), x, w)
    return y, *pull(out)


def agree(sizes: list[int], inputs: int = 5, outputs: int = 3) -> None:
    """The grouped product and both of its gradients are those of one product for each row."""
    x, w, out = draw(0, sum(sizes), inputs), draw(1, len(sizes), inputs, outputs), draw(2, sum(sizes), outputs)
    got, expected = (
        with_gradients(product, jnp.asarray(sizes, jnp.int32), x, w, out) for product in (grouped.grouped_dot, by_row)
    )
    close(got, expected)


@pytest.mark.parametrize(
    "sizes", [[7], [0, 0, 40], [0, 33, 0, 16, 1, 0], [600, 3, 0, 700], [1] * 20 + [0] * 20], ids=str
)
def test_each_row_meets_the_matrix_of_its_group(sizes):
    agree(sizes)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 70), min_size=4, max_size=4))
def test_any_division_into_groups(cuts):
    cuts = sorted(cuts)
    agree([cuts[0], *np.diff(cuts).tolist(), 70 - cuts[-1]])


@given(st.integers(1, 5000), st.integers(1, 300), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_there_are_blocks_for_every_row(rows, groups, random):
    """Whatever the division: no fewer blocks than it needs, and at most one for each group more than rows fill."""
    size = grouped_blocks.block_size(rows, groups)
    cuts = sorted(random.randint(0, rows) for _ in range(groups - 1))
    sizes = np.diff([0, *cuts, rows])
    assert (
        int(((sizes + size - 1) // size).sum())
        <= grouped_blocks.block_count(rows, groups, size)
        <= rows / size + groups
    )


def test_bfloat16_products_are_summed_in_float32():
    """Rounded once: to half of bfloat16's step, and not to one half for each block or row."""
    x, w, out = (
        jnp.abs(draw(i, *shape)).astype(jnp.bfloat16) for i, shape in enumerate([(600, 8), (2, 8, 4), (600, 4)])
    )
    sizes = jnp.array([600, 0], jnp.int32)
    got = with_gradients(grouped.grouped_dot, sizes, x, w, out)
    expected = with_gradients(by_row, sizes, *(leaf.astype(jnp.float32) for leaf in (x, w, out)))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=1.01 * 2**-8)


# ---- kernels, interpreted


@functools.partial(jax.jit, static_argnums=0)
def three_products(module, sizes, x, w, dy):
    options = {} if module is grouped_blocks else {"interpret": True}
    product = functools.partial(module.product, **options)
    return product(x, w, sizes, axis=1), product(dy, w, sizes, axis=2), module.outer(x, dy, sizes, w.dtype, **options)


KERNELS = [pytest.param(grouped_tpu, id="tpu"), pytest.param(grouped_gpu, id="gpu")]
DIVISIONS = {
    "one row": ([0, 0, 1], 8, 8),
    "one group": ([7], 16, 12),
    "empty groups, rows and columns of part of a tile": ([0, 150, 0, 70, 1, 0], 136, 40),
    "many rows": ([300, 3, 0, 400], 24, 272),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", DIVISIONS)
@pytest.mark.parametrize("module", KERNELS)
def test_kernels_give_what_blocks_give(module, case, dtype):
    """Values and both gradients: in float32 but for the order of sums, in bfloat16 to half a step of it."""
    sizes, inputs, outputs = DIVISIONS[case]
    shapes = (sum(sizes), inputs), (len(sizes), inputs, outputs), (sum(sizes), outputs)
    args = jnp.asarray(sizes, jnp.int32), *(draw(i, *shape).astype(dtype) for i, shape in enumerate(shapes))
    got, expected = (three_products(each, *args) for each in (module, grouped_blocks))
    close(got, expected, 1e-5 if dtype == jnp.float32 else 2**-8)


@pytest.mark.parametrize("module", KERNELS)
def test_a_group_without_rows_has_a_gradient_of_zero(module):
    sizes = jnp.array([0, 20, 0, 0, 12, 0], jnp.int32)
    dw = three_products(module, sizes, jnp.ones((32, 16)), jnp.ones((6, 16, 8)), jnp.ones((32, 8)))[2]
    np.testing.assert_array_equal(dw[:, 0, 0], sizes)


def a_gpu():
    """The kind of GPU that Triton's lowering asks for from jax 0.12 on, where there is none."""
    if not hasattr(jax.sharding, "AbstractDevice") or jax.__version_info__ < (0, 12):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "cuda")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("platform", "kernels"), [("cpu", (0, 0)), ("cuda", (0, 3)), ("tpu", (3, 0)), ("rocm", (0, 0))]
)
def test_each_platform_is_given_its_own_kernels(platform, kernels):
    """One for each product; and where there are none, the blocks."""
    x, w, sizes = jnp.zeros((40, 8)), jnp.zeros((4, 8, 4)), jnp.full((4,), 10, jnp.int32)
    step = jax.jit(jax.value_and_grad(lambda x, w: jnp.sin(grouped.grouped_dot(x, w, sizes)).sum(), (0, 1)))
    with a_gpu() if platform == "cuda" else contextlib.nullcontext():
        text = step.trace(x, w).lower(lowering_platforms=(platform,)).as_text()
    assert (text.count("@tpu_custom_call"), text.count("triton(")) == kernels
    assert ("stablehlo.dot_general" in text) == (kernels == (0, 0))


@pytest.mark.parametrize("bytes_each", [2, 4])
@pytest.mark.parametrize("rows", [1, 24, 1000, 61440])
@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(2048, 768, 128), (2880, 2880, 32), (7168, 2048, 256)])
def test_the_tiles_of_a_tpu_fit_its_memory_and_its_registers(inputs, outputs, groups, rows, bytes_each):
    """All tiles twice and a sum in float32; sides are whole dimensions or multiples of a register's."""
    for ins, outs in ((inputs, outputs), (outputs, inputs)):
        tm, ti, to = grouped_tpu.product_tiles(rows, ins, outs, groups, bytes_each)
        assert 2 * bytes_each * (tm * ti + ti * to + tm * to) + 4 * tm * to <= grouped_tpu.MEMORY + 2**20
        assert tm % 16 == 0 and ti in (ins, ti // 128 * 128) and to in (outs, to // 128 * 128)
        tm, ti, to = grouped_tpu.outer_tiles(rows, ins, outs, groups, bytes_each, bytes_each)
        assert 2 * bytes_each * (tm * ti + ti * to + tm * to) + 4 * ti * to <= grouped_tpu.MEMORY + 2**20
        assert tm % 16 == 0 and ti in (ins, ti // 128 * 128) and to in (outs, to // 128 * 128)


# ---- cost


def multiplications(jaxpr) -> int:
    """Multiply-adds of all products of a program, loops counted as often as they run.

    Of branches by platform the last counts, which is the one for CPU and GPU. (XLA's own count takes a loop once.)
    """
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (left, _), _ = eqn.params["dimension_numbers"]
            contracted = [eqn.invars[0].aval.shape[axis] for axis in left]
            total += int(np.prod(eqn.outvars[0].aval.shape) * np.prod(contracted))
        elif eqn.primitive.name == "cond":
            total += multiplications(eqn.params["branches"][-1].jaxpr)
        else:
            times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
            total += times * sum(multiplications(inner) for inner in jex.core.jaxprs_in_params(eqn.params))
    return total


@pytest.mark.parametrize("groups", [4, 16, 64, 256])
def test_the_work_grows_with_the_rows_and_not_with_the_groups(groups):
    """Three products, forward and backward, of at most twice the rows: blocks are at most half empty."""
    rows, x, w = 8192, jnp.zeros((8192, 16)), jnp.zeros((groups, 16, 8))
    sizes = jnp.full((groups,), rows // groups, jnp.int32)
    program = jax.make_jaxpr(jax.value_and_grad(lambda x, w: grouped.grouped_dot(x, w, sizes).sum(), (0, 1)))(x, w)
    ideal = 3 * rows * 16 * 8
    assert ideal <= multiplications(program.jaxpr) <= 2 * ideal


def test_nothing_as_large_as_all_tokens_for_all_experts_is_compiled():
    groups, rows, width = 64, 1024, 16
    sizes = jnp.full((groups,), rows // groups, jnp.int32)
    step = jax.jit(jax.grad(lambda x, w: jnp.sin(grouped.grouped_dot(x, w, sizes)).sum(), (0, 1)))
    memory = step.lower(jnp.zeros((rows, width)), jnp.zeros((groups, width, width))).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * groups * rows * width / 4


def test_a_jax_without_triton_still_multiplies_elsewhere_and_is_refused_on_gpus(monkeypatch):
    monkeypatch.setattr(grouped.importlib.util, "find_spec", lambda name: None)
    grouped.missing.cache_clear()
    try:
        x, w, sizes = jnp.ones((6, 4)), jnp.ones((2, 4, 3)), jnp.array([4, 2], jnp.int32)
        np.testing.assert_array_equal(grouped.grouped_dot(x, w, sizes), np.full((6, 3), 4.0))
        spec = plain_spec(width=16, layers=1, heads=2, mlp_width=16)
        mixed = dataclasses.replace(spec.layers[0], mlp=None, experts=Experts(4, 2, 16))
        spec, mesh = dataclasses.replace(spec, layers=(mixed,)), sharding.make_mesh(devices=jax.devices()[:1])
        models.check_mesh(spec, mesh)
        monkeypatch.setattr(models.sharding, "platform", lambda mesh: "gpu")
        with pytest.raises(UserError, match=r"^model.path: experts are multiplied by kernels of Pallas and Triton"):
            models.check_mesh(spec, mesh)
    finally:
        grouped.missing.cache_clear()
