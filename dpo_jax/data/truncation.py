"""What a too long row loses: by rule, in tokens; of a conversation whole turns first, the oldest ones.

keep_completion   system u1 a1 u2 a2 u3 | answer   ->   system u2 a2 u3 | answer   ->   system (end of u3) | answer
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

from dpo_jax.data.answers import SYSTEM
from dpo_jax.data.layouts import Record
from dpo_jax.data.messages import BadRow, Messages, Part, is_chat, texts_of
from dpo_jax.data.templates import Codec, tokenize


class Cut(NamedTuple):
    """What is kept of a prompt and its completions: one number per completion."""

    skip: list[int]
    """Tokens that the prompt's head loses; all of them where nothing is left of it."""
    start: list[int]
    """First scored token of the completion."""
    length: list[int]
    """Scored tokens."""


def keep_completion(prompt: int, completions: Sequence[int], max_length: int, head: int = 0) -> Cut | None:
    """Keep the answers; the prompt loses what follows its `head` (BOS), down to one token more; then the answers lose
    their tails, all alike. The head goes where there is no room for it and for a token of each.

    prompt 6, answers 3 and 5, max_length 8           ->   the last 3 of the prompt with all of both answers
    prompt 6, answers 3 and 9, max_length 8           ->   the last token of the prompt, 3, and the first 7 of the 9
    prompt 6, answers 3 and 9, max_length 8, head 1   ->   the first and the last of the prompt, 3, and 6 of the 9
    """
    least = min(prompt, head + 1) if head + 1 < max_length else 1
    lengths = [min(length, max_length - least) for length in completions]
    keep = min(prompt, max_length - max(lengths))
    return Cut([prompt - keep] * len(lengths), [0] * len(lengths), lengths)


def keep_start(prompt: int, completions: Sequence[int], max_length: int, head: int = 0) -> Cut | None:
    """TRL's rule of that name: the first `max_length` tokens; None (the row is dropped) if the prompt fills them."""
    if prompt >= max_length:
        return None
    lengths = [min(length, max_length - prompt) for length in completions]
    return Cut([0] * len(lengths), [0] * len(lengths), lengths)


def keep_end(prompt: int, completions: Sequence[int], max_length: int, head: int = 0) -> Cut | None:
    """TRL's rule of that name: the last `max_length` tokens of each sequence on its own.

    Where they begin inside the completion, or with it, their first token has no source and is not scored.
    """
    over = [max(0, prompt + length - max_length) for length in completions]
    start = [0 if cut < prompt else cut - prompt + 1 for cut in over]
    lengths = [length - at for length, at in zip(completions, start, strict=True)]
    return Cut([min(cut, prompt) for cut in over], start, lengths)


TRUNCATIONS: dict[str, Callable[[int, Sequence[int], int, int], Cut | None]] = {
    "keep_completion": keep_completion,
    "keep_start": keep_start,
    "keep_end": keep_end,
}

# ------------------------------------------------------------------------------------------------ conversations


class Fitted(NamedTuple):
    """A conversation's prompt in token ids, made shorter, and how many of its messages went whole."""

    prompt: list[int]
    messages: int


