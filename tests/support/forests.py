"""Small random preference data, already tokenised, and a decoder for it, for the tests of batches and of steps."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.data.encoded import Encoded
from dpo_jax.data.examples import ranks
from tests.support.specs import plain_spec

SPEC = plain_spec(width=16, layers=2, heads=4, mlp_width=24, windows=(None, 6))


def settled(tree: Any) -> Any:
    """The same arrays with dtypes that are not weak, as they come out of a step: a step is compiled once for both."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), tree)


def random_encoded(units=9, completions=(2, 2), vocab=50, seed=0, longest=12, skips=False, soft=False) -> Encoded:
    """Units with `completions` = (fewest, most) completions each; every pair of a unit is a pair, the first the best.

    A unit with one completion is desirable or not. With `soft`, the labels of pairs are between 0 and 1.
    """
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(1, vocab, rng.integers(1, longest)) for _ in range(units)]
    answers = [
        [
            rng.integers(1, vocab, rng.integers(1, longest))
            for _ in range(rng.integers(completions[0], completions[1] + 1))
        ]
        for _ in prompts
    ]
    pieces = [piece for prompt, texts in zip(prompts, answers, strict=True) for piece in (prompt, *texts)]
    starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])[:-1]])
    is_prompt = np.concatenate([[True] + [False] * len(texts) for texts in answers])
    unit = np.repeat(np.arange(units), [len(texts) for texts in answers])
    first = np.cumsum([0] + [len(texts) for texts in answers])
    pairs = [
        (u, first[u] + i, first[u] + j)
        for u, texts in enumerate(answers)
        for i in range(len(texts))
        for j in range(i, len(texts))
        if i < j or len(texts) == 1
    ]
    lengths = np.asarray([len(piece) for piece in pieces])
    skip = np.zeros(len(unit), np.int64) if not skips else rng.integers(0, lengths[is_prompt][unit])
    i32 = np.int32
    weight, margin = rng.uniform(0.5, 2, len(pairs)), rng.uniform(0, 0.5, len(pairs))
    label = np.where([i == j for _, i, j in pairs], rng.integers(0, 2, len(pairs)), 1 - soft * rng.random(len(pairs)))
    encoded = Encoded(
        tokens=np.concatenate(pieces).astype(i32),
        unscored_start=np.zeros(0, np.int64),
        unscored_end=np.zeros(0, np.int64),
        prompt_start=starts[is_prompt].astype(np.int64),
        prompt_length=lengths[is_prompt].astype(i32),
        completion_unit=unit.astype(i32),
        completion_start=starts[~is_prompt].astype(np.int64),
        completion_length=lengths[~is_prompt].astype(i32),
        completion_skip=skip.astype(i32),
        pair_unit=np.asarray([p[0] for p in pairs], i32),
        chosen=np.asarray([p[1] for p in pairs], i32),
        rejected=np.asarray([p[2] for p in pairs], i32),
        weight=weight.astype(np.float32),
        margin=margin.astype(np.float32),
        label=label.astype(np.float32),
        file=np.zeros(units, i32),
        line=np.arange(1, units + 1, dtype=i32),
        content_key=np.arange(units),
        ids_key=np.arange(units),
        truncated=skip > 0,
        rank=np.zeros(len(unit), i32),
        files=("made up",),
    )
    return replace(encoded, rank=ranks(encoded))
