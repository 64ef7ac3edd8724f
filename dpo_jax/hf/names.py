"""How families name their tensors: one table for each naming scheme, read both ways by `mapping`.

A key is a module of the parameter tree, or one leaf of it; `*` stands for the stack of blocks. A value is the folder's
name for it, in which `~` stands for the layer's module, `{i}` for the layer's number and `{e}` for a number on the
leaf's next axis (an expert, or a head). Keys joined by `+` are leaves that the folder holds in one tensor. Rows for
leaves that a decoder does not have are not used.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

Parts = Literal["whole", "heads", "kv_heads", "channels"]


class At(NamedTuple):
    """A tensor's name, and how it differs from the plain ones."""

    name: str
    turned: bool = True
    """Whether the folder has a matrix as [outputs, inputs], as PyTorch's linear layers do."""
    parts: Parts = "whole"
    """How several leaves share the outputs of one tensor: one whole after another, or in turn by head, by key-value
    head (the queries of its group, its key, its value) or by channel."""
    column: bool = False
    """Whether the folder has an axis of size one after the first."""


class Naming(NamedTuple):
    """One scheme: the name of a layer's module, and the names of modules and leaves."""

    layer: str
    names: Mapping[str, str | At]


QKV = "*/attention/query+*/attention/key+*/attention/value"
GATE_UP = "*/mlp/gate+*/mlp/up"
EXPERTS_GATE_UP = "*/experts/gate/kernel+*/experts/up/kernel"


def _under(key: str, name: str, /, **names: str) -> dict[str, str]:
    """Rows for modules that stand together: `key/KEYWORD` is `name.VALUE`."""
    return {f"{key}/{module}": f"{name}.{value}" for module, value in names.items()}


def _with(naming: Naming, *changes: Mapping[str, str | At], layer: str | None = None) -> Naming:
    """The scheme with these rows in place of its own."""
    names = dict(naming.names)
    for change in changes:
        names |= change
    return Naming(layer or naming.layer, names)


LLAMA = Naming(
    "model.layers.{i}",
    {
        "embed": "model.embed_tokens",
        "*/attention_norm": "~.input_layernorm",
        **_under("*/attention", "~.self_attn", query="q_proj", key="k_proj", value="v_proj", output="o_proj"),
        **_under("*/attention", "~.self_attn", query_norm="q_norm", key_norm="k_norm"),
        "*/mlp_norm": "~.post_attention_layernorm",
        **_under("*/mlp", "~.mlp", gate="gate_proj", up="up_proj", down="down_proj"),
        "*/experts/router": "~.mlp.gate",
        **_under("*/experts", "~.mlp.experts.{e}", gate="gate_proj", up="up_proj", down="down_proj"),
        "final_norm": "model.norm",
        "head": "lm_head",
        "score": "score",
    },
)
"""Names of llama and of every family that follows it."""

