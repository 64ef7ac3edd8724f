"""config.json files of well-known models on the hub: those with keys of their own, and those behind other towers."""

from typing import Any

from tests.support.hub_llama_configs import CODE, GEMMA, KIN, PLAIN, F, S

L = "linear_attention"
SUMMARY = {"summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
           "summary_type": "cls_index", "summary_use_proj": True}  # fmt: skip
DROPS = {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}
OPT = {
    "activation_dropout": 0.0, "activation_function": "relu", "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0, "bos_token_id": 2, "dropout": 0.1, "eos_token_id": 2, "init_std": 0.02,
    "layerdrop": 0.0, "max_position_embeddings": 2048, "model_type": "opt", "pad_token_id": 1, "prefix": "</s>",
    "torch_dtype": "float16", "transformers_version": "4.20.0.dev0", "use_cache": True, "vocab_size": 50272,
}  # fmt: skip
BIGCODE = {
    "_name_or_path": "/fsx/bigcode/experiments/pretraining/conversions/starcoderpy/large-model",
    "activation_function": "gelu", "architectures": ["GPTBigCodeForCausalLM"], "attention_softmax_in_fp32": True,
    "multi_query": True, "bos_token_id": 0, "eos_token_id": 0, "inference_runner": 0, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "max_batch_size": None, "max_sequence_length": None, "model_type": "gpt_bigcode",
    "pad_key_length": True, "pre_allocate_kv_cache": False, "scale_attention_softmax_in_fp32": True,
    "scale_attn_weights": True, "torch_dtype": "float32", "transformers_version": "4.28.1", "use_cache": True,
    "validate_runner_input": True, **DROPS, **SUMMARY,
}  # fmt: skip
NEOX = {
    "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
    "initializer_range": 0.02, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "gpt_neox",
    "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.24.0", "use_cache": True, "use_parallel_residual": True, "vocab_size": 50304,
}  # fmt: skip
FALCON = {
    "_name_or_path": "tiiuae/falcon", "alibi": False, "apply_residual_connection_post_layernorm": False,
    "architectures": ["FalconForCausalLM"], "attention_dropout": 0.0, "bias": False, "bos_token_id": 11,
    "eos_token_id": 11, "hidden_dropout": 0.0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "falcon", "multi_query": True, "parallel_attn": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.27.4", "use_cache": True, "vocab_size": 65024,
}  # fmt: skip
DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"], "aux_loss_alpha": 0.001, "ep_size": 1, "hidden_act": "silu",
    "initializer_range": 0.02, "kv_lora_rank": 512, "model_type": "deepseek_v3", "moe_layer_freq": 1,
    "norm_topk_prob": True, "pretraining_tp": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True, "v_head_dim": 128, **PLAIN,
}  # fmt: skip
GEMMA4 = {
    **GEMMA, "attention_k_eq_v": False, "dtype": "bfloat16", "enable_moe_block": False,
    "expert_intermediate_size": None, "final_logit_softcapping": 30.0, "global_head_dim": 512,
    "hidden_size_per_layer_input": 0, "initializer_range": 0.02, "max_position_embeddings": 262144,
    "model_type": "gemma4_text", "moe_intermediate_size": None, "num_experts": None,
    "num_global_key_value_heads": None, "num_kv_shared_layers": 0,
    "rope_parameters": {
        F: {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
        S: {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "sliding_window": 1024, "tie_word_embeddings": True, "top_k_experts": None,
    "use_bidirectional_attention": "vision", "use_cache": True, "use_double_wide_mlp": False, "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
}  # fmt: skip
GEMMA4_OUTER = {
    "architectures": ["Gemma4ForConditionalGeneration"], "audio_config": None, "audio_token_id": 258881,
    "boa_token_id": 256000, "boi_token_id": 255999, "dtype": "bfloat16", "eoa_token_id": 258883,
    "eoa_token_index": 258883, "eoi_token_id": 258882, "image_token_id": 258880, "initializer_range": 0.02,
    "model_type": "gemma4", "tie_word_embeddings": True, "transformers_version": "5.5.0.dev0",
    "video_token_id": 258884, "vision_soft_tokens_per_image": 280,
}  # fmt: skip
QWEN3_5 = {
    **PLAIN, "attn_output_gate": True, "dtype": "bfloat16", "eos_token_id": 248044, "full_attention_interval": 4,
    "head_dim": 256, "hidden_act": "silu", "initializer_range": 0.02, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_value_head_dim": 128,
    "max_position_embeddings": 262144, "mlp_only_layers": [], "model_type": "qwen3_5_text",
    "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "rms_norm_eps": 1e-06, "use_cache": True,
    "vocab_size": 248320, "mamba_ssm_dtype": "float32",
    "rope_parameters": {"mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_type": "default",
                        "rope_theta": 10000000, "partial_rotary_factor": 0.25},
}  # fmt: skip
QWEN3_5_OUTER = {
    "architectures": ["Qwen3_5ForConditionalGeneration"], "image_token_id": 248056, "model_type": "qwen3_5",
    "tie_word_embeddings": False, "transformers_version": "4.57.0.dev0", "video_token_id": 248057,
    "vision_config": {"deepstack_visual_indexes": [], "depth": 27, "hidden_size": 1152, "model_type": "qwen3_5"},
    "vision_end_token_id": 248054, "vision_start_token_id": 248053,
}  # fmt: skip
MINISTRAL3 = {
    "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "initializer_range": 0.02,
    "model_type": "ministral3", "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "sliding_window": None, "use_cache": True, "vocab_size": 131072,
}  # fmt: skip
MISTRAL3_OUTER = {
    "architectures": ["Mistral3ForConditionalGeneration"], "dtype": "bfloat16", "image_token_index": 10,
    "model_type": "mistral3", "multimodal_projector_bias": False, "projector_hidden_act": "gelu",
    "spatial_merge_size": 2, "transformers_version": "5.0.0.dev0", "vision_feature_layer": -1,
    "vision_config": {"head_dim": 64, "hidden_size": 1024, "model_type": "pixtral", "num_hidden_layers": 24},
}  # fmt: skip
MINISTRAL3_ROPE = {
    "beta_fast": 32.0, "beta_slow": 1.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0,
    "rope_type": "yarn", "type": "yarn",
}  # fmt: skip

HUB: dict[str, dict[str, Any]] = {
    **KIN,
    "gpt2": {
        "_name_or_path": "gpt2", "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
        "bos_token_id": 50256, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_inner": None, "n_layer": 12,
        "n_positions": 1024, "reorder_and_upcast_attn": False, "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True, "task_specific_params": {"text-generation": {"do_sample": True}},
        "torch_dtype": "float32", "transformers_version": "4.30.2", "use_cache": True, "vocab_size": 50257,
        **DROPS, **SUMMARY,
    },
    "gpt2-medium": {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "bos_token_id": 50256,
        "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
        "n_ctx": 1024, "n_embd": 1024, "n_head": 16, "n_layer": 24, "n_positions": 1024, "n_special": 0,
        "predict_special_tokens": True, "vocab_size": 50257, **DROPS, **SUMMARY,
    },
    "pythia-70m": {**NEOX, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
                   "num_hidden_layers": 6},
    "pythia-1.4b": {**NEOX, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16,
                    "num_hidden_layers": 24},
    "gpt-neox-20b": {**NEOX, "attention_probs_dropout_prob": 0, "hidden_act": "gelu_fast", "hidden_dropout_prob": 0,
                     "hidden_size": 6144, "intermediate_size": 24576, "num_attention_heads": 64,
                     "num_hidden_layers": 44, "vocab_size": 50432},
    "gpt-j-6b": {
        "activation_function": "gelu_new", "architectures": ["GPTJForCausalLM"], "attn_pdrop": 0.0,
        "bos_token_id": 50256, "embd_pdrop": 0.0, "eos_token_id": 50256, "gradient_checkpointing": False,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gptj", "n_embd": 4096, "n_head": 16,
        "n_inner": None, "n_layer": 28, "n_positions": 2048, "resid_pdrop": 0.0, "rotary": True, "rotary_dim": 64,
        "scale_attn_weights": True, "task_specific_params": {"text-generation": {"max_length": 50}},
        "tie_word_embeddings": False, "tokenizer_class": "GPT2Tokenizer", "transformers_version": "4.18.0.dev0",
        "use_cache": True, "vocab_size": 50400, **SUMMARY,
    },
    "opt-125m": {**OPT, "_name_or_path": "facebook/opt-125m", "do_layer_norm_before": True, "ffn_dim": 3072,
                 "hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "word_embed_proj_dim": 768},
    "opt-350m": {**OPT, "_name_or_path": "opt-350m", "_remove_final_layer_norm": False,
                 "do_layer_norm_before": False, "ffn_dim": 4096, "hidden_size": 1024, "num_attention_heads": 16,
                 "num_hidden_layers": 24, "word_embed_proj_dim": 512},
    "bloom-560m": {
        "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True, "architectures": ["BloomForCausalLM"], "bias_dropout_fusion": True,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "unk_token_id": 0, "hidden_dropout": 0.0,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "masked_softmax_fusion": True, "model_type": "bloom",
        "n_embed": 1024, "n_inner": None, "n_layer": 24, "num_attention_heads": 16, "offset_alibi": 100,
        "pretraining_tp": 1, "seq_length": 2048, "skip_bias_add": True, "skip_bias_add_qkv": False,
        "transformers_version": "4.20.0", "use_cache": True, "vocab_size": 250880,
    },
    "falcon-7b": {**FALCON, "hidden_size": 4544, "new_decoder_architecture": False, "num_attention_heads": 71,
                  "num_hidden_layers": 32},
    "falcon-40b": {**FALCON, "hidden_size": 8192, "n_head": 128, "n_layer": 60, "new_decoder_architecture": True,
                   "num_attention_heads": 128, "num_hidden_layers": 60, "num_kv_heads": 8},
    "gpt_bigcode-santacoder": {**BIGCODE, "activation_function": "gelu_fast", "n_embd": 2048, "n_head": 16,
                               "n_inner": 8192, "n_layer": 24, "n_positions": 2048, "vocab_size": 49280},
    "starcoder": {**BIGCODE, "n_embd": 6144, "n_head": 48, "n_inner": 24576, "n_layer": 40, "n_positions": 8192,
                  "vocab_size": 49152},
    "gemma-3-12b-it": {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
        "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 3840, "intermediate_size": 15360, "model_type": "gemma3_text", "num_attention_heads": 16,
            "num_hidden_layers": 48, "num_key_value_heads": 8, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "num_hidden_layers": 27},
    },
    "gemma-3-4b-it": {
        "architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106], "image_token_index": 262144,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "num_hidden_layers": 27},
    },
    "gemma-4-26B-A4B": {**GEMMA4_OUTER, "text_config": {
        **GEMMA4, "attention_k_eq_v": True, "enable_moe_block": True, "hidden_size": 2816, "intermediate_size": 2112,
        "layer_types": ([S] * 5 + [F]) * 5, "moe_intermediate_size": 704, "num_attention_heads": 16,
        "num_experts": 128, "num_global_key_value_heads": 2, "num_hidden_layers": 30, "num_key_value_heads": 8,
        "top_k_experts": 8}},
    "gemma-4-31B-it": {**GEMMA4_OUTER, "text_config": {
        **GEMMA4, "attention_k_eq_v": True, "hidden_size": 5376, "intermediate_size": 21504,
        "layer_types": ([S] * 5 + [F]) * 10, "num_attention_heads": 32, "num_global_key_value_heads": 4,
        "num_hidden_layers": 60, "num_key_value_heads": 16}},
    "gemma-4-E2B-it": {**GEMMA4_OUTER, "text_config": {
        **GEMMA4, "hidden_size": 1536, "hidden_size_per_layer_input": 256, "intermediate_size": 6144,
        "layer_types": ([S] * 4 + [F]) * 7, "num_attention_heads": 8, "num_hidden_layers": 35,
        "num_key_value_heads": 1, "num_kv_shared_layers": 20, "sliding_window": 512,
        "use_bidirectional_attention": None, "use_double_wide_mlp": True}},
    "Ministral-3-3B-Instruct-2512": {**MISTRAL3_OUTER, "text_config": {
        **MINISTRAL3, "hidden_size": 3072, "intermediate_size": 9216, "max_position_embeddings": 262144,
        "num_hidden_layers": 26, "tie_word_embeddings": True,
        "rope_parameters": {**MINISTRAL3_ROPE, "factor": 16.0, "original_max_position_embeddings": 16384,
                            "rope_theta": 1000000.0}}},
    "Devstral-Small-2-24B-Instruct-2512": {**MISTRAL3_OUTER, "tie_word_embeddings": False, "quantization_config": {
        "activation_scheme": "static", "dequantize": False, "quant_method": "fp8", "weight_block_size": None},
        "text_config": {
        **MINISTRAL3, "hidden_size": 5120, "intermediate_size": 32768, "max_position_embeddings": 393216,
        "num_hidden_layers": 40,
        "rope_parameters": {**MINISTRAL3_ROPE, "factor": 48.0, "original_max_position_embeddings": 8192,
                            "rope_theta": 100000000.0}}},
    "Qwen3.5-9B": {**QWEN3_5_OUTER, "text_config": {
        **QWEN3_5, "hidden_size": 4096, "intermediate_size": 12288, "layer_types": [L, L, L, F] * 8,
        "linear_num_value_heads": 32, "num_attention_heads": 16, "num_hidden_layers": 32, "num_key_value_heads": 4}},
    "Qwen3.5-27B": {**QWEN3_5_OUTER, "text_config": {
        **QWEN3_5, "hidden_size": 5120, "intermediate_size": 17408, "layer_types": [L, L, L, F] * 16,
        "linear_num_value_heads": 48, "num_attention_heads": 24, "num_hidden_layers": 64, "num_key_value_heads": 4}},
    "DeepSeek-V3": {
        **DEEPSEEK, "auto_map": CODE, "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432,
        "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256,
        "n_shared_experts": 1, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
        "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "rms_norm_eps": 1e-06,
        "quantization_config": {"activation_scheme": "dynamic", "quant_method": "fp8"},
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                         "original_max_position_embeddings": 4096, "type": "yarn"},
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "topk_group": 4, "vocab_size": 129280,
    },
    "Moonlight-16B-A3B": {
        **DEEPSEEK, "auto_map": CODE, "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 11264,
        "max_position_embeddings": 8192, "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64,
        "n_shared_experts": 2, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
        "num_key_value_heads": 16, "num_nextn_predict_layers": 0, "q_lora_rank": None, "rms_norm_eps": 1e-05,
        "rope_theta": 50000.0, "routed_scaling_factor": 2.446, "topk_group": 1, "vocab_size": 163840,
    },
}  # fmt: skip
