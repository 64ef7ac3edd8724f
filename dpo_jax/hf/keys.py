"""A config that is read key by key, so that no key is passed over in silence."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_jax.errors import UserError

HARMLESS = frozenset(
    # bookkeeping of transformers
    "_name_or_path architectures dtype model_type transformers_version transformers.js_config return_dict id2label "
    "label2id num_labels _num_labels problem_type output_attentions output_hidden_states output_past torchscript "
    "use_cache use_bfloat16 _attn_implementation_autoset _flash_attn_2_enabled gradient_checkpointing "
    "tf_legacy_loss pruned_heads finetuning_task task_specific_params tokenizer_class prefix is_decoder "
    "is_llama_config cache_implementation attn_implementation _attn_implementation unsloth_fixed unsloth_version "
    # how it was trained, or how long a text it has seen; DPO itself runs without dropout
    "attention_dropout hidden_dropout initializer_range max_position_embeddings original_max_position_embeddings "
    "max_sequence_length pretraining_tp resid_pdrop embd_pdrop attn_pdrop dropout layerdrop init_std "
    "classifier_dropout summary_type summary_use_proj summary_activation summary_proj_to_labels "
    "summary_first_dropout residual_dropout embedding_dropout output_router_logits activation_dropout "
    "attention_probs_dropout_prob hidden_dropout_prob router_jitter_noise aux_loss_alpha seq_aux n_positions "
    "seq_length model_max_length initial_context_length org_vocab_size "
    # how kernels of other programs compute the same
    "slow_but_exact reorder_and_upcast_attn attention_softmax_in_fp32 scale_attention_softmax_in_fp32 "
    "bias_dropout_fusion masked_softmax_fusion skip_bias_add skip_bias_add_qkv offset_alibi ep_size "
    "use_parallel_embedding inference_runner validate_runner_input max_batch_size pad_key_length "
    "pre_allocate_kv_cache "
    # parts that are there for other tasks: more tokens at once, classes, sharing between layers that is off
    "mtp_num_hidden_layers mtp_use_dedicated_embeddings class_num dense_list pool_type cla_share_factor "
    # what AutoConfig has turned into other keys
    "max_window_layers sliding_window_pattern _sliding_window_pattern no_rope_layer_interval qk_head_dim "
    "full_attention_interval layer_switch "
    # tokens and sampling (hf/tokenizer.py reads those that matter)
    "bos_token_id eos_token_id eod_token_id pad_token_id pad_id unk_token_id sep_token_id decoder_start_token_id "
    "im_start_id im_end_id im_newline_id text_start_id text_end_id mask_init_id n_special predict_special_tokens "
    "max_length min_length "
    "max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p "
    "typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids "
    "num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens".split()
)
"""Keys that may have any value."""

REQUIRED: dict[str, Any] = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
    "is_causal": True,
    "quantization_config": None,
    "rope_interleaved": False,
    "use_mrope": False,
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "attention_bias": False,
    "mlp_bias": False,
    "qkv_bias": False,
    "bias": False,
    "activation": "swiglu",
    "use_bidirectional_attention": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}
"""Keys that any family may have, as long as the value is this one or the family itself reads the key."""

FIXED: dict[str, dict[str, Any]] = {
    "apertus": {"qk_norm": True, "post_norm": False},
    "bloom": {"n_inner": None},
    "cohere2": {
        "order_of_interleaved_layers": "local_attn_first",
        "position_embedding_type": "rope_gptj",
        "rotary_pct": 1.0,
        "use_embedding_sharing": True,
        "use_gated_activation": True,
        "use_parallel_block": True,
        "use_qk_norm": False,
    },
    "deepseek_v3": {"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "falcon": {"apply_residual_connection_post_layernorm": False},
    "gemma": {"hidden_activation": "gelu_pytorch_tanh"},
    # between the tokens of one image only
    "gemma4_text": {"use_bidirectional_attention": "vision", "expert_intermediate_size": None},
    "gptj": {"rotary": True},
    "hunyuan_v1_dense": {
        "add_classification_head": False,
        "norm_type": "rms",
        "num_experts": 1,
        "position_embedding_xdrope": False,
        "skip_cls_token": False,
        "use_cla": False,
        "use_qk_norm": True,
        "use_rotary_pos_emb": True,
    },
    "nemotron": {"rope_percent": 0.5, "rope_percentage": 0.5},
    "phi": {"rotary_dim": 32},
    "phi3": {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False},
    "stablelm": {"rotary_scaling_factor": 1.0},
    "starcoder2": {"mlp_type": "default", "norm_type": "layer_norm"},
}
"""Keys of a family's first code that transformers passes over, and the value with which both compute the same; they are
read before all others."""

AGAIN = {
    "attention_head_dim": "head_dim",
    "experts_per_token": "num_experts_per_tok",
    "layer_norm_epsilon": "norm_epsilon",
    "n_ctx": "n_positions",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
}
"""Older names, which must say what the other key says where no family reads them."""

MOVED = frozenset(
    "rope_theta rope_scaling torch_dtype attn_implementation _attn_implementation rotary_pct rotary_emb_base "
    "partial_rotary_factor rope_local_base_freq rope_ratio global_head_dim num_global_key_value_heads n_embed".split()
)
"""Keys that `AutoConfig` reads and gives back under another name; any other key it swallows is refused."""


class Keys:
    """A config that is read key by key, and knows which keys nobody has read yet."""

    def __init__(self, table: Mapping[str, Any], file: Path, prefix: str = ""):
        """Reads from `table`, a part (named by `prefix`) of what `file` says."""
        self._all, self._left = dict(table), dict(table)
        self._file, self._prefix = file, prefix
        self._names: dict[str, str] = {}

    @property
    def file(self) -> Path:
        """The file that is read."""
        return self._file

    @property
    def left(self) -> dict[str, Any]:
        """Keys that nobody has read yet, and their values."""
        return dict(self._left)

    def rename(self, names: Mapping[str, str]) -> None:
        """Takes each key of `names` (as the config has it) for the other; errors say what the config has."""
        for old, new in names.items():
            if old in self._left:
                self._left[new] = self._all[new] = self._left.pop(old)
                self._names[new] = old

    def refuse(self, name: str, value: object, why: str) -> UserError:
        """The error for a key, its value, and why that will not do."""
        shown = json.dumps(value, default=str)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return UserError(f"{self._file}: {self._prefix}{self._names.get(name, name)} = {shown}: {why}")

    def take(self, name: str, default: object = None) -> Any:
        """Value of a key that may be missing or null."""
        value = self._left.pop(name, None)
        return default if value is None else value

    def peek(self, name: str) -> Any:
        """Value of a key, which counts as unread still if it was."""
        return self._all.get(name)

    def has(self, name: str) -> bool:
        """Whether the key is there, be it null."""
        return name in self._all

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number above zero."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self.refuse(name, value, "a whole number above zero is wanted")
        return value

    def count(self, name: str) -> int:
        """A whole number, zero where it is missing."""
        value = self.take(name, 0)
        return self.size(name, value) if value != 0 or isinstance(value, bool) else 0

    def positive(self, name: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.refuse(name, value, "a finite number above zero is wanted")
        return float(value)

    def perhaps(self, name: str) -> float | None:
        """A finite number above zero, or None where it is missing."""
        return self.take(name) if self.peek(name) is None else self.positive(name)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, value, "true or false is wanted")
        return value

    def entries(self, name: str, count: int, allowed: Mapping[Any, Any] | None = None) -> tuple[Any, ...]:
        """A list with one entry for each of `count` layers, each of them allowed; () where it is missing."""
        value = self.take(name, [])
        if not isinstance(value, list) or len(value) not in (0, count):
            raise self.refuse(name, value, f"a list with one entry for each of {count} layers is wanted")
        wrong = [entry for entry in value if allowed is not None and entry not in allowed]
        if wrong:
            raise self.refuse(name, wrong[0], f"not supported; supported: {', '.join(map(str, allowed or ()))}")
        return tuple(value)

    def require(self, table: Mapping[str, Any]) -> None:
        """Refuses keys of `table` that are there, are not null, and have another value than the table's."""
        for name, wanted in table.items():
            value = self.take(name, wanted)
            if value != wanted:
                raise self.refuse(name, value, f"not supported, only {json.dumps(wanted)} is")

    def agree(self, table: Mapping[str, str]) -> None:
        """Refuses keys of `table` that are left and differ from the key that says the same."""
        for name, other in table.items():
            value, wanted = self.take(name), self.peek(other)
            if value not in (None, wanted):
                raise self.refuse(name, value, f"differs from {other} = {json.dumps(wanted)}; keep one of them")

    def part(self, name: str) -> "Keys":
        """A nested table; finish it too."""
        value = self.take(name, {})
        if not isinstance(value, dict):
            raise self.refuse(name, value, "a table is wanted")
        return Keys(value, self._file, f"{self._prefix}{name}.")

    def finish(self, harmless: frozenset[str] = frozenset()) -> None:
        """Refuses what nobody has read and `harmless` does not list."""
        for name, value in self._left.items():
            if name not in harmless:
                raise self.refuse(
                    name,
                    value,
                    "unknown key, and it may change what the model computes; "
                    "if it does not, remove it from a copy of the folder",
                )
