"""Steps on meshes, as the compilers of accelerators make them: what is exchanged, and between which neighbours."""

import math

import pytest

from dpo_jax import sharding
from dpo_jax.planning import compilers
from dpo_jax.planning.chips import CHIPS
from tests.compilers.test_plan import SMALL, planned
from tests.support.exchanges import hops

LARGE_VOCABULARY = 65536
LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}


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


@pytest.mark.nightly
@pytest.mark.parametrize("chip, attention", [("v5p", "splash"), ("h100", "cudnn")])
def test_pairs_of_32k_tokens_of_a_70b_model_fit_on_64_devices(tmp_path, chip, attention, monkeypatch):
    """Whole training, prompts and completions of 16k tokens on average: rows of 64k slots, which 8 devices share."""
    for name, value in LLAMA_70B.items():
        monkeypatch.setitem(SMALL, name, value)
    settings = f"mesh.fsdp=8 mesh.context=8 model.remat=block model.attention={attention} data.max_length=32768"
    lengths = "--prompt-tokens 16384 --completion-tokens 16384"
    plan = planned(tmp_path, chip, 64, *settings.split(), "batch.pairs=16", *lengths.split())
    assert plan["batch"]["shape"] == [1, 65536]
    assert plan["memory"]["compiler"]["peak"] < CHIPS[chip].memory
