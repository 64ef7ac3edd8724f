"""Readers that the families share: of rotations, of attention, of MLPs and experts, and of whole decoders."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpo_jax.hf.keys import Keys
from dpo_jax.model.spec import MLP, Attention, DecoderSpec, Experts, Layer, Norm, Rope

Each = Callable[[int, Layer], Layer]
"""A layer by its number, from the layer that all have in common."""
TANH = dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_tanh")
ACTIVATIONS = {**{name: name for name in ("silu", "gelu", "relu", "relu2", "xielu")}, "swish": "silu", **TANH}
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"

# ---------------------------------------------------------------------------------------------- rotations


def rope(
    k: Keys, head_dim: int, *, interleaved: bool = False, partial: bool = False, table: Keys | None = None
) -> Rope:
    """What `rope_parameters`, or one table of it, says of heads of this size; `partial` where a part may turn.

    Of a default table for one type of layers transformers takes no part, whatever it says.
    """
    by_type, table = table is not None, k.part("rope_parameters") if table is None else table
    kind = table.take("rope_type", "default")
    partial = partial and not (by_type and kind == "default")
    table.require({"type": kind} if partial else {"type": kind, "partial_rotary_factor": 1.0})
    share = table.positive("partial_rotary_factor", (k.perhaps("partial_rotary_factor") if partial else None) or 1.0)
    channels = int(head_dim * share)
    if share > 1 or channels < 2 or channels % 2:
        why = f"of the {head_dim} channels of a head an even number must turn"
        raise table.refuse("partial_rotary_factor", share, why)
    common = Rope(table.positive("rope_theta"), channels=channels, interleaved=interleaved)
    found = dataclasses.replace(common, kind=kind, **_scaling(kind, table, k))
    table.finish(frozenset({"original_max_position_embeddings", "max_position_embeddings", "factor"}))
    return found


def _scaling(kind: str, table: Keys, k: Keys) -> dict[str, Any]:
    """Fields of a rotation of this kind, from its table and the whole config."""
    match kind:
        case "default":
            table.require({"factor": 1.0})
            return {}
        case "linear" | "proportional":
            return {"factor": table.positive("factor", None if kind == "linear" else 1.0)}
        case "llama3":
            return _llama3(table)
        case "yarn":
            return _yarn(table, k)
        case "longrope":
            return _longrope(table, k)
    kinds = "default, linear, llama3, yarn, longrope, proportional"
    raise table.refuse("rope_type", kind, f"not supported; supported: {kinds}")


def _llama3(table: Keys) -> dict[str, Any]:
    low, high = table.positive("low_freq_factor"), table.positive("high_freq_factor")
    if high <= low:
        raise table.refuse("high_freq_factor", high, "must be above low_freq_factor")
    original, factor = table.size("original_max_position_embeddings"), table.positive("factor")
    return {"factor": factor, "low_frequency": low, "high_frequency": high, "original_positions": original}


def _yarn(table: Keys, k: Keys) -> dict[str, Any]:
    original = table.size("original_max_position_embeddings")
    factor = table.perhaps("factor") or k.peek("max_position_embeddings") / original
    one, all_dim = table.perhaps("mscale"), table.perhaps("mscale_all_dim")
    magnitude = grown(factor, one) / grown(factor, all_dim) if one and all_dim else grown(factor)
    return {
        "factor": factor,
        "original_positions": original,
        "beta_fast": table.positive("beta_fast", 32.0),
        "beta_slow": table.positive("beta_slow", 1.0),
        "truncate": table.flag("truncate", True),
        "magnitude": table.perhaps("attention_factor") or magnitude,
    }


def grown(factor: float, strength: float = 1.0) -> float:
    """YaRN's growth of scores with the stretch (arXiv:2309.00071, equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * strength * math.log(factor) + 1.0


def _longrope(table: Keys, k: Keys) -> dict[str, Any]:
    original = table.size("original_max_position_embeddings")
    factor = table.perhaps("factor") or k.peek("max_position_embeddings") / original
    magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short, long = (tuple(map(float, table.take(name, []))) for name in ("short_factor", "long_factor"))
    magnitude = table.perhaps("attention_factor") or magnitude
    return {"factor": factor, "original_positions": original, "magnitude": magnitude, "short": short, "long": long}


def ropes(k: Keys, head_dims: Mapping[str, int]) -> dict[str, Rope]:
    """A rotation for each type of layer, where `rope_parameters` has a table for each."""
    tables = k.part("rope_parameters")
    found = {kind: rope(k, size, partial=True, table=tables.part(kind)) for kind, size in head_dims.items()}
    tables.finish()
    return found


# ---------------------------------------------------------------------------------------------- parts of a layer


def rms(k: Keys, **fields: Any) -> Norm:
    """A norm by the root of the mean square."""
    return Norm(k.positive("rms_norm_eps"), **fields)


