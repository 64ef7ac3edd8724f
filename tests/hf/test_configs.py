"""A folder's config is read once, and again when it changes."""

import json

import transformers

from dpo_jax.hf import configs, tensors
from dpo_jax.hf.checkpoint import load_hf
from dpo_jax.hf.configs import family_of, is_wrapper, read_spec
from tests.support.tiny_folders import write_config, write_folder


def test_a_config_is_read_once(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "model", "llama", "float32")
    for cache in (tensors._parsed, configs._auto_config):
        cache.cache_clear()
    parsed, built = [], []
    loads, build = json.loads, transformers.AutoConfig.from_pretrained

    def counted(text, **more):
        parsed.extend([text] * ('"model_type"' in str(text)))  # not the headers of tensors
        return loads(text, **more)

    monkeypatch.setattr(tensors.json, "loads", counted)
    monkeypatch.setattr(
        transformers.AutoConfig, "from_pretrained", lambda where, **more: built.append(where) or build(where, **more)
    )
    spec = load_hf(folder).spec
    before = len(parsed)
    assert before > 0 and len(built) == 1
    assert read_spec(folder) == spec and family_of(folder) and not is_wrapper(folder)
    assert load_hf(folder).spec == spec
    assert (len(parsed), len(built)) == (before, 1)


def test_a_config_that_changes_is_read_again(tmp_path):
    folder = write_config(tmp_path / "model", "llama", num_hidden_layers=2)
    assert len(read_spec(folder).layers) == 2
    found = tensors.read_json(folder, "config.json")
    found["num_hidden_layers"] = 9  # what was handed out is the caller's own
    assert tensors.read_json(folder, "config.json")["num_hidden_layers"] == 2
    write_config(folder, "llama", num_hidden_layers=3)
    assert len(read_spec(folder).layers) == 3
