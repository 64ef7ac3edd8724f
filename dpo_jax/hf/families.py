"""What each family's config says about the decoder: one row of `FAMILIES` per `model_type`.

Most are llama with a difference or two, and their reader is that difference. A new one is a reader and a row.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dpo_jax.hf import names
from dpo_jax.hf import readers as read
from dpo_jax.hf.keys import Keys
from dpo_jax.hf.names import Naming
from dpo_jax.hf.readers import FULL, LINEAR, Each, attention, by_type, decoder, everywhere, experts, mlp, rms
from dpo_jax.model.spec import MLA, MLP, Attention, DecoderSpec, Experts, GatedDelta, HeadNorm, Layer, Norm, Place, Rope

# ---------------------------------------------------------------------------------------------- llama and its kin


def _llama(k: Keys, **fields: Any) -> DecoderSpec:
    """The baseline, with other fields of its attention."""
    return decoder(k, attention(k, **fields), mlp(k), rms(k))


def _ministral3(k: Keys) -> DecoderSpec:
    table = k.peek("rope_parameters") or {}
    strength = table.pop("llama_4_scaling_beta", None)
    hotter = None if strength is None else (float(strength), int(table["original_max_position_embeddings"]))
    return _llama(k, window=everywhere(k), temperature=hotter)


def _mixtral(k: Keys) -> DecoderSpec:
    fed = experts(k, "num_local_experts", "intermediate_size")
    return decoder(k, attention(k, window=everywhere(k)), fed, rms(k))


def _qwen2(k: Keys) -> DecoderSpec:
    each = by_type(k, used=k.flag("use_sliding_window"))
    return decoder(k, attention(k, qkv_bias=True), mlp(k), rms(k), each=each)


def _qwen2_moe(k: Keys) -> DecoderSpec:
    shared = MLP(k.size("shared_expert_intermediate_size"), read.activation(k))
    chosen = experts(k, normalised=k.flag("norm_topk_prob"), shared=shared, shared_gate=True)
    each = read.sparse(k, chosen, by_type(k, used=k.flag("use_sliding_window")))
    return decoder(k, attention(k, qkv_bias=k.flag("qkv_bias")), mlp(k), rms(k), each=each)


def _qwen3(k: Keys) -> DecoderSpec:
    norm, each = rms(k), by_type(k, used=k.flag("use_sliding_window"))
    return decoder(k, attention(k, head_norm=HeadNorm(norm)), mlp(k), norm, each=each)


def _qwen3_moe(k: Keys) -> DecoderSpec:
    k.rename({"num_local_experts": "num_experts"})
    norm, window = rms(k), everywhere(k)
    window = window if k.flag("use_sliding_window") else None
    chosen = experts(k, normalised=k.flag("norm_topk_prob"))
    each = read.sparse(k, chosen, lambda _, layer: layer)
    return decoder(k, attention(k, window=window, head_norm=HeadNorm(norm)), mlp(k), norm, each=each)


def _qwen3_5(k: Keys) -> DecoderSpec:
    norm, types, table = rms(k, offset=1.0), read.types_of(k, FULL, LINEAR), k.peek("rope_parameters") or {}
    for name in ("mrope_section", "mrope_interleaved"):  # of the three positions of a token, which are one for text
        table.pop(name, None)
    sizes = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    plain = dataclasses.replace(norm, offset=0.0)
    delta = GatedDelta(*(k.size(f"linear_{name}") for name in sizes), norm=plain)
    if delta.value_heads % delta.key_heads:
        raise k.refuse("linear_num_value_heads", delta.value_heads, f"must be a multiple of {delta.key_heads}")
    k.require({"attn_output_gate": True, "mamba_ssm_dtype": "float32", "mlp_only_layers": []})

    def each(i: int, layer: Layer) -> Layer:
        return dataclasses.replace(layer, mixer=delta) if types[i] == LINEAR else layer

    full = attention(k, turns="partial", head_norm=HeadNorm(norm), gated=True)
    return decoder(k, full, mlp(k), norm, each=each)


def _smollm3(k: Keys) -> DecoderSpec:
    turns = k.entries("no_rope_layers", k.peek("num_hidden_layers"), {0: 0, 1: 1})
    windowed = by_type(k, used=k.flag("use_sliding_window"))

    def each(i: int, layer: Layer) -> Layer:
        return read.mixed(windowed(i, layer), rope=None) if turns and not turns[i] else windowed(i, layer)

    return decoder(k, attention(k), mlp(k), rms(k), each=each)


def _granite(k: Keys) -> DecoderSpec:
    layer, embed = {"residual_scale": k.positive("residual_multiplier")}, k.positive("embedding_multiplier")
    scale, logits = k.positive("attention_multiplier"), 1.0 / k.positive("logits_scaling")
    mixer = attention(k, scale=scale)
    return decoder(k, mixer, mlp(k), rms(k), layer=layer, embed_scale=embed, logit_scale=logits)


def _ernie(k: Keys) -> DecoderSpec:
    bias = k.flag("use_bias")
    mixer = attention(k, turns="interleaved", qkv_bias=bias, output_bias=bias)
    return decoder(k, mixer, mlp(k, bias=bias), rms(k))


def _apertus(k: Keys) -> DecoderSpec:
    norm = rms(k)
    return decoder(k, attention(k, head_norm=HeadNorm(norm)), mlp(k, gated=False), norm)


def _hunyuan(k: Keys) -> DecoderSpec:
    norm, table = rms(k), k.peek("rope_parameters") or {}
    alpha = table.pop("alpha", None)
    if table.get("rope_type") == "dynamic" and alpha:  # a longer base, whatever the text's length
        size = k.peek("head_dim") or k.peek("hidden_size") // k.peek("num_attention_heads")
        table |= {"rope_type": "default", "rope_theta": table["rope_theta"] * alpha ** (size / (size - 2))}
        for unused in ("type", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "factor"):
            table.pop(unused, None)
    return decoder(k, attention(k, head_norm=HeadNorm(norm, after_rope=True)), mlp(k), norm)


def _glm(k: Keys, place: Place = "pre") -> DecoderSpec:
    mixer = attention(k, turns="interleaved partial", output_bias=False)
    return decoder(k, mixer, mlp(k), rms(k), layer={"place": place})


def _olmo2(k: Keys) -> DecoderSpec:
    norm = rms(k)
    mixer = attention(k, head_norm=HeadNorm(norm, "all_heads"))
    return decoder(k, mixer, mlp(k), norm, layer={"place": "post"})


def _olmo3(k: Keys) -> DecoderSpec:
    norm, types, windowed = rms(k), k.peek("layer_types"), by_type(k)
    mixer = attention(k, head_norm=HeadNorm(norm, "all_heads"), rope=None)
    each = read.turning(read.ropes(k, dict.fromkeys(sorted(set(types)), mixer.head_dim)), types, windowed)
    return decoder(k, mixer, mlp(k), norm, layer={"place": "post"}, each=each)


def _olmoe(k: Keys) -> DecoderSpec:
    fed = experts(k, width="intermediate_size", normalised=k.flag("norm_topk_prob"))
    norm, clip = rms(k), k.perhaps("clip_qkv")
    return decoder(k, attention(k, head_norm=HeadNorm(norm, "all_heads"), clip=clip), fed, norm)


def _exaone4(k: Keys) -> DecoderSpec:
    norm, each = rms(k), by_type(k, nope=True)
    return decoder(k, attention(k, head_norm=HeadNorm(norm)), mlp(k), norm, layer={"place": "post"}, each=each)


def _gpt_oss(k: Keys) -> DecoderSpec:
    unit = {"limit": k.positive("swiglu_limit", 7.0), "slope": k.positive("swiglu_alpha", 1.702)}
    chosen = experts(k, "num_local_experts", "intermediate_size", router_bias=True, bias=True, **unit)
    return decoder(k, attention(k, sinks=True), chosen, rms(k), each=by_type(k))


def _deepseek_v3(k: Keys) -> DecoderSpec:
    norm, dense, latent = rms(k), k.count("first_k_dense_replace"), _latent(k)
    wide, shared = mlp(k), k.count("n_shared_experts")
    chosen = experts(
        k,
        "n_routed_experts",
        scores="sigmoid",
        normalised=k.flag("norm_topk_prob"),
        scaling=k.positive("routed_scaling_factor"),
        groups=k.size("n_group"),
        chosen_groups=k.size("topk_group"),
        correction=True,
        shared=MLP(k.peek("moe_intermediate_size") * shared, wide.activation) if shared else None,
    )
    if chosen.count % chosen.groups or chosen.chosen_groups > chosen.groups:
        raise k.refuse("n_group", chosen.groups, f"must divide the {chosen.count} experts, and topk_group be no more")

    def each(i: int, layer: Layer) -> Layer:
        one = dataclasses.replace(layer, mixer=latent)
        return one if i < dense else dataclasses.replace(one, mlp=None, experts=chosen)

    return decoder(k, Attention(latent.heads, latent.heads, latent.value_dim), wide, norm, each=each)


def _latent(k: Keys) -> MLA:
    heads, plain, turning_dim = (k.size(n) for n in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim"))
    k.agree({"num_key_value_heads": "num_attention_heads"})
    for name in ("hidden_size", "head_dim", "num_nextn_predict_layers"):
        k.take(name)  # what other keys say too, or what is not computed
    turns = read.rope(k, turning_dim, interleaved=k.flag("rope_interleave", True))
    stretched, table = turns.factor if turns.kind == "yarn" else 1.0, k.peek("rope_parameters")
    return MLA(
        heads,
        k.size("q_lora_rank") if k.peek("q_lora_rank") else k.take("q_lora_rank"),
        k.size("kv_lora_rank"),
        plain,
        turning_dim,
        k.size("v_head_dim"),
        scale=(plain + turning_dim) ** -0.5 * read.grown(stretched, float(table.get("mscale_all_dim") or 0.0)) ** 2,
        rope=turns,
        norm=Norm(1e-6),
        bias=k.flag("attention_bias"),
    )


# ---------------------------------------------------------------------------------------------- gemma


def _gemma_fields(k: Keys, **layer: Any) -> dict[str, Any]:
    k.rename({"hidden_activation": "hidden_act"})
    scale, cap = math.sqrt(k.peek("hidden_size")), k.perhaps("final_logit_softcapping")
    return {"layer": {"place": "sandwich", **layer}, "embed_scale": scale, "logit_softcap": cap}


def _gemma2(k: Keys) -> DecoderSpec:
    norm, fields = rms(k, offset=1.0), _gemma_fields(k)
    scale, cap = k.positive("query_pre_attn_scalar") ** -0.5, k.perhaps("attn_logit_softcapping")
    return decoder(k, attention(k, scale=scale, softcap=cap), mlp(k), norm, each=by_type(k), **fields)


def _gemma3(k: Keys) -> DecoderSpec:
    norm, fields, types = rms(k, offset=1.0), _gemma_fields(k), k.peek("layer_types")
    scale, windowed = k.positive("query_pre_attn_scalar") ** -0.5, by_type(k)
    k.take("attn_logit_softcapping")  # transformers' Gemma 3 has it, and does nothing with it
    mixer = attention(k, scale=scale, head_norm=HeadNorm(norm), rope=None)
    each = read.turning(read.ropes(k, dict.fromkeys(sorted(set(types)), mixer.head_dim)), types, windowed)
    return decoder(k, mixer, mlp(k), norm, each=each, **fields)


def _gemma4(k: Keys) -> DecoderSpec:
    norm, types, own, windowed = rms(k), k.peek("layer_types"), k.take("per_layer_config", {}), by_type(k)
    inputs, vocab = k.count("hidden_size_per_layer_input"), k.count("vocab_size_per_layer_input")
    same, wider = k.flag("attention_k_eq_v"), k.flag("use_double_wide_mlp")
    fields = _gemma_fields(k, inputs=inputs, scalar=True)
    fields["layer"] |= {"experts": _gemma4_experts(k, norm)}
    plain = dataclasses.replace(norm, scale=False)
    mixer = attention(k, scale=1.0, head_norm=HeadNorm(norm), value_norm=plain, rope=None)
    fed, borrowing = mlp(k), len(types) - k.count("num_kv_shared_layers")
    heads = [_own_heads(k, own, i, mixer) for i in range(len(types))]
    turns = read.ropes(k, {kind: heads[types.index(kind)]["head_dim"] for kind in sorted(set(types))})
    if len(types) > borrowing and set(types) - set(types[:borrowing]):
        raise k.refuse("num_kv_shared_layers", len(types) - borrowing, "no layer before has keys of each type to lend")

    def each(i: int, layer: Layer) -> Layer:
        kind, borrows = types[i], i >= borrowing
        lends = borrowing < len(types) and not borrows and kind not in types[i + 1 : borrowing]
        sharing = {"borrows": kind if borrows else None, "keeps": kind if lends else None}
        layer = read.mixed(
            windowed(i, layer), rope=turns[kind], value_is_key=same and kind == FULL, **heads[i], **sharing
        )
        wide = dataclasses.replace(fed, width=2 * fed.width)
        return dataclasses.replace(layer, mlp=wide) if borrows and wider else layer

    return decoder(k, mixer, fed, norm, each=each, inputs_vocab=vocab if inputs else 0, **fields)


def _own_heads(k: Keys, own: Mapping[str | int, Any], i: int, mixer: Attention) -> dict[str, int]:
    """Size and number of heads of a layer that has its own."""
    table = dict(own.get(str(i), own.get(i, {})))
    heads = {"head_dim": table.pop("head_dim", mixer.head_dim)}
    heads["kv_heads"] = table.pop("num_key_value_heads", mixer.kv_heads)
    if table:
        raise k.refuse("per_layer_config", table, "only head_dim and num_key_value_heads may differ by layer")
    return heads


def _gemma4_experts(k: Keys, norm: Norm) -> Experts | None:
    k.rename({"top_k_experts": "num_experts_per_tok"})
    if k.flag("enable_moe_block"):
        return experts(k, router_norm=dataclasses.replace(norm, scale=False))
    k.require(dict.fromkeys(("num_experts", "num_experts_per_tok", "moe_intermediate_size")))
    return None


# ---------------------------------------------------------------------------------------------- the others


def _phi(k: Keys) -> DecoderSpec:
    norm = read.layer_norm(k)
    head_norm = HeadNorm(norm) if k.flag("qk_layernorm") else None
    mixer = attention(k, turns="partial", qkv_bias=True, output_bias=True, head_norm=head_norm)
    fed = mlp(k, gated=False, bias=True)
    return decoder(k, mixer, fed, norm, layer={"place": "parallel"}, head_bias=True)


def _gpt_neox(k: Keys) -> DecoderSpec:
    k.take("num_key_value_heads")  # transformers' GPT-NeoX does nothing with it
    mixer = attention(k, turns="partial", kv_heads=k.peek("num_attention_heads"))
    place = "parallel2" if k.flag("use_parallel_residual", True) else "pre"
    return decoder(k, mixer, mlp(k, gated=False, bias=True), read.layer_norm(k), layer={"place": place})


GPT = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
GPT |= {"n_inner": "intermediate_size", "activation_function": "hidden_act"}


def _gpt2(k: Keys, *, multi_query: bool = False) -> DecoderSpec:
    k.rename(GPT)
    heads = 1 if multi_query else k.peek("num_attention_heads")
    mixer = attention(k, turns="none", kv_heads=heads, qkv_bias=True, output_bias=True)
    fed = mlp(k, width=4 * k.peek("hidden_size"), gated=False, bias=True)
    return decoder(k, mixer, fed, read.layer_norm(k, "layer_norm_epsilon"), positions=k.size("n_positions"))


def _gpt_bigcode(k: Keys) -> DecoderSpec:
    k.take("num_key_value_heads")  # of which multi_query says the same
    return _gpt2(k, multi_query=k.flag("multi_query", True))


def _gptj(k: Keys) -> DecoderSpec:
    k.rename(GPT)
    size = k.peek("hidden_size") // k.peek("num_attention_heads")
    turns = Rope(channels=k.size("rotary_dim", size), interleaved=True)
    fed = mlp(k, width=4 * k.peek("hidden_size"), gated=False, bias=True)
    norm, layer = read.layer_norm(k, "layer_norm_epsilon"), {"place": "parallel"}
    return decoder(k, attention(k, rope=turns), fed, norm, layer=layer, head_bias=True)


def _opt(k: Keys) -> DecoderSpec:
    k.rename({"ffn_dim": "intermediate_size", "activation_function": "hidden_act"})
    k.require({"layer_norm_elementwise_affine": True})
    before, bias = k.flag("do_layer_norm_before", True), k.flag("enable_bias", True)
    final = not k.flag("_remove_final_layer_norm") and before
    narrow = k.size("word_embed_proj_dim", k.peek("hidden_size"))
    mixer = attention(k, turns="none", qkv_bias=bias, output_bias=bias)
    fields = {"embed_width": None if narrow == k.peek("hidden_size") else narrow, "final_norm": final}
    fields |= {"positions": k.size("max_position_embeddings"), "position_offset": 2}
    layer, norm = {"place": "pre" if before else "residual"}, Norm(1e-5, "layer", bias=True)
    return decoder(k, mixer, mlp(k, gated=False, bias=bias), norm, layer=layer, **fields)


def _falcon(k: Keys) -> DecoderSpec:
    k.require({"alibi": False})  # transformers rounds Falcon's biases to bfloat16 by absolute position
    k.rename({"ffn_hidden_size": "intermediate_size", "activation": "hidden_act"})
    new, one, bias = k.flag("new_decoder_architecture"), k.flag("multi_query"), k.flag("bias")
    k.require({"parallel_attn": True} if new else {})
    k.agree({} if new or one else {"num_kv_heads": "num_attention_heads"})
    parallel, norms = k.flag("parallel_attn"), k.size("num_ln_in_parallel_attn", 2)
    grouped = k.size("num_kv_heads", k.peek("num_attention_heads"))
    place = "parallel2" if new and norms == 2 else "parallel" if new or parallel else "pre"
    mixer = attention(k, kv_heads=1 if one and not new else grouped, qkv_bias=bias, output_bias=bias)
    norm = read.layer_norm(k, "layer_norm_epsilon")
    return decoder(k, mixer, mlp(k, gated=False, bias=bias), norm, layer={"place": place})


def _bloom(k: Keys) -> DecoderSpec:
    k.rename({"n_layer": "num_hidden_layers", "n_head": "num_attention_heads"})
    k.require({"apply_residual_connection_post_layernorm": False})
    mixer = attention(k, turns="none", alibi=1.0, qkv_bias=True, output_bias=True)
    fed = MLP(4 * k.peek("hidden_size"), "gelu_tanh", gated=False, bias=True)
    return decoder(k, mixer, fed, read.layer_norm(k, "layer_norm_epsilon"), embed_norm=True)


def _cohere(k: Keys, each: Each | None = None) -> DecoderSpec:
    norm = read.layer_norm(k, bias=False)
    mixer = attention(k, turns="interleaved", head_norm=HeadNorm(norm, "each_head") if k.flag("use_qk_norm") else None)
    scale, layer = k.positive("logit_scale"), {"place": "parallel"}
    return decoder(k, mixer, mlp(k), norm, layer=layer, each=each, logit_scale=scale)


def _starcoder2(k: Keys) -> DecoderSpec:
    bias = k.flag("use_bias", True)
    mixer = attention(k, window=everywhere(k), qkv_bias=bias, output_bias=bias)
    return decoder(k, mixer, mlp(k, gated=False, bias=bias), read.layer_norm(k, "norm_epsilon"))


def _stablelm(k: Keys) -> DecoderSpec:
    norm, place = read.layer_norm(k), "parallel" if k.flag("use_parallel_residual") else "pre"
    head_norm = HeadNorm(dataclasses.replace(norm, bias=False), "each_head") if k.flag("qk_layernorm") else None
    mixer = attention(k, turns="partial", qkv_bias=k.flag("use_qkv_bias"), head_norm=head_norm)
    return decoder(k, mixer, mlp(k), norm, layer={"place": place})


# ---------------------------------------------------------------------------------------------- the table


class Family(NamedTuple):
    """How a family's config is read, and how it names its tensors."""

    read: Callable[[Keys], DecoderSpec]
    names: Naming | Callable[[DecoderSpec], Naming] = names.LLAMA
    ignored: str = ""
    """Pattern of tensors that transformers' model of the family has no use for."""

    def naming(self, spec: DecoderSpec) -> Naming:
        """The names of this decoder's tensors."""
        return self.names if isinstance(self.names, Naming) else self.names(spec)