MIXTRAL = _with(
    LLAMA,
    {"*/experts/router": "~.block_sparse_moe.gate"},
    _under("*/experts", "~.block_sparse_moe.experts.{e}", gate="w1", up="w3", down="w2"),
)
QWEN2_MOE = _with(
    LLAMA,
    _under("*/experts/shared", "~.mlp.shared_expert", gate="gate_proj", up="up_proj", down="down_proj"),
    {"*/experts/shared_gate": "~.mlp.shared_expert_gate"},
)
QWEN3_5 = _with(
    LLAMA,
    {"*/attention/query+*/attention/gate": At("~.self_attn.q_proj", parts="heads")},
    _under("*/delta", "~.linear_attn", mixed="in_proj_qkv", gate="in_proj_z", strength="in_proj_b", decay="in_proj_a"),
    _under("*/delta", "~.linear_attn", decay_rate="A_log", decay_bias="dt_bias", norm="norm", output="out_proj"),
    {"*/delta/conv/kernel": At("~.linear_attn.conv1d.weight", turned=False, column=True)},
)
DEEPSEEK_FULL_RANK = _with(
    LLAMA,
    _under("*/attention", "~.self_attn", latent="kv_a_proj_with_mqa", latent_norm="kv_a_layernorm"),
    _under("*/attention", "~.self_attn", key_value="kv_b_proj"),
    {"*/experts/router/correction": "~.mlp.gate.e_score_correction_bias"},
    _under("*/experts/shared", "~.mlp.shared_experts", gate="gate_proj", up="up_proj", down="down_proj"),
)
DEEPSEEK = _with(
    DEEPSEEK_FULL_RANK,
    _under("*/attention", "~.self_attn", query_down="q_a_proj", query_norm="q_a_layernorm", query="q_b_proj"),
)
GPT_OSS = _with(
    LLAMA,
    {
        "*/attention/sinks": "~.self_attn.sinks",
        "*/experts/router": "~.mlp.router",
        EXPERTS_GATE_UP: At("~.mlp.experts.gate_up_proj", turned=False, parts="channels"),
        "*/experts/gate/bias+*/experts/up/bias": At("~.mlp.experts.gate_up_proj_bias", parts="channels"),
        "*/experts/down/kernel": At("~.mlp.experts.down_proj", turned=False),
        "*/experts/down/bias": "~.mlp.experts.down_proj_bias",
    },
)
OLMO2 = GEMMA2 = _with(
    LLAMA,
    {
        "*/attention_post_norm": "~.post_attention_layernorm",
        "*/mlp_norm": "~.pre_feedforward_layernorm",
        "*/mlp_post_norm": "~.post_feedforward_layernorm",
    },
)
GEMMA4 = _with(
    GEMMA2,
    {
        "inputs": "model.embed_tokens_per_layer",
        "inputs_projection": "model.per_layer_model_projection",
        "inputs_norm": "model.per_layer_projection_norm",
        "*/inputs_gate": "~.per_layer_input_gate",
        "*/inputs_projection": "~.per_layer_projection",
        "*/inputs_norm": "~.post_per_layer_input_norm",
        "*/scalar": "~.layer_scalar",
        "*/mlp_inner_norm": "~.post_feedforward_layernorm_1",
        "*/experts_norm": "~.pre_feedforward_layernorm_2",
        "*/experts_inner_norm": "~.post_feedforward_layernorm_2",
        "*/experts/router": "~.router.proj",
        "*/experts/router/channel_scale": "~.router.scale",
        "*/experts/router/expert_scale": "~.router.per_expert_scale",
        EXPERTS_GATE_UP: At("~.experts.gate_up_proj"),
        "*/experts/down/kernel": At("~.experts.down_proj"),
    },
)
GLM = _with(LLAMA, {GATE_UP: At("~.mlp.gate_up_proj")})
GLM4 = _with(GLM, {"*/attention_post_norm": "~.post_self_attn_layernorm", "*/mlp_post_norm": "~.post_mlp_layernorm"})
PHI3 = _with(GLM, {QKV: At("~.self_attn.qkv_proj")})
PHI = _with(
    LLAMA,
    {"final_norm": "model.final_layernorm"},
    _under("*/attention", "~.self_attn", output="dense", query_norm="q_layernorm", key_norm="k_layernorm"),
    _under("*/mlp", "~.mlp", up="fc1", down="fc2"),
)
STARCODER2 = _with(LLAMA, _under("*/mlp", "~.mlp", up="c_fc", down="c_proj"))
STABLELM = _with(
    LLAMA,
    _under("*/attention", "~.self_attn", query_norm="q_layernorm.norms.{e}", key_norm="k_layernorm.norms.{e}"),
)
HUNYUAN = _with(LLAMA, _under("*/attention", "~.self_attn", query_norm="query_layernorm", key_norm="key_layernorm"))
APERTUS = _with(
    LLAMA,
    {"*/attention_norm": "~.attention_layernorm", "*/mlp_norm": "~.feedforward_layernorm"},
    _under("*/mlp/act", "~.mlp.act_fn", positive="alpha_p", negative="alpha_n", beta="beta", eps="eps"),
)
OPT = _with(
    LLAMA,
    {
        "embed": "model.decoder.embed_tokens",
        "positions": "model.decoder.embed_positions",
        "project_in": "model.decoder.project_in",
        "project_out": "model.decoder.project_out",
        "*/attention_norm": "~.self_attn_layer_norm",
        "*/attention/output": "~.self_attn.out_proj",
        "*/mlp_norm": "~.final_layer_norm",
        "final_norm": "model.decoder.final_layer_norm",
    },
    _under("*/mlp", "~", up="fc1", down="fc2"),
    layer="model.decoder.layers.{i}",
)
GPTJ = _with(
    LLAMA,
    {
        "embed": "transformer.wte",
        "positions": "transformer.wpe",
        "*/attention_norm": "~.ln_1",
        "*/mlp_norm": "~.ln_2",
        "final_norm": "transformer.ln_f",
    },
    _under("*/attention", "~.attn", query="q_proj", key="k_proj", value="v_proj", output="out_proj"),
    _under("*/mlp", "~.mlp", up="fc_in", down="fc_out"),
    layer="transformer.h.{i}",
)
GPT_BIGCODE = _with(
    GPTJ,
    {QKV: At("~.attn.c_attn", parts="kv_heads"), "*/attention/output": "~.attn.c_proj"},
    _under("*/mlp", "~.mlp", up="c_fc", down="c_proj"),
)
GPT2 = _with(
    GPTJ,
    {
        QKV: At("~.attn.c_attn", turned=False),
        "*/attention/output": At("~.attn.c_proj", turned=False),
        "*/mlp/up": At("~.mlp.c_fc", turned=False),
        "*/mlp/down": At("~.mlp.c_proj", turned=False),
    },
)
BLOOM = FALCON = _with(
    LLAMA,
    {
        "embed": "transformer.word_embeddings",
        "embed_norm": "transformer.word_embeddings_layernorm",
        QKV: At("~.self_attention.query_key_value", parts="kv_heads"),
        "*/attention/output": "~.self_attention.dense",
        "final_norm": "transformer.ln_f",
    },
    _under("*/mlp", "~.mlp", up="dense_h_to_4h", down="dense_4h_to_h"),
    layer="transformer.h.{i}",
)
FALCON_TWO_NORMS = _with(FALCON, {"*/attention_norm": "~.ln_attn", "*/mlp_norm": "~.ln_mlp"})
GPT_NEOX = _with(
    LLAMA,
    {
        "embed": "gpt_neox.embed_in",
        QKV: At("~.attention.query_key_value", parts="kv_heads"),
        "*/attention/output": "~.attention.dense",
        "final_norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
    },
    _under("*/mlp", "~.mlp", up="dense_h_to_4h", down="dense_4h_to_h"),
    layer="gpt_neox.layers.{i}",
)
