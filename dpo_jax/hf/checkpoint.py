"""A Hugging Face folder in, straight onto devices, and out again as the same folder with other numbers in it.

Both directions hold about one tensor in host memory.
"""

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.typing import DTypeLike

from dpo_jax import trees
from dpo_jax.errors import UserError, short
from dpo_jax.hf import beside, merged, resize, reward, shards, tensors, writing
from dpo_jax.hf.adapted import base_of
from dpo_jax.hf.card import LANGUAGE_MODEL, REWARD_MODEL, base_name, front_matter, model_card
from dpo_jax.hf.configs import family_of, find_model, is_wrapper, read_spec
from dpo_jax.hf.factors import EMBED, HEAD
from dpo_jax.hf.leaves import Found, leaf_of, quantised_leaf
from dpo_jax.hf.mapping import Claims, LeafPart, Scheme, TensorEntry, claim, names
from dpo_jax.hf.quantised import opened, without_quantisation
from dpo_jax.hf.tensors import DTYPES, TensorInfo, Tensors, local_folder, member, read_json
from dpo_jax.model.decoder import Model, abstract_params, check_model
from dpo_jax.model.quantised import Kind
from dpo_jax.model.spec import DecoderSpec
from dpo_jax.processes.here import here, is_seen
from dpo_jax.trees import Tree

FLOATS = ("float32", "bfloat16", "float16")
"""What parameters may be kept in."""
WRITTEN = ("keep", "float32", "bfloat16")
"""What `save_hf` writes tensors in."""

# ---------------------------------------------------------------------------------------------- in


def load_hf(
    folder_or_hub_id: str | Path,
    *,
    dtype: DTypeLike | Callable[[str], DTypeLike] = jnp.float32,
    shardings: Tree = None,
    spec: DecoderSpec | None = None,
    adapter: str | Path | None = None,
    unrounded: bool = False,
    quantise: Mapping[str, Kind] | None = None,
) -> Model:
    """The model of a Hugging Face folder, read one tensor at a time. Weights that are packed (bitsandbytes, MXFP4, FP8,
    GPTQ, AWQ, compressed-tensors) are dequantised.

    Args:
      folder_or_hub_id: a folder that exists here, or else the name of a hub repository; one of an adapter alone is
        read with the base that its config names.
      dtype: float32, bfloat16 or float16, of every leaf, whatever the folder holds, or a function of the leaf's path
        that gives it. float32 keeps each weight exactly.
      shardings: tree like `dpo_jax.model.decoder.abstract_params(spec)` of where leaves go; each device's part is all
        that is read for it. None puts everything on the default device, uncommitted.
      spec: what `dpo_jax.hf.configs.read_spec` gave, if the caller has it already. One with a scalar head takes of a
        language model's folder all but its head, and starts the scalar head at zero; one with more tokens gets new
        rows (see `dpo_jax.hf.resize`).
      adapter: PEFT folder, or hub id, whose changes are added to the weights in float32. The model's head may then be
        one of its own, where the adapter makes it differ from the embedding that it was tied to.
      unrounded: whether bitsandbytes' weights of 4 bits keep all digits; they are rounded to the dtype that the folder
        names beside each of them, then cast to `dtype`, if not. Those of other formats are rounded to `dtype` only.
      quantise: kernels that are kept in 4 or 8 bits, by leaf path; `shardings` then has their codes' places below it.

    Raises:
      UserError: anything about the folder that is not as it must be, in one line.
    """
    if spec is None:
        folder_or_hub_id, adapter = base_of(folder_or_hub_id, adapter)
    folder = find_model(folder_or_hub_id) if spec is None else local_folder(folder_or_hub_id)
    spec = read_spec(folder) if spec is None else spec
    source = opened(folder, unrounded=unrounded)
    stored, scheme = resize.as_stored(spec, folder), scheme_of(spec, folder, source.spare)
    find = reward.claim_decoder if reward.head_is_new(spec, folder) else claim
    claims = find(stored, source.infos, str(folder), scheme)
    _check_copies(source, claims)
    if adapter is not None:
        source = merged.with_adapter(adapter, source, stored, scheme, claims)
        spec, stored = (merged.untied(one, source.adapter) for one in (spec, stored))
        claims = find(stored, source.infos, str(folder), scheme)
    leaves, grown = trees.paths(abstract_params(stored)), resize.grown_leaves(stored, spec)
    places = dict.fromkeys(leaves) if shardings is None else trees.paths(shardings)
    if HEAD in leaves:  # one that the adapter made lies as the embedding does
        places.setdefault(HEAD, places[EMBED])
    read_to = {leaf: resize.whole_rows(place) if leaf in grown else place for leaf, place in places.items()}
    by_leaf = _by_leaf(claims)
    kinds = {leaf: _dtype_of(leaf, dtype) for leaf in leaves}
    loaded: dict[str, jax.Array] = {}
    for path, shape in ((path, leaf.shape) for path, leaf in leaves.items()):
        if (kind := (quantise or {}).get(path)) is None:
            loaded[path] = leaf_of(source, by_leaf.get(path, []), shape, kinds[path], read_to[path])
            continue
        where = {name: None if shardings is None else places[f"{path}/{name}"] for name in (kind, "absmax")}
        made = quantised_leaf(source, by_leaf[path], shape, kind, where)
        loaded |= {f"{path}/{name}": array for name, array in made.items()}
    loaded |= {leaf: resize.grown(loaded[leaf], shape[0], places[leaf]) for leaf, shape in grown.items()}
    return Model(spec, trees.from_paths(loaded))


