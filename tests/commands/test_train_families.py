"""The whole job on other models than llama: experts, linear attention, learned positions, other towers."""

import functools
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpo_jax import train
from dpo_jax.config import run as config
from dpo_jax.reporting.journal import read_records
from tests.support.tiers import by_day
from tests.support.tiny_folders import SIZES, write_config, write_folder
from tests.support.tiny_rows import byte_tokenizer, write

EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.01,
    "head_dim": 8,
}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
}
OTHERS = dict.fromkeys(("num_key_value_heads", "rope_parameters", "rms_norm_eps", "intermediate_size"), ...)
LEARNED = {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128, **OTHERS}
FAMILIES = {"qwen3_moe": EXPERTS, "qwen3_5_text": LINEAR, "opt": LEARNED}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of each family, pairs to train on, and the settings that all runs share."""
    root, tokenizer = tmp_path_factory.mktemp("world"), byte_tokenizer()
    for family, changes in FAMILIES.items():
        ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "vocab_size": 300}
        write_folder(root / family, family, **{"num_hidden_layers": 2, **changes, **ends})
        tokenizer.save_pretrained(str(root / family))
    rows = [
        {"prompt": f"Say {n}", "chosen": "yes " * (n % 2 + 1), "rejected": "no" * (n % 3 + 1)} for n in range(11, 25)
    ]
    write(root / "train.jsonl", *rows)
    return root


def arguments(world, family, output, *more):
    given = {
        "model.path": world / family,
        "data.train": world / "train.jsonl",
        "data.cache": world / "cache",
        "data.max_length": 64,
        "batch.pairs": 4,
        "steps": 2,
        "optimizer.learning_rate": 1e-3,
        "optimizer.warmup_steps": 0,
        "log.report": False,  # a page takes longer than the steps
        "output": world / output,
    }
    return [f"{key}={value}" for key, value in given.items()] + list(more)


@pytest.fixture(scope="module")
def ran(world):
    """Folder of a family's plain run, which is run when it is first asked for."""

    @functools.cache
    def run(family):
        assert train.main(arguments(world, family, f"run_{family}")) == 0
        return world / f"run_{family}"

    return run


@pytest.mark.parametrize("family", by_day(FAMILIES, ["qwen3_5_text", "opt"]))
def test_a_run_ends_with_the_family_s_own_folder(world, ran, family):
    steps = [record for record in read_records(ran(family) / "metrics.jsonl") if "loss" in record]
    # at the first step policy and reference are the same; what balances experts stands beside that
    first = steps[0]["loss"] - EXPERTS["router_aux_loss_coef"] * steps[0].get("aux_loss", 0.0)
    assert first == pytest.approx(np.log(2), abs=1e-4) and ("aux_loss" in steps[0]) == (family == "qwen3_moe")
    before, after = (load_file(path / "model.safetensors") for path in (world / family, ran(family) / "model"))
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    assert any((before[name] != after[name]).any() for name in before)


def test_sharing_prompts_is_asked_of_the_spec_and_changes_nothing(world, ran):
    """Linear attention cannot share them, so to ask for it, as a run does, gives the same bits as not to."""
    assert config.load(arguments(world, "qwen3_5_text", "x")).batch.share_prompts
    assert train.main(arguments(world, "qwen3_5_text", "whole", "batch.share_prompts=false")) == 0
    found = [(folder / "model" / "model.safetensors").read_bytes() for folder in (ran("qwen3_5_text"), world / "whole")]
    assert found[0] == found[1]


def test_other_towers_are_carried_through_a_run(world):
    inner = {key: value for key, value in SIZES.items() if key not in ("bos_token_id", "eos_token_id")}
    inner["num_hidden_layers"] = 2
    text = {**inner, "model_type": "ministral3", "vocab_size": 300, "head_dim": 8, "max_position_embeddings": 64}
    folder = write_folder(world / "inner", "ministral3", **{**text, "model_type": "ministral3"})
    config = {"model_type": "mistral3", "architectures": ["Mistral3ForConditionalGeneration"], "text_config": text}
    outer = world / "wrapped"
    outer.mkdir()
    (outer / "config.json").write_text(json.dumps({**config, "eos_token_id": 1}))
    tensors = {f"language_model.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    tower = {"vision_tower.patch_conv.weight": np.ones((2, 3), np.float16), "vision_tower.seen": np.arange(3)}
    save_file({**tensors, **tower}, outer / "model.safetensors", metadata={"format": "pt"})
    byte_tokenizer().save_pretrained(str(outer))
    assert train.main(arguments(world, "wrapped", "run_wrapped")) == 0
    after = load_file(world / "run_wrapped" / "model" / "model.safetensors")
    assert after.keys() == {*tensors, *tower}
    assert all(
        after[name].tobytes() == tower[name].tobytes() and after[name].dtype == tower[name].dtype for name in tower
    )
    assert any((after[name] != tensors[name]).any() for name in tensors)


@pytest.mark.parametrize(
    ("family", "setting", "message"),
    [
        ("opt", "data.max_length=129", "data.max_length: 129 is more than the 128 positions that model.path knows"),
        ("opt", "model.router_aux=0.1", "model.router_aux: 0.1 balances experts, and there are none"),
        ("opt", "reference={path: PLAIN, mode: live}", "reference.mode: live computes the reference as"),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_weights_are_read(
    world, family, setting, message, capsys, monkeypatch
):
    plain = world / "plain"
    if not plain.exists():
        write_config(plain, "llama", vocab_size=300)
    monkeypatch.setattr("dpo_jax.run.models.load_model", lambda *_, **__: pytest.fail("weights were read"))
    assert train.main(arguments(world, family, "refused", setting.replace("PLAIN", str(plain)))) == 2
    assert message in capsys.readouterr().err
