"""Attention over packed rows by tokamax's kernel for Hopper GPUs, which takes one range of keys for each query.

Trees of up to two branches are turned until each slot sees one range of the row: the first branch backwards, the
prompt, the second branch. Where there may be more branches, and under a window, texts are laid out one by one (see
`texts`). The forward pass computes no block outside of the ranges; the backward pass computes all of them and masks.

Ranges are no part of the package's public functions: all that is used of it stands in `_kernel` and `_kernel_back`, and
`missing` says whether it still is what it was.

Letters: B rows, T slots, L places, H heads, K key-value heads, C channels.
"""

import dataclasses
import functools
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_jax.model.attention import Bounds, Layout, VisibilityRules
from dpo_jax.model.backends.texts import Kernel, Places, by_copies, lay_out, places_of

BASE, API = "tokamax._src.ops.attention.base", "tokamax._src.ops.attention.api"
KERNEL = "mosaic_gpu"


class Ranges(NamedTuple):
    """Another layout of the rows, and the range of places, from `begin` to before `end`, that each place sees."""

    places: Places
    begin: Int[Array, "B L"]
    end: Int[Array, "B L"]


def missing() -> str | None:
    """What this tokamax lacks; None if it has it all."""
    try:
        base, api = importlib.import_module(BASE), importlib.import_module(API)
    except ImportError as error:
        return f"needs tokamax's attention, which cannot be imported ({error})"
    fields = {field.name for field in dataclasses.fields(base.Mask)} if hasattr(base, "Mask") else set()
    if not {"k_start", "k_end"} <= fields:
        return "needs tokamax's masks of k_start and k_end, which this one does not have"
    if KERNEL not in getattr(api, "IMPLEMENTATIONS", {}):
        return f"needs tokamax's {KERNEL} attention, which this one does not have"
    return None


def prepare(layout: Layout, window: int | None, bounds: Bounds | None) -> Ranges:
    """The turned rows or the texts; the same for all layers.

    Raises:
      ValueError: the number of branches is not bounded.
    """
    if bounds is None:
        raise ValueError(
            "tokamax lays rows out again, and wants to know how many completions a prompt group has; give bounds"
        )
    if window is None and bounds.branches <= 2:
        return jax.vmap(lambda group, branch: _turned(group, branch))(layout.group, layout.branch)
    return _by_text(layout, window, bounds)


def _turned(group: Int[Array, " T"], branch: Int[Array, " T"]) -> Ranges:
    """One row with the first branch of each tree before its prompt, backwards.

    slots    p0 p1 p2 | a0 a1 | b0 b1
    places   a1 a0 | p0 p1 p2 | b0 b1     a1 sees a1 to p2, p1 sees p0 to p1, b0 sees p0 to b0
    """
    length = group.shape[0]
    slots = jnp.arange(length, dtype=jnp.int32)
    begin = jax.ops.segment_min(slots, group, length + 1)[group]
    prompt, turned = (
        jax.ops.segment_sum((branch == which).astype(jnp.int32), group, length + 1)[group] for which in (0, 1)
    )
    middle, padding = begin + turned, group == 0
    place = jnp.where(branch == 0, slots + turned, slots)
    place = jnp.where(branch == 1, begin + (middle + prompt - 1 - slots), place)
    place = jnp.where(padding, slots, place)
    first = jnp.where(branch == 1, place, middle)
    last = jnp.where(branch == 1, middle + prompt, place + 1)
    places = places_of(place[:, None], length)
    first, last = (jnp.where(padding, alone, x) for alone, x in ((slots, first), (slots + 1, last)))
    return Ranges(places, first[places.source], last[places.source])


def _by_text(layout: Layout, window: int | None, bounds: Bounds) -> Ranges:
    texts = lay_out(layout, bounds)
    length, places = layout.group.shape[1], texts.places.source.shape[1]
    order = jnp.arange(places, dtype=jnp.int32)[None]

    def starts(start):  # of the text that each place is in
        marked = jnp.zeros(places, jnp.int32).at[jnp.where(start < 0, places, start)].set(start, mode="drop")
        return jax.lax.cummax(marked)

    begin = jax.vmap(starts)(texts.start)
    begin = begin if window is None else jnp.maximum(begin, order - (window - 1))
    begin = jnp.where(texts.places.source < length, begin, order)
    return Ranges(texts.places, begin, jnp.broadcast_to(order + 1, begin.shape))


def keeps_scores(prepared: object) -> bool:
    """Whether the backward pass finds scores where the forward pass left them: it computes them again."""
    return False


def attend(
    query: Float[Array, "B T H C"],
    key: Float[Array, "B T K C"],
    value: Float[Array, "B T K C"],
    ranges: Ranges,
    window: int | None,
    rules: VisibilityRules,
) -> Float[Array, "B T H C"]:
    """Attention of each slot to what it sees of its own tree; softmax in float32.

    A window counts tokens of a text, whose positions rise by one from each to the next.
    """
    how = _How(float(rules.scale), rules.softcap)
    kernel = Kernel(functools.partial(_kernel, how), functools.partial(_kernel_back, how))
    return by_copies(kernel, query, key, value, ranges.places, (ranges.begin, ranges.end))


class _How(NamedTuple):
    """What is known when the computation is compiled."""

    scale: float
    softcap: float | None


Range = tuple[Int[Array, "B L"], Int[Array, "B L"]]


def _kernel(
    how: _How,
    query: Float[Array, "B L H C"],
    key: Float[Array, "B L K C"],
    value: Float[Array, "B L K C"],
    about: Range,
) -> tuple[Float[Array, "B L H C"], tuple[Array, ...]]:
    """Attention of each place to its range; and of each place its highest score and its sum of exponentials."""
    out, residuals = _package()(query, key, value, **_options(how, about), return_residuals=True)
    return out, tuple(x.transpose(0, 2, 1) for x in residuals)


def _kernel_back(
    how: _How, query, key, value, out, kept: tuple[Array, ...], about: Range, slope: Float[Array, "B L H C"]
) -> tuple[Array, Array, Array]:
    """The gradient of `_kernel`."""
    residuals, package = tuple(x.transpose(0, 2, 1) for x in kept), _package()
    bound = package.bind(
        query, key, value, **_options(how, about)
    )  # its gradient takes every argument, as they are then
    options = {name: value for name, value in bound.kwargs.items() if name != "return_residuals"}
    found = package.vjp(residuals, out, slope, *bound.args, **options)
    return found["q"], found["k"], found["v"]


def _package() -> Any:
    return importlib.import_module(API).IMPLEMENTATIONS[KERNEL]


def _options(how: _How, about: Range) -> dict[str, Any]:
    begin, end = about
    mask = importlib.import_module(BASE).Mask(k_start=begin[:, None], k_end=end[:, None])
    return {"mask": mask, "logits_scale": how.scale, "logits_soft_cap": how.softcap}
