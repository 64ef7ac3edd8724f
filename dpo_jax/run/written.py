"""The weights as the exported folder will have them: in the digits of its dtype."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from dpo_jax import trees
from dpo_jax.hf import checkpoint
from dpo_jax.hf.settings import ExportSettings
from dpo_jax.model.adapters import folded
from dpo_jax.model.decoder import abstract_params
from dpo_jax.model.spec import DecoderSpec
from dpo_jax.model.weights import Weights
from dpo_jax.training.optimizer import stochastically_rounded
from dpo_jax.trees import Params

KEEP: dict[str, Literal["keep", "float32", "bfloat16"]] = {"same": "keep", "float32": "float32", "bfloat16": "bfloat16"}
"""What the setting `export.dtype` is called by `hf.checkpoint.save_hf`."""
BFLOAT16 = (8, 7)


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What writing the trained weights rounds away.

    Attributes:
      digits: by trained leaf, bits of exponent and mantissa of the dtype that it is written in, where it has fewer.
      seed: of rounding to bfloat16 at random, up or down so that the mean is kept; None rounds to nearest even.
    """

    digits: Mapping[str, tuple[int, int]]
    seed: int | None = None

    @classmethod
    def of(cls, export: ExportSettings, spec: DecoderSpec, like: Path, trained: Params, seed: int) -> "Rounding":
        """That of an export like a folder; without digits where it rounds nothing."""
        kinds = checkpoint.dtypes_written(spec, like, KEEP[export.dtype])
        found = {}
        for path, leaf in trees.paths(trained).items():
            kind = jnp.finfo(kinds.get(path, "float32"))
            if kind.nmant < jnp.finfo(leaf.dtype).nmant:
                found[path] = (kind.nexp, kind.nmant)
        return cls(found, seed if export.rounding == "random" else None)

    def at_random(self, weights: Weights) -> Weights:
        """The weights for an export, which rounds to nearest by itself: rounded already, if that is to be at random."""
        return weights if self.seed is None else self(weights)

    def __call__(self, weights: Weights) -> Weights:
        """The weights with the numbers that they are written with, in the dtype that they had."""
        rounded = _rounded(weights.trained, tuple(sorted(self.digits.items())), self.seed)
        return Weights(rounded, weights.frozen, weights.rows)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _rounded(params: Params, digits: tuple[tuple[str, tuple[int, int]], ...], seed: int | None) -> Params:
    leaves = trees.paths(params)
    key = None if seed is None else jax.random.key(seed)
    for number, (path, bits) in enumerate(digits):
        if key is not None and bits == BFLOAT16:
            moved = stochastically_rounded(leaves[path], jax.random.fold_in(key, number))
            leaves[path] = moved.astype(leaves[path].dtype)
        else:  # a cast there and back would be left out by XLA, which may keep more digits than a program asks for
            leaves[path] = lax.reduce_precision(leaves[path], *bits)
    return trees.from_paths(leaves)


@dataclasses.dataclass(frozen=True)
class Merging:
    """What writing an adapter's base with the adapter in it rounds away.

    Attributes:
      digits: by leaf of the model, as of `Rounding`.
      spec: of the model.
    """

    digits: Mapping[str, tuple[int, int]]
    spec: DecoderSpec

    @classmethod
    def of(cls, export: ExportSettings, spec: DecoderSpec, like: Path) -> "Merging":
        """That of a merged export like a folder; without digits where it rounds nothing."""
        kinds = {
            path: jnp.finfo(kind) for path, kind in checkpoint.dtypes_written(spec, like, KEEP[export.dtype]).items()
        }
        return cls({path: (kind.nexp, kind.nmant) for path, kind in kinds.items() if kind.nmant < 23}, spec)

    def __call__(self, weights: Weights) -> Weights:
        """The model with the numbers that it is written with."""
        return Weights(_merged(weights.params, self.spec, tuple(sorted(self.digits.items()))))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _merged(params: Params, spec: DecoderSpec, digits: tuple[tuple[str, tuple[int, int]], ...]) -> Params:
    leaves = trees.paths(folded(params, abstract_params(spec)))
    for path, bits in digits:
        leaves[path] = lax.reduce_precision(leaves[path].astype(jnp.float32), *bits)
    return trees.from_paths(leaves)


UNROUNDED = "unrounded/"
"""Before the name of a metric: of the weights as they were trained, before they are rounded to be written."""
LITTLE = 0.9
"""Share of the margin below which the remedies are said."""


def moved_line(moved: Sequence[int] | None) -> str | None:
    """How many weights of the exported folder are others than before, in words."""
    if not moved:
        return None
    weights, of = moved
    return f"{weights / of:.1%} of the {of:,} weights moved"


def margin_line(record: Mapping[str, float | None], dtype: str) -> str | None:
    """What rounding leaves of the held-out margin, in words; None where it was not measured, or rounds nothing."""
    written, trained = (record.get(f"eval_{name}rewards/margins") for name in ("", UNROUNDED))
    if written is None or trained is None:
        return None
    name = "the dtype of the source" if dtype == "same" else dtype
    said = f"held-out margin {trained:+.3g} before and {written:+.3g} after rounding to {name}"
    if trained - written <= (1 - LITTLE) * abs(trained):
        return said
    return (
        f"{said}; to keep it all set export.dtype=float32, to move more a higher optimizer.learning_rate or more steps"
    )
