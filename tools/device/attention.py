"""Every backend of attention that this device can run, held against the plain formula in float32, and timed."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.model.attention import TILE, Bounds, Layout, VisibilityRules, alibi_slopes, attend_seen, visible
from dpo_jax.model.backends import table
from dpo_jax.model.backends.dispatch import PackedRows
from dpo_jax.run.models import device_of


class Case(NamedTuple):
    """One kind of attention."""

    heads: int
    kv_heads: int
    channels: int
    value: int | None = None
    """Channels of a value; None: those of a key."""
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    alibi: bool = False
    branches: int = 2

    def needs(self) -> frozenset[str]:
        """Features, as backends name them."""
        wants = {
            "window": self.window is not None,
            "softcap": self.softcap is not None,
            "sinks": self.sinks,
            "alibi": self.alibi,
            "value width": self.value is not None,
        }
        return frozenset(name for name, wanted in wants.items() if wanted)

    def rules(self, sinks: jax.Array) -> VisibilityRules:
        """How scores are made."""
        slopes = jnp.asarray(alibi_slopes(self.heads, 1.0)) if self.alibi else None
        return VisibilityRules(self.channels**-0.5, self.softcap, sinks if self.sinks else None, slopes)


CASES = {
    "heads of 128": Case(16, 8, 128),
    "heads of 64": Case(9, 3, 64),
    "heads of 256": Case(8, 4, 256),
    "one key head": Case(8, 1, 128),
    "window of 128": Case(16, 8, 128, window=128),
    "four branches": Case(16, 8, 128, branches=4),
    "soft cap": Case(16, 8, 128, softcap=30.0),
    "sinks": Case(16, 8, 64, sinks=True),
    "alibi": Case(16, 16, 64, alibi=True),
    "wide keys": Case(16, 16, 192, value=128),
}
ROWS, LENGTH, TIMED_ROWS, TIMED_LENGTH = 2, 512, 8, 1280
TILES = (64, 256, 512, 1024, 2048)
"""Slots of the tiles of the backend xla that are tried."""


def packed(rows: int, length: int, branches: int, seed: int = 0) -> Layout:
    """Rows of trees of random lengths, and some padding at the end of each."""
    rng = np.random.default_rng(seed)
    group, branch, position = np.zeros((3, rows, length), np.int32)
    for row in range(rows):
        at, number = 0, 0
        while at < length - 40:
            number += 1
            prompt = int(rng.integers(8, length // 4))
            sizes = [prompt, *(int(n) for n in rng.integers(1, length // 4, branches))]
            for which, size in enumerate(sizes):
                size = min(size, length - 16 - at)
                where = (row, slice(at, at + size))
                group[where], branch[where] = number, which
                position[where] = np.arange(size) + (prompt if which else 0)
                at += size
    return Layout(*map(jnp.asarray, (group, branch, position)))


def bounds_of(layout: Layout) -> Bounds:
    """The most texts of a row and branches of a tree."""
    group, branch = np.asarray(layout.group), np.asarray(layout.branch)
    texts = [len({(g, b) for g, b in zip(*pair, strict=True) if g}) for pair in zip(group, branch, strict=True)]
    return Bounds(texts=max(texts), branches=max(1, int(branch.max())))


def arrays_of(case: Case, rows: int, length: int, dtype: Any) -> tuple[jax.Array, ...]:
    """Queries, keys, values, sinks, and the slope of a loss."""
    value = case.value or case.channels
    shapes = [(case.heads, case.channels), (case.kv_heads, case.channels), (case.kv_heads, value), (case.heads, value)]
    made = [jax.random.normal(jax.random.key(i), (rows, length, *shape)) for i, shape in enumerate(shapes)]
    query, key, values, slope = (x.astype(dtype) for x in made)
    return query, key, values, jax.random.normal(jax.random.key(9), (case.heads,)), slope


def graded(attend: Callable, layout: Layout, slope: jax.Array) -> Callable:
    """A jitted function of (queries, keys, values, sinks): the values of attention, and the gradient along a slope."""
    there = (layout.group > 0)[:, :, None, None]

    def total(query, key, value, sinks):
        found = jnp.where(there, attend(query, key, value, sinks), 0).astype(jnp.float32)
        return (found * slope.astype(jnp.float32)).sum(), found

    def run(*arrays):
        (_, found), gradients = jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True)(*arrays)
        return found, *gradients

    return jax.jit(run)


def plain(case: Case, layout: Layout) -> Callable:
    """The plain formula over whole rows."""

    def attend(query, key, value, sinks):
        distance = layout.position[:, :, None] - layout.position[:, None, :]
        return attend_seen(query, key, value, visible(layout, case.window), case.rules(sinks), distance)

    return attend


def by_backend(name: str, case: Case, layout: Layout, tile: int | None = None) -> Callable:
    """The same by a backend; tiles are those of the platform unless given."""
    platform = jax.default_backend()
    bounds = bounds_of(layout)._replace(tile=tile or table.TILES.get(platform, TILE), platform=platform)

    def attend(query, key, value, sinks):
        rows = PackedRows.of(layout, [case.window], name, bounds=bounds)
        return rows.attend(query, key, value, case.window, case.rules(sinks))

    return attend


def errors(found: Any, wanted: Any) -> dict[str, float]:
    """Relative errors, |a - b| / |b|, of values and gradients."""
    names = ("values", "queries", "keys", "values' gradient", "sinks")
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(found, wanted, strict=True)]
    return {
        name: float(np.linalg.norm(a - b) / np.linalg.norm(b))
        for name, (a, b) in zip(names, pairs, strict=True)
        if np.linalg.norm(b) > 0
    }


def compared(name: str, case: Case, dtype: Any) -> dict[str, Any]:
    """A backend's errors in one case, beside those of the plain formula in the same dtype."""
    layout = packed(ROWS, LENGTH, case.branches)
    *exact, slope = arrays_of(case, ROWS, LENGTH, dtype)
    wide = [x.astype(jnp.float32) for x in exact]
    with jax.default_matmul_precision("highest"):
        wanted = graded(plain(case, layout), layout, slope)(*wide)
        same = errors(graded(plain(case, layout), layout, slope)(*exact), wanted)
        function = graded(by_backend(name, case, layout), layout, slope)
        found = function(*exact)
    again = function(*exact)
    return {
        "errors": errors(found, wanted),
        "plain": same,
        "repeats": all(bool((a == b).all()) for a, b in zip(found, again, strict=True)),
    }


