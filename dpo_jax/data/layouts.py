"""Rows of preference files in one normal form: a table with one entry per layout, and a `Record` per row.

    layout     columns                                         what they hold
    pair       prompt, chosen, rejected                        texts; messages; or a text and full conversations
    implicit   chosen, rejected                                two texts or two conversations that begin alike
    sharegpt   conversations, chosen, rejected                 {"from", "value"} turns
    openai     input, preferred_output, non_preferred_output   OpenAI's preference format
    tokenized  prompt_ids, chosen_ids, rejected_ids            token ids, used as they are
    ranked     prompt, completions (or responses),             several answers, each with a rank (1 is best) or a
               ranks or scores                                 score (higher is better)

Every layout also takes `system`, `tools`, `chat_template_kwargs`, `weight` and `margin`. A text row with a system
message or tools is read as a chat, because only a chat template has a place for them.
"""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dpo_jax.data.messages import (
    SHAREGPT_ROLES,
    BadRow,
    Messages,
    Part,
    from_json,
    is_chat,
    messages_of,
    need,
    number,
    shared_length,
    speaks,
    type_name,
)

MARKER = "\n\nAssistant:"
"""What opens an answer in the transcripts of hh-rlhf."""


_SYSTEM = ("system", "developer")


class Pair(NamedTuple):
    """Completion `chosen` is preferred to completion `rejected` (both are indices into a record's completions)."""

    chosen: int
    rejected: int
    weight: float = 1.0
    margin: float = 0.0


@dataclass(frozen=True)
class Record:
    """One row in normal form: prompt and completions are all texts, all lists of messages, or all lists of ids."""

    prompt: Part
    completions: tuple[Part, ...]
    pairs: tuple[Pair, ...]
    tools: list[dict[str, Any]] | None
    chat_template_kwargs: dict[str, Any]
    file: str
    line: int
    notes: tuple[tuple[str, str], ...] = ()


class Answers(NamedTuple):
    """What a layout makes of its own columns; `order` lists (better, worse)."""

    prompt: Part
    completions: tuple[Part, ...]
    order: tuple[tuple[int, int], ...] = ((0, 1),)
    notes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Layout:
    """A shape of row: the columns that it is recognised by, and how they are read."""

    name: str
    columns: tuple[tuple[str, ...], ...]
    """Columns a row must have; a group of names is satisfied by any of them."""
    read: Callable[[Mapping[str, Any]], Answers]

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has this layout's columns."""
        return all(any(name in row for name in names) for names in self.columns)


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


