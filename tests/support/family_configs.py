"""Tiny configs of every family, each with an option or two that no other of them has.

Windows are shorter than the texts, heads are no power of two, and `heads * head_dim` is not the width where a family
lets it differ: a wrong detail anywhere changes the logits.
"""

from typing import Any

Config = tuple[str, dict[str, Any]]

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OLD = {"vocab_size": 88, **SPECIAL}
WIDE = {
    **OLD,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
"""Where a head has `hidden_size / num_attention_heads` channels."""
SIZED = {**WIDE, "hidden_size": 24, "head_dim": 8}
GPT = {**OLD, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 40}
OPT = {
    **OLD,
    "hidden_size": 48,
    "ffn_dim": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 40,
    "word_embed_proj_dim": 48,
}
FALCON = {**OLD, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "alibi": False, "bias": False}
FALCON_NEW = {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 6.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 12,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 3000.0,
    "factor": 5.0,
    "original_max_position_embeddings": 10,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 9000.0,
    "short_factor": [1.0, 1.2, 1.3, 1.5],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 16,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
GEMMA4 = {
    **SIZED,
    "num_hidden_layers": 6,
    "sliding_window": 4,
    "layer_types": [SLIDING, SLIDING, FULL] * 2,
    "global_head_dim": 16,
    "vocab_size_per_layer_input": 88,
    "hidden_size_per_layer_input": 6,
}
DEEPSEEK = {
    **WIDE,
    "num_key_value_heads": 6,
    "q_lora_rank": 14,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_group": 3,
    "topk_group": 2,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
}
DELTA = {
    **SIZED,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "layer_types": [LINEAR, LINEAR, FULL],
}

CONFIGS: dict[str, Config] = {
    "apertus": ("apertus", {**WIDE, "rope_parameters": LLAMA3, "attention_bias": True}),
    "arcee": ("arcee", {**WIDE, "rope_parameters": YARN, "mlp_bias": True}),
    "bloom": ("bloom", {**OLD, "hidden_size": 48, "n_layer": 3, "n_head": 6}),
    "cohere": ("cohere", {**WIDE, "logit_scale": 0.5, "attention_bias": True, "tie_word_embeddings": False}),
    "cohere_normed": ("cohere", {**WIDE, "logit_scale": 0.25, "use_qk_norm": True}),
    "cohere2": ("cohere2", {**SIZED, "logit_scale": 0.5, "sliding_window": 4, "layer_types": [SLIDING, SLIDING, FULL]}),
    "cohere2_unwindowed": ("cohere2", {**SIZED, "logit_scale": 0.5, "sliding_window": 4, "layer_types": [FULL] * 3}),
    "deepseek_v3": ("deepseek_v3", {**DEEPSEEK, "n_shared_experts": 2, "routed_scaling_factor": 1.5}),
    "deepseek_v3_plain": (
        "deepseek_v3",
        {**DEEPSEEK, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": False,
         "n_shared_experts": 1},
    ),
    "deepseek_v3_yarn": (
        "deepseek_v3",
        {
            **DEEPSEEK,
            "attention_bias": True,
            "rope_interleave": False,
            "n_shared_experts": 1,
            "rope_parameters": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.6},
        },
    ),
    "ernie4_5": ("ernie4_5", {**SIZED, "use_bias": True, "tie_word_embeddings": False}),
    "exaone4": ("exaone4", {**SIZED, "sliding_window": 4, "layer_types": [SLIDING, FULL, SLIDING]}),
    "exaone4_full": (
        "exaone4",
        {**SIZED, "sliding_window": None, "layer_types": [FULL] * 3, "rope_parameters": LLAMA3},
    ),
    "exaone4_unwindowed": ("exaone4", {**SIZED, "sliding_window": 4, "layer_types": [FULL] * 3}),
    "falcon_serial": ("falcon", {**FALCON, "multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon_heads": ("falcon", {**FALCON, "multi_query": False, "parallel_attn": True, "ffn_hidden_size": 56}),
    "falcon_query": ("falcon", {**FALCON, "multi_query": True, "parallel_attn": True, "tie_word_embeddings": False}),
    "falcon_new": ("falcon", {**FALCON_NEW, "bias": True}),
    "falcon_new_one_norm": ("falcon", {**FALCON_NEW, "num_ln_in_parallel_attn": 1}),
    "gemma": ("gemma", {**SIZED, "attention_bias": True}),
    "gemma2": (
        "gemma2",
        {**SIZED, "query_pre_attn_scalar": 20, "sliding_window": 4, "attn_logit_softcapping": 1.5,
         "final_logit_softcapping": None},
    ),
    "gemma2_uncapped": (
        "gemma2",
        {**SIZED, "sliding_window": 4, "attn_logit_softcapping": None, "final_logit_softcapping": 2.0},
    ),
    "gemma3_text": (
        "gemma3_text",
        {**SIZED, "query_pre_attn_scalar": 12, "sliding_window": 4, "layer_types": [SLIDING, SLIDING, FULL],
         "final_logit_softcapping": 4.0,
         "rope_parameters": {SLIDING: {"rope_type": "default", "rope_theta": 500.0},
                             FULL: {"rope_type": "linear", "rope_theta": 7000.0, "factor": 3.0}}},
    ),
    "gemma4_text": ("gemma4_text", {**GEMMA4, "num_kv_shared_layers": 3, "final_logit_softcapping": 8.0}),
    "gemma4_keys": (
        "gemma4_text",
        {**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 3, "hidden_size_per_layer_input": 0},
    ),
    "gemma4_everything": (
        "gemma4_text",
        {**GEMMA4, "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "enable_moe_block": True, "num_experts": 5,
         "top_k_experts": 2, "moe_intermediate_size": 20, "layer_types": [SLIDING, FULL] * 3},
    ),
    "glm": ("glm", {**SIZED, "partial_rotary_factor": 0.5, "attention_bias": True}),
    "glm4": ("glm4", {**SIZED, "partial_rotary_factor": 0.75, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {**GPT, "n_inner": 56, "tie_word_embeddings": False, "activation_function": "gelu"}),
    "gpt2_tied": ("gpt2", GPT),
    "gpt_bigcode": ("gpt_bigcode", {**GPT, "n_inner": 56}),
    "gpt_bigcode_heads": ("gpt_bigcode", {**GPT, "multi_query": False, "tie_word_embeddings": False}),
    "gpt_neox": ("gpt_neox", {**WIDE, "rotary_pct": 0.5, "attention_bias": False, "hidden_act": "gelu_new"}),
    "gpt_neox_serial": (
        "gpt_neox",
        {**WIDE, "rotary_pct": 0.25, "use_parallel_residual": False, "tie_word_embeddings": True},
    ),
    "gpt_oss": (
        "gpt_oss",
        {**SIZED, "num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 4, "swiglu_limit": 0.7,
         "layer_types": [SLIDING, FULL, FULL], "rope_parameters": {**YARN, "truncate": False}},
    ),
    "gptj": ("gptj", {**GPT, "rotary_dim": 6, "n_inner": 56}),
    "granite": (
        "granite",
        {**WIDE, "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.6,
         "logits_scaling": 2.0, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "helium": ("helium", {**WIDE, "head_dim": 8, "attention_bias": True, "mlp_bias": True}),
    "hunyuan_v1_dense": (
        "hunyuan_v1_dense",
        {**SIZED, "attention_bias": True,
         "rope_parameters": {"rope_type": "dynamic", "rope_theta": 3000.0, "alpha": 50.0, "factor": 1.0}},
    ),
    "llama": ("llama", {**SIZED, "rope_parameters": LLAMA3, "tie_word_embeddings": True, "attention_bias": True}),
    "llama_yarn": ("llama", {**SIZED, "rope_parameters": YARN}),
    "llama_linear": (
        "llama",
        {**WIDE, "mlp_bias": True, "rope_parameters": {"rope_type": "linear", "rope_theta": 900.0, "factor": 2.5}},
    ),
    "llama_longrope": ("llama", {**WIDE, "num_key_value_heads": 6, "rope_parameters": {**LONGROPE, "factor": 3.0}}),
    "ministral": ("ministral", {**SIZED, "sliding_window": 4, "layer_types": [FULL, SLIDING, SLIDING]}),
    "ministral3": (
        "ministral3",
        {**SIZED, "sliding_window": 9,
         "rope_parameters": {**YARN, "original_max_position_embeddings": 6, "mscale": 0.9, "mscale_all_dim": 0.5,
                             "llama_4_scaling_beta": 0.4}},
    ),
    "mistral": ("mistral", {**SIZED, "sliding_window": 4}),
    "mistral_full": ("mistral", {**WIDE, "sliding_window": None, "tie_word_embeddings": True, "hidden_act": "gelu"}),
    "mixtral": ("mixtral", {**SIZED, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 4}),
    "nemotron": ("nemotron", {**WIDE, "partial_rotary_factor": 0.5, "attention_bias": True, "mlp_bias": True}),
    "olmo": ("olmo", {**WIDE, "clip_qkv": None, "attention_bias": True, "tie_word_embeddings": True}),
    "olmo_clipped": ("olmo", {**WIDE, "clip_qkv": 0.8}),
    "olmo2": ("olmo2", {**WIDE, "attention_bias": True}),
    "olmo3": (
        "olmo3",
        {**WIDE, "sliding_window": 4, "layer_types": [SLIDING, FULL, SLIDING], "rope_scaling": YARN},
    ),
    "olmoe": ("olmoe", {**WIDE, "num_experts": 5, "num_experts_per_tok": 2, "clip_qkv": 0.9, "norm_topk_prob": True}),
    "opt": ("opt", {**OPT, "enable_bias": False, "tie_word_embeddings": False}),
    "opt_bare": ("opt", {**OPT, "_remove_final_layer_norm": True, "activation_function": "gelu"}),
    "opt_narrow": ("opt", {**OPT, "word_embed_proj_dim": 20, "do_layer_norm_before": False}),
    "phi": ("phi", {**WIDE, "partial_rotary_factor": 0.25, "num_key_value_heads": 6}),
    "phi_normed": ("phi", {**WIDE, "partial_rotary_factor": 0.5, "qk_layernorm": True}),
    "phi3": ("phi3", {**WIDE, "sliding_window": 9, "tie_word_embeddings": True}),
    "phi3_long": (
        "phi3",
        {**WIDE, "original_max_position_embeddings": 16, "max_position_embeddings": 48, "rope_parameters": LONGROPE},
    ),
    "qwen2": ("qwen2", {**WIDE, "tie_word_embeddings": True}),
    "qwen2_windowed": ("qwen2", {**WIDE, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen2_moe": (
        "qwen2_moe",
        {**WIDE, **EXPERTS, "shared_expert_intermediate_size": 28, "norm_topk_prob": True, "qkv_bias": False,
         "mlp_only_layers": [1]},
    ),
    "qwen3": ("qwen3", {**SIZED, "attention_bias": True, "rope_parameters": YARN}),
    "qwen3_moe": ("qwen3_moe", {**SIZED, **EXPERTS, "norm_topk_prob": False, "decoder_sparse_step": 2}),
    "qwen3_moe_windowed": (
        "qwen3_moe",
        {**SIZED, **EXPERTS, "norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 4},
    ),
    "qwen3_5_text": ("qwen3_5_text", DELTA),
    "qwen3_5_one_head": (
        "qwen3_5_text",
        {**DELTA, "linear_key_head_dim": 16, "linear_num_key_heads": 3, "linear_num_value_heads": 3,
         "linear_conv_kernel_dim": 3, "layer_types": [FULL, LINEAR, LINEAR], "tie_word_embeddings": True},
    ),
    "seed_oss": ("seed_oss", {**SIZED, "attention_bias": False, "attention_out_bias": True, "mlp_bias": True}),
    "smollm3": (
        "smollm3",
        {**WIDE, "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 4,
         "layer_types": [SLIDING, FULL, SLIDING], "attention_bias": True, "tie_word_embeddings": False},
    ),
    "smollm3_tied": ("smollm3", {**WIDE, "no_rope_layers": [0, 1, 1], "tie_word_embeddings": True}),
    "stablelm": ("stablelm", {**WIDE, "use_qkv_bias": True, "partial_rotary_factor": 0.25}),
    "stablelm_parallel": (
        "stablelm",
        {**WIDE, "use_parallel_residual": True, "qk_layernorm": True, "tie_word_embeddings": True},
    ),
    "starcoder2": ("starcoder2", {**WIDE, "use_bias": False, "sliding_window": 4, "tie_word_embeddings": False}),
    "starcoder2_biased": ("starcoder2", {**WIDE, "use_bias": True}),
}  # fmt: skip
"""By a name of our own: the family's `model_type`, and what its config says."""
