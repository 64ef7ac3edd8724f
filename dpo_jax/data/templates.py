"""Prompts and completions as token ids: chat templates, plain texts, and where a completion ends.

The prompt's ids are those that a model is given when it is asked: the chat with the template's generation prompt, or
the text with the tokenizer's own first tokens (BOS). Prompt and completion together are tokenised as one, and the
completion is what follows the prompt's ids. Where they are no prefix (thinking templates, merges across the seam),
the prompt ends at the longest common prefix of all, as in TRL, and the row is counted.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from dpo_jax.data.layouts import Record
from dpo_jax.data.messages import BadRow, Messages, Part, is_chat, shared_length, texts_of
from dpo_jax.data.report import clean
from dpo_jax.data.strangers import apply_template, check_template, ids_of
from dpo_jax.data.tokenizer import Tokenizer
from dpo_jax.errors import UserError
from dpo_jax.files import digest_of

Ending = Literal["terminator", "template"]
PROBE = "dpojaxprobe"
T = TypeVar("T")


class Tokens(NamedTuple):
    """One record in token ids. Completions are in the record's order and are not truncated."""

    prompt: list[int]
    completions: list[list[int]]
    notes: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Turn:
    """How a template ends an assistant's turn: a special token (None: it has none), and the ids that follow it."""

    terminator: int | None = None
    rest: tuple[int, ...] = ()


@dataclass(frozen=True)
class Codec:
    """A tokenizer and what was found out about it.

    Attributes:
      tokenizer: of transformers.
      template: chat template that is used instead of the tokenizer's own.
      control_tokens: "text" keeps control tokens in row text as text; "tokens" lets them be control tokens.
      ending: "terminator", or "template": a chat's completion keeps all that the template writes after the answer.
      control: finds control tokens in a text.
      before: ids that the tokenizer puts before a text (BOS, or nothing).
      turn: how the template ends a turn.
      special: ids of all special tokens.
      eos: EOS token, with its id; None where there is none.
      bos: id of the BOS token, or None.
      size: how many ids there are.
      reserved: names that a row's template arguments may not have.
      arguments: of the template, for every row; a row's own go before them.
    """

    tokenizer: Tokenizer
    template: str | None
    control_tokens: Literal["text", "tokens"]
    ending: Ending
    control: re.Pattern
    before: tuple[int, ...]
    turn: Turn
    special: frozenset[int]
    # Of the tokenizer, which takes long to say each of them.
    eos: tuple[str, int] | None
    bos: int | None
    size: int
    reserved: frozenset[str]
    arguments: Mapping[str, Any]


def codec(
    tokenizer: Tokenizer,
    *,
    template: str | None,
    control_tokens: Literal["text", "tokens"],
    ending: Ending,
    arguments: Mapping[str, Any] | None = None,
) -> Codec:
    """Find out how a tokenizer and its template begin a text and end a turn."""
    if control_tokens == "text" and "sanitize_control_tokens" not in _arguments(tokenizer):
        raise UserError(
            "this transformers cannot keep control tokens as text; upgrade it, or data.control_tokens=tokens"
        )
    source = template_source(tokenizer, template)
    if source:
        check_template(source)
    special = special_ids(tokenizer)
    return Codec(
        tokenizer=tokenizer,
        template=template,
        control_tokens=control_tokens,
        ending=ending,
        control=_control_pattern(tokenizer, source or ""),
        before=_before(tokenizer),
        turn=_turn(tokenizer, template, special, arguments or {}) if source else Turn(),
        special=special,
        eos=_eos(tokenizer),
        bos=tokenizer.bos_token_id,
        size=len(tokenizer),
        reserved=reserved_arguments(tokenizer),
        arguments=arguments or {},
    )


def reserved_arguments(tokenizer: Tokenizer) -> frozenset[str]:
    """Names that belong to the call of a template, and are not for rows or runs to set."""
    return frozenset({*_arguments(tokenizer), *tokenizer.special_tokens_map, "messages"})


def _eos(tokenizer: Tokenizer) -> tuple[str, int] | None:
    token, number = tokenizer.eos_token, tokenizer.eos_token_id
    return None if token is None or number is None else (token, number)


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that are tokens of their own and no text: more than the named ones, `all_special_ids`."""
    return frozenset(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)


def template_source(tokenizer: Tokenizer, template: str | None) -> str | None:
    """Text of the chat template in use; of all of them, where the tokenizer has several by name."""
    own = template if template is not None else tokenizer.chat_template
    if isinstance(own, Mapping):
        return "\n".join(own[name] for name in sorted(own))
    return own


def template_digest(tokenizer: Tokenizer, template: str | None) -> str:
    """Digest of the chat template, for the report and the cache."""
    source = template_source(tokenizer, template)
    return digest_of(source) if source else ""


def _arguments(tokenizer: Tokenizer) -> frozenset[str]:
    return frozenset(inspect.signature(tokenizer.apply_chat_template).parameters)


def _control_pattern(tokenizer: Tokenizer, source: str) -> re.Pattern:
    """Special tokens, and added tokens that the template writes: what `sanitize_control_tokens` takes for control."""
    listed = set(getattr(tokenizer, "chat_control_tokens", None) or ())
    texts = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.content.strip() and (token.special or token.content in listed or token.content in source)
    ]
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _ids(tokenizer: Tokenizer, texts: list[str], **options: bool) -> list[list[int]]:
    if not texts:
        return []
    return ids_of(tokenizer, texts, **options)


def _before(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids before a text. What a tokenizer puts after one (EOS) is left to us."""
    (bare,), (whole,) = (_ids(tokenizer, ["a"], add_special_tokens=special) for special in (False, True))
    starts = [at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare]
    if not starts:  # the text is tokenised otherwise after BOS (a prefix space)
        return (whole[0],) if whole[:1] == [tokenizer.bos_token_id] else ()
    return tuple(whole[: starts[0]])


