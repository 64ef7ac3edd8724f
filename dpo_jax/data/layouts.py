"""Rows of data files in one normal form: a table with one entry per layout, and a `Record` per row.

    layout     columns                                         what they hold
    pair       prompt, chosen, rejected                        texts; messages; or a text and full conversations
    implicit   chosen, rejected                                two texts or two conversations that begin alike
    sharegpt   conversations, chosen, rejected                 turns of {"from", "value"}, as every layout takes them
    openai     input, preferred_output, non_preferred_output   OpenAI's preference format
    tokenized  prompt_ids, chosen_ids, rejected_ids            token ids, used as they are
    ranked     prompt, completions (or responses), and         several answers, each with a rank (the least is best) or
               ranks, scores, best or strength                 a score (the greatest is); or which is best, counted from
                                                               0; or how much better the second of two is than the first
    scored     prompt, completion, score                       one answer and its score; rows that follow each other and
                                                               have the same prompt are one ranked row
    tree       message_id, parent_id, text, role, rank         one message of a tree of them; the answers to a message
                                                               are one ranked row
    unpaired   prompt, completion, label                       one answer, desirable (true, 1) or not (false, 0)
    completion prompt, completion                              one answer to learn
    messages   messages                                        a conversation whose last answer is to be learned

Every layout also takes `system`, `tools`, `chat_template_kwargs` and `weight`; those of pairs take `margin` and
`label`, the chance that chosen is the better one. A text row with a system message or tools is read as a chat, because
only a chat template has a place for them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dpo_jax.data.answers import (
    MARKER,
    SINGLE,
    SYSTEM,
    Answers,
    against,
    answer_start,
    answer_to,
    ends_with_assistant,
    split_conversations,
    split_texts,
)
from dpo_jax.data.dialogues import in_turns
from dpo_jax.data.messages import (
    BadRow,
    Messages,
    Part,
    from_json,
    is_chat,
    messages_of,
    need,
    number,
    speaks,
    type_name,
)
from dpo_jax.data.report import REVERSED, WEIGHTLESS, clean
from dpo_jax.data.stored import tools_of, unpacked


class Pair(NamedTuple):
    """Completion `chosen` is preferred to completion `rejected` (both are indices into a record's completions).

    `label` is the chance that it really is the better one. A completion without another to compare it with is both
    chosen and rejected; there the label says whether it is desirable (1) or not (0).
    """

    chosen: int
    rejected: int
    weight: float = 1.0
    margin: float = 0.0
    label: float = 1.0

    @property
    def single(self) -> bool:
        """Whether this is one completion and not two."""
        return self.chosen == self.rejected


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


COMMON = ("system", "tools", "chat_template_kwargs", "weight", "margin", "label")
"""Columns that the layouts of pairs take beside their own."""


def soft_label(row: Mapping[str, Any]) -> float:
    """The chance that chosen is better than rejected: 1 unless the row says otherwise."""
    value = number(row["label"], "label") if row.get("label") is not None else 1.0
    if not 0 <= value <= 1:
        raise BadRow("label out of range", f"label is {value:g}; the chance that chosen is better is 0 to 1")
    return value


def hard_label(row: Mapping[str, Any]) -> float:
    """1 for a desirable completion, 0 for an undesirable one."""
    label = need(row, "label")
    remedy = "give true or 1 (desirable), false or 0 (undesirable)"
    if isinstance(label, str):
        raise BadRow("wrong type", f"label is the text {clean(label, 40)!r}; {remedy}")
    value = float(label) if isinstance(label, bool) else number(label, "label")
    if value not in (0, 1):
        raise BadRow("label out of range", f"label is {value:g}; {remedy}")
    return value


def no_label(row: Mapping[str, Any]) -> float:
    """1, for a row that does not tell desirable from undesirable; one that does belongs to another layout."""
    if row.get("label") in (0, 1):
        remedy = "give columns prompt, completion, label and data.layout=unpaired"
        raise BadRow("wrong type", f"label says that completions are desirable or not; {remedy}")
    return 1.0


@dataclass(frozen=True)
class RowLayout:
    """A shape of row: the columns that it is recognised by, and how they are read."""

    name: str
    columns: tuple[tuple[str, ...], ...]
    """Columns a row must have; a group of names is satisfied by any of them."""
    read: Callable[[Mapping[str, Any]], Answers]
    takes: tuple[str, ...] = COMMON
    """Columns that a row may have as well."""
    label: Callable[[Mapping[str, Any]], float] = soft_label

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has this layout's columns."""
        return all(any(name in row for name in names) for names in self.columns)


def _read_pair(row: Mapping[str, Any]) -> Answers:
    prompt, *values = (need(row, name) for name in ("prompt", "chosen", "rejected"))
    return against(prompt, values, ("chosen", "rejected"))


def _read_implicit(row: Mapping[str, Any]) -> Answers:
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
        ends_with_assistant(conversation, name)
    first, *rest = split_conversations(*conversations)
    return Answers(first, tuple(rest))


def _not_equal(chosen: object, rejected: object) -> None:
    if chosen == rejected:
        raise BadRow("identical completions", "chosen and rejected are the same")


def _read_sharegpt(row: Mapping[str, Any]) -> Answers:
    prompt = messages_of(need(row, "conversations"), "conversations")
    found = []
    for name in ("chosen", "rejected"):
        value = need(row, name)
        turns = value if isinstance(value, str) else messages_of(value, name)
        found.append(answer_to(turns, prompt, name))
    return Answers(prompt, tuple(answer for answer, _ in found), notes=sum((notes for _, notes in found), ()))


def _read_openai(row: Mapping[str, Any]) -> Answers:
    given = from_json(need(row, "input"), "input")
    if not isinstance(given, Mapping):
        raise BadRow("wrong type", f"input is {type_name(given)}, not an object with messages")
    prompt = messages_of(need(given, "messages"), "input.messages")
    names = ("preferred_output", "non_preferred_output")
    found = [answer_to(need(row, name), prompt, name) for name in names]
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
PREFERENCES = (*RANKS, *SCORES, "best", "strength")
"""Columns that say which of several answers is better, of which a row has one."""


def _read_ranked(row: Mapping[str, Any]) -> Answers:
    prompt = need(row, "prompt")
    column = "completions" if "completions" in row else "responses"
    values = need(row, column)
    if not isinstance(values, list):
        raise BadRow("wrong type", f"{column} is {type_name(values)}, not a list of completions")
    better = _preference(row, len(values))
    kept = sorted(better)
    order = tuple((i, j) for i, a in enumerate(kept) for j, b in enumerate(kept) if better[a] > better[b])
    if not order:
        raise BadRow("no preference", f"no completion of the {len(kept)} is better than another")
    answers = against(prompt, [values[index] for index in kept], [f"{column}[{index}]" for index in kept])
    ties, without = len(kept) * (len(kept) - 1) // 2 - len(order), len(values) - len(kept)
    notes = (("tie in a ranked row", f"{ties} pairs of completions rank the same"),) if ties else ()
    notes += (("completion without a rank", f"{without} of {len(values)} left out"),) if without else ()
    return answers._replace(order=order, notes=answers.notes + notes)


def _preference(row: Mapping[str, Any], count: int) -> dict[int, float]:
    """How good each completion is, by its index, without those of which the row does not say it."""
    given = [name for name in PREFERENCES if row.get(name) is not None]
    if len(given) != 1:
        what = f"both {given[0]} and {given[1]}" if given else f"none of {', '.join(PREFERENCES)}"
        raise BadRow("wrong type" if given else "missing column", f"{what}; give exactly one")
    name = given[0]
    if name == "best":
        return {index: float(index == _index(row, count)) for index in range(count)}
    if name == "strength":
        if count != 2:
            raise BadRow("wrong type", f"strength compares two completions, and there are {count}")
        return {0: 0.0, 1: number(row[name], name)}
    values = row[name]
    if not isinstance(values, list) or len(values) != count:
        raise BadRow("wrong type", f"{name} is not a list of {count} numbers, one per completion")
    sign = -1.0 if name in RANKS else 1.0
    named = {index: value for index, value in enumerate(values) if value is not None}
    return {index: sign * number(value, f"{name}[{index}]") for index, value in named.items()}


def _index(row: Mapping[str, Any], count: int) -> int:
    best = number(row["best"], "best")
    if best not in range(count):
        raise BadRow("wrong type", f"best is {best:g}; the completions are 0 to {count - 1}")
    return int(best)


def _read_single(row: Mapping[str, Any]) -> Answers:
    return against(need(row, "prompt"), [need(row, "completion")], ["completion"])._replace(order=SINGLE)


def _read_messages(row: Mapping[str, Any]) -> Answers:
    conversation = messages_of(need(row, "messages"), "messages")
    ends_with_assistant(conversation, "messages")
    end = answer_start(conversation)
    return Answers(conversation[:end], (conversation[end:],), SINGLE)


TREE = ("message_tree_id", "deleted", "review_result")
"""What else the messages of a tree may say."""
_OF_PROMPT = ("system", "tools", "chat_template_kwargs")
_WITHOUT_PAIRS = (*_OF_PROMPT, "weight")

LAYOUTS = {
    layout.name: layout
    for layout in (
        RowLayout("openai", (("input",), ("preferred_output", "non_preferred_output")), _read_openai),
        RowLayout("sharegpt", (("conversations",), ("chosen",), ("rejected",)), _read_sharegpt),
        RowLayout("tokenized", (("prompt_ids",), ("chosen_ids",), ("rejected_ids",)), _read_tokenized),
        RowLayout("tree", (("message_id",), ("parent_id",), ("text",), ("role",), ("rank",)), _read_ranked, TREE),
        RowLayout("ranked", (("prompt",), ("completions", "responses"), PREFERENCES), _read_ranked),
        RowLayout("pair", (("prompt",), ("chosen",), ("rejected",)), _read_pair),
        RowLayout("implicit", (("chosen",), ("rejected",)), _read_implicit),
        RowLayout("unpaired", (("prompt",), ("completion",), ("label",)), _read_single, _WITHOUT_PAIRS, hard_label),
        RowLayout("scored", (("prompt",), ("completion",), ("score",)), _read_ranked, _OF_PROMPT),
        RowLayout("completion", (("prompt",), ("completion",)), _read_single, _WITHOUT_PAIRS, no_label),
        RowLayout("messages", (("messages",),), _read_messages, _WITHOUT_PAIRS, no_label),
    )
}
"""All layouts, in the order in which a row is tried against them."""


def detected(row: Mapping[str, Any]) -> RowLayout | None:
    """The layout whose columns the row has; the first one, as those of `implicit` are some of `pair`'s."""
    return next((layout for layout in LAYOUTS.values() if layout.fits(row)), None)


def detect(row: Mapping[str, Any]) -> RowLayout:
    """The same; a row that has none is bad."""
    if layout := detected(row):
        return layout
    raise BadRow("missing column", f"columns {', '.join(sorted(map(str, row)))} fit no layout")


def unused_columns(row: Mapping[str, Any], layout: RowLayout) -> list[str]:
    """Columns of the row that nothing reads, so that a misspelt `weigth` is seen in the report."""
    used = {*layout.takes, *(name for names in layout.columns for name in names)}
    return sorted(str(name) for name in row if name not in used)


def to_record(row: Mapping[str, Any], layout: RowLayout, *, file: str, line: int, as_chat: bool = False) -> Record:
    """The row in normal form; with `as_chat`, texts are made into turns.

    Raises:
      BadRow: with the class and the reason.
    """
    row, notes = unpacked(row)
    answers = layout.read(row)
    answers = in_turns(answers, splits=layout.name == "implicit") if as_chat else answers
    if not answers.prompt and is_chat(answers.completions[0]):
        raise BadRow("empty prompt", "there is no message before the answers")
    tools = _tools(row, layout)
    answers = _as_chat(answers, row, tools)
    for index, completion in enumerate(answers.completions):
        _usable(completion, completion_name(index, len(answers.completions)))
    _usable_prompt(answers.prompt)
    answers = _without_equals(answers)
    kept = sorted({index for pair in answers.order for index in pair})
    numbers = _pair_numbers(row, layout)
    return Record(
        prompt=answers.prompt,
        completions=tuple(answers.completions[index] for index in kept),
        pairs=tuple(Pair(kept.index(i), kept.index(j), *numbers) for i, j in answers.order),
        tools=tools,
        chat_template_kwargs=_template_kwargs(row),
        file=file,
        line=line,
        notes=notes + answers.notes + _pair_notes(layout, *numbers),
    )


def _pair_notes(layout: RowLayout, weight: float, margin: float, label: float) -> tuple[tuple[str, str], ...]:
    """What is unusual about the numbers of a row's pairs."""
    notes = [(WEIGHTLESS, "weight is 0, so it adds nothing to the loss")] * (weight == 0)
    if layout.label is soft_label and label < 0.5:
        notes.append((REVERSED, f"label is {label:g}, so what stands in rejected counts as the better answer"))
    return tuple(notes)


def _pair_numbers(row: Mapping[str, Any], layout: RowLayout) -> tuple[float, float, float]:
    """Weight, margin and label of all pairs of the row."""
    weight = number(row["weight"], "weight") if row.get("weight") is not None else 1.0
    has_margin = row.get("margin") is not None and "margin" in layout.takes
    margin = number(row["margin"], "margin") if has_margin else 0.0
    if weight < 0:
        raise BadRow("wrong type", f"weight is {weight:g}; a weight cannot be negative")
    return weight, margin, layout.label(row)


def _without_equals(answers: Answers) -> Answers:
    """The answers without pairs whose two completions are the same, and with a note of what else is unusual."""
    order = tuple((i, j) for i, j in answers.order if i == j or answers.completions[i] != answers.completions[j])
    if not order:
        raise BadRow("identical completions", "chosen and rejected are the same")
    notes = answers.notes
    if len(order) < len(answers.order):
        notes += (("pair left out of a ranked row", "two completions of different rank are the same"),)
    if any(_assistant_turns(completion) > 1 for completion in answers.completions):
        notes += (("completion of several turns", "all turns of the assistant's are scored"),)
    return answers._replace(order=order, notes=notes)


def completion_name(index: int, count: int) -> str:
    """What a completion of a row with so many is called."""
    names = {1: ("completion",), 2: ("chosen", "rejected")}
    return names[count][index] if count in names else f"completion {index}"


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
    if messages[0]["role"] not in SYSTEM:
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
        ends_with_assistant(turns, name)
    said = any(speaks(turn) for turn in turns if turn["role"] == "assistant") if turns else completion
    if not (said.strip() if isinstance(said, str) else said):
        raise BadRow("empty completion", f"{name} is empty")


def _usable_prompt(prompt: Part) -> None:
    """Texts and ids may be empty where the tokenizer has a BOS token (decided there); conversations never."""
    if is_chat(prompt) and not any(speaks(turn) for turn in _turns(prompt) if turn["role"] not in SYSTEM):
        raise BadRow("empty prompt", "the prompt's messages are empty")


def _tools(row: Mapping[str, Any], layout: RowLayout) -> list[dict[str, Any]] | None:
    given = row["input"] if layout.name == "openai" and "tools" not in row else row
    return tools_of(from_json(given, "input").get("tools"), "tools")


def _template_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    given = from_json(row.get("chat_template_kwargs"), "chat_template_kwargs")
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise BadRow("wrong type", f"chat_template_kwargs is {type_name(given)}, not an object")
    return {str(key): value for key, value in given.items() if value is not None}
