"""Steps on meshes, as the compilers of accelerators make them: what is exchanged, and between which neighbours."""

import math

import pytest

from dpo_jax import sharding
from dpo_jax.planning import compilers
from dpo_jax.planning.chips import CHIPS
from tests.compilers.test_plan import SMALL, planned
from tests.support.exchanges import hops

LARGE_VOCABULARY = 65536


@pytest.mark.parametrize(
    "chip, sizes",
    [
        ("v5p", (4, 4, 4)),
        ("v5p", (4, 16, 1)),
        ("v5p", (1, 16, 4)),
        ("v6e", (2, 8, 4)),
        ("v6e", (1, 64, 1)),
        ("v5e", (4, 16, 4)),
        ("v5e", (1, 64, 4)),
    ],
)
def test_weights_are_shared_along_lines_of_the_torus(chip, sizes):
    if (gone := compilers.missing(CHIPS[chip])) is not None:
        pytest.skip(gone)
    devices = compilers.devices(CHIPS[chip], math.prod(sizes), 1)
    assert hops(sharding.make_mesh(*sizes, devices).devices, 1) <= 1.3


@pytest.mark.nightly
@pytest.mark.parametrize("chip", ["v5p", "h100"])
@pytest.mark.parametrize(
    "axes",
    ["mesh.data=2 mesh.fsdp=2 mesh.tensor=2", "mesh.fsdp=2 mesh.tensor=2 mesh.context=2", "mesh.fsdp=1 mesh.context=8"],
)
def test_nothing_larger_than_a_layer_is_gathered(tmp_path, chip, axes, monkeypatch):
    """Whatever the vocabulary is: a table's rows are looked up where they lie."""
    monkeypatch.setitem(SMALL, "vocab_size", LARGE_VOCABULARY)
    attention = "splash" if chip == "v5p" else "cudnn"
    plan = planned(tmp_path, chip, 8, *axes.split(), f"model.attention={attention}", "model.remat=block")
    width, inner, head = SMALL["hidden_size"], SMALL["intermediate_size"], SMALL["head_dim"]
    heads = 2 * (SMALL["num_attention_heads"] + SMALL["num_key_value_heads"])
    layer = 2 * width * (heads * head + 3 * inner)
    gathered = [row for row in plan["collectives"] if row["kind"] == "all-gather"]
    assert gathered and max(2 * math.prod(row["shape"]) for row in gathered) <= layer
    if "context" in axes:
        assert [row for row in plan["collectives"] if row["kind"] == "all-to-all"]
