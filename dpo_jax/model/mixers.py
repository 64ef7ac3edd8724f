"""The layers that let tokens see each other, over what may be seen: a packed row, or a cache and what follows it.

Letters: B rows, T positions, S slots that can be seen, D width, H heads, K key-value heads, C channels.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int

from dpo_jax.model import spec as specs
from dpo_jax.model.attention import Bounds, Layout, VisibilityRules, alibi_slopes, attend_kept
from dpo_jax.model.backends.dispatch import PackedRows
from dpo_jax.model.layers import Dense, NormLayer
from dpo_jax.model.remat import named
from dpo_jax.model.rope import Rotation, rotate, rotation

KeyValue = tuple[Float[Array, "B X Y C"], Float[Array, "B X Y E"]]
"""Keys and values of slots and key-value heads: [B, S, K, C] of a packed row, and head by head, [B, K, S, C], of a
cache."""
Cached = tuple[Float[Array, "B _ _ _"], Float[Array, "B _ _ _"]]
"""Keys and values as `KeyValue`, beside others of another size: layers differ in heads and channels."""
Turns = Mapping[tuple[specs.Rope, int], Rotation]


def turns_of(spec: specs.DecoderSpec, positions: Int[Array, "B T"], lengths: Int[Array, "B T"]) -> Turns:
    """Cosines and sines for every kind of rotation that the decoder has."""
    found = {}
    for mixer in {layer.mixer for layer in spec.layers}:
        match mixer:
            case specs.Attention(rope=specs.Rope() as rope, head_dim=channels):
                found[rope, channels] = rotation(rope, channels, positions, lengths)
            case specs.MLA(rope=rope, rope_dim=channels):
                found[rope, channels] = rotation(rope, channels, positions, lengths)
    return found


def _windows(spec: specs.DecoderSpec) -> set[int | None]:
    return {layer.mixer.window if isinstance(layer.mixer, specs.Attention) else None for layer in spec.layers}


@dataclasses.dataclass(frozen=True)
class PackedView:
    """A packed row that is read at once; what is the same for every layer is computed once.

    `text` is the number of each token's group, 0 for padding.
    """

    position: Int[Array, "B T"]
    text: Int[Array, "B T"]
    turns: Turns
    rows: PackedRows

    @classmethod
    def of(
        cls,
        spec: specs.DecoderSpec,
        layout: Layout,
        backend: str = "xla",
        *,
        bounds: Bounds | None = None,
        activations: NamedSharding | None = None,
        remat: bool = False,
    ) -> "PackedView":
        """The view of these rows; `backend` and what follows are those of `PackedRows.of`."""
        rows = PackedRows.of(layout, _windows(spec), backend, bounds=bounds, activations=activations, remat=remat)
        return cls(layout.position, layout.group, turns_of(spec, layout.position, _lengths(spec, layout)), rows)

    def remember(self, key: Array, value: Array, memory: KeyValue | None) -> tuple[KeyValue, KeyValue | None]:
        """These keys and values are all there are."""
        return (key, value), memory

    def attend(self, query: Array, pair: KeyValue, window: int | None, rules: VisibilityRules) -> Array:
        """Attention within each text of the row."""
        return self.rows.attend(query, *pair, window, rules)


def _lengths(spec: specs.DecoderSpec, layout: Layout) -> Int[Array, "B T"]:
    """Tokens of the longest text of each slot's group; zeros where no rotation depends on it."""
    if spec.short_texts is None:
        return jnp.zeros_like(layout.position)

    def by_row(position, group):
        return jax.ops.segment_max(position, group, group.shape[0] + 1)[group]

    return jax.vmap(by_row)(layout.position, layout.group) + 1