def layer_norm(k: Keys, key: str = "layer_norm_eps", **fields: Any) -> Norm:
    """A norm by mean and variance, with a bias if not said otherwise."""
    return Norm(k.positive(key), kind="layer", **{"bias": True, **fields})


def activation(k: Keys) -> Any:
    """The unit between two matrices."""
    k.take("hidden_act")
    value = k.peek("hidden_act")
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise k.refuse("hidden_act", value, f"not supported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def mlp(k: Keys, *, width: int | None = None, **fields: Any) -> MLP:
    """The MLP; biases where `mlp_bias` is true."""
    bias = fields.pop("bias", None)
    return MLP(
        k.size("intermediate_size", width), activation(k), bias=k.flag("mlp_bias") if bias is None else bias, **fields
    )


def attention(k: Keys, *, turns: str = "", **fields: Any) -> Attention:
    """Attention; biases of all projections where `attention_bias` is true.

    `turns` says how heads rotate beside what the config says: "interleaved", "partial", both, or "none".
    """
    width, heads = k.size("hidden_size"), k.size("num_attention_heads")
    kv_heads = fields.pop("kv_heads", None) or k.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise k.refuse("num_key_value_heads", kv_heads, f"must divide num_attention_heads = {heads}")
    head_dim = k.size("head_dim", width // heads)
    if "rope" not in fields:
        interleaved, partial = "interleaved" in turns, "partial" in turns
        fields["rope"] = None if turns == "none" else rope(k, head_dim, interleaved=interleaved, partial=partial)
    bias = k.flag("attention_bias")
    return Attention(heads, kv_heads, head_dim, **{"qkv_bias": bias, "output_bias": bias, **fields})


def experts(k: Keys, count: str = "num_experts", width: str = "moe_intermediate_size", **fields: Any) -> Experts:
    """Experts in place of an MLP, under the config's names for their number and width."""
    number, chosen = k.size(count), k.size("num_experts_per_tok")
    if chosen > number:
        raise k.refuse("num_experts_per_tok", chosen, f"there are {number} experts")
    return Experts(number, chosen, k.size(width), activation(k), **fields)


# ---------------------------------------------------------------------------------------------- layers that differ


def mixed(layer: Layer, **fields: Any) -> Layer:
    """The layer with other fields of its attention."""
    return dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, **fields))


def everywhere(k: Keys) -> int | None:
    """A window that all layers have, or none has."""
    return k.take("sliding_window") if k.peek("sliding_window") is None else k.size("sliding_window")


def types_of(k: Keys, *allowed: str) -> tuple[str, ...]:
    """Types of the layers; () where the config has none."""
    return k.entries("layer_types", k.peek("num_hidden_layers"), dict.fromkeys(allowed or (FULL, SLIDING)))


def by_type(k: Keys, *, used: bool = True, nope: bool = False) -> Each:
    """A window for layers of type sliding; with `nope` the others have no rotation where the config has a window."""
    types, still = types_of(k), nope and k.peek("sliding_window") is not None
    sliding = SLIDING in types
    if sliding and not used:
        raise k.refuse("layer_types", SLIDING, "not supported while use_sliding_window is false")
    window = k.size("sliding_window") if sliding else k.take("sliding_window")

    def each(i: int, layer: Layer) -> Layer:
        slides = sliding and types[i] == SLIDING
        return mixed(layer, **({"window": window} if slides else {"rope": None} if still else {}))

    return each


def turning(found: Mapping[str, Rope], types: Sequence[str], then: Each) -> Each:
    """Each layer with the rotation of its type."""
    return lambda i, layer: mixed(then(i, layer), rope=found[types[i]])


def sparse(k: Keys, found: Experts, then: Each) -> Each:
    """Experts in place of the MLP in every `decoder_sparse_step`-th layer but those of `mlp_only_layers`."""
    dense, step = k.take("mlp_only_layers", []), k.size("decoder_sparse_step", 1)

    def each(i: int, layer: Layer) -> Layer:
        has = i not in dense and (i + 1) % step == 0
        return then(i, dataclasses.replace(layer, mlp=None, experts=found) if has else layer)

    return each


def decoder(
    k: Keys,
    mixer: Attention,
    fed: MLP | Experts,
    norm: Norm,
    *,
    layer: Mapping[str, Any] | None = None,
    each: Each | None = None,
    **fields: Any,
) -> DecoderSpec:
    """Layers of one kind, each changed by `each`; `layer` are fields of all, `fields` those of the whole."""
    dense, chosen = (fed, None) if isinstance(fed, MLP) else (None, fed)
    layers = (Layer(mixer, dense, **{"experts": chosen, **(layer or {})}),) * k.size("num_hidden_layers")
    layers = layers if each is None else tuple(each(i, one) for i, one in enumerate(layers))
    width, tied = k.peek("hidden_size"), k.flag("tie_word_embeddings")
    fields["router_aux"] = k.perhaps("router_aux_loss_coef") or 0.0
    return DecoderSpec(k.size("vocab_size"), width, layers, norm, tied=tied, **fields)
