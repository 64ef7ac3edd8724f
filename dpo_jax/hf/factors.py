"""What an adapter adds to a model: low-rank factors and replaced tensors, by the name that the base's folder has.

Letters: O outputs, I inputs, R rank.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.hf.mapping import TensorEntry

Key = tuple[str, int | None]
"""A matrix of the base's folder: the tensor's name, and the expert's number where one tensor holds those of all."""
EMBED, HEAD = "embed/embedding", "head/embedding"


class Factor(NamedTuple):
    """A change of one matrix W [O, I]: W + scale * b @ a, as the layer multiplies it, whichever way the folder has it.

    An embedding is the matrix from token to width, so O is the width and I the vocabulary.
    """

    a: np.ndarray
    """[R, I] float32."""
    b: np.ndarray
    """[O, R] float32."""
    scale: float
    magnitude: np.ndarray | None = None
    """[O] float32: DoRA's, the norm that each row of the changed matrix is given."""
    bias: np.ndarray | None = None
    """[O] float32: `scale * bias` is added to the layer's bias."""

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]

    def changed(self, matrix: np.ndarray) -> np.ndarray:
        """W [O, I] float32 with the change, in float32."""
        whole = matrix + (self.b @ self.a) * np.float32(self.scale)
        if self.magnitude is None:
            return whole
        norms = np.sqrt(np.einsum("oi,oi->o", whole, whole, dtype=np.float64)).astype(np.float32)
        return (self.magnitude / norms)[:, None] * whole


class Rows(NamedTuple):
    """Rows of an embedding [V, D] that are replaced."""

    numbers: tuple[int, ...]
    values: np.ndarray
    """[len(numbers), D] float32."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What an adapter changes of its base. A tensor is replaced first, whole or by rows, and then added to.

    The names are those of the base's folder. Where `unties`, the base's head is its embedding and the adapter makes
    them two: the head then has a name of its own in `entries`, and starts from the embedding's numbers.
    """

    factors: dict[Key, Factor]
    entries: dict[str, TensorEntry]
    """Of every tensor of the base, and of the head that the adapter makes."""
    replaced: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """Whole tensors: of modules that were trained whole, and biases."""
    rows: dict[str, Rows] = dataclasses.field(default_factory=dict)
    unties: bool = False
    dropout: float = 0.0
    """What it was trained with; it changes nothing else."""

    @functools.cached_property
    def beyond_lora(self) -> str | None:
        """What the adapter has beside plain low-rank factors, in words; None if that is all."""
        found = {
            "magnitudes (DoRA)": any(one.magnitude is not None for one in self.factors.values()),
            "biases of its own (lora_bias)": any(one.bias is not None for one in self.factors.values()),
            "tensors that were trained whole (modules_to_save, or bias)": bool(self.replaced),
            "rows of an embedding (trainable_token_indices)": bool(self.rows),
            "a head that differs from the embedding it is tied to": self.unties,
        }
        return next((what for what, there in found.items() if there), None)


def turned(entry: TensorEntry) -> bool:
    """Whether the folder has this matrix as [O, I]; otherwise [I, O], as an embedding or gpt2's layers are."""
    return entry.turned or entry.parts[0].leaf == HEAD


def size(entry: TensorEntry) -> tuple[int, int]:
    """O and I of a tensor's matrix, or of each expert's."""
    first, second = entry.shape[-2:]
    return (first, second) if turned(entry) else (second, first)


def parts(entry: TensorEntry, factor: Factor) -> list[Factor]:
    """The factor of each leaf that the tensor holds: `a` is shared, and the rows of `b` are divided as the weight's."""
    if len(entry.parts) == 1:
        return [factor]
    magnitude, bias = factor.magnitude, factor.bias
    return [
        factor._replace(
            b=_rows(entry, number, factor.b),
            magnitude=None if magnitude is None else _rows(entry, number, magnitude[:, None])[:, 0],
            bias=None if bias is None else _rows(entry, number, bias[:, None])[:, 0],
        )
        for number in range(len(entry.parts))
    ]


def joined(entry: TensorEntry, factors: Sequence[Factor | None]) -> Factor:
    """One factor of a tensor from those of the leaves that it holds (None: unchanged); the inverse of `parts`.

    Leaves that share `a` and scale keep their rank; others stand in blocks, so that the ranks add up.
    """
    found = stacked(factors, _sizes(entry))
    assert found is not None
    if len(factors) == 1:
        return found
    bounds = np.cumsum(_sizes(entry))[:-1]
    return found._replace(b=_beside(entry, np.split(found.b, bounds)))


def stacked(factors: Sequence[Factor | None], outputs: Sequence[int]) -> Factor | None:
    """One factor of matrices that stand one after another, each with so many outputs; None if none is changed."""
    given = [one for one in factors if one is not None]
    if len(given) == len(factors) == 1 or not given:
        return given[0] if given else None
    assert all(one.magnitude is None and one.bias is None for one in given)
    first = given[0]
    if all(one.scale == first.scale and np.array_equal(one.a, first.a) for one in given):
        blocks = [
            np.zeros((size, first.rank), np.float32) if one is None else one.b
            for one, size in zip(factors, outputs, strict=True)
        ]
        return Factor(first.a, np.concatenate(blocks), first.scale)
    scales = {one.scale for one in given}
    scale = first.scale if len(scales) == 1 else 1.0
    b, row, column = np.zeros((sum(outputs), sum(one.rank for one in given)), np.float32), 0, 0
    for one, size in zip(factors, outputs, strict=True):
        if one is not None:
            place = b[row : row + size, column : column + one.rank]
            place[...] = one.b if one.scale == scale else one.b * np.float32(one.scale / scale)
            column += one.rank
        row += size
    return Factor(np.concatenate([one.a for one in given]), b, scale)


def same(one: Factor, other: Factor) -> bool:
    """Whether two factors are the same, bit for bit."""
    return all(
        left is right is None or np.array_equal(np.asarray(left), np.asarray(right))
        for left, right in zip(one, other, strict=True)
        if (left is None) == (right is None)
    ) and [part is None for part in one] == [part is None for part in other]


def _sizes(entry: TensorEntry) -> list[int]:
    """Outputs of each part."""
    return [part.shape[-1] for part in entry.parts]


def _rows(entry: TensorEntry, number: int, rows: np.ndarray) -> np.ndarray:
    """Rows [O, R] of the whole tensor that belong to the part of that number, in the part's order."""
    each = [size // entry.groups for size in _sizes(entry)]
    start = sum(each[:number])
    grouped = rows.reshape(entry.groups, -1, rows.shape[-1])[:, start : start + each[number]]
    return np.ascontiguousarray(grouped.reshape(-1, rows.shape[-1]))


def _beside(entry: TensorEntry, blocks: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of the parts in the order in which the tensor has them."""
    grouped = [block.reshape(entry.groups, -1, block.shape[-1]) for block in blocks]
    return np.concatenate(grouped, axis=1).reshape(-1, blocks[0].shape[-1])


def by_tensor(factors: Mapping[Key, Factor]) -> dict[str, dict[int | None, Factor]]:
    """The factors of each tensor, by expert."""
    found: dict[str, dict[int | None, Factor]] = {}
    for (name, expert), factor in factors.items():
        found.setdefault(name, {})[expert] = factor
    return found
