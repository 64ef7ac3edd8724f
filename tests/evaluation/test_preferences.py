"""Preferences out of scored answers: better before worse, ties left out, and rows that training reads."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.data.layouts import detect, to_record
from dpo_jax.evaluation.judging import FIRST, SECOND, TIE, UNJUDGED, Contest, Verdict, compared
from dpo_jax.evaluation.preferences import PAIRINGS, Scored, rows_of, scored
from dpo_jax.evaluation.winrate import Asked
from tests.support.tiny_rows import user

PROMPTS = ("Say it.", [user("Say it.")])
SCORES = st.lists(st.sampled_from([-1.5, 0.0, 0.25, 1.0, 3.0]), min_size=2, max_size=6)


def named(scores):
    return [Scored(f"answer {place}", score) for place, score in enumerate(scores)]


def read(rows):
    """The preferences that training finds in the rows, as pairs of texts."""
    found = []
    for line, row in enumerate(rows, 1):
        record = to_record(row, detect(row), file="pairs.jsonl", line=line)
        parts: list[Any] = list(record.completions)
        texts = [part if isinstance(part, str) else part[0]["content"] for part in parts]
        found += [(texts[pair.chosen], texts[pair.rejected]) for pair in record.pairs]
    return found


def told_apart(answers, margin):
    return {
        (a.text, b.text)
        for a, b in itertools.permutations(answers, 2)
        if a.score > b.score and a.score - b.score >= margin
    }


@pytest.mark.parametrize("prompt", PROMPTS, ids=["text", "chat"])
@settings(max_examples=40, deadline=None)
@given(scores=SCORES, margin=st.sampled_from([0.0, 0.25, 1.0, 9.0]))
def test_training_reads_every_two_answers_that_differ_by_the_margin(prompt, scores, margin):
    answers = named(scores)
    assert sorted(read(rows_of(prompt, answers, "all", margin))) == sorted(told_apart(answers, margin))


@settings(max_examples=40, deadline=None)
@given(scores=SCORES, margin=st.sampled_from([0.0, 0.25, 1.0, 9.0]))
def test_the_best_answer_meets_the_worst(scores, margin):
    answers = named(scores)
    pairs, score = read(rows_of("Say it.", answers, "best_worst", margin)), dict(answers)
    assert len(pairs) == (1 if told_apart(answers, margin) else 0)
    for chosen, rejected in pairs:
        assert score[chosen] == max(scores) and score[rejected] == min(scores)


@settings(max_examples=40, deadline=None)
@given(scores=SCORES, margin=st.sampled_from([0.0, 0.25, 1.0, 9.0]))
def test_a_ranked_row_holds_every_preference_of_its_answers(scores, margin):
    answers = named(scores)
    wanted = told_apart(answers, 0) if told_apart(answers, margin) else set()
    assert sorted(read(rows_of("Say it.", answers, "ranked", margin))) == sorted(wanted)


@pytest.mark.parametrize("pairs", PAIRINGS)
def test_an_answer_that_comes_twice_or_has_no_score_makes_no_pair_of_its_own(pairs):
    answers = [Scored("a", 1.0), Scored("b", 0.0), Scored("a", 1.0), Scored(" ", None)]
    assert read(rows_of("Say it.", answers, pairs, 0.0)) == [("a", "b")]
    assert rows_of("Say it.", [Scored("a", 1.0), Scored("a", 1.0), Scored("", None)], pairs, 0.0) == []


# ---------------------------------------------------------------------------------------------- scores

STRENGTH = {"strong": 3.0, "good": 2.0, "fair": 2.0, "weak": 1.0}


class Comparing:
    """Prefers the stronger answer, and counts what it is asked."""

    name = "comparing"

    def __init__(self):
        self.asked: list[Contest] = []

    def compare(self, contests):
        self.asked += contests
        strengths = [[STRENGTH[contest.answers[side]] for contest in contests] for side in (0, 1)]
        return compared(*strengths)


class Scoring(Comparing):
    """The same, of one answer at a time."""

    def score(self, asked, answers):
        return [STRENGTH[answer] for answer in answers]


ASKED = [Asked("one", "f:1"), Asked("two", "f:2"), Asked("three", "f:3")]
ANSWERS = [["weak", "strong", "fair", "good"], ["good", "good", " "], ["fair", "weak", "fair"]]


def test_a_judge_that_scores_is_asked_for_scores():
    judge = Scoring()
    assert scored(judge, ASKED, ANSWERS) == [[1, 3, 2, 2], [2, 2, None], [2, 1, 2]]
    assert not judge.asked


def test_of_a_judge_that_compares_the_score_is_the_share_of_wins():
    judge = Comparing()
    thirds = [0 / 3, 3 / 3, 1.5 / 3, 1.5 / 3]  # of three others each; good and fair tie
    assert scored(judge, ASKED, ANSWERS) == [pytest.approx(thirds), [0.0, 0.0, None], [1.0, 0.0, 1.0]]
    asked = [(contest.asked.prompt, frozenset(contest.answers)) for contest in judge.asked]
    assert len(asked) == len(set(asked)) == 6 + 0 + 1  # every two different answers once


def test_what_only_one_order_says_is_a_tie():
    class Fickle:
        name = "prefers what stands first"

        def compare(self, contests):
            return [Verdict(FIRST, SECOND) for _ in contests]

    assert scored(Fickle(), ASKED[:1], [["a", "b", "c"]]) == [[TIE, TIE, TIE]]


def test_what_has_no_verdict_is_left_out_and_is_no_tie():
    class Speechless(Comparing):
        """Says nothing of one answer, and of another only beside the weak one."""

        def compare(self, contests):
            found = super().compare(contests)
            silent = [{"good"} & set(one.answers) or set(one.answers) == {"strong", "fair"} for one in contests]
            return [Verdict(UNJUDGED, FIRST) if no else one for no, one in zip(silent, found, strict=True)]

    assert scored(Speechless(), ASKED[:1], ANSWERS[:1]) == [[0.0, 1.0, 1.0, None]]
    pairs = rows_of(
        "Say it.", [Scored(*one) for one in zip(ANSWERS[0], [0.0, 1.0, 1.0, None], strict=True)], "all", 0.0
    )
    assert sorted(read(pairs)) == [("fair", "weak"), ("strong", "weak")]
