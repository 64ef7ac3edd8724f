"""What a folder's `config.json` says about the decoder: one row of `FAMILIES` per `model_type`.

Every key must be used, required to have a harmless value, or known not to change what the model computes; any other
key is an error, because a key that is passed over in silence is how a model trains wrongly without a word.
"""

import contextlib
import dataclasses
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dpo_jax.hf.tensors import read_json
from dpo_jax.model.spec import DecoderSpec, Rope
from dpo_jax.settings import UserError

HARMLESS = frozenset(
    # bookkeeping of transformers
    "_name_or_path architectures dtype model_type transformers_version transformers.js_config return_dict id2label "
    "label2id num_labels problem_type output_attentions output_hidden_states torchscript use_cache use_bfloat16 "
    "tf_legacy_loss pruned_heads finetuning_task task_specific_params tokenizer_class prefix is_decoder "
    "is_llama_config cache_implementation attn_implementation _attn_implementation unsloth_fixed unsloth_version "
    # how it was trained, or how long a text it has seen; DPO itself runs without dropout
    "attention_dropout hidden_dropout initializer_range max_position_embeddings original_max_position_embeddings "
    "max_sequence_length pretraining_tp "
    # tokens and sampling (hf/tokenizer.py reads those that matter)
    "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id max_length min_length max_new_tokens "
    "do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p "
    "repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids "
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
}
"""Keys that any family may have, as long as the value is this one or the family itself reads the key."""

MOVED = frozenset({"rope_theta", "rope_scaling", "torch_dtype", "attn_implementation", "_attn_implementation"})
"""Keys that `AutoConfig` reads and gives back under another name; any other key it swallows is refused."""

LANGUAGE_MODEL, CLASSIFIER = "ForCausalLM", "ForSequenceClassification"
"""What the names of transformers' classes end with: a head over the vocabulary, and one over labels."""


class Keys:
    """A config that is read key by key, and knows which keys nobody has read yet."""

    def __init__(self, table: Mapping[str, Any], file: Path, prefix: str = ""):
        """Reads from `table`, a part (named by `prefix`) of what `file` says."""
        self._left = dict(table)
        self._file, self._prefix = file, prefix

    def refuse(self, name: str, value: Any, why: str) -> UserError:
        """The error for a key, its value, and why that will not do."""
        shown = json.dumps(value, default=str)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return UserError(f"{self._file}: {self._prefix}{name} = {shown}: {why}")

    def take(self, name: str, default: Any = None) -> Any:
        """Value of a key that may be missing or null."""
        value = self._left.pop(name, None)
        return default if value is None else value

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number above zero."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self.refuse(name, value, "a whole number above zero is wanted")
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.refuse(name, value, "a finite number above zero is wanted")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, value, "true or false is wanted")
        return value

    def require(self, table: Mapping[str, Any]) -> None:
        """Refuses keys of `table` that are there, are not null, and have another value than the table's."""
        for name, wanted in table.items():
            value = self.take(name, wanted)
            if value != wanted:
                raise self.refuse(name, value, f"not supported, only {json.dumps(wanted)} is")

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


def _rope(k: Keys) -> Rope:
    table = k.part("rope_parameters")
    kind = table.take("rope_type", "default")
    table.require({"type": kind, "partial_rotary_factor": 1.0})
    theta = table.positive("rope_theta")
    match kind:
        case "default":
            rope = Rope(theta=theta)
            table.require({"factor": 1.0})
            table.take("original_max_position_embeddings")
        case "linear":
            rope = Rope(theta=theta, kind="linear", factor=table.positive("factor"))
            table.take("original_max_position_embeddings")
        case "llama3":
            rope = Rope(
                theta=theta,
                kind="llama3",
                factor=table.positive("factor"),
                low_frequency=table.positive("low_freq_factor"),
                high_frequency=table.positive("high_freq_factor"),
                original_positions=table.size("original_max_position_embeddings"),
            )
            if rope.high_frequency <= rope.low_frequency:
                raise table.refuse("high_freq_factor", rope.high_frequency, "must be above low_freq_factor")
        case other:
            raise table.refuse("rope_type", other, "not supported; supported: default, linear, llama3")
    table.finish()
    return rope


