"""What a head says of scored tokens, by a scan over the vocabulary that never holds [tokens, vocabulary].

Each chunk of the vocabulary goes into a running maximum and running sums; the backward pass scans again. On a mesh each
device scans its own rows of the head for its own tokens:

    forward    gather the width of one chunk; at the end max and sums of [N] over the axis of the vocabulary
    backward   gather it again; reduce-scatter that chunk's gradient; at the end the sum of dhidden over the vocabulary

Letters: N scored tokens, V vocabulary, W rows on one device, D width, E columns on one device, C rows of a chunk.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

CHUNK = 4096
"""Tokens of the vocabulary whose logits are held at a time by the linear form."""

NOTHING = -1e30
"""Logit of an entry that only fills a vocabulary up: finite, so that a device that has no others makes no nan."""


LOWEST = float(jnp.finfo(jnp.float32).min)
"""The running maximum before the first chunk: not -inf, from which a chunk of logits of -inf would make nan."""


class TokenScores(NamedTuple):
    """What the head says about each scored token; only `logps` carries a gradient."""

    logps: Float[Array, " N"]
    entropy: Float[Array, " N"]
    mean_logit: Float[Array, " N"]
    top1: Int[Array, " N"]
    collision: Float[Array, " N"]


class HeadSplit(NamedTuple):
    """Over which axes of a mesh scored tokens and a head are split; the tokens' axes may include those of the width."""

    mesh: jax.sharding.Mesh
    tokens: tuple[str, ...]
    vocabulary: str | None
    width: tuple[str, ...]


def dividing(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, axes: tuple[str, ...], size: int) -> tuple[str, ...]:
    """As many of these axes, from the first on, as divide a dimension of this size together."""
    while axes and size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes


class HeadShape(NamedTuple):
    """What is done to logits before the softmax."""

    scale: float
    softcap: float | None

    def of(self, logits: Float[Array, "N C"]) -> Float[Array, "N C"]:
        """Logits scaled and bounded."""
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)

    def back(self, logits: Float[Array, "*N"], slope: Float[Array, "*N"]) -> Float[Array, "*N"]:
        """Slope along what `of` was given, from the slope along what it gave, `logits`."""
        slope = slope if self.softcap is None else slope * (1.0 - jnp.square(logits / self.softcap))
        return slope if self.scale == 1.0 else slope * self.scale


class ScanPlan(NamedTuple):
    """All that is static of a scan. `vocab` counts the real entries; `filled` says that others stand behind them."""

    shape: HeadShape
    chunk: int
    statistics: bool
    collision: bool
    frozen: bool
    split: HeadSplit | None
    vocab: int = 0
    filled: bool = False

    def on_devices(self, function, inputs, outputs):
        """`function(*arrays)` on each device's parts; `inputs` and `outputs` name them (see `_spec`)."""
        if self.split is None:
            return function
        return jax.shard_map(
            function,
            mesh=self.split.mesh,
            in_specs=jax.tree.map(self._spec, inputs),
            out_specs=jax.tree.map(self._spec, outputs),
            check_vma=False,
        )

    def _spec(self, name: str) -> P:
        assert self.split is not None
        specs = {"tokens": P(self.split.tokens or None), "vocabulary": P(self.split.vocabulary)}
        return specs.get(name) or P(self.split.vocabulary, self.split.width or None)

    def offset(self, rows: Float[Array, "W E"]) -> Any:
        """Vocabulary entry of this device's first row."""
        axis = self.split and self.split.vocabulary
        return lax.axis_index(axis) * rows.shape[0] if axis else 0

    def over_vocabulary(self, reduce, x):
        """`reduce(x, axis)` over the devices that share the vocabulary."""
        axis = self.split and self.split.vocabulary
        return reduce(x, axis) if axis else x

    def whole_width(self, rows: Float[Array, "C E"]) -> Float[Array, "C D"]:
        """Rows of a head whose width is split."""
        axes = self.split and self.split.width
        return lax.all_gather(rows, axes, axis=1, tiled=True) if axes else rows

    def over_tokens(self, drows: Float[Array, "C D"]) -> Float[Array, "C E"]:
        """The sum over all tokens of each device's gradient of some rows, in the columns that the device holds."""
        if self.split is None:
            return drows
        tokens, width = self.split.tokens, self.split.width
        if width and set(width) <= set(tokens):
            drows = lax.psum_scatter(drows, width, scatter_dimension=1, tiled=True)
            return self.summed(drows, without=width)
        drows = self.summed(drows)
        if not width:
            return drows
        columns = drows.shape[1] // math.prod(self.split.mesh.shape[axis] for axis in width)
        return lax.dynamic_slice_in_dim(drows, lax.axis_index(width) * columns, columns, 1)

    def summed(self, x, *, without: tuple[str, ...] = ()):
        """The sum over the devices that share the tokens."""
        axes = tuple(axis for axis in self.split.tokens if axis not in without) if self.split else ()
        return lax.psum(x, axes) if axes else x