def _turn(tokenizer: Tokenizer, template: str | None, special: frozenset[int], arguments: Mapping[str, Any]) -> Turn:
    """Render a probe and look at what the template writes after the assistant's words."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
    try:
        text = apply_template(tokenizer, messages, "a probe", chat_template=template, tokenize=False, **arguments)
    except UserError:  # it does not end
        raise
    except Exception:  # a template may raise anything; rows that need it will say so, with file and line
        return Turn()
    (ids,) = _ids(tokenizer, [text], add_special_tokens=False)
    (head,) = _ids(tokenizer, [text[: text.rfind(PROBE) + len(PROBE)]], add_special_tokens=False)
    tail = range(shared_length(ids, head), len(ids))
    at = next((at for at in tail if ids[at] in special), None)
    return Turn() if at is None else Turn(ids[at], tuple(ids[at + 1 :]))


# ------------------------------------------------------------------------------------------------ records


@dataclass(frozen=True)
class _Job:
    """A record's prompt and its prompt with each completion, as texts to tokenise or as ids where that is done."""

    kind: Literal["text", "chat", "ids"]
    sequences: Sequence[str | list[int]]
    notes: tuple[tuple[str, str], ...]


def tokenize(records: Sequence[Record], codec: Codec) -> list[Tokens | BadRow]:
    """Token ids of each record, or why there are none. All texts of a kind are tokenised in one call.

    A record without completions is a prompt to be answered.

    Raises:
      UserError: rows are conversations and there is no chat template, or texts and there is no EOS token.
    """
    jobs = [_job(record, codec) for record in records]
    ids = {"text": _batch(jobs, "text", codec), "chat": _batch(jobs, "chat", codec)}
    return [job if isinstance(job, BadRow) else _caught(_tokens, _with_ids(job, ids), codec) for job in jobs]


def _caught(function: Callable[..., T], *arguments: object) -> T | BadRow:
    try:
        return function(*arguments)
    except BadRow as error:
        return error


def _batch(jobs: Iterable[_Job | BadRow], kind: str, codec: Codec) -> Iterator[list[int]]:
    mine = [job for job in jobs if isinstance(job, _Job) and job.kind == kind]
    texts = [text for job in mine for text in job.sequences if isinstance(text, str)]
    split = kind == "text" and codec.control_tokens == "text"
    return iter(_ids(codec.tokenizer, texts, add_special_tokens=False, split_special_tokens=split))


def _with_ids(job: _Job, ids: Mapping[str, Iterator[list[int]]]) -> _Job:
    found = [next(ids[job.kind]) if isinstance(part, str) else part for part in job.sequences]
    return _Job(job.kind, found, job.notes)


def _job(record: Record, codec: Codec) -> _Job | BadRow:
    first = record.completions[0] if record.completions else record.prompt
    make = _text_job if isinstance(first, str) else _chat_job if is_chat(first) else _ids_job
    return _caught(make, record, codec)


def _ids_job(record: Record, codec: Codec) -> _Job:
    """Ids are used as they are; a prompt and its completions are joined only for the shape's sake."""
    size = codec.size
    prompt, *completions = (
        [token for token in part if isinstance(token, int)] for part in (record.prompt, *record.completions)
    )
    for token in (token for part in (prompt, *completions) for token in part):
        if not 0 <= token < size:
            raise BadRow("token id out of range", f"{token}; the tokenizer has ids 0 to {size - 1}")
    return _Job("ids", [prompt, *([*prompt, *completion] for completion in completions)], record.notes)


def _text_job(record: Record, codec: Codec) -> _Job:
    if record.completions and codec.eos is None:
        raise UserError(f"{_where(record)}: the tokenizer has no EOS token to end a text; set eos_token in its config")
    eos = codec.eos[0] if codec.eos else ""
    completions = [without_eos(str(text), eos) for text in record.completions]
    if not all(text.strip() for text in completions):
        raise BadRow("empty completion", "a completion holds nothing but the EOS token")
    notes = record.notes + _control_note([str(record.prompt), *completions], codec)
    return _Job("text", [str(record.prompt), *(f"{record.prompt}{text}" for text in completions)], notes)


def without_eos(text: str, eos: str) -> str:
    """The text without EOS tokens that are written out at its end, so that exactly one can follow as a token."""
    while eos and text.endswith(eos):
        text = text.removesuffix(eos)
    return text


