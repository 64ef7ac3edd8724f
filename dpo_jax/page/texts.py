"""Text and numbers as a page shows them. What comes from data and models is hostile: made visible, then escaped."""

import json
import math

from dpo_jax.errors import public, redacted

JOINERS = "\u00a0\u200c\u200d"
"""Not printable by Python's rules, and part of ordinary text: a space that does not break, and joiners of letters."""
ANSWER_LETTERS = 1500
"""Letters of a prompt or an answer that a page has; the files beside it have the rest."""


def visible(text: str) -> str:
    """The text with terminal escapes, directional controls, lone surrogates and the like written out; lines stay lines.

    >>> visible("a\\u202eb\\x1b[2J\\n")
    'a\\\\u202eb\\\\x1b[2J\\n'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n" or c in JOINERS else _escape(c) for c in text)


def _escape(letter: str) -> str:
    code = ord(letter)
    return "    " if letter == "\t" else f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def cut(text: str, limit: int = ANSWER_LETTERS) -> str:
    """The beginning of a text, which says how much is missing."""
    return text if len(text) <= limit else f"{text[:limit]} ... ({len(text) - limit:,} more letters)"


def published(value: object) -> str:
    """A setting or a fact as a page shows it: without secrets, and without the folders of this machine."""
    value = public(value)
    return cut(value if isinstance(value, str) else plain(value), 300)


def plain(value: object) -> str:
    """A JSON value as YAML would have it on one line, as far as people care.

    >>> plain(True), plain(5e-07), plain(None), plain(["a", 1])
    ('true', '5e-07', 'null', '["a", 1]')
    """
    return redacted(json.dumps(value, ensure_ascii=False, default=str))


def number(value: int | float | None, form: str = "{:.4g}") -> str:
    """A number, or what there is in its place."""
    return "-" if value is None or math.isnan(value) else form.format(value).replace("-", "\u2212")


def count(value: int | float) -> str:
    """A whole number with its thousands set apart."""
    return f"{value:,.0f}"


def duration(seconds: int | float) -> str:
    """A time in its two largest units.

    >>> duration(8.0), duration(63.2), duration(7265.0)
    ('8 s', '1 min 3 s', '2 h 1 min')
    """
    whole = round(seconds)
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    parts = []
    for name, size in units:
        if whole >= size:
            parts.append(f"{whole // size} {name}")
            whole %= size
    return " ".join(parts[:2]) if parts else f"{seconds:.2g} s"
