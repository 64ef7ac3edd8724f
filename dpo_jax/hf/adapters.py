"""Which kernels an adapter changes, by the names of a folder's modules; and its factors as leaves and as tensors.

A folder's tensor may hold several kernels side by side (`qkv_proj`). An adapter of it has one A, which the kernels
share, and a B whose columns are divided among them as the tensor's outputs are. Letters: I inputs, O outputs, R rank.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_jax import trees
from dpo_jax.errors import UserError, nearest
from dpo_jax.hf.factors import Factor, Key, parts
from dpo_jax.hf.mapping import LeafPart, TensorEntry
from dpo_jax.hf.quantisation import KEY
from dpo_jax.hf.quantised import opened
from dpo_jax.hf.tensors import read_json
from dpo_jax.model.adapters import AdapterSpec, LowRank, beside
from dpo_jax.model.quantised import Kind
from dpo_jax.model.settings import ALL_LINEAR, EXPERTS, GROUPS, PEFT_DEFAULT, ROUTER, AdapterSettings
from dpo_jax.trees import Params

LINEAR = r"blocks/\d+/(attention|delta|mlp|experts/shared)/[a-z_]+/kernel"
KINDS: tuple[tuple[str, str], ...] = (
    (r"blocks/\d+/delta/conv/kernel", ""),
    (LINEAR, ALL_LINEAR),
    (r"blocks/\d+/experts/(gate|up|down)/kernel", EXPERTS),
    (r"blocks/\d+/experts/router/kernel", ROUTER),
    (r"blocks/\d+/(inputs_gate|inputs_projection|experts/shared_gate)/kernel", "other"),
    (r".*", ""),
)
"""What a kernel is to `adapter.targets`: "other" is meant by its name alone, and "" cannot be adapted."""

PEFT_TARGETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    **dict.fromkeys(("bloom", "gpt_neox", "falcon"), ("query_key_value",)),
    **dict.fromkeys(
        (
            *("opt", "gptj", "llama", "mistral", "mixtral", "stablelm", "gemma", "gemma2", "gemma3_text", "qwen2"),
            *("qwen3", "gemma4_text"),
        ),
        ("q_proj", "v_proj"),
    ),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
}
"""What PEFT adapts of a `model_type` where nothing is said (its constants.py); it has none for the other families."""


class Module(NamedTuple):
    """A tensor of the folder whose kernels may be adapted: the path of its module, and what it is."""

    path: str
    kind: str
    entry: TensorEntry


def modules(entries: Sequence[TensorEntry]) -> list[Module]:
    """Those of a folder."""
    found = []
    for entry in entries:
        leaf = entry.parts[0].leaf
        kind = trees.match(leaf, KINDS, table="adapter targets")
        if kind and leaf.endswith("/kernel"):
            found.append(Module(entry.name.removesuffix(".weight"), kind, entry))
    return found


def resolve(
    settings: AdapterSettings, entries: Sequence[TensorEntry], layers: Mapping[str, Any], kind: str
) -> AdapterSpec:
    """The adapter that the settings describe on a model.

    Args:
      settings: with a rank.
      entries: every tensor of the model's folder.
      layers: by stack of blocks the numbers of its layers.
      kind: the model's `model_type`.

    Raises:
      UserError: the targets are nowhere in the model, cannot be adapted, or are a part of what must be adapted whole.
    """
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(settings, name) or ():
            _compiled(f"adapter.{name}", key)
    known = modules(entries)
    chosen = _chosen(settings, known, kind)
    if settings.layers is not None:
        everywhere = {number for numbers in layers.values() for number in numbers}
        if outside := sorted(set(settings.layers) - everywhere):
            raise UserError(f"adapter.layers: {outside[0]}: the model's layers are 0 to {max(everywhere)}")
        chosen = [one for one in chosen if _layer(one.entry.parts[0], layers) in settings.layers]
    if settings.dropout and any(one.kind in (EXPERTS, ROUTER) for one in chosen):
        raise UserError("adapter.dropout: experts and routers have none, as in PEFT; leave it out, or target others")
    if settings.dora and any(one.kind in (EXPERTS, ROUTER) for one in chosen):
        raise UserError("adapter.dora: experts and routers have none, as in PEFT; leave it out, or target others")
    changes: dict[str, tuple[dict[int, int], dict[int, float], str]] = {}
    for one in chosen:
        rank = _fitting(settings.rank_pattern, one.path, settings.rank or 0)
        alpha = _fitting(settings.alpha_pattern, one.path, settings.alpha or 2.0 * (settings.rank or 0))
        scale = alpha / (math.sqrt(rank) if settings.rslora else rank)
        for part in one.entry.parts:
            ranks, scales, _ = changes.setdefault(part.leaf, ({}, {}, one.entry.parts[0].leaf))
            if ranks.setdefault(part.index[0], rank) != rank or scales.setdefault(part.index[0], scale) != scale:
                raise UserError(f"adapter.rank_pattern: {one.path}: experts of one layer must be alike")
    _check_whole(chosen, known)
    sizes = {stack: len(numbers) for stack, numbers in layers.items()}
    return AdapterSpec(_stacked(changes, sizes), settings.dropout, settings.dora)


def _chosen(settings: AdapterSettings, known: list[Module], kind: str) -> list[Module]:
    targets = settings.targets
    if isinstance(targets, str) and targets not in GROUPS and not re.fullmatch(r"[\w.-]+", targets):
        pattern = _compiled("adapter.targets", targets)
        found = [one for one in known if pattern.fullmatch(one.path)]
        if not found:
            raise UserError(
                f"adapter.targets: {targets!r} is a regular expression that matches no module; paths are such as "
                f"{known[0].path}" + f"; several names are a list: [{targets}]" * ("," in targets)
            )
        return found
    names = (targets,) if isinstance(targets, str) else targets
    if PEFT_DEFAULT in names and kind not in PEFT_TARGETS:
        raise UserError(f"adapter.targets: PEFT has no default for {kind}; give names, or all-linear")
    names = [name for given in names for name in (PEFT_TARGETS[kind] if given == PEFT_DEFAULT else (given,))]
    for name in names:
        if not any(_is_named(one, name) for one in known):
            kinds = sorted({one.path.rsplit(".", 1)[-1] for one in known})
            close = nearest(name, kinds, 0.6)
            raise UserError(
                f"adapter.targets: {name!r} is no module that can be adapted"
                + (f"; did you mean {close}?" if close else f"; this model has {', '.join(kinds)}, and all-linear")
            )
    return [one for one in known if any(_is_named(one, name) for name in names)]


def _compiled(setting: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(f"{setting}: {text!r} is no regular expression ({error})") from None


def _is_named(one: Module, name: str) -> bool:
    """Whether a target means a module: by its kind, or by the end of its path, with or without numbers of experts."""
    if name in GROUPS:
        return one.kind == name
    paths = {one.path, re.sub(r"experts\.\d+\.", "experts.", one.path)}
    return any(path == name or path.endswith(f".{name}") for path in paths)


def _layer(part: LeafPart, layers: Mapping[str, Any]) -> int:
    return layers[part.leaf.split("/")[1]][part.index[0]]


def _fitting(pattern: Mapping[str, Any] | None, path: str, default: object) -> Any:
    """The value of the first key that matches the end of a module's path, as PEFT takes it."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", path)), default)