def _answer(value: Any, prompt: Part | None, name: str) -> tuple[Messages, tuple[tuple[str, str], ...]]:
    """An assistant's answer to a list of messages, without those messages should it repeat them."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}], ()
    answer = messages_of(value, name)
    notes: tuple[tuple[str, str], ...] = ()
    if prompt and isinstance(prompt, list) and answer[: len(prompt)] == prompt and len(answer) > len(prompt):
        answer, notes = answer[len(prompt) :], (("prompt repeated in a completion", f"{name}: removed there"),)
    if answer[0]["role"] in ("system", "developer", "user"):
        raise BadRow("prompt not a prefix", f"{name} begins with a {answer[0]['role']} message, not with the prompt's")
    return answer, notes


def _read_pair(row: Mapping[str, Any]) -> Answers:
    prompt, *values = (need(row, name) for name in ("prompt", "chosen", "rejected"))
    return _against(prompt, values, ("chosen", "rejected"))


def _against(prompt: Any, values: Sequence[Any], names: Sequence[str]) -> Answers:
    """Answers to an explicit prompt; text with text stays text, everything else becomes messages."""
    order = ((0, 1),)
    if isinstance(prompt, str) and all(isinstance(value, str) for value in values):
        return Answers(prompt, tuple(values), order)
    for value, name in zip(values, names, strict=True):
        if not isinstance(value, str | list | Mapping):
            raise BadRow("wrong type", f"{name} is {type_name(value)}, neither text nor messages")
    if not isinstance(prompt, str):
        messages = messages_of(prompt, "prompt")
        found = [_answer(value, messages, name) for value, name in zip(values, names, strict=True)]
        return Answers(messages, tuple(answer for answer, _ in found), order, sum((notes for _, notes in found), ()))
    if any(isinstance(value, str) for value in values):
        raise BadRow("wrong type", f"{' and '.join(names)} are not all text or all messages")
    return _conversations_with(prompt, [messages_of(value, name) for value, name in zip(values, names, strict=True)])


def _conversations_with(prompt: str, conversations: Sequence[Messages]) -> Answers:
    """A text prompt and conversations: full ones that contain the prompt (UltraFeedback), or just the answers."""
    if all(conversation[0]["role"] == "assistant" for conversation in conversations):
        return Answers([{"role": "user", "content": prompt}], tuple(conversations))
    end = min(len(split_conversations(conversations[0], other)[0]) for other in conversations[1:])
    messages = conversations[0][:end]
    texts = [message.get("content", "").strip() for message in messages if message["role"] == "user"]
    if prompt.strip() not in texts:
        raise BadRow("prompt not a prefix", "prompt is none of the user's messages that chosen and rejected share")
    return Answers(messages, tuple(conversation[end:] for conversation in conversations))


def _read_implicit(row: Mapping[str, Any]) -> Answers:
    if "prompt" in row:
        raise BadRow("wrong type", "this row has a prompt, the file's first rows had none; set data.layout=pair")
    chosen, rejected = need(row, "chosen"), need(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        _not_equal(chosen, rejected)
        prompt, *answers = split_texts(chosen, rejected)
        return Answers(prompt, tuple(answers))
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise BadRow("wrong type", f"chosen is {type_name(chosen)} and rejected is {type_name(rejected)}")
    conversations = messages_of(chosen, "chosen"), messages_of(rejected, "rejected")
    _not_equal(*conversations)
    for conversation, name in zip(conversations, ("chosen", "rejected"), strict=True):
        _ends_with_assistant(conversation, name)
    first, *rest = split_conversations(*conversations)
    return Answers(first, tuple(rest))


def _not_equal(chosen: Any, rejected: Any) -> None:
    if chosen == rejected:
        raise BadRow("identical completions", "chosen and rejected are the same")


def _ends_with_assistant(answer: Messages, name: str) -> None:
    if answer[-1]["role"] != "assistant":
        raise BadRow("last message not assistant", f"{name} ends with a {answer[-1]['role']} message")


def _read_sharegpt(row: Mapping[str, Any]) -> Answers:
    prompt = messages_of(need(row, "conversations"), "conversations", SHAREGPT_ROLES)
    found = []
    for name in ("chosen", "rejected"):
        value = need(row, name)
        turns = value if isinstance(value, str) else messages_of(value, name, SHAREGPT_ROLES)
        found.append(_answer(turns, prompt, name))
    return Answers(prompt, tuple(answer for answer, _ in found), notes=sum((notes for _, notes in found), ()))


def _read_openai(row: Mapping[str, Any]) -> Answers:
    given = need(row, "input")
    if not isinstance(given, Mapping):
        raise BadRow("wrong type", f"input is {type_name(given)}, not an object with messages")
    prompt = messages_of(need(given, "messages"), "input.messages")
    names = ("preferred_output", "non_preferred_output")
    found = [_answer(need(row, name), prompt, name) for name in names]
    return Answers(prompt, tuple(answer for answer, _ in found), notes=sum((notes for _, notes in found), ()))


def _read_tokenized(row: Mapping[str, Any]) -> Answers:
    parts = []
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        ids = need(row, name)
        if not isinstance(ids, list) or any(type(token) is not int for token in ids):
            raise BadRow("wrong type", f"{name} is not a list of whole numbers")
        parts.append(ids)
    return Answers(parts[0], tuple(parts[1:]))


RANKS, SCORES = ("ranks", "ranking", "rank"), ("scores", "ratings", "rating", "score")


def _read_ranked(row: Mapping[str, Any]) -> Answers:
    prompt = need(row, "prompt")
    column = "completions" if "completions" in row else "responses"
    values = need(row, column)
    if not isinstance(values, list):
        raise BadRow("wrong type", f"{column} is {type_name(values)}, not a list of completions")
    better = _preference(row, len(values))
    order = tuple((i, j) for i in range(len(values)) for j in range(len(values)) if better[i] > better[j])
    if not order:
        raise BadRow("no preference", f"no completion of the {len(values)} is better than another")
    answers = _against(prompt, values, [f"{column}[{index}]" for index in range(len(values))])
    ties = len(values) * (len(values) - 1) // 2 - len(order)
    notes = answers.notes + ((("tie in a ranked row", f"{ties} pairs of completions rank the same"),) if ties else ())
    return answers._replace(order=order, notes=notes)


def _preference(row: Mapping[str, Any], count: int) -> list[float]:
    given = [name for name in (*RANKS, *SCORES) if row.get(name) is not None]
    if len(given) != 1:
        what = f"both {given[0]} and {given[1]}" if given else f"none of {', '.join((*RANKS, *SCORES))}"
        raise BadRow("wrong type" if given else "missing column", f"{what}; give exactly one")
    values = row[given[0]]
    if not isinstance(values, list) or len(values) != count:
        raise BadRow("wrong type", f"{given[0]} is not a list of {count} numbers, one per completion")
    sign = -1.0 if given[0] in RANKS else 1.0
    return [sign * number(value, f"{given[0]}[{index}]") for index, value in enumerate(values)]


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("openai", (("input",), ("preferred_output", "non_preferred_output")), _read_openai),
        Layout("sharegpt", (("conversations",), ("chosen",), ("rejected",)), _read_sharegpt),
        Layout("tokenized", (("prompt_ids",), ("chosen_ids",), ("rejected_ids",)), _read_tokenized),
        Layout("ranked", (("prompt",), ("completions", "responses")), _read_ranked),
        Layout("pair", (("prompt",), ("chosen",), ("rejected",)), _read_pair),
        Layout("implicit", (("chosen",), ("rejected",)), _read_implicit),
    )
}
"""All layouts, in the order in which a row is tried against them."""


def detect(row: Mapping[str, Any]) -> Layout:
    """The layout whose columns the row has; the first one, as `implicit` is a part of `pair`."""
    for layout in LAYOUTS.values():
        if layout.fits(row):
            return layout
    known = "; ".join(f"{name}: {_columns(layout)}" for name, layout in LAYOUTS.items())
    raise BadRow("missing column", f"columns {', '.join(sorted(map(str, row)))} fit no layout ({known})")


def _columns(layout: Layout) -> str:
    return ", ".join(" or ".join(names) for names in layout.columns)


COMMON = ("system", "tools", "chat_template_kwargs", "weight", "margin")


def unused_columns(row: Mapping[str, Any], layout: Layout) -> list[str]:
    """Columns of the row that nothing reads, so that a misspelt `weigth` is seen in the report."""
    used = {name for names in layout.columns for name in names} | set(COMMON)
    if layout.name == "ranked":
        used |= {*RANKS, *SCORES}
    if layout.name == "openai":
        used.add("non_preferred_output")
    return sorted(str(name) for name in row if name not in used)


def to_record(row: Mapping[str, Any], layout: Layout, *, file: str, line: int) -> Record:
    """The row in normal form.

    Raises:
      BadRow: with the class and the reason.
    """
    answers = layout.read(row)
    if not answers.prompt and is_chat(answers.completions[0]):
        raise BadRow("empty prompt", "there is no message before the answers")
    tools = _tools(row, layout)
    answers = _as_chat(answers, row, tools)
    for index, completion in enumerate(answers.completions):
        _usable(completion, _name(index, len(answers.completions)))
    _usable_prompt(answers.prompt)
    answers = _without_equals(answers)
    kept = sorted({index for pair in answers.order for index in pair})
    weight, margin = _pair_numbers(row)
    return Record(
        prompt=answers.prompt,
        completions=tuple(answers.completions[index] for index in kept),
        pairs=tuple(Pair(kept.index(i), kept.index(j), weight, margin) for i, j in answers.order),
        tools=tools,
        chat_template_kwargs=_template_kwargs(row),
        file=file,
        line=line,
        notes=answers.notes,
    )


def _pair_numbers(row: Mapping[str, Any]) -> tuple[float, float]:
    """Weight and margin of all pairs of the row."""
    weight = number(row["weight"], "weight") if row.get("weight") is not None else 1.0
    margin = number(row["margin"], "margin") if row.get("margin") is not None else 0.0
    if weight < 0:
        raise BadRow("wrong type", f"weight is {weight:g}; a weight cannot be negative")
    return weight, margin


def _without_equals(answers: Answers) -> Answers:
    """The answers without pairs whose two completions are the same, and with a note of what else is unusual."""
    order = tuple((i, j) for i, j in answers.order if answers.completions[i] != answers.completions[j])
    if not order:
        raise BadRow("identical completions", "chosen and rejected are the same")
    notes = answers.notes
    if len(order) < len(answers.order):
        notes += (("pair left out of a ranked row", "two completions of different rank are the same"),)
    if any(_assistant_turns(completion) > 1 for completion in answers.completions):
        notes += (("completion of several turns", "all of its turns are scored"),)
    return answers._replace(order=order, notes=notes)


def _name(index: int, count: int) -> str:
    return ("chosen", "rejected")[index] if count == 2 else f"completion {index}"


def _assistant_turns(completion: Part) -> int:
    if isinstance(completion, str):
        return 1 + completion.count(MARKER)
    return sum(turn["role"] == "assistant" for turn in _turns(completion))


def _as_chat(answers: Answers, row: Mapping[str, Any], tools: list[dict[str, Any]] | None) -> Answers:
    """The answers with the row's system message in front; texts become messages where there is one, or tools."""
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise BadRow("wrong type", f"system is {type_name(system)}, not text")
    if isinstance(answers.prompt, str) and ("system" in row or tools):
        completions = tuple([{"role": "assistant", "content": text}] for text in answers.completions)
        answers = answers._replace(prompt=[{"role": "user", "content": answers.prompt}], completions=completions)
    return _with_system(answers, system) if system else answers