def _by_leaf(claims: Claims) -> dict[str, list[Found]]:
    """Of each leaf, the parts of tensors that it is made of."""
    found: dict[str, list[Found]] = {}
    for entry in claims.entries.values():
        for number, part in enumerate(entry.parts):
            found.setdefault(part.leaf, []).append(Found(entry, number))
    return found


def _dtype_of(leaf: str, dtype: DTypeLike | Callable[[str], DTypeLike]) -> jnp.dtype:
    """jax.numpy.float32 is a class, so it could be called too; a function of the path is not a class."""
    given: Any = dtype(leaf) if callable(dtype) and not isinstance(dtype, type) else dtype
    try:
        found = jnp.dtype(given)
    except TypeError:
        found = None
    if given is None or found is None or found.name not in FLOATS:
        said = short(str(given) if found is None or given is None else found.name)
        raise UserError(f"load_hf: dtype: {said}: weights are computed with in {', '.join(FLOATS)}; give one of these")
    return found


def scheme_of(spec: DecoderSpec, folder: Path, spare: frozenset[str] = frozenset()) -> Scheme:
    """How the folder's family names the tensors of this decoder, and which it may have beside them."""
    family = family_of(folder)
    return Scheme(family.naming(spec), family.ignored, is_wrapper(folder), spare)


def entries_of(spec: DecoderSpec, folder: Path) -> list[TensorEntry]:
    """Every tensor that a folder with this `config.json` holds."""
    return names(spec, scheme_of(spec, folder).naming)


def _check_copies(source: Tensors, claims: Claims) -> None:
    """A leaf that the folder holds twice must be the same numbers twice."""
    for copy, entry in claims.copies.items():
        first = next(name for name, other in claims.entries.items() if other.parts == entry.parts)
        if _digest(source, copy) != _digest(source, first):
            raise UserError(
                f"{source.folder}: {copy!r} differs from {first!r}, but config.json ties them; "
                "set tie_word_embeddings to false in a copy of the folder"
            )


def _digest(source: Tensors, name: str) -> tuple[str, bytes]:
    bits = np.ascontiguousarray(source.read(name)).reshape(-1).view(np.uint8).data
    return source.infos[name].dtype, hashlib.sha256(bits).digest()


# ---------------------------------------------------------------------------------------------- out


class MovedWeights(NamedTuple):
    """How many weights of a folder differ from those of the one that it is like, and how many it has."""

    weights: int
    of: int


class _Export(NamedTuple):
    """What is being written: the model's leaves, the folder it is to look like, and what it is to hold.

    `claims` and `files` (tensors by file) are those of the folder that is written; so is `config`, its `config.json`,
    where that is another than the source's.
    """

    spec: DecoderSpec
    leaves: dict[str, jax.Array]
    source: Tensors
    claims: Claims
    files: dict[str, dict[str, TensorInfo]]
    config: dict[str, Any] | None


