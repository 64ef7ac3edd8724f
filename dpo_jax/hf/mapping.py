"""Hugging Face tensors <-> leaves of the parameter tree: the naming table of the family, read both ways.

A tensor of a folder holds one leaf, an entry of a stacked one (a layer's, or one expert's of a layer), or those of
several leaves side by side: `unpack` and `pack` are inverse. Every leaf must be claimed by a name, and every tensor of
a folder by a leaf, by a second name of one, or by the patterns of tensors that are carried along; anything else is an
error that names it.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from dpo_jax import trees
from dpo_jax.errors import UserError
from dpo_jax.hf.names import At, Naming
from dpo_jax.hf.tensors import DTYPES, TensorInfo
from dpo_jax.model.decoder import abstract_params, stacks
from dpo_jax.model.spec import Attention, DecoderSpec, Layer

Shape = tuple[int, ...]
Index = tuple[slice, ...]
STACKED = "blocks/"
SCORE = "score.weight"
SUFFIXES = {"kernel": ".weight", "scale": ".weight", "embedding": ".weight", "bias": ".bias"}
"""What a module's name is followed by, for each of its leaves."""
CARRIED: tuple[str, ...] = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
"""Tensors that hold no weights: not read, and exported as they came."""


SPARE = 10_000
"""Tensors that a folder may lack and is told the first of by name."""


class LeafPart(NamedTuple):
    """A leaf, or the entry `index` of its leading axes; `shape` is that of the part."""

    leaf: str
    index: tuple[int, ...]
    shape: Shape