def _llama_like(k: Keys, **differences: Any) -> DecoderSpec:
    """The baseline: RMS norm before each branch, grouped-query attention with RoPE, and a SwiGLU MLP."""
    k.require({"hidden_act": "silu"})
    width, heads = k.size("hidden_size"), k.size("num_attention_heads")
    kv_heads = k.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise k.refuse("num_key_value_heads", kv_heads, f"must divide num_attention_heads = {heads}")
    head_dim = k.size("head_dim", width // heads)
    if head_dim % 2:
        raise k.refuse("head_dim", head_dim, "must be even for rotary position embedding")
    return DecoderSpec(
        vocab_size=k.size("vocab_size"),
        width=width,
        layers=k.size("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=k.size("intermediate_size"),
        norm_epsilon=k.positive("rms_norm_eps"),
        rope=_rope(k),
        tied=k.flag("tie_word_embeddings"),
        **differences,
    )


def _typed_windows(k: Keys) -> tuple[int | None, ...]:
    """Windows where `use_sliding_window` is on and the layer's type is `sliding_attention`."""
    types, used = k.take("layer_types", []), k.flag("use_sliding_window")
    if not isinstance(types, list):
        raise k.refuse("layer_types", types, "a list with one entry for each layer is wanted")
    window = k.size("sliding_window") if used and "sliding_attention" in types else k.take("sliding_window")
    k.take("max_window_layers")  # transformers has turned it into layer_types
    unknown = next((kind for kind in types if kind not in ("full_attention", "sliding_attention")), None)
    if unknown is not None:
        raise k.refuse("layer_types", unknown, "not supported; supported: full_attention, sliding_attention")
    windows = tuple(window if used and kind == "sliding_attention" else None for kind in types)
    return windows if any(windows) else ()


def _llama(k: Keys) -> DecoderSpec:
    bias = k.flag("attention_bias")
    return _llama_like(k, qkv_bias=bias, output_bias=bias, mlp_bias=k.flag("mlp_bias"))


def _mistral(k: Keys) -> DecoderSpec:
    spec = _llama_like(k)
    window = k.take("sliding_window")
    if window is None:
        return spec
    if isinstance(window, bool) or not isinstance(window, int) or window <= 0:
        raise k.refuse("sliding_window", window, "null or a whole number above zero is wanted")
    return DecoderSpec(**{**vars(spec), "windows": (window,) * spec.layers})


def _qwen2(k: Keys) -> DecoderSpec:
    return _llama_like(k, windows=_typed_windows(k), qkv_bias=True)


def _qwen3(k: Keys) -> DecoderSpec:
    bias = k.flag("attention_bias")
    return _llama_like(k, windows=_typed_windows(k), qkv_bias=bias, output_bias=bias, qk_norm=True)


FAMILIES: dict[str, Callable[[Keys], DecoderSpec]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}


def read_spec(folder: str | Path, *, scalar_head: bool | None = None) -> DecoderSpec:
    """The decoder that a folder's `config.json` describes, in either style (`rope_theta` or `rope_parameters`).

    Args:
      folder: of a language model, or of a reward model: a ...ForSequenceClassification with one label.
      scalar_head: None takes the head that the folder has. True gives the spec of a reward model, also for a language
        model's folder, which `load_hf` then starts with a new head. False refuses a reward model.

    Raises:
      UserError: the family is not supported, or a key is unknown or has a value that is not supported.
    """
    folder = Path(folder)
    file, raw = folder / "config.json", read_json(folder, "config.json")
    _check_raw(raw, Keys(raw, file))
    config = _auto_config(folder)
    swallowed = {name: value for name, value in raw.items() if name not in config and name not in MOVED}
    Keys(swallowed, file).finish(HARMLESS | frozenset(REQUIRED))
    keys = Keys(config, file)
    spec = FAMILIES[raw["model_type"]](keys)
    keys.require(REQUIRED)
    keys.finish(HARMLESS)
    if spec.windows and len(spec.windows) != spec.layers:
        raise keys.refuse("layer_types", len(spec.windows), f"one entry for each of {spec.layers} layers is wanted")
    own = _is_classifier(raw)
    if own and scalar_head is False:
        why = f"a reward model, which scores texts and writes none; give a ...{LANGUAGE_MODEL}"
        raise keys.refuse("architectures", raw["architectures"], why)
    return dataclasses.replace(spec, scalar_head=own if scalar_head is None else scalar_head)


def _is_classifier(raw: dict[str, Any]) -> bool:
    return any(str(kind).lower().endswith(CLASSIFIER.lower()) for kind in raw.get("architectures") or [])


def _check_labels(raw: dict[str, Any], k: Keys) -> None:
    """One label is wanted, counted as transformers does it: `num_labels` or `id2label`, and two if neither is there."""
    labels = raw.get("id2label")
    if labels is not None and not isinstance(labels, dict):
        raise k.refuse("id2label", labels, "a table of labels by number is wanted")
    count = raw.get("num_labels", 2 if labels is None else len(labels))
    if isinstance(count, bool) or not isinstance(count, int):
        raise k.refuse("num_labels", count, "a whole number is wanted")
    if labels is not None and len(labels) != count:
        raise k.refuse("num_labels", count, f"differs from the {len(labels)} entries of id2label; keep one of them")
    if count != 1:
        name = "num_labels" if "num_labels" in raw else "id2label"
        why = f"makes {count} labels, and a reward model has one; give such a model, or a ...{LANGUAGE_MODEL}"
        raise k.refuse(name, raw.get(name), why)


def _check_raw(raw: dict[str, Any], k: Keys) -> None:
    """What must be known before transformers sees the folder, and what it would settle in silence."""
    family = raw.get("model_type")
    if "auto_map" in raw:
        raise k.refuse("auto_map", raw["auto_map"], "the model brings its own code, which is never run")
    if "configuration_files" in raw:
        raise k.refuse("configuration_files", raw["configuration_files"], "the whole config must stand in config.json")
    if not isinstance(family, str) or family not in FAMILIES:
        raise k.refuse("model_type", family, f"not supported; supported: {', '.join(sorted(FAMILIES))}")
    kinds = raw.get("architectures") or []
    ends = (LANGUAGE_MODEL.lower(), CLASSIFIER.lower())
    if not isinstance(kinds, list) or not any(all(str(kind).lower().endswith(end) for kind in kinds) for end in ends):
        why = f"only a ...{LANGUAGE_MODEL}, or a ...{CLASSIFIER} with one label, can be trained here"
        raise k.refuse("architectures", kinds, why)
    if _is_classifier(raw):
        _check_labels(raw, k)
    old, new = raw.get("rope_scaling"), raw.get("rope_parameters")
    if old and new and old != new:
        raise k.refuse("rope_scaling", old, "differs from rope_parameters; keep one of them")
    theta = raw.get("rope_theta")
    inner = (new if isinstance(new, dict) else {}).get("rope_theta")
    if theta is not None and inner is not None and theta != inner:
        raise k.refuse("rope_theta", theta, f"differs from rope_parameters.rope_theta = {inner}; keep one of them")


def _auto_config(folder: Path) -> dict[str, Any]:
    with quiet():
        from transformers import AutoConfig

        try:
            # A dict, never attributes: for some families plain attributes raise or are ambiguous.
            return AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True).to_dict()
        # transformers raises anything from KeyError to its own validation errors for a config it does not like.
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"{folder / 'config.json'}: {lines[-1].strip()}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers from writing to the terminal; what goes wrong is raised as an error."""
    logger = logging.getLogger("transformers")
    # Importing transformers sets its logger's level and then logs "PyTorch was not found"; only a filter survives that.
    logger.addFilter(_nothing)
    try:
        from transformers.utils import logging as transformers_logging

        level = transformers_logging.get_verbosity()
    finally:
        logger.removeFilter(_nothing)
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)


def _nothing(record: logging.LogRecord) -> bool:
    return False
