"""Gated DeltaNet (arXiv:2412.06464): a mixer whose memory is one matrix for each head, not a list of keys.

For each head, with keys k and queries q of length one, the state S [C, V] goes from token to token as

    S_t = exp(g_t) S_{t-1} + k_t u_t^T,    u_t = b_t (v_t - exp(g_t) S_{t-1}^T k_t),    o_t = S_t^T q_t / sqrt(C)

with decay g_t <= 0 and strength 0 < b_t < 1: what the state says of k_t is corrected towards v_t (eq. 10).

Letters: B rows, T tokens, D width, E channels of the convolution, K key heads, G value heads for each of them, C key
channels, V value channels, N chunks, L tokens of a chunk. Arithmetic inside is float32, as in transformers.

An accelerator multiplies float32 slowly: a GPU without its tensor cores, a TPU in six passes (and libtpu compiles each
such product for seconds). Where the rest of the model is bfloat16, whose rounding is a share of 2e-3, a product is the
sum of three of bfloat16 parts. Largest error of outputs and gradients as a share of the largest entry, against float64
over 640 tokens of 128 channels, emulated on a CPU (and where all keys are nearly the same):

    float32                       6e-7 (1.6e-5)
    three products of tf32        6e-7 (1.7e-5)        one     6e-4
    three products of bfloat16    1.2e-5 (3e-4)        one     5e-3 (1e-1)
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from dpo_jax.model import spec as specs
from dpo_jax.model.layers import Dense, NormLayer, normal
from dpo_jax.model.placement import by_heads, by_slots, head_axes, repeated, row_axes, slot_axes
from dpo_jax.model.remat import named

Precision = lax.Precision | lax.DotAlgorithmPreset

CHUNK = 64
"""Tokens that are computed in parallel, a power of two. Work for each token grows with it, steps of the scan shrink."""

THREE_PASSES = lax.DotAlgorithmPreset.BF16_BF16_F32_X3
"""Products of float32 on accelerators, as sums of products of their higher and lower halves in bfloat16."""

UNIT_EPSILON = 1e-6
"""Added to the squared length by which queries and keys are divided, as in transformers."""


class Memory(NamedTuple):
    """What a text so far leaves for its next token: the convolution's last inputs, and the state of each head."""

    conv: Float[Array, "B K-1 E"]
    state: Float32[Array, "B H C V"]


def empty_memory(spec: specs.GatedDelta, batch: int, dtype: DTypeLike) -> Memory:
    """Memory of texts that have not begun; `dtype` is that of the activations."""
    state = jnp.zeros((batch, spec.value_heads, spec.key_dim, spec.value_dim), jnp.float32)
    return Memory(jnp.zeros((batch, spec.kernel - 1, _channels(spec)), dtype), state)


def _channels(spec: specs.GatedDelta) -> int:
    """Channels of queries, keys and values together."""
    return 2 * spec.key_heads * spec.key_dim + spec.value_heads * spec.value_dim


class Convolution(nnx.Module):
    """A causal convolution over tokens, each channel alone."""

    def __init__(self, channels: int, kernel: int, *, rngs: nnx.Rngs):
        """A fresh kernel; its last column multiplies the current token."""
        self.kernel = normal(rngs, channels, kernel)

    def __call__(
        self, x: Float[Array, "B T E"], text: Int[Array, "B T"], before: Float[Array, "B P E"]
    ) -> Float32[Array, "B T E"]:
        """As the function `convolution`."""
        return convolution(x, self.kernel[...], text, before)


def convolution(
    x: Float[Array, "B T E"], kernel: Float[Array, "E J"], text: Int[Array, "B T"], before: Float[Array, "B P E"]
) -> Float32[Array, "B T E"]:
    """`y_t = sum over lags j of kernel[:, -1 - j] * x_{t-j}`, over the tokens of t's own text.

    `before` are the inputs before x: of text 1, or zeros.
    """
    kernel, length = kernel.astype(jnp.float32), x.shape[1]
    inputs = jnp.concatenate([before.astype(x.dtype), x], axis=1)
    owner = jnp.pad(text, ((0, 0), (before.shape[1], 0)), constant_values=1)
    total = jnp.zeros(x.shape, jnp.float32)
    for tap in range(kernel.shape[1]):
        own = (owner[:, tap : tap + length] == text)[:, :, None]
        seen = jnp.where(own, inputs[:, tap : tap + length], 0).astype(jnp.float32)
        total = total + seen * kernel[None, None, :, tap]
    return total


