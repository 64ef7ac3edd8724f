"""Settings of what is measured on held-out data."""

from typing import Literal

from pydantic import Field

from dpo_jax.settings import Section


class EvaluationSettings(Section):
    """What is measured on held-out data. Nothing is, unless data.eval or evaluation.answers is given."""

    every: int | None = Field(
        default=None, gt=0, description="evaluate every this many steps (always at the start and the end)"
    )
    answers: str | None = Field(
        default=None,
        description='JSONL of {"prompt", "good"}: the model answers; good is a pattern that a good answer matches',
    )
    max_new_tokens: int = Field(default=64, gt=0, description="longest answer, in tokens")


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
