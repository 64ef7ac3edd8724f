"""Backends of attention held against the plain formula, and timed, on the device at hand: one small batch of each kind
of attention that a model has, with several trees in a row, two branches and padding.

An error is that of the worst slot: the norm of what is wrong there, over that of what is wanted plus the root mean
square over slots. It may be `TIMES` that of the plain formula in the run's dtype, and `FLOORS` more. A window, or a
soft cap, is smaller in the batch than in the model, so that it does something there.

Letters: B rows, T slots, H heads, K key-value heads, C channels of a key, E channels of a value.
"""

import collections
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dpo_jax.model import spec as specs
from dpo_jax.model.attention import TILE, Bounds, Layout, VisibilityRules, alibi_slopes, attend_seen, visible
from dpo_jax.model.backends import table
from dpo_jax.model.backends.dispatch import PackedRows

TIMES = 3.0
FLOORS = {"float32": 1e-4, "float16": 3e-3, "bfloat16": 1e-2}
ROWS = 2
REPEATS = 5
ALIKE = 1.05
"""A backend must take so many times as long as another to lose against it; within that, the table's order decides."""
PARTS = ("values", "gradient of queries", "gradient of keys", "gradient of values", "gradient of sinks")


class Case(NamedTuple):
    """One kind of attention."""

    heads: int
    kv_heads: int
    channels: int
    value: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    alibi: float | None = None

    def rules(self, sinks: jax.Array) -> VisibilityRules:
        """How scores are made."""
        slopes = None if self.alibi is None else jnp.asarray(alibi_slopes(self.heads, self.alibi))
        return VisibilityRules(self.scale, self.softcap, sinks if self.sinks else None, slopes)


Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""Of queries [B, T, H, C], keys, values and sinks [H]: what is attended to, [B, T, H, E]."""
Candidate = Callable[[Case, Layout, Bounds], Attend]


class BackendVerdict(NamedTuple):
    """What was found of one backend: what is wrong with it, in a few words, or None; and milliseconds."""

    wrong: str | None
    milliseconds: float | None


def cases_of(spec: specs.DecoderSpec, length: int) -> dict[Case, int]:
    """The kinds of attention of a decoder, small enough for rows of this length, and of how many layers each is."""
    found = collections.Counter()
    for layer in spec.layers:
        match layer.mixer:
            case specs.Attention() as own:
                scale = own.head_dim**-0.5 if own.scale is None else own.scale
                window = None if own.window is None else max(1, min(own.window, length // 8))
                cap = None if own.softcap is None else min(own.softcap, 4.0)
                shape = own.heads, own.kv_heads, own.head_dim, own.head_dim
                found[Case(*shape, scale, window, cap, own.sinks, own.alibi)] += 1
            case specs.MLA() as own:
                wide = own.plain_dim + own.rope_dim
                found[Case(own.heads, own.heads, wide, own.value_dim, own.scale)] += 1
    return dict(found)


# ---------------------------------------------------------------------------------------------- one batch


def packed(rows: int, length: int, seed: int) -> Layout:
    """Rows of trees of random lengths, mostly of two branches, and padding at the end of each row."""
    rng = np.random.default_rng(seed)
    group, branch, position = np.zeros((3, rows, length), np.int32)
    for row in range(rows):
        at, number, end = 0, 0, length - int(rng.integers(length // 16, length // 8))
        while at < end - 4:
            number += 1
            prompt, *answers = (int(n) for n in rng.integers(2, max(4, length // 6), 2 + (number % 4 > 0)))
            for which, size in enumerate((prompt, *answers)):
                size = min(size, end - at)
                where = (row, slice(at, at + size))
                group[where], branch[where] = number, which
                position[where] = np.arange(size) + (prompt if which else 0)
                at += size
    return Layout(*map(jnp.asarray, (group, branch, position)))


def bounds_of(layout: Layout, platform: str) -> Bounds:
    """The most texts of a row, up to a multiple of eight, and branches of a tree."""
    pairs = zip(np.asarray(layout.group), np.asarray(layout.branch), strict=True)
    texts = max(len({(g, b) for g, b in zip(*pair, strict=True) if g}) for pair in pairs)
    tile = table.TILES.get(platform, TILE)
    return Bounds(-(-texts // 8) * 8, max(1, int(layout.branch.max())), tile, platform)


def arrays_of(case: Case, layout: Layout, dtype: DTypeLike, seed: int) -> tuple[jax.Array, ...]:
    """Queries, keys, values, sinks as heavy as a hundred keys, and the slope of a loss, zero at padding."""
    shapes = [(case.heads, case.channels), (case.kv_heads, case.channels), (case.kv_heads, case.value)]
    shapes.append((case.heads, case.value))
    keys = jax.random.split(jax.random.key(seed), 5)
    made = [jax.random.normal(key, (*layout.group.shape, *shape)) for key, shape in zip(keys, shapes, strict=False)]
    made[0] = made[0] * (1.5 / (case.scale * math.sqrt(case.channels)))
    made[3] = jnp.where((layout.group > 0)[:, :, None, None], made[3], 0)
    query, key, value, slope = (x.astype(dtype) for x in made)
    return query, key, value, 4 + jax.random.normal(keys[4], (case.heads,)), slope


@functools.lru_cache(maxsize=64)
def graded(candidate: Candidate, case: Case, bounds: Bounds) -> Callable:
    """A jitted function of rows, queries, keys, values, sinks and a slope: what is attended to, and gradients along the
    slope."""

    def total(query, key, value, sinks, layout, slope):
        found = candidate(case, layout, bounds)(query, key, value, sinks)
        return (found.astype(jnp.float32) * slope.astype(jnp.float32)).sum(), found

    def run(layout, *arrays):
        *inputs, slope = arrays
        (_, found), gradients = jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True)(*inputs, layout, slope)
        return found, *gradients

    return jax.jit(run)


def plain(case: Case, layout: Layout, bounds: Bounds) -> Attend:
    """The plain formula over whole rows."""

    def attend(query, key, value, sinks):
        distance = layout.position[:, :, None] - layout.position[:, None, :]
        return attend_seen(query, key, value, visible(layout, case.window), case.rules(sinks), distance)

    return attend


def by_backend(name: str, case: Case, layout: Layout, bounds: Bounds) -> Attend:
    """The same by a backend."""

    def attend(query, key, value, sinks):
        rows = PackedRows.of(layout, [case.window], name, bounds=bounds)
        return rows.attend(query, key, value, case.window, case.rules(sinks))

    return attend


def errors(found: Sequence[Any], wanted: Sequence[Any], layout: Layout) -> list[float]:
    """Of values and of each gradient the worst slot's error; infinite where anything, padding too, is no number."""
    there = np.asarray(layout.group) > 0
    return [
        _error(np.asarray(a, np.float32), np.asarray(b, np.float32), there) for a, b in zip(found, wanted, strict=True)
    ]


