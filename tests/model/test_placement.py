"""What is split over a mesh within a model says what the whole says, and little of it moves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax import sharding
from dpo_jax.model import decoder
from dpo_jax.model.attention import causal
from dpo_jax.model.decoder import Execution, abstract_params
from dpo_jax.model.layers import lookup
from dpo_jax.model.placement import HeadAxes, between_layers, head_axes, picked, repeated, slot_axes, table_split
from tests.support.exchanges import collectives
from tests.support.specs import plain_spec
from tests.support.tiers import by_day

MESHES = {
    "data 2, fsdp 2": (2, 2, 1, 1),
    "fsdp 2, tensor 2": (1, 2, 2, 1),
    "data 2, tensor 2": (2, 1, 2, 1),
    "tensor 2, context 2": (1, 1, 2, 2),
    "fsdp 2, context 2": (1, 2, 1, 2),
    "data 2, context 2": (2, 1, 1, 2),
    "context 4": (1, 1, 1, 4),
}
DAY = {"fsdp 2, tensor 2", "data 2, tensor 2", "fsdp 2, context 2", "tensor 2, context 2"}
ROWS, LENGTH = 4, 16


@functools.cache
def mesh_of(name):
    data, fsdp, tensor, context = MESHES[name]
    return sharding.make_mesh(data, fsdp, tensor, jax.devices()[:4], context=context)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def looked_up(table, index, slope, split):
    found, pull = jax.vjp(lambda table: lookup(table, index, split), table)
    return found, pull(slope)[0]


@functools.cache
def on_one_device(vocab, width):
    index = jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 0, vocab)
    args = normal(0, vocab, width), index, normal(2, ROWS, LENGTH, width)
    return args, jax.jit(looked_up, static_argnums=3)(*args, None)


@pytest.mark.parametrize("name", by_day(MESHES, DAY))
@pytest.mark.parametrize("vocab, width", [(64, 48), (61, 48), (64, 6), (61, 5)])
def test_a_split_table_is_looked_up_where_it_lies(name, vocab, width):
    """The same bits; the gradient's sums in another order. No more is gathered than is looked up."""
    mesh = mesh_of(name)
    args, (found, gradient) = on_one_device(vocab, width)
    where = sharding.activations(mesh)
    split = table_split(sharding.head_split(mesh), where, (vocab, width), ROWS)
    table = sharding.param_shardings({"embed": {"embedding": args[0]}}, mesh)["embed"]["embedding"]
    run = jax.jit(
        functools.partial(looked_up, split=split),
        in_shardings=(table, sharding.rows(mesh), where),
        out_shardings=(where, table),
    )
    compiled = run.lower(*args).compile()
    ours = compiled(*(jax.device_put(x, s) for x, s in zip(args, compiled.input_shardings[0], strict=True)))
    np.testing.assert_array_equal(ours[0], found)
    np.testing.assert_allclose(ours[1], gradient, rtol=1e-6, atol=1e-6)  # up to 8 terms of order one
    own = ROWS * LENGTH * width // (mesh.shape["data"] * mesh.shape["fsdp"])
    moved = [size for kind, size in collectives(compiled.as_text()) if kind in ("all-gather", "all-to-all")]
    assert max(moved, default=0) <= own


def test_a_rounded_gradient_is_rounded_once():
    """512 equal slopes of 1 + 2^-7 in bfloat16, on two parts of a batch: added in that dtype they would stand still."""
    mesh = mesh_of("data 2, fsdp 2")
    split = table_split(sharding.head_split(mesh), sharding.activations(mesh), (8, 4), 4)
    slope = jnp.full((4, 128, 4), 1 + 2**-7, jnp.bfloat16)
    index = jnp.zeros((4, 128), jnp.int32)
    gradient = jax.jit(looked_up, static_argnums=3)(jnp.zeros((8, 4), jnp.bfloat16), index, slope, split)[1]
    assert float(gradient[0, 0]) == 516.0


