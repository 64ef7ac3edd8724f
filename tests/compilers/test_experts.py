"""Grouped products as the compilers of accelerators make them: counted in what they compiled."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from dpo_jax.model.grouped import grouped_dot
from dpo_jax.planning import chips, compilers

SHAPES = {
    "qwen3_30b": (61440, 2048, 768, 128),
    "gpt_oss_20b": (30720, 2880, 2880, 32),
    "no multiple of a tile": (1000, 200, 96, 8),
    "one row": (1, 64, 48, 4),
}
"""Rows, inputs, outputs and groups."""
MIB = 2**20


def cases(first: str, *others: str) -> list:
    """A chip, a shape and a dtype: all shapes and both dtypes on the first chip, the large shapes on the others."""
    full = [(first, shape, dtype) for shape in SHAPES for dtype in ("bfloat16", "float32")]
    return full + [(name, shape, "bfloat16") for name in others for shape in ("qwen3_30b", "gpt_oss_20b")]


@pytest.fixture(autouse=True)
def optimised():
    """The compilers do here what they do for a run, which the rest of the tests has no time for."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@functools.cache
def device(name: str):
    chip = chips.CHIPS[name]
    gone = compilers.missing(chip)
    if gone is not None:
        pytest.skip(gone)
    return compilers.devices(chip, 8, 1)[0]


def compiled(name: str, function, *args: jax.ShapeDtypeStruct):
    on = jax.sharding.SingleDeviceSharding(device(name))
    with compilers.answering_for(chips.CHIPS[name]):
        return jax.jit(function, in_shardings=on, out_shardings=on).lower(*args).compile()


def with_gradients(x, w, sizes, dy):
    y, pull = jax.vjp(lambda x, w: grouped_dot(x, w, sizes), x, w)
    return y, *pull(dy)


def arguments(shape: str, dtype) -> list[jax.ShapeDtypeStruct]:
    rows, inputs, outputs, groups = SHAPES[shape]
    shapes = ((rows, inputs), (groups, inputs, outputs), (groups,), (rows, outputs))
    return [jax.ShapeDtypeStruct(s, jnp.int32 if len(s) == 1 else dtype) for s in shapes]


@pytest.mark.nightly
@pytest.mark.parametrize("name,shape,dtype", cases("v5e", "v5p", "v6e", "tpu7x"))
def test_a_tpu_has_one_kernel_for_each_product(name, shape, dtype):
    """Which does the arithmetic of its own rows, and no matrix is copied beside it where a tile's width divides it."""
    program = compiled(name, with_gradients, *arguments(shape, dtype))
    rows, inputs, outputs, _ = SHAPES[shape]
    text = program.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert " convolution(" not in text and " dot(" not in text
    whole = -(-rows // 128) * 128
    assert program.cost_analysis()["flops"] <= 1.1 * 6 * whole * inputs * outputs
    if shape == "qwen3_30b":
        assert program.memory_analysis().temp_size_in_bytes <= 4 * MIB


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name,shape,dtype", cases("l4", "h100", "b200", "a100"))
def test_a_gpu_has_one_kernel_for_each_product(name, shape, dtype):
    """No loop, no product beside them, and nothing copied."""
    program = compiled(name, with_gradients, *arguments(shape, dtype))
    text = program.as_text()
    assert re.findall(r'custom_call_target="([^"]+)"', text) == ["__gpu$xla.gpu.triton"] * 3
    assert " while(" not in text and " dot(" not in text
    assert program.memory_analysis().temp_size_in_bytes <= MIB