def save_hf(
    model: Model,
    folder: str | Path,
    like: str | Path,
    *,
    card: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, str] | None = None,
    replace: bool = False,
    dtype: Literal["keep", "float32", "bfloat16"] = "keep",
    max_shard_bytes: int | None = None,
) -> MovedWeights | None:
    """Writes the model as a folder that looks like the one it came from, and reads it back before it stands there.
    One whose weights were packed becomes a plain folder, without `quantization_config`.

    Tensor names, dtypes, shapes and files, the config and the tokenizer are those of `like`; weights that did not
    change come back bit for bit. A model with more tokens than `like` has its own `vocab_size`. Added are a model card,
    `dpo_jax.json` and `SHA256SUMS`. A model with a scalar head whose `like` is a language model's folder is written as
    that family's ...ForSequenceClassification with one label.

    Args:
      model: what to write; several processes must call this together. Where all of them see the folder each writes its
        share of the files, and the first one the rest.
      folder: where to; it must not exist, or be empty.
      like: folder or hub id that the model was loaded from.
      card: what the model card says about the training: any of `base_model`, `datasets` (names), `metrics` (numbers by
        name), `objectives` (name to where it comes from), `config` (a table) and `notes`.
      extra_files: further text files by name, such as `dpo_jax.json`, or another `generation_config.json` or
        `chat_template.jinja`.
      replace: an earlier export at `folder`, with nothing in it changed or added, may be replaced.
      dtype: of the tensors written; `keep` is each tensor's own in `like`.
      max_shard_bytes: split into files of at most this size; None keeps the files of `like` (5 GB if dtype changes, or
        weights were packed), or makes as many as there are processes where these are more.

    Returns:
      How many of the folder's weights differ from those of `like` (dequantised, if they were packed); None in all
      processes but the first.

    Raises:
      UserError: the target is not free, `like` is not of this model, a weight is NaN or too large for its dtype, or the
        folder cannot be written. What stood at `folder` is then as it was.
    """
    check_model("save_hf: model", model)
    if dtype not in WRITTEN:
        raise UserError(f"save_hf: dtype: {short(str(dtype))}: give one of {', '.join(WRITTEN)}")
    target, origin = Path(folder), local_folder(like)
    source = opened(origin)
    _check_like(model, origin)
    claims, infos = _claimed(model.spec, source, origin)
    packed = bool(source.quantised)
    infos = shards.laid_out(infos, claims.weights, dtype, max_shard_bytes, packed=packed, writers=here().count)
    config = _new_config(model.spec, origin, dtype, packed=packed)
    export = _Export(model.spec, trees.paths(model.params), source, claims, shards.by_file(infos), config)
    need = sum(tensors.num_bytes(info.dtype, info.shape) for info in infos.values())
    with contextlib.ExitStack() as stack:
        opened_folder = functools.partial(_staging, stack, target, need, replace)
        staging = Path(here().decide("a folder for the export", opened_folder))
        written = _write_weights(export, staging, target)
        if not here().owns:
            return None
        sums = {file: one.digest for file, one in written.items()}
        sums |= _beside(export, staging, extra_files or {})
        texts = _texts(export, base_name(like, card), card, dict(extra_files or {}), sums)
        sums |= {name: tensors.write_bytes(staging / name, data) for name, data in texts.items()}
        listing = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        tensors.write_bytes(staging / tensors.SUMS, listing.encode())
    return MovedWeights(sum(one.others for one in written.values()), sum(one.of for one in written.values()))


def _new_config(spec: DecoderSpec, origin: Path, dtype: str, *, packed: bool) -> dict[str, Any] | None:
    """The `config.json` of an export that is not as the folder it came from; None where it is."""
    config = reward.reward_config(spec, origin) if reward.head_is_new(spec, origin) else None
    if dtype != "keep":
        config = shards.with_dtype(config or read_json(origin, "config.json"), dtype)
    if resize.as_stored(spec, origin) != spec:
        config = resize.with_vocabulary(config or read_json(origin, "config.json"), spec.vocab_size)
    return without_quantisation(config or read_json(origin, "config.json")) if packed else config


