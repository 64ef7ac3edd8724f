"""A base and an adapter written as one model folder: each tensor is computed, rounded once, and written, one at a time.

What an adapter changes may be too little to be seen in sixteen bits; how much of it is lost is counted and said.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.errors import printable
from dpo_jax.hf import beside, shards, tensors
from dpo_jax.hf.card import base_name, front_matter, model_card
from dpo_jax.hf.checkpoint import scheme_of
from dpo_jax.hf.configs import read_spec
from dpo_jax.hf.mapping import Scheme, claim
from dpo_jax.hf.merged import Merged, rounded, untied, with_adapter
from dpo_jax.hf.quantised import opened
from dpo_jax.hf.shards import Dtype
from dpo_jax.hf.tensors import DTYPES, TensorInfo, Tensors, local_folder, read_json
from dpo_jax.model.spec import DecoderSpec


class Drift(NamedTuple):
    """What rounding does to the weights that an adapter changes."""

    tensors: int
    weights: int
    """How many the adapter changes, in float32."""
    unmoved: int
    """How many of these are what they were, once rounded."""
    largest: float
    """The largest difference between a weight and what is written of it."""

    def __str__(self) -> str:
        """One line."""
        share = self.unmoved / max(self.weights, 1)
        return (
            f"the adapter changes {self.weights:,} weights of {self.tensors} tensors; rounding leaves {self.unmoved:,} "
            f"of them ({share:.2%}) as they were, and moves none by more than {self.largest:.2g}"
        )


def merge(
    base: str | Path,
    adapter: str | Path,
    target: str | Path,
    *,
    dtype: Dtype = "keep",
) -> Drift:
    """Writes a base with an adapter merged into it as a model folder.

    Args:
      base: folder or hub id.
      adapter: PEFT folder or hub id.
      target: where to; it must not exist, or be empty.
      dtype: of the weights written; `keep` is each tensor's own in the base.

    Raises:
      UserError: the base or the adapter cannot be read, they do not belong together, or the folder cannot be written.
    """
    origin = local_folder(base)
    spec = read_spec(origin)
    source = opened(origin)
    scheme = scheme_of(spec, origin, source.spare)
    tensors.check_target(Path(target), replace=False)
    claims = claim(spec, source.infos, str(origin), scheme)
    view = with_adapter(adapter, source, spec, scheme, claims)
    notes = (f"The adapter {printable(base_name(adapter))} is merged into its weights.",)
    return write_merged(target, view, spec, scheme, dtype=dtype, card={"base_model": base_name(base), "notes": notes})


def write_merged(
    target: str | Path,
    view: Merged,
    spec: DecoderSpec,
    scheme: Scheme,
    *,
    dtype: Dtype = "keep",
    card: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, str] | None = None,
    replace: bool = False,
) -> Drift:
    """Writes a view as a model folder, and reads it back before it stands there.

    Names, files and the tokenizer are those of the base; a head that the adapter unties is one tensor more, and the
    config then says so.

    Args:
      target: where to.
      view: of the base's tensors with the adapter's changes, in float32 where they are changed.
      spec: of the base.
      scheme: how the base's tensors are named.
      dtype: of the weights written.
      card: as in `save_hf`.
      extra_files: as in `save_hf`.
      replace: as in `save_hf`.
    """
    target, origin = Path(target), view.folder
    infos = _layout(view, spec, scheme, dtype)
    files = shards.by_file(infos)
    config = _config(origin, dtype, view.adapter.unties)
    tensors.check_target(target, replace)
    need = sum(tensors.num_bytes(info.dtype, info.shape) for info in infos.values())
    counted = _Counted(view, infos)
    with tensors.staging(target, need, replace) as staging:
        sums: dict[str, str] = {}
        for file, part in files.items():
            metadata = {"format": "pt", **view.metadata.get(file, {})}
            sums[file] = tensors.write_tensors(staging / file, part, metadata, counted.fetch)
            tensors.check_tensors(staging / file, part, sums[file])
        names = beside.files(origin, own=extra_files or {})
        sums |= beside.copy(origin, [name for name in names if name != "config.json"], staging)
        texts = {"config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n"}
        if list(files) != [tensors.SINGLE]:
            texts[tensors.INDEX] = shards.index_text(infos)
        named = base_name(origin, card)
        texts["README.md"] = model_card(named, front_matter(origin), card)
        own = extra_files or {}
        texts |= {**beside.record(named, origin, own), **own}
        sums |= {name: tensors.write_bytes(staging / name, text.encode()) for name, text in texts.items()}
        listing = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        tensors.write_bytes(staging / tensors.SUMS, listing.encode())
        _check(staging, untied(spec, view.adapter))
    return counted.drift


class _Counted:
    """Fetches tensors as they are written, and counts what rounding does."""

    def __init__(self, view: Merged, infos: Mapping[str, TensorInfo]):
        self._view, self._infos = view, infos
        self.drift = Drift(0, 0, 0, 0.0)

    def fetch(self, name: str) -> np.ndarray:
        """One tensor in the dtype that it is written in."""
        dtype = self._infos[name].dtype
        if self._infos[name].dtype == self._view.infos[name].dtype and not self._view.changes(name):
            return self._view.read(name)
        exact = self._view.read(name).astype(np.float32)
        cast = rounded(exact, dtype, f"{self._view.folder} with the adapter: tensor {name!r}")
        if self._view.changes(name):
            before = self._view.before(name).astype(np.float32)
            moved = exact != before
            unmoved = int((moved & (cast == before.astype(DTYPES[dtype]))).sum())
            largest = float(np.abs(cast.astype(np.float32) - exact).max(initial=0.0))
            old = self.drift
            self.drift = Drift(
                old.tensors + 1, old.weights + int(moved.sum()), old.unmoved + unmoved, max(old.largest, largest)
            )
        return cast


def _layout(view: Merged, spec: DecoderSpec, scheme: Scheme, dtype: Dtype) -> dict[str, TensorInfo]:
    """What is written: the base's dtypes and files, or weights of another dtype in files of a usual size."""
    own = {name: info._replace(dtype=view.own_dtype(name)) for name, info in view.infos.items()}
    claims = claim(untied(spec, view.adapter), view.infos, str(view.folder), scheme)
    return shards.laid_out(own, claims.weights, dtype, None, packed=bool(view.quantised))


def _config(origin: Path, dtype: str, unties: bool) -> dict[str, Any]:
    """The base's config, of plain weights."""
    config = read_json(origin, "config.json")
    config.pop("quantization_config", None)
    if unties:
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), dict):
            config["text_config"]["tie_word_embeddings"] = False
    return config if dtype == "keep" else shards.with_dtype(config, dtype)


def _check(staging: Path, spec: DecoderSpec) -> None:
    """The folder must be that of the model that was meant; raises OSError where it is not."""
    found = read_spec(staging)
    claim(found, Tensors(staging).infos, str(staging), scheme_of(found, staging))
    if found != spec:
        raise OSError(f"{staging} does not read back as it was written")