def fitted(record: Record, coder: Codec, room: int) -> Fitted | BadRow:
    """The prompt of a record of messages in at most `room` tokens, or in as few as the rules allow.

    System messages stay. Of the others the oldest go first, up to the next question; of the last question and what
    follows it, texts lose their beginnings, the oldest first, down to one token. Each try is rendered by the template,
    so that what is left is what the template would write of it.
    """
    messages = _messages(record.prompt)
    system = next((at for at, message in enumerate(messages) if message["role"] not in SYSTEM), len(messages))
    starts = [at for at in range(system, len(messages)) if at == system or messages[at]["role"] == "user"]

    def rendered(chat: Messages, completions: tuple[Part, ...] = ()) -> list[int] | BadRow:
        (found,) = tokenize([replace(record, prompt=[*messages[:system], *chat], completions=completions)], coder)
        return found if isinstance(found, BadRow) else found.prompt

    low, high = 1, len(starts) - 1  # the fewest turns to leave out so that the rest fits, at most all but the last
    while low < high:
        middle = (low + high) // 2
        ids = rendered(messages[starts[middle] :])
        if isinstance(ids, BadRow):
            return ids
        low, high = (low, middle) if len(ids) <= room else (middle + 1, high)
    first = starts[min(low, len(starts) - 1)]
    kept = left = messages[first:]
    places = [(at, begin) for at, one in enumerate(kept) for begin in _token_starts(one.get("content", ""), coder)]
    ids, cut = rendered(kept), 0
    while not isinstance(ids, BadRow) and len(ids) > room and cut < len(places) - 1:
        cut = min(cut + len(ids) - room, len(places) - 1)
        left = _without(kept, *places[cut])
        ids = rendered(left)
    ids = ids if isinstance(ids, BadRow) else rendered(left, record.completions)
    return ids if isinstance(ids, BadRow) else Fitted(ids, first - system)


def _messages(part: Part) -> Messages:
    return [message for message in part if isinstance(message, dict)]


def _token_starts(text: str, coder: Codec) -> list[int]:
    """Characters at which the tokens of a text begin."""
    offsets = coder.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).offsets
    return sorted({begin for begin, _ in offsets})


def _without(messages: Messages, at: int, begin: int) -> Messages:
    """Messages whose texts are gone before message `at`, and in it before character `begin`."""
    left = [{**message, "content": ""} if "content" in message else message for message in messages[:at]]
    return [*left, {**messages[at], "content": messages[at]["content"][begin:]}, *messages[at + 1 :]]


# ------------------------------------------------------------------------------------------------ characters


def shortened(record: Record, limit: int, truncation: str) -> Record:
    """The record without what truncation would take anyway, so that a text of megabytes is not tokenised whole.

    Of a prompt the last `limit` characters stay (all of them under keep_start, which drops a row whose prompt is too
    long), of a completion the first, or the last under keep_end. Counted in the record's notes.
    """
    sizes = [sum(map(len, texts_of(part))) for part in (record.prompt, *record.completions)]
    if max(sizes) <= limit or not isinstance(record.completions[0], str) and not is_chat(record.completions[0]):
        return record
    ends = truncation == "keep_end"
    prompt = record.prompt if truncation == "keep_start" else _part(record.prompt, limit, ends=True)
    completions = tuple(_part(completion, limit, ends=ends) for completion in record.completions)
    if (prompt, completions) == (record.prompt, record.completions):
        return record
    note = (("too many characters", f"{max(sizes):,}; all but {limit:,} are cut before the text is tokenised"),)
    return replace(record, prompt=prompt, completions=completions, notes=record.notes + note)


def _part(part: Part, limit: int, *, ends: bool) -> Part:
    """The last, or the first, characters of a text, or of the texts of a conversation, less its system messages.

    Messages of which nothing is left go: at the beginning up to a question, at the end down to an answer.
    """
    if isinstance(part, str):
        return part[-limit:] if ends else part[:limit]
    messages = _messages(part)
    spoken = [message for message in messages if message["role"] not in SYSTEM]
    system, sizes = messages[: len(messages) - len(spoken)], [len(message.get("content", "")) for message in spoken]
    if sum(sizes) <= limit:
        return part
    if ends:
        after = [sum(sizes[at + 1 :]) for at in range(len(sizes))]
        cut = max(at for at, rest in enumerate(after) if sizes[at] and rest + sizes[at] >= limit)
        first = max((at for at in range(cut + 1) if spoken[at]["role"] == "user"), default=cut)
        return [*system, *_without(spoken, cut, sizes[cut] + after[cut] - limit)[first:]]
    cut = next(at for at, until in enumerate(accumulate(sizes)) if until >= limit)
    kept = {**spoken[cut], "content": spoken[cut].get("content", "")[: limit - sum(sizes[:cut])]}
    last = max((at for at in range(cut + 1) if spoken[at]["role"] == "assistant"), default=cut)
    return [*system, *[*spoken[:cut], kept][: last + 1]]
