"""The rule as a judge: an answer that the prompt's pattern is found in beats one that it is not found in."""

import itertools
import re

import pytest

from dpo_jax.errors import UserError
from dpo_jax.evaluation.judges.rule import RuleJudge
from dpo_jax.evaluation.judging import FIRST, SECOND, TIE, Contest, Scorer
from dpo_jax.evaluation.statistics import summary
from dpo_jax.evaluation.winrate import Asked, Question

KINDS = {("good", "bad"): FIRST, ("bad", "good"): SECOND, ("good", "good"): TIE, ("bad", "bad"): TIE}


def test_verdicts_of_200_prepared_pairs_are_as_prepared():
    contests, wanted = [], []
    for number, (kinds, end) in zip(range(200), itertools.cycle(KINDS.items()), strict=False):
        said = {"good": f"It is {number}.\nHappy to help!", "bad": f"Ugh. It is {number}."}
        question = Question(
            f"Which number comes after {number - 1}?", f"a:{number}", re.compile(rf"^It is {number}\b.*!$", re.S)
        )
        contests.append(Contest(question, (said[kinds[0]], said[kinds[1]])))
        wanted.append(end)
    judge = RuleJudge()
    assert isinstance(judge, Scorer)
    verdicts = judge.compare(contests)
    assert [verdict.outcome for verdict in verdicts] == wanted
    found = summary(verdicts, [(len(one.answers[0]), len(one.answers[1])) for one in contests])
    assert (found.counts.wins, found.counts.ties, found.counts.losses) == (50, 100, 50)
    assert found.win_rate.value == 0.5 and found.position_bias == 0.0 and found.consistency == 1.0


def test_a_prompt_without_a_pattern_is_named():
    with pytest.raises(UserError, match="a:7: the rule needs to know what a good answer matches"):
        RuleJudge().compare([Contest(Asked("Hi?", "a:7"), ("a", "b"))])
