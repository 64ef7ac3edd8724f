"""Columns of files under other names: the mapping of a run (`data.columns`), and the one that a file seems to need.

A mapping goes from a layout's column to the file's, or to several whose texts are joined by a line break:

    {prompt: question, chosen: good, rejected: bad}      {prompt: [instruction, input]}
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from dpo_jax.data.layouts import LAYOUTS, RANKS, SCORES, RowLayout
from dpo_jax.data.messages import BadRow, shared_length, type_name
from dpo_jax.data.report import clean
from dpo_jax.errors import nearest

Columns = Mapping[str, str | tuple[str, ...]]

KNOWN = sorted(
    {name for layout in LAYOUTS.values() for name in (*layout.takes, *(one for many in layout.columns for one in many))}
)
"""Every column that some layout reads."""
PROMPTS = (
    "question",
    "instruction",
    "input",
    "query",
    "problem",
    "request",
    "context",
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
    "completions": "answers outputs generations candidates output response".split(),
    "messages": "conversation conversations dialogue dialog turns chat".split(),
}
"""What others call the columns of layouts."""
LISTS = ("completions", "messages")
"""Columns that hold lists; the others of LIKE hold texts or conversations."""


def problems_of(columns: Columns) -> list[str]:
    """What is wrong with a mapping, whatever the files."""
    found, seen = [], {}
    for name, given in columns.items():
        if name not in KNOWN:
            near = nearest(name, KNOWN)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(KNOWN)}"
            found.append(f"{clean(name, 80)!r} is no column of a layout; {hint}")
        for column in _sources(given):
            if not column.strip():
                found.append(f"{name} has no name of a column; write one, or leave it out")
            if column in seen:
                found.append(f"{clean(column, 80)!r} is given for {seen[column]} and for {name}; keep one")
            seen[column] = name
    return found


def _sources(given: str | tuple[str, ...]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def renamed(row: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """The row under the names that layouts read. Columns that the row lacks stay away.

    Raises:
      BadRow: columns that are to be joined hold something else than texts.
    """
    if not columns:
        return row
    taken = {column for given in columns.values() for column in _sources(given)}
    kept = {name: value for name, value in row.items() if name not in taken and name not in columns}
    for name, given in columns.items():
        if isinstance(given, str):
            kept |= {name: row[given]} if given in row else {}
        elif parts := [column for column in given if row.get(column) is not None]:
            kept[name] = "\n".join(text for column in parts if (text := _text(row[column], column)).strip())
    return kept


def _text(value: object, column: str) -> str:
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{column} is {type_name(value)}; only texts can be joined")
    return value


def missing(row: Mapping[str, Any], columns: Columns) -> str | None:
    """What to say of columns of the mapping that a row lacks."""
    gone = next((one for given in columns.values() for one in _sources(given) if one not in row), None)
    if gone is None:
        return None
    near = nearest(gone, map(str, row))
    hint = f"did you mean {clean(near, 80)}?" if near else "correct the mapping"
    return f"data.columns: no column {clean(gone, 80)!r} here; the columns are {_listed(row)}; {hint}"


def replaced(row: Mapping[str, Any], columns: Columns) -> list[str]:
    """Columns of the file that are not read because another one takes their name."""
    taken = {column for given in columns.values() for column in _sources(given)}
    return [name for name in columns if name in row and name not in taken]


def unread_prompt(row: Mapping[str, Any], layout: RowLayout, columns: Columns) -> str | None:
    """What to say of a row, under its new names, whose prompt seems to be where its detected layout does not look."""
    if layout.name == "implicit":
        found = [name for name in PROMPTS if _holds_text(row.get(name)) and not _begins_with(row, row[name])]
        either = "or data.layout=implicit if chosen and rejected begin with the prompt themselves"
    elif "prompt" in columns and "instruction" in _sources(columns["prompt"]):
        found = ["input"] if _holds_text(row.get("input")) else []
        found, either = [*_sources(columns["prompt"]), *found] if found else [], f"or data.layout={layout.name}"
    else:
        return None
    if not found:
        return None
    seems = f"{found[-1]} seems to be part of the prompt" if len(found) > 1 else f"{found[0]} seems to be the prompt"
    return f"{seems} and is not read; write {_written({'prompt': found})}, {either}"


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
    """What to say of a file whose rows fit no layout: their columns, the nearest layout, and the mapping to write."""
    layout = max(_ORDER, key=lambda name: _likeness(row, LAYOUTS[name]))
    groups = LAYOUTS[layout].columns
    guesses = {names[0]: _guess(row, names) or ["COLUMN"] for names in groups if not any(name in row for name in names)}
    also = f", and with {' or '.join((RANKS[0], SCORES[0]))}" if layout == "ranked" else ""
    means = ", where COLUMN stands for a name of yours" if ["COLUMN"] in guesses.values() else ""
    return (
        f"columns {_listed(row)} fit no layout; the nearest is {layout}, with "
        f"{', '.join(' or '.join(names) for names in groups)}{also}: write {_written(guesses)}{means}, or rename them"
    )


_ORDER = ("pair", "completion", "messages", "ranked", *(name for name in LAYOUTS if name not in ("pair", "implicit")))
"""Layouts in the order in which one is taken for the nearest where several are as near."""


def _likeness(row: Mapping[str, Any], layout: RowLayout) -> float:
    found = [any(name in row for name in names) or bool(_guess(row, names)) for names in layout.columns]
    return sum(found) / len(found)


def _guess(row: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Columns of the row that may be what a layout calls by one of these names."""
    for name in names:
        is_list = name in LISTS
        close = [like for like in LIKE.get(name, ()) if like in row and (_is_list(row[like]) == is_list)]
        if name == "prompt" and close[:2] == ["instruction", "input"]:
            return close[:2]
        if close:
            return close[:1]
    return []


def _is_list(value: object) -> bool:
    """Whether a value is a list of completions, or a whole conversation; an assistant's turns are one completion."""
    return isinstance(value, list) and not (_is_turns(value) and value[0].get("role") == "assistant")


def _is_turns(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _listed(row: Mapping[str, Any]) -> str:
    names = sorted(clean(str(name), 40) for name in row)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") or "none"


def _written(columns: Mapping[str, list[str]]) -> str:
    """A mapping as the setting has it."""
    shown = {name: given if len(given) > 1 else given[0] for name, given in columns.items()}
    inner = ", ".join(f"{name}: {_scalar(given)}" for name, given in shown.items())
    return f"data.columns={{{inner}}}"


def _scalar(given: str | list[str]) -> str:
    if isinstance(given, list):
        return f"[{', '.join(map(_scalar, given))}]"
    return given if re.fullmatch(r"[A-Za-z_][\w.-]*", given) else json.dumps(given)
