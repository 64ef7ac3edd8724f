"""Settings of what is measured on held-out data."""

from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from dpo_jax.evaluation.judges.settings import HUMAN, KINDS, JudgeSettings, labels, used_by
from dpo_jax.intervals import check_interval
from dpo_jax.settings import Section

JUDGE = ("template", "model", "key_variable", "call_budget")
"""Settings of a judge that a run has too, behind `judge_`."""


class EvaluationSettings(Section):
    """What is measured on held-out data. Nothing is, unless data.eval, data.eval_fraction or evaluation.answers is
    given."""

    every: int | str | None = Field(
        default=None,
        description="evaluate every this many steps, or passes over the data, as in '0.5 epochs' or '1 epoch' "
        "(always at the start and the end)",
    )
    patience: int | None = Field(
        default=None,
        gt=0,
        description="stop after this many evaluations in a row without a better checkpoint.best; the run is then "
        "finished",
    )
    answers: str | None = Field(
        default=None,
        description='JSONL of {"prompt"}, or {"prompt", "good"}: the model answers; good is a pattern that a good '
        "answer matches (pass_rate)",
    )
    max_new_tokens: int = Field(default=64, gt=0, description="longest answer, in tokens")
    judge: str | tuple[str, ...] | None = Field(
        default=None,
        description=f"who compares the answers with those at the start (win_rate): {KINDS}, but human; "
        "or a list of several, each with a win rate of its own (win_rate/reward)",
    )
    judge_template: str | None = Field(default=None, description="Jinja file of what a judge that compares is asked")
    judge_model: str | None = Field(default=None, description="the model's name, where the judge is a server")
    judge_key_variable: str | None = Field(
        default=None, description="environment variable that holds the server's API key"
    )
    judge_call_budget: int | None = Field(default=None, gt=0, description="calls to the server in all")

    @property
    def judges(self) -> tuple[str, ...]:
        """The judges by name, the one whose `win_rate` is the run's first."""
        return () if self.judge is None else (self.judge,) if isinstance(self.judge, str) else self.judge

    @property
    def judging(self) -> dict[str, JudgeSettings]:
        """Every judge by its label (see `labels`), each with the settings that are of its kind."""
        given = {name: value for name in JUDGE if (value := getattr(self, f"judge_{name}")) is not None}
        return {
            label: JudgeSettings(name=who, **{name: given[name] for name in given if name in used_by(who)})
            for label, who in zip(labels(self.judges), self.judges, strict=True)
        }

    @model_validator(mode="after")
    def _judges_are_some(self) -> "EvaluationSettings":
        if HUMAN in self.judges:
            raise ValueError("evaluation.judge: a run waits for nobody; let a person judge with dpo_jax.winrate")
        if self.judge == ():
            raise ValueError("evaluation.judge: the list is empty; name a judge, or leave it out")
        if len(set(self.judges)) < len(self.judges):
            raise ValueError("evaluation.judge: the same judge is named twice; leave one out")
        try:
            _ = self.judging
        except ValidationError as error:
            what = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ValueError(f"evaluation.judge: {what}") from None
        except ValueError as error:
            raise ValueError(f"evaluation.judge: {error}") from None
        used = {name for who in self.judges for name in used_by(who)}
        for name in JUDGE if self.judges else ():
            if getattr(self, f"judge_{name}") is not None and name not in used:
                raise ValueError(f"evaluation.judge_{name}: no judge that is named uses it; leave it out")
        return self

    @field_validator("every", mode="before")
    @classmethod
    def _steps_or_epochs(cls, value: object) -> Any:
        return check_interval("evaluation.every", value, never=True)


class CollectSettings(Section):
    """How answers are drawn from a model and made into preferences."""

    answers: int = Field(default=4, ge=2, le=1024, description="answers drawn for each prompt")
    temperature: float = Field(default=1.0, gt=0, description="logits are divided by it before an answer is drawn")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="draw from the most probable tokens of this probability together"
    )
    top_k: int = Field(default=0, ge=0, description="draw from this many most probable tokens; 0 for all")
    max_new_tokens: int = Field(default=256, gt=0, description="longest answer, in tokens")
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="decides what is drawn")
    pairs: Literal["best_worst", "ranked", "all"] = Field(
        default="best_worst",
        description="of a prompt's answers: the best against the worst, a ranked row, or every two that differ",
    )
    margin: float = Field(default=0.0, ge=0, description="two answers make a pair if their scores differ by this")
    batch_size: int = Field(default=16, gt=0, le=4096, description="answers that are written at a time")
