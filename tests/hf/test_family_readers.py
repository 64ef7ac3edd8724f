"""Configs of every family, key by key: what changes PyTorch's model changes the spec or is refused."""

import copy
import functools
import json
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dpo_jax.errors import UserError
from dpo_jax.hf.checkpoint import load_hf
from dpo_jax.hf.configs import quiet, read_spec
from dpo_jax.hf.keys import REQUIRED
from tests.support.family_configs import CONFIGS, FULL, SLIDING
from tests.support.family_models import LOGITS, our_logits, own, raw_config, theirs, torch_logits
from tests.support.tiers import by_day

pytest.importorskip("torch")
SAME = 2e-5
"""Largest difference of PyTorch's logits that is rounding: GPT-2's `reorder_and_upcast_attn` makes one of 9e-6."""
SKIPPED = ("architectures", "model_type", "dtype", "transformers_version")
FAMILIES = {kind: name for name, (kind, _) in reversed(CONFIGS.items())}
"""The first of our configs for each family."""
ADDED = {
    **REQUIRED,
    "rotary_pct": 1.0,
    "rotary_emb_base": 10000,
    "rope_ratio": 1.0,
    "rope_local_base_freq": 10000.0,
    "final_logit_softcapping": None,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "clip_qkv": None,
    "scale_embeddings": None,
}
"""Keys that a config may have though its family does not, and values that say nothing."""
ROPES = {
    "partial": {"partial_rotary_factor": 0.5},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    "none such": {"rope_type": "helix"},
}
TURNED = "llama cohere gpt_neox glm stablelm deepseek_v3 qwen3_5_text gemma3_text gemma4_text olmo3".split()
"""Families whose readers take rotations in ways of their own, and one of the rest."""
by_config = pytest.mark.parametrize("name", by_day(CONFIGS, FAMILIES.values()))
by_family = pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)


def another(value: Any) -> Any:
    """Another value of the same kind."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return 1.5 * value + 0.125
        case str():
            return {FULL: SLIDING, SLIDING: FULL}.get(value, "other")
        case [first, *rest]:
            return value[::-1] if value[::-1] != value else [another(first), *rest]
    return 7


def entries(table: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every key of a config, those of nested tables too, with its value."""
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from entries(value, (*path, key))
        elif key not in SKIPPED:
            yield (*path, key), value


def changed(config: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    config = copy.deepcopy(config)
    table = config
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = value
    return config


def write(folder, config: dict[str, Any]):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def theirs_as(folder, name: str) -> np.ndarray | None:
    """PyTorch's logits with a folder's config and the weights of ours; None where it has no such model."""
    with quiet():
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            config = AutoConfig.from_pretrained(folder)
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
            model.load_state_dict(theirs(own(name).path).state_dict())
            return torch_logits(model, own(name).ids)
        except Exception:  # whatever a model raises that its config does not fit
            return None


@functools.cache
def theirs_of(name: str) -> np.ndarray:
    """PyTorch's logits with our own config."""
    return torch_logits(theirs(own(name).path), own(name).ids)


def is_seen(folder, name: str) -> bool:
    """Whether this config is refused, or read as another model than ours, or is the same model to PyTorch."""
    try:
        if read_spec(folder) != read_spec(own(name).path):
            return True
    except UserError:
        return True
    found = theirs_as(folder, name)
    return found is None or np.abs(found - theirs_of(name)).max() <= SAME


@by_config
def test_every_key_matters_or_is_harmless(name, tmp_path):
    config = raw_config(own(name).path)
    read_spec(own(name).path)
    passed_over = []
    for path, value in entries(config):
        for other in (7, True) if value is None else (another(value),):
            if not is_seen(write(tmp_path / "changed", changed(config, path, other)), name):
                passed_over.append((".".join(path), value, other))
    assert passed_over == []


@by_family
def test_keys_of_other_families_are_not_passed_over(name, tmp_path):
    config = raw_config(own(name).path)
    for key, value in ADDED.items():
        if key not in config:
            assert is_seen(write(tmp_path / "added", {**config, key: another(value)}), name), key


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("falcon_new_one_norm", "parallel_attn", False),
        ("falcon_heads", "num_kv_heads", 2),
        ("deepseek_v3", "num_key_value_heads", 2),
    ],
)
def test_what_no_model_of_pytorchs_can_run_is_refused_by_key(name, key, value, tmp_path):
    folder = write(tmp_path / "odd", {**raw_config(own(name).path), key: value})
    with pytest.raises(UserError, match=f"{key} = {json.dumps(value)}: "):
        read_spec(folder)
    assert theirs_as(folder, name) is None


@by_family
def test_an_unknown_key_is_refused_by_name(name, tmp_path):
    config = raw_config(own(name).path)
    with pytest.raises(UserError, match="fresh_softcap = 30.0: unknown key"):
        read_spec(write(tmp_path / "unknown", {**config, "fresh_softcap": 30.0}))
    tables = [path[:-1] for path, _ in entries(config) if path[0] == "rope_parameters" and len(path) > 1]
    for path in dict.fromkeys(tables):
        where = r"\.".join((*path, "fresh_factor"))
        with pytest.raises(UserError, match=f"{where} = 2.0: unknown key"):
            read_spec(write(tmp_path / "unknown", changed(config, (*path, "fresh_factor"), 2.0)))


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("name", TURNED)
def test_a_rotation_is_that_of_pytorch_or_refused(name, rope, tmp_path):
    folder = tmp_path / "turned"
    shutil.copytree(own(name).path, folder)
    write(folder, with_rope(raw_config(folder), ROPES[rope]))
    try:
        read_spec(folder)
    except UserError:
        return
    wanted = theirs_as(folder, name)
    if wanted is not None:
        np.testing.assert_allclose(our_logits(load_hf(folder), own(name).ids), wanted, rtol=0, atol=LOGITS)


def with_rope(config: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The config with these fields in each of its tables of rotations, and only what all kinds have beside them."""
    share = {} if "partial_rotary_factor" in fields else {"partial_rotary_factor"}
    ropes = config["rope_parameters"]
    for table in [table for table in ropes.values() if isinstance(table, dict)] or [ropes]:
        kept = {key: table[key] for key in ("rope_theta", *share) if key in table}
        table.clear()
        table.update({"rope_type": "default", **kept, **fields})
    return config
