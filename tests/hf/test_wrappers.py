"""Models with a decoder for text behind other towers: the decoder is trained, and all else comes back as it was."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpo_jax.errors import UserError
from dpo_jax.hf.checkpoint import load_hf, save_hf
from dpo_jax.hf.configs import quiet, read_spec
from dpo_jax.model.decoder import Model, logits

TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
SEES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
GEMMA4 = {
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 96,
}
WRAPPERS = {
    "gemma3": {
        "text_config": {**TEXT, "sliding_window": 5, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
        "vision_config": SEES,
    },
    "gemma4": {
        "text_config": {**TEXT, **GEMMA4},
        "vision_config": {**SEES, "num_key_value_heads": 2, "head_dim": 8},
        "audio_config": None,
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "ministral3"},
        "vision_config": {**SEES, "head_dim": 8},
    },
    "mistral3_of_mistral": {
        "text_config": {**TEXT, "model_type": "mistral", "sliding_window": None},
        "vision_config": {**SEES, "head_dim": 8},
    },
    "qwen3_5": {
        "text_config": {**TEXT, **LINEAR},
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
        },
    },
}


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory):
    """A folder of each kind, made by transformers with random weights, and PyTorch's logits for some tokens."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForImageTextToText

    root, ids = tmp_path_factory.mktemp("wrapped"), np.random.default_rng(0).integers(3, 90, (2, 12))
    found = {}
    for name, fields in WRAPPERS.items():
        torch.manual_seed(0)
        with quiet(), torch.no_grad():
            config = AutoConfig.for_model(name.split("_of_")[0], **json.loads(json.dumps(fields)))
            model = AutoModelForImageTextToText.from_config(config).float().eval()
            for weight in model.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
            model.save_pretrained(root / name)
        found[name] = root / name, ids, theirs_of(root / name, ids)
    return found


def theirs_of(folder: Path, ids: np.ndarray) -> np.ndarray:
    """PyTorch's logits, from a folder that must hold every tensor it wants and no other."""
    import torch
    from transformers import AutoModelForImageTextToText

    with quiet(), torch.no_grad():
        model, report = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        tokens = torch.tensor(ids)
        return model.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.numpy()


@pytest.mark.parametrize("name", WRAPPERS)
def test_text_is_computed_as_pytorch_computes_it(wrapped, name):
    folder, ids, wanted = wrapped[name]
    model = load_hf(folder)
    # float32 sums in another order; 3e-6 was the largest difference seen
    np.testing.assert_allclose(logits(model.spec, model.params, jnp.asarray(ids, jnp.int32)), wanted, atol=2e-4)


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_other_towers_come_back_untouched(wrapped, name, tmp_path):
    folder, ids, _ = wrapped[name]
    model = load_hf(folder)
    moved = Model(model.spec, jax.tree.map(lambda leaf: leaf + 1 / 64, model.params))
    save_hf(moved, tmp_path / "moved", folder)
    save_hf(model, tmp_path / "same", folder)
    before, after, same = (
        load_file(path / "model.safetensors") for path in (folder, tmp_path / "moved", tmp_path / "same")
    )
    assert before.keys() == after.keys() == same.keys()
    assert all(before[tensor].tobytes() == same[tensor].tobytes() for tensor in before)
    kept = {tensor for tensor in before if before[tensor].tobytes() == after[tensor].tobytes()}
    assert kept and all("language_model" not in tensor and "lm_head" not in tensor for tensor in kept)
    assert all("language_model" in tensor or "lm_head" in tensor for tensor in before.keys() - kept)
    assert (folder / "config.json").read_bytes() == (tmp_path / "same" / "config.json").read_bytes()
    theirs, ours = theirs_of(tmp_path / "moved", ids), logits(moved.spec, moved.params, jnp.asarray(ids, jnp.int32))
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_a_tensor_of_the_decoder_that_nobody_knows_is_refused(wrapped, tmp_path):
    folder = Path(shutil.copytree(wrapped["gemma3"][0], tmp_path / "m"))
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.model.layers.0.new.weight"] = np.zeros(3, np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="'language_model.model.layers.0.new.weight' .* belongs to nothing"):
        load_hf(folder)


def test_a_key_of_the_text_config_is_judged_and_named(wrapped, tmp_path):
    folder = Path(shutil.copytree(wrapped["mistral3"][0], tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["new_softcap"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="text_config.new_softcap = 3: unknown key"):
        read_spec(folder)


def test_a_reward_model_is_not_made_of_one(wrapped):
    with pytest.raises(UserError, match="a reward model is made of a text model"):
        read_spec(wrapped["gemma3"][0], scalar_head=True)
