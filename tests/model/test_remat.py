"""A policy of remat changes what a step keeps, as its table says, and no number."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import sharding
from dpo_jax.errors import UserError
from dpo_jax.model import decoder, remat
from dpo_jax.model.attention import causal
from dpo_jax.model.decoder import Execution, init_params
from dpo_jax.model.settings import FITTING, REMATS, ModelSettings
from dpo_jax.model.spec import MLA, MLP, Experts, GatedDelta, Norm, Rope
from tests.support.specs import plain_spec
from tests.support.tiers import by_day

PLAIN = plain_spec(width=32, layers=4, heads=4, mlp_width=96, head_dim=8)
LAYER, NORM = PLAIN.layers[0], Norm(1e-6)
LAYERS = {
    "plain": LAYER,
    "experts": dataclasses.replace(LAYER, mlp=None, experts=Experts(count=4, chosen=2, width=48)),
    "delta": dataclasses.replace(
        LAYER, mixer=GatedDelta(key_heads=2, value_heads=2, key_dim=8, value_dim=8, kernel=4, norm=NORM)
    ),
    "latent": dataclasses.replace(LAYER, mixer=MLA(4, None, 16, 4, 4, 8, 8**-0.5, Rope(), NORM), mlp=MLP(96)),
}


def compiled(kind, policy, slots=128, where=None):
    spec = dataclasses.replace(PLAIN, layers=(LAYERS[kind],) * 4)
    ids = jax.random.randint(jax.random.key(1), (2, slots), 0, 50)
    execution = Execution(remat=policy, activations=where)

    def total(params):
        return (decoder.hidden(spec, params, ids, causal(2, slots), execution) ** 2).mean()

    params = init_params(spec, jax.random.key(0))
    return jax.jit(jax.value_and_grad(total)).lower(params).compile(), params


@pytest.mark.parametrize("kind", by_day(LAYERS, {"plain"}))
def test_policies_keep_less_and_less_and_change_no_number(kind):
    temporary, wanted = {}, None
    for policy in REMATS:
        program, params = compiled(kind, policy)
        temporary[policy] = program.memory_analysis().temp_size_in_bytes
        found = program(params)
        wanted = found if wanted is None else wanted
        # the same float32 operations, which the compiler fuses differently
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-7), found, wanted)
    order = ["none", "attention", "dots", "names", "block"]
    if kind == "delta":  # has no attention to compute again, and needs as much to run a layer again as it keeps
        assert temporary["attention"] == temporary["none"] > temporary["dots"] > temporary["names"]
    else:  # attention in blocks keeps no scores that could be computed again
        assert temporary["none"] == temporary["attention"], temporary
        assert sorted(order, key=lambda policy: -temporary[policy]) == order, temporary
        assert len({temporary[policy] for policy in order}) == len(order) - 1, temporary


def test_scores_of_short_rows_are_computed_again():
    """Rows of up to 64 slots are attended to at once, and their scores kept unless a policy says otherwise."""
    kept, again = (compiled("plain", policy, 64)[0].memory_analysis() for policy in ("none", "attention"))
    assert again.temp_size_in_bytes < kept.temp_size_in_bytes


def products(program, shape):
    """Products of this shape in a compiled program."""
    dims = ",".join(map(str, shape))
    return len(re.findall(rf"= \w+\[{dims}\]\S* dot\(", program.as_text()))


@pytest.mark.parametrize("where", [None, "two devices"])
@pytest.mark.parametrize("policy", by_day(REMATS, {"names", "block"}))
def test_the_forward_pass_of_attention_runs_once(policy, where):
    """What its backward pass wants of it has names. A pass over pairs of blocks has a product of scores, and the
    backward pass one of their slopes beside."""
    rows = sharding.rows(sharding.make_mesh(data=2, fsdp=1, devices=jax.devices()[:2])) if where else None
    program, _ = compiled("plain", policy, where=rows)
    passes = 3 if policy == "block" else 2  # every layer runs again
    assert products(program, (2, 128, 64)) == passes + 1  # two key heads, two queries' heads each


@pytest.mark.parametrize("policy", ["attention", *by_day(["dots", "names", "offload"], [])])
def test_scores_of_whole_rows_are_computed_again_and_their_values_are_not(policy):
    """Seven products of scores' size: two forward; the scores again, and one for each of four slopes."""
    program, _ = compiled("plain", policy, 64)
    assert products(program, (4, 128, 64)) == 3  # scores, the same again, their slopes
    assert products(program, (4, 128, 8)) == 2  # what is attended to, and the slopes of queries


def test_the_policy_that_fits_computes_least_again():
    sizes = {"attention": 40, "dots": 30, "names": 20, "block": 10}
    assert [remat.fitting(sizes.__getitem__, room) for room in (40, 39, 20, 19, 5, None)] == [
        "attention",
        "dots",
        "names",
        "block",
        "block",
        "attention",
    ]
    assert remat.fitting(lambda policy: pytest.fail(policy), None) == "attention"
    assert set(FITTING) <= set(REMATS)


def test_every_setting_is_a_row_of_the_table_and_every_row_a_setting():
    for policy in REMATS:
        assert ModelSettings(path="x", remat=policy).remat == policy
    with pytest.raises(ValueError):
        ModelSettings(path="x", remat="all")
    assert {name for row in REMATS.values() for name in row.keeps or ()} <= set(remat.NAMES)


def test_values_go_to_the_hosts_memory_under_offload_only():
    """A CPU has one memory, so what is looked at is where the program asks its values to go."""

    def text(policy):
        layer = remat.recomputed(lambda x, w: jnp.sin(remat.named(x @ w, "qkv")) @ w, policy)
        loss = jax.grad(lambda x, w: layer(x, w).sum(), (0, 1))
        return str(jax.make_jaxpr(loss)(jnp.ones((4, 4)), jnp.ones((4, 4))))

    assert "Host" in text("offload") or "host" in text("offload")
    assert not any("host" in text(policy).lower() for policy in REMATS if policy != "offload")


def test_offload_is_refused_where_devices_reach_no_host_memory():
    near = SimpleNamespace(platform="abacus", addressable_memories=lambda: [SimpleNamespace(kind="device")])
    with pytest.raises(UserError, match=r"model.remat: offload .*abacus devices reach device only; set names or block"):
        remat.check("offload", [near])
    remat.check("names", [near])
    remat.check("offload", jax.devices())
