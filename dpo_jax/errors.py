"""The error that a user sees, and text made fit for one line of it."""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SECRET = re.compile(r"hf_\w{20,}|gh[pousr]_\w{20,}|sk-[\w-]{20,}|AKIA[A-Z0-9]{16}|(?<=://)[^/\s@]+(?=@)")


COMMAND_LINE = "command line"
"""Stands for the file in faults of what was given there."""


class UserError(ValueError):
    """Something a user gave is wrong: one line that names the file, line or key, the value, and the remedy.

    Commands print it without a traceback and exit with its `code`. Anything else that escapes is our fault and keeps
    its traceback.
    """

    code = 2


def printable(text: str) -> str:
    """The text with line breaks, terminal escapes and other invisible characters written out: `a\\x1b[2J`.

    For whatever comes from a file or a user and goes to a terminal or a log.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def redacted(text: str) -> str:
    """The text with what looks like a token, a key or a password of a URL replaced by ***."""
    return SECRET.sub("***", text)


def redacted_values(value: object) -> Any:
    """Plain JSON values, with every text in them redacted: for all that is written down of settings and paths."""
    return json.loads(redacted(json.dumps(value)))


def public(value: object) -> Any:
    """The value with every text in it redacted, and every absolute path, also that of a judge, cut down to its last
    part: what is published must not describe a machine.

    >>> public(["/home/me/data/pairs.jsonl", "reward:/home/me/rm/model", "org/name"])
    ['pairs.jsonl', 'reward:model', 'org/name']
    """
    if isinstance(value, Mapping):
        return {str(key): public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    if not isinstance(value, str | Path):
        return value
    text = str(value)
    if judge := re.match(r"(reward|model):(?=[/~\\]|[A-Za-z]:[\\/])", text):
        return judge[0] + public(text[judge.end() :])
    if text.startswith(("/", "~", "\\")) or re.match(r"[A-Za-z]:[\\/]", text):
        text = re.split(r"[\\/]", text.rstrip("\\/"))[-1]
    return redacted(text)


def one_line(error: BaseException) -> str:
    """An error's type and the first line of its text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def short(key: str) -> str:
    """A key or a name fit for a line of text."""
    return printable(key if len(key) <= 80 else f"{key[:77]}...")


def nearest(name: str, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """The known name that is most like this one, if one is: what a typing error may have meant.

    >>> nearest("sigmiod", ["sigmoid", "hinge"])
    'sigmoid'
    """
    found = difflib.get_close_matches(name[:200], list(known), 1, likeness)
    return found[0] if found else None


def nearest_file(path: Path, known: Iterable[Path]) -> Path | None:
    """The file whose name is most like that of a missing one, if one is; endings, which many share, tell less.

    >>> nearest_file(Path("pears.jsonl"), map(Path, ["long.jsonl", "data/pairs.jsonl", "data/pairs.yaml"]))
    PosixPath('data/pairs.jsonl')
    >>> nearest_file(Path("missing.jsonl"), map(Path, ["long.jsonl", "pairs.jsonl"]))
    """
    files = {file.name: file for file in known}
    stem = nearest(path.name.partition(".")[0], {name.partition(".")[0] for name in files})
    near = nearest(path.name, (name for name in files if name.partition(".")[0] == stem), 0.0)
    return files[near] if near else None
