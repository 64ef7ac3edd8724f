"""The error that a user sees, and text made fit for one line of it."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something a user gave is wrong: one line that names the file, line or key, the value, and the remedy.

    Commands print it without a traceback and exit with code 2. Anything else that escapes is our fault and keeps its
    traceback.
    """


def printable(text: str) -> str:
    """The text with line breaks, terminal escapes and other invisible characters written out: `a\\x1b[2J`.

    For whatever comes from a file or a user and goes to a terminal or a log.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


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