def scored(
    hidden: Float[Array, "N D"],
    rows: Float[Array, "V D"],
    targets: Int[Array, " N"],
    bias: Float[Array, " V"] | None,
    plan: ScanPlan,
) -> TokenScores:
    """Scores of each target; what they mean, and what a plan may ask for, is said at `logprobs.linear_scores`."""
    vocab = rows.shape[0]
    split = _fitted(plan.split, hidden, vocab)
    if split is not None and split.vocabulary is not None and (extra := -vocab % split.mesh.shape[split.vocabulary]):
        rows = jnp.pad(rows, ((0, extra), (0, 0)))
        bias = None if bias is None else jnp.pad(bias, (0, extra))
    plan = plan._replace(split=split, vocab=vocab, filled=rows.shape[0] > vocab)
    return _scored(*_alike(hidden, rows, targets, bias), plan)


def _alike(*arrays: Array | None) -> tuple[Any, ...]:
    """Arrays that are said to differ over the same axes of a caller's `shard_map`: over those of any of them."""
    axes = frozenset[str]().union(*(_differs_over(array) for array in arrays if array is not None))
    return tuple(None if array is None else _differing(array, axes - _differs_over(array)) for array in arrays)


def _differs_over(array: Array) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying


def _differing(tree: Any, axes: frozenset[str]) -> Any:
    """Arrays that are said to differ over these axes too."""
    return lax.pcast(tree, tuple(sorted(axes)), to="varying") if axes else tree


def _fitted(split: HeadSplit | None, hidden: Float[Array, "N D"], vocab: int) -> HeadSplit | None:
    """The split less the axes that do not divide; None where nothing is split."""
    if split is None or split.mesh.size == 1:
        return None
    tokens, width = hidden.shape
    sizes = split.mesh.shape
    return split._replace(
        tokens=split.tokens if tokens % math.prod(sizes[axis] for axis in split.tokens) == 0 else (),
        vocabulary=split.vocabulary if split.vocabulary and 1 < sizes[split.vocabulary] <= vocab else None,
        width=tuple(axis for axis in dividing(split.mesh, split.width, width) if sizes[axis] > 1),
    )


class _Running(NamedTuple):
    """State of the scan over the vocabulary, one value per scored token; `pull` is `sum_v exp(z_v) dz_v / dhidden`."""

    top: Float[Array, " N"]
    total: Float[Array, " N"]
    picked: Float[Array, " N"]
    weighted: Float[Array, " N"]
    summed: Float[Array, " N"]
    best: Int[Array, " N"]
    squared: Float[Array, " N"]
    pull: Float[Array, "N D"] | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _scored(hidden, rows, targets, bias, plan) -> TokenScores:
    return _summary(hidden, rows, targets, bias, plan, pulls=False)[0]


def _scored_forward(hidden, rows, targets, bias, plan):
    scores, normaliser, slope = _summary(hidden, rows, targets, bias, plan, pulls=plan.frozen)
    if plan.frozen:
        return scores, (slope, jnp.zeros((), hidden.dtype))
    return scores, (hidden, rows, targets, bias, normaliser)


def _summary(hidden, rows, targets, bias, plan: ScanPlan, *, pulls: bool):
    """Scores, the logarithm of the sum of `exp(logits)`, and with `pulls` the slope of each logp along its state."""

    def local(hidden, rows, targets, bias):
        offset = plan.offset(rows)

        def visit(state: _Running, start, size):
            part = plan.whole_width(lax.dynamic_slice_in_dim(rows, start, size))
            logits, real = _chunk_logits(hidden, part, bias, plan, start, offset)
            return _absorb(state, logits, real, part, targets - offset - start, offset + start, plan)

        state = _differing(_blank(hidden, pulls), _differs_over(hidden))
        state = _over_chunks(visit, state, rows.shape[0], plan.chunk)
        state = _together(state, plan)
        slope = None if state.pull is None else _slope(state, rows, targets, offset, plan, hidden.dtype)
        return _scores(state, plan), state.top + jnp.log(state.total), slope

    names = ("tokens", "rows", "tokens", None if bias is None else "vocabulary")
    found = ("tokens", "tokens", "tokens" if pulls else None)
    return plan.on_devices(local, names, found)(hidden, rows, targets, bias)


