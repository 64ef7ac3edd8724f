"""How a run's answers compare with those that the model gave at its start, by a judge."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from dpo_jax.errors import UserError
from dpo_jax.evaluation.contests import contests_of, said_of, verdict_row, verdicts_of
from dpo_jax.evaluation.judges.opening import open_judge
from dpo_jax.evaluation.judges.settings import MODEL, REWARD, named
from dpo_jax.evaluation.judging import Contest, Judge
from dpo_jax.evaluation.settings import EvaluationSettings
from dpo_jax.evaluation.winrate import Asked, Question
from dpo_jax.files import write_whole
from dpo_jax.processes.here import here
from dpo_jax.reporting.metrics import of_judge

METRICS = ("win_rate", "win_rate_low", "win_rate_high", "tie_rate", "unjudged")
VERDICTS = "verdicts"
"""The folder of a run that holds what its judge said: `STEP.jsonl`, and what a server replied. What others say beside
the first is in a folder below it, by the judge's label."""


class RunJudge(NamedTuple):
    """One who compares the run's answers; `computes` says that it is a model, on the devices of all processes."""

    judge: Judge
    computes: bool = False


class AgainstStart:
    """The judges of a run's answers. One that fails does not end the run: its metrics are then nan, and `faults` says
    why."""

    def __init__(self, judges: Mapping[str, RunJudge]):
        """Nothing is judged yet; the judges come by their labels, which end the names of their metrics."""
        self._judges = judges
        self.faults: list[str] = []

    def __call__(
        self, asked: Sequence[Asked | Question], rows: Sequence[Mapping[str, Any]], folder: Path, step: int
    ) -> dict[str, float]:
        """The win rates of these answers over those of the run's first evaluation; `folder` is the run's."""
        base = here().decide("first answers", lambda: _first(folder / "answers"))
        if [row["prompt"] for row in base] != [row["prompt"] for row in rows]:
            self.faults.append(
                "evaluation.judge: evaluation.answers has other prompts than at the start; nothing is compared"
            )
            return {of_judge(name, label): math.nan for label in self._judges for name in METRICS}
        texts = ([str(row["answer"]) for row in side] for side in (rows, base))
        contests = contests_of(asked, *texts)
        found: dict[str, float] = {}
        for label, judge in self._judges.items():
            numbers = self._numbers(judge, contests, folder / VERDICTS / label / f"{step}.jsonl", label)
            found |= {of_judge(name, label): value for name, value in numbers.items()}
        return found

    def _numbers(self, judge: RunJudge, contests: Sequence[Contest], path: Path, label: str) -> dict[str, float]:
        """What one judge says of these, or nan. One process asks, unless the judge is a model."""
        try:
            if judge.computes:
                return _judged(judge.judge, contests, path)
            return here().decide("verdicts", lambda: _judged(judge.judge, contests, path))
        except UserError as error:
            self.faults.append(f"evaluation.judge: {error}; this evaluation has no {of_judge('win_rate', label)}")
            return dict.fromkeys(METRICS, math.nan)


def _judged(judge: Judge, contests: Sequence[Contest], path: Path) -> dict[str, float]:
    """The metrics of one judge's verdicts, which are written down."""
    verdicts = verdicts_of(judge, contests)
    if here().owns:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(verdict_row(*one)) + "\n" for one in zip(contests, verdicts, strict=True)]
        write_whole(path, "".join(lines))
    numbers = said_of(contests, verdicts).numbers
    return {name: math.nan if numbers[name] is None else float(numbers[name]) for name in METRICS}


def against_start(settings: EvaluationSettings, folder: Path, mesh: Mesh) -> AgainstStart | None:
    """The judges of `evaluation.judge`, if there are any; raises as `open_judge`."""
    judges = {
        label: RunJudge(
            open_judge(one, folder=folder / VERDICTS / label, mesh=mesh), named(one.name).kind in (REWARD, MODEL)
        )
        for label, one in settings.judging.items()
    }
    return AgainstStart(judges) if judges else None


def _first(answers: Path) -> list[dict[str, Any]]:
    """What the model answered at the first evaluation, which is that of the start unless the questions came later."""
    steps = sorted(int(file.stem) for file in answers.glob("*.jsonl") if file.stem.isdecimal())
    return [json.loads(line) for line in (answers / f"{steps[0]}.jsonl").read_text().splitlines()]
