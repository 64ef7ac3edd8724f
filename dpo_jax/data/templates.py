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

from dpo_jax.data.layouts import Record, completion_name
from dpo_jax.data.messages import BadRow, is_chat, shared_length
from dpo_jax.data.probes import Frame, Turn, begins, frame_of, renderer, turn_of
from dpo_jax.data.rendering import Voice, written
from dpo_jax.data.report import AS_TEXT, MERGED, RENDERED, clean
from dpo_jax.data.strangers import check_template, ids_of
from dpo_jax.data.tokenizer import Tokenizer, no_template, special_ids
from dpo_jax.errors import UserError
from dpo_jax.files import digest_of

Ending = Literal["terminator", "template"]
T = TypeVar("T")


class Tokens(NamedTuple):
    """One record in token ids. Completions are in the record's order and are not truncated.

    `unscored` has, for each completion, the ranges (start, end) of its tokens that are not the assistant's.
    """

    prompt: list[int]
    completions: list[list[int]]
    unscored: list[list[tuple[int, int]]]
    notes: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Codec:
    """A tokenizer and what was found out about it.

    Attributes:
      tokenizer: of transformers.
      template: chat template that is used instead of the tokenizer's own.
      control_tokens: "text" keeps control tokens in row text as text; "tokens" lets them be control tokens.
      ending: "terminator", or "template": a chat's completion keeps all that the template writes after the answer.
      score_tool_results: whether turns of tools and users inside an answer are scored.
      control: finds control tokens in a text.
      marks: finds those that mark a turn or a text, which stay text also where the assistant says them.
      frame: what the template writes around turns.
      before: ids that the tokenizer puts before a text (BOS, or nothing).
      opening: those of them that the template writes at the beginning of a conversation; all where there is none.
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
    score_tool_results: bool
    control: re.Pattern
    marks: re.Pattern
    frame: Frame
    before: tuple[int, ...]
    opening: tuple[int, ...]
    turn: Turn
    special: frozenset[int]
    # Of the tokenizer, which takes long to say each of them.
    eos: tuple[str, int] | None
    bos: int | None
    size: int
    reserved: frozenset[str]
    arguments: Mapping[str, Any]

    @property
    def voice(self) -> Voice:
        """How conversations are written."""
        return Voice(
            tokenizer=self.tokenizer,
            template=self.template,
            frame=self.frame,
            control=self.control,
            marks=self.marks,
            protect=self.control_tokens == "text",
            score_all=self.score_tool_results,
            arguments=self.arguments,
        )


def codec(
    tokenizer: Tokenizer,
    *,
    template: str | None,
    control_tokens: Literal["text", "tokens"],
    ending: Ending,
    score_tool_results: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> Codec:
    """Find out how a tokenizer and its template begin a text, frame turns and end them."""
    if control_tokens == "text" and "sanitize_control_tokens" not in _arguments(tokenizer):
        raise UserError(
            "this transformers cannot keep control tokens as text; upgrade it, or data.control_tokens=tokens"
        )
    source = template_source(tokenizer, template)
    if source:
        check_template(source)
    special = special_ids(tokenizer)
    control = _control_pattern(tokenizer, source or "")
    render = renderer(tokenizer, template, arguments or {})
    frame = frame_of(render, tokenizer, control) if source else Frame()
    before = _before(tokenizer)
    return Codec(
        tokenizer=tokenizer,
        template=template,
        control_tokens=control_tokens,
        ending=ending,
        score_tool_results=score_tool_results,
        control=control,
        marks=_any_of(frame.marks),
        frame=frame,
        before=before,
        opening=before if not source or begins(render, tokenizer, before) else (),
        turn=turn_of(render, tokenizer, special) if source else Turn(),
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
    return _any_of(texts)


def _any_of(texts: Iterable[str]) -> re.Pattern:
    """Finds any of the texts, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=lambda text: (-len(text), text)))) or "(?!)")


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


# ------------------------------------------------------------------------------------------------ records


@dataclass(frozen=True)
class _Job:
    """A record's prompt and its prompt with each completion, as texts to tokenise or as ids where that is done.

    `foreign` has, for each completion, beginnings of its text that end where words of others begin and end. A `marked`
    chat has transformers' own marks around control tokens that stay text; a `rendered` text those of a template.
    """

    kind: Literal["text", "rendered", "chat", "marked", "ids"]
    sequences: Sequence[str | list[int]]
    notes: tuple[tuple[str, str], ...]
    foreign: Sequence[Sequence[str | list[int]]] = ()