def _blank(hidden: Float[Array, "N D"], pulls: bool) -> _Running:
    n = hidden.shape[0]
    zeros = jnp.zeros((n,), jnp.float32)
    lowest, token = jnp.full((n,), LOWEST, jnp.float32), jnp.zeros((n,), jnp.int32)
    pull = jnp.zeros(hidden.shape, jnp.float32) if pulls else None
    return _Running(lowest, zeros, zeros, zeros, zeros, token, zeros, pull)


def _scores(state: _Running, plan: ScanPlan) -> TokenScores:
    normaliser, zeros = state.top + jnp.log(state.total), jnp.zeros_like(state.top)
    return TokenScores(
        logps=state.picked - normaliser,
        entropy=normaliser - state.weighted / state.total if plan.statistics else zeros,
        mean_logit=state.summed / plan.vocab,
        top1=state.best,
        collision=jnp.log(state.squared) + 2.0 * (state.top - normaliser) if plan.collision else zeros,
    )


def _absorb(
    state: _Running, logits: Float[Array, "N C"], real, part, local: Int[Array, " N"], first, plan: ScanPlan
) -> _Running:
    """Take one chunk of logits into the running sums.

    `part` are the chunk's rows of the head, `first` the number of the first of them, and `local` each target's place in
    this chunk, maybe outside. `real` is None, or says which entries are of the vocabulary.
    """
    size = logits.shape[1]
    peak = logits.max(axis=-1)
    top = jnp.maximum(state.top, peak)
    weights = jnp.exp(logits - top[:, None])
    shrink = jnp.exp(state.top - top)
    inside = (local >= 0) & (local < size)
    found = jnp.take_along_axis(logits, jnp.clip(local, 0, size - 1)[:, None], axis=-1)[:, 0]
    state = state._replace(
        total=state.total * shrink + weights.sum(axis=-1), picked=state.picked + jnp.where(inside, found, 0.0)
    )
    if state.pull is not None:
        slope = _kept(plan.shape.back(logits, weights), real).astype(part.dtype)
        state = state._replace(pull=state.pull * shrink[:, None] + _dot(slope, part, 1, 0))
    if plan.statistics:
        place = (first + jnp.argmax(logits, axis=-1)).astype(jnp.int32)
        state = state._replace(
            weighted=state.weighted * shrink + _kept(weights * logits, real).sum(axis=-1),
            summed=state.summed + _kept(logits, real).sum(axis=-1),
            best=jnp.where(peak > state.top, place, state.best),
        )
    if plan.collision:
        squared = state.squared * jnp.square(shrink) + jnp.square(weights).sum(axis=-1)
        state = state._replace(squared=squared)
    return state._replace(top=top)


def _together(state: _Running, plan: ScanPlan) -> _Running:
    """The sums over all of the vocabulary from those over each device's part."""
    top = plan.over_vocabulary(lax.pmax, state.top)
    shrink = jnp.exp(state.top - top)
    best = jnp.where(state.top == top, state.best, plan.vocab)  # the lowest id among equals
    add = functools.partial(plan.over_vocabulary, lax.psum)
    return _Running(
        top=top,
        total=add(state.total * shrink),
        picked=add(state.picked),
        weighted=add(state.weighted * shrink) if plan.statistics else state.weighted,
        summed=add(state.summed) if plan.statistics else state.summed,
        best=plan.over_vocabulary(lax.pmin, best) if plan.statistics else state.best,
        squared=add(state.squared * jnp.square(shrink)) if plan.collision else state.squared,
        pull=None if state.pull is None else state.pull * shrink[:, None],
    )


def _slope(state: _Running, rows, targets, offset, plan: ScanPlan, dtype) -> Float[Array, "N D"]:
    """`z'_y w_y - E_p[z'_v w_v]`: the slope of each log-probability along its hidden state, in float32."""
    assert state.pull is not None
    own = _rows_of(targets - offset, rows, plan).astype(jnp.float32)
    at_target = plan.shape.back(state.picked, jnp.ones_like(state.picked)).astype(dtype).astype(jnp.float32)
    slope = at_target[:, None] * own - state.pull / state.total[:, None]
    return plan.over_vocabulary(lax.psum, slope)


