"""The decoder: layers declared with Flax NNX, run as a pure function of a spec and a plain tree of arrays.

Letters: B rows, T positions, S cache slots, D width, V vocabulary, R layers of a stack, K key-value heads, C channels.
"""

import dataclasses
import functools
import os
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dpo_jax import trees
from dpo_jax.errors import UserError
from dpo_jax.logprobs.fused import HeadSplit
from dpo_jax.model import spec as specs
from dpo_jax.model.adapters import Noise, composed
from dpo_jax.model.attention import Bounds, Layout, causal
from dpo_jax.model.blocks import Block, Carry, Context, Ends, Memory
from dpo_jax.model.delta import empty_memory
from dpo_jax.model.experts import Routing, added
from dpo_jax.model.ids import checked, from_unknown
from dpo_jax.model.kernels import wide_products
from dpo_jax.model.mixers import CachedView, KeyValue, PackedView
from dpo_jax.model.placement import between_layers, settled, table_split
from dpo_jax.model.remat import recomputed
from dpo_jax.model.settings import REMATS
from dpo_jax.model.spec import DecoderSpec
from dpo_jax.trees import Params, Tree

FLOAT32 = re.compile(
    r".*/(scale|decay_rate|decay_bias|scalar|router/(correction|channel_scale|expert_scale)|lora/magnitude|absmax)"
)
"""Leaves that stay in float32 whatever the dtype of computation: what uses them computes in float32."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["spec"])
@dataclasses.dataclass(frozen=True)
class Model:
    """A frozen spec and a plain nested dict of arrays; a pytree whose only leaves are the arrays."""

    spec: DecoderSpec
    params: Params

    def logits(self, tokens: Any) -> Float[Array, "B T V"]:
        """Logits of ordinary rows [B, T], as the function `logits`: `[:, t]` is the prediction of token t + 1."""
        return logits(self.spec, self.params, tokens)

    def __repr__(self) -> str:
        """In a line; the spec and the arrays have texts of their own."""
        shape = f"{len(self.spec.layers)} layers, width {self.spec.width}, {self.spec.vocab_size:,} tokens"
        return f"Model({shape}: {trees.counted(self.params)})"


def check_model(where: str, given: object, *, folder: bool = False) -> None:
    """Refuse what is no model, as parameters alone; a `folder` or hub id may do as well.

    Raises:
      UserError: begins with `where`.
    """
    if not isinstance(given, (Model, str, os.PathLike) if folder else Model):
        either = ", or a folder or hub id" if folder else ""
        what = f"a Model: what load_hf gave, or Model(spec, params) around parameters alone{either}"
        raise UserError(f"{where}: is of type {type(given).__name__}; give {what}")


@dataclasses.dataclass(frozen=True)
class Execution:
    """How the same function is computed: one compiled layer or all, what backward keeps, where activations live, and
    which backend attends."""

    scan_layers: bool = True
    remat: str = "none"
    """Name of a policy of `model.settings.REMATS`."""
    activations: jax.sharding.NamedSharding | None = None
    attention: str = "xla"
    platform: str = "cpu"
    """Of the devices that it is compiled for, which need not be those of this process."""
    head: HeadSplit | None = None
    """How the head is split over the mesh of the activations; None leaves it to the compiler."""
    frozen_head: bool = False
    """The head is not trained, so its gradient is not computed (see `logprobs.linear_logprobs`)."""
    bounds: Bounds | None = None
    """Of the rows; some backends of attention want them."""


DEFAULT_EXECUTION = Execution()


class Head(NamedTuple):
    """The output projection by vocabulary row, with its bias if it has one."""

    rows: Float[Array, "V N"]
    bias: Float[Array, " V"] | None


class Cache(NamedTuple):
    """What the layers remember of the tokens read so far; an empty slot has position -1, so nobody sees it.

    `memory` has an entry for each stack of blocks that remembers anything: (keys [R, B, K, S, C], values), or the
    convolution's inputs and the state of a delta rule; of layers that lie apart (see `apart`), a tuple of such.
    """

    memory: dict[str, Any]
    positions: Int[Array, "B S"]
    filled: Int[Array, ""]


# ---------------------------------------------------------------------------------------------- parameters


def init_params(spec: DecoderSpec, key: PRNGKeyArray) -> Params:
    """Random float32 parameters; `blocks/N/...` are those of the layers of stack N, on a leading axis.

    A scalar head starts at zero, not at random.
    """
    ends_key, blocks_key = jax.random.split(key)
    ends = _plain(Ends(spec, rngs=nnx.Rngs(ends_key)))
    keys = jax.random.split(blocks_key, len(spec.layers))
    blocks = {}
    for name, layer, numbers in stacks(spec):
        fresh = jax.vmap(lambda k, layer=layer: _plain(Block(layer, spec, rngs=nnx.Rngs(k))))
        blocks[name] = fresh(keys[jnp.asarray(numbers)])
    return {**ends, "blocks": blocks}


def stacks(spec: DecoderSpec) -> list[tuple[str, specs.Layer, list[int]]]:
    """Name of each stack of blocks, what its layers are, and their numbers."""
    found = []
    for segment in specs.segments(spec.layers):
        for k, kind in enumerate(segment.kinds):
            numbers = [segment.start + repeat * len(segment.kinds) + k for repeat in range(segment.repeats)]
            found.append((str(segment.first + k), kind, numbers))
    return found


@functools.lru_cache
def abstract_params(spec: DecoderSpec) -> Params:
    """Shapes and dtypes of `init_params`, without computing them."""
    return jax.eval_shape(lambda: init_params(spec, jax.random.key(0)))


def cast(params: Params, dtype: DTypeLike) -> Params:
    """Parameters in the dtype of computation; those that are used in float32, or are no floats, stay as they are."""
    table = trees.paths(params)
    return trees.from_paths(
        {
            path: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) and not FLOAT32.fullmatch(path) else x
            for path, x in table.items()
        }
    )


@jax.jit
def apart(params: Params) -> Params:
    """The same numbers, with an array of its own for each layer of a stack, for `extend`.

    On a CPU a scan copies the weights of each layer before it multiplies by them, and its part of the cache before and
    after: more bytes than a step of a few tokens has to read at all.
    """
    layers = {
        name: tuple(jax.tree.map(lambda leaf: leaf[i], stack) for i in range(len(jax.tree.leaves(stack)[0])))  # noqa: B023
        for name, stack in params["blocks"].items()
    }
    return {**params, "blocks": layers}


def held_in(path: str, dtype: DTypeLike) -> DTypeLike:
    """dtype of a leaf where parameters are read for, or kept in, this dtype: float32 for those that stay in it."""
    return jnp.float32 if FLOAT32.fullmatch(path) else dtype


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
) -> Float[Array, "B T N"]:
    """States that the head reads (after the last norm) of packed rows, in the dtype of the parameters."""
    return hidden_and_routing(spec, params, tokens, layout, None, execution)[0]


def hidden_and_routing(
    spec: DecoderSpec,
    params: Params,
    tokens: Int[Array, "B T"],
    layout: Layout,
    weights: Float[Array, "B T"] | None,
    execution: Execution = DEFAULT_EXECUTION,
    noise: Noise | None = None,
) -> tuple[Float[Array, "B T N"], Routing | None]:
    """As `hidden`, and how often experts were chosen, each token counted by its weight and all layers added up.

    `noise` is the dropout of a training step's adapters.
    """
    where, again = between_layers(execution.activations, *tokens.shape), REMATS[execution.remat].attention
    view = PackedView.of(spec, layout, execution.attention, bounds=execution.bounds, activations=where, remat=again)
    context = Context(view, where, weights, noise, execution.platform)
    x, _, routing = _run(spec, params, tokens, context, execution, {}, {})
    return x, routing


def logits(spec: DecoderSpec, params: Params, tokens: Any) -> Float[Array, "B T V"]:
    """Logits of ordinary rows, float32: `[:, t]` is the prediction of token t + 1 from tokens 0..t.

    `tokens` have any integer dtype. In a traced function an id that is none of the model's makes the logits nan from
    its position on.

    Raises:
      UserError: `tokens` are no rows, or one of them is no id of the model's.
    """
    tokens = checked("logits: tokens", tokens, spec.vocab_size)
    empty = not tokens.size
    return jnp.zeros((*tokens.shape, spec.vocab_size)) if empty else _logits(spec, params, tokens)


@functools.partial(jax.jit, static_argnums=0)
def _logits(spec, params, tokens):
    states = hidden(spec, params, tokens, causal(*tokens.shape))
    scores = head_logits(spec, params, states.reshape(-1, spec.head_width)).reshape(*tokens.shape, spec.vocab_size)
    return jnp.where(from_unknown(tokens, spec.vocab_size)[..., None], jnp.nan, scores)


def head_logits(spec: DecoderSpec, params: Params, states: Float[Array, "M N"]) -> Float[Array, "M V"]:
    """All logits of a few hidden states, float32."""
    head = head_of(spec, params)
    scores = lax.dot_general(states, head.rows, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    if head.bias is not None:
        scores = scores + head.bias[None, :].astype(jnp.float32)
    scores = scores if spec.logit_scale == 1.0 else scores * spec.logit_scale
    return scores if spec.logit_softcap is None else spec.logit_softcap * jnp.tanh(scores / spec.logit_softcap)


def scalar_scores(spec: DecoderSpec, params: Params, states: Float[Array, "M N"]) -> Float[Array, " M"]:
    """Scores of a model with a scalar head, float32; a text's score is that of the state of its last token.

    Raises:
      ValueError: the model has no scalar head.
    """
    if not spec.scalar_head:
        raise ValueError("the model has a head over the vocabulary and scores no texts; use head_logits")
    kernel = params["score"]["kernel"][:, 0]
    return lax.dot_general(states, kernel, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def empty_cache(spec: DecoderSpec, batch: int, slots: int, dtype: DTypeLike, *, lie_apart: bool = False) -> Cache:
    """A cache for `slots` tokens of `batch` rows, for layers that lie apart or not."""
    memory: dict[str, Any] = {}
    for name, layer, numbers in stacks(spec):
        match layer.mixer:
            case specs.GatedDelta() as delta:
                blank: Memory = empty_memory(delta, batch, dtype)
            case specs.Attention(borrows=str()):
                continue
            case mixer:
                blank = _empty_pair(mixer, batch, slots, dtype)
        if lie_apart:
            memory[name] = (blank,) * len(numbers)
        else:
            memory[name] = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(numbers), *leaf.shape)), blank)  # noqa: B023
    return Cache(memory, jnp.full((batch, slots), -1, jnp.int32), jnp.int32(0))


def _empty_pair(mixer: specs.Attention | specs.MLA, batch: int, slots: int, dtype: DTypeLike) -> KeyValue:
    """Keys and values of nothing, head by head as in a cache."""
    match mixer:
        case specs.Attention(kv_heads=heads, head_dim=channels):
            sizes = channels, channels
        case specs.MLA(heads=heads):
            sizes = mixer.plain_dim + mixer.rope_dim, mixer.value_dim
    key, value = (jnp.zeros((batch, heads, slots, size), dtype) for size in sizes)
    return key, value


def extend(
    spec: DecoderSpec,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: Cache,
    lengths: Int[Array, " B"] | None = None,
    *,
    rows: jax.sharding.NamedSharding | None = None,
) -> tuple[Float[Array, "B T N"], Cache]:
    """Read T more tokens of every row: their hidden states, and the cache with them in it.

    `lengths` is how long the text of each row will be when it has been read; None where these are its last tokens.
    Longrope alone looks at it, and there every token of a cache must have been read for the same side of the original
    length.

    `rows` says how rows are split over the devices that the weights lie on, if there are several.

    A token with position -1 is padding (rows of a batch start with it so that all end together): nobody sees it, and
    its own hidden state means nothing.
    """
    slots = lax.dynamic_update_slice(cache.positions, positions, (0, cache.filled))
    view = CachedView.of(spec, positions, slots, cache.filled, lengths)
    kept = _shared_kv(spec, cache.positions.shape, params["embed"]["embedding"].dtype)
    context = Context(view, None, None, rows=rows)
    with wide_products():
        x, memory, _ = _run(spec, params, tokens, context, DEFAULT_EXECUTION, cache.memory, kept)
    return x, Cache(memory, slots, cache.filled + tokens.shape[1])


def _shared_kv(spec: DecoderSpec, shape: tuple[int, ...], dtype: DTypeLike) -> dict[str, KeyValue]:
    """Keys and values that layers will keep for others in a cache, before they do: a scan must know their shape."""
    mixers = [layer.mixer for layer in spec.layers if isinstance(layer.mixer, specs.Attention) and layer.mixer.keeps]
    return {str(mixer.keeps): _empty_pair(mixer, shape[0], shape[1], dtype) for mixer in mixers}


def _slots_first(kept: dict[str, Any]) -> dict[str, Any]:
    """As they lie in a packed row."""
    return jax.tree.map(lambda leaf: leaf.transpose(0, 2, 1, 3), kept)


def _run(spec: DecoderSpec, params: Params, tokens, context: Context, execution: Execution, memory, kept):
    """Embed, run every block with its memory, normalise; also the new memory, and the routing of all layers."""
    ends = _merged(*_ends_graph(spec), {name: leaf for name, leaf in params.items() if name != "blocks"})
    split = functools.partial(table_split, execution.head, context.activations, rows=tokens.shape[0])
    x = settled(ends.first(tokens, context.view.position, split), context.activations)
    inputs, carry = ends.each(tokens, x, split), Carry(x, kept or _slots_first(_shared_kv(spec, tokens.shape, x.dtype)))
    found, routings = {}, []
    for segment in specs.segments(spec.layers):
        names = [str(segment.first + k) for k in range(len(segment.kinds))]
        weights, remembered = [params["blocks"][name] for name in names], [memory.get(name) for name in names]
        stacked = (weights, remembered, _inputs_of(segment, inputs))
        pattern = _pattern(spec, segment.kinds, context, execution)
        if isinstance(weights[0], tuple):
            carry, (remembered, routing) = _one_by_one(pattern, carry, *stacked)
        else:
            carry, (remembered, routing) = _repeat(pattern, carry, stacked, segment.repeats, execution.scan_layers)
        found |= {name: value for name, value in zip(names, remembered, strict=True) if name in memory}
        routings += [jax.tree.map(lambda leaf: leaf.sum(axis=0), one) for one in routing if one is not None]
    # Said again after the last block: without it XLA has computed wrong numbers where a projection follows a scan and
    # rows are split over two axes of the mesh (OPT-350m's layout on 2 x 2 x 2 devices, jax 0.10.2 and 0.12).
    x = settled(carry.x, context.activations)
    return ends.last(x), found, functools.reduce(added, routings) if routings else None


def _inputs_of(segment: specs.Segment, inputs: Array | None) -> Array | None:
    """Inputs of a segment's layers, [repeats, kinds, B, T, P]."""
    if inputs is None:
        return None
    shape = (segment.repeats, len(segment.kinds))
    stop = segment.start + segment.repeats * len(segment.kinds)
    return inputs[segment.start : stop].reshape(*shape, *inputs.shape[1:])


