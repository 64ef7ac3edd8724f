"""How a run's answers compare with those that the model gave at its start, by a judge."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from dpo_jax.errors import UserError
from dpo_jax.evaluation.contests import contests_of, said_of, verdict_row, verdicts_of
from dpo_jax.evaluation.judges.opening import open_judge
from dpo_jax.evaluation.judges.settings import MODEL, REWARD, named
from dpo_jax.evaluation.judging import Contest, Judge
from dpo_jax.evaluation.settings import EvaluationSettings
from dpo_jax.evaluation.winrate import Question
from dpo_jax.files import write_whole
from dpo_jax.processes.here import here

METRICS = ("win_rate", "win_rate_low", "win_rate_high", "tie_rate", "unjudged")
VERDICTS = "verdicts"
"""The folder of a run that holds what its judge said: `STEP.jsonl`, and what a server replied."""


class AgainstStart:
    """A judge of a run's answers. A judge that fails does not end the run: its metrics are then nan, and `fault` says
    why."""

    def __init__(self, judge: Judge, *, computes: bool = False):
        """Nothing is judged yet; `computes` says that the judge is a model."""
        self._judge, self._computes = judge, computes
        self.fault: str | None = None

    def __call__(
        self, questions: Sequence[Question], rows: Sequence[Mapping[str, Any]], folder: Path, step: int
    ) -> dict[str, float]:
        """The win rate of these answers over those of the run's first evaluation; `folder` is the run's."""
        here().meet("answers written")
        base = _first(folder / "answers")
        if [row["prompt"] for row in base] != [row["prompt"] for row in rows]:
            self.fault = "evaluation.judge: evaluation.answers has other prompts than at the start; nothing is compared"
            return dict.fromkeys(METRICS, math.nan)
        texts = ([str(row["answer"]) for row in side] for side in (rows, base))
        contests = contests_of(questions, *texts)
        try:
            return self._ask(contests, folder / VERDICTS / f"{step}.jsonl")
        except UserError as error:
            self.fault = f"evaluation.judge: {error}; this evaluation has no win rate"
            return dict.fromkeys(METRICS, math.nan)

    def _ask(self, contests: Sequence[Contest], path: Path) -> dict[str, float]:
        """What the judge says of these, which is written down. One process asks, unless the judge is a model, on the
        devices of all."""
        if self._computes:
            return self._numbers(contests, path)
        return here().decide("verdicts", lambda: self._numbers(contests, path))

    def _numbers(self, contests: Sequence[Contest], path: Path) -> dict[str, float]:
        verdicts = verdicts_of(self._judge, contests)
        if here().owns:
            path.parent.mkdir(exist_ok=True)
            lines = [json.dumps(verdict_row(*one)) + "\n" for one in zip(contests, verdicts, strict=True)]
            write_whole(path, "".join(lines))
        numbers = said_of(contests, verdicts).numbers
        return {name: math.nan if numbers[name] is None else float(numbers[name]) for name in METRICS}


def against_start(settings: EvaluationSettings, folder: Path, mesh: Mesh) -> AgainstStart | None:
    """The judge of `evaluation.judge`, if there is one; raises as `open_judge`."""
    if settings.judging is None:
        return None
    judge = open_judge(settings.judging, folder=folder / VERDICTS, mesh=mesh)
    return AgainstStart(judge, computes=named(settings.judging.name)[0] in (REWARD, MODEL))


def _first(answers: Path) -> list[dict[str, Any]]:
    """What the model answered at the first evaluation, which is that of the start unless the questions came later."""
    steps = sorted(int(file.stem) for file in answers.glob("*.jsonl") if file.stem.isdecimal())
    return [json.loads(line) for line in (answers / f"{steps[0]}.jsonl").read_text().splitlines()]
