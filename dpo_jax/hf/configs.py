"""A folder's `config.json`: what must not be in it, and the decoder that it describes.

Every key must be used, required to have a harmless value, or known not to change what the model computes; any other
key is an error, because a key that is passed over in silence is how a model trains wrongly without a word.
"""

import contextlib
import copy
import dataclasses
import functools
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.hf import bounds
from dpo_jax.hf.beside import check_kind
from dpo_jax.hf.families import FAMILIES, Family
from dpo_jax.hf.keys import AGAIN, FIXED, HARMLESS, MOVED, REQUIRED, Keys
from dpo_jax.hf.quantisation import KEY, method_of
from dpo_jax.hf.tensors import SIDE_FILES, local_folder, read_bytes, read_json, tensor_names
from dpo_jax.model.spec import DecoderSpec

LANGUAGE_MODEL, CLASSIFIER, WRAPPER = "ForCausalLM", "ForSequenceClassification", "ForConditionalGeneration"
"""What the names of transformers' classes end with: a head over the vocabulary, one over labels, and a decoder for text
behind towers for images or sound."""
HEADS = (LANGUAGE_MODEL, CLASSIFIER, WRAPPER, "LMHeadModel")

WRAPPERS = {"gemma3": "gemma3_text", "gemma4": "gemma4_text", "mistral3": "mistral", "qwen3_5": "qwen3_5_text"}
"""`model_type`s whose `text_config` is a family's, and which one where it does not say; the rest of such a model is
carried along, and never computed."""


def read_spec(folder: str | Path, *, scalar_head: bool | None = None) -> DecoderSpec:
    """The decoder that a folder's `config.json` describes, in either style (`rope_theta` or `rope_parameters`).

    Args:
      folder: of a language model, of a model with a decoder for text (a ...ForConditionalGeneration), or of a reward
        model: a ...ForSequenceClassification with one label.
      scalar_head: None takes the head that the folder has. True gives the spec of a reward model, also for a language
        model's folder, which `load_hf` then starts with a new head. False refuses a reward model.

    Raises:
      UserError: the family is not supported, or a key is unknown or has a value that is not supported.
    """
    folder = Path(folder)
    check_kind(folder)
    file, raw = folder / "config.json", read_json(folder, "config.json")
    bounds.check(raw, file)
    _check_raw(raw, Keys(raw, file), file)
    spec = _decoder(folder, raw)
    own = _is_classifier(raw)
    if own and scalar_head is False:
        why = f"a reward model, which scores texts and writes none; give a ...{LANGUAGE_MODEL}"
        raise Keys(raw, file).refuse("architectures", raw["architectures"], why)
    if scalar_head and not own:
        _check_reward(raw, Keys(raw, file))
    return dataclasses.replace(spec, scalar_head=own if scalar_head is None else scalar_head)


