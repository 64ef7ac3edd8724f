"""Attention over packed rows in plain XLA: exact on every platform, and what other backends are held against.

Queries go in blocks, and a row packs many trees: a block needs the keys of its trees' prompts and of its own branches.
So one loop goes over blocks of queries and an inner one over those blocks of keys, as often as the data says. Scores
and masks exist for one pair of blocks at a time. The softmax is put together block by block, and the backward pass
computes scores again from each query's log-sum-exp (arXiv:2205.14135). The order of all sums is fixed, so the same
inputs give the same bits.

Letters: B rows, T slots, K key-value heads, G queries for each of them, H = K G heads, C channels of a key, E channels
of a value, X either of them, I blocks of a row, N slots of a block, M = B I blocks of all rows, Q = G N.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int

from dpo_jax.model.attention import TILE, Bounds, Layout, VisibilityRules, attend_seen, visible
from dpo_jax.model.remat import named

UNSEEN = float(np.finfo(np.float32).min)


class TilePlan(NamedTuple):
    """The rows filled up to whole blocks, and which blocks of keys each block of queries needs.

    Attributes:
      layout: the rows.
      keys: numbers of blocks of keys, those that are needed first, in their order.
      count: how many are needed.
    """

    layout: Layout
    keys: Int[Array, "B I I"]
    count: Int[Array, "B I"]

    @property
    def block(self) -> int:
        """Slots of a block."""
        return self.layout.group.shape[1] // self.keys.shape[2]


def prepare(layout: Layout, window: int | None, bounds: Bounds | None = None) -> TilePlan:
    """What is the same for every layer with this window; blocks have the bounds' `tile` slots."""
    block = TILE if bounds is None else bounds.tile
    layout = Layout(*(_filled(x, block) for x in layout))
    needed = jax.vmap(functools.partial(_needed, window, block))(*layout)
    keys = jnp.argsort(~needed, axis=-1, stable=True).astype(jnp.int32)
    return TilePlan(layout, keys, needed.sum(axis=-1, dtype=jnp.int32))


