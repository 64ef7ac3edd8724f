"""The decoder: layers declared with Flax NNX, run as a pure function of a spec and a plain tree of arrays.

Letters: B rows, T positions, S cache slots, D width, V vocabulary, L layers, H heads, K key-value heads, C channels.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dpo_jax import trees
from dpo_jax.model.attention import Layout, attend, attend_causally, causal, visible
from dpo_jax.model.kernels import dense
from dpo_jax.model.rope import rotate, rotation
from dpo_jax.model.spec import DecoderSpec

Params = dict[str, Any]
Rotation = tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]
INITIAL_SCALE = 0.02


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["spec"])
@dataclasses.dataclass(frozen=True)
class Model:
    """A frozen spec and a plain nested dict of arrays; a pytree whose only leaves are the arrays."""

    spec: DecoderSpec
    params: Params


@dataclasses.dataclass(frozen=True)
class Execution:
    """How the same function is computed: one compiled layer or all, what backward keeps, and where activations live."""

    scan_layers: bool = True
    remat: Literal["none", "attention", "block"] = "none"
    activations: jax.sharding.Sharding | None = None


DEFAULT_EXECUTION = Execution()


class Dense(nnx.Module):
    """A linear layer; the kernel is stored (inputs, outputs)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, rngs: nnx.Rngs):
        """Normal kernel, zero bias."""
        self.kernel = nnx.Param(INITIAL_SCALE * jax.random.normal(rngs.params(), (inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros((outputs,))) if bias else None

    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        """`x @ kernel + bias`."""
        y = dense(x, self.kernel[...])
        return y if self.bias is None else y + self.bias[...][None, None, :]


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + epsilon) * scale` over the last axis, in float32."""

    def __init__(self, width: int, epsilon: float):
        """Unit scale."""
        self.scale = nnx.Param(jnp.ones((width,)))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalised x, in x's dtype."""
        wide = x.astype(jnp.float32)
        wide = wide * lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.epsilon)
        return (wide * self.scale[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class Attention(nnx.Module):
    """Projections of grouped-query attention; who sees whom is the caller's business."""

    def __init__(self, spec: DecoderSpec, *, rngs: nnx.Rngs):
        """Fresh projections."""
        inner, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.query = Dense(spec.width, inner, bias=spec.qkv_bias, rngs=rngs)
        self.key = Dense(spec.width, kv, bias=spec.qkv_bias, rngs=rngs)
        self.value = Dense(spec.width, kv, bias=spec.qkv_bias, rngs=rngs)
        self.output = Dense(inner, spec.width, bias=spec.output_bias, rngs=rngs)
        self.query_norm = RMSNorm(spec.head_dim, spec.norm_epsilon) if spec.qk_norm else None
        self.key_norm = RMSNorm(spec.head_dim, spec.norm_epsilon) if spec.qk_norm else None
        self.head_dim = spec.head_dim

    def __call__(self, x: Float[Array, "B T D"], turn: Rotation, mix: Callable) -> tuple[Float[Array, "B T D"], Any]:
        """Project, rotate, let `mix(query, key, value)` attend, project back; `mix`'s memory is passed on."""
        query, key, value = (self._heads(layer(x)) for layer in (self.query, self.key, self.value))
        query = query if self.query_norm is None else self.query_norm(query)
        key = key if self.key_norm is None else self.key_norm(key)
        mixed, memory = mix(rotate(query, *turn), rotate(key, *turn), value)
        return self.output(mixed.reshape(*x.shape[:2], -1)), memory

    def _heads(self, x: Float[Array, "B T I"]) -> Float[Array, "B T H C"]:
        return x.reshape(*x.shape[:2], -1, self.head_dim)


class MLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, spec: DecoderSpec, *, rngs: nnx.Rngs):
        """Fresh projections."""
        self.gate = Dense(spec.width, spec.mlp_width, bias=spec.mlp_bias, rngs=rngs)
        self.up = Dense(spec.width, spec.mlp_width, bias=spec.mlp_bias, rngs=rngs)
        self.down = Dense(spec.mlp_width, spec.width, bias=spec.mlp_bias, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The gated product."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One pre-norm layer: attention, then the MLP, each added to what came in."""

    def __init__(self, spec: DecoderSpec, *, rngs: nnx.Rngs):
        """Fresh layer."""
        self.attention_norm = RMSNorm(spec.width, spec.norm_epsilon)
        self.attention = Attention(spec, rngs=rngs)
        self.mlp_norm = RMSNorm(spec.width, spec.norm_epsilon)
        self.mlp = MLP(spec, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], turn: Rotation, mix: Callable) -> tuple[Float[Array, "B T D"], Any]:
        """The layer's output, and the memory that `mix` returned."""
        attended, memory = self.attention(self.attention_norm(x), turn, mix)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), memory


class Table(nnx.Module):
    """A matrix with a row for each token of the vocabulary: the embedding, or a head that is not tied to it."""

    def __init__(self, spec: DecoderSpec, *, bias: bool, rngs: nnx.Rngs):
        """Normal rows."""
        shape = (spec.vocab_size, spec.width)
        self.embedding = nnx.Param(INITIAL_SCALE * jax.random.normal(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros((spec.vocab_size,))) if bias else None


class Score(nnx.Module):
    """A scalar head: the score of a text is the hidden state of its last token times this."""

    def __init__(self, spec: DecoderSpec):
        """Zeros, so that a new reward model prefers no text to another and its loss starts at ln 2."""
        self.kernel = nnx.Param(jnp.zeros((spec.width, 1)))


class Ends(nnx.Module):
    """What stands before the first and after the last block."""

    def __init__(self, spec: DecoderSpec, *, rngs: nnx.Rngs):
        """Fresh embedding, norm and head: a scalar one, or one by vocabulary row unless it is tied."""
        self.embed = Table(spec, bias=False, rngs=rngs)
        self.final_norm = RMSNorm(spec.width, spec.norm_epsilon)
        self.head = None if spec.tied or spec.scalar_head else Table(spec, bias=spec.head_bias, rngs=rngs)
        self.score = Score(spec) if spec.scalar_head else None


class Head(NamedTuple):
    """The output projection by vocabulary row, with its bias if it has one."""

    rows: Float[Array, "V D"]
    bias: Float[Array, " V"] | None


class Cache(NamedTuple):
    """Keys and values of the tokens read so far; an empty slot has position -1, so nobody sees it."""

    keys: Float[Array, "L B S K C"]
    values: Float[Array, "L B S K C"]
    positions: Int[Array, "B S"]
    filled: Int[Array, ""]


# ---------------------------------------------------------------------------------------------- parameters


def init_params(spec: DecoderSpec, key: PRNGKeyArray) -> Params:
    """Random float32 parameters; the leaves of all blocks are stacked on a leading layer axis.

    A scalar head starts at zero, not at random.
    """
    ends_key, blocks_key = jax.random.split(key)
    ends = _plain(Ends(spec, rngs=nnx.Rngs(ends_key)))
    blocks = jax.vmap(lambda k: _plain(Block(spec, rngs=nnx.Rngs(k))))(jax.random.split(blocks_key, spec.layers))
    return {**ends, "blocks": blocks}


@functools.lru_cache
def abstract_params(spec: DecoderSpec) -> Params:
    """Shapes and dtypes of `init_params`, without computing them."""
    return jax.eval_shape(lambda: init_params(spec, jax.random.key(0)))


def cast(params: Params, dtype: Any) -> Params:
    """Parameters in the dtype of computation; norm scales stay as they are, norms compute in float32."""
    table = trees.paths(params)
    return trees.from_paths({p: x if p.endswith("/scale") else x.astype(dtype) for p, x in table.items()})


def head_of(spec: DecoderSpec, params: Params) -> Head:
    """The output projection: the embedding itself where it is tied.

    Raises:
      ValueError: the model has a scalar head.
    """
    if spec.scalar_head:
        raise ValueError(
            "a model with a scalar head scores texts and has no head over the vocabulary; use scalar_scores"
        )
    table = params["embed"] if spec.tied else params["head"]
    return Head(table["embedding"], table.get("bias"))


# ---------------------------------------------------------------------------------------------- forward


def hidden(
    spec: DecoderSpec,
    params: Params,
    tokens: Int[Array, "B T"],
    layout: Layout,
    execution: Execution = DEFAULT_EXECUTION,
) -> Float[Array, "B T D"]:
    """Final hidden states (after the last norm) of packed rows, in the dtype of the parameters."""
    windows = spec.windows or (None,) * spec.layers
    uniform = len(set(windows)) == 1
    shared = visible(layout, windows[0]) if uniform else None

    def mix(query, key, value, window):
        seen = visible(layout, window) if shared is None else shared
        return attend_causally(query, key, value, seen), None

    if execution.remat == "attention":
        mix = jax.checkpoint(mix)
    far = max(layout.position.shape[1], 1) + max((w for w in windows if w is not None), default=0) + 2**30
    memory = None if uniform else jnp.asarray([far if w is None else w for w in windows], jnp.int32)
    x, _ = _run(spec, params, tokens, layout.position, mix, memory, execution)
    return x


def logits(spec: DecoderSpec, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """Logits of ordinary rows, float32: `[:, t]` is the prediction of token t + 1 from tokens 0..t."""
    return _logits(spec, params, tokens)


@functools.partial(jax.jit, static_argnums=0)
def _logits(spec, params, tokens):
    states = hidden(spec, params, tokens, causal(*tokens.shape))
    return head_logits(spec, params, states.reshape(-1, spec.width)).reshape(*tokens.shape, spec.vocab_size)


def head_logits(spec: DecoderSpec, params: Params, states: Float[Array, "N D"]) -> Float[Array, "N V"]:
    """All logits of a few hidden states, float32."""
    head = head_of(spec, params)
    scores = lax.dot_general(states, head.rows, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    if head.bias is not None:
        scores = scores + head.bias[None, :].astype(jnp.float32)
    return scores if spec.logit_softcap is None else spec.logit_softcap * jnp.tanh(scores / spec.logit_softcap)


def scalar_scores(spec: DecoderSpec, params: Params, states: Float[Array, "N D"]) -> Float[Array, " N"]:
    """Scores of a model with a scalar head, float32; a text's score is that of the state of its last token.

    Raises:
      ValueError: the model has no scalar head.
    """
    if not spec.scalar_head:
        raise ValueError("the model has a head over the vocabulary and scores no texts; use head_logits")
    kernel = params["score"]["kernel"][:, 0]
    return lax.dot_general(states, kernel, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def empty_cache(spec: DecoderSpec, batch: int, slots: int, dtype: Any) -> Cache:
    """A cache for `slots` tokens of `batch` rows."""
    shape = (spec.layers, batch, slots, spec.kv_heads, spec.head_dim)
    positions = jnp.full((batch, slots), -1, jnp.int32)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), positions, jnp.int32(0))


def extend(
    spec: DecoderSpec, params: Params, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cache: Cache
) -> tuple[Float[Array, "B T D"], Cache]:
    """Read T more tokens of every row: their hidden states, and the cache with them in it.

    A token with position -1 is padding (rows of a batch start with it so that all end together): nobody sees it, and
    its own hidden state means nothing.
    """
    slots = lax.dynamic_update_slice(cache.positions, positions, (0, cache.filled))
    distance = positions[:, :, None] - slots[:, None, :]
    seen = (slots[:, None, :] >= 0) & (distance >= 0)
    seen = seen | (positions[:, :, None] < 0)

    def mix(query, key, value, memory):
        keys, values, window = memory
        keys = lax.dynamic_update_slice(keys, key, (0, cache.filled, 0, 0))
        values = lax.dynamic_update_slice(values, value, (0, cache.filled, 0, 0))
        near = seen & ((distance < window) | (positions[:, :, None] < 0))
        return attend(query, keys, values, near), (keys, values, window)

    windows = spec.windows or (None,) * spec.layers
    limits = jnp.asarray([2**30 if w is None else w for w in windows], jnp.int32)
    memory = (cache.keys, cache.values, limits)
    turned = jnp.maximum(positions, 0)
    x, (keys, values, _) = _run(spec, params, tokens, turned, mix, memory, Execution())
    return x, Cache(keys, values, slots, cache.filled + tokens.shape[1])


def _run(spec, params, tokens, positions, mix, memory, execution: Execution):
    """Embed, run every block with its slice of `memory` (stacked by layer), normalise."""
    ends = _merged(*_ends_graph(spec), {name: leaf for name, leaf in params.items() if name != "blocks"})
    turn = rotation(spec.rope, spec.head_dim, positions)

    def block(x, layer):
        weights, remembered = layer
        module = _merged(*_block_graph(spec), weights)
        x, remembered = module(x, turn, lambda q, k, v: mix(q, k, v, remembered))
        return _placed(x, execution), remembered

    if execution.remat == "block":
        block = jax.checkpoint(block)
    x = _placed(ends.embed.embedding[...][tokens], execution)
    x, memory = _over_layers(block, x, (params["blocks"], memory), spec.layers, execution.scan_layers)
    return ends.final_norm(x), memory


def _over_layers(block, x, stacked, layers: int, scan: bool):
    """Fold `block` over the leading axis of `stacked`: one compiled body, or every layer by itself.

    The unrolled form takes the stack apart with one split per leaf, whose gradient is one concatenation; indexing each
    layer would add up a full-size gradient per layer.
    """
    if scan:
        return lax.scan(block, x, stacked)
    parts = jax.tree.map(lambda leaf: lax.split(leaf, (1,) * layers), stacked)
    results = []
    for i in range(layers):
        layer = jax.tree.map(lambda leaf, part: part[i].squeeze(0), stacked, parts)  # noqa: B023
        x, result = block(x, layer)
        results.append(result)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


def _placed(x: Float[Array, "B T D"], execution: Execution) -> Float[Array, "B T D"]:
    """Activations held where the execution wants them, so that weights move to them and not the reverse."""
    return x if execution.activations is None else lax.with_sharding_constraint(x, execution.activations)


# ---------------------------------------------------------------------------------------------- NNX boundary


def _plain(module: nnx.Module) -> Params:
    """A module's parameters as a plain nested dict of arrays."""
    return nnx.to_pure_dict(nnx.state(module))


@functools.lru_cache
def _block_graph(spec: DecoderSpec):
    return nnx.split(nnx.eval_shape(lambda: Block(spec, rngs=nnx.Rngs(0))))


@functools.lru_cache
def _ends_graph(spec: DecoderSpec):
    return nnx.split(nnx.eval_shape(lambda: Ends(spec, rngs=nnx.Rngs(0))))


def _merged(graph, abstract, params: Params):
    """The module whose parameters are these arrays."""
    state = jax.tree.map(lambda leaf: leaf, abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)