@pytest.mark.parametrize("name", by_day(MESHES, DAY))
@pytest.mark.parametrize("count", [8, 7])
def test_slots_are_picked_where_they_lie(name, count):
    mesh = mesh_of(name)
    where, shards = sharding.activations(mesh), sharding.batch_shards(mesh)
    states = normal(0, ROWS, LENGTH, 6)
    source = jax.random.randint(jax.random.key(1), (shards, count), 0, ROWS // shards * LENGTH)
    slope = normal(2, shards * count, 6)

    def run(states, source, slope, where):
        found, pull = jax.vjp(lambda states: picked(states, source, where), states)
        return found, *pull(slope)

    wanted = jax.jit(run, static_argnums=3)(states, source, slope, None)
    found = jax.jit(run, static_argnums=3)(jax.device_put(states, where), source, slope, where)
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "heads, kv_heads, wanted",
    [
        (8, 4, HeadAxes(("tensor", "context"), 1)),
        (8, 2, HeadAxes(("tensor", "context"), 2)),
        (8, 1, HeadAxes(("tensor", "context"), 4)),
        (12, 6, HeadAxes(("tensor", "context"), 2)),
        (6, 3, HeadAxes(("tensor",), 2)),
        (9, 3, HeadAxes((), 1)),
    ],
)
def test_heads_are_split_as_far_as_they_go(heads, kv_heads, wanted):
    assert head_axes(sharding.activations(mesh_of("tensor 2, context 2")), heads, kv_heads) == wanted


def test_repeated_heads_add_up_their_slopes_in_float32():
    x = normal(0, 2, 3, 2, 4).astype(jnp.bfloat16)
    found, pull = jax.vjp(lambda x: repeated(x, 3), x)
    np.testing.assert_array_equal(found, np.repeat(x, 3, axis=2))
    slope = jnp.stack([jnp.full((2, 3, 2, 4), value, jnp.bfloat16) for value in (256.0, 1.0, 1.0)], axis=3)
    assert float(pull(slope.reshape(2, 3, 6, 4))[0][0, 0, 0, 0]) == 258.0


def test_slots_that_axes_do_not_divide_are_whole():
    where = sharding.activations(mesh_of("tensor 2, context 2"))
    assert slot_axes(where) == ("context", "tensor")
    for length, axes in ((16, ("context", "tensor")), (6, ("context",)), (7, ())):
        fitted = between_layers(where, 4, length)
        assert fitted is not None and slot_axes(fitted) == axes
    rows = between_layers(sharding.activations(mesh_of("data 2, context 2")), 3, 16)
    assert rows == NamedSharding(mesh_of("data 2, context 2"), P(sharding.BATCH))


@pytest.mark.parametrize("name", by_day([name for name in MESHES if "fsdp 2" in name], {"data 2, fsdp 2"}))
def test_nothing_larger_than_a_layer_is_gathered(name):
    """Of a model whose table is larger than its layers, forwards and backwards, and so are the rows of all devices."""
    mesh, spec = mesh_of(name), plain_spec(width=32, layers=2, heads=4, mlp_width=64)
    spec = dataclasses.replace(spec, vocab_size=4096)
    params = abstract_params(spec)
    places = sharding.param_shardings(params, mesh)
    execution = Execution(activations=sharding.activations(mesh), head=sharding.head_split(mesh))

    def total(params, tokens):
        return decoder.hidden(spec, params, tokens, causal(*tokens.shape), execution).sum()

    run = jax.jit(jax.grad(total), in_shardings=(places, sharding.rows(mesh)), out_shardings=places)
    text = run.lower(params, jax.ShapeDtypeStruct((ROWS, 96), jnp.int32)).compile().as_text()
    layer = sum(leaf.size // leaf.shape[0] for leaf in jax.tree.leaves(params["blocks"]["0"]))
    gathered = [size for kind, size in collectives(text) if kind == "all-gather"]
    assert gathered and max(gathered) <= layer