def _rows_of(local: Int[Array, " N"], rows: Float[Array, "W E"], plan: ScanPlan) -> Float[Array, "N D"]:
    """Rows of the head at these places; zeros at those that another device has."""
    axes = plan.split.width if plan.split is not None else ()
    shares = plan.split is not None and bool(axes) and set(axes) <= set(plan.split.tokens)
    local = lax.all_gather(local, axes, tiled=True) if shares else local
    inside = (local >= 0) & (local < rows.shape[0])
    found = jnp.where(inside[:, None], rows[jnp.clip(local, 0, rows.shape[0] - 1)], 0)
    return lax.all_to_all(found, axes, 0, 1, tiled=True) if shares else plan.whole_width(found)


def _scored_backward(plan: ScanPlan, residuals, cotangent):
    if plan.frozen:
        slope, like = residuals
        return (cotangent.logps[:, None] * slope).astype(like.dtype), None, None, None
    hidden, rows, targets, bias, normaliser = residuals

    def local(hidden, rows, targets, bias, normaliser, slope):
        offset = plan.offset(rows)

        def visit(dhidden, start, size):
            part = plan.whole_width(lax.dynamic_slice_in_dim(rows, start, size))
            logits, real = _chunk_logits(hidden, part, bias, plan, start, offset)
            hit = (targets - offset - start)[:, None] == jnp.arange(size)[None, :]
            dlogits = (hit.astype(jnp.float32) - jnp.exp(logits - normaliser[:, None])) * slope[:, None]
            dlogits = _kept(plan.shape.back(logits, dlogits), real)
            narrow = dlogits.astype(hidden.dtype)
            drows = plan.over_tokens(_dot(narrow, hidden, 0, 0)).astype(rows.dtype)
            return dhidden + _dot(narrow, part, 1, 0), (drows, plan.summed(dlogits.sum(axis=0)))

        zeros = _differing(jnp.zeros(hidden.shape, jnp.float32), _differs_over(hidden))
        dhidden, (drows, dbias) = _over_chunks_collecting(visit, zeros, rows.shape[0], plan.chunk)
        return plan.over_vocabulary(lax.psum, dhidden).astype(hidden.dtype), drows, dbias

    names = ("tokens", "rows", "tokens", None if bias is None else "vocabulary", "tokens", "tokens")
    run = plan.on_devices(local, names, ("tokens", "rows", "vocabulary"))
    dhidden, drows, dbias = run(hidden, rows, targets, bias, normaliser, cotangent.logps)
    return dhidden, drows, None, None if bias is None else dbias.astype(bias.dtype)


_scored.defvjp(_scored_forward, _scored_backward)


def _chunk_logits(hidden, part, bias, plan: ScanPlan, start, offset) -> tuple[Float[Array, "N C"], Any]:
    """Logits of a chunk's rows in float32, and which of them are of the vocabulary (None: all)."""
    size = part.shape[0]
    logits = _dot(hidden, part, 1, 1)
    if bias is not None:
        logits = logits + lax.dynamic_slice_in_dim(bias, start, size)[None, :].astype(jnp.float32)
    logits = plan.shape.of(logits)
    if not plan.filled:
        return logits, None
    real = (offset + start + jnp.arange(size) < plan.vocab)[None, :]
    return jnp.where(real, logits, NOTHING), real


def _kept(values: Float[Array, "N C"], real) -> Float[Array, "N C"]:
    """Values, less those of entries that fill the vocabulary up."""
    return values if real is None else jnp.where(real, values, 0.0)


def _dot(a, b, a_axis: int, b_axis: int):
    """Matrix product over the given axes with float32 sums."""
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _over_chunks(visit, state, size: int, chunk: int):
    """Fold `visit(state, start, size)` over [0, size) in whole chunks, then over what is left."""
    whole = size // chunk
    if whole:
        state, _ = lax.scan(lambda s, i: (visit(s, i * chunk, chunk), None), state, jnp.arange(whole, dtype=jnp.int32))
    return visit(state, jnp.int32(whole * chunk), size - whole * chunk) if size % chunk else state


def _over_chunks_collecting(visit, state, size: int, chunk: int):
    """As `_over_chunks` for a visit that also returns arrays by vocabulary entry.

    These go to their places in one array: stacked and joined they would be there twice, and a head's gradient is large.
    """
    if size <= chunk:
        return visit(state, jnp.int32(0), size)
    _, like = jax.eval_shape(lambda s: visit(s, jnp.int32(0), chunk), state)
    blank = jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape[1:]), leaf.dtype), like)
    blank = _differing(blank, _differs_over(state))

    def place(carry, start, count):
        state, rows = visit(carry[0], start, count)
        return state, jax.tree.map(
            lambda all, some: lax.dynamic_update_slice_in_dim(all, some, start, 0), carry[1], rows
        )

    return _over_chunks(place, (state, blank), size, chunk)