class GatedDeltaNet(nnx.Module):
    """The linear-attention layer of Qwen3.5: projections, convolution, gated delta rule, gated norm, projection."""

    def __init__(self, spec: specs.GatedDelta, width: int, *, rngs: nnx.Rngs):
        """Fresh weights; rates of decay are uniform in (0.01, 16)."""
        heads, values = spec.value_heads, spec.value_heads * spec.value_dim
        self.mixed = Dense(width, _channels(spec), bias=False, rngs=rngs)
        self.gate = Dense(width, values, bias=False, rngs=rngs)
        self.strength = Dense(width, heads, bias=False, rngs=rngs)
        self.decay = Dense(width, heads, bias=False, rngs=rngs)
        self.conv = Convolution(_channels(spec), spec.kernel, rngs=rngs)
        rates = jax.random.uniform(rngs.params(), (heads,), minval=0.01, maxval=16.0)
        self.decay_rate = nnx.Param(jnp.log(rates))
        self.decay_bias = nnx.Param(jnp.ones((heads,)))
        self.norm = NormLayer(spec.norm, spec.value_dim)
        self.output = Dense(values, width, bias=False, rngs=rngs)
        self.spec = spec

    def __call__(
        self,
        x: Float[Array, "B T D"],
        text: Int[Array, "B T"],
        memory: Memory | None = None,
        *,
        activations: NamedSharding | None = None,
        platform: str = "cpu",
    ) -> tuple[Float[Array, "B T D"], Memory | None]:
        """Each token mixed with the tokens before it of its own text, and what the last one leaves behind.

        `text` is 0 at padding. Without a memory a row packs texts, each of another number and without a gap. With one
        it continues text 1, which the memory is of; padding may stand before that text's first token only, and leaves
        the memory empty. Outputs at padding are finite and mean nothing. `platform` is that of the devices.

            token   0  1    2      3  4    5
            text    1  1    1      2  2    0
            sees    0  0,1  0,1,2  3  3,4  -

        `activations` says how rows and slots are split; where slots are, each device mixes whole rows of its own heads.
        """
        x = jnp.where((text != 0)[:, :, None], x, 0)  # padding then has a key and a value of zero: it writes nothing
        past = empty_memory(self.spec, x.shape[0], x.dtype) if memory is None else memory
        inputs = named(self.mixed(x), "qkv")
        strength = jax.nn.sigmoid(self.strength(x).astype(jnp.float32))
        rule = functools.partial(gated_delta, precision=_precision(platform, x.dtype))
        if memory is None and activations is not None and slot_axes(activations):
            mixed = self._by_heads(inputs, strength, self._decay(x), text, activations, rule)
            return self._gated(named(mixed, "context"), x), None
        query, key, value = self._heads(jax.nn.silu(self.conv(inputs, text, past.conv)))
        mixed, state = rule(query, key, value, strength, self._decay(x), text, past.state)
        y = self._gated(named(mixed, "context"), x)
        if memory is None:
            return y, None
        recent = jnp.concatenate([past.conv.astype(x.dtype), inputs], axis=1)[:, x.shape[1] :]
        return y, Memory(recent.astype(memory.conv.dtype), state)

    def _heads(
        self, mixed: Float32[Array, "B T E"]
    ) -> tuple[Float32[Array, "B T K C"], Float32[Array, "B T K C"], Float32[Array, "B T H V"]]:
        """Queries and keys of length one, and values."""
        query, key, value = self._parted(mixed, axis=2)
        return _unit(query), _unit(key), value

    def _parted(self, channels: Array, axis: int) -> tuple[Array, Array, Array]:
        """What belongs to queries, keys and values of the convolution's channels, by head."""
        spec, keys = self.spec, self.spec.key_heads * self.spec.key_dim
        sizes = ((spec.key_heads, spec.key_dim), (spec.key_heads, spec.key_dim), (spec.value_heads, spec.value_dim))
        parts = jnp.split(channels, [keys, 2 * keys], axis=axis)
        lead, last = channels.shape[:axis], channels.shape[axis + 1 :]
        query, key, value = (part.reshape(*lead, *size, *last) for part, size in zip(parts, sizes, strict=True))
        return query, key, value

    def _by_heads(
        self,
        inputs: Float[Array, "B T E"],
        strength: Float32[Array, "B T H"],
        decay: Float32[Array, "B T H"],
        text: Int[Array, "B T"],
        activations: NamedSharding,
        rule: Callable[..., tuple[Array, Array]],
    ) -> Float32[Array, "B T H V"]:
        """The convolution and the delta rule over whole rows, each device for its own heads."""
        spec = self.spec
        split = head_axes(activations, spec.value_heads, spec.key_heads)
        whole = by_heads(activations, split.axes)

        def local(text, strength, decay, inputs, kernels):
            found = []
            for x, kernel in zip(inputs, kernels, strict=True):
                flat = x.reshape(*x.shape[:2], -1)
                before = jnp.zeros((x.shape[0], spec.kernel - 1, flat.shape[2]), x.dtype)
                bent = jax.nn.silu(convolution(flat, kernel.reshape(flat.shape[2], -1), text, before))
                found.append(bent.reshape(x.shape))
            query, key, value = found
            state = jnp.zeros((x.shape[0], value.shape[2], spec.key_dim, spec.value_dim), jnp.float32)
            return rule(_unit(query), _unit(key), value, strength, decay, text, state)[0]

        def own(query, key, value, axis):
            return repeated(query, split.repeats, axis), repeated(key, split.repeats, axis), value

        mixed = jax.shard_map(
            local,
            mesh=activations.mesh,
            in_specs=(P(row_axes(activations)), whole, whole, whole, P(split.axes or None)),
            out_specs=whole,
            check_vma=False,
        )
        arrays = own(*self._parted(inputs, axis=2), axis=2)
        kernels = own(*self._parted(self.conv.kernel[...], axis=0), axis=0)
        return by_slots(
            activations, mixed(text, strength, decay, tuple(by_slots(activations, x) for x in arrays), kernels)
        )

    def _decay(self, x: Float[Array, "B T D"]) -> Float32[Array, "B T H"]:
        """`g = -exp(decay_rate) softplus(decay(x) + decay_bias)`: the logarithm of what is kept of the state."""
        rate, bias = (leaf[...].astype(jnp.float32)[None, None, :] for leaf in (self.decay_rate, self.decay_bias))
        return -jnp.exp(rate) * jax.nn.softplus(self.decay(x).astype(jnp.float32) + bias)

    def _gated(self, mixed: Float32[Array, "B T H V"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """`output(norm(mixed) * silu(gate(x)))`."""
        gate = jax.nn.silu(self.gate(x).astype(jnp.float32)).reshape(mixed.shape)
        y = self.norm(mixed) * gate
        return self.output(y.reshape(*x.shape[:2], -1).astype(x.dtype))


def _precision(platform: str, dtype: DTypeLike) -> Precision:
    """Of the rule's products, on this platform and in a model that computes in this dtype."""
    return lax.Precision.HIGHEST if platform == "cpu" or dtype == jnp.float32 else THREE_PASSES


def _unit(x: Float32[Array, "*B C"]) -> Float32[Array, "*B C"]:
    """x of length one."""
    return x * lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + UNIT_EPSILON)


class _Chunks(NamedTuple):
    """What the scan over chunks reads of each; the last chunk is filled up with tokens that change nothing.

    `reach` is the share of the chunk's first state that is left when a token reads, 0 in a later text than the one
    that the chunk begins in; `rest` is the share of a token's write that is left at the chunk's end, 0 in an earlier
    text than the one that it ends in. `inverse` is that of I + A, where A_ij = b_i exp(g_{j+1} + .. + g_i) k_i . k_j
    for tokens j < i of one text.
    """

    key: Float32[Array, "N B K 1 L C"]
    value: Float32[Array, "N B K G L V"]
    strength: Float32[Array, "N B K G L 1"]
    reach: Float32[Array, "N B K G L 1"]
    rest: Float32[Array, "N B K G L 1"]
    inverse: Float32[Array, "N B K G L L"]


def gated_delta(
    query: Float32[Array, "B T K C"],
    key: Float32[Array, "B T K C"],
    value: Float32[Array, "B T H V"],
    strength: Float32[Array, "B T H"],
    decay: Float32[Array, "B T H"],
    text: Int[Array, "B T"],
    state: Float32[Array, "B H C V"],
    *,
    precision: Precision = lax.Precision.HIGHEST,
) -> tuple[Float32[Array, "B T H V"], Float32[Array, "B H C V"]]:
    """The gated delta rule over rows of texts, and the state that each row's last text leaves.

    `state` is where the first text begins; every other begins with an empty one. Value head h reads with the query
    and key of head h // G. A token of strength 0 and decay 0 changes nothing. `precision` is that of all products.

    Chunks are computed in parallel (section 3.3), and a scan carries the state from one to the next. A chunk of one
    token is the recurrence itself, which is what generation runs.
    """
    batch, length, keys, channels = query.shape
    size = min(CHUNK, 1 << (length - 1).bit_length())
    query, key, value = (_chunked(each, keys, size) for each in (query * channels**-0.5, key, value))
    strength, decay = (_chunked(each[..., None], keys, size) for each in (strength, decay))
    scores, chunks = _prepared(query, key, value, strength, decay, _split(text, size, "edge"), precision)
    # gradients keep the states alone, and compute the rest again
    advance = jax.checkpoint(functools.partial(_advance, precision=precision), prevent_cse=False)
    last, (states, writes) = lax.scan(advance, state.reshape(batch, keys, -1, *state.shape[2:]), chunks)
    mixed = chunks.reach * _matmul(query, states, precision) + _matmul(scores, writes, precision)
    return _joined(mixed)[:, :length], last.reshape(state.shape)


def _prepared(
    query: Float32[Array, "N B K 1 L C"],
    key: Float32[Array, "N B K 1 L C"],
    value: Float32[Array, "N B K G L V"],
    strength: Float32[Array, "N B K G L 1"],
    decay: Float32[Array, "N B K G L 1"],
    text: Int[Array, "N B L"],
    precision: Precision,
) -> tuple[Float32[Array, "N B K G L L"], _Chunks]:
    """All that a chunk can know before the state: what each token reads of each write in its chunk, and the rest."""
    order = jnp.arange(text.shape[-1])
    own = (text[..., :, None] == text[..., None, :]) & (order[:, None] >= order[None, :])[None, None]
    kept = jnp.where(own[:, :, None, None], _kept(decay, precision), 0)
    before = (order[:, None] > order[None, :])[(None,) * 4]
    lower = jnp.where(before, strength * kept * _matmul(key, key.mT, precision), 0)
    first = jnp.concatenate([text[:1, :, :1], text[:-1, :, -1:]])  # the text that the chunk's first state is of
    reach = jnp.where((text == first)[:, :, None, None, :, None], jnp.exp(jnp.cumsum(decay, axis=-2)), 0)
    scores = kept * _matmul(query, key.mT, precision)
    return scores, _Chunks(key, value, strength, reach, kept[..., -1:, :].mT, _inverse_of_unit(lower, precision))


def _advance(
    state: Float32[Array, "B K G C V"], chunk: _Chunks, *, precision: Precision
) -> tuple[Float32[Array, "B K G C V"], tuple[Float32[Array, "B K G C V"], Float32[Array, "B K G L V"]]]:
    """The state after a chunk; and the state before it, with what each of its tokens writes (u_t).

    `(I + A) u = b (v - reach S^T k)`: each token corrects what the first state and the tokens before it say.
    """
    writes = chunk.strength * (chunk.value - chunk.reach * _matmul(chunk.key, state, precision))
    writes = _matmul(chunk.inverse, writes, precision)
    after = chunk.reach[..., -1:, :] * state + _matmul(chunk.key.mT, chunk.rest * writes, precision)
    return after, (state, writes)


def _kept(decay: Float32[Array, "*B L 1"], precision: Precision) -> Float32[Array, "*B L L"]:
    """`exp(g_{j+1} + .. + g_i)` at row i and column j <= i; 1 above the diagonal.

    Each sum is taken by itself: as a difference of running sums it would lose what a strong decay before it rounds off.
    """
    order = jnp.arange(decay.shape[-2])
    upto = (order[:, None] <= order[None, :]).astype(jnp.float32)
    after = jnp.where((order[:, None] < order[None, :])[(None,) * (decay.ndim - 2)], decay.mT, 0)
    return jnp.exp(_matmul(after, upto, precision)).mT


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _inverse_of_unit(lower: Float32[Array, "*B L L"], precision: Precision) -> Float32[Array, "*B L L"]:
    """`(I + A)^-1` of strictly lower triangular matrices A whose size is a power of two.

    Unlike the product of all I + (-A)^(2^k) this forms no powers of A, whose entries outgrow float32 where keys repeat.
    """
    size = lower.shape[-1]
    if size <= 16:
        return _inverse_of_small(lower, precision)
    half = size // 2
    first, second = _inverse_of_unit(jnp.stack([lower[..., :half, :half], lower[..., half:, half:]]), precision)
    corner = _matmul(_matmul(second, lower[..., half:, :half], precision), first, precision)
    above = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([above, jnp.concatenate([-corner, second], axis=-1)], axis=-2)


@_inverse_of_unit.defjvp
def _change_of_inverse(precision, primals, tangents):
    """`d (I + A)^-1 = -(I + A)^-1 dA (I + A)^-1`, so that a gradient needs the inverse alone."""
    (lower,), (change,) = primals, tangents
    inverse = _inverse_of_unit(lower, precision)
    return inverse, -_matmul(_matmul(inverse, change, precision), inverse, precision)


def _inverse_of_small(lower: Float32[Array, "*B L L"], precision: Precision) -> Float32[Array, "*B L L"]:
    """The same by whole matrices: inverted blocks on the diagonal are joined two by two, until there is one.

    [P  0]^-1   [ P^-1             0   ]
    [R  Q]    = [-Q^-1 R P^-1      Q^-1]
    """
    multiply = functools.partial(_matmul, precision=precision) if precision == lax.Precision.HIGHEST else _summed
    size = lower.shape[-1]
    order, block = jnp.arange(size), 1
    inverse = jnp.broadcast_to(jnp.eye(size), lower.shape)
    while block < size:
        half = order // block
        joined = (half[:, None] == half[None, :] + 1) & (half[:, None] % 2 == 1)
        corner = jnp.where(joined[(None,) * (lower.ndim - 2)], lower, 0)
        inverse = inverse - multiply(multiply(inverse, corner), inverse)
        block *= 2
    return inverse


def _matmul(a: Float32[Array, "..."], b: Float32[Array, "..."], precision: Precision) -> Float32[Array, "..."]:
    """`a @ b`."""
    return jnp.matmul(a, b, precision=precision)


def _summed(a: Float32[Array, "*B L L"], b: Float32[Array, "*B L L"]) -> Float32[Array, "*B L L"]:
    """`a @ b` of matrices that are too small for a matrix unit, and a chain of which libtpu compiles for minutes."""
    return (a[..., :, :, None] * b[..., None, :, :]).sum(axis=-2)


def _chunked(x: Float32[Array, "B T H X"], keys: int, size: int) -> Float32[Array, "N B K G L X"]:
    """Tokens in chunks of `size`, zeros at the end; heads by the key head that they read with."""
    x = x.reshape(*x.shape[:2], keys, -1, x.shape[-1])
    return _split(x, size, "constant").transpose(0, 1, 3, 4, 2, 5)


def _joined(x: Float32[Array, "N B K G L X"]) -> Float32[Array, "B T H X"]:
    """What `_chunked` took apart, with the zeros at the end."""
    x = x.transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], -1, x.shape[-1])


def _split(x: Array, size: int, mode: str) -> Array:
    """[B, T, ...] as [N, B, L, ...]; the last chunk is filled up by `jnp.pad` in that mode."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)) + ((0, 0),) * (x.ndim - 2), mode=mode)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)
