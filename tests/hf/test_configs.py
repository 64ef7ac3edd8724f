"""A folder's config is read once, and again when it changes."""

import json

import transformers

from dpo_jax.hf import tensors
from dpo_jax.hf.checkpoint import load_hf, save_hf
from dpo_jax.hf.configs import read_spec
from tests.support.tiny_folders import write_config, write_folder


def test_a_load_and_an_export_read_each_config_once(tmp_path, monkeypatch):
    write_folder(tmp_path / "source", "llama", "float32")
    parsed, built = [], []
    loads, build = json.loads, transformers.AutoConfig.from_pretrained

    def counted_loads(text, **more):
        parsed.append(text)
        return loads(text, **more)

    def counted_build(folder, **more):
        built.append(folder)
        return build(folder, **more)

    monkeypatch.setattr(tensors.json, "loads", counted_loads)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", counted_build)
    save_hf(load_hf(tmp_path / "source"), tmp_path / "target", like=tmp_path / "source")
    ours = [text for text in parsed if "LlamaForCausalLM" in str(text)]
    transformers_own = len(built)  # it reads the file itself, once for each config that it builds
    assert len(ours) <= 2 + transformers_own and transformers_own <= 2  # the source's, and the reopened export's


def test_a_config_that_changes_is_read_again(tmp_path):
    folder = write_config(tmp_path / "model", "llama", num_hidden_layers=2)
    assert len(read_spec(folder).layers) == 2
    found = tensors.read_json(folder, "config.json")
    found["num_hidden_layers"] = 9  # what was handed out is the caller's own
    assert tensors.read_json(folder, "config.json")["num_hidden_layers"] == 2
    write_config(folder, "llama", num_hidden_layers=3)
    assert len(read_spec(folder).layers) == 3