def _with_system(answers: Answers, system: str) -> Answers:
    messages = _turns(answers.prompt)
    if not messages:
        raise BadRow("wrong type", "a system message cannot be put before token ids")
    if messages[0]["role"] not in _SYSTEM:
        return answers._replace(prompt=[{"role": "system", "content": system}, *messages])
    if messages[0].get("content") != system:
        raise BadRow("two system messages", "the system column differs from the prompt's own system message")
    return answers


def _turns(part: Part) -> Messages:
    """The messages of a conversation; none of a text or of ids."""
    return [item for item in part if isinstance(item, dict)] if is_chat(part) else []


def _usable(completion: Part, name: str) -> None:
    turns = _turns(completion)
    if turns:
        _ends_with_assistant(turns, name)
    said = any(speaks(turn) for turn in turns if turn["role"] == "assistant") if turns else completion
    if not (said.strip() if isinstance(said, str) else said):
        raise BadRow("empty completion", f"{name} is empty")


def _usable_prompt(prompt: Part) -> None:
    """Texts and ids may be empty where the tokenizer has a BOS token (decided there); conversations never."""
    if is_chat(prompt) and not any(speaks(turn) for turn in _turns(prompt) if turn["role"] not in _SYSTEM):
        raise BadRow("empty prompt", "the prompt's messages are empty")


def _tools(row: Mapping[str, Any], layout: Layout) -> list[dict[str, Any]] | None:
    given = row["input"].get("tools") if layout.name == "openai" and "tools" not in row else row.get("tools")
    tools = from_json(given, "tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("wrong type", f"tools is {type_name(tools)}, not a list of objects")
    return [dict(tool) for tool in tools]


def _template_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    given = from_json(row.get("chat_template_kwargs"), "chat_template_kwargs")
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise BadRow("wrong type", f"chat_template_kwargs is {type_name(given)}, not an object")
    return {str(key): value for key, value in given.items() if value is not None}
