"""What a judge is: which of two answers to a prompt is the better one, or how good each answer is by itself.

A judge that compares is asked twice about each pair, the second time with the answers in the other order, since many
judges prefer what stands first. What they say in both orders counts; what they say in one is a tie.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from dpo_jax.evaluation.winrate import Asked, Question

FIRST, TIE, SECOND = 1.0, 0.5, 0.0
"""How a comparison ends, as the share that the first answer has in it."""


UNJUDGED = math.nan
"""Stands where a judge was asked, again too, and said nothing that can be understood. It is no tie, and is counted."""


class Contest(NamedTuple):
    """Two answers to a prompt; the prompt is a `Question` where a pattern says what is good."""

    asked: "Asked | Question"
    answers: tuple[str, str]


class Verdict(NamedTuple):
    """What a judge says of a contest, in both orders: FIRST, TIE or SECOND, of the contest's first and second answer;
    or UNJUDGED.

    Attributes:
      shown: with the first answer shown first.
      swapped: with the second answer shown first. The same as `shown` of a judge that sees no order.
      reason: what the judge said, if it says anything.
    """

    shown: float
    swapped: float
    reason: str = ""

    @property
    def given(self) -> bool:
        """Whether both orders were judged."""
        return not (math.isnan(self.shown) or math.isnan(self.swapped))

    @property
    def outcome(self) -> float:
        """FIRST or SECOND where both orders agree on it, and else TIE; UNJUDGED where one order is."""
        if not self.given:
            return UNJUDGED
        return self.shown if self.shown == self.swapped else TIE


@runtime_checkable
class Judge(Protocol):
    """Something that compares answers; `name` is what reports call it."""

    name: str

    def compare(self, contests: Sequence[Contest]) -> list[Verdict]:
        """A verdict for each contest, in their order."""
        ...


@runtime_checkable
class Scorer(Judge, Protocol):
    """A judge that knows how good an answer is by itself, so that K answers need K looks and not K (K - 1)."""

    def score(self, asked: "Sequence[Asked | Question]", answers: Sequence[str]) -> list[float]:
        """A number for each answer to the prompt beside it; the higher, the better."""
        ...


def compared(scores: Sequence[float], others: Sequence[float]) -> list[Verdict]:
    """The verdicts that follow from the scores of the first answers and of the second ones."""
    ends = [FIRST if one > other else SECOND if one < other else TIE for one, other in zip(scores, others, strict=True)]
    return [Verdict(end, end) for end in ends]
