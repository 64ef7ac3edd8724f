"""A base and an adapter seen as one folder of tensors: each is computed when it is read, one at a time.

    tensor = round(replaced or base, with rows replaced, + scale * b @ a)

in float32, and rounded once. Where an adapter gives a tied head other numbers than the embedding, the view has both.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from dpo_jax.errors import UserError
from dpo_jax.hf.beside import ADAPTER_CONFIG
from dpo_jax.hf.factors import EMBED, HEAD, Adapter, Factor, by_tensor, turned
from dpo_jax.hf.mapping import Claims, Scheme, TensorEntry
from dpo_jax.hf.peft import FILE, bias_name, read_adapter
from dpo_jax.hf.tensors import DTYPES, TensorInfo, Tensors, local_folder, non_finite
from dpo_jax.model.spec import DecoderSpec

FILES = (FILE, ADAPTER_CONFIG, "README.md")
"""What is fetched of an adapter's repository on the hub."""


class Merged(Tensors):
    """Tensors of a base with those that an adapter changes in place of its own."""

    def __init__(self, source: Tensors, adapter: Adapter, claims: Claims, dtype: Literal["keep", "float32"] = "keep"):
        """Reads nothing yet.

        Args:
          source: the base's tensors.
          adapter: what it changes of them.
          claims: what the base's tensors are.
          dtype: of the tensors that change: each one's own, or float32, which is not rounded at all.
        """
        self.folder, self.files = source.folder, source.files
        self.metadata, self.adapter = source.metadata, adapter
        self.quantised, self.spare = source.quantised, source.spare
        self._source = source
        self._factors = by_tensor(adapter.factors)
        self._biases = _added_biases(adapter)
        self._from = self._tables_made()
        self._own = self._own_names(claims)
        made = {name: source.infos[twin] for name, twin in self._from.items()}
        self.infos: dict[str, TensorInfo] = {
            name: info._replace(dtype="F32") if dtype == "float32" and self.changes(name) else info
            for name, info in {**source.infos, **made}.items()
        }
        own = source.weight_map
        self.weight_map = None if own is None else own | {name: info.file for name, info in made.items()}
        self._last: tuple[str, np.ndarray] | None = None

    def _tables_made(self) -> dict[str, str]:
        """Names of an embedding or a head that the base has not under a name of its own, and whose numbers they get."""
        if not self.adapter.unties:
            return {}
        embed, head = (_named(self.adapter.entries, leaf) for leaf in (EMBED, HEAD))
        return {one: other for one, other in ((embed, head), (head, embed)) if one not in self._source.infos}

    def _own_names(self, claims: Claims) -> dict[str, str]:
        """By tensor of the base, the name that the adapter has for it; a second name of one is as good as the first."""
        first = {entry.parts: name for name, entry in self.adapter.entries.items()}
        found = {name: first[entry.parts] for name, entry in {**claims.entries, **claims.copies}.items()}
        if self.adapter.unties:
            found |= {name: name for name in (_named(self.adapter.entries, leaf) for leaf in (EMBED, HEAD))}
        return found

    def changes(self, name: str) -> bool:
        """Whether the adapter changes this tensor (an added head counts only if it does)."""
        own = self._own.get(name)
        return any(own in table for table in (self._factors, self._biases, self.adapter.replaced, self.adapter.rows))

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A tensor, or the part of it that `index` selects, as a new array.

        Raises:
          UserError: the sum is too large for the tensor's dtype.
        """
        if not self.changes(name):
            return self._source.read(self._from.get(name, name), index)
        if self._last is None or self._last[0] != name:  # all devices' parts are of one product, bit for bit
            self._last = name, self._whole(name)
        whole = self._last[1]
        return whole[index].copy() if index else whole.copy()

    def before(self, name: str) -> np.ndarray:
        """The base's tensor, without the adapter's changes."""
        return self._source.read(self._from.get(name, name))

    def own_dtype(self, name: str) -> str:
        """The dtype that the base has this tensor in."""
        return self._source.infos[self._from.get(name, name)].dtype

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """The numbers of a tensor in their order; those of a changed one all at once."""
        if not self.changes(name):
            yield from self._source.pieces(self._from.get(name, name))
        else:
            yield self.read(name).reshape(-1)

    def exact(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The same with all digits that the base gives; what the adapter changes is rounded as `infos` says."""
        return self.read(name, index) if self.changes(name) else self._source.exact(self._from.get(name, name), index)

    def is_packed(self, name: str) -> bool:
        """Whether reading a part takes as long as reading the whole tensor."""
        return not self.changes(name) and self._source.is_packed(self._from.get(name, name))

    def _sum(self, name: str) -> np.ndarray:
        """A tensor in float32, not rounded."""
        own, adapter = self._own.get(name, name), self.adapter
        value = adapter.replaced.get(own)
        if value is None:
            value = self._source.exact(self._from.get(name, name))
        value = value.astype(np.float32)  # a new array, which may be written into
        if own in adapter.rows:
            value[list(adapter.rows[own].numbers)] = adapter.rows[own].values
        if own in self._biases:
            value += self._biases[own]
        for expert, factor in self._factors.get(own, {}).items():
            place = value if expert is None else value[expert]
            place[...] = _changed(adapter.entries[own], factor, place)
        return value

    def _whole(self, name: str) -> np.ndarray:
        return rounded(self._sum(name), self.infos[name].dtype, f"{self.folder} with the adapter: tensor {name!r}")


def rounded(value: np.ndarray, dtype: str, where: str) -> np.ndarray:
    """The array to the nearest, even, of a dtype of safetensors.

    Raises:
      UserError: a number is too large for it, or is none.
    """
    with np.errstate(over="ignore"):
        cast = value.astype(DTYPES[dtype])
    if non_finite(cast):
        why = "NaN or infinite values; the base is damaged" if non_finite(value) else "a value too large for it"
        raise UserError(f"{where} in {DTYPES[dtype].name} has {why}" + ("" if non_finite(value) else "; take float32"))
    return cast


def _changed(entry: TensorEntry, factor: Factor, matrix: np.ndarray) -> np.ndarray:
    return factor.changed(matrix) if turned(entry) else factor.changed(matrix.T).T


def _added_biases(adapter: Adapter) -> dict[str, np.ndarray]:
    return {
        bias_name(name): factor.bias * np.float32(factor.scale)
        for (name, _), factor in adapter.factors.items()
        if factor.bias is not None
    }


def _named(entries: Mapping[str, TensorEntry], leaf: str) -> str:
    return next(name for name, entry in entries.items() if entry.parts[0].leaf == leaf)


def with_adapter(
    adapter: str | Path,
    base: Tensors,
    spec: DecoderSpec,
    scheme: Scheme,
    claims: Claims,
    dtype: Literal["keep", "float32"] = "float32",
) -> Merged:
    """A base's tensors with an adapter's changes.

    Args:
      adapter: PEFT folder, or hub id.
      base: tensors of the base's folder.
      spec: of the base, as its folder is.
      scheme: how the base's tensors are named.
      claims: what they are.
      dtype: as of `Merged`.

    Raises:
      UserError: the adapter cannot be read, or is of another base.
    """
    return Merged(base, read_adapter(local_folder(adapter, FILES), spec, scheme, base), claims, dtype)


def untied(spec: DecoderSpec, adapter: Adapter) -> DecoderSpec:
    """The spec of a base and an adapter together: with a head of its own where the adapter makes one."""
    return dataclasses.replace(spec, tied=False) if adapter.unties else spec
