"""Settings of what is measured on held-out data."""

import re
from fractions import Fraction
from typing import Any

from pydantic import Field, field_validator

from dpo_jax.settings import Section

EPOCHS = re.compile(r"([0-9]{1,6}|[0-9]{0,6}\.[0-9]{1,6}) epochs?")
"""Passes over the data in words: `1 epoch`, `0.5 epochs`, `2 epochs`."""


def epochs_of(text: str) -> Fraction:
    """How many passes over the data that is.

    >>> epochs_of("0.1 epochs")
    Fraction(1, 10)
    """
    found = EPOCHS.fullmatch(text)
    assert found is not None, text
    return Fraction(found[1])


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
        description='JSONL of {"prompt", "good"}: the model answers; good is a pattern that a good answer matches',
    )
    max_new_tokens: int = Field(default=64, gt=0, description="longest answer, in tokens")

    @field_validator("every", mode="before")
    @classmethod
    def _steps_or_epochs(cls, value: Any) -> Any:
        in_words = isinstance(value, str) and (found := EPOCHS.fullmatch(value)) is not None and Fraction(found[1]) > 0
        if value is None or in_words or (type(value) is int and value > 0):
            return value
        raise ValueError(
            "evaluation.every: must be a whole number of steps > 0, or of passes over the data in words, as in "
            "'0.5 epochs' or '1 epoch', or null"
        )
