"""Values as files store them: conversations and calls as JSON text, and objects that Arrow filled up with nulls.

Parquet and Arrow have no free-form objects: all objects of a column have the same keys, and those that a row did not
give are null. A null inside tools and their calls is therefore left out, from whatever file it comes; nulls inside JSON
text were written by somebody, and stay.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from dpo_jax.data.messages import BadRow, from_json, type_name, without_nulls

COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "completions",
    "responses",
    "messages",
    "conversations",
    "preferred_output",
    "non_preferred_output",
)
"""Columns that may hold conversations, or (of ranked rows) lists of them."""

_CONVERSATION = re.compile(
    r"""\s*(?:\[\s*\{\s*["'](?:role|from|content|value)["']\s*:|\{\s*["'](?:role|from)["']\s*:)"""
)
_SPEAKER = re.compile(r"""["'](?:role|from)["']\s*:""")

Notes = tuple[tuple[str, str], ...]


def unpacked(row: Mapping[str, Any]) -> tuple[dict[str, Any], Notes]:
    """The row with its conversations as objects, and what is to be said about how they were stored.

    Raises:
      BadRow: a text begins like a conversation and is not JSON.
    """
    found = {name: _column(row[name], name) for name in COLUMNS if name in row}
    notes: Notes = ()
    if parsed := [name for name, value in found.items() if value is not row[name]]:
        notes += (("conversation as JSON text", f"{', '.join(parsed)}: read as messages"),)
    given = row["input"] if isinstance(row.get("input"), Mapping) else {}
    calls = (call for value in (*found.values(), given.get("messages")) for call in _calls_in(value))
    if any(map(_has_null, (row.get("tools"), given.get("tools"), *calls))):
        notes += (("null left out", "of tools or their calls, as Parquet and Arrow fill objects up with nulls"),)
    return {**row, **found}, notes


def _column(value: object, name: str) -> object:
    if isinstance(value, str):
        return conversation(value, name)
    if isinstance(value, list) and any(isinstance(item, str) for item in value):
        items = [
            conversation(item, f"{name}[{at}]") if isinstance(item, str) else item for at, item in enumerate(value)
        ]
        return value if all(new is old for new, old in zip(items, value, strict=True)) else items
    return value


def conversation(text: str, name: str) -> Any:
    """The conversation (or the message) that a text is the JSON of, or the text itself if it is another text.

    Raises:
      BadRow: it begins like a conversation and is not JSON.
    """
    if not _CONVERSATION.match(text) or not _SPEAKER.search(text):
        return text
    try:
        value = from_json(text, name)
    except BadRow as error:
        raise BadRow("wrong type", f"{error.reason}, though it begins like a conversation") from None
    messages = value if isinstance(value, list) else [value]
    spoken = all(isinstance(item, Mapping) and ("role" in item or "from" in item) for item in messages)
    return value if spoken else text


def tools_of(value: object, name: str) -> list[dict[str, Any]] | None:
    """Tools of a row: a list of objects, each or all of them perhaps JSON text; without padding.

    Raises:
      BadRow: they are something else.
    """
    tools = from_json(value, name)
    if not tools:
        return None
    items = [from_json(tool, f"{name}[{at}]") for at, tool in enumerate(tools)] if isinstance(tools, list) else []
    if not items or not all(isinstance(tool, Mapping) for tool in items):
        raise BadRow("wrong type", f"{name} is {type_name(tools)}, not a list of objects")
    return items if isinstance(value, str) else [without_nulls(tool) for tool in items]


def _has_null(value: object) -> bool:
    """Whether an object inside the value has a key that is null."""
    if isinstance(value, Mapping):
        return any(item is None or _has_null(item) for item in value.values())
    return isinstance(value, list) and any(map(_has_null, value))


def _calls_in(value: object) -> Iterator[object]:
    """The calls of all messages of a column."""
    if isinstance(value, Mapping):
        yield value.get("tool_calls")
    elif isinstance(value, list):
        for item in value:
            yield from _calls_in(item)
