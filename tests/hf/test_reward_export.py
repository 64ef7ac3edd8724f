"""What a reward model's folder holds when it was made of a language model's."""

import dataclasses
import json
import re

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from dpo_jax import convert
from dpo_jax.errors import UserError
from dpo_jax.hf.checkpoint import load_hf, save_hf
from dpo_jax.hf.configs import read_spec
from dpo_jax.hf.reward import reward_config
from dpo_jax.hf.tensors import Tensors
from dpo_jax.model.decoder import Model
from tests.support.reward_folders import (
    CLASSES,
    FAMILIES,
    ONE_LABEL,
    PAD,
    all_tensors,
    causal_folder,
    config_of,
    moved,
    reward,
)
from tests.support.tiny_folders import random_tensors, write_config
from tests.support.tiny_rows import byte_tokenizer


def test_tensors_files_and_dtypes_are_those_of_the_language_model(tmp_path):
    """Odd file names, one float32 tensor among bfloat16 ones, a buffer: all stay, and the score is the last."""
    source = write_config(tmp_path / "source", "llama", architectures=["LlamaForCausalLM"], pad_token_id=PAD)
    arrays = random_tensors(source, "bfloat16")
    arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(np.float32)
    arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.full(4, 0.25, np.float32)
    weight_map = {name: f"part.{i % 2}.safetensors" for i, name in enumerate(arrays)}
    # safetensors puts the wide ones first: the first tensor of the folder is the buffer.
    weight_map["model.layers.0.self_attn.rotary_emb.inv_freq"] = "part.0.safetensors"
    for file in set(weight_map.values()):
        part = {name: arrays[name] for name in arrays if weight_map[name] == file}
        save_file(part, source / file, metadata={"format": "pt", "made_by": file})
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_hf(moved(reward(source)), tmp_path / "export", source)
    index = json.loads((tmp_path / "export/model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        **{name: file for name, file in weight_map.items() if name != "lm_head.weight"},
        "score.weight": "part.1.safetensors",
    }
    found = all_tensors(tmp_path / "export")
    assert list(found)[-1] == "score.weight" and found["score.weight"].dtype == arrays["lm_head.weight"].dtype
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in found.values())
    for name, array in found.items():
        if name != "score.weight":
            assert array.dtype == arrays[name].dtype and array.tobytes() == arrays[name].tobytes()
    assert Tensors(tmp_path / "export").metadata["part.0.safetensors"]["made_by"] == "part.0.safetensors"


