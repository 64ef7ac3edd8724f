"""Data for measurements: pairs of given lengths as arrays, without a tokenizer or a file."""

import numpy as np

from dpo_jax.data.encoded import Encoded


def encoded_of(lengths: np.ndarray, vocabulary: int, seed: int = 0, *, blank: bool = False) -> Encoded:
    """Pairs of random tokens, one prompt each.

    Args:
      lengths: tokens of prompt, chosen and rejected, int [P, 3].
      vocabulary: ids are below it.
      seed: of the tokens.
      blank: all tokens are 0, and take no memory as long as nobody writes to them.
    """
    count, total = len(lengths), int(lengths.sum())
    starts = np.concatenate([[0], np.cumsum(lengths.reshape(-1))[:-1]]).reshape(count, 3)
    tokens = np.zeros(total, np.int32) if blank else np.random.default_rng(seed).integers(0, vocabulary, total)
    units = np.arange(count, dtype=np.int32)
    return Encoded(
        tokens=tokens.astype(np.int32, copy=False),
        unscored_start=np.zeros(0, np.int64),
        unscored_end=np.zeros(0, np.int64),
        prompt_start=starts[:, 0].astype(np.int64),
        prompt_length=lengths[:, 0].astype(np.int32),
        completion_unit=np.repeat(units, 2),
        completion_start=starts[:, 1:].reshape(-1).astype(np.int64),
        completion_length=lengths[:, 1:].reshape(-1).astype(np.int32),
        completion_skip=np.zeros(2 * count, np.int32),
        pair_unit=units,
        chosen=2 * units,
        rejected=2 * units + 1,
        weight=np.ones(count, np.float32),
        margin=np.zeros(count, np.float32),
        label=np.ones(count, np.float32),
        file=np.zeros(count, np.int32),
        line=units + 1,
        content_key=units.astype(np.int64),
        ids_key=units.astype(np.int64),
        truncated=np.zeros(2 * count, bool),
        rank=np.tile(np.asarray([0, 1], np.int32), count),
        files=("measured",),
    )
