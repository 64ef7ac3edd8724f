"""Which kernels an adapter changes, of every family; and its factors as leaves and as tensors."""

import functools
import json

import jax
import numpy as np
import pytest

from dpo_jax import trees
from dpo_jax.errors import UserError
from dpo_jax.hf import adapters as folders
from dpo_jax.hf.checkpoint import entries_of
from dpo_jax.hf.configs import read_spec
from dpo_jax.model import adapters
from dpo_jax.model.decoder import abstract_params, stacks
from dpo_jax.model.settings import AdapterSettings
from tests.support.family_configs import CONFIGS
from tests.support.tiers import one_of_each_kind
from tests.support.tiny_folders import write_config


@functools.cache
def family(name, root):
    kind, fields = CONFIGS[name]
    folder = root / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **fields}))
    spec = read_spec(folder)
    layers = {stack: numbers for stack, _, numbers in stacks(spec)}
    return spec, entries_of(spec, folder), layers, kind


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


def resolved(found, **settings):
    _, entries, layers, kind = found
    return folders.resolve(AdapterSettings(rank=3, **settings), entries, layers, kind)


def shapes_of(spec):
    return {path: leaf.shape for path, leaf in trees.paths(abstract_params(spec)).items()}


@pytest.mark.parametrize("name", one_of_each_kind(CONFIGS))
def test_leaves_and_tensors_are_the_same_adapter(root, name):
    """Of attention and the MLPs of every family; of experts and routers where there are any. Each matrix of attention
    and of an MLP is taken, and its factors have the sizes of the hub's tensor."""
    found = family(name, root)
    spec, entries, layers, _ = found
    groups = {one.kind for one in folders.modules(entries)} & {folders.ALL_LINEAR, folders.EXPERTS, folders.ROUTER}
    for group in sorted(groups):
        made = resolved(found, targets=group)
        wanted = {p.leaf for one in folders.modules(entries) if one.kind == group for p in one.entry.parts}
        assert made.changes.keys() == wanted
        fresh = adapters.fresh(made, shapes_of(spec), jax.random.key(0))
        rng = np.random.default_rng(0)
        leaves = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), fresh)  # noqa: B023
        factors = folders.to_factors(made, trees.paths(leaves), entries)
        back = folders.to_leaves(factors, made, shapes_of(spec), entries)
        jax.tree.map(np.testing.assert_array_equal, back, leaves)
        assert folders.described(factors, entries, layers).changes == made.changes
        sizes = {entry.name: sorted(entry.shape[-2:]) for entry in entries}
        for (tensor, _), factor in factors.items():
            assert sorted((factor.b.shape[0], factor.a.shape[1])) == sizes[tensor]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = write_config(tmp_path_factory.mktemp("llama") / "m", "llama")
    spec = read_spec(folder)
    return spec, entries_of(spec, folder), {name: numbers for name, _, numbers in stacks(spec)}, "llama"


TARGETS = {
    "q_proj": {"query"},
    "self_attn.o_proj": {"output"},
    "all-linear": {"query", "key", "value", "output", "gate", "up", "down"},
    "default": {"query", "value"},
    r".*layers\.1\..*(k|v)_proj": {"key", "value"},
}


@pytest.mark.parametrize("targets", TARGETS)
def test_targets_are_named_as_in_peft(llama, targets):
    made = resolved(llama, targets=targets)
    assert {path.split("/")[-2] for path in made.changes} == TARGETS[targets]
    both = resolved(llama, targets=(targets, "down_proj")) if targets != r".*layers\.1\..*(k|v)_proj" else made
    assert set(both.changes) >= set(made.changes)


def test_layers_patterns_and_scales(llama):
    """The first pattern that fits decides, as in PEFT; scales are alpha / rank, or by its root."""
    last = max(number for numbers in llama[2].values() for number in numbers)
    made = resolved(
        llama,
        alpha=6.0,
        layers=(0, last),
        rank_pattern={rf"layers\.{last}\.self_attn\.q_proj": 7, "q_proj": 2},
        alpha_pattern={"v_proj": 1.0},
    )
    (query,) = [one for path, one in made.changes.items() if path.endswith("query/kernel")]
    (value,) = [one for path, one in made.changes.items() if path.endswith("value/kernel")]
    assert query.ranks == (2, *(0,) * (last - 1), 7) and query.scales == (3.0, *(0.0,) * (last - 1), 6.0 / 7)
    assert value.ranks[0] == 3 and value.scales[0] == 1.0 / 3
    rooted = resolved(llama, alpha=6.0, rslora=True)
    assert all(one.scales[0] == pytest.approx(6.0 / 3**0.5) for one in rooted.changes.values())


WRONG = {
    "names nothing": ({"targets": "q_porj"}, "did you mean q_proj"),
    "no expression": ({"targets": "(q_proj"}, "is no regular expression"),
    "no pattern": ({"rank_pattern": {"(q_proj": 4}}, "adapter.rank_pattern: '(q_proj' is no regular expression"),
    "matches nothing": ({"targets": r".*\.nothing"}, "matches no module"),
    "no experts": ({"targets": "experts"}, "is no module that can be adapted"),
    "no such layer": ({"layers": (0, 99)}, "adapter.layers: 99"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_not_there_is_named(llama, what):
    settings, says = WRONG[what]
    with pytest.raises(UserError, match="adapter") as error:
        resolved(llama, **settings)
    assert says in str(error.value)


def test_experts_have_no_dropout_and_are_taken_together(root):
    found = family("mixtral", root)
    with pytest.raises(UserError, match="adapter.dropout"):
        resolved(found, targets="experts", dropout=0.1)
    with pytest.raises(UserError, match="adapter.dora"):
        resolved(found, targets="experts", dora=True)
    with pytest.raises(UserError, match="take all experts of a layer"):
        resolved(found, targets=r".*experts\.0\.w1")