def _check_whole(chosen: Sequence[Module], known: Sequence[Module]) -> None:
    """All experts of a layer are adapted, or none: their factors are one array."""
    of_experts = [one for one in known if one.kind == EXPERTS]
    taken = {one.path for one in chosen}
    groups: dict[tuple[str, int], list[str]] = {}
    for one in of_experts:
        groups.setdefault((one.entry.parts[0].leaf, one.entry.parts[0].index[0]), []).append(one.path)
    for paths in groups.values():
        inside = [path for path in paths if path in taken]
        if inside and len(inside) < len(paths):
            left = next(path for path in paths if path not in taken)
            raise UserError(f"adapter.targets: takes {inside[0]} and leaves {left}; take all experts of a layer")


def _stacked(
    changes: Mapping[str, tuple[dict[int, int], dict[int, float], str]], sizes: Mapping[str, int]
) -> dict[str, LowRank]:
    found = {}
    for leaf, (ranks, scales, owner) in changes.items():
        layers = range(sizes[leaf.split("/")[1]])
        found[leaf] = LowRank(tuple(ranks.get(n, 0) for n in layers), tuple(scales.get(n, 0.0) for n in layers), owner)
    return found


def few_bits(asked: Kind | None, folder: Path, entries: Sequence[TensorEntry]) -> dict[str, Kind]:
    """Kernels of an adapter's base that are kept in few bits, by leaf path: those that a setting or the folder says.

    The folder's own are those that bitsandbytes has quantised in every layer of a stack.
    """
    matrices = [one for one in modules(entries) if one.kind in (ALL_LINEAR, EXPERTS)]
    leaves = dict.fromkeys(part.leaf for one in matrices for part in one.entry.parts)
    if asked is not None:
        return dict.fromkeys(leaves, asked)
    table = read_json(folder, "config.json").get(KEY)
    kind = _own_kind(table) if isinstance(table, dict) else None
    if kind is None:
        return {}
    if not any(folder.glob("*.safetensors")):  # only its config is here, for a plan
        return dict.fromkeys(leaves, kind)
    source = opened(folder)
    plain = {p.leaf for one in matrices if not source.is_packed(one.entry.name) for p in one.entry.parts}
    return {leaf: kind for leaf in leaves if leaf not in plain}


