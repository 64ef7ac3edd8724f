"""config.json files of well-known models on the hub, of llama's kin: the same keys, and a few of their own."""

from typing import Any

S, F = "sliding_attention", "full_attention"
CODE = {"AutoConfig": "configuration_model.ModelConfig", "AutoModelForCausalLM": "modeling_model.ModelForCausalLM"}
LLAMA3 = {"high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
          "rope_type": "llama3"}  # fmt: skip
PLAIN = {"attention_bias": False, "attention_dropout": 0.0}
GEMMA = {
    **PLAIN, "bos_token_id": 2, "eos_token_id": 1, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "pad_token_id": 0, "rms_norm_eps": 1e-06,
}  # fmt: skip
QWEN_MOE = {
    "decoder_sparse_step": 1, "bos_token_id": 151643, "eos_token_id": 151645, "output_router_logits": False,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "tie_word_embeddings": False,
    "use_sliding_window": False, "attention_dropout": 0.0,
}  # fmt: skip
HUNYUAN = {
    **PLAIN, "add_classification_head": False, "attention_head_dim": 128, "cla_share_factor": 2, "class_num": 0,
    "head_dim": 128, "im_end_id": 5, "im_newline_id": 11, "im_start_id": 4, "mask_init_id": 12, "mlp_bias": False,
    "norm_type": "rms", "pool_type": "last", "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0,
                     "mscale_all_dim": 1.0, "type": "dynamic"},
    "rope_theta": 10000.0, "text_end_id": 7, "text_start_id": 6, "tie_word_embeddings": True, "use_cla": False,
    "use_qk_norm": True, "use_rotary_pos_emb": True,
}  # fmt: skip
OLMO = {**PLAIN, "bos_token_id": None, "eos_token_id": 50279, "max_position_embeddings": 4096, "pad_token_id": 1,
        "rope_scaling": None, "rope_theta": 10000.0}  # fmt: skip
LEGACY = {
    "return_dict": True, "output_hidden_states": False, "output_attentions": False, "torchscript": False,
    "use_bfloat16": False, "tf_legacy_loss": False, "pruned_heads": {}, "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False, "is_decoder": False, "cross_attention_hidden_size": None,
    "add_cross_attention": False, "tie_encoder_decoder": False, "max_length": 20, "min_length": 0, "do_sample": False,
    "early_stopping": False, "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0, "temperature": 1.0,
    "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0,
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "num_return_sequences": 1,
    "output_scores": False, "return_dict_in_generate": False, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "remove_invalid_values": False, "exponential_decay_length_penalty": None,
    "suppress_tokens": None, "begin_suppress_tokens": None, "finetuning_task": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "tokenizer_class": None,
    "prefix": None, "sep_token_id": None, "decoder_start_token_id": None, "task_specific_params": None,
    "problem_type": None,
}  # fmt: skip
"""What transformers 4 wrote when it wrote everything."""


