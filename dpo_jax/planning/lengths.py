"""Made-up preference data of given lengths, for a plan whose data are not at hand."""

import numpy as np

from dpo_jax.data.encoded import Encoded

PROMPT_TOKENS, COMPLETION_TOKENS = 125, 46
"""Means of hh-rlhf's harmless part (SmolLM2's tokens): prompts 125, completions 41 and 51."""
SPREAD = 0.7
"""Standard deviation of the logarithm of a length: with it half of the prompts are below 98 and 1 % above 499, as in
hh-rlhf, where it is 98 and 542."""
UNITS_PER_STEP = 6


def made_up(
    pairs: int, *, prompt_tokens: int, completion_tokens: int, max_length: int, steps: int = UNITS_PER_STEP
) -> Encoded:
    """Pairs for a few steps, one for each prompt; lengths are log-normal with the given means, cut to `max_length`.

    Always the same for the same arguments. Token ids are all 0.
    """
    count = pairs * steps
    rng = np.random.default_rng(0)
    completions = np.clip(_lengths(rng, completion_tokens, 2 * count), 1, max_length - 1)
    longest = completions.reshape(count, 2).max(axis=1)
    prompts = np.clip(_lengths(rng, prompt_tokens, count), 1, max_length - longest)
    units = np.arange(count)
    sizes = np.column_stack([prompts, completions.reshape(count, 2)]).reshape(-1)
    starts = (np.cumsum(sizes) - sizes).reshape(count, 3)
    int32, ones = np.int32, np.ones(count, np.float32)
    return Encoded(
        tokens=np.zeros(int(sizes.sum()), int32),
        unscored_start=np.zeros(0, np.int64),
        unscored_end=np.zeros(0, np.int64),
        prompt_start=starts[:, 0].astype(np.int64),
        prompt_length=prompts.astype(int32),
        completion_unit=np.repeat(units, 2).astype(int32),
        completion_start=starts[:, 1:].reshape(-1).astype(np.int64),
        completion_length=completions.astype(int32),
        completion_skip=np.zeros(2 * count, int32),
        pair_unit=units.astype(int32),
        chosen=(2 * units).astype(int32),
        rejected=(2 * units + 1).astype(int32),
        weight=ones,
        margin=0 * ones,
        label=ones,
        file=np.zeros(count, int32),
        line=(units + 1).astype(int32),
        content_key=units.astype(np.int64),
        ids_key=units.astype(np.int64),
        truncated=np.zeros(2 * count, bool),
        rank=np.tile(np.asarray([0, 1], int32), count),
        files=("made up",),
    )


def _lengths(rng: np.random.Generator, mean: int, count: int) -> np.ndarray:
    return np.rint(rng.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD, count)).astype(np.int64)
