"""What a packed weight is made of: tensors that stand beside one another, a plan from their headers, and a row for each
way in which they can.

A packed weight is a stem, such as `model.layers.0.mlp.up_proj`, with several suffixes, such as `.qweight` and
`.scales`. Their shapes and dtypes are held against each other before anything is read, so that no shape that one of
them claims can make anyone take more memory than the tensors themselves do.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.errors import UserError
from dpo_jax.hf.quantisation import Method
from dpo_jax.hf.tensors import TensorInfo

Shape = tuple[int, ...]
Arrays = Mapping[str, np.ndarray]
"""The tensors of a weight by suffix."""
AGAIN = "fetch the model again, or give the one that was quantised"


class Damaged(ValueError):
    """What is wrong with the numbers of the tensor of a suffix."""

    def __init__(self, suffix: str, why: str):
        """Which tensor, and what is wrong."""
        super().__init__(why)
        self.suffix = suffix


class Plan(NamedTuple):
    """What a packed weight becomes: its shape, the dtype that its own tensors name if they do, and what is needed
    beside its arrays to compute it."""

    shape: Shape
    facts: tuple[Any, ...] = ()
    dtype: str | None = None


class Stem(NamedTuple):
    """The tensors of one packed weight by suffix, none of them read yet; `read` is for small ones."""

    name: str
    infos: Mapping[str, TensorInfo]
    folder: Path
    read: Callable[[str], np.ndarray]

    def wrong(self, suffix: str, why: str, remedy: str = AGAIN) -> UserError:
        """The error for one of the tensors."""
        found = self.infos.get(suffix) or next(iter(self.infos.values()))
        return UserError(f"{self.folder / found.file}: tensor {self.name + suffix!r} {why}; {remedy}")

    def shape(self, suffix: str, *dtypes: str, rank: int | None = None) -> Shape:
        """Shape of a tensor, which must have one of these dtypes, so many axes, and something in it."""
        info = self.infos[suffix]
        if info.dtype not in dtypes:
            raise self.wrong(suffix, f"has dtype {info.dtype}, and {' or '.join(dtypes)} is wanted")
        if rank is not None and len(info.shape) != rank or 0 in info.shape:
            axes = "numbers" if rank is None else f"{rank} axes with numbers in them"
            raise self.wrong(suffix, f"has shape {list(info.shape)}, and {axes} are wanted")
        return info.shape

    def must(self, suffix: str, shapes: Sequence[Shape], *dtypes: str) -> None:
        """Refuses a tensor that has none of these shapes, or another dtype."""
        found = self.shape(suffix, *dtypes)
        if found not in shapes:
            asked = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes)) or "another way of packing"
            raise self.wrong(suffix, f"has shape {list(found)}, and config.json and what is beside it ask for {asked}")


class PackedFormat(NamedTuple):
    """One format: the suffixes of its tensors, and how a weight is planned and computed from them.

    `codes` is the suffix of the packed numbers themselves and `plain` that of the weight they become; `fits` tells from
    what there is of a stem whether it is of this format.
    """

    codes: str
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    fits: Callable[[Mapping[str, TensorInfo]], bool]
    plan: Callable[[Stem, Method], Plan]
    weight: Callable[[Arrays, Plan], np.ndarray]
    plain: str = ".weight"