@pytest.mark.parametrize("alone", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
def test_a_file_that_held_the_head_alone_holds_the_score(alone, tmp_path):
    source = causal_folder(tmp_path / "source")
    arrays = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    other = {"1": "model-00002-of-00002.safetensors", "2": "model-00001-of-00002.safetensors"}[alone[10]]
    weight_map = {name: alone if name == "lm_head.weight" else other for name in arrays}
    for file in (alone, other):
        save_file({name: arrays[name] for name in arrays if weight_map[name] == file}, source / file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_hf(moved(reward(source)), tmp_path / "export", source)
    assert load_file(tmp_path / "export" / alone).keys() == {"score.weight"}
    assert load_file(tmp_path / "export" / other).keys() == arrays.keys() - {"lm_head.weight"}
    assert load_hf(tmp_path / "export").params["score"]["kernel"].any()


def test_dtype_and_shards_can_be_chosen_for_a_reward_model(tmp_path):
    source = causal_folder(tmp_path / "source")
    save_hf(moved(reward(source)), tmp_path / "export", source, dtype="bfloat16", max_shard_bytes=20_000)
    assert {array.dtype.name for array in all_tensors(tmp_path / "export").values()} == {"bfloat16"}
    assert len(list((tmp_path / "export").glob("*.safetensors"))) > 1
    config = config_of(tmp_path / "export")
    assert config["dtype"] == "bfloat16" and config["architectures"] == ["LlamaForSequenceClassification"]
    capped = convert.main(["export", str(tmp_path / "export"), str(tmp_path / "wide"), "--dtype", "float32"])
    assert capped == 0 and load_hf(tmp_path / "wide").spec.scalar_head


def test_the_config_becomes_that_of_a_classifier_with_one_label(tmp_path):
    source = causal_folder(tmp_path / "source", num_labels=5, problem_type="single_label_classification")
    save_hf(reward(source), tmp_path / "export", source)
    before, after = config_of(source), config_of(tmp_path / "export")
    for name in ("num_labels", "problem_type", "architectures"):
        del before[name]
    assert after == {**before, **ONE_LABEL, "architectures": ["LlamaForSequenceClassification"]}
    assert not (tmp_path / "export/generation_config.json").exists()
    for name in ("tokenizer.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "LICENSE"):
        assert (tmp_path / "export" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_that_names_no_class_gets_the_familys(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = causal_folder(tmp_path / "source", family)
    (source / "config.json").write_text(json.dumps({**config_of(source), "architectures": None}))
    save_hf(reward(source), tmp_path / "export", source)
    assert config_of(tmp_path / "export")["architectures"] == [CLASSES[family]]
    pytest.importorskip("torch")
    assert hasattr(transformers, CLASSES[family])


def test_every_family_that_has_a_classifier_gets_its_own(shared):
    pytest.importorskip("torch")
    import transformers

    found = {}
    for folder in sorted((shared / "families").iterdir()):
        try:
            spec = read_spec(folder, scalar_head=True)
        except UserError as error:
            found[folder.name] = "no ...ForSequenceClassification of this family" in str(error)
        else:
            (name,) = reward_config(spec, folder)["architectures"]
            found[folder.name] = hasattr(transformers, name) and name
    assert all(found.values()) and found["gpt2"] == "GPT2ForSequenceClassification"


BYTES = {"vocab_size": 264}
"""`byte_tokenizer` has 264 tokens: 0 <pad>, 1 <eos>, 3 <|im_end|>."""


@pytest.mark.parametrize(
    ("config", "pad_token", "wanted"),
    [
        ({"pad_token_id": 7}, "<pad>", 7),
        ({"pad_token_id": 0}, None, 0),
        ({"pad_token_id": None}, "<pad>", 0),
        ({"pad_token_id": ...}, "<pad>", 0),
        ({"pad_token_id": -1}, "<pad>", 0),
        ({"pad_token_id": 264}, "<pad>", 0),
        ({"pad_token_id": None, "eos_token_id": 5}, None, 5),
        ({"pad_token_id": None, "eos_token_id": [1, 5, 6]}, None, 5),
        ({"pad_token_id": None, "eos_token_id": [1]}, None, 1),
        ({"pad_token_id": None, "eos_token_id": None}, None, 1),
    ],
)
def test_a_padding_token_is_found(config, pad_token, wanted, tmp_path):
    source = causal_folder(tmp_path / "source", **BYTES, **config)
    (source / "chat_template.jinja").unlink()
    tokenizer = byte_tokenizer()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    tokenizer.pad_token = pad_token
    tokenizer.save_pretrained(source)
    save_hf(reward(source), tmp_path / "export", source)
    assert config_of(tmp_path / "export")["pad_token_id"] == wanted
    ends = config.get("eos_token_id", 2)
    noted = "may also end a text" in (tmp_path / "export/README.md").read_text()
    assert noted == (wanted in (ends if isinstance(ends, list) else [ends]))


def test_a_folder_without_a_tokenizer_pads_with_what_ends_a_text(tmp_path):
    source = causal_folder(tmp_path / "source", pad_token_id=None)
    model = reward(source)
    with pytest.raises(UserError, match="tokenizer cannot be loaded"):
        save_hf(model, tmp_path / "export", source)
    assert not (tmp_path / "export").exists()
    (source / "tokenizer.json").unlink()
    save_hf(model, tmp_path / "export", source)
    assert config_of(tmp_path / "export")["pad_token_id"] == 2
    (source / "config.json").write_text(json.dumps({**config_of(source), "eos_token_id": None}))
    save_hf(model, tmp_path / "none", source)
    assert config_of(tmp_path / "none")["pad_token_id"] is None
    assert "scores one text at a time" in (tmp_path / "none/README.md").read_text()


@pytest.mark.parametrize("card", [None, {"datasets": ["org/pairs"], "metrics": {"loss": 0.5}}])
def test_the_card_says_that_it_is_a_reward_model(card, tmp_path):
    source = causal_folder(tmp_path / "Tiny-1")
    save_hf(reward(source), tmp_path / "export", source, card=card)
    text = (tmp_path / "export/README.md").read_text()
    front = yaml.safe_load(re.match(r"---\n(.*?\n)---\n\n# ", text, re.DOTALL).group(1))
    assert front["pipeline_tag"] == "text-classification" and front["license"] == "apache-2.0"
    assert "dpo" not in front["tags"] and "DPO" not in text and "rafailov" not in text
    trained = "# Tiny-1 (reward model)" in text and "Bradley-Terry" in text and front["tags"][0] == "reward-model"
    assert trained == (card is not None) and "may also end" not in text


def test_a_model_is_written_only_like_a_folder_of_its_own(tmp_path):
    source = causal_folder(tmp_path / "source")
    model = reward(source)
    save_hf(model, tmp_path / "export", source)
    with pytest.raises(UserError, match="scalar_head differ; give its own folder"):
        save_hf(load_hf(source), tmp_path / "no", tmp_path / "export")
    with pytest.raises(UserError, match="embed_scale differ"):
        save_hf(Model(dataclasses.replace(model.spec, embed_scale=4.0), model.params), tmp_path / "no", source)
    with pytest.raises(ValueError, match="leaf 'score/kernel' of params has shape None"):
        save_hf(Model(model.spec, load_hf(source).params | {"head": {}}), tmp_path / "no", source)
    assert not (tmp_path / "no").exists()