def _where(record: Record) -> str:
    return f"{clean(record.file, 400)}:{record.line}"


def _control_note(texts: Iterable[str], codec: Codec) -> tuple[tuple[str, str], ...]:
    for text in texts:
        if found := codec.control.search(text):
            fate = "kept as text" if codec.control_tokens == "text" else "a real control token (data.control_tokens)"
            return (("control-token text", f"{found[0]!r} in a text: {fate}"),)
    return ()


def _chat_job(record: Record, codec: Codec) -> _Job:
    if template_source(codec.tokenizer, codec.template) is None:
        raise UserError(
            f"{_where(record)}: messages need a chat template and the tokenizer has none; give data.template"
        )
    if taken := sorted(codec.reserved & record.chat_template_kwargs.keys()):
        raise BadRow("reserved template argument", f"chat_template_kwargs may not set {', '.join(taken)}")
    given = (record.prompt, record.completions, record.tools, record.chat_template_kwargs)
    note = _control_note((text for part in given for text in texts_of(part)), codec)
    sanitize = bool(note) and codec.control_tokens == "text"
    prompt = _messages(record.prompt)
    chats = [prompt, *([*prompt, *_messages(completion)] for completion in record.completions)]
    sequences = [
        _rendered(record, chat, codec, asking=not index, sanitize=sanitize) for index, chat in enumerate(chats)
    ]
    return _Job("chat", sequences, record.notes + note)


def _messages(part: Part) -> Messages:
    return [message for message in part if isinstance(message, dict)]


def _rendered(record: Record, chat: Messages, codec: Codec, *, asking: bool, sanitize: bool) -> str | list[int]:
    """The chat as text; as ids where text of control tokens must not become control tokens."""
    how = {"tokenize": True, "return_dict": False, "sanitize_control_tokens": True} if sanitize else {"tokenize": False}
    try:
        return apply_template(
            codec.tokenizer,
            chat,
            _where(record),
            tools=record.tools,
            chat_template=codec.template,
            add_generation_prompt=asking,
            **how,
            **{**codec.arguments, **record.chat_template_kwargs},
        )
    except UserError:  # it does not end
        raise
    except Exception as error:  # templates raise what they like: Jinja's errors, their own, TypeError, KeyError
        raise BadRow("template error", f"{type(error).__name__}: {error}") from error


def _tokens(job: _Job, codec: Codec) -> Tokens:
    """Split each sequence after the prompt, and end each completion."""
    before = codec.before if job.kind == "text" else ()
    whole, *together = ([*before, *ids] for ids in job.sequences if isinstance(ids, list))
    shared = () if job.kind == "ids" else (shared_length(whole, ids) for ids in together)
    end = min(shared, default=len(whole))
    prompt, notes = whole[:end], job.notes
    if end < len(whole):
        cut = f"{len(whole) - end} tokens of the prompt are left out: the text goes on in another way after them"
        notes += (("prompt tokens not a prefix", cut),)
    if not prompt:
        prompt = _empty_prompt(codec)
    endings = [_ended(ids[end:], job.kind, codec) for ids in together]
    notes += tuple(dict.fromkeys(note for _, ending in endings for note in ending))
    return Tokens(prompt, [ids for ids, _ in endings], notes)


def _empty_prompt(codec: Codec) -> list[int]:
    """What stands where a prompt is empty: something has to, or the first completion token has no source."""
    if codec.bos is None:
        raise BadRow("empty prompt", "no token is left of the prompt, and the tokenizer has no BOS token for its place")
    return [codec.bos]


def _ended(ids: list[int], kind: str, codec: Codec) -> tuple[list[int], tuple[tuple[str, str], ...]]:
    """A completion with its end: exactly one terminator, and nothing after it.

    For a text the terminator is EOS. For a chat it is the special token with which the template ends a turn; what the
    template writes after it (the newline of ChatML) is not the assistant's and is taken off. TRL trains those tokens,
    and adds nothing where a template ends without a special token: that is kept for parity where `codec.ending` is
    "template". Ids that came tokenised are left alone.

        answer <|im_end|> \\n   ->   answer <|im_end|>           answer \\n   ->   answer \\n <eos>
    """
    if not ids:
        raise BadRow("empty completion", "no token is left of a completion")
    eos, turn = None if codec.eos is None else codec.eos[1], codec.turn
    if kind == "text" and eos is not None:
        return [*ids, eos], ()
    if kind == "ids":
        return ids, () if ids[-1] in codec.special else ((_NO_END, "the ids do not end with a special token"),)
    if codec.ending == "template":
        return ids, ()
    if turn.terminator is not None and tuple(ids[-1 - len(turn.rest) :]) == (turn.terminator, *turn.rest):
        ids = ids[: len(ids) - len(turn.rest)]
        while ids[-2:-1] == [turn.terminator]:
            ids = ids[:-1]
        return ids, ()
    if ids[-1] in codec.special:
        return ids, ()
    end = eos if turn.terminator is None else turn.terminator
    return (ids if end is None else [*ids, end]), (
        (_NO_END, "the template ends it without a special token; one is added"),
    )


_NO_END = "no end of turn"
