"""The tokenizer of a Hugging Face folder, and what the folder says about generating text."""

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.data.strangers import MOST_TEMPLATE, check_template, try_tokenizer
from dpo_jax.data.tokenizer import Tokenizer
from dpo_jax.errors import UserError, printable
from dpo_jax.hf import beside, bounds
from dpo_jax.hf.configs import check_readable, quiet
from dpo_jax.hf.tensors import SIDE_FILES, local_folder, one_line, read_json
from dpo_jax.limits import Died, tried

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
MOST_BYTES = {".jinja": 4 * MOST_TEMPLATE, ".json": 256 << 20, ".txt": 256 << 20, ".model": 256 << 20}
"""Of a file that a tokenizer is read from, by the end of its name."""
WHOLE_SECONDS, WHOLE_MEMORY = 30.0, 6 << 30
"""For a try that imports transformers, and what that imports."""


def load_tokenizer(folder_or_hub_id: str | Path, template: str | None = None) -> Tokenizer:
    """The tokenizer of a folder or hub repository, a `PreTrainedTokenizerBase` of transformers.

    It is loaded and used in another process first, which may die of it, and so is its chat template.

    Args:
      folder_or_hub_id: where it is.
      template: a chat template to use instead of the folder's: the path of a Jinja file.

    Raises:
      UserError: the folder has no tokenizer, one that needs code of its own, or one that cannot be used; or its chat
        template does not end, or writes far more than a template does.
    """
    folder = local_folder(folder_or_hub_id, SIDE_FILES)
    _check(folder)
    with quiet():
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
            _use(tokenizer)
        except BaseException as error:
            raise _unloadable(folder, error) from error
    if template is not None:
        tokenizer.chat_template = read_template(template)
    own = tokenizer.chat_template
    try:
        check_template(*(own.values() if isinstance(own, Mapping) else [own] if own is not None else []))
    except UserError as error:
        raise UserError(f"{folder if template is None else template}: {error}") from error
    return tokenizer


def _unloadable(folder: Path, error: BaseException) -> BaseException:
    """What to raise for an error of the classes behind AutoTokenizer, which raise whatever their parsers raise.

    A panic of Rust is no Exception.
    """
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        return error
    try:
        check_readable(folder)  # which AutoTokenizer reads too
    except UserError as of_config:
        return of_config
    return UserError(f"{folder}: the tokenizer cannot be loaded ({one_line(error)[:300]}); fetch it again")


def _use(tokenizer: Any) -> None:
    """What everyone asks of a tokenizer, so that what cannot be asked shows here."""
    own = tokenizer.chat_template
    texts = list(own.values()) if isinstance(own, Mapping) else [own]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise TypeError(f"chat_template is {type(own).__name__}, not text")
    if not isinstance(tokenizer.model_max_length, int | float):
        raise TypeError(f"model_max_length is {tokenizer.model_max_length!r}, not a number")
    if not all(isinstance(token, int | None) for token in (tokenizer.eos_token_id, tokenizer.bos_token_id)):
        raise TypeError("eos_token or bos_token is no single token")
    ids = tokenizer(["a", "a b"], return_attention_mask=False, verbose=False)["input_ids"]
    tokenizer.decode(ids[0])
    if not isinstance(tokenizer.special_tokens_map, Mapping) or len(tokenizer) < 1:
        raise TypeError("there are no tokens")


def _check(folder: Path) -> None:
    """What is to be known before transformers sees the folder."""
    beside.check_kind(folder)
    names = beside.files(folder)
    if not any(name in names for name in TOKENIZER_FILES):
        raise UserError(f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the model's tokenizer files")
    for name in names:
        size, most = (folder / name).stat().st_size, MOST_BYTES.get(Path(name).suffix, 0)
        if 0 < most < size:
            raise UserError(f"{folder / name} has {size} bytes, more than the {most} that such a file may have")
    if "config.json" in names:  # which AutoTokenizer has AutoConfig read
        bounds.check(read_json(folder, "config.json"), folder / "config.json")
    if "tokenizer_config.json" in names and "auto_map" in read_json(folder, "tokenizer_config.json"):
        raise UserError(f"{folder / 'tokenizer_config.json'}: auto_map: the tokenizer brings its own code, never run")
    stamps = ((folder / name).stat() for name in names)
    _try(folder, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in zip(names, stamps, strict=True)))


@functools.lru_cache(maxsize=64)
def _try(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> None:
    """Loads the tokenizer in another process; once for files of these names, sizes and times."""
    names = {name for name, *_ in stamps}
    try:
        if "tokenizer.json" in names:
            tried(try_tokenizer, str((folder / "tokenizer.json").resolve()))
        else:  # which only transformers can make a tokenizer of
            tried(_try_whole, str(folder.resolve()), seconds=WHOLE_SECONDS, memory=WHOLE_MEMORY)
    except Died as error:
        where = folder / "tokenizer.json" if "tokenizer.json" in names else folder
        raise UserError(
            f"{where}: the tokenizer cannot be loaded: it {printable(str(error))}; fetch it again"
        ) from None


def _try_whole(folder: str) -> None:
    from transformers import AutoTokenizer

    _use(AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True))


def read_template(name: str) -> str:
    """The chat template of `data.template`.

    Raises:
      UserError: the file is not there, or is no text.
    """
    path = Path(name)
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        remedy = "give a Jinja file, or leave it out for the model's own"
        raise UserError(f"data.template: {path}: no such file; {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.template: {path} cannot be read ({one_line(error)}); give a Jinja file") from error


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
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_ids(value: object) -> bool:
    return _is_id(value) or (isinstance(value, list) and bool(value) and all(_is_id(item) for item in value))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