def dtypes_written(
    spec: DecoderSpec, like: str | Path, dtype: Literal["keep", "float32", "bfloat16"] = "keep"
) -> dict[str, str]:
    """By leaf, the dtype that `save_hf` would write it in; of several tensors, that with the fewest digits."""
    origin = local_folder(like)
    claims, infos = _claimed(spec, opened(origin), origin)
    infos = shards.laid_out(infos, claims.weights, dtype, None)
    found: dict[str, str] = {}
    for name, entry in claims.entries.items():
        kind = np.dtype(DTYPES[infos[name].dtype])
        for part in entry.parts:
            known = found.get(part.leaf, "float64")
            found[part.leaf] = min(kind.name, known, key=lambda each: jnp.finfo(each).nmant)
    return found


def _claimed(spec: DecoderSpec, source: Tensors, origin: Path) -> tuple[Claims, dict[str, TensorInfo]]:
    """Which tensors an export like this folder has, and what each is of the model."""
    scheme, stored = scheme_of(spec, origin, source.spare), resize.as_stored(spec, origin)
    if reward.head_is_new(spec, origin):
        trunk = reward.claim_decoder(stored, source.infos, str(origin), scheme)
        claims, infos = reward.with_score(stored, trunk, source.infos, scheme)
    else:
        claims = claim(stored, source.infos, str(origin), scheme)
        infos = {name: info for name, info in source.infos.items() if name in claims.weights or name in claims.carried}
    return resize.grown_claims(claims, infos, resize.grown_leaves(stored, spec)) if stored != spec else (claims, infos)


def _check_like(model: Model, origin: Path) -> None:
    spec = read_spec(origin, scalar_head=True if model.spec.scalar_head else None)
    spec = resize.with_rows(spec, origin, model.spec.vocab_size)
    if spec != model.spec:
        names = [name for name, value in vars(spec).items() if value != getattr(model.spec, name)]
        raise UserError(
            f"{origin} is another model than the one to export: {', '.join(names)} differ; give its own folder"
        )
    wanted = {leaf: value.shape for leaf, value in trees.paths(abstract_params(spec)).items()}
    found = {leaf: value.shape for leaf, value in trees.paths(model.params).items()}
    wrong = sorted(leaf for leaf in wanted.keys() | found.keys() if wanted.get(leaf) != found.get(leaf))
    if wrong:
        raise ValueError(
            f"leaf {wrong[0]!r} of params has shape {found.get(wrong[0])}, the spec says {wanted.get(wrong[0])}"
        )


class _Written(NamedTuple):
    """A file of tensors: its digest, and of the weights that the source has too, how many are others, of how many."""

    digest: str
    others: int
    of: int


def _staging(stack: contextlib.ExitStack, target: Path, need: int, replace: bool) -> str:
    """The folder that takes the target's place where the stack ends well."""
    tensors.check_target(target, replace)
    return str(stack.enter_context(tensors.staging(target, need, replace)))


def _write_weights(export: _Export, folder: Path, target: Path) -> dict[str, _Written]:
    """Write the files of tensors: each process its share, if all see the folder, or else process 0 all of them."""
    place = here()
    together = place.count > 1 and place.all_of("the export's folder is seen", is_seen(folder))
    by = writing.writers(export.files, place.count if together else 1)
    dtypes = {name: info.dtype for part in export.files.values() for name, info in part.items()}
    with tensors.refused_by_the_disk(target):
        found = writing.write_all(
            export.files,
            by,
            lambda file, fetch: _write_file(export, folder / file, fetch),
            lambda name: _fetch(export, name, dtypes[name]),
        )
    return {file: _Written(*one) for file, one in found.items()}


def _write_file(export: _Export, path: Path, fetch: Callable[[str], np.ndarray]) -> _Written:
    """Write a file of tensors, and read it back."""
    metadata, infos = {"format": "pt", **export.source.metadata.get(path.name, {})}, export.files[path.name]
    others, total = 0, 0

    def fetched(name: str) -> np.ndarray:
        nonlocal others, total
        found = fetch(name)
        if name in export.claims.entries and name in export.source.infos:
            others, total = others + _others(found, export.source, name), total + found.size
        return found

    digest = tensors.write_tensors(path, infos, metadata, fetched)
    tensors.check_tensors(path, infos, digest)
    return _Written(digest, others, total)


