"""Settings of what is measured on held-out data."""

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
