"""Where a prompt ends and its answers begin: what the columns of every layout are reduced to."""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dpo_jax.data.messages import BadRow, Messages, Part, messages_of, shared_length, type_name

MARKER = "\n\nAssistant:"
"""What opens an answer in the transcripts of hh-rlhf."""

SYSTEM = ("system", "developer")
SINGLE = ((0, 0),)
"""The order of a row with one completion: it stands for itself."""


class Answers(NamedTuple):
    """What a layout makes of its own columns; `order` lists (better, worse)."""

    prompt: Part
    completions: tuple[Part, ...]
    order: tuple[tuple[int, int], ...] = ((0, 1),)
    notes: tuple[tuple[str, str], ...] = ()


def split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Prompt and two answers of two texts that begin alike.

    With hh-rlhf's marker in both: after the last marker (the last one that both share, where the turns before it
    differ). Otherwise after the longest common prefix that ends on a word boundary and leaves both answers some words;
    one space before the answers belongs to them, as in TRL.

        "The sky is blue" / "The sky is green" -> "The sky is", " blue", " green"
        "It is blue"      / "It is black"      -> "It is", " blue", " black"
        "Yes"             / "Yes, sir"         -> "", "Yes", "Yes, sir"
    """
    if MARKER in chosen and MARKER in rejected:
        end = _after_marker(chosen, rejected)
    else:
        end = shared_length(chosen, rejected)
        while end > 0 and not _splits_at(chosen, rejected, end):
            end -= 1
    return chosen[:end], chosen[end:], rejected[end:]


def _after_marker(chosen: str, rejected: str) -> int:
    ends = [text.rfind(MARKER) + len(MARKER) for text in (chosen, rejected)]
    if chosen[: ends[0]] == rejected[: ends[1]]:
        return ends[0]
    at = chosen.rfind(MARKER, 0, shared_length(chosen, rejected))
    if at < 0:
        raise BadRow("prompts differ", f"chosen and rejected share no text up to a {MARKER!r}")
    return at + len(MARKER)


def _splits_at(chosen: str, rejected: str, end: int) -> bool:
    if chosen[end - 1] == " " and end > 1:
        return False  # the space belongs to the answers: the boundary before it is the one to use
    answers = (chosen[end:], rejected[end:])
    return all(answer.strip() and not _inside_word(chosen[end - 1], answer[0]) for answer in answers)


def _inside_word(before: str, after: str) -> bool:
    joined = unicodedata.category(after) in ("Mn", "Mc", "Me", "Cf", "Sk") or before == "\u200d"
    return joined or (_in_word(before) and _in_word(after))


def _in_word(char: str) -> bool:
    return char.isalnum() or char in "_'\u2019-" or unicodedata.category(char).startswith("M")


def split_conversations(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """Prompt (the common messages) and two answers of two conversations; both answers begin with the assistant."""
    end = shared_length(chosen, rejected)
    while end >= 0:
        answers = (chosen[end:], rejected[end:])
        if all(answer and answer[0]["role"] == "assistant" for answer in answers):
            return chosen[:end], *answers
        end -= 1
    raise BadRow("prompts differ", "chosen and rejected do not share the messages before the assistant's answer")


def answer_start(conversation: Messages) -> int:
    """Where the last answer of a conversation begins: the assistant's first message after all that is asked of it.

    user assistant user assistant tool assistant   ->   3
    """
    asked = [at for at, message in enumerate(conversation) if message["role"] in (*SYSTEM, "user")]
    after = range(asked[-1] + 1 if asked else 0, len(conversation))
    return next((at for at in after if conversation[at]["role"] == "assistant"), len(conversation))


def answer_to(value: object, prompt: Part | None, name: str) -> tuple[Messages, tuple[tuple[str, str], ...]]:
    """An assistant's answer to a list of messages, without those messages should it repeat them."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}], ()
    answer = messages_of(value, name)
    notes: tuple[tuple[str, str], ...] = ()
    if prompt and isinstance(prompt, list) and answer[: len(prompt)] == prompt and len(answer) > len(prompt):
        answer, notes = answer[len(prompt) :], (("prompt repeated in a completion", f"{name}: removed there"),)
    if answer[0]["role"] in (*SYSTEM, "user"):
        raise BadRow("prompt not a prefix", f"{name} begins with a {answer[0]['role']} message, not with the prompt's")
    return answer, notes


def against(prompt: object, values: Sequence[object], names: Sequence[str]) -> Answers:
    """Answers to an explicit prompt; text with text stays text, everything else becomes messages."""
    texts = [value for value in values if isinstance(value, str)]
    if isinstance(prompt, str) and len(texts) == len(values):
        return Answers(prompt, tuple(texts))
    for value, name in zip(values, names, strict=True):
        if not isinstance(value, str | list | Mapping):
            raise BadRow("wrong type", f"{name} is {type_name(value)}, neither text nor messages")
    if not isinstance(prompt, str):
        messages = messages_of(prompt, "prompt")
        found = [answer_to(value, messages, name) for value, name in zip(values, names, strict=True)]
        return Answers(messages, tuple(answer for answer, _ in found), notes=sum((notes for _, notes in found), ()))
    if texts:
        raise BadRow("wrong type", f"{' and '.join(names)} are not all text or all messages")
    return _conversations_with(
        prompt, {name: messages_of(value, name) for name, value in zip(names, values, strict=True)}
    )


def _conversations_with(prompt: str, named: Mapping[str, Messages]) -> Answers:
    """A text prompt and conversations: full ones that contain the prompt (UltraFeedback), or just the answers."""
    conversations = tuple(named.values())
    if all(conversation[0]["role"] == "assistant" for conversation in conversations):
        return Answers([{"role": "user", "content": prompt}], conversations)
    if len(conversations) == 1:
        ends_with_assistant(conversations[0], *named)
    ends = [len(split_conversations(conversations[0], other)[0]) for other in conversations[1:]]
    end = min(ends, default=answer_start(conversations[0]))
    messages = conversations[0][:end]
    texts = [message.get("content", "").strip() for message in messages if message["role"] == "user"]
    if prompt.strip() not in texts:
        what = "chosen and rejected share" if ends else "the conversation has before its answer"
        remedy = "; data.layout=implicit does not read it" if tuple(named) == ("chosen", "rejected") else ""
        raise BadRow("prompt not a prefix", f"prompt is none of the user's messages that {what}{remedy}")
    return Answers(messages, tuple(conversation[end:] for conversation in conversations))


def ends_with_assistant(answer: Messages, name: str) -> None:
    """Refuse an answer whose last word is not the assistant's."""
    if answer[-1]["role"] != "assistant":
        raise BadRow("last message not assistant", f"{name} ends with a {answer[-1]['role']} message")
