"""The rule: an answer is good if it matches the pattern that its prompt comes with."""

from collections.abc import Sequence

from dpo_jax.errors import UserError
from dpo_jax.evaluation.judging import Contest, Verdict, compared
from dpo_jax.evaluation.winrate import Asked, Question


class RuleJudge:
    """Scores an answer 1 if the prompt's `good` pattern is found in it, and else 0."""

    name = "rule"

    def score(self, asked: Sequence[Asked | Question], answers: Sequence[str]) -> list[float]:
        """A number for each answer.

        Raises:
          UserError: a prompt has no pattern.
        """
        return [
            float(_question(item).good.search(answer) is not None) for item, answer in zip(asked, answers, strict=True)
        ]

    def compare(self, contests: Sequence[Contest]) -> list[Verdict]:
        """A tie where both answers are good, or neither is; raises as `score`."""
        asked = [contest.asked for contest in contests]
        first, second = ([contest.answers[side] for contest in contests] for side in (0, 1))
        return compared(self.score(asked, first), self.score(asked, second))


def _question(asked: Asked | Question) -> Question:
    if isinstance(asked, Question):
        return asked
    raise UserError(
        f'{asked.where}: the rule needs to know what a good answer matches; write {{"prompt": ..., "good": PATTERN}}, '
        "or choose another judge"
    )
