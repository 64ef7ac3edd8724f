"""A folder's kernels as 4 or 8 bits leave them: what an adapter on such a base was trained on."""

from collections.abc import Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from dpo_jax.hf.mapping import TensorEntry
from dpo_jax.hf.tensors import STORED, Tensors
from dpo_jax.model.quantised import Kind, QuantisedKernel, quantise


class FewBits(Tensors):
    """The tensors of a source, those of some kernels quantised and dequantised."""

    def __init__(self, source: Tensors, entries: Sequence[TensorEntry], kinds: Mapping[str, Kind]):
        """Reads nothing yet.

        Args:
          source: with all its digits (`quantised.opened(unrounded=True)`).
          entries: every tensor of the folder.
          kinds: of the kernels that are kept in few bits, by leaf path.
        """
        self.folder, self.files, self.metadata = source.folder, source.files, source.metadata
        self.infos, self.weight_map = source.infos, source.weight_map
        self.quantised, self.spare = source.quantised, source.spare
        self._source, self._kinds = source, kinds
        self._entries = {entry.name: entry for entry in entries if entry.parts[0].leaf in kinds}

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """As `Tensors.read`."""
        if name not in self._entries:
            return self._source.read(name, index)
        return self.exact(name, index).astype(STORED[self.infos[name].dtype])

    def exact(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """As `Tensors.exact`; a quantised kernel in float32."""
        if name not in self._entries:
            return self._source.exact(name, index)
        entry, whole = self._entries[name], self._source.exact(name)
        parts = [self._rounded(entry.unpack(whole, n), part.leaf) for n, part in enumerate(entry.parts)]
        return entry.pack(parts)[index]

    def _rounded(self, kernel: np.ndarray, leaf: str) -> np.ndarray:
        """A kernel [*E, I, O] after it has been in codes."""
        made = quantise(np.swapaxes(kernel, -1, -2), self._kinds[leaf])
        codes = {name: jnp.asarray(array) for name, array in made.items()}
        return np.asarray(QuantisedKernel.of(codes, kernel.shape[-2:]).dequantised(jnp.float32))

    def is_packed(self, name: str) -> bool:
        """As `Tensors.is_packed`."""
        return name in self._entries or self._source.is_packed(name)

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """As `Tensors.pieces`; a quantised kernel all at once."""
        if name in self._entries:
            yield self.exact(name).reshape(-1)
        else:
            yield from self._source.pieces(name)