def _falcon_names(spec: DecoderSpec) -> Naming:
    return names.FALCON_TWO_NORMS if spec.layers[0].place == "parallel2" else names.FALCON


def _deepseek_names(spec: DecoderSpec) -> Naming:
    mixer = spec.layers[0].mixer
    return names.DEEPSEEK if isinstance(mixer, MLA) and mixer.query_rank else names.DEEPSEEK_FULL_RANK


MASKS = r"(.*\.)?attn\.(bias|masked_bias)"
FAMILIES: dict[str, Family] = {
    "apertus": Family(_apertus, names.APERTUS),
    "arcee": Family(lambda k: decoder(k, attention(k), mlp(k, gated=False), rms(k))),
    "bloom": Family(_bloom, names.BLOOM),
    "cohere": Family(_cohere),
    "cohere2": Family(lambda k: _cohere(k, by_type(k, nope=True))),
    "deepseek_v3": Family(_deepseek_v3, _deepseek_names, r"model\.layers\.61\..*"),
    "ernie4_5": Family(_ernie),
    "exaone4": Family(_exaone4, names.OLMO2),
    "falcon": Family(_falcon, _falcon_names),
    "gemma": Family(
        lambda k: decoder(k, attention(k), mlp(k), rms(k, offset=1.0), embed_scale=math.sqrt(k.peek("hidden_size")))
    ),
    "gemma2": Family(_gemma2, names.GEMMA2),
    "gemma3_text": Family(_gemma3, names.GEMMA2),
    "gemma4_text": Family(_gemma4, names.GEMMA4),
    "glm": Family(_glm, names.GLM),
    "glm4": Family(lambda k: _glm(k, "sandwich"), names.GLM4),
    "gpt2": Family(_gpt2, names.GPT2, MASKS),
    "gpt_bigcode": Family(_gpt_bigcode, names.GPT_BIGCODE, MASKS),
    "gpt_neox": Family(_gpt_neox, names.GPT_NEOX, r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"),
    "gpt_oss": Family(_gpt_oss, names.GPT_OSS),
    "gptj": Family(_gptj, names.GPTJ, MASKS),
    "granite": Family(_granite),
    "helium": Family(lambda k: _llama(k, turns="interleaved", output_bias=False)),
    "hunyuan_v1_dense": Family(_hunyuan, names.HUNYUAN),
    "llama": Family(_llama),
    "ministral": Family(lambda k: decoder(k, attention(k), mlp(k), rms(k), each=by_type(k))),
    "ministral3": Family(_ministral3),
    "mistral": Family(lambda k: _llama(k, window=everywhere(k))),
    "mixtral": Family(_mixtral, names.MIXTRAL),
    "nemotron": Family(
        lambda k: decoder(
            k, attention(k, turns="partial"), mlp(k, gated=False), read.layer_norm(k, "norm_eps", offset=1.0)
        )
    ),
    "olmo": Family(
        lambda k: decoder(k, attention(k, clip=k.perhaps("clip_qkv")), mlp(k), Norm(1e-5, "layer", scale=False))
    ),
    "olmo2": Family(_olmo2, names.OLMO2),
    "olmo3": Family(_olmo3, names.OLMO2),
    "olmoe": Family(_olmoe),
    "opt": Family(_opt, names.OPT),
    "phi": Family(_phi, names.PHI),
    "phi3": Family(lambda k: _llama(k, turns="partial", window=everywhere(k)), names.PHI3),
    "qwen2": Family(_qwen2),
    "qwen2_moe": Family(_qwen2_moe, names.QWEN2_MOE),
    "qwen3": Family(_qwen3),
    "qwen3_5_text": Family(_qwen3_5, names.QWEN3_5, r"mtp\..*"),
    "qwen3_moe": Family(_qwen3_moe),
    "seed_oss": Family(lambda k: _llama(k, output_bias=k.flag("attention_out_bias"))),
    "smollm3": Family(_smollm3),
    "stablelm": Family(_stablelm, names.STABLELM),
    "starcoder2": Family(_starcoder2, names.STARCODER2),
}
"""Families by `model_type`."""
