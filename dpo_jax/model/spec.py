"""What a decoder is, as data: one field for each thing on which two families disagree."""

import dataclasses
import functools
from typing import Literal, NamedTuple

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "xielu"]
Place = Literal["pre", "post", "sandwich", "residual", "parallel", "parallel2"]


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding: rotation `i` of a head turns by `position / theta ** (2 i / channels)` radians.

    `llama3` stretches slow rotations: wavelengths longer than `original_positions / low_frequency` are multiplied by
    `factor`, those shorter than `original_positions / high_frequency` are kept, and those between are blended.
    `linear` multiplies every wavelength by `factor`. `yarn` (arXiv:2309.00071) blends by the number of turns within
    the original length, from `beta_fast` (kept) to `beta_slow` (stretched). `longrope` (arXiv:2402.13753) divides each
    frequency by its entry of `short`, or of `long` where the text is longer than `original_positions`. `proportional`
    takes the exponents of the whole head, and turns its first `channels` only.
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3", "yarn", "longrope", "proportional"] = "default"
    factor: float = 1.0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_positions: int = 0
    channels: int | None = None
    """Channels of a head that turn, the first ones; None turns all."""
    interleaved: bool = False
    """Whether channel 2 i turns against 2 i + 1, and not channel i against i + channels / 2."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """Whether yarn's two bounds are rounded outwards to whole rotations."""
    magnitude: float = 1.0
    """What cosine and sine are multiplied by."""
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Norm:
    """A normalisation over the last axis: by the root of the mean square, or by mean and variance."""

    epsilon: float = 1e-5
    kind: Literal["rms", "layer"] = "rms"
    offset: float = 0.0
    """Added to the scale that is stored; 1 where a folder stores the scale less one."""
    scale: bool = True
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class HeadNorm:
    """How queries and keys are normalised: each head alone (by one scale, or its own), or all of them as one vector."""

    norm: Norm
    over: Literal["head", "each_head", "all_heads"] = "head"
    after_rope: bool = False


@dataclasses.dataclass(frozen=True)
class Attention:
    """Grouped-query attention."""

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None = Rope()
    window: int | None = None
    """A query sees keys with `0 <= distance < window`, in tokens."""
    qkv_bias: bool = False
    output_bias: bool = False
    head_norm: HeadNorm | None = None
    scale: float | None = None
    """Factor of `query . key`; None is `1 / sqrt(head_dim)`."""
    softcap: float | None = None
    """Scores become `softcap * tanh(scores / softcap)`."""
    sinks: bool = False
    """Whether each head has one further logit that takes part in the softmax and has no value (arXiv:2309.17453)."""
    alibi: float | None = None
    """Factor of the linear position biases (arXiv:2108.12409); None has none."""
    clip: float | None = None
    """Bound on the magnitude of projected queries, keys and values."""
    gated: bool = False
    """Whether the mixed values are multiplied by the sigmoid of a projection of the input."""
    value_is_key: bool = False
    """Whether there is no projection of values: they are the projected keys before norm and rotation."""
    value_norm: Norm | None = None
    temperature: tuple[float, int] | None = None
    """(b, n): queries are multiplied by `1 + b log(1 + floor(position / n))`."""
    keeps: str | None = None
    """Name under which later layers borrow this layer's keys and values."""
    borrows: str | None = None
    """Name of the keys and values that stand in for projections of this layer's own."""