def _own_kind(table: Mapping[str, Any]) -> Kind | None:
    """What bitsandbytes' `quantization_config` says; None of another method's."""
    if table.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return None
    if table.get("load_in_4bit"):
        return "fp4" if table.get("bnb_4bit_quant_type", "fp4") == "fp4" else "nf4"
    return "int8" if table.get("load_in_8bit") else None


# ---------------------------------------------------------------------------------------------- factors and leaves


def described(factors: Mapping[Key, Factor], entries: Sequence[TensorEntry], layers: Mapping[str, Any]) -> AdapterSpec:
    """The adapter that these factors are of, by the folder's tensors."""
    changes: dict[str, tuple[dict[int, int], dict[int, float], str]] = {}
    for factor, entry, _ in _placed(factors, entries):
        for part in entry.parts:
            ranks, scales, _ = changes.setdefault(part.leaf, ({}, {}, entry.parts[0].leaf))
            layer, rank = part.index[0], factor.a.shape[0]
            ranks[layer] = max(rank, ranks.get(layer, 0))
            if scales.setdefault(layer, factor.scale) != factor.scale:
                raise UserError(f"tensor {entry.name!r}: experts of one layer have adapters of other scales; merge it")
    dora = any(factor.magnitude is not None for factor in factors.values())
    sizes = {stack: len(numbers) for stack, numbers in layers.items()}
    return AdapterSpec(_stacked(changes, sizes), 0.0, dora)


def _placed(
    factors: Mapping[Key, Factor], entries: Sequence[TensorEntry]
) -> Iterator[tuple[Factor, TensorEntry, tuple[int, ...]]]:
    """Each factor, the tensor that it changes, and where on the axes before the matrix's it stands in the leaf."""
    by_name = {entry.name: entry for entry in entries}
    for (name, expert), factor in factors.items():
        entry = by_name[name]
        yield factor, entry, (*entry.parts[0].index, *(() if expert is None else (expert,)))


def _matrix(entry: TensorEntry, rows: int) -> TensorEntry:
    """The tensor's division of its outputs, of a matrix [rows, outputs]; of a vector where there are 0 rows."""
    lead = (rows,) if rows else ()
    parts = tuple(part._replace(shape=(*lead, part.shape[-1])) for part in entry.parts)
    return entry._replace(parts=parts, turned=False, column=False)


def to_leaves(
    factors: Mapping[Key, Factor],
    adapter: AdapterSpec,
    shapes: Mapping[str, tuple[int, ...]],
    entries: Sequence[TensorEntry],
) -> Params:
    """Factors as leaves beside the kernels that they change: float32, zero where a layer has a smaller rank."""
    found: dict[str, np.ndarray] = {}
    for path, change in adapter.changes.items():
        rank, (*lead, inputs, outputs) = max(change.ranks), shapes[path]
        if change.owner == path:
            found[beside(path, "a")] = np.zeros((*lead, inputs, rank), np.float32)
        found[beside(path, "b")] = np.zeros((*lead, rank, outputs), np.float32)
        if adapter.dora:
            found[beside(path, "magnitude")] = np.ones((*lead, outputs), np.float32)
    for factor, entry, index in _placed(factors, entries):
        rank = factor.a.shape[0]
        found[beside(entry.parts[0].leaf, "a")][index][:, :rank] = factor.a.T
        for part, own in zip(entry.parts, parts(entry, factor), strict=True):
            found[beside(part.leaf, "b")][index][:rank] = own.b.T
            if own.magnitude is not None:
                found[beside(part.leaf, "magnitude")][index] = own.magnitude
    return trees.from_paths(found)


def to_factors(adapter: AdapterSpec, leaves: Mapping[str, Any], entries: Sequence[TensorEntry]) -> dict[Key, Factor]:
    """Leaves by path as factors by tensor: what `to_leaves` makes leaves of."""
    found = {}
    for entry in entries:
        first = entry.parts[0]
        change = adapter.changes.get(first.leaf)
        if change is None or not change.ranks[first.index[0]]:
            continue
        rank, scale = change.ranks[first.index[0]], change.scales[first.index[0]]
        for index, expert in _indices(first):
            a = np.asarray(leaves[beside(first.leaf, "a")])[index][:, :rank].T
            parts = [np.asarray(leaves[beside(part.leaf, "b")])[index][:rank] for part in entry.parts]
            b, magnitude = _matrix(entry, rank).pack(parts).T, None
            if adapter.dora:
                norms = [np.asarray(leaves[beside(part.leaf, "magnitude")])[index] for part in entry.parts]
                magnitude = _matrix(entry, 0).pack(norms)
            found[entry.name, expert] = Factor(np.ascontiguousarray(a), np.ascontiguousarray(b), scale, magnitude)
    return found


def _indices(part: LeafPart) -> Iterator[tuple[tuple[int, ...], int | None]]:
    """Of each matrix that a tensor holds: where it stands in the leaf, and its number there if there are several."""
    if len(part.shape) == 2:
        yield part.index, None
        return
    for expert in range(part.shape[0]):
        yield (*part.index, expert), expert