def timed(attend: Callable, case: Case, layout: Layout, dtype: Any, repeats: int = 10) -> float:
    """Milliseconds of values and gradients together, the median of some runs after one that compiles."""
    rows, length = layout.group.shape
    *arrays, slope = arrays_of(case, rows, length, dtype)
    function = graded(attend, layout, slope)
    jax.block_until_ready(function(*arrays))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function(*arrays))
        seconds.append(time.perf_counter() - began)
    return 1000 * statistics.median(seconds)


def whole_rows(case: Case, layout: Layout) -> Callable:
    """cuDNN by JAX's public function, with a dense mask."""
    seen = visible(layout, case.window)[:, None]

    def attend(query, key, value, sinks):
        return jax.nn.dot_product_attention(
            query, key, value, mask=seen, scale=case.channels**-0.5, implementation="cudnn"
        )

    return attend


def tried(function: Callable[[], Any]) -> Any:
    """What it returns, or in one line what went wrong."""
    try:
        return function()
    except Exception as error:  # noqa: BLE001 - a kernel may fail in any way, and the next one is to be tried
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def able() -> list[str]:
    """Backends for this device whose packages are here."""
    device = device_of(jax.devices()[0])
    return [name for name in table.BACKENDS if table.unfit(name, device) is None]


def numerics(name: str) -> dict[str, Any]:
    """Errors of a backend in every case that it takes."""
    device = device_of(jax.devices()[0])
    if reason := table.unfit(name, device):
        return {"failed": f"{name} {reason}"}
    backend, found = table.BACKENDS[name], {}
    for title, case in CASES.items():
        fits = case.needs() <= backend.features and case.channels <= (backend.head_most or case.channels)
        for dtype in map(jnp.dtype, backend.dtypes if fits else ()):
            found[f"{title}, {dtype.name}"] = tried(functools.partial(compared, name, case, dtype))
            print(name, dtype.name, title, found[f"{title}, {dtype.name}"], flush=True)
    return found


def timings() -> dict[str, Any]:
    """Milliseconds of attention in rows as a 0.6B model has them, by backend, and by the tiles of xla."""
    case = CASES["heads of 128"]
    layout = packed(TIMED_ROWS, TIMED_LENGTH, case.branches)
    ways = {name: by_backend(name, case, layout) for name in able() if name != "xla"}
    ways |= {"plain formula, whole rows": plain(case, layout)}
    if jax.default_backend() == "gpu":
        ways |= {"cudnn, dense mask": whole_rows(case, layout)}
    found = {name: tried(functools.partial(timed, way, case, layout, jnp.bfloat16)) for name, way in ways.items()}
    for tile in TILES:
        way = by_backend("xla", case, layout, tile)
        found[f"xla, tiles of {tile}"] = tried(functools.partial(timed, way, case, layout, jnp.bfloat16, 3))
    return found