def _pattern(spec: DecoderSpec, kinds: tuple[specs.Layer, ...], context: Context, execution: Execution):
    """Runs one layer of each kind, in order."""

    def one(kind, carry, weights, memory, inputs):
        whole = composed(weights, _block_shapes(kind, spec), context.noise)
        module = _merged(*_block_graph(kind, spec), whole)
        carry, memory, routing = module(carry, context, memory, inputs)
        return carry._replace(x=settled(carry.x, context.activations)), memory, routing

    def run(carry, stacked):
        weights, memories, inputs = stacked
        found = []
        for k, kind in enumerate(kinds):
            step = recomputed(functools.partial(one, kind), execution.remat)
            carry, *rest = step(carry, weights[k], memories[k], None if inputs is None else inputs[k])
            found.append(rest)
        return carry, ([memory for memory, _ in found], [routing for _, routing in found])

    return run


def _repeat(run, carry: Carry, stacked: Tree, times: int, scan: bool):
    """Fold `run` over the leading axis of `stacked`: one compiled body, or every layer by itself.

    The unrolled form takes the stack apart with one split per leaf, whose gradient is one concatenation; indexing each
    layer would add up a full-size gradient per layer.
    """
    if scan and times > 1:
        return lax.scan(run, carry, stacked)
    parts = jax.tree.map(lambda leaf: lax.split(leaf, (1,) * times), stacked)
    results = []
    for i in range(times):
        layer = jax.tree.map(lambda leaf, part: part[i].squeeze(0), stacked, parts)  # noqa: B023
        carry, result = run(carry, layer)
        results.append(result)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


