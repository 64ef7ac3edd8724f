"""Every family: PyTorch's logits, bit for bit in both directions, and every leaf claimed by every table."""

import math

import numpy as np
import pytest

from dpo_jax import sharding, trees
from dpo_jax.hf import mapping
from dpo_jax.hf.checkpoint import save_hf, scheme_of
from dpo_jax.hf.configs import read_spec
from dpo_jax.hf.families import FAMILIES
from dpo_jax.hf.tensors import Tensors, changed_files
from dpo_jax.model.decoder import abstract_params
from dpo_jax.training.optimizer import decay_mask
from tests.support.family_configs import CONFIGS
from tests.support.family_models import (
    KINDS,
    LOGITS,
    Folder,
    golden,
    our_logits,
    ours,
    own,
    read,
    reloaded,
    theirs,
    torch_logits,
)
from tests.support.tiers import MIXERS, by_day, one_of_each_kind

pytest.importorskip("torch")
GOLDEN = (
    "apertus arcee bloom cohere cohere2 deepseek_v3 ernie4_5 exaone4 falcon_7b falcon_new gemma gemma2 gemma3_text "
    "gemma4_moe gemma4_text glm glm4 gpt2 gpt_bigcode gpt_neox gpt_neox_serial gpt_oss gptj granite helium "
    "hunyuan_v1_dense llama llama_bias ministral ministral3 mistral mixtral nemotron olmo olmo2 olmo3 olmoe opt "
    "opt_350m phi phi3 qwen2 qwen2_moe qwen3 qwen3_5_text qwen3_moe seed_oss smollm3 stablelm stablelm_par starcoder2"
).split()


@pytest.fixture(params=by_day(GOLDEN, MIXERS))
def kept(request, shared) -> Folder:
    """A folder that was written once, by another version of this test's generator."""
    return golden(shared / "families" / request.param)


@pytest.fixture(params=one_of_each_kind(CONFIGS))
def fresh(request) -> Folder:
    """A folder that PyTorch has just written."""
    return own(request.param)


@pytest.fixture(params=list(CONFIGS))
def any_fresh(request) -> Folder:
    """The same of every config by day too, for what compiles nothing and has a table for each family."""
    return own(request.param)


def check_logits(folder: Folder) -> None:
    found = our_logits(ours(folder.path), folder.ids)
    np.testing.assert_allclose(found, folder.logits, rtol=0, atol=LOGITS)


def check_export(folder: Folder, target) -> None:
    """The same tensors in the same files; PyTorch finds each where it looks for it, and computes the same bits."""
    save_hf(ours(folder.path), target, folder.path)
    assert changed_files(target) == []
    assert Tensors(target).infos == Tensors(folder.path).infos  # names, dtypes, shapes, files
    before, after = read(folder.path), read(target)
    assert {name: array.tobytes() for name, array in after.items()} == {n: a.tobytes() for n, a in before.items()}
    model, info = reloaded(target)
    assert not any(info.values()), info
    np.testing.assert_array_equal(torch_logits(model, folder.ids), torch_logits(theirs(folder.path), folder.ids))


def test_logits_are_those_that_pytorch_wrote(kept):
    check_logits(kept)


def test_logits_are_those_of_pytorch(fresh):
    check_logits(fresh)


def test_a_kept_folder_comes_back_bit_for_bit(kept, tmp_path):
    check_export(kept, tmp_path / "export")


def test_a_fresh_folder_comes_back_bit_for_bit(fresh, tmp_path):
    check_export(fresh, tmp_path / "export")


def test_every_family_is_among_them():
    assert {kind for kind, _ in CONFIGS.values()} == FAMILIES.keys()
    assert KINDS.keys() <= CONFIGS.keys()


# ------------------------------------------------------------------------------------------------ tables


def test_every_leaf_is_claimed_once(any_fresh):
    """By a sharding rule, a rule for weight decay, and exactly one place in the folder; nothing is left over."""
    spec = read_spec(any_fresh.path)
    params = abstract_params(spec)
    leaves = trees.paths(params)
    assert trees.paths(sharding.param_shardings(params, sharding.make_mesh())).keys() == leaves.keys()
    decays = trees.paths(decay_mask(params))
    assert decays.keys() == leaves.keys()
    claims = mapping.claim(spec, Tensors(any_fresh.path).infos, "", scheme_of(spec, any_fresh.path))
    assert claims.carried == ()
    held = dict.fromkeys(leaves, 0)
    for part in (part for entry in claims.entries.values() for part in entry.parts):
        held[part.leaf] += math.prod(part.shape)
    assert held == {leaf: math.prod(value.shape) for leaf, value in leaves.items()}


def test_matrices_decay_and_vectors_do_not(any_fresh):
    """As in transformers' Trainer, which leaves out biases and norms; here also all other vectors of a layer."""
    params = abstract_params(read_spec(any_fresh.path))
    decays = trees.paths(decay_mask(params))
    for leaf, value in trees.paths(params).items():
        depth = value.ndim - leaf.startswith("blocks/")
        vector = depth < 2 or leaf.endswith(("/bias", "norm/scale"))
        assert decays[leaf] != vector, leaf


def test_packing_inverts_unpacking(any_fresh):
    """For the rows of the table alone, with numbers that name each element's place."""
    spec = read_spec(any_fresh.path)
    for entry in mapping.names(spec, scheme_of(spec, any_fresh.path).naming):
        whole = np.arange(math.prod(entry.shape)).reshape(entry.shape)
        parts = [entry.unpack(whole, number) for number in range(len(entry.parts))]
        assert [part.shape for part in parts] == [part.shape for part in entry.parts], entry.name
        np.testing.assert_array_equal(entry.pack(parts), whole, err_msg=entry.name)


def test_a_tensor_too_many_and_one_too_few_are_named(any_fresh):
    spec, infos = read_spec(any_fresh.path), Tensors(any_fresh.path).infos
    scheme = scheme_of(spec, any_fresh.path)
    last = list(infos)[-1]
    for changed, name in (
        ({key: info for key, info in infos.items() if key != last}, last),
        ({**infos, f"{last}_more": infos[last]}, f"{last}_more"),
    ):
        with pytest.raises(ValueError, match=f"tensor '{name}'"):
            mapping.claim(spec, changed, "somewhere", scheme)
