"""Tokenizers and chat templates of a folder that nobody vouches for: tried before they are used, and bounded in use."""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_jax.data.messages import Messages
from dpo_jax.data.tokenizer import Tokenizer
from dpo_jax.errors import UserError, one_line
from dpo_jax.limits import Died, bounded, tried

MOST_TEMPLATE = 1 << 20
"""Characters of a chat template."""
RENDER_SECONDS = 10.0
"""For one conversation, which takes a millisecond."""
ANSWER = 1 << 20
"""Characters that a template may write around what it was given, and for each character of that `AROUND` more."""
AROUND = 64
MOST_IDS = 1 << 24
"""Largest number of a token; transformers makes a list of all up to the largest."""
WORDS = ("a", "Aa ", "1", " ", "\n", "\t\r\n ", ".", "'s ", "_-", "\u00e9", "\u4e2d", "\U0001f600", "\x00")
"""What texts are made of that a tokenizer is first tried on: backtracking shows on long runs of like characters."""
TURNS: tuple[Messages, ...] = (
    [{"role": "user", "content": "a"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e"},
    ],
)
"""Conversations that a template is first tried on."""


def try_tokenizer(path: str) -> None:
    """Loads a `tokenizer.json` and makes tokens of texts of many kinds. For `limits.tried`; raises what it raises."""
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(path)
    largest = max(backend.get_vocab().values(), default=0)
    if largest > MOST_IDS:
        raise ValueError(f"a token has number {largest}, and there are {backend.get_vocab_size()}")
    for word in WORDS:
        for text in (word, word * 40 + "!", word * (2000 // len(word))):
            ids = backend.encode(text).ids
            if len(ids) > ANSWER:
                raise ValueError(f"{len(ids)} tokens of {len(text)} characters")
            backend.decode(ids)


def try_template(sources: Sequence[str]) -> None:
    """Compiles and renders chat templates in an environment like transformers' own. For `limits.tried`.

    What they raise matters here no more than what they write: a true render says it, with the row.
    """
    for source in sources:
        template = _compiled(source)
        if template is None:
            continue
        for turns in TURNS:
            for asking in (False, True):
                given = {"messages": turns, "add_generation_prompt": asking, "bos_token": "<s>", "eos_token": "</s>"}
                try:
                    text = template.render(**given, tools=None, documents=None)
                except MemoryError:
                    raise
                except Exception:
                    continue
                if len(text) > ANSWER:
                    raise ValueError(f"it writes {len(text)} characters around a short conversation")


def _compiled(source: str) -> Any:
    """A template in an environment like transformers' own; None where it is no template."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise ValueError(message)

    def strftime_now(form: str) -> str:
        return form

    def to_json(value: object, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **options)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    source = source.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    try:
        return environment.from_string(source)
    except MemoryError:
        raise
    except Exception:
        return None


@functools.lru_cache(maxsize=64)
def check_template(*sources: str) -> None:
    """Tries chat templates in a process of their own, once for each text.

    Raises:
      UserError: one is too long, loops, or takes too much memory.
    """
    longest = max((len(source) for source in sources), default=0)
    if longest > MOST_TEMPLATE:
        raise UserError(
            f"the chat template has {longest} characters, more than the {MOST_TEMPLATE} that one may have; "
            "give another with data.template"
        )
    try:
        tried(try_template, list(sources))
    except Died as error:
        raise UserError(f"the chat template {error} on a short conversation; give another with data.template") from None


def apply_template(tokenizer: Tokenizer, chat: Messages, where: str, **options: Any) -> Any:
    """`tokenizer.apply_chat_template(chat, **options)`, within limits of time, memory and output.

    What the template writes is looked at before any tokens are made of it.

    Raises:
      UserError: it took more than `RENDER_SECONDS`, or wrote more than a template would; begins with `where`.
      Exception: whatever the template raises.
    """
    what = f"{where}: the chat template"
    plain = {name: value for name, value in options.items() if name not in ("return_dict", "sanitize_control_tokens")}
    with bounded(what, seconds=RENDER_SECONDS):
        text = tokenizer.apply_chat_template(chat, **{**plain, "tokenize": False})
    most = ANSWER + AROUND * _characters([chat, options])
    if len(text) > most:
        raise UserError(f"{what} writes {len(text)} characters, more than {most}; give another with data.template")
    if not options.get("tokenize", True):
        return text
    with bounded(what, seconds=RENDER_SECONDS):
        return tokenizer.apply_chat_template(chat, **options)


def ids_of(tokenizer: Tokenizer, texts: list[str], **options: bool) -> list[list[int]]:
    """Token ids of each text.

    Raises:
      UserError: the tokenizer gave up on one: its own code, which is Rust, has panicked.
    """
    try:
        return tokenizer(texts, return_attention_mask=False, verbose=False, **options)["input_ids"]
    except BaseException as error:  # a panic of Rust is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"the tokenizer failed on a text ({one_line(error)[:300]}); fetch it again") from error


def _characters(value: object) -> int:
    """Characters of all texts in lists and tables."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(key) + _characters(one) for key, one in value.items() if isinstance(key, str))
    return sum(_characters(one) for one in value) if isinstance(value, list | tuple) else 0