def _one_by_one(run, carry: Carry, weights: list[tuple], memories: list[tuple | None], inputs: Array | None):
    """As `_repeat`, for layers that lie apart; so does what they remember then."""
    found, routings = [], []
    for i in range(len(weights[0])):
        own = [stack[i] for stack in weights], [stack and stack[i] for stack in memories]
        carry, (remembered, routing) = run(carry, (*own, None if inputs is None else inputs[i]))
        found.append(remembered)
        routings.append(routing)
    stacked = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *of_kind) for of_kind in zip(*routings, strict=True)]
    return carry, ([*zip(*found, strict=True)], stacked)


# ---------------------------------------------------------------------------------------------- NNX boundary


def _plain(module: nnx.Module) -> Params:
    """A module's parameters as a plain nested dict of arrays."""
    return nnx.to_pure_dict(nnx.state(module))


@functools.lru_cache
def _block_graph(layer: specs.Layer, spec: DecoderSpec):
    return nnx.split(nnx.eval_shape(lambda: Block(layer, spec, rngs=nnx.Rngs(0))))


@functools.lru_cache
def _block_shapes(layer: specs.Layer, spec: DecoderSpec) -> Params:
    return nnx.to_pure_dict(_block_graph(layer, spec)[1])


@functools.lru_cache
def _ends_graph(spec: DecoderSpec):
    return nnx.split(nnx.eval_shape(lambda: Ends(spec, rngs=nnx.Rngs(0))))


def _merged(graph, abstract, params: Params):
    """The module whose parameters are these arrays."""
    state = jax.tree.map(lambda leaf: leaf, abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)