@dataclasses.dataclass(frozen=True)
class MLA:
    """Multi-head latent attention (arXiv:2405.04434): keys and values come from one short vector for each token."""

    heads: int
    query_rank: int | None
    kv_rank: int
    plain_dim: int
    """Channels of a query or key without position; `rope_dim` more turn, and their key is the same for all heads."""
    rope_dim: int
    value_dim: int
    scale: float
    rope: Rope
    norm: Norm
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class GatedDelta:
    """Gated delta rule (arXiv:2412.06464): attention with a running state, behind a short causal convolution."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    """Tokens that the convolution sees, the current one included."""
    norm: Norm


@dataclasses.dataclass(frozen=True)
class MLP:
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))` where it is not gated."""

    width: int
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts: each token goes through the `chosen` of `count` gated MLPs that a router scores highest."""

    count: int
    chosen: int
    width: int
    activation: Activation = "silu"
    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = True
    """Whether the chosen experts' scores are divided by their sum."""
    scaling: float = 1.0
    """What they are multiplied by then."""
    groups: int = 1
    """Experts stand in this many groups, and only the `chosen_groups` with the best two experts take part."""
    chosen_groups: int = 1
    correction: bool = False
    """Whether a stored number is added to each score for the choice alone; no gradient moves it."""
    router_bias: bool = False
    router_norm: Norm | None = None
    """Norm before the router, without a scale; the router then has a scale for each channel and for each expert."""
    bias: bool = False
    limit: float | None = None
    """gpt-oss's unit: gates are cut at `limit` and ups at +-`limit`, and it is `(up + 1) gate sigmoid(slope gate)`."""
    slope: float = 1.702
    shared: MLP | None = None
    """An MLP that every token goes through as well."""
    shared_gate: bool = False
    """Whether its output is multiplied by the sigmoid of a projection of the input."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """One block. With both an MLP and experts their outputs are added, each behind a norm of its own."""

    mixer: Attention | MLA | GatedDelta
    mlp: MLP | None
    experts: Experts | None = None
    place: Place = "pre"
    """Norms stand before each branch, behind it, both, on the sum with what came in (`residual`), or attention and MLP
    see the same input (`parallel`), each through its own norm (`parallel2`)."""
    residual_scale: float = 1.0
    """What each branch is multiplied by before it is added."""
    inputs: int = 0
    """Channels of an input that each token has for this layer; 0 has none."""
    scalar: bool = False
    """Whether the block's output is multiplied by a stored number; no gradient moves it."""


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
    """A decoder: an embedding, layers, and a head."""

    vocab_size: int
    width: int
    layers: tuple[Layer, ...]
    norm: Norm
    tied: bool = False
    head_bias: bool = False
    final_norm: bool = True
    embed_width: int | None = None
    """Channels of embedding and head where these differ from the layers'; a projection stands at either end."""
    embed_scale: float = 1.0
    embed_norm: bool = False
    positions: int | None = None
    """Learned positions: texts can be no longer."""
    position_offset: int = 0
    """Rows of the table of positions before position 0."""
    inputs_vocab: int = 0
    """Rows of the table that gives each token its input for each layer; 0 has none."""
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    router_aux: float = 0.0
    """The family's own weight of the load-balancing loss of its experts; says nothing of what the model computes."""
    scalar_head: bool = False
    """Whether the model scores texts (a reward model) and has no language-model head, whatever `tied` says."""

    @property
    def head_width(self) -> int:
        """Channels of the states that the head reads."""
        return self.embed_width or self.width

    @property
    def experts(self) -> Experts | None:
        """The experts of the first layer that has any."""
        return next((layer.experts for layer in self.layers if layer.experts is not None), None)

    @property
    def short_texts(self) -> int | None:
        """Tokens up to which every text turns alike (longrope's original length); None where any text does."""
        mixers = {layer.mixer for layer in self.layers}
        ropes = [mixer.rope for mixer in mixers if not isinstance(mixer, GatedDelta) and mixer.rope is not None]
        return min((rope.original_positions for rope in ropes if rope.kind == "longrope"), default=None)

    def can_share_prompt(self, longest: int) -> bool:
        """Whether completions of texts of at most `longest` tokens may share one computed prompt.

        Not where a layer carries a running state, nor where rotations depend on how long the whole text is.
        """
        running = any(isinstance(layer.mixer, GatedDelta) for layer in self.layers)
        return not running and (self.short_texts is None or longest <= self.short_texts)


class Segment(NamedTuple):
    """Layers `start` and following: `kinds`, `repeats` times in a row. `first` is the number of its first stack.

    The weights of layer `start + r * len(kinds) + k` are entry `r` of stack `first + k`.
    """

    start: int
    kinds: tuple[Layer, ...]
    repeats: int
    first: int


@functools.lru_cache
def segments(layers: tuple[Layer, ...]) -> tuple[Segment, ...]:
    """The layers as repeated patterns, with as few kinds to compile as possible.

    [a a a a] is `a` four times; [a b b b] is `a`, then `b` three times; [s s f s s f s] is `s s f` twice, then `s`.
    """
    best: list[tuple[int, int, tuple[tuple[int, int, int], ...]]] = [(0, 0, ())]
    for stop in range(1, len(layers) + 1):
        options = []
        for start in range(stop):
            period = _period(layers[start:stop])
            cost, parts, found = best[start]
            options.append((cost + period, parts + 1, (*found, (start, period, (stop - start) // period))))
        best.append(min(options, key=lambda option: option[:2]))
    found, first = [], 0
    for start, period, repeats in best[-1][2]:
        found.append(Segment(start, layers[start : start + period], repeats, first))
        first += period
    return tuple(found)


def _period(layers: tuple[Layer, ...]) -> int:
    """The shortest pattern that these layers repeat a whole number of times."""
    size = len(layers)
    return next(p for p in range(1, size + 1) if size % p == 0 and layers[p:] == layers[: size - p])
