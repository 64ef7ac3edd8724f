"""What the columns of a file seem to be, where they fit no layout, or the prompt stands where nobody reads it.

A guess is never acted on: it is the mapping that the message advises.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any

from dpo_jax.data.columns import KNOWN, Columns, listed, sources_of
from dpo_jax.data.layouts import LAYOUTS, PREFERENCES, RANKS, SCORES, RowLayout, detected
from dpo_jax.data.messages import shared_length
from dpo_jax.errors import nearest

PROMPTS = (
    "question",
    "instruction",
    "input",
    "query",
    "problem",
    "request",
    "context",
    "history",
    "post",
    "user_prompt",
    "user_input",
    "prompt_text",
    "text_prompt",
    "raw_prompt",
)
"""What others call the prompt."""
LIKE = {
    "prompt": PROMPTS,
    "chosen": "chosen_response response_chosen chosen_answer preferred preferred_response accepted good better best "
    "positive win winner response_j".split(),
    "rejected": "rejected_response response_rejected rejected_answer dispreferred dispreferred_response refused bad "
    "worse worst negative lose loser response_k".split(),
    "completion": "response answer output target generation solution".split(),
    "completions": "answers outputs generations candidates responses output response".split(),
    "messages": "conversation conversations dialogue dialog turns chat".split(),
    "label": "desirable is_desirable thumbs_up liked".split(),
    "score": "helpfulness overall_score rating reward quality points".split(),
    "best": "better_response_id preferred_response_id better_id preferred_id better winner choice preferred "
    "safer_response_id".split(),
    "strength": "overall_preference preference_strength preference preference_score".split(),
    "message_id": "id uuid node_id".split(),
    "parent_id": "parent parent_message_id reply_to".split(),
    "text": "content message body".split(),
    "role": "speaker author sender".split(),
    "rank": "ranking position order".split(),
}
"""What others call the columns of layouts."""
_GOOD = "good better best chosen preferred accepted positive win wins winner winning won correct right w".split()
_BAD = (
    "bad worse worst rejected dispreferred refused negative lose loses loser losing lost incorrect wrong "
    "undesirable unpreferred nonpreferred l"
).split()
_NOT = ("non", "not", "un", "dis", "less")
"""Words in names of columns that tell the better of two answers from the other; a good one after these is a bad one."""
_OPENAI = ("preferred_output", "non_preferred_output")
_ASKS = ("prompt", "question", "instruction", "query", "problem", "request")
"""Words in names of columns that ask."""
NUMBERS = ("score", "best", "strength", "rank", "label")
"""Columns that hold numbers; but for completions, the others of LIKE hold texts or conversations."""
TEXT_FIELDS = ("answer", "response", "text", "content", "completion", "output", "generation")
"""What others call the text of an answer that is an object; its rank or score goes by the names that layouts know."""
SCORE_FIELDS = (*SCORES, "overall_score", "reward")


def unread_prompt(row: Mapping[str, Any], layout: RowLayout, columns: Columns) -> str | None:
    """What to say of a row, under its new names, whose prompt seems to be where its detected layout does not look."""
    if layout.name == "implicit":
        names = [*PROMPTS, *_misspelt(row, "prompt")]
        found = [name for name in names if _holds_text(row.get(name)) and not _begins_with(row, row[name])]
        either = "or data.layout=implicit if chosen and rejected begin with the prompt themselves"
    elif "prompt" in columns and "instruction" in sources_of(columns["prompt"]):
        found = ["input"] if _holds_text(row.get("input")) else []
        found, either = [*sources_of(columns["prompt"]), *found] if found else [], f"or data.layout={layout.name}"
    else:
        return None
    if not found:
        return None
    seems = f"{found[-1]} seems to be part of the prompt" if len(found) > 1 else f"{found[0]} seems to be the prompt"
    return f"{seems} and is not read; write {_written({'prompt': found})}, {either}"


def unread_preference(row: Mapping[str, Any], layout: RowLayout) -> str | None:
    """What to say of a row that was detected as one answer to learn, and seems to prefer one to another."""
    if layout.name not in ("completion", "messages"):
        return None
    for other in map(LAYOUTS.__getitem__, ("pair", "ranked", "unpaired")):
        mapping = {name: found for name, found in _mapping(row, other) if name != "prompt"}
        half = other.name == "pair" and any(found == [name] for name, found in mapping.items())
        if half or all(mapping.values()):
            return (
                f"columns {listed(row)} seem to hold a preference, of layout {other.name}, and would be read as one "
                f"answer to learn; write {_advised(row, other)}, or data.layout={layout.name}"
            )
    return None


def _holds_text(value: object) -> bool:
    return bool(value.strip() if isinstance(value, str) else _is_turns(value))


def _begins_with(row: Mapping[str, Any], prompt: object) -> bool:
    """Whether chosen and rejected hold the prompt before their answers: conversations do that open with a question."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        shared = chosen[: shared_length(chosen, rejected)]
        return isinstance(prompt, str) and prompt.strip() in shared
    if isinstance(chosen, list) and _is_turns(chosen):
        return chosen[0].get("role", chosen[0].get("from")) not in ("assistant", "gpt")
    return True  # neither texts nor conversations: a bad row for another reason


