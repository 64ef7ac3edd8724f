"""The reference as data: its log-probability of each scored token, computed once, in a content-addressed file."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dpo_jax.data.encode import Encoded
from dpo_jax.files import digest_of, write_whole
from dpo_jax.processes.here import here

VERSION = "5"
"""Changed whenever the same weights and tokens would give other numbers."""


OF_PAIRS = ("weight", "margin", "label")
"""Columns of a data set that say what is made of log-probabilities, and not what they are."""


def cache_key(weights_digest: str, encoded: Encoded, computed: str) -> str:
    """Digest of everything that changes the numbers: weights, token ids, what is scored after what, and how it was
    `computed` (dtype, platform, attention)."""
    return digest_of(f"{VERSION} {weights_digest} {computed} {data_digest(encoded, without=OF_PAIRS)}")


NAMES_OF_PROMPTS = ("content_key", "ids_key")
"""Columns that say of prompts only which are the same."""


def data_digest(encoded: Encoded, without: Sequence[str] = ()) -> str:
    """SHA-256 of every array of a data set that decides numbers, so of every token and of every pair with its weight
    and margin."""
    without = (*without, *NAMES_OF_PROMPTS)
    digest = hashlib.sha256()
    for field in dataclasses.fields(encoded):
        array = getattr(encoded, field.name)
        if isinstance(array, np.ndarray) and field.name not in without:
            digest.update(f"{field.name}{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def cached(folder: Path, key: str, tokens: int, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Log-probabilities by scored token, float32 in nats: read from `folder/reference-KEY.bin`, or computed and kept.

    A file that is damaged (its digest differs) is computed again. Values that are not finite are never written.

    Raises:
      ValueError: `compute` returned a value that is not finite, or not one per scored token.
    """
    path = folder / f"reference-{key[:40]}.bin"
    known = _read(path, tokens)
    if here().all_of("cached reference", known is not None) and known is not None:
        return known
    values = np.asarray(compute(), np.float32)
    if values.shape != (tokens,) or not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise ValueError(f"the reference gave {bad} non-finite log-probabilities of {values.shape}")
    here().in_turn("reference kept", lambda: _write(path, values) if _read(path, tokens) is None else None)
    return values


def _read(path: Path, tokens: int) -> np.ndarray | None:
    """The file's values, or None if it is absent or damaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    digest, body = data[:32], data[32:]
    if hashlib.sha256(body).digest() != digest or len(body) != 4 * tokens:
        return None
    return np.frombuffer(body, np.float32).copy()


def _write(path: Path, values: np.ndarray) -> None:
    """Digest and values, put in place in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = np.ascontiguousarray(values).tobytes()
    write_whole(path, hashlib.sha256(body).digest() + body)