def find_model(folder_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a model, or the hub repository of that name (and revision), downloaded; one that cannot be read is
    refused by its small files, before the weights are downloaded.

    Raises:
      UserError: it cannot be had, or as `read_spec`.
    """
    if not Path(folder_or_hub_id).expanduser().is_dir():
        read_spec(local_folder(folder_or_hub_id, SIDE_FILES, revision))
    return local_folder(folder_or_hub_id, revision=revision)


def family_of(folder: Path) -> Family:
    """The row of the folder's family, or of the family of its decoder for text."""
    raw = read_json(folder, "config.json")
    return FAMILIES[_text_type(raw, Keys(raw, folder / "config.json"))]


def is_wrapper(folder: Path) -> bool:
    """Whether the folder's model has more to it than a decoder for text."""
    return read_json(folder, "config.json").get("model_type") in WRAPPERS


def _decoder(folder: Path, raw: dict[str, Any]) -> DecoderSpec:
    file = folder / "config.json"
    config = copy.deepcopy(_auto_config(folder, read_bytes(file)))
    config.pop(KEY, None)  # `_check_raw` has judged it
    swallowed = _swallowed(raw, config)
    if raw["model_type"] in WRAPPERS:
        inner, outer = config["text_config"], config
        swallowed |= _swallowed(raw.get("text_config") or {}, inner)
        config = {**inner, "tie_word_embeddings": _is_tied(folder, raw, outer)}
    Keys(swallowed, file).finish(HARMLESS | frozenset(REQUIRED))
    keys = Keys(config, file, "text_config." if raw["model_type"] in WRAPPERS else "")
    keys.require(FIXED.get(config["model_type"], {}))
    spec = FAMILIES[config["model_type"]].read(keys)
    keys.require(REQUIRED)
    keys.agree(AGAIN)
    keys.finish(HARMLESS)
    return spec


def _is_tied(folder: Path, raw: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether the head of a wrapped decoder is its embedding.

    Where neither the config nor its `text_config` says so, transformers takes them for tied, and then lets a head that
    is in the folder be a head of its own.
    """
    for table in (raw, raw.get("text_config") or {}):
        if isinstance(table.get("tie_word_embeddings"), bool):
            return table["tie_word_embeddings"]
    return bool(config.get("tie_word_embeddings")) and not any(
        re.fullmatch(r"(.*\.)?lm_head\.(q?weight|weight_packed)", name) for name in tensor_names(folder)
    )


def _swallowed(raw: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Keys that `AutoConfig` did not give back, not even with the same value under the family's own name."""
    with quiet():
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    own = CONFIG_MAPPING[config["model_type"]].attribute_map
    left = {name: value for name, value in raw.items() if name not in config and name not in MOVED and name != KEY}
    return {name: value for name, value in left.items() if config.get(own.get(name, ""), ...) != value}


def _text_type(raw: dict[str, Any], k: Keys) -> str:
    """`model_type` of the decoder; refuses one that is not supported."""
    kind = raw.get("model_type")
    if isinstance(kind, str) and kind in WRAPPERS:
        inner = raw.get("text_config")
        kind = (inner if isinstance(inner, dict) else {}).get("model_type") or WRAPPERS[kind]
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(sorted([*FAMILIES, *WRAPPERS]))
        raise k.refuse("model_type", kind, f"not supported; supported: {known}")
    return kind


def _is_classifier(raw: dict[str, Any]) -> bool:
    return any(str(kind).lower().endswith(CLASSIFIER.lower()) for kind in raw.get("architectures") or [])


def classifier_of(model_type: str) -> str | None:
    """Name of transformers' ...ForSequenceClassification of a family; None if there is none."""
    with quiet():
        from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as known

    return known.get(model_type)


def _check_reward(raw: dict[str, Any], k: Keys) -> None:
    """A reward model is written as transformers' classifier of the family, so there must be one, of text alone."""
    kind = raw["model_type"]
    if kind in WRAPPERS:
        raise k.refuse("model_type", kind, "a reward model is made of a text model; give one without other towers")
    if classifier_of(kind) is None:
        why = f"transformers has no ...{CLASSIFIER} of this family, so a reward model could not be read back"
        raise k.refuse("model_type", kind, why)


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


def _check_raw(raw: dict[str, Any], k: Keys, file: Path) -> None:
    """What must be known before transformers sees the folder, and what it would settle in silence."""
    if "auto_map" in raw:
        why = "the model brings its own code, never run; if transformers knows the family, remove the key from a copy"
        raise k.refuse("auto_map", raw["auto_map"], why)
    if "configuration_files" in raw:
        raise k.refuse("configuration_files", raw["configuration_files"], "the whole config must stand in config.json")
    _text_type(raw, k)
    kinds = raw.get("architectures") or []
    ends = tuple(end.lower() for end in HEADS)
    if not isinstance(kinds, list) or not any(all(str(kind).lower().endswith(end) for kind in kinds) for end in ends):
        why = f"only a ...{LANGUAGE_MODEL}, or a ...{CLASSIFIER} with one label, can be trained here"
        raise k.refuse("architectures", kinds, why)
    if _is_classifier(raw):
        _check_labels(raw, k)
    method_of(raw, file)
    _check_rope(raw, k)


def _check_rope(raw: dict[str, Any], k: Keys) -> None:
    old, new = raw.get("rope_scaling"), raw.get("rope_parameters")
    if old and new and old != new:
        raise k.refuse("rope_scaling", old, "differs from rope_parameters; keep one of them")
    theta = raw.get("rope_theta")
    inner = (new if isinstance(new, dict) else {}).get("rope_theta")
    if theta is not None and inner is not None and theta != inner:
        raise k.refuse("rope_theta", theta, f"differs from rope_parameters.rope_theta = {inner}; keep one of them")


@functools.lru_cache(maxsize=32)
def _auto_config(folder: Path, _content: bytes) -> dict[str, Any]:
    """What transformers makes of a folder's `config.json`, as long as that has this content."""
    with quiet():
        from transformers import AutoConfig

        try:
            # A dict, never attributes: for some families plain attributes raise or are ambiguous.
            return AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True).to_dict()
        # transformers raises anything from KeyError to its own validation errors for a config it does not like.
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"{folder / 'config.json'}: {lines[-1].strip()}") from error


def check_readable(folder: Path) -> None:
    """Raises UserError where transformers cannot make anything of a `config.json` that is there."""
    if (folder / "config.json").exists():
        _auto_config(folder, read_bytes(folder / "config.json"))


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
