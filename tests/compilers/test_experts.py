"""Grouped products as the compilers of accelerators make them: counted in what they compiled."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax.model import decoder, experts
from dpo_jax.model import spec as specs
from dpo_jax.model.decoder import _merged
from dpo_jax.model.grouped import grouped_dot
from dpo_jax.planning import chips, compilers
from dpo_jax.sharding import BATCH, make_mesh, param_shardings, rows, shape_of
from tests.support.specs import plain_spec

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


# ---- a mixture on a mesh


SPEC = specs.Experts(count=16, chosen=2, width=256, bias=True)
WIDTH = 384


@functools.cache
def mixture_on(name: str, expert: int, tensor: int) -> str:
    """A step's text: a mixture of experts and its gradient on eight devices, each axis of which is of use."""
    chip = chips.CHIPS[name]
    device(name)
    mesh = make_mesh(1, -1, tensor, compilers.devices(chip, 8, 1), expert=expert)
    graph, state = nnx.split(nnx.eval_shape(lambda: experts.Mixture(SPEC, WIDTH, rngs=nnx.Rngs(0))))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), jnp.bfloat16), nnx.to_pure_dict(state))
    places = param_shardings({"blocks": {"0": {"experts": shapes}}}, mesh)["blocks"]["0"]["experts"]
    params = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, places)
    rows = NamedSharding(mesh, P(BATCH))

    def loss(params, x):
        module = _merged(graph, state, jax.tree.map(lambda leaf: leaf[0], params))
        return module(x, activations=rows)[0].astype(jnp.float32).sum()

    step = jax.jit(jax.grad(loss, (0, 1)), out_shardings=(places, rows))
    x = jax.ShapeDtypeStruct((8, 256, WIDTH), jnp.bfloat16, sharding=rows)
    with compilers.answering_for(chip):
        return step.lower(params, x).compile().as_text()


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("expert", "tensor"), [(1, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("name", ["v5e", "h100"])
def test_a_mixture_multiplies_by_kernels_on_a_mesh_and_gathers_no_matrix_over_its_axis(name, expert, tensor):
    """A round has nine products, forward and backward; rounds beyond the first are compiled once, and compute again."""
    text = mixture_on(name, expert, tensor)
    kernel = "tpu_custom_call" if name == "v5e" else "__gpu$xla.gpu.triton"
    kernels = text.count(f'custom_call_target="{kernel}"')
    assert kernels == 9 if expert == 1 else kernels >= 18
    inner = SPEC.width // tensor
    whole = [f"[{SPEC.count},{a},{b}]" for a, b in ((WIDTH, inner), (inner, WIDTH))]
    gathered = [line for line in text.splitlines() if "all-gather" in line and any(one in line for one in whole)]
    assert bool(gathered) == (expert == 1)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["v5e", "h100"])
def test_answers_are_written_on_several_devices(name):
    """Weights lie as in training; each device asks its own experts, which no partitioner could split."""
    chip = chips.CHIPS[name]
    if (gone := compilers.missing(chip)) is not None:
        pytest.skip(gone)
    mesh = make_mesh(1, 2, 2, compilers.devices(chip, 4, 1))
    spec = plain_spec(width=256, layers=2, heads=4, mlp_width=256)
    mixed = dataclasses.replace(spec.layers[0], mlp=None, experts=specs.Experts(8, 2, 256))
    spec = dataclasses.replace(spec, layers=(mixed,) * 2)
    params = jax.eval_shape(lambda: decoder.cast(decoder.init_params(spec, jax.random.key(0)), jnp.bfloat16))
    params = shape_of(params, param_shardings(params, mesh))
    split = rows(mesh)

    def written(params, tokens):
        cache = decoder.empty_cache(spec, 4, 32, jnp.bfloat16)
        return decoder.extend(spec, params, tokens, tokens, cache, rows=split)[0]

    tokens = jax.ShapeDtypeStruct((4, 16), jnp.int32, sharding=split)
    with compilers.answering_for(chip):
        text = jax.jit(written).lower(params, tokens).compile().as_text()
    assert "custom-call" in text
