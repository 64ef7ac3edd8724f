"""Settings of what a run writes of itself, and of its health checks."""

from typing import Literal

from pydantic import Field

from dpo_jax.settings import Section


class LogSettings(Section):
    """What is written while a run goes on."""

    every: int = Field(default=1, gt=0, description="steps between records in metrics.jsonl")
    report: bool = Field(default=True, description="draw report.html, the page of the run, now and then and at the end")
    tensorboard: bool = Field(default=True, description="also write TensorBoard event files")
    loggers: tuple[Literal["wandb", "trackio", "mlflow"], ...] = Field(
        default=(), description="also send metrics, answers and settings to these services; one that fails is left out"
    )
    project: str = Field(default="dpo_jax", description="project (or experiment) of the services that the run is in")
    name: str | None = Field(default=None, description="its name there (default: that of the output folder)")
    tags: tuple[str, ...] = Field(default=(), description="its tags there")
    token_statistics: bool = Field(
        default=True, description="measure entropy, mean logits and top-1 accuracy of the tokens"
    )
    max_nonfinite: int = Field(default=3, ge=0, description="stop after more than this many non-finite steps in a row")


class AlarmSettings(Section):
    """What is said, once, when the metrics look unhealthy while a run goes on. Nothing is ever done about it."""

    enabled: bool = Field(default=True, description="say so when the metrics of the steps look unhealthy")
    # That chosen completions fall a little is normal; at 0.5 each of their tokens is 0.6 times as likely as it was.
    # The quickstart stays within 0.08 of its start; with 20 times its learning rate it passes 0.5 and ends at 1.1.
    chosen_drift: float = Field(
        default=0.5, gt=0, description="remark when chosen completions lost more than this, in nats per token"
    )
    # Chosen unchanged and each rejected token 4.5 times less likely give 1. The quickstart ends at 0.1.
    kl: float = Field(
        default=1.0, gt=0, description="remark when the divergence from the reference is above this and grows"
    )