def _needed(
    window: int | None, block: int, group: Int[Array, " T"], branch: Int[Array, " T"], position: Int[Array, " T"]
) -> Bool[Array, "I I"]:
    """Which blocks of queries (first axis) may see anything of which blocks of keys.

    A slot sees two stretches of its row: its tree's prompt, and its own branch up to itself. As positions rise by one
    at most from slot to slot, what a stretch begins with is out of sight for as many slots as its first position is
    away from the window.
    """
    length = group.shape[0]
    slots = jnp.arange(length, dtype=jnp.int32)
    tree = jax.ops.segment_min(slots, group, length + 1)[group]
    prompt_end = jax.ops.segment_max(jnp.where(branch == 0, slots, -1), group, length + 1)[group]
    new = (group != jnp.roll(group, 1)) | (branch != jnp.roll(branch, 1))
    own = lax.cummax(jnp.where(new, slots, 0))
    change = jnp.zeros((length // block, length // block + 1), jnp.int32)
    for begin, end in ((tree, jnp.minimum(prompt_end, slots)), (own, slots)):
        if window is not None:
            begin = begin + jnp.maximum(position - position[begin] - window + 1, 0)
        there = (begin <= end).astype(jnp.int32)
        change = change.at[slots // block, begin // block].add(there, mode="drop")
        change = change.at[slots // block, end // block + 1].add(-there, mode="drop")
    return jnp.cumsum(change, axis=1)[:, :-1] > 0


def keeps_scores(plan: TilePlan) -> bool:
    """Whether the backward pass finds the scores of these rows where the forward pass left them."""
    return plan.keys.shape[2] == 1


def attend(
    query: Float[Array, "B T H C"],
    key: Float[Array, "B T K C"],
    value: Float[Array, "B T K E"],
    plan: TilePlan,
    window: int | None,
    rules: VisibilityRules,
) -> Float[Array, "B T H E"]:
    """Attention of each slot to what it sees of its own tree; softmax in float32."""
    length = query.shape[1]
    if plan.keys.shape[2] == 1:  # one block: nothing to skip, and quicker to compile
        layout = Layout(*(x[:, :length] for x in plan.layout))
        distance = None if rules.slopes is None else layout.position[:, :, None] - layout.position[:, None, :]
        return named(attend_seen(query, key, value, visible(layout, window), rules, distance), "context")
    how = _How(rules.scale, rules.softcap, window, plan.block)
    sinks = None if rules.sinks is None else rules.sinks.astype(jnp.float32)
    return _attend(how, query, key, value, sinks, rules.slopes, plan)


class _How(NamedTuple):
    """What is known when the computation is compiled."""

    scale: float
    softcap: float | None
    window: int | None
    block: int


class _Blocks(NamedTuple):
    """Queries, keys and values by block."""

    query: Float[Array, "M K Q C"]
    key: Float[Array, "M K N C"]
    value: Float[Array, "M K N E"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: _How, query, key, value, sinks, slopes, plan: TilePlan):
    return _forward(how, query, key, value, sinks, slopes, plan)[0]


def _forward(how: _How, query, key, value, sinks, slopes, plan: TilePlan):
    """The result, and what the backward pass needs: besides the inputs, the result and log-sum-exps, both named."""
    batch, length, heads, _ = query.shape
    blocks = _blocks(query, key, value, how.block)
    count = plan.count.shape[1]
    rows = blocks.query.shape[:3]

    def one_block(number, found):
        row, block = number // count, number % count
        begin = _nothing_yet(blocks, sinks, how.block)

        def one_tile(turn, sofar):
            top, total, mixed = sofar
            other = plan.keys[row, block, turn]
            key, value = (_at(x, row * count + other) for x in (blocks.key, blocks.value))
            scores, _ = _scores(how, _at(blocks.query, number), key, _tile(how, plan, row, block, other), slopes)
            higher = jnp.maximum(top, scores.max(axis=-1))
            weights = jnp.exp(scores - higher[..., None])
            shrunk = jnp.exp(top - higher)
            more = _product(weights.astype(value.dtype), value, 2, 1)
            return higher, total * shrunk + weights.sum(axis=-1), mixed * shrunk[..., None] + more

        top, total, mixed = lax.fori_loop(0, plan.count[row, block], one_tile, begin)
        out, lse = found
        return _put(out, mixed / total[..., None], number), _put(lse, top + jnp.log(total), number)

    blank = jnp.zeros((*rows, value.shape[-1]), value.dtype), jnp.zeros(rows, jnp.float32)
    out, lse = lax.fori_loop(0, rows[0], one_block, blank)
    out, lse = named((_whole(out, batch, heads, how.block)[:, :length], lse), "context")
    return out, (query, key, value, sinks, slopes, plan, out, lse)


def _backward(how: _How, kept, slope):
    query, key, value, sinks, slopes, plan, out, lse = kept
    batch, length, heads, _ = query.shape
    blocks = _blocks(query, key, value, how.block)
    slope, out = (_by_block(_filled(x, how.block), key.shape[2], how.block) for x in (slope, out))
    count = plan.count.shape[1]
    drop = (slope.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)

    def one_block(number, found):
        row, block = number // count, number % count
        query, slope_here, lse_here, drop_here = (_at(x, number) for x in (blocks.query, slope, lse, drop))

        def one_tile(turn, sofar):
            to_query, to_key, to_value = sofar
            other = plan.keys[row, block, turn]
            place = row * count + other
            key, value = _at(blocks.key, place), _at(blocks.value, place)
            scores, tame = _scores(how, query, key, _tile(how, plan, row, block, other), slopes)
            weights = jnp.exp(scores - lse_here[..., None])
            change = weights * (_product(slope_here, value, 2, 2) - drop_here[..., None])
            change = change if tame is None else change * tame
            change = (change * how.scale).astype(query.dtype)
            to_key = _add(to_key, _product(change, query, 1, 1), place)
            to_value = _add(to_value, _product(weights.astype(value.dtype), slope_here, 1, 1), place)
            return to_query + _product(change, key, 2, 1), to_key, to_value

        begin = jnp.zeros(query.shape, jnp.float32), *found[1:]
        to_query, to_key, to_value = lax.fori_loop(0, plan.count[row, block], one_tile, begin)
        return _put(found[0], to_query, number), to_key, to_value

    blank = jnp.zeros_like(blocks.query), *(jnp.zeros(x.shape, jnp.float32) for x in blocks[1:])
    to_query, to_key, to_value = lax.fori_loop(0, lse.shape[0], one_block, blank)
    to_sinks = None
    if sinks is not None:
        share = jnp.exp(_by_head(sinks, key.shape[2], how.block)[None] - lse)
        to_sinks = -(share * drop).reshape(lse.shape[0], heads, how.block).sum(axis=(0, 2))
    to_query = _whole(to_query, batch, heads, how.block)[:, :length]
    to_key, to_value = (
        _whole(x, batch, like.shape[2], how.block)[:, :length].astype(like.dtype)
        for x, like in ((to_key, key), (to_value, value))
    )
    return to_query, to_key, to_value, to_sinks, None if slopes is None else jnp.zeros_like(slopes), None


_attend.defvjp(_forward, _backward)


# ---------------------------------------------------------------------------------------------- one pair of blocks


class _Tile(NamedTuple):
    """Which of a block of queries sees which of a block of keys, and how far apart they are, in tokens."""

    seen: Bool[Array, "N N"]
    distance: Int[Array, "N N"]


def _tile(how: _How, plan: TilePlan, row: Int[Array, ""], block: Int[Array, ""], other: Int[Array, ""]) -> _Tile:
    """The same as `attention.visible`, of one block of a row's queries and one of its keys."""

    def part(x, number):
        return lax.dynamic_slice(x, (row, number * how.block), (1, how.block))[0]

    group, branch, position = (part(x, block)[:, None] for x in plan.layout)
    key_group, key_branch, key_position = (part(x, other)[None, :] for x in plan.layout)
    order = jnp.arange(how.block, dtype=jnp.int32)
    seen = (block * how.block + order)[:, None] >= (other * how.block + order)[None, :]
    seen = seen & (group == key_group) & ((key_branch == 0) | (key_branch == branch))
    distance = position - key_position
    return _Tile(seen if how.window is None else seen & (distance < how.window), distance)


def _scores(
    how: _How, query: Float[Array, "K Q C"], key: Float[Array, "K N C"], tile: _Tile, slopes: Float[Array, " H"] | None
) -> tuple[Float32[Array, "K Q N"], Float32[Array, "K Q N"] | None]:
    """Scores, and where they are capped, the slope of the cap."""
    heads = query.shape[0]
    scores = _product(query, key, 2, 2) * how.scale
    tame = None
    if how.softcap is not None:
        bent = jnp.tanh(scores / how.softcap)
        scores, tame = how.softcap * bent, 1 - jnp.square(bent)
    scores = scores.reshape(heads, -1, how.block, how.block)
    if slopes is not None:
        scores = scores - slopes.reshape(heads, -1, 1, 1) * tile.distance.astype(jnp.float32)[None, None]
    return jnp.where(tile.seen[None, None], scores, UNSEEN).reshape(heads, -1, how.block), tame


def _nothing_yet(blocks: _Blocks, sinks: Float32[Array, " H"] | None, block: int) -> tuple[Array, Array, Array]:
    """Highest score, sum of exponentials above it, and sum of values, before any key; a sink is a key without value.

    What a block adds to queries that see nothing of it is multiplied by zero at the first block that they do see: at
    the latest that is their own.
    """
    shape = blocks.query.shape[1:3]
    mixed = jnp.zeros((*shape, blocks.value.shape[-1]), jnp.float32)
    if sinks is None:
        return jnp.full(shape, UNSEEN), jnp.zeros(shape, jnp.float32), mixed
    return _by_head(sinks, shape[0], block), jnp.ones(shape, jnp.float32), mixed


# ---------------------------------------------------------------------------------------------- shapes


def _filled(x: Array, block: int) -> Array:
    """[B, T, ...] up to whole blocks; what is added is padding."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)) + ((0, 0),) * (x.ndim - 2))


def _blocks(query: Array, key: Array, value: Array, block: int) -> _Blocks:
    heads = key.shape[2]
    return _Blocks(*(_by_block(_filled(x, block), heads, block) for x in (query, key, value)))


def _by_block(x: Float[Array, "B T H X"], heads: int, block: int) -> Float[Array, "M K Q X"]:
    """Slots by block, with the queries of a key-value head one after the other."""
    batch, length, _, channels = x.shape
    x = x.reshape(batch, length // block, block, heads, -1, channels).transpose(0, 1, 3, 4, 2, 5)
    return x.reshape(batch * (length // block), heads, -1, channels)


def _whole(x: Float[Array, "M K Q X"], batch: int, heads: int, block: int) -> Float[Array, "B T H X"]:
    """What `_by_block` took apart."""
    x = x.reshape(batch, x.shape[0] // batch, heads, block, x.shape[-1]).transpose(0, 1, 3, 2, 4)
    return x.reshape(batch, -1, heads, x.shape[-1])


def _by_head(x: Float32[Array, " H"], heads: int, block: int) -> Float32[Array, "K Q"]:
    """A number of each head, for each query of a block."""
    return jnp.repeat(x, block).reshape(heads, -1)


def _at(x: Array, number: Int[Array, ""]) -> Array:
    return lax.dynamic_index_in_dim(x, number, 0, keepdims=False)


def _put(x: Array, value: Array, number: Int[Array, ""]) -> Array:
    return lax.dynamic_update_index_in_dim(x, value.astype(x.dtype), number, 0)


def _add(x: Array, value: Array, number: Int[Array, ""]) -> Array:
    return _put(x, _at(x, number) + value, number)


def _product(a: Float[Array, "K _ _"], b: Float[Array, "K _ _"], a_axis: int, b_axis: int) -> Float32[Array, "K _ _"]:
    """Of each head's matrices, over these axes of them, in float32."""
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((0,), (0,))), preferred_element_type=jnp.float32)