def tokenize(records: Sequence[Record], codec: Codec) -> list[Tokens | BadRow]:
    """Token ids of each record, or why there are none. All texts of a kind are tokenised in one call.

    A record without completions is a prompt to be answered.

    Raises:
      UserError: rows are conversations and there is no chat template, or texts and there is no EOS token.
    """
    jobs = [_job(record, codec) for record in records]
    ids = {kind: _batch(jobs, kind, codec) for kind in ("text", "rendered", "chat", "marked")}
    return [job if isinstance(job, BadRow) else _caught(_tokens, _with_ids(job, ids), codec) for job in jobs]


def _caught(function: Callable[..., T], *arguments: object) -> T | BadRow:
    try:
        return function(*arguments)
    except BadRow as error:
        return error


def _batch(jobs: Iterable[_Job | BadRow], kind: str, codec: Codec) -> Iterator[list[int]]:
    mine = [job for job in jobs if isinstance(job, _Job) and job.kind == kind]
    texts = [text for job in mine for part in (job.sequences, *job.foreign) for text in part if isinstance(text, str)]
    how = {"split_special_tokens": kind == "text" and codec.control_tokens == "text"}
    if kind == "marked":
        how = {"sanitize_control_tokens": True}
    return iter(_ids(codec.tokenizer, texts, add_special_tokens=False, **how))


def _with_ids(job: _Job, ids: Mapping[str, Iterator[list[int]]]) -> _Job:
    found = [
        [next(ids[job.kind]) if isinstance(text, str) else text for text in part]
        for part in (job.sequences, *job.foreign)
    ]
    return _Job(job.kind, found[0], job.notes, found[1:])


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
    given = [str(record.prompt), *completions]
    rendered = rendered_note(given, completions, codec)
    taken = bool(rendered) and codec.control_tokens == "tokens"
    notes = record.notes + (rendered or _control_note(given, codec))
    sequences = [str(record.prompt), *(f"{record.prompt}{text}" for text in completions)]
    return _Job("rendered" if taken else "text", sequences, notes)


def rendered_note(texts: Sequence[str], answers: Sequence[str], codec: Codec) -> tuple[tuple[str, str], ...]:
    """What is to be said of texts that a chat template has written already: they have its marks around turns.

    Either the text that opens an answer is in one of them, or the first begins with BOS, or an answer ends as a turn.
    """
    bos = codec.tokenizer.bos_token if codec.bos is not None else None
    header, ends = codec.frame.header, codec.frame.ends
    found = header if header and any(header in text for text in texts) else ""
    found = found or next((end for end in ends for text in answers if text.rstrip().endswith(end)), "")
    found = found or (bos if bos and texts[0].lstrip().startswith(bos) else "")
    if not found:
        return ()
    if codec.control_tokens == "text":
        return ((AS_TEXT, f"{found!r} in a text: kept as text"),)
    return ((RENDERED, f"{found!r} in a text: taken as the template's own"),)


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
        raise no_template(_where(record))
    if taken := sorted(codec.reserved & record.chat_template_kwargs.keys()):
        raise BadRow("reserved template argument", f"chat_template_kwargs may not set {', '.join(taken)}")
    count = len(record.completions)
    chats = written(record, [completion_name(index, count) for index in range(count)], codec.voice)
    contents = [
        [str(turn.get("content", "")) for turn in part if isinstance(turn, dict)]
        for part in (record.prompt, *record.completions)
    ]
    rendered = rendered_note(sum(contents, []), [part[-1] for part in contents[1:]], codec)
    notes = rendered + chats.notes if codec.control_tokens == "tokens" else rendered or chats.notes
    foreign = [[answer.text[:place] for span in answer.foreign for place in span] for answer in chats.answers]
    texts = [chats.prompt, *(answer.text for answer in chats.answers)]
    return _Job("marked" if chats.marked else "chat", texts, record.notes + notes, foreign)


