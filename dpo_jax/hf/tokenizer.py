"""The tokenizer of a Hugging Face folder, and what the folder says about generating text."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.data.tokenizer import Tokenizer
from dpo_jax.errors import UserError
from dpo_jax.hf.configs import quiet
from dpo_jax.hf.tensors import SIDE_FILES, local_folder, one_line, read_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(folder_or_hub_id: str | Path, template: str | None = None) -> Tokenizer:
    """The tokenizer of a folder or hub repository, a `PreTrainedTokenizerBase` of transformers.

    Args:
      folder_or_hub_id: where it is.
      template: a chat template to use instead of the folder's: the path of a Jinja file.

    Raises:
      UserError: the folder has no tokenizer, or one that needs code of its own.
    """
    folder = local_folder(folder_or_hub_id, SIDE_FILES)
    _check(folder)
    with quiet():
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        # The classes behind AutoTokenizer raise whatever their parsers raise.
        except Exception as error:
            raise UserError(f"{folder}: the tokenizer cannot be loaded ({one_line(error)}); fetch it again") from error
    if template is not None:
        tokenizer.chat_template = _template(Path(template))
    return tokenizer


def _check(folder: Path) -> None:
    if not any(os.path.lexists(folder / name) for name in TOKENIZER_FILES):
        raise UserError(f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the model's tokenizer files")
    if not os.path.lexists(folder / "tokenizer_config.json"):
        return
    if "auto_map" in read_json(folder, "tokenizer_config.json"):
        raise UserError(f"{folder / 'tokenizer_config.json'}: auto_map: the tokenizer brings its own code, never run")


def _template(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat template {path} cannot be read ({one_line(error)}); give a Jinja file") from error


class GenerationSettings(NamedTuple):
    """How a folder wants its model sampled; `eos` are all tokens that end a text."""

    eos: tuple[int, ...]
    bos: int | None
    pad: int | None
    do_sample: bool
    temperature: float
    top_p: float
    top_k: int


def generation_settings(folder: str | Path, tokenizer: Tokenizer | None = None) -> GenerationSettings:
    """Token ids and sampling of a folder, each from the first that says so.

    Those are `generation_config.json`, then `config.json`, then the tokenizer (ids only), then transformers' defaults
    (no sampling, temperature 1, top_p 1, top_k 50).

    Raises:
      UserError: a value is not of its kind.
    """
    folder = Path(folder)
    files = [name for name in ("generation_config.json", "config.json") if os.path.lexists(folder / name)]
    tables = [(folder / name, read_json(folder, name)) for name in files]

    def first(key: str, fits: Callable[[Any], bool], default: object) -> Any:
        for file, table in tables:
            if table.get(key) is not None:
                if not fits(table[key]):
                    raise UserError(f"{file}: {key} = {table[key]!r} will not do; correct it")
                return table[key]
        return default

    eos = first("eos_token_id", _is_ids, getattr(tokenizer, "eos_token_id", None))
    return GenerationSettings(
        eos=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        bos=first("bos_token_id", _is_id, getattr(tokenizer, "bos_token_id", None)),
        pad=first("pad_token_id", _is_id, getattr(tokenizer, "pad_token_id", None)),
        do_sample=first("do_sample", lambda value: isinstance(value, bool), False),
        temperature=float(first("temperature", lambda value: _is_number(value) and value >= 0, 1.0)),
        top_p=float(first("top_p", lambda value: _is_number(value) and 0 < value <= 1, 1.0)),
        top_k=first("top_k", _is_id, 50),
    )


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_ids(value: object) -> bool:
    return _is_id(value) or (isinstance(value, list) and bool(value) and all(_is_id(item) for item in value))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
