"""Settings of the objective, the reference, the optimizer, and of what a run measures, saves and logs."""

from typing import Literal

from pydantic import Field

from dpo_jax.settings import Section


class ObjectiveSettings(Section):
    """Which loss is minimised."""

    name: Literal["sigmoid", "sft"] = Field(
        default="sigmoid", description="sigmoid is DPO; sft is plain fine-tuning on chosen"
    )
    beta: float = Field(default=0.1, gt=0, description="strength of the pull towards the reference")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="chance that a pair is labelled the wrong way round (conservative DPO)"
    )


class ReferenceSettings(Section):
    """Where the reference's log-probabilities come from."""

    mode: Literal["cached", "live", "none"] = Field(
        default="cached",
        description="computed once and kept on disk; computed at every step; or not used by the objective",
    )
    path: str | None = Field(
        default=None, description="folder of the reference model (default: the policy's starting weights)"
    )


class OptimizerSettings(Section):
    """AdamW and its schedule."""

    learning_rate: float = Field(default=5e-7, ge=0, description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="linear", description="how the rate falls after warm-up"
    )
    warmup_steps: int | None = Field(default=None, ge=0, description="steps over which the rate rises from 0")
    warmup_fraction: float = Field(default=0.1, ge=0, le=1, description="the same as a share of all steps")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="decay of the second moment")
    epsilon: float = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled weight decay (matrices and embeddings only)")
    clip_norm: float | None = Field(
        default=1.0, gt=0, description="largest global gradient norm; null turns clipping off"
    )


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


class CheckpointSettings(Section):
    """What is saved so that a run can go on where it stopped."""

    every: int = Field(default=100, gt=0, description="save every this many steps (and at the end)")
    keep: int = Field(default=2, gt=0, description="newest checkpoints that are kept")
    keep_every: int | None = Field(
        default=None, gt=0, description="also keep, for ever, each checkpoint at a multiple of this"
    )
    allow_change: tuple[str, ...] = Field(default=(), description="settings whose change a resumed run accepts")


class LogSettings(Section):
    """What is written while a run goes on."""

    every: int = Field(default=1, gt=0, description="steps between records in metrics.jsonl")
    tensorboard: bool = Field(default=True, description="also write TensorBoard event files")
    loggers: tuple[Literal["wandb", "trackio"], ...] = Field(
        default=(), description="also send metrics to these services"
    )
    token_statistics: bool = Field(
        default=True, description="measure entropy, mean logits and top-1 accuracy of the tokens"
    )
    max_nonfinite: int = Field(default=3, ge=0, description="stop after more than this many non-finite steps in a row")
