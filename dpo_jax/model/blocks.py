"""One layer of a decoder, and what stands before the first and after the last.

Letters: B rows, T positions, D width, N channels of embedding and head, L layers, P channels of an input by layer.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from dpo_jax.model import delta
from dpo_jax.model import spec as specs
from dpo_jax.model.adapters import Noise
from dpo_jax.model.delta import GatedDeltaNet
from dpo_jax.model.experts import Mixture, Routing
from dpo_jax.model.layers import ACTIVATIONS, Dense, MLPLayer, NormLayer, lookup, normal
from dpo_jax.model.mixers import AttentionLayer, Cached, KeyValue, MLALayer, View
from dpo_jax.model.placement import TableSplit, inside_layers, settled, slot_axes
from dpo_jax.model.remat import named
from dpo_jax.model.spec import DecoderSpec

Memory = Cached | delta.Memory | None
"""What a mixer remembers of the tokens before; None where a packed row is read at once."""


class Context(NamedTuple):
    """What every block of one pass sees."""

    view: View
    activations: jax.sharding.NamedSharding | None
    """Where states live between layers."""
    weights: Float[Array, "B T"] | None
    """What each token counts in the routing of experts; None if nobody asks."""
    noise: Noise | None = None
    """Dropout of the adapters; None where nothing is dropped."""
    platform: str = "cpu"
    """Of the devices that it is compiled for."""
    rows: jax.sharding.NamedSharding | None = None
    """How rows are split where nothing is held in its place: experts are computed device by device."""

    def inside(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What a layer's products see, held where they want it; slopes along it are held where states live."""
        return x if self._stays else settled(settled(x, self.activations), inside_layers(self.activations))

    def between(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What they give, held where states live; slopes along it are held where products want them."""
        return x if self._stays else settled(settled(x, inside_layers(self.activations)), self.activations)

    @property
    def _stays(self) -> bool:
        """Whether no slots are split, so that there is nothing to say that the carry does not say."""
        return self.activations is None or not slot_axes(self.activations)


class Carry(NamedTuple):
    """What goes from block to block: the states, and keys and values that later blocks borrow, by name."""

    x: Float[Array, "B T D"]
    kept: dict[str, KeyValue]


class Block(nnx.Module):
    """One layer: a mixer and an MLP, experts, or both, with norms where the spec places them."""

    def __init__(self, layer: specs.Layer, spec: DecoderSpec, *, rngs: nnx.Rngs):
        """Fresh layer."""
        width, place = spec.width, layer.place
        before, behind = place != "post", place in ("post", "sandwich")
        self.attention_norm = NormLayer(spec.norm, width) if before else None
        self.attention = _attention(layer.mixer, width, rngs)
        self.delta = GatedDeltaNet(layer.mixer, width, rngs=rngs) if isinstance(layer.mixer, specs.GatedDelta) else None
        self.attention_post_norm = NormLayer(spec.norm, width) if behind else None
        self.mlp_norm = NormLayer(spec.norm, width) if before and place != "parallel" else None
        self.mlp = MLPLayer(layer.mlp, width, rngs=rngs) if layer.mlp else None
        self.experts = Mixture(layer.experts, width, rngs=rngs) if layer.experts else None
        self.mlp_post_norm = NormLayer(spec.norm, width) if behind else None
        beside = layer.mlp is not None and layer.experts is not None
        self.mlp_inner_norm = NormLayer(spec.norm, width) if beside else None
        self.experts_norm = NormLayer(spec.norm, width) if beside else None
        self.experts_inner_norm = NormLayer(spec.norm, width) if beside else None
        self.inputs_gate = Dense(width, layer.inputs, bias=False, rngs=rngs) if layer.inputs else None
        self.inputs_projection = Dense(layer.inputs, width, bias=False, rngs=rngs) if layer.inputs else None
        self.inputs_norm = NormLayer(spec.norm, width) if layer.inputs else None
        self.scalar = nnx.Param(jnp.ones((1,))) if layer.scalar else None
        self.layer = layer

    def __call__(
        self, carry: Carry, context: Context, memory: Memory, inputs: Float[Array, "B T P"] | None
    ) -> tuple[Carry, Memory, Routing | None]:
        """The layer's output, the memory of its mixer, and how its experts were chosen."""
        x, place = carry.x, self.layer.place
        normed = context.inside(_before(self.attention_norm, x, place))
        attended, memory, kept = self._attend(normed, context, memory, carry.kept)
        attended = context.between(attended)
        attended = _behind(self.attention_post_norm, named(attended, "attention_out")) * self.layer.residual_scale
        if place in ("parallel", "parallel2"):
            norm = self.attention_norm if place == "parallel" else self.mlp_norm
            fed, routing = self._feed(context.inside(_before(norm, x, place)), x, context)
            fed = context.between(fed)
            return Carry(x + attended + named(fed, "mlp_out"), kept), memory, routing
        x = x + attended
        x = x if place != "residual" else _behind(self.attention_norm, x)
        fed, routing = self._feed(context.inside(_before(self.mlp_norm, x, place)), x, context)
        fed = context.between(fed)
        x = x + _behind(self.mlp_post_norm, named(fed, "mlp_out")) * self.layer.residual_scale
        x = x if place != "residual" else _behind(self.mlp_norm, x)
        x = x if inputs is None else x + self._input(x, inputs)
        x = x if self.scalar is None else x * lax.stop_gradient(self.scalar[...]).astype(x.dtype)[None, None, :]
        return Carry(x, kept), memory, routing

    def _attend(self, x, context: Context, memory, kept):
        if self.delta is not None:
            places = {"activations": context.activations, "platform": context.platform}
            mixed, memory = self.delta(x, context.view.text, memory, **places)
            return mixed, memory, kept
        assert self.attention is not None
        return self.attention(x, context.view, memory, kept)

    def _feed(self, x, unnormed, context: Context) -> tuple[Float[Array, "B T D"], Routing | None]:
        """MLP, experts, or both; beside an MLP, experts have norms of their own and choose by the states themselves."""
        if self.experts is None:
            assert self.mlp is not None
            return self.mlp(x), None
        if self.mlp is None:
            return self.experts(x, weights=context.weights, activations=context.activations or context.rows)
        mixed, routing = self.experts(
            _behind(self.experts_norm, unnormed),
            router_input=unnormed,
            weights=context.weights,
            activations=context.activations or context.rows,
        )
        return _behind(self.mlp_inner_norm, self.mlp(x)) + _behind(self.experts_inner_norm, mixed), routing

    def _input(self, x: Float[Array, "B T D"], inputs: Float[Array, "B T P"]) -> Float[Array, "B T D"]:
        """What this layer takes of its own input of each token."""
        assert self.inputs_gate is not None and self.inputs_projection is not None and self.layer.mlp is not None
        act = ACTIVATIONS[self.layer.mlp.activation]
        return _behind(self.inputs_norm, self.inputs_projection(act(self.inputs_gate(x)) * inputs))


def _attention(spec: specs.Attention | specs.MLA | specs.GatedDelta, width: int, rngs: nnx.Rngs):
    match spec:
        case specs.Attention():
            return AttentionLayer(spec, width, rngs=rngs)
        case specs.MLA():
            return MLALayer(spec, width, rngs=rngs)
        case specs.GatedDelta():
            return None


def _before(norm: NormLayer | None, x: Float[Array, "B T D"], place: specs.Place) -> Float[Array, "B T D"]:
    """A branch's input; where norms stand on the sum, that is the sum before."""
    return x if norm is None or place == "residual" else norm(x)


def _behind(norm: NormLayer | None, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return x if norm is None else norm(x)


class RowTable(nnx.Module):
    """A matrix with a row for each token or position: an embedding, or a head that is not tied to it."""

    def __init__(self, rows: int, width: int, *, bias: bool = False, rngs: nnx.Rngs):
        """Normal rows."""
        self.embedding = normal(rngs, rows, width)
        self.bias = nnx.Param(jnp.zeros((rows,))) if bias else None


class Score(nnx.Module):
    """A scalar head: the score of a text is the hidden state of its last token times this."""

    def __init__(self, width: int):
        """Zeros, so that a new reward model prefers no text to another and its loss starts at ln 2."""
        self.kernel = nnx.Param(jnp.zeros((width, 1)))


class Ends(nnx.Module):
    """What stands before the first and after the last block."""

    def __init__(self, spec: DecoderSpec, *, rngs: nnx.Rngs):
        """Fresh embedding, norm and head: a scalar one, or one by vocabulary row unless it is tied."""
        wide, narrow, vocab = spec.width, spec.head_width, spec.vocab_size
        self.embed = RowTable(vocab, narrow, rngs=rngs)
        self.final_norm = NormLayer(spec.norm, wide) if spec.final_norm else None
        self.head = None if spec.tied or spec.scalar_head else RowTable(vocab, narrow, bias=spec.head_bias, rngs=rngs)
        self.score = Score(narrow) if spec.scalar_head else None
        self.embed_norm = NormLayer(spec.norm, wide) if spec.embed_norm else None
        self.positions = RowTable(spec.positions + spec.position_offset, wide, rngs=rngs) if spec.positions else None
        self.project_in = Dense(narrow, wide, bias=False, rngs=rngs) if narrow != wide else None
        self.project_out = Dense(wide, narrow, bias=False, rngs=rngs) if narrow != wide else None
        channels = sum(layer.inputs for layer in spec.layers)
        self.inputs = RowTable(spec.inputs_vocab, channels, rngs=rngs) if channels else None
        self.inputs_projection = Dense(wide, channels, bias=False, rngs=rngs) if channels else None
        self.inputs_norm = NormLayer(spec.norm, spec.layers[0].inputs) if channels else None
        self.spec = spec

    def first(
        self, tokens: Int[Array, "B T"], position: Int[Array, "B T"], split: Callable[..., TableSplit | None]
    ) -> Float[Array, "B T D"]:
        """What the first block sees; `split` says of a table's shape how it is looked up in."""
        table = self.embed.embedding[...]
        x = lookup(table, tokens, split(table.shape))
        x = x * jnp.asarray(self.spec.embed_scale, x.dtype) if self.spec.embed_scale != 1.0 else x
        x = x if self.project_in is None else self.project_in(x)
        if self.positions is not None:
            table = self.positions.embedding[...]
            columns = split(table.shape, vocabulary=False)
            x = x + lookup(table, position + self.spec.position_offset, columns)
        return _behind(self.embed_norm, x)

    def each(
        self, tokens: Int[Array, "B T"], x: Float[Array, "B T D"], split: Callable[..., TableSplit | None]
    ) -> Float[Array, "L B T P"] | None:
        """What each block is told of each token beside the states: `(norm(project(x)) + table[token]) / sqrt 2`."""
        if self.inputs is None or self.inputs_projection is None or self.inputs_norm is None:
            return None
        shape = (*tokens.shape, len(self.spec.layers), -1)
        own = (self.inputs_projection(x) * jnp.asarray(self.spec.width**-0.5, x.dtype)).reshape(shape)
        table = self.inputs.embedding[...]
        known = lookup(table, tokens, split(table.shape, vocabulary=False)).reshape(shape)
        known = known * jnp.asarray(known.shape[-1] ** 0.5, x.dtype)
        both = (self.inputs_norm(own) + known) * jnp.asarray(2**-0.5, x.dtype)
        return jnp.moveaxis(both, 2, 0)

    def last(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N"]:
        """What the head sees."""
        x = _behind(self.final_norm, x)
        return x if self.project_out is None else self.project_out(x)
