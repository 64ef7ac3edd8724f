"""A plan by the chip's own compiler: the run's step as it would run there, held to what it may cost."""

import json
import os
import subprocess
import sys

import pytest

from dpo_jax.planning import compilers
from dpo_jax.planning.chips import CHIPS
from tests.conftest import ROOT
from tests.support.tiny_folders import write_config

SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "vocab_size": 8192,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
LAYERS = SMALL["num_hidden_layers"]


def planned(tmp_path, chip: str, devices: int, *settings: str, family: str = "llama", **changes: int) -> dict:
    """The plan of a small model as plain values; JAX's own defaults, as the command has them."""
    if (gone := compilers.missing(CHIPS[chip])) is not None:
        pytest.skip(gone)
    folder = write_config(tmp_path / "small", family, **SMALL | changes)
    file = tmp_path / "run.yaml"
    file.write_text(f"output: {tmp_path / 'out'}\nmodel: {{path: {folder}}}\ndata: {{train: no.jsonl}}\n")
    words = ["-m", "dpo_jax.plan", str(file), "--devices", str(devices), "--chip", chip, "--compiler", "real", "--json"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, *words, "batch.pairs=128", *settings],
        cwd=ROOT,
        env=plain | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def hidden(plan: dict) -> float:
    """The share of what devices send that goes on beside work."""
    rows = plan["collectives"]
    return sum(row["bytes"] for row in rows if row["hides"]) / sum(row["bytes"] for row in rows)


def check_memory(plan: dict) -> None:
    """The prediction is about what the chip's compiler asks for, and nearer to it in BENCHMARKS.md, of real models."""
    predicted, real = sum(plan["memory"]["predicted"].values()), plan["memory"]["compiler"]["peak"]
    assert real / 1.15 <= predicted <= 1.3 * real


def check_products(plan: dict, most: float = 1.5) -> None:
    """None of float32, which a GPU does without its matrix units, and few that nobody asked for: the head, computed
    twice, is a third of this model; of whole rows the scores that nobody sees are computed too."""
    flops = plan["flops"]
    assert sum(count for dtype, count in flops["by_dtype"].items() if dtype == "f32") < 0.01 * flops["device"]
    assert flops["device"] * plan["devices"] < most * flops["useful"]


@pytest.mark.nightly
@pytest.mark.parametrize("chip", ["h100", "h200", "b200"])
def test_a_gpu_waits_for_nothing(tmp_path, chip):
    """No loop whose length is a value, no product without matrix units, attention's kernel once each way."""
    plan = planned(tmp_path, chip, 8, "model.attention=cudnn")
    assert plan["model"]["attention"] == "cudnn" and plan["waits"] == 0
    check_products(plan)
    assert plan["launches"] < 400 * LAYERS
    assert hidden(plan) > 0.7
    check_memory(plan)


@pytest.mark.nightly
@pytest.mark.parametrize("chip", ["a100", "a6000", "l4"])
def test_an_older_gpu_goes_by_whole_rows(tmp_path, chip):
    plan = planned(tmp_path, chip, 4)
    assert plan["model"]["attention"] == "xla" and plan["waits"] == 0 and not plan["kernels"]
    assert plan["launches"] < 600 * LAYERS
    assert hidden(plan) > 0.5  # nothing was by XLA's own choice
    check_products(plan, 2.2)
    check_memory(plan)


@pytest.mark.nightly
@pytest.mark.parametrize(("chip", "devices"), [("v5e", 4), ("v5p", 8), ("v6e", 4), ("tpu7x", 8)])
def test_a_tpu_has_its_kernels_and_cycles(tmp_path, chip, devices):
    plan = planned(tmp_path, chip, devices, "model.attention=splash")
    assert plan["model"]["attention"] == "splash" and plan["kernels"]
    assert plan["cycles"] > 0 and 0 < plan["mfu"]["step"] < 1
    check_memory(plan)


MIXTURE = {
    "hidden_size": 1024,
    "moe_intermediate_size": 256,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


@pytest.mark.nightly
@pytest.mark.parametrize("parts", [2, 4])
def test_tokens_that_go_to_their_experts_take_what_is_said(tmp_path, parts):
    """Memory is set aside for rounds of rows that are rarely wanted, and little of it."""
    settings = f"mesh.expert={parts}", "batch.pairs=512", "model.remat=names"
    plan = planned(tmp_path, "v5p", 8, *settings, family="qwen3_moe", **MIXTURE)
    assert plan["memory"]["predicted"]["moved tokens"] > 0
    check_memory(plan)
