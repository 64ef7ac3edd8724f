"""Hugging Face tensors <-> leaves of the parameter tree: one table, read both ways.

A rule ties a Hugging Face name (`{i}` is the layer) to a leaf, and a transform to how the numbers are laid out:
`pack(unpack(x)) == x`. Every leaf must be claimed by a rule, and every tensor of a folder by a leaf, by an alias of
one, or by the table of tensors that are carried along; anything else is an error that names it.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax import trees
from dpo_jax.hf.tensors import TensorInfo
from dpo_jax.model.decoder import abstract_params
from dpo_jax.model.spec import DecoderSpec
from dpo_jax.settings import UserError

Shape = tuple[int, ...]
Index = tuple[slice, ...]
STACKED = "blocks/"
SCORE = "score.weight"


class Transform(NamedTuple):
    """How a tensor of a folder (`x`) and one layer's leaf hold the same numbers."""

    unpack: Callable[[np.ndarray], np.ndarray]
    pack: Callable[[np.ndarray], np.ndarray]
    shape: Callable[[Shape], Shape]
    """Shape in the folder of a leaf of this shape."""
    index: Callable[[Index], Index]
    """The part of the folder's tensor that unpacks to this part of the leaf."""


IDENTITY = Transform(unpack=lambda x: x, pack=lambda x: x, shape=lambda shape: shape, index=lambda index: index)
TRANSPOSE = Transform(
    unpack=lambda x: x.T, pack=lambda x: x.T, shape=lambda shape: shape[::-1], index=lambda index: index[::-1]
)


class Rule(NamedTuple):
    """One row of the table."""

    name: str
    leaf: str
    transform: Transform = IDENTITY


def _dense(name: str, leaf: str) -> tuple[Rule, Rule]:
    """PyTorch keeps a linear layer's weight as [outputs, inputs], the tree as [inputs, outputs]."""
    return Rule(f"{name}.weight", f"{leaf}/kernel", TRANSPOSE), Rule(f"{name}.bias", f"{leaf}/bias")


_BLOCK = "model.layers.{i}"
LLAMA: tuple[Rule, ...] = (
    Rule("model.embed_tokens.weight", "embed/embedding"),
    Rule(f"{_BLOCK}.input_layernorm.weight", "blocks/attention_norm/scale"),
    *_dense(f"{_BLOCK}.self_attn.q_proj", "blocks/attention/query"),
    *_dense(f"{_BLOCK}.self_attn.k_proj", "blocks/attention/key"),
    *_dense(f"{_BLOCK}.self_attn.v_proj", "blocks/attention/value"),
    *_dense(f"{_BLOCK}.self_attn.o_proj", "blocks/attention/output"),
    Rule(f"{_BLOCK}.self_attn.q_norm.weight", "blocks/attention/query_norm/scale"),
    Rule(f"{_BLOCK}.self_attn.k_norm.weight", "blocks/attention/key_norm/scale"),
    Rule(f"{_BLOCK}.post_attention_layernorm.weight", "blocks/mlp_norm/scale"),
    *_dense(f"{_BLOCK}.mlp.gate_proj", "blocks/mlp/gate"),
    *_dense(f"{_BLOCK}.mlp.up_proj", "blocks/mlp/up"),
    *_dense(f"{_BLOCK}.mlp.down_proj", "blocks/mlp/down"),
    Rule("model.norm.weight", "final_norm/scale"),
    Rule("lm_head.weight", "head/embedding"),
    Rule("lm_head.bias", "head/bias"),
    Rule(SCORE, "score/kernel", TRANSPOSE),
)
"""Names of llama and of every family that follows it; rules of leaves that a spec does not have are not used."""

TIED_ALIASES: tuple[Rule, ...] = (Rule("lm_head.weight", "embed/embedding"),)
"""Second names of a leaf, allowed where a head is tied to the embedding; the numbers must be the same."""

CARRIED: tuple[str, ...] = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
"""Tensors that hold no weights: not read, and exported as they came."""