def llama(model_type: str, name: str, width: int, layers: int, heads: int, kv: int, inner: int, vocab: int,
          **other: Any) -> dict[str, Any]:  # fmt: skip
    """The keys that files of llama's kin have in common, and `other` ones."""
    common = {"architectures": [f"{name}ForCausalLM"], "model_type": model_type, "hidden_size": width,
              "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
              "intermediate_size": inner, "vocab_size": vocab, "hidden_act": "silu", "initializer_range": 0.02,
              "use_cache": True, "torch_dtype": "bfloat16", "transformers_version": "4.56.0.dev0",
              "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    return {**common, **other}


KIN: dict[str, dict[str, Any]] = {
    "starcoder2-3b": llama(
        "starcoder2", "Starcoder2", 3072, 30, 24, 2, 12288, 49152, attention_dropout=0.1,
        attention_softmax_in_fp32=True, bos_token_id=0, embedding_dropout=0.1, eos_token_id=0,
        hidden_act="gelu_pytorch_tanh", layer_norm_epsilon=1e-05, max_position_embeddings=16384, mlp_type="default",
        norm_epsilon=1e-05, norm_type="layer_norm", residual_dropout=0.1, rope_theta=999999.4420358813,
        scale_attention_softmax_in_fp32=True, scale_attn_weights=True, sliding_window=4096, use_bias=True),
    "phi-1": llama(
        "phi", "Phi", 2048, 24, 32, 32, 8192, 51200, **PLAIN, embd_pdrop=0.0, hidden_act="gelu_new",
        layer_norm_eps=1e-05, max_position_embeddings=2048, partial_rotary_factor=0.5, qk_layernorm=False,
        resid_pdrop=0.0, rope_scaling=None, rope_theta=10000.0, rotary_dim=32, tie_word_embeddings=False),
    "phi-2": llama(
        "phi", "Phi", 2560, 32, 32, 32, 10240, 51200, attention_dropout=0.0, embd_pdrop=0.0, hidden_act="gelu_new",
        layer_norm_eps=1e-05, max_position_embeddings=2048, partial_rotary_factor=0.4, qk_layernorm=False,
        resid_pdrop=0.1, rope_scaling=None, rope_theta=10000.0, tie_word_embeddings=False),
    "Phi-3-mini-4k-instruct": llama(
        "phi3", "Phi3", 3072, 32, 32, 32, 8192, 32064, **PLAIN, auto_map=CODE, embd_pdrop=0.0, eos_token_id=32000,
        max_position_embeddings=4096, original_max_position_embeddings=4096, pad_token_id=32000, resid_pdrop=0.0,
        rms_norm_eps=1e-05, rope_scaling=None, rope_theta=10000.0, sliding_window=2047, tie_word_embeddings=False),
    "Phi-3-mini-128k-instruct": llama(
        "phi3", "Phi3", 3072, 32, 32, 32, 8192, 32064, **PLAIN, auto_map=CODE, embd_pdrop=0.0, eos_token_id=32000,
        max_position_embeddings=131072, original_max_position_embeddings=4096, pad_token_id=32000, resid_pdrop=0.0,
        rms_norm_eps=1e-05, rope_theta=10000.0, sliding_window=262144, tie_word_embeddings=False,
        rope_scaling={"long_factor": [1.08 + i for i in range(48)], "short_factor": [1.0] * 48, "type": "longrope"}),
    "Phi-4-mini-instruct": llama(
        "phi3", "Phi3", 3072, 32, 24, 8, 8192, 200064, **PLAIN, auto_map=CODE, embd_pdrop=0.0, full_attn_mod=1,
        interpolate_factor=1, lm_head_bias=False, max_position_embeddings=131072, mlp_bias=False,
        original_max_position_embeddings=4096, pad_token_id=199999, partial_rotary_factor=0.75, resid_pdrop=0.0,
        rms_norm_eps=1e-05, rope_theta=10000.0, sliding_window=262144, tie_word_embeddings=True,
        rope_scaling={"long_factor": [1.0 + i for i in range(48)], "short_factor": [1.0] * 48, "type": "longrope"}),
    "phi-4": llama(
        "phi3", "Phi3", 5120, 40, 40, 10, 17920, 100352, **PLAIN, embd_pdrop=0.0, max_position_embeddings=16384,
        original_max_position_embeddings=16384, pad_token_id=100349, resid_pdrop=0.0, rms_norm_eps=1e-05,
        rope_scaling=None, rope_theta=250000.0, sliding_window=None, tie_word_embeddings=False),
    "gemma-2b": llama(
        "gemma", "Gemma", 2048, 18, 8, 1, 16384, 256000,
        **{**GEMMA, "hidden_act": "gelu", "max_position_embeddings": 8192, "rope_scaling": None,
           "rope_theta": 10000.0}),
    "gemma-2-2b-it": llama(
        "gemma2", "Gemma2", 2304, 26, 8, 4, 9216, 256000,
        **{**GEMMA, "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid", "eos_token_id": [1, 107],
           "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
           "query_pre_attn_scalar": 256, "rope_theta": 10000.0, "sliding_window": 4096}),
    "gemma-3-270m": llama(
        "gemma3_text", "Gemma3", 640, 18, 4, 1, 2048, 262144,
        **{**GEMMA, "_sliding_window_pattern": 6, "attn_logit_softcapping": None, "final_logit_softcapping": None,
           "layer_types": ([S] * 5 + [F]) * 3, "max_position_embeddings": 32768, "query_pre_attn_scalar": 256,
           "rope_local_base_freq": 10000.0, "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": 512,
           "use_bidirectional_attention": False}),
    "gemma-3-1b-it": llama(
        "gemma3_text", "Gemma3", 1152, 26, 4, 1, 6912, 262144,
        **{**GEMMA, "attn_logit_softcapping": None, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
           "final_logit_softcapping": None, "max_position_embeddings": 32768, "query_pre_attn_scalar": 256,
           "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
           "sliding_window_pattern": 6}),
    "Mistral-7B-v0.1": llama(
        "mistral", "Mistral", 4096, 32, 32, 8, 14336, 32000, max_position_embeddings=32768, rms_norm_eps=1e-05,
        rope_theta=10000.0, sliding_window=4096, tie_word_embeddings=False),
    "Mistral-7B-Instruct-v0.3": llama(
        "mistral", "Mistral", 4096, 32, 32, 8, 14336, 32768, **LEGACY, attention_dropout=0.0,
        max_position_embeddings=32768, rms_norm_eps=1e-05, rope_theta=1000000.0, sliding_window=None,
        tie_word_embeddings=False),
    "Ministral-8B-Instruct-2410": llama(
        "mistral", "Mistral", 4096, 36, 32, 8, 12288, 131072, attention_dropout=0.0, head_dim=128,
        max_position_embeddings=32768, rms_norm_eps=1e-05, rope_theta=100000000.0, sliding_window=32768,
        tie_word_embeddings=False),
    "Mixtral-8x7B-v0.1": llama(
        "mixtral", "Mixtral", 4096, 32, 32, 8, 14336, 32000, attention_dropout=0.0, max_position_embeddings=32768,
        num_experts_per_tok=2, num_local_experts=8, output_router_logits=False, rms_norm_eps=1e-05,
        rope_theta=1000000.0, router_aux_loss_coef=0.02, sliding_window=None, tie_word_embeddings=False),
    "Llama-2-7b-hf": llama(
        "llama", "Llama", 4096, 32, 32, 32, 11008, 32000, max_position_embeddings=4096, pretraining_tp=1,
        rms_norm_eps=1e-05, rope_scaling=None, tie_word_embeddings=False),
    "Llama-3.1-8B-Instruct": llama(
        "llama", "Llama", 4096, 32, 32, 8, 14336, 128256, **PLAIN, max_position_embeddings=131072, mlp_bias=False,
        pretraining_tp=1, rms_norm_eps=1e-05, rope_scaling={**LLAMA3, "factor": 8.0}, rope_theta=500000.0,
        tie_word_embeddings=False),
    "Llama-3.2-1B-Instruct": llama(
        "llama", "Llama", 2048, 16, 32, 8, 8192, 128256, **PLAIN, head_dim=64, max_position_embeddings=131072,
        mlp_bias=False, pretraining_tp=1, rms_norm_eps=1e-05, rope_scaling={**LLAMA3, "factor": 32.0},
        rope_theta=500000.0, tie_word_embeddings=True),
    "SmolLM2-135M-Instruct": llama(
        "llama", "Llama", 576, 30, 9, 3, 1536, 49152, **PLAIN, initializer_range=0.041666666666666664,
        is_llama_config=True, max_position_embeddings=8192, mlp_bias=False, pad_token_id=2, pretraining_tp=1,
        rms_norm_eps=1e-05, rope_interleaved=False, rope_scaling=None, rope_theta=100000, tie_word_embeddings=True,
        **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}}),
    "TinyLlama-1.1B-Chat-v1.0": llama(
        "llama", "Llama", 2048, 22, 32, 4, 5632, 32000, attention_bias=False, max_position_embeddings=2048,
        pretraining_tp=1, rms_norm_eps=1e-05, rope_scaling=None, rope_theta=10000.0, tie_word_embeddings=False),
    "Yi-6B": llama(
        "llama", "Llama", 4096, 32, 32, 4, 11008, 64000, max_position_embeddings=4096, pad_token_id=0,
        pretraining_tp=1, rms_norm_eps=1e-05, rope_scaling=None, rope_theta=5000000.0, tie_word_embeddings=False),
    "SmolLM3-3B": llama(
        "smollm3", "SmolLM3", 2048, 36, 16, 4, 11008, 128256, **PLAIN, bos_token_id=None, eos_token_id=128012,
        layer_types=[F] * 36, max_position_embeddings=65536, max_window_layers=28, mlp_bias=False,
        no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 9, pad_token_id=128004, pretraining_tp=2,
        rms_norm_eps=1e-06, rope_scaling=None, rope_theta=5000000.0, sliding_window=None, use_sliding_window=False),
    "Qwen2.5-0.5B-Instruct": llama(
        "qwen2", "Qwen2", 896, 24, 14, 2, 4864, 151936, attention_dropout=0.0, max_position_embeddings=32768,
        max_window_layers=21, rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=32768,
        tie_word_embeddings=True, use_sliding_window=False),
    "DeepSeek-R1-Distill-Qwen-1.5B": llama(
        "qwen2", "Qwen2", 1536, 28, 12, 2, 8960, 151936, attention_dropout=0.0, max_position_embeddings=131072,
        max_window_layers=21, rms_norm_eps=1e-06, rope_theta=10000, sliding_window=4096, tie_word_embeddings=False,
        use_mrope=False, use_sliding_window=False),
    "Qwen1.5-MoE-A2.7B": llama(
        "qwen2_moe", "Qwen2Moe", 2048, 24, 16, 16, 5632, 151936,
        **{**QWEN_MOE, "max_position_embeddings": 8192, "max_window_layers": 21, "moe_intermediate_size": 1408,
           "norm_topk_prob": False, "num_experts": 60, "num_experts_per_tok": 4,
           "shared_expert_intermediate_size": 5632, "sliding_window": 32768}),
    "Qwen3-0.6B": llama(
        "qwen3", "Qwen3", 1024, 28, 16, 8, 3072, 151936, **PLAIN, head_dim=128, max_position_embeddings=40960,
        max_window_layers=28, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=1000000, sliding_window=None,
        tie_word_embeddings=True, use_sliding_window=False),
    "Qwen3-30B-A3B": llama(
        "qwen3_moe", "Qwen3Moe", 2048, 48, 32, 4, 6144, 151936,
        **{**QWEN_MOE, "attention_bias": False, "head_dim": 128, "max_position_embeddings": 40960,
           "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
           "num_experts": 128, "num_experts_per_tok": 8, "rope_scaling": None, "sliding_window": None}),
    "OLMo-1B-hf": llama(
        "olmo", "Olmo", 2048, 16, 16, 16, 8192, 50304, **OLMO, clip_qkv=None, pretraining_tp=1,
        tie_word_embeddings=True),
    "OLMo-2-1124-7B": llama(
        "olmo2", "Olmo2", 4096, 32, 32, 32, 11008, 100352,
        **{**OLMO, "rms_norm_eps": 1e-06, "rope_theta": 500000, "tie_word_embeddings": False}),
    "Olmo-3-1025-7B": llama(
        "olmo3", "Olmo3", 4096, 32, 32, 32, 11008, 100278,
        **{**OLMO, "layer_types": [S, S, S, F] * 8, "max_position_embeddings": 65536, "rms_norm_eps": 1e-06,
           "rope_scaling": {"attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1, "factor": 8.0,
                            "original_max_position_embeddings": 8192, "rope_type": "yarn"},
           "rope_theta": 500000, "sliding_window": 4096, "tie_word_embeddings": False}),
    "OLMoE-1B-7B-0924": llama(
        "olmoe", "Olmoe", 2048, 16, 16, 16, 1024, 50304, **OLMO, clip_qkv=None, norm_topk_prob=False, num_experts=64,
        num_experts_per_tok=8, output_router_logits=False, router_aux_loss_coef=0.01, tie_word_embeddings=False),
    "gpt-oss-20b": llama(
        "gpt_oss", "GptOss", 2880, 24, 64, 8, 2880, 201088, attention_bias=True, attention_dropout=0.0,
        experts_per_token=4, head_dim=64, initial_context_length=4096, layer_types=[S, F] * 12,
        max_position_embeddings=131072, num_experts_per_tok=4, num_local_experts=32, output_router_logits=False,
        pad_token_id=199999, rms_norm_eps=1e-05, rope_theta=150000, router_aux_loss_coef=0.9, sliding_window=128,
        swiglu_limit=7.0, tie_word_embeddings=False,
        quantization_config={"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"},
        rope_scaling={"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                      "rope_type": "yarn", "truncate": False}),
    "granite-3.1-2b-instruct": llama(
        "granite", "Granite", 2048, 40, 32, 8, 8192, 49155, attention_bias=False, attention_dropout=0.1,
        attention_multiplier=0.015625, embedding_multiplier=12.0, logits_scaling=8.0, max_position_embeddings=131072,
        mlp_bias=False, residual_multiplier=0.22, rms_norm_eps=1e-05, rope_scaling=None, rope_theta=5000000.0,
        tie_word_embeddings=True),
    "c4ai-command-r-v01": llama(
        "cohere", "Cohere", 8192, 40, 64, 64, 22528, 256000, **PLAIN, layer_norm_eps=1e-05, logit_scale=0.0625,
        max_position_embeddings=8192, model_max_length=131072, pretraining_tp=1, rope_theta=8000000.0,
        use_qk_norm=False),
    "c4ai-command-r7b-12-2024": llama(
        "cohere2", "Cohere2", 4096, 32, 32, 8, 14336, 256000, **PLAIN, cache_implementation="hybrid", head_dim=128,
        layer_norm_eps=1e-05, layer_switch=4, logit_scale=0.25, max_position_embeddings=8192,
        order_of_interleaved_layers="local_attn_first", position_embedding_type="rope_gptj", rope_scaling=None,
        rope_theta=50000, rotary_pct=1.0, sliding_window=4096, sliding_window_pattern=4, use_embedding_sharing=True,
        use_gated_activation=True, use_parallel_block=True, use_parallel_embedding=True),
    "stablelm-2-1_6b": llama(
        "stablelm", "StableLm", 2048, 24, 32, 32, 5632, 100352, layer_norm_eps=1e-05, max_position_embeddings=4096,
        partial_rotary_factor=0.25, rope_theta=10000, tie_word_embeddings=False, use_qkv_bias=True),
    "stablelm-3b-4e1t": llama(
        "stablelm", "StableLm", 2560, 32, 32, 32, 6912, 50304, layer_norm_eps=1e-05, max_position_embeddings=4096,
        partial_rotary_factor=0.25, rope_theta=10000, tie_word_embeddings=False),
    "glm-4-9b-chat-hf": llama(
        "glm", "Glm", 4096, 40, 32, 2, 13696, 151552, attention_bias=True, attention_dropout=0.0, head_dim=128,
        max_position_embeddings=131072, pad_token_id=151329, rms_norm_eps=1.5625e-07, rope_theta=10000.0,
        tie_word_embeddings=False),
    "GLM-4-9B-0414": llama(
        "glm4", "Glm4", 4096, 40, 32, 2, 13696, 151552, attention_bias=True, attention_dropout=0.0, head_dim=128,
        max_position_embeddings=32768, pad_token_id=151329, partial_rotary_factor=0.5, rms_norm_eps=1e-05,
        rope_theta=10000.0, tie_word_embeddings=False),
    "Nemotron-Mini-4B-Instruct": llama(
        "nemotron", "Nemotron", 3072, 32, 24, 8, 9216, 256000, **PLAIN, head_dim=128, hidden_act="relu2",
        max_position_embeddings=4096, mlp_bias=False, norm_eps=1e-05, partial_rotary_factor=0.5, rope_theta=10000.0,
        tie_word_embeddings=False),
    "AFM-4.5B": llama(
        "arcee", "Arcee", 2560, 36, 20, 4, 18432, 128004, **PLAIN, head_dim=128, hidden_act="relu2",
        max_position_embeddings=65536, mlp_bias=False, rms_norm_eps=1e-05, rope_theta=10000.0,
        rope_scaling={"beta_fast": 32.0, "beta_slow": 1.0, "factor": 20.0, "mscale": 1.0,
                      "original_max_position_embeddings": 4096, "rope_type": "yarn", "type": "yarn"},
        tie_word_embeddings=False),
    "EXAONE-4.0-1.2B": llama(
        "exaone4", "Exaone4", 2048, 30, 32, 8, 4096, 102400, attention_dropout=0.0, head_dim=64, layer_types=[F] * 30,
        max_position_embeddings=65536, rms_norm_eps=1e-05, rope_scaling={**LLAMA3, "factor": 16.0},
        rope_theta=1000000, sliding_window=None, sliding_window_pattern=None, tie_word_embeddings=True),
    "EXAONE-4.0-32B": llama(
        "exaone4", "Exaone4", 5120, 64, 40, 8, 27392, 102400, attention_dropout=0.0, head_dim=128,
        layer_types=[S, S, S, F] * 16, max_position_embeddings=131072, rms_norm_eps=1e-05,
        rope_scaling={**LLAMA3, "factor": 16.0}, rope_theta=1000000, sliding_window=4096,
        sliding_window_pattern="LLLG", tie_word_embeddings=False),
    "HunyuanImage-2.1-reprompt": llama(
        "hunyuan_v1_dense", "HunYuanDenseV1", 4096, 32, 32, 8, 14336, 128167, **HUNYUAN, dense_list=[4096, 0],
        max_position_embeddings=32768, org_vocab_size=128167, pad_id=127961, sep_token_id=127962),
    "Hunyuan-1.8B-Instruct": llama(
        "hunyuan_v1_dense", "HunYuanDenseV1", 2048, 32, 16, 4, 6144, 120818, **HUNYUAN, dense_list=[2048, 0],
        eod_token_id=120020, max_position_embeddings=262144, org_vocab_size=120818, pad_id=120002),
    "Seed-OSS-36B-Instruct": llama(
        "seed_oss", "SeedOss", 5120, 64, 80, 8, 27648, 155136, attention_bias=True, attention_dropout=0.1,
        attention_out_bias=False, head_dim=128, max_position_embeddings=524288, mlp_bias=False, residual_dropout=0.1,
        rms_norm_eps=1e-06, rope_scaling={"rope_type": "default"}, rope_theta=10000000.0, tie_word_embeddings=False),
    "Apertus-8B-2509": llama(
        "apertus", "Apertus", 4096, 32, 32, 8, 21504, 131072, **PLAIN, hidden_act="xielu", hidden_dropout=0.0,
        max_position_embeddings=65536, mlp_bias=False, post_norm=False, qk_norm=True, rms_norm_eps=1e-05,
        rope_scaling={**LLAMA3, "factor": 8.0, "type": "llama3"}, rope_theta=12000000, tie_word_embeddings=False),
    "helium-1-preview-2b": llama(
        "helium", "Helium", 2560, 24, 20, 20, 7040, 48000, **PLAIN, head_dim=128, max_position_embeddings=4096,
        mlp_bias=False, pretraining_tp=1, rms_norm_eps=1e-08, rope_theta=100000.0, tie_word_embeddings=False),
    "ERNIE-4.5-0.3B-PT": llama(
        "ernie4_5", "Ernie4_5", 1024, 18, 16, 2, 3072, 103424, head_dim=128, max_position_embeddings=131072,
        pad_token_id=0, rms_norm_eps=1e-05, rope_scaling=None, rope_theta=500000, tie_word_embeddings=True,
        use_bias=False),
}  # fmt: skip