class TensorEntry(NamedTuple):
    """A tensor of the folder, and the parts of the tree that it holds.

    The folder has matrices as [outputs, inputs] where it is `turned`, the tree as [inputs, outputs]. The outputs of
    several parts stand side by side, `groups` times in a row, each time with a part of each. Where `column`, the folder
    has an axis of size one more.
    """

    name: str
    parts: tuple[LeafPart, ...]
    turned: bool = False
    groups: int = 1
    column: bool = False

    @property
    def shape(self) -> Shape:
        """Shape in the folder."""
        first = self.parts[0].shape
        whole = (*first[:-1], sum(part.shape[-1] for part in self.parts)) if len(self.parts) > 1 else first
        whole = (*whole[:-2], whole[-1], whole[-2]) if self.turned else whole
        return (whole[0], 1, *whole[1:]) if self.column else whole

    @property
    def plain(self) -> bool:
        """Whether a part of the leaf is a part of the tensor, so that less than all of it can be read."""
        return len(self.parts) == 1 and not self.column

    def index_of(self, index: Index) -> Index:
        """The part of the tensor that unpacks to this part of the leaf, where the entry is plain."""
        return (*index[:-2], index[-1], index[-2]) if self.turned else index

    def unpack(self, x: np.ndarray, number: int = 0) -> np.ndarray:
        """The part of that number, from the folder's tensor (or, where plain, from a part of it)."""
        x = x.squeeze(1) if self.column else x
        x = x.swapaxes(-1, -2) if self.turned else x
        if len(self.parts) == 1:
            return x
        sizes = [part.shape[-1] // self.groups for part in self.parts]
        start = sum(sizes[:number])
        grouped = x.reshape(*x.shape[:-1], self.groups, -1)[..., start : start + sizes[number]]
        return grouped.reshape(self.parts[number].shape)

    def pack(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The folder's tensor, from its parts."""
        x = parts[0]
        if len(parts) > 1:
            grouped = [part.reshape(*part.shape[:-1], self.groups, -1) for part in parts]
            x = np.concatenate(grouped, axis=-1).reshape(*x.shape[:-1], -1)
        x = x.swapaxes(-1, -2) if self.turned else x
        return x[:, None] if self.column else x

    def of(self, leaves: Mapping[str, Any]) -> np.ndarray:
        """The folder's tensor, from the leaves of a whole tree by path."""
        return self.pack([np.asarray(leaves[part.leaf])[part.index] for part in self.parts])


# ---------------------------------------------------------------------------------------------- the table, written out


def names(spec: DecoderSpec, naming: Naming) -> list[TensorEntry]:
    """Every tensor that a folder of this decoder holds, in the order of the tree's leaves.

    Raises:
      ValueError: no name claims a leaf.
    """
    return list(_entries(spec, naming))


def _entries(spec: DecoderSpec, naming: Naming) -> Iterator[TensorEntry]:
    """`names`, one by one."""
    shapes = {leaf: value.shape for leaf, value in trees.paths(abstract_params(spec)).items()}
    layers = {name: (layer, numbers) for name, layer, numbers in stacks(spec)}
    done: dict[str, None] = {}
    for leaf in shapes:
        if leaf in done:
            continue
        _, stack, inner = leaf.split("/", 2) if leaf.startswith(STACKED) else ("", "", leaf)
        prefix = f"{STACKED}{stack}/" if stack else ""
        leaves, at = _claim(naming, prefix, inner, shapes)
        done |= dict.fromkeys(leaves)
        parts = [(name, shapes[name]) for name in leaves]
        if stack:
            yield from _stacked(naming.layer, at, parts, *layers[stack])
        else:
            yield _entry(at.name, at, [LeafPart(name, (), shape) for name, shape in parts], 1)


def _claim(naming: Naming, prefix: str, inner: str, shapes: Mapping[str, Shape]) -> tuple[list[str], At]:
    """All leaves that share a tensor with this one, and how."""
    module, _, kind = inner.rpartition("/")
    for key, value in naming.names.items():  # leaves that are held together, before each by itself
        if "+" not in key:
            continue
        members = [member.removeprefix("*/") for member in key.split("+")]
        exact = inner in members
        if not exact and module not in members:
            continue
        leaves = [prefix + (member if exact else f"{member}/{kind}") for member in members]
        if all(leaf in shapes for leaf in leaves):
            return leaves, _named(value, "" if exact else SUFFIXES[kind])
    star = "*/" if prefix else ""
    if f"{star}{inner}" in naming.names:
        value = naming.names[f"{star}{inner}"]
        return [prefix + inner], value if isinstance(value, At) else At(value, turned=False)
    if f"{star}{module}" in naming.names and kind in SUFFIXES:
        return [prefix + inner], _named(naming.names[f"{star}{module}"], SUFFIXES[kind])
    raise ValueError(f"no name of the family's table claims leaf {prefix + inner!r}; add one")


def _named(value: str | At, suffix: str) -> At:
    at = value if isinstance(value, At) else At(value)
    return at._replace(name=at.name + suffix)


def _stacked(
    layer: str, at: At, parts: list[tuple[str, Shape]], kind: Layer, numbers: list[int]
) -> Iterable[TensorEntry]:
    """An entry for each layer of a stack, or for each expert (or head) of each."""
    name, each = at.name.replace("~", layer), "{e}" in at.name
    groups = _groups(at, parts[0][1][-1], kind)
    for place, number in enumerate(numbers):
        for e in range(parts[0][1][1]) if each else [None]:
            index = (place,) if e is None else (place, e)
            own = [LeafPart(leaf, index, shape[len(index) :]) for leaf, shape in parts]
            yield _entry(name.format(i=number, e=e), at, own, groups)


def _groups(at: At, channels: int, kind: Layer) -> int:
    """How many times the parts of a tensor alternate."""
    match at.parts, kind.mixer:
        case "heads", Attention(heads=heads):
            return heads
        case "kv_heads", Attention(kv_heads=heads):
            return heads
        case "channels", _:
            return channels
    return 1


def _entry(name: str, at: At, parts: list[LeafPart], groups: int) -> TensorEntry:
    matrix = parts[0].leaf.endswith("/kernel") and len(parts[0].shape) > 1
    return TensorEntry(name, tuple(parts), at.turned and matrix, groups, at.column)


def aliases(spec: DecoderSpec, naming: Naming) -> list[TensorEntry]:
    """Further names under which a folder may hold a leaf once more: the head's, where it is tied to the embedding."""
    if not spec.tied or spec.scalar_head:
        return []
    shape = (spec.vocab_size, spec.head_width)
    return [TensorEntry(f"{naming.names['head']}.weight", (LeafPart("embed/embedding", (), shape),))]


# ---------------------------------------------------------------------------------------------- held against a folder


class Claims(NamedTuple):
    """Whose every tensor of a folder is: an entry of the table, the second name of one, or carried along."""

    entries: dict[str, TensorEntry]
    copies: dict[str, TensorEntry]
    carried: tuple[str, ...]

    @property
    def weights(self) -> dict[str, TensorEntry]:
        """What is of the model, under either name."""
        return {**self.entries, **self.copies}


class Scheme(NamedTuple):
    """How a folder's tensors are named: the family's names, patterns of tensors to carry along, and whether the decoder
    is a part of a larger model, whose other tensors are carried along too. Those that are `spare` are left behind where
    nobody claims them."""

    naming: Naming
    ignored: str = ""
    wrapped: bool = False
    spare: frozenset[str] = frozenset()


def claim(spec: DecoderSpec, infos: Mapping[str, TensorInfo], where: str, scheme: Scheme) -> Claims:
    """Holds a folder's tensors against the table, both ways.

    Raises:
      UserError: a tensor is missing, is claimed by nobody, or has another shape or dtype than it must have.
    """
    if SCORE in infos and not spec.scalar_head:
        raise UserError(
            f"{where}: tensor {SCORE!r} is the head of a reward model, which has none over the vocabulary; give a "
            "language model, or name a ...ForSequenceClassification in architectures of config.json"
        )
    naming, tower = placed(scheme, infos)
    most = len(infos) + SPARE
    table = {entry.name: entry for entry in islice(_entries(spec, naming), most + 1)}
    if len(table) > most:  # a config may say anything, and is not followed far beyond what is there
        raise UserError(f"{where}: config.json asks for more than {most} tensors, and there are {len(infos)}")
    second = {entry.name: entry for entry in aliases(spec, naming)}
    for alias in second.values():
        first = next(name for name, entry in table.items() if entry.parts == alias.parts)
        if alias.name in infos and first not in infos:  # some tools keep only the second name of a shared tensor
            del table[first]
            table[alias.name] = alias
    missing = [name for name in table if name not in infos]
    if missing:
        raise UserError(f"{where}: tensor {missing[0]!r} is missing ({len(missing)} are); config.json asks for it")
    entries = {name: table[name] for name in infos if name in table}
    copies = {name: second[name] for name in infos if name in second and name not in table}
    carried = [name for name in infos if name not in entries and name not in copies and name not in scheme.spare]
    _check_carried(carried, scheme, tower, where)
    claims = Claims(entries, copies, tuple(carried))
    _check_infos(infos, claims.weights, where)
    return claims


def placed(scheme: Scheme, infos: Mapping[str, TensorInfo]) -> tuple[Naming, str]:
    """The names as this folder has them, and what those of the decoder begin with.

    They may lack their first part (as a base model saves them), or stand within a larger model.
    """
    root = str(scheme.naming.names["embed"]).split(".")[0] + "."
    options = [(root, "", root), ("", "", "")]
    if scheme.wrapped:
        inner = "language_model."
        options = [(root + inner, "", root + inner), (inner + root, inner, inner)]
    for new_root, before_head, tower in options:
        naming = _moved(scheme.naming, root, new_root, before_head)
        if f"{naming.names['embed']}.weight" in infos:
            return naming, tower
    return _moved(scheme.naming, root, *options[0][:2]), options[0][2]


def _moved(naming: Naming, root: str, new_root: str, before_head: str) -> Naming:
    """The names with another first part, and with `before_head` before those that never had it."""

    def moved(name: str) -> str:
        if name.startswith("~"):
            return name
        return new_root + name.removeprefix(root) if name.startswith(root) else before_head + name

    values = {
        key: value._replace(name=moved(value.name)) if isinstance(value, At) else moved(value)
        for key, value in naming.names.items()
    }
    return Naming(moved(naming.layer), values)


def _check_carried(carried: Sequence[str], scheme: Scheme, tower: str, where: str) -> None:
    patterns = [*CARRIED, scheme.ignored]
    unknown = [name for name in carried if not any(re.fullmatch(pattern, name) for pattern in patterns)]
    if scheme.wrapped:
        unknown = [name for name in unknown if name.startswith(tower)]
    if unknown:
        raise UserError(
            f"{where}: tensor {unknown[0]!r} ({len(unknown)} such) belongs to nothing that config.json describes; "
            "it would be lost, so the folder is refused"
        )


def _check_infos(infos: Mapping[str, TensorInfo], entries: Mapping[str, TensorEntry], where: str) -> None:
    for name, entry in entries.items():
        info = infos[name]
        if info.shape != entry.shape:
            raise UserError(
                f"{where}: tensor {name!r} has shape {list(info.shape)}, config.json asks for {list(entry.shape)}"
            )
        if info.dtype not in DTYPES:
            raise UserError(
                f"tensor {name!r} of {where} has dtype {info.dtype}; only {', '.join(DTYPES)} are read: "
                "dequantise or convert the model first"
            )
