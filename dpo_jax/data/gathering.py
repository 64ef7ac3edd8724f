"""Ranked rows from files that hold one answer, or one message, in a row.

    scored   rows that follow each other and have the same prompt:      q a 3 | q b 4 | r c 1   ->   q [a b] | r [c]
    tree     messages of a tree, each with its parent and its rank among the answers to it

No row vanishes: each is part of a ranked row (`Row.count` says of how many rows that is), or is handed on with the
reason why it is left out. At any time the rows of one prompt, or of one tree, are held.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from dpo_jax.data.messages import BadRow, need, type_name
from dpo_jax.data.readers import Row, value_of
from dpo_jax.data.report import clean
from dpo_jax.errors import UserError

Read = Callable[[object], dict[str, Any]]
"""Makes of a row's value the columns of its layout; raises BadRow."""

MOST = 10_000
"""Rows of one prompt, or messages of one tree: more have another reason."""


def scored(rows: Iterable[Row], read: Read) -> Iterator[Row]:
    """Ranked rows of rows with `prompt`, `completion` and `score`; a score of null leaves its row out.

    Raises:
      UserError: more than MOST rows have the same prompt.
    """
    group: list[tuple[Row, dict[str, Any]]] = []
    for row in rows:
        try:
            value = read(value_of(row))
            for name in ("prompt", "completion"):
                need(value, name)
        except BadRow as error:
            yield row._replace(value=error)
            continue
        if value.get("score") is None:
            yield row._replace(value=BadRow("no rank or score", "score is null"))
            continue
        if group and _asked(group[0][1]) != _asked(value):
            yield _ranked(group)
            group = []
        group.append((row, value))
        if len(group) > MOST:
            raise UserError(
                f"{_place(row)}: more than {MOST:,} rows one after the other have the same prompt; name the prompt's "
                "column with data.columns={prompt: COLUMN}"
            )
    if group:
        yield _ranked(group)


def _asked(value: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value[name] for name in ("prompt", "system", "tools", "chat_template_kwargs") if name in value}


def _ranked(group: list[tuple[Row, dict[str, Any]]]) -> Row:
    first, value = group[0]
    given = {
        **_asked(value),
        "completions": [one["completion"] for _, one in group],
        "scores": [one["score"] for _, one in group],
    }
    only = BadRow("only answer to its prompt", "no other answer to compare it with")
    return _of([row for row, _ in group], given if len(group) > 1 else only)


def _of(rows: list[Row], value: object) -> Row:
    """One row for several."""
    return rows[0]._replace(value=value, count=len(rows), notes=tuple(note for row in rows for note in row.notes))


def _place(row: Row) -> str:
    return f"{clean(row.file, 400)}:{row.line}"


# ------------------------------------------------------------------------------------------------ trees


class _Message(NamedTuple):
    """One message of a tree."""

    row: Row
    id: str
    parent: str | None
    text: str
    asks: bool
    rank: Any
    gone: BadRow | None
    """Why it is left out, if it says so itself."""


_ROLES = {"prompter": True, "user": True, "human": True, "assistant": False, "gpt": False}
"""Whose messages ask."""


def tree(rows: Iterable[Row], read: Read) -> Iterator[Row]:
    """Ranked rows of messages: a question with all before it, and the answers to it that have a rank.

    The messages of a tree have the same `message_tree_id` and stand together (those that come later are bad rows);
    without one, a tree begins at a message without parent. A row may also hold a whole tree, as `prompt` with `replies`
    inside `replies`.

    Raises:
      UserError: a tree has more than MOST messages.
    """
    held: list[_Message] = []
    last, done = None, set()
    for row in _flat(rows, read):
        if isinstance(row.value, BadRow):
            yield row
            continue
        value: Any = row.value
        name = value.get("message_tree_id") or (None if value.get("parent_id") else value.get("message_id"))
        if name is not None and name != last:
            mark = hashlib.blake2b(str(name).encode("utf-8", "replace"), digest_size=8).digest()
            if mark in done:
                apart = f"messages of tree {clean(str(name), 60)} stand apart; sort the rows by message_tree_id"
                yield row._replace(value=BadRow("duplicate key", apart))
                continue
            yield from _answers(held)
            held, last = [], name
            done.add(mark)
        try:
            held.append(_message(row, value))
        except BadRow as error:
            yield row._replace(value=error)
        if len(held) > MOST:
            raise UserError(f"{_place(row)}: a tree of more than {MOST:,} messages; give each its message_tree_id")
    yield from _answers(held)


def _flat(rows: Iterable[Row], read: Read) -> Iterator[Row]:
    """The rows with their values read, and each message of a whole tree as a row."""
    for row in rows:
        try:
            value = read(value_of(row))
        except BadRow as error:
            yield row._replace(value=error)
            continue
        if isinstance(value.get("prompt"), Mapping):
            yield from _nested(row, value)
        else:
            yield row._replace(value=value)


