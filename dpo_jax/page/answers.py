"""What a model answered before and after, side by side."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from dpo_jax.page.folder import RunFolder
from dpo_jax.page.texts import cut

TIE = 0.5
"""Outcome of a contest that neither answer wins, as `evaluation.judging` has it; more is a win of the newer one."""
MOST = 40
"""Questions on a page; the files of answers have them all."""
WORDS = {True: ("good", "good"), False: ("bad", "bad"), None: ("", "")}


class Side(NamedTuple):
    """An answer, what was said of it (`good`, `bad` or nothing), and whether it was cut off."""

    text: str
    verdict: str
    finished: bool


class AnswersRow(NamedTuple):
    """A question with its answers; `change` is `gained`, `lost` or nothing; `judged` is what judges said of both."""

    prompt: str
    sides: list[Side]
    change: str
    judged: list[str]


class AnswersTable(NamedTuple):
    """The rows that are shown of so many, and the heads of their columns."""

    rows: list[AnswersRow]
    total: int
    heads: list[str]
    gained: int
    lost: int


def table(run: RunFolder) -> AnswersTable | None:
    """Answers before and after: first those that became bad or good, then the others, each in the file's order."""
    if not run.answers:
        return None
    first, last = run.answers[0], run.answers[-1]
    files = [first, last] if last is not first else [first]
    rows = [_row(*rows) for rows in zip(*(file.rows for file in files), strict=False)]
    order = {"lost": 0, "gained": 1, "": 2}
    # some of each kind: a page of nothing but gains would be a flattering sample
    kinds = [[row for row in rows if row.change == kind] for kind in order]
    room = [min(len(kind), MOST // 3) for kind in kinds]
    room[2] = min(len(kinds[2]), MOST - room[0] - room[1])
    room[1] = min(len(kinds[1]), MOST - room[0] - room[2])
    shown = [row for kind, count in zip(kinds, room, strict=True) for row in kind[:count]]
    heads = ["before" if file.step == 0 else f"after step {file.step:,}" for file in files]
    return AnswersTable(shown, len(rows), heads, len(kinds[1]), len(kinds[0]))


def _row(*rows: Mapping[str, Any]) -> AnswersRow:
    sides = [_side(row) for row in rows]
    verdicts = [side.verdict for side in sides]
    change = "" if len(set(verdicts)) < 2 or "" in verdicts else "gained" if verdicts[-1] == "good" else "lost"
    return AnswersRow(cut(prompt_text(rows[0].get("prompt"))), sides, change, _judged(rows[-1]))


def _side(row: Mapping[str, Any]) -> Side:
    good = row.get("good")
    text = row.get("answer")
    verdict = WORDS[good if isinstance(good, bool) else None][0]
    return Side(cut(text if isinstance(text, str) else _plain(text)), verdict, row.get("finished") is not False)


def _judged(row: Mapping[str, Any]) -> list[str]:
    """What each judge said of the answer against that of the start: better, no better, or worse, and why."""
    lines = []
    for label, verdict in row.get("verdicts", {}).items():
        outcome, reason = verdict.get("outcome"), verdict.get("reason")
        if isinstance(outcome, int | float):
            said = (
                "better than before" if outcome > TIE else "worse than before" if outcome < TIE else "neither is better"
            )
            because = f": {cut(reason, 300)}" if isinstance(reason, str) and reason else ""
            lines.append(f"judge{f' ({label})' if label else ''}: {said}{because}")
    return lines


def prompt_text(prompt: object) -> str:
    """A prompt as people read it: a text, or the turns of a conversation with who speaks."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        return _plain(prompt)
    turns = [turn for turn in prompt if isinstance(turn, dict)]
    lone = len(turns) == 1 and turns[0].get("role") == "user"
    return "\n".join(f"{'' if lone else str(turn.get('role', '?')) + ': '}{_content(turn)}" for turn in turns)


def _content(turn: Mapping[str, Any]) -> str:
    content = turn.get("content")
    rest = {name: value for name, value in turn.items() if name not in ("role", "content") and value is not None}
    said = content if isinstance(content, str) else _plain(content) if content is not None else ""
    return f"{said} {_plain(rest)}".strip() if rest else said


def _plain(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
