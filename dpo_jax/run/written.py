"""The weights as the exported folder will have them: in the digits of its dtype."""

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
from dpo_jax.model.spec import DecoderSpec
from dpo_jax.model.weights import Weights
from dpo_jax.trees import Params

Digits = Mapping[str, tuple[int, int]]
"""By trained leaf, bits of exponent and mantissa of the dtype that it is written in, where it has fewer digits."""
KEEP: dict[str, Literal["keep", "float32", "bfloat16"]] = {"same": "keep", "float32": "float32", "bfloat16": "bfloat16"}
"""What the setting `export.dtype` is called by `hf.checkpoint.save_hf`."""


def digits_written(export: ExportSettings, spec: DecoderSpec, like: Path, trained: Params) -> Digits:
    """What writing these trained weights rounds away; empty where it rounds nothing."""
    kinds = checkpoint.dtypes_written(spec, like, KEEP[export.dtype])
    found = {}
    for path, leaf in trees.paths(trained).items():
        kind = jnp.finfo(kinds.get(path, "float32"))
        if kind.nmant < jnp.finfo(leaf.dtype).nmant:
            found[path] = (kind.nexp, kind.nmant)
    return found


def as_written(weights: Weights, digits: Digits) -> Weights:
    """The weights rounded to these digits, in the dtype that they had."""
    return Weights(_rounded(weights.trained, tuple(sorted(digits.items()))), weights.frozen, weights.rows)


@functools.partial(jax.jit, static_argnums=1)
def _rounded(params: Params, digits: tuple[tuple[str, tuple[int, int]], ...]) -> Params:
    bits = dict(digits)
    leaves = trees.paths(params)
    # a cast there and back would be left out by XLA, which may keep more digits than a program asks for
    rounded = {path: lax.reduce_precision(leaf, *bits[path]) for path, leaf in leaves.items() if path in bits}
    return trees.from_paths(leaves | rounded)


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
    if written >= LITTLE * trained:
        return said
    return (
        f"{said}; to keep it all set export.dtype=float32, to move more a higher optimizer.learning_rate or more steps"
    )
