"""A reward model that was made of a language model's folder: which tensors it takes over, and how it is written.

In transformers it is the family's ...ForSequenceClassification with one label: the same trunk, `score.weight` instead
of `lm_head.weight`, and no bias.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dpo_jax import trees
from dpo_jax.hf.configs import classifier_of, read_spec
from dpo_jax.hf.mapping import SCORE, Claims, Scheme, TensorEntry, claim, names
from dpo_jax.hf.tensors import TensorInfo, read_json
from dpo_jax.hf.tokenizer import TOKENIZER_FILES, load_tokenizer
from dpo_jax.model.decoder import abstract_params
from dpo_jax.model.spec import DecoderSpec

LABELS = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


def head_is_new(spec: DecoderSpec, folder: Path) -> bool:
    """Whether the model has a scalar head that the folder, a language model's, cannot give it."""
    return spec.scalar_head and not read_spec(folder).scalar_head


def claim_decoder(spec: DecoderSpec, infos: dict[str, TensorInfo], where: str, scheme: Scheme) -> Claims:
    """What a reward model takes over of a language model's folder: every weight but the head, under any name.

    Raises:
      UserError: as `claim`, for the whole language model.
    """
    whole = claim(dataclasses.replace(spec, scalar_head=False), infos, where, scheme)
    leaves = trees.paths(abstract_params(spec))
    entries = {name: entry for name, entry in whole.entries.items() if entry.parts[0].leaf in leaves}
    return Claims(entries, {}, whole.carried)


def with_score(
    spec: DecoderSpec, claims: Claims, infos: Mapping[str, TensorInfo], scheme: Scheme
) -> tuple[Claims, dict[str, TensorInfo]]:
    """The tensors of the reward model's own folder, from `claim_decoder` of the language model's and its tensors.

    Each has the name that transformers looks for (an embedding may have stood under the head's). The score comes last,
    in the embedding's dtype, in the last file or the one that held nothing but the head.
    """
    table = {entry.parts: entry for entry in names(spec, scheme.naming)}
    renamed = {name: table[entry.parts].name for name, entry in claims.entries.items()}
    renamed |= {name: name for name in claims.carried}
    kept = {renamed[name]: info for name, info in infos.items() if name in renamed}
    used = {info.file for info in kept.values()}
    emptied = [info.file for info in infos.values() if info.file not in used]
    file = emptied[0] if emptied else list(infos.values())[-1].file
    kept[SCORE] = TensorInfo(file, _embedding(table.values(), kept).dtype, (1, spec.head_width))
    return Claims({entry.name: entry for entry in table.values()}, {}, claims.carried), kept


def _embedding(entries: Iterable[TensorEntry], infos: Mapping[str, TensorInfo]) -> TensorInfo:
    return next(infos[entry.name] for entry in entries if entry.parts[0].leaf == "embed/embedding")


def reward_config(spec: DecoderSpec, folder: Path) -> dict[str, Any]:
    """The `config.json` of a language model's folder, as that of a classifier with one label.

    Raises:
      UserError: the padding token must be asked of the folder's tokenizer, which cannot be loaded.
    """
    config = read_json(folder, "config.json")
    kept = {name: value for name, value in config.items() if name not in ("num_labels", "problem_type")}
    return {
        **kept,
        "architectures": [classifier_of(config["model_type"])],
        **LABELS,
        "pad_token_id": _padding(spec, folder, config),
    }


def _padding(spec: DecoderSpec, folder: Path, config: Mapping[str, Any]) -> int | None:
    """The config's padding token, or else the tokenizer's, or else a token that ends texts; None if there is none."""

    def fits(token: object) -> bool:
        return isinstance(token, int) and not isinstance(token, bool) and 0 <= token < spec.vocab_size

    if fits(config.get("pad_token_id")):  # older llama folders say -1, which no token is
        return config["pad_token_id"]
    known = any(os.path.lexists(folder / name) for name in TOKENIZER_FILES)
    tokenizer = load_tokenizer(folder) if known else None
    end = getattr(tokenizer, "eos_token_id", None)
    # A trap: transformers reads a score at the rightmost token that is not padding, in a single row too. A text that
    # ends in its padding token is read one token early. So of several that end texts, the tokenizer's own comes last.
    ends = sorted(_ends(config), key=lambda token: token == end)
    return next((token for token in (getattr(tokenizer, "pad_token_id", None), *ends, end) if fits(token)), None)


def _ends(config: Mapping[str, Any]) -> list[Any]:
    """Tokens that end texts."""
    value = config.get("eos_token_id")
    return value if isinstance(value, list) else [value]


def padding_note(config: Mapping[str, Any]) -> str:
    """What a reader of the model card must know about padding; empty if nothing."""
    token = config.get("pad_token_id")
    if token is None:
        return "`config.json` has no `pad_token_id`, without which transformers scores one text at a time."
    if token not in _ends(config):
        return ""
    return (
        f"Token {token} pads and may also end a text. transformers reads the score at the rightmost token other than\n"
        "`pad_token_id`, so it reads a text that ends in this token too early: to score such texts, pad with another\n"
        "token and set `pad_token_id` of the model's config to it."
    )