# ------------------------------------------------------------------------------------------------ no layout


def no_layout(row: Mapping[str, Any]) -> str:
    """What to say of a file whose rows fit no layout: their columns, the nearest layout, and the mapping to write.

    Or, where the file is one object around its rows, that these are wanted alone.
    """
    if inside := next((name for name, value in row.items() if _objects(value) and detected(value[0])), None):
        return f"the rows seem to be in the list {inside!r} of this object; write that list alone into a file"
    layout = max((LAYOUTS[name] for name in _ORDER), key=lambda layout: _likeness(row, layout))
    groups = ", ".join(" or ".join(names) for names in layout.columns if names is not PREFERENCES)
    also = ", and with ranks, scores, best or strength" if PREFERENCES in layout.columns else ""
    return (
        f"columns {listed(row)} fit no layout; the nearest is {layout.name}, with {groups}{also}: write "
        f"{_advised(row, layout)}, or rename them"
    )


_FIRST = ("pair", "implicit", "ranked", "unpaired", "scored", "completion", "messages")
_ORDER = (*_FIRST, *(name for name in LAYOUTS if name not in _FIRST))
"""Layouts in the order in which one is taken for the nearest where several are as near."""


def _likeness(row: Mapping[str, Any], layout: RowLayout) -> tuple[float, int]:
    """The share of a layout's columns that are found, and how many these are."""
    found = sum(bool(found) for _, found in _mapping(row, layout))
    if layout.name == "completion" and found < len(layout.columns) and _texts(row) > 2:
        return 0.0, 0  # a prompt and several answers, of which it cannot be said which is which
    return found / len(layout.columns), found


def _texts(row: Mapping[str, Any]) -> int:
    """How many columns hold a text, or a conversation."""
    return sum(map(_holds_text, row.values()))


def _mapping(row: Mapping[str, Any], layout: RowLayout) -> Iterator[tuple[str, list[str]]]:
    """What may be each of the columns that a layout must have, by the layout's name; nothing where nothing may."""
    for names in layout.columns:
        if names is PREFERENCES:
            yield _preference(row)
        elif there := next((name for name in names if name in row and not _objects(row[name])), None):
            yield there, [there]
        else:
            yield names[0], next((found for name in names if (found := _guess(row, name))), [])


def _guess(row: Mapping[str, Any], name: str) -> list[str]:
    """Columns of the row that may be what a layout calls by this name."""
    if name in ("completions", "responses"):
        return _several(row)
    close = [like for like in LIKE.get(name, ()) if like in row and _suits(row[like], name)]
    if name == "prompt" and close[:2] == ["instruction", "input"]:
        return close[:2]
    if name == "prompt" and not close:
        close = [like for like in ("messages", *LIKE["messages"]) if _is_turns(row.get(like))]
    return close[:1] or _by_words(row, name) or _misspelt(row, name)


def _by_words(row: Mapping[str, Any], name: str) -> list[str]:
    """The column that a word in its name says to be the prompt, or the better or the worse of two answers.

    >>> row = {"user_question": "Why?", "answerGood": "yes", "answer_bad": "no", "source": "web"}
    >>> [_by_words(row, name) for name in ("prompt", "chosen", "rejected")]
    [['user_question'], ['answerGood'], ['answer_bad']]
    """
    columns = [column for column in row if column not in KNOWN or column in _OPENAI]
    texts = {column: _words(column) for column in columns if _suits(row[column], "prompt")}
    asking = [column for column, words in texts.items() if words & {*_ASKS}]
    if name == "prompt":
        return asking[:1]
    texts = {column: words for column, words in texts.items() if column not in asking}
    bad = {column: words for column, words in texts.items() if words & {*_BAD} or words & {*_NOT} and words & {*_GOOD}}
    good = {column: words for column, words in texts.items() if words & {*_GOOD} and column not in bad}
    good = good or {column: words for column, words in texts.items() if column in LIKE["completion"]}
    for better, worse in itertools.product(good, bad):
        if good[better] - {*_GOOD} == bad[worse] - {*_BAD, *_GOOD, *_NOT} or len(good) == len(bad) == 1:
            return {"chosen": [better], "rejected": [worse]}.get(name, [])
    return []