@dataclasses.dataclass(frozen=True)
class CachedView:
    """T further tokens of each row, and a cache of those before; `filled` is the slot of the first of them.

    A position of -1 is padding: nobody sees it.
    """

    position: Int[Array, "B T"]
    text: Int[Array, "B T"]
    turns: Turns
    seen: Mapping[int | None, Bool[Array, "B T S"]]
    distance: Int[Array, "B T S"]
    filled: Int[Array, ""]

    @classmethod
    def of(
        cls,
        spec: specs.DecoderSpec,
        positions: Int[Array, "B T"],
        slots: Int[Array, "B S"],
        filled: Int[Array, ""],
        lengths: Int[Array, " B"] | None = None,
    ) -> "CachedView":
        """The view of tokens at `positions`, which are in `slots` already, of texts of these lengths."""
        distance = positions[:, :, None] - slots[:, None, :]
        padding = positions[:, :, None] < 0  # sees anything, so that its softmax is over something
        there = (slots[:, None, :] >= 0) & (distance >= 0)
        seen = {w: padding | (there if w is None else there & (distance < w)) for w in _windows(spec)}
        position = jnp.maximum(positions, 0)
        lengths = positions.max(axis=1) + 1 if lengths is None else lengths
        turns = turns_of(spec, position, jnp.broadcast_to(lengths[:, None], positions.shape))
        return cls(position, (positions >= 0).astype(jnp.int32), turns, seen, distance, filled)

    def remember(self, key: Array, value: Array, memory: KeyValue | None) -> tuple[KeyValue, KeyValue | None]:
        """The cache with these keys and values in it, twice: to be seen, and to be kept."""
        assert memory is not None
        keys, values = memory
        start = (0, 0, self.filled, 0)
        key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
        pair = lax.dynamic_update_slice(keys, key, start), lax.dynamic_update_slice(values, value, start)
        return pair, pair

    def attend(self, query: Array, pair: KeyValue, window: int | None, rules: VisibilityRules) -> Array:
        """Attention over the cache."""
        return attend_kept(query, *pair, self.seen[window], rules, None if rules.slopes is None else self.distance)


View = PackedView | CachedView
"""Who sees whom: both say the position of each token, the number of its text (0 is padding), how heads turn there,
`remember` keys and values, and let queries `attend` to them."""


class AttentionLayer(nnx.Module):
    """Grouped-query attention."""

    def __init__(self, spec: specs.Attention, width: int, *, rngs: nnx.Rngs):
        """Fresh projections; those that the spec does without are None."""
        inner, kv, own = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.borrows is None
        self.query = Dense(width, inner, bias=spec.qkv_bias, rngs=rngs)
        self.key = Dense(width, kv, bias=spec.qkv_bias, rngs=rngs) if own else None
        self.value = Dense(width, kv, bias=spec.qkv_bias, rngs=rngs) if own and not spec.value_is_key else None
        self.gate = Dense(width, inner, bias=spec.qkv_bias, rngs=rngs) if spec.gated else None
        self.output = Dense(inner, width, bias=spec.output_bias, rngs=rngs)
        self.query_norm = _head_norm(spec, spec.heads)
        self.key_norm = _head_norm(spec, spec.kv_heads) if own else None
        self.value_norm = NormLayer(spec.value_norm, spec.head_dim) if own and spec.value_norm else None
        self.sinks = nnx.Param(jnp.zeros((spec.heads,))) if spec.sinks else None
        self.spec = spec

    def __call__(
        self, x: Float[Array, "B T D"], view: View, memory: Cached | None, kept: dict[str, KeyValue]
    ) -> tuple[Float[Array, "B T D"], Cached | None, dict[str, KeyValue]]:
        """Project, rotate, attend, project back; with the memory and the kept keys and values as they are then."""
        spec = self.spec
        query = self._placed(self.query(x), self.query_norm, view)
        if spec.temperature is not None:
            query = query * _temperature(*spec.temperature, view.position).astype(query.dtype)
        if spec.borrows is None:
            pair, memory = view.remember(*named(self._pair(x, view), "qkv"), memory)
        else:
            pair = kept[spec.borrows]
        kept = kept if spec.keeps is None else {**kept, spec.keeps: pair}
        mixed = view.attend(named(query, "qkv"), pair, spec.window, self._rules()).reshape(*x.shape[:2], -1)
        if self.gate is not None:
            mixed = mixed * jax.nn.sigmoid(self.gate(x))
        return self.output(mixed), memory, kept

    def _pair(self, x: Float[Array, "B T D"], view: View) -> KeyValue:
        """Keys and values of these tokens."""
        assert self.key is not None
        key = self.key(x)
        value = key if self.value is None else self.value(x)
        value = self._heads(self._clipped(value))
        return self._placed(key, self.key_norm, view), value if self.value_norm is None else self.value_norm(value)

    def _placed(self, x: Float[Array, "B T I"], norm: NormLayer | None, view: View) -> Float[Array, "B T H C"]:
        """Projected queries or keys as heads, normalised and rotated."""
        head_norm = self.spec.head_norm
        whole = head_norm is not None and head_norm.over == "all_heads"
        late = head_norm is not None and head_norm.after_rope
        x = norm(x) if norm is not None and whole else x
        x = self._heads(self._clipped(x))
        x = norm(x) if norm is not None and not whole and not late else x
        rope = self.spec.rope
        if rope is not None:
            x = rotate(x, view.turns[rope, self.spec.head_dim], interleaved=rope.interleaved)
        return norm(x) if norm is not None and late else x

    def _clipped(self, x: Array) -> Array:
        return x if self.spec.clip is None else jnp.clip(x, -self.spec.clip, self.spec.clip)

    def _heads(self, x: Float[Array, "B T I"]) -> Float[Array, "B T H C"]:
        return x.reshape(*x.shape[:2], -1, self.spec.head_dim)

    def _rules(self) -> VisibilityRules:
        spec = self.spec
        slopes = None if spec.alibi is None else jnp.asarray(alibi_slopes(spec.heads, spec.alibi))
        scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
        return VisibilityRules(scale, spec.softcap, None if self.sinks is None else self.sinks[...], slopes)


