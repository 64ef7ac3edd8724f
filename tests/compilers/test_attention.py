"""Attention as the compilers of accelerators make it: kernels and loops are counted in what they compiled."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from dpo_jax import sharding
from dpo_jax.model import decoder
from dpo_jax.model.attention import Bounds, Layout, VisibilityRules
from dpo_jax.model.backends import table
from dpo_jax.model.backends.dispatch import attend
from dpo_jax.model.decoder import Execution, init_params
from dpo_jax.model.settings import REMATS
from dpo_jax.planning import chips, compilers
from tests.support.specs import plain_spec

LAYERS, ROWS, LENGTH = 4, 4, 640
KERNEL = re.compile(r'custom_call_target="(tpu_custom_call|__cudnn\$fmha\w*|mosaic_gpu_v2|__gpu\$xla\.gpu\.triton)"')


@functools.cache
def devices(name: str) -> list:
    chip = chips.CHIPS[name]
    gone = compilers.missing(chip)
    if gone is not None:
        pytest.skip(gone)
    return compilers.devices(chip, 8 if name == "v5p" else 4, 1)


def kernels(text: str) -> int:
    return len(KERNEL.findall(text))


def step_of(chip: str, backend: str, policy: str, *, split: bool = False, **fields) -> str:
    """The gradient of a small decoder in bfloat16, compiled; its rows are split over devices if asked."""
    spec = plain_spec(width=256, layers=LAYERS, heads=4, head_dim=fields.pop("head_dim", 128), mlp_width=256, **fields)
    platform, found = chips.CHIPS[chip].platform, devices(chip)
    bounds = Bounds(8, 2, table.TILES[platform], platform)
    mesh = sharding.make_mesh(data=len(found), fsdp=1, devices=found) if split else None
    where = None if mesh is None else sharding.rows(mesh)
    one = SingleDeviceSharding(found[0])
    rows, whole = (one, one) if mesh is None else (NamedSharding(mesh, P(("data",))), NamedSharding(mesh, P()))
    execution = Execution(remat=policy, activations=where, attention=backend, platform=platform, bounds=bounds)

    def loss(params, ids, layout):
        return (decoder.hidden(spec, params, ids, layout, execution).astype(jnp.float32) ** 2).mean()

    params = jax.eval_shape(lambda: decoder.cast(init_params(spec, jax.random.key(0)), jnp.bfloat16))
    ids = jax.ShapeDtypeStruct((8, LENGTH), jnp.int32, sharding=rows)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), params)
    with compilers.answering_for(chips.CHIPS[chip]):
        return jax.jit(jax.grad(loss)).lower(params, ids, Layout(ids, ids, ids)).compile().as_text()


def loops(text: str) -> int:
    return len(re.findall(r" while\(", text))


BACKWARD = {"splash": 1, "cudnn": 1, "tokamax": 2}
"""Kernels of the backward pass; splash needs one for rows of few blocks."""


@pytest.mark.nightly
@pytest.mark.parametrize("policy", REMATS)
@pytest.mark.parametrize(
    ("chip", "backend"),
    [("v5e", "splash"), ("v5p", "splash"), ("v6e", "splash"), ("h100", "cudnn"), ("h100", "tokamax")],
)
def test_attention_runs_once_forward(chip, backend, policy):
    """One kernel forward, those of the backward pass, and no loop but those over layers; by `block` all runs again."""
    unfit = table.unfit(backend, table.Device(chips.CHIPS[chip].platform, 9.0))
    if backend == "tokamax" and unfit is not None:
        pytest.skip(unfit)
    text = step_of(chip, backend, policy)
    assert kernels(text) == (2 if policy == "block" else 1) + BACKWARD[backend]
    assert loops(text) == 2


@pytest.mark.nightly
@pytest.mark.parametrize(("chip", "backend"), [("v5e", "splash"), ("h100", "cudnn")])
def test_names_are_seen_where_rows_are_split(chip, backend):
    text = step_of(chip, backend, "names", split=True)
    assert kernels(text) == 1 + BACKWARD[backend]


@pytest.mark.nightly
@pytest.mark.parametrize("policy", ["attention", "names"])
@pytest.mark.parametrize("chip", ["a100", "a6000", "l4", "h100"])
def test_a_gpu_without_a_kernel_has_no_loop_over_tiles(chip, policy):
    """Whole rows; no loop but the two over layers."""
    text = step_of(chip, "xla", policy, sinks=True)
    assert kernels(text) == 0 and loops(text) == 2


def compiled(chip: str, shape: tuple[int, ...], dtype, length: int, window: int | None, rules: VisibilityRules):
    """The gradient of one layer's attention, compiled for one device. `shape` is H, K, C and E."""
    heads, kv_heads, key, value = shape
    where = SingleDeviceSharding(devices(chip)[0])
    bounds = Bounds(8, 2, 256, "tpu")

    def like(*dims, of=dtype):
        return jax.ShapeDtypeStruct((2, length, *dims), of, sharding=where)

    def loss(query, key, value, sinks, layout):
        own = rules if rules.sinks is None else rules._replace(sinks=sinks)
        found = attend(query, key, value, layout, own, window=window, backend="splash", bounds=bounds)
        return (found.astype(jnp.float32) ** 2).sum()

    ids, sinks = like(of=jnp.int32), jax.ShapeDtypeStruct((heads,), jnp.float32, sharding=where)
    arrays = like(heads, key), like(kv_heads, key), like(kv_heads, value)
    run = jax.jit(jax.grad(loss, (0, 1, 2, 3)))
    return run.lower(*arrays, sinks, Layout(ids, ids, ids)).compile().as_text()


SINKS = VisibilityRules(0.1, softcap=30.0, sinks=jnp.zeros(()))
CASES = {
    "heads of 64": ((9, 3, 64, 64), jnp.bfloat16, 1280, None, VisibilityRules(0.1)),
    "heads of 80": ((4, 4, 80, 80), jnp.bfloat16, 1280, None, VisibilityRules(0.1)),
    "heads of 96": ((4, 2, 96, 96), jnp.bfloat16, 1280, None, VisibilityRules(0.1)),
    "heads of 128": ((8, 2, 128, 128), jnp.bfloat16, 1536, None, VisibilityRules(0.1)),
    "heads of 256": ((4, 2, 256, 256), jnp.bfloat16, 1536, 128, VisibilityRules(0.1, softcap=30.0)),
    "one key head": ((8, 1, 128, 128), jnp.bfloat16, 1280, None, VisibilityRules(0.1)),
    "wide keys": ((4, 4, 192, 128), jnp.bfloat16, 1280, None, VisibilityRules(0.1)),
    "sinks": ((8, 2, 64, 64), jnp.bfloat16, 1280, 128, SINKS),
    "largest": ((2, 1, 256, 256), jnp.float32, 2304, 128, SINKS),
    "long rows": ((4, 2, 128, 128), jnp.bfloat16, 8192, None, VisibilityRules(0.1)),
}


@pytest.mark.nightly
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_splash_fits_every_tpu(chip, case):
    """The kernel's blocks fit the core's memory, all rows are one call, and nothing of it is a loop."""
    text = compiled(chip, *CASES[case])
    assert kernels(text) == (3 if case == "long rows" else 2) and loops(text) == 0