class Entry(NamedTuple):
    """A tensor name and its place in the tree: a leaf, or layer `layer` of a stacked one; `shape` is the folder's."""

    name: str
    leaf: str
    layer: int | None
    transform: Transform
    shape: Shape


def names(spec: DecoderSpec, rules: Sequence[Rule] = LLAMA) -> list[Entry]:
    """Every tensor that a folder of this decoder holds, in the order of the tree's leaves.

    Raises:
      ValueError: no rule claims a leaf, or two rules do.
    """
    leaves = trees.paths(abstract_params(spec))
    return [entry for leaf, value in leaves.items() for entry in _entries(_only(rules, leaf), value.shape)]


def aliases(spec: DecoderSpec, rules: Sequence[Rule] = TIED_ALIASES) -> list[Entry]:
    """Further names under which a folder may hold a leaf once more."""
    leaves = trees.paths(abstract_params(spec))
    tied = spec.tied and not spec.scalar_head
    return [entry for rule in rules if tied for entry in _entries(rule, leaves[rule.leaf].shape)]


def _only(rules: Sequence[Rule], leaf: str) -> Rule:
    found = [rule for rule in rules if rule.leaf == leaf]
    if len(found) != 1:
        raise ValueError(f"{len(found)} rules of the names table claim leaf {leaf!r}; exactly one must")
    return found[0]


def _entries(rule: Rule, shape: Shape) -> Iterable[Entry]:
    if not rule.leaf.startswith(STACKED):
        return [Entry(rule.name, rule.leaf, None, rule.transform, rule.transform.shape(shape))]
    layers, *rest = shape
    inner = rule.transform.shape(tuple(rest))
    return [Entry(rule.name.format(i=i), rule.leaf, i, rule.transform, inner) for i in range(layers)]


class Claims(NamedTuple):
    """Whose every tensor of a folder is: an entry of the table, the second name of one, or carried along."""

    entries: dict[str, Entry]
    copies: dict[str, Entry]
    carried: tuple[str, ...]


def claim(spec: DecoderSpec, infos: dict[str, TensorInfo], where: str) -> Claims:
    """Holds a folder's tensors against the table, both ways.

    Raises:
      UserError: a tensor is missing, is claimed by nobody, or has another shape than the config says.
    """
    if SCORE in infos and not spec.scalar_head:
        raise UserError(
            f"{where}: tensor {SCORE!r} is the head of a reward model, which has none over the vocabulary; give a "
            "language model, or name a ...ForSequenceClassification in architectures of config.json"
        )
    table = {entry.name: entry for entry in names(spec)}
    for alias in aliases(spec):
        first = next(name for name, entry in table.items() if entry.leaf == alias.leaf)
        if alias.name in infos and first not in infos:  # some tools keep only the second name of a shared tensor
            table = {alias.name if name == first else name: entry for name, entry in table.items()}
    second = {entry.name: entry for entry in aliases(spec) if entry.name not in table}
    missing = [name for name in table if name not in infos]
    if missing:
        raise UserError(f"{where}: tensor {missing[0]!r} is missing ({len(missing)} are); config.json asks for it")
    entries = {name: table[name] for name in infos if name in table}
    copies = {name: second[name] for name in infos if name in second}
    carried = [name for name in infos if name not in table and name not in second]
    unknown = [name for name in carried if not any(re.fullmatch(pattern, name) for pattern in CARRIED)]
    if unknown:
        raise UserError(
            f"{where}: tensor {unknown[0]!r} ({len(unknown)} such) belongs to nothing that config.json describes; "
            "it would be lost, so the folder is refused"
        )
    for name, entry in {**entries, **copies}.items():
        if infos[name].shape != entry.shape:
            raise UserError(
                f"{where}: tensor {name!r} has shape {list(infos[name].shape)}, "
                f"config.json asks for {list(entry.shape)}"
            )
    return Claims(entries, copies, tuple(carried))