def _head_norm(spec: specs.Attention, heads: int) -> NormLayer | None:
    if spec.head_norm is None:
        return None
    shapes = {"head": (spec.head_dim,), "each_head": (heads, spec.head_dim), "all_heads": (heads * spec.head_dim,)}
    return NormLayer(spec.head_norm.norm, *shapes[spec.head_norm.over])


def _temperature(strength: float, length: int, position: Int[Array, "B T"]) -> Float[Array, "B T 1 1"]:
    return (1 + strength * jnp.log1p((position // length).astype(jnp.float32)))[:, :, None, None]


class MLALayer(nnx.Module):
    """Multi-head latent attention (arXiv:2405.04434, equations 9 to 19)."""

    def __init__(self, spec: specs.MLA, width: int, *, rngs: nnx.Rngs):
        """Fresh projections."""
        plain, turning, low = spec.plain_dim, spec.rope_dim, spec.query_rank or width
        lowered, inner = spec.query_rank is not None, spec.heads * (spec.plain_dim + spec.rope_dim)
        self.query_down = Dense(width, low, bias=spec.bias, rngs=rngs) if lowered else None
        self.query_norm = NormLayer(spec.norm, low) if lowered else None
        self.query = Dense(low, inner, bias=False, rngs=rngs)
        self.latent = Dense(width, spec.kv_rank + turning, bias=spec.bias, rngs=rngs)
        self.latent_norm = NormLayer(spec.norm, spec.kv_rank)
        self.key_value = Dense(spec.kv_rank, spec.heads * (plain + spec.value_dim), bias=False, rngs=rngs)
        self.output = Dense(spec.heads * spec.value_dim, width, bias=spec.bias, rngs=rngs)
        self.spec = spec

    def __call__(
        self, x: Float[Array, "B T D"], view: View, memory: Cached | None, kept: dict[str, KeyValue]
    ) -> tuple[Float[Array, "B T D"], Cached | None, dict[str, KeyValue]]:
        """As `AttentionLayer`; the cache holds whole keys and values."""
        spec, heads = self.spec, (*x.shape[:2], self.spec.heads, -1)
        low = x if self.query_down is None or self.query_norm is None else self.query_norm(self.query_down(x))
        query, turning = jnp.split(self.query(low).reshape(heads), [spec.plain_dim], axis=-1)
        latent, shared = jnp.split(self.latent(x), [spec.kv_rank], axis=-1)
        key, value = jnp.split(self.key_value(self.latent_norm(latent)).reshape(heads), [spec.plain_dim], axis=-1)
        query = jnp.concatenate([query, self._rotated(turning, view)], axis=-1)
        shared = jnp.broadcast_to(self._rotated(shared[:, :, None, :], view), turning.shape)
        query, key, value = named((query, jnp.concatenate([key, shared], axis=-1), value), "qkv")
        pair, memory = view.remember(key, value, memory)
        mixed = view.attend(query, pair, None, VisibilityRules(spec.scale))
        return self.output(mixed.reshape(*x.shape[:2], -1)), memory, kept

    def _rotated(self, x: Float[Array, "B T H R"], view: View) -> Float[Array, "B T H R"]:
        rope = self.spec.rope
        return rotate(x, view.turns[rope, self.spec.rope_dim], interleaved=rope.interleaved)