def _tokens(job: _Job, codec: Codec) -> Tokens:
    """Split each sequence after the prompt, and end each completion."""
    before = {"text": codec.before, "rendered": codec.opening}.get(job.kind, ())
    whole, *together = (
        _begun(ids, before, codec.before if job.kind == "rendered" else ())
        for ids in job.sequences
        if isinstance(ids, list)
    )
    shared = () if job.kind == "ids" else (shared_length(whole, ids) for ids in together)
    end = min(shared, default=len(whole))
    prompt, notes = whole[:end], job.notes
    if end < len(whole):
        cut = f"{len(whole) - end} tokens of the prompt are left out: the text goes on in another way after them"
        notes += (("prompt tokens not a prefix", cut),)
    if not prompt:
        prompt = _empty_prompt(codec, merged=bool(whole))
    endings = [_ended(ids[end:], job.kind, codec) for ids in together]
    notes += tuple(dict.fromkeys(note for _, ending in endings for note in ending))
    unscored = [
        _ranges(ids, heads, end) for ids, heads in zip(together, job.foreign or [[]] * len(together), strict=True)
    ]
    if any(unscored):
        count = sum(stop - start for ranges in unscored for start, stop in ranges)
        notes += ((_OTHERS, f"{count} tokens of tools' and users' turns (data.score_tool_results)"),)
    completions = [ids for ids, _ in endings]
    for ids, ranges in zip(completions, unscored, strict=True):
        if sum(stop - start for start, stop in ranges) >= len(ids):
            raise BadRow("empty completion", "no token of a completion is the assistant's")
    return Tokens(prompt, completions, unscored, notes)


_OTHERS = "not scored: others' words"


def _begun(ids: list[int], before: tuple[int, ...], written: tuple[int, ...]) -> list[int]:
    """A text with what stands before one, in place of what was `written` there already, perhaps twice."""
    while written and tuple(ids[: len(written)]) == written:
        ids = ids[len(written) :]
    return [*before, *ids]


def _ranges(whole: list[int], heads: Sequence[str | list[int]], start: int) -> list[tuple[int, int]]:
    """Ranges of a completion's tokens that lie between two heads of the whole text, counted from its first token."""
    places = [max(shared_length(whole, head) - start, 0) for head in heads if isinstance(head, list)]
    return [(first, last) for first, last in zip(places[::2], places[1::2], strict=True) if first < last]


def _empty_prompt(codec: Codec, *, merged: bool) -> list[int]:
    """What stands where a prompt is empty: something has to, or the first completion token has no source."""
    if codec.bos is None and merged:
        turns = ", or set data.as_chat=true" if template_source(codec.tokenizer, codec.template) else ""
        raise BadRow(MERGED, f"its last token reaches into an answer; end it with a space or a line break{turns}")
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
    if kind == "rendered":
        return _ended_once(ids, codec), ()
    if codec.ending == "template":
        return ids, ()
    if turn.terminator is not None and tuple(ids[-1 - len(turn.rest) :]) == (turn.terminator, *turn.rest):
        return _ended_once(ids, codec), ()
    if ids[-1] in codec.special:
        return ids, ()
    end = eos if turn.terminator is None else turn.terminator
    return (ids if end is None else [*ids, end]), (
        (_NO_END, "the template ends it without a special token; one is added"),
    )


def _ended_once(ids: list[int], codec: Codec) -> list[int]:
    """An answer with one end: the first of those that it has in a row, or the template's own where it has none."""
    turn, eos = codec.turn, None if codec.eos is None else codec.eos[1]
    ends, end = (turn.terminator, eos), None
    while ids and (size := _after_end(ids, ends, turn.rest)) is not None:
        end = ids[-1 - size]
        ids = ids[: -1 - size]
    if not ids:
        raise BadRow("empty completion", "a completion holds nothing but the end of a turn")
    if end is None:
        end = eos if turn.terminator is None else turn.terminator
    return ids if end is None else [*ids, end]


def _after_end(ids: list[int], ends: tuple[int | None, ...], rest: tuple[int, ...]) -> int | None:
    """How many ids follow the last of the ends, if they are how the template goes on after one; None if not."""
    sizes = range(min(len(rest), len(ids) - 1), -1, -1)
    return next((n for n in sizes if ids[-1 - n] in ends and tuple(ids[len(ids) - n :]) == rest[:n]), None)


_NO_END = "no end of turn"