def _fetch(export: _Export, name: str, dtype: str) -> np.ndarray:
    """One tensor as the folder holds it, rounded to nearest even from the model's dtype."""
    entry = export.claims.entries.get(name) or export.claims.copies.get(name)
    if entry is None:
        return export.source.read(name)
    return entry.pack([_as_held(export, name, part, dtype) for part in entry.parts])


def _others(found: np.ndarray, source: Tensors, name: str) -> int:
    """How many numbers of a tensor are others than the source's."""
    flat, begin, others = found.reshape(-1), 0, 0
    for part in source.pieces(name):
        others += int((flat[begin : begin + part.size] != part.astype(flat.dtype)).sum())
        begin += part.size
    return others


def _as_held(export: _Export, name: str, part: LeafPart, dtype: str) -> np.ndarray:
    """A part of a leaf on the host, in the folder's dtype."""
    leaf = export.leaves[part.leaf]
    part_of = _entry_of(leaf, part.index) if part.index else leaf
    if isinstance(part_of, jax.Array) and not part_of.is_fully_addressable:
        part_of = multihost_utils.process_allgather(part_of, tiled=True)
    array = np.asarray(part_of)
    with np.errstate(over="ignore"):
        cast = array.astype(DTYPES[dtype])
    if tensors.non_finite(cast):
        why = (
            "a value too large for"
            if not tensors.non_finite(array)
            else "NaN or infinite values; nothing is written in"
        )
        raise UserError(f"tensor {name!r} of the model has {why} {DTYPES[dtype].name}; export an earlier checkpoint")
    return cast


@jax.jit
def _entry_of(leaf, index):
    sizes = (*(1,) * len(index), *leaf.shape[len(index) :])
    return lax.dynamic_slice(leaf, (*index, *(0,) * (leaf.ndim - len(index))), sizes).reshape(leaf.shape[len(index) :])


# ---------------------------------------------------------------------------------------------- the rest of the folder


def _beside(export: _Export, folder: Path, written: Collection[str]) -> dict[str, str]:
    """Copies what the source has beside its tensors, but for what is `written` anew; SHA-256 by name."""
    names = beside.files(
        export.source.folder,
        generation=not export.spec.scalar_head,
        quantised=bool(export.source.quantised),
        own=written,
    )
    copied = [name for name in names if export.config is None or name != "config.json"]
    return beside.copy(export.source.folder, copied, folder)


def _texts(
    export: _Export, base: str, card: Mapping[str, Any] | None, extra: dict[str, str], copied: Collection[str]
) -> dict[str, bytes]:
    """What is written anew, beside the files that were copied."""
    origin = export.source.folder
    files = _index(export)
    if export.config is not None:
        files["config.json"] = (json.dumps(export.config, indent=2, ensure_ascii=False) + "\n").encode()
    config = export.config or read_json(origin, "config.json")
    kind, note = (REWARD_MODEL, reward.padding_note(config)) if export.spec.scalar_head else (LANGUAGE_MODEL, "")
    files["README.md"] = model_card(base, front_matter(origin), card, kind=kind, note=note).encode()
    for name, text in {**extra, **beside.record(base, origin, extra)}.items():
        taken = name in files or name in copied or name in export.files or name == tensors.SUMS
        if taken or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
            raise ValueError(f"extra file {name!r} is not a free plain name")
        files[name] = text.encode()
    return files


def _index(export: _Export) -> dict[str, bytes]:
    """The source's own index if every tensor keeps its file and dtype, so that it too comes back byte for byte."""
    infos = {name: info for part in export.files.values() for name, info in part.items()}
    if infos == export.source.infos and export.source.weight_map is not None and not export.source.quantised:
        return {tensors.INDEX: member(export.source.folder, tensors.INDEX).read_bytes()}
    return {} if list(export.files) == [tensors.SINGLE] else {tensors.INDEX: shards.index_text(infos).encode()}
