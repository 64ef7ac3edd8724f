"""Values inside a row, checked: messages, numbers, texts. What is wrong is a `BadRow` that names the field."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
SHAREGPT_ROLES |= {"tool": "tool", "observation": "tool"}

Messages = list[dict[str, Any]]
Part = str | Messages | list[int]


class BadRow(Exception):
    """A row that cannot be used: its class (a key of `report.KINDS`) and what is wrong with it, in one line."""

    def __init__(self, kind: str, reason: str):
        """Remember the class and the reason."""
        super().__init__(f"{kind}: {reason}")
        self.kind, self.reason = kind, reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """How it goes from one process to another."""
        return BadRow, (self.kind, self.reason)


def messages_of(value: object, name: str) -> Messages:
    """A checked conversation: known roles, text contents, calls that are calls. A single message is a list of one.

    A message may also be {"from": ..., "value": ...}, as in ShareGPT.
    """
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise BadRow("wrong type", f"{name} is {type_name(value)}, not a list of messages")
    if not value:
        raise BadRow("empty conversation", f"{name} has no messages")
    return [_message(item, f"{name}[{index}]") for index, item in enumerate(value)]


def _message(item: object, name: str) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise BadRow("wrong type", f"{name} is {type_name(item)}, not a message")
    fields = {key: value for key, value in item.items() if value is not None}
    if "from" in fields and "role" not in fields:
        role, content = item["from"], item.get("value")
        known: Mapping[str, str] = SHAREGPT_ROLES
        fields = {}
    else:
        role, content = item.get("role"), item.get("content")
        known = {role: role for role in ROLES}
    if role is None:
        raise BadRow("null value" if "role" in item else "missing column", f"{name} has no role")
    if not isinstance(role, str) or role not in known:
        raise BadRow("unknown role", f"{name} has role {role!r}; known roles: {', '.join(known)}")
    calls = calls_of(fields.pop("tool_calls", None), f"tool_calls of {name}")
    if content is None and not (known[role] == "assistant" and calls):
        raise BadRow("null value", f"{name} has no content")
    text = {} if content is None else {"content": _content(content, name)}
    return {**fields, "role": known[role], **text, **({"tool_calls": calls} if calls else {})}


def speaks(message: Mapping[str, Any]) -> bool:
    """Whether a message holds anything: some text, or a call of a tool."""
    return bool(message.get("content", "").strip() or message.get("tool_calls"))


def is_chat(part: Part) -> TypeGuard[Messages]:
    """Whether a prompt or a completion is a list of messages (and not a text or token ids)."""
    return isinstance(part, list) and bool(part) and isinstance(part[0], dict)


def _content(content: object, name: str) -> str:
    """Text of a message; a list of text parts (OpenAI) is joined."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        texts = [part.get("text") for part in content]
        if content and all(isinstance(text, str) for text in texts):
            return "".join(texts)
    raise BadRow("wrong type", f"content of {name} is {type_name(content)}, not text")


def type_name(value: object) -> str:
    """What a value of a row is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def need(row: Mapping[str, Any], name: str, remedy: str = "") -> Any:
    """A column that must be there and not be null; `remedy` is said behind that it is not there."""
    if name not in row:
        columns = ", ".join(sorted(map(str, row))) or "none"
        raise BadRow("missing column", f"no {name!r} (columns: {columns}){remedy}")
    if row[name] is None:
        raise BadRow("null value", f"{name} is null")
    return row[name]


LARGEST = float.fromhex("0x1.fffffep+127")
"""The largest number that float32 holds, which is what a row's numbers become."""


def number(value: object, name: str) -> float:
    """A number of a row that is finite in float32."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow("wrong type", f"{name} is {type_name(value)}, not a number")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise BadRow("not finite", f"{name} is {result}")
    if abs(result) > LARGEST:
        raise BadRow("not finite", f"{name} is {result:g}, which is infinite in float32 ({LARGEST:g} is its largest)")
    return result


def from_json(value: object, name: str) -> Any:
    """Tools and template arguments may come as JSON text, as Parquet has no free-form objects."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise BadRow("wrong type", f"{name} is text that is not JSON: {error}") from None


def calls_of(value: object, name: str) -> list[dict[str, Any]]:
    """The calls of a message, checked, without padding. Arguments stay JSON text where they are one.

    Raises:
      BadRow: they are no list of calls with a name each, or the arguments of one are no object.
    """
    calls = value if isinstance(value, list) else from_json(value, name)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise BadRow("wrong type", f"{name} is {type_name(calls)}, not a list of calls")
    return [_call(from_json(call, f"{name}[{at}]"), f"{name}[{at}]") for at, call in enumerate(calls)]


def _call(call: object, name: str) -> dict[str, Any]:
    called = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(called, Mapping) or not isinstance(called.get("name"), str):
        raise BadRow("wrong type", f"{name} is no call of a function: an object with a function that has a name")
    arguments_of(called.get("arguments"), f"arguments of {name}")
    return without_nulls(call)


def arguments_of(value: object, name: str) -> dict[str, Any]:
    """Arguments of a call as an object; none are an empty one.

    Raises:
      BadRow: they are something else, or text that is not the JSON of an object.
    """
    arguments = from_json(value, name)
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping):
        raise BadRow("wrong type", f"{name} is {type_name(arguments)}, not an object")
    return dict(arguments)


def without_nulls(value: object) -> Any:
    """The value without those keys of its objects that are null."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(item) for item in value]
    return value


def shared_length(one: Sequence, other: Sequence) -> int:
    """Length of the longest common prefix of two texts or two lists. Bisection: n log n, at the speed of memcmp."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def texts_of(value: object) -> Iterator[str]:
    """Every text inside a prompt, a completion, or tools: contents, names, keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from texts_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_of(item)