def _words(name: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", str(name))}


def _misspelt(row: Mapping[str, Any], name: str) -> list[str]:
    """The column whose name may be this one, written wrongly."""
    strange = [str(column) for column, value in row.items() if column not in KNOWN and _suits(value, name)]
    near = nearest(name, strange, 0.8)
    return [near] if near else []


def _suits(value: object, name: str) -> bool:
    if name in NUMBERS:
        return value is None or isinstance(value, int | float)
    if name == "messages":
        return _is_turns(value)
    return not isinstance(value, int | float) and not _is_list(value)


def _several(row: Mapping[str, Any]) -> list[str]:
    """Where several answers to a prompt may be: in a list, in fields of a list of objects, or in numbered columns."""
    named = next((like for like in LIKE["completions"] if _is_list(row.get(like)) and not _objects(row[like])), None)
    if named is not None:
        return [named]
    answers, text = _answer_objects(row)
    return [f"{answers}.{text}"] if answers else _numbered(row, str)


def _preference(row: Mapping[str, Any]) -> tuple[str, list[str]]:
    """What may say which answer is better, and what a layout calls that."""
    if there := next((name for name in PREFERENCES if row.get(name) is not None), None):
        return there, [there]
    answers, _ = _answer_objects(row)
    for name, fields in (("ranks", RANKS), ("scores", SCORE_FIELDS)) if answers else ():
        if found := next((field for field in fields if field in row[answers][0]), None):
            return name, [f"{answers}.{found}"]
    if scores := _numbered(row, int | float):
        return "scores", scores
    return next(((name, found) for name in ("strength", "best") if (found := _guess(row, name))), ("ranks", []))


def _answer_objects(row: Mapping[str, Any]) -> tuple[str, str]:
    """The column that is a list of objects with a text each, and that field of theirs; empty names where none is."""
    for name, value in row.items():
        if _objects(value) and (field := next((field for field in TEXT_FIELDS if field in value[0]), None)):
            return name, field
    return "", ""


_NUMBERED = re.compile(r"(?P<stem>.*?)(?:_?(?:[0-9]|[AB])|_[a-z])")
_ANSWERS = re.compile("answer|response|completion|output|generation|reply|candidate|ref|summary|text")
_SCORES = re.compile("score|rating|reward|points|votes")


def _numbered(row: Mapping[str, Any], kind: type | UnionType) -> list[str]:
    """The columns whose names differ in a last number or letter alone, and that hold answers (`str`) or scores."""
    stems: dict[str, list[str]] = {}
    for name, value in row.items():
        match, what = _NUMBERED.fullmatch(str(name)), _ANSWERS if kind is str else _SCORES
        if match and what.search(match["stem"]) and (isinstance(value, kind) or (kind is str and _is_turns(value))):
            stems.setdefault(match["stem"], []).append(name)
    return next((sorted(names) for names in stems.values() if len(names) > 1), [])


def _objects(value: object) -> bool:
    """Whether a value is a list of objects that are no messages."""
    return _is_turns(value) and not {"role", "from"} & set(value[0])  # pyright: ignore[reportIndexIssue]


def _is_list(value: object) -> bool:
    """Whether a value is a list of completions; the turns of a conversation are one of them."""
    return isinstance(value, list) and (_objects(value) or not _is_turns(value))


def _is_turns(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _advised(row: Mapping[str, Any], layout: RowLayout) -> str:
    """The mapping that makes the row one of the layout, as far as its columns can be guessed."""
    guesses = {name: found or ["COLUMN"] for name, found in _mapping(row, layout) if found != [name]}
    means = ", where COLUMN stands for a name of yours" if ["COLUMN"] in guesses.values() else ""
    return f"{_written(guesses)}{means}"


def _written(columns: Mapping[str, list[str]]) -> str:
    """A mapping as the setting has it, in the quotes that a shell wants."""
    shown = {name: given if len(given) > 1 else given[0] for name, given in columns.items()}
    inner = ", ".join(f"{name}: {_scalar(given)}" for name, given in shown.items())
    return f"'data.columns={{{inner}}}'"


def _scalar(given: str | list[str]) -> str:
    if isinstance(given, list):
        return f"[{', '.join(map(_scalar, given))}]"
    return given if re.fullmatch(r"[A-Za-z_][\w.-]*", given) else json.dumps(given)
