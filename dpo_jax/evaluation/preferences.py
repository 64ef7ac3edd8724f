"""Preferences out of scored answers: which answers of a prompt are told apart, and rows that `train` reads.

A row is of the layout `pair` (a better and a worse answer) or `ranked` (all of them, with their scores).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dpo_jax.data.messages import is_chat
from dpo_jax.evaluation.judging import Contest, Judge, Scorer
from dpo_jax.evaluation.winrate import Asked, Prompt, Question


class Scored(NamedTuple):
    """A different answer of a prompt, and how good a judge says that it is; None where it says nothing at all."""

    text: str
    score: float | None


def scored(
    judge: Judge, asked: Sequence[Asked | Question], answers: Sequence[Sequence[str]]
) -> list[list[float | None]]:
    """The score of each answer to each prompt, the higher the better.

    A judge that only compares is asked about all pairs of a prompt's different answers; an answer's score is then its
    share of wins, a tie counting half, from 0 to 1, of the contests that have a verdict. An answer without a word, or
    without a verdict, has no score. Raises as the judge does.
    """
    different = [list(dict.fromkeys(text for text in texts if text.strip())) for texts in answers]
    known = _scores(judge, asked, different) if isinstance(judge, Scorer) else _shares(judge, asked, different)
    return [[table.get(text) for text in texts] for table, texts in zip(known, answers, strict=True)]


def _scores(
    judge: Scorer, asked: Sequence[Asked | Question], answers: list[list[str]]
) -> list[dict[str, float | None]]:
    owners = [item for item, texts in zip(asked, answers, strict=True) for _ in texts]
    found = iter(judge.score(owners, [text for texts in answers for text in texts]))
    return [{text: next(found) for text in texts} for texts in answers]


def _shares(judge: Judge, asked: Sequence[Asked | Question], answers: list[list[str]]) -> list[dict[str, float | None]]:
    pairs = [list(itertools.combinations(texts, 2)) for texts in answers]
    contests = [Contest(item, pair) for item, two in zip(asked, pairs, strict=True) for pair in two]
    verdicts = iter(judge.compare(contests))
    tables: list[dict[str, float | None]] = []
    for texts, two in zip(answers, pairs, strict=True):
        ends: dict[str, list[float]] = {text: [] for text in texts}
        for first, second in two:
            if (verdict := next(verdicts)).given:
                ends[first].append(verdict.outcome)
                ends[second].append(1 - verdict.outcome)
        tables.append({text: sum(own) / len(own) if own else _alone(texts) for text, own in ends.items()})
    return tables


def _alone(texts: Sequence[str]) -> float | None:
    """The score of an answer of which the judge said nothing: 0 where there is no other to compare it with."""
    return 0.0 if len(texts) == 1 else None


# ---------------------------------------------------------------------------------------------- rows

Better = tuple[int, int]
"""Places of a better and a worse answer."""


def _best_worst(scores: Sequence[float], margin: float) -> list[Better]:
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    return [(best, worst)] if _apart(scores[best], scores[worst], margin) else []


def _all(scores: Sequence[float], margin: float) -> list[Better]:
    places = sorted(range(len(scores)), key=lambda place: -scores[place])
    return [(i, j) for i, j in itertools.combinations(places, 2) if _apart(scores[i], scores[j], margin)]


def _apart(better: float, worse: float, margin: float) -> bool:
    return better > worse and better - worse >= margin


def _as_pairs(choose: Callable[[Sequence[float], float], list[Better]]):
    def rows(prompt: Prompt, texts: Sequence[str], scores: Sequence[float], margin: float) -> list[dict[str, Any]]:
        return [
            {
                "prompt": prompt,
                "chosen": said(prompt, texts[better]),
                "rejected": said(prompt, texts[worse]),
                "score_chosen": scores[better],
                "score_rejected": scores[worse],
            }
            for better, worse in choose(scores, margin)
        ]

    return rows


def _ranked(prompt: Prompt, texts: Sequence[str], scores: Sequence[float], margin: float) -> list[dict[str, Any]]:
    if not _best_worst(scores, margin):
        return []
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    completions = [said(prompt, texts[place]) for place in order]
    return [{"prompt": prompt, "completions": completions, "scores": [scores[place] for place in order]}]


PAIRINGS: dict[str, Callable[[Prompt, Sequence[str], Sequence[float], float], list[dict[str, Any]]]] = {
    "best_worst": _as_pairs(_best_worst),
    "all": _as_pairs(_all),
    "ranked": _ranked,
}
"""What is made of a prompt's different answers, by `CollectSettings.pairs`."""


def rows_of(prompt: Prompt, answers: Sequence[Scored], pairs: str, margin: float) -> list[dict[str, Any]]:
    """The rows of one prompt; none where its answers are all the same, or no two are told apart by the margin."""
    known = {answer.text: answer.score for answer in answers if answer.score is not None}
    if len(known) < 2:
        return []
    return PAIRINGS[pairs](prompt, list(known), list(known.values()), margin)


def said(prompt: Prompt, text: str) -> str | list[dict[str, str]]:
    """An answer as training wants it beside this prompt: a text, or a turn of the assistant's."""
    return [{"role": "assistant", "content": text}] if is_chat(prompt) else text