def _nested(row: Row, tree: Mapping[str, Any]) -> Iterator[Row]:
    name, waiting = tree.get("message_tree_id"), [(tree["prompt"], None)]
    while waiting:
        message, parent = waiting.pop()
        if not isinstance(message, Mapping):
            yield row._replace(value=BadRow("wrong type", f"a reply is {type_name(message)}, not an object"))
            continue
        inner = {key: value for key, value in message.items() if key != "replies"}
        yield row._replace(
            value={**inner, "parent_id": parent, "message_tree_id": name or tree["prompt"].get("message_id")}
        )
        replies = message.get("replies") or []
        waiting += [
            (reply, message.get("message_id"))
            for reply in reversed(replies if isinstance(replies, list) else [replies])
        ]


def _message(row: Row, value: Mapping[str, Any]) -> _Message:
    role, text, name = need(value, "role"), need(value, "text"), need(value, "message_id")
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRow("unknown role", f"role is {role!r}; known roles: {', '.join(_ROLES)}")
    if not isinstance(text, str):
        raise BadRow("wrong type", f"text is {type_name(text)}, not text")
    gone = None
    if value.get("deleted"):
        gone = BadRow("deleted message", "deleted is true")
    elif value.get("review_result") is False:
        gone = BadRow("message that failed review", "review_result is false")
    parent = value.get("parent_id")
    return _Message(
        row, str(name), None if parent is None else str(parent), text, _ROLES[role], value.get("rank"), gone
    )


def _answers(held: list[_Message]) -> Iterator[Row]:
    """The ranked rows of one tree, in the order of their first answers, and all other messages with the reason."""
    known: dict[str, _Message] = {}
    for message in held:
        if known.setdefault(message.id, message) is not message:
            yield message.row._replace(value=BadRow("duplicate key", f"another message has message_id {message.id!r}"))
    lost: dict[str, BadRow | None] = {}
    for name in known:
        _follow(name, known, lost)
    ranked: dict[str, list[_Message]] = {}
    for message in known.values():
        if lost[message.id] is None and not message.asks and message.rank is not None:
            ranked.setdefault(message.parent or "", []).append(message)
    for message in known.values():
        siblings = ranked.get(message.id if message.asks else message.parent or "", [])
        reason = lost[message.id] or _unranked(message, len(siblings))
        if reason is not None:
            yield message.row._replace(value=reason)
        elif message is siblings[0]:
            yield _group(known[message.parent or ""], siblings, known)


def _unranked(message: _Message, ranked: int) -> BadRow | None:
    """Why a message that is whole is in no ranked row, where `ranked` answers have a rank; None: it is in one."""
    if message.asks:
        return None if ranked > 1 else BadRow("question without ranked answers", "read where others follow it")
    if message.rank is None:
        return BadRow("no rank or score", "rank is null")
    return None if ranked > 1 else BadRow("only answer to its prompt", "no other has a rank")


def _group(question: _Message, answers: list[_Message], known: Mapping[str, _Message]) -> Row:
    path = [question]
    while (parent := path[-1].parent) is not None:
        path.append(known[parent])
    value = {
        "prompt": [{"role": "user" if one.asks else "assistant", "content": one.text} for one in reversed(path)],
        "completions": [[{"role": "assistant", "content": one.text}] for one in answers],
        "ranks": [one.rank for one in answers],
    }
    return _of([*(one.row for one in answers), question.row], value)


def _follow(name: str, known: Mapping[str, _Message], lost: dict[str, BadRow | None]) -> None:
    """Find out whether the tree has all messages from its first to this one, and if not, why."""
    chain = []
    while name not in lost:
        message = known[name]
        lost[name] = BadRow("missing parent", "its parents go round in a circle")  # unless a way out is found
        chain.append(message)
        if message.parent is None or message.parent not in known:
            break
        name = message.parent
    for message in reversed(chain):
        lost[message.id] = _loss(message, known, lost)


def _loss(message: _Message, known: Mapping[str, _Message], lost: Mapping[str, BadRow | None]) -> BadRow | None:
    if message.gone is not None:
        return message.gone
    if message.parent is None:
        return None if message.asks else BadRow("missing parent", "an answer to no question")
    if message.parent not in known:
        return BadRow("missing parent", f"{clean(message.parent, 60)!r} is not in its tree")
    if (before := lost[message.parent]) is not None:
        return BadRow("missing parent", f"a message before it is left out: {before.kind}")
    if known[message.parent].asks == message.asks:
        return BadRow("wrong type", "a message answers one of the same role")
    return None


GATHERERS: Mapping[str, Callable[[Iterable[Row], Read], Iterator[Row]]] = {"scored": scored, "tree": tree}
"""What makes ranked rows of the rows of a layout."""