def _error(found: np.ndarray, wanted: np.ndarray, there: np.ndarray) -> float:
    if not np.isfinite(found).all():
        return math.inf
    if found.ndim == 4:
        found, wanted = (x[there].reshape(int(there.sum()), -1) for x in (found, wanted))
    else:
        found, wanted = found[:, None], wanted[:, None]
    off, size = (np.linalg.norm(x, axis=1) for x in (found - wanted, wanted))
    usual = math.sqrt(float((size**2).mean()))
    return 0.0 if usual == 0 and not off.any() else float((off / (size + usual + 1e-30)).max())


# ---------------------------------------------------------------------------------------------- all backends


def judged(
    candidates: Mapping[str, Candidate],
    cases: Mapping[Case, int],
    dtype: str,
    length: int,
    *,
    platform: str = "cpu",
    seed: int = 0,
    repeats: int = REPEATS,
) -> dict[str, BackendVerdict]:
    """What is to be said of each candidate: the first thing that is wrong with it, or the time that it takes.

    Args:
      candidates: backends by name.
      cases: kinds of attention, and of how many layers each is.
      dtype: of the computation.
      length: slots of a row.
      platform: that it runs on.
      seed: of the batch.
      repeats: runs that are timed; 0 times nothing.
    """
    layout = packed(ROWS, length, seed)
    bounds = bounds_of(layout, platform)
    wrong: dict[str, str] = {}
    taken: dict[str, list[float]] = collections.defaultdict(list)
    for case, layers in cases.items():
        arrays = layout, *arrays_of(case, layout, dtype, seed)
        exact = graded(plain, case, bounds)
        with jax.default_matmul_precision("highest"):
            wanted = jax.device_get(exact(layout, *(x.astype(jnp.float32) for x in arrays[1:])))
        allowed = [TIMES * e + FLOORS[dtype] for e in errors(jax.device_get(exact(*arrays)), wanted, layout)]
        for name, candidate in candidates.items():
            if name in wrong:
                continue
            try:
                function = graded(candidate, case, bounds)
                found = jax.device_get(function(*arrays))
                seconds = [_seconds(function, arrays) for _ in range(repeats)]
            except Exception as error:  # noqa: BLE001 - a kernel may fail in any way, and another one is taken then
                wrong[name] = f"fails ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
                continue
            bad = [
                f"{part} {100 * off:.3g} % off, where {100 * most:.2g} % may be rounding"
                for part, off, most in zip(PARTS, errors(found, wanted, layout), allowed, strict=True)
                if not off <= most
            ]
            wrong |= {name: bad[0]} if bad else {}
            taken[name] += [1000 * layers * statistics.median(seconds)] if seconds else []
    return {name: BackendVerdict(wrong.get(name), sum(taken[name]) if taken[name] else None) for name in candidates}


def _seconds(function: Callable, arrays: Sequence[Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(function(*arrays))
    return time.perf_counter() - began


def best(verdicts: Mapping[str, BackendVerdict]) -> str | None:
    """The first of those that agree which no other beats by much; None if none agrees."""
    times = {name: found.milliseconds or 0.0 for name, found in verdicts.items() if found.wrong is None}
    return next((name for name, ms in times.items() if ms <= ALIKE * min(times.values())), None)
