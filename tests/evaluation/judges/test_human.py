"""A person as a judge: blind, in an order that the seed decides, and never asked twice."""

import pytest

from dpo_jax.errors import UserError
from dpo_jax.evaluation.judges.human import HumanJudge
from dpo_jax.evaluation.judging import FIRST, TIE, Contest
from dpo_jax.evaluation.ledger import Ledger
from dpo_jax.evaluation.winrate import Asked
from tests.support.tiny_rows import user

CONTESTS = [Contest(Asked([user(f"Q{n}")], f"a:{n}"), (f"good {n}", f"bad {n}\x1b[2J")) for n in range(12)]


class Person:
    """Prefers what is good, ties where told to, and stops after so many pages."""

    def __init__(self, stop=99, odd=""):
        self.shown, self.pages, self.stop, self.odd = [], [], stop, odd

    def show(self, text):
        self.shown.append(text)

    def read(self, prompt):
        answers = [text for text in self.shown if text.startswith(("good", "bad"))][-2:]
        self.pages.append("ab"[answers[1].startswith("good")])
        if self.odd and len(self.pages) % 2:
            return self.odd
        return "q" if len(self.pages) > self.stop else self.pages[-1].upper()


def compare(person, ledger=None, seed=0):
    judge = HumanJudge(ledger or Ledger(None), seed=seed, read=person.read, show=person.show)
    return judge.compare(CONTESTS)


def test_keys_are_of_the_answers_wherever_they_stand():
    person = Person()
    assert [verdict.outcome for verdict in compare(person)] == [FIRST] * 12
    assert set(person.pages) == {"a", "b"}
    assert all(text.replace("\n", "").isprintable() for text in person.shown)


def test_the_order_is_the_seeds():
    one, same, other = Person(), Person(), Person()
    compare(one), compare(same), compare(other, seed=1)
    assert one.pages == same.pages != other.pages


def test_whoever_stops_goes_on_where_they_were(tmp_path):
    path = tmp_path / "human.jsonl"
    whole = Person()
    compare(whole)
    with Ledger(path) as ledger, pytest.raises(UserError, match="goes on"):
        compare(Person(stop=5), ledger)
    rest = Person()
    with Ledger(path) as ledger:
        assert [verdict.outcome for verdict in compare(rest, ledger)] == [FIRST] * 12
    assert rest.pages == whole.pages[5:] and "1 of 7" in rest.shown[0]


def test_other_keys_are_asked_for_again_and_a_tie_is_one():
    assert [verdict.outcome for verdict in compare(Person(odd="x"))] == [FIRST] * 12
    assert {verdict.outcome for verdict in compare(Person(odd="t"))} >= {TIE}
    with pytest.raises(UserError):
        compare(Person(odd=""[:0] or "q"))
