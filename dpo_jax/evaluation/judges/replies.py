"""What a server's judge said, read strictly: what can be meant in one way only is a verdict, and nothing else is."""

import re
from typing import Any

from dpo_jax.evaluation.judging import FIRST, SECOND, TIE

ENDS = {"a": FIRST, "b": SECOND, "tie": TIE, "equal": TIE, "both": TIE, "neither": TIE}
"""What a judge may call the better answer, and how a contest ends by it."""
_THOUGHT = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_OPEN = re.compile(r"<think(?:ing)?>", re.IGNORECASE)
_ASKED = re.compile(r"""["']better["']\s*:""", re.IGNORECASE)
_STATED = re.compile(
    _ASKED.pattern + r"""\s*(?P<quote>["'])\s*(?:answer\s+)?(?P<end>\w+)\s*(?P=quote)\s*(?=[,}]|\Z)""", re.IGNORECASE
)
_BRACKETS = re.compile(r"\[\[\s*(?P<end>A|B|C|tie)\s*\]\]", re.IGNORECASE)
_BARE = re.compile(r"(?:answer\s+)?(?P<end>A|B|tie)", re.IGNORECASE)
LONGEST = 100_000
"""Characters of a reply that are looked at."""


def end_of(said: str) -> float | None:
    """How a contest ends by a reply, for the answer that was shown as A; None if the reply says no one thing.

    Thoughts between <think> marks are left out; a thought that was cut off says nothing. Then every `"better": "A"` of
    the rest must be the same; or every [[A]]; or the rest must be one letter, or the word tie.

    >>> end_of('```json {"reason": "B is rude", "better": "A"} ```'), end_of("**B**"), end_of("A or B?")
    (1.0, 0.0, None)
    """
    rest = _THOUGHT.sub(" ", said[:LONGEST])
    if _OPEN.search(rest):
        return None
    if asked := len(_ASKED.findall(rest)):
        stated = [ENDS.get(found["end"].lower()) for found in _STATED.finditer(rest)]
        return stated[0] if len(stated) == asked and len(set(stated)) == 1 else None
    if found := {match["end"].lower() for match in _BRACKETS.finditer(rest)}:
        return {**ENDS, "c": TIE}[found.pop()] if len(found) == 1 else None  # [[C]] is MT-Bench's tie
    bare = _BARE.fullmatch(rest.strip(" \t\r\n\"'`*_.!:()[]{}"))
    return ENDS[bare["end"].lower()] if bare else None


def content_of(reply: Any) -> str | None:
    """The text of a chat completion; None if it is none, or holds no text."""
    try:
        content = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return None
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else None


def tokens_of(reply: object) -> int | None:
    """The tokens that a chat completion is billed for, if it says so."""
    usage = reply.get("usage") if isinstance(reply, dict) else None
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return total if isinstance(total, int) and not isinstance(total, bool) and total >= 0 else None
