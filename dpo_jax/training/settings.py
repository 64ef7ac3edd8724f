"""Settings of the reference, the optimizer and the checkpoints."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dpo_jax.intervals import check_interval
from dpo_jax.objectives.settings import ObjectiveSettings
from dpo_jax.settings import Section


def fitting_mode(objective: ObjectiveSettings | None, reference: Mapping[str, Any]) -> str:
    """The reference mode that an objective asks for, where none is given."""
    if objective is not None and objective.compares is False:
        return "none"
    return "live" if reference.get("update_every") is not None else "cached"


class ReferenceSettings(Section):
    """Where the reference's log-probabilities come from."""

    mode: Literal["cached", "live", "none"] = Field(
        default="cached",
        description="computed once and kept on disk; computed at every step (the default where the reference moves); "
        "or not used (the default where the objective compares with none)",
    )
    path: str | None = Field(
        default=None, description="folder (or hub id) of the reference model (default: the policy's starting weights)"
    )
    revision: str | None = Field(default=None, description="as model.revision, for the reference model")
    adapter: Literal["start", "base"] = Field(
        default="start",
        description="where the run goes on from an adapter (adapter.path): whether the reference is the model with "
        "that adapter as it was at the start, or the model without it",
    )
    update_every: int | None = Field(
        default=None, gt=0, description="move the reference towards the policy every this many steps (TR-DPO)"
    )
    update_rate: float = Field(
        default=0.6, gt=0, le=1, description="how far it moves: 1 is all the way, 0.6 is TRL's ref_model_mixup_alpha"
    )

    @model_validator(mode="after")
    def _revision_of_something(self) -> "ReferenceSettings":
        if self.revision is not None and self.path is None:
            raise ValueError("reference.revision: is of reference.path, which is not given; give both, or neither")
        return self


OPTIMIZERS: dict[str, frozenset[str]] = {
    "adamw": frozenset(("beta1", "beta2", "epsilon", "moment_dtype")),
    "lion": frozenset(("beta1", "beta2", "moment_dtype")),
    "adafactor": frozenset(),
}
"""What each optimizer takes of the settings that not all of them take."""

UNUSED = tuple(
    (
        f"optimizer.{key}",
        lambda run, key=key: key not in OPTIMIZERS[run.optimizer.name],
        f"only {' and '.join(name for name, takes in OPTIMIZERS.items() if key in takes)} would use it; leave it out",
    )
    for key in ("beta1", "beta2", "epsilon", "moment_dtype")
)
"""Rows of `config.run.IGNORED`: the setting, whether a run's optimizer would ignore it, and the remedy."""


class OptimizerSettings(Section):
    """The optimizer, what it keeps for each parameter, and its schedule."""

    name: Literal["adamw", "lion", "adafactor"] = Field(
        default="adamw",
        description="adamw keeps two moments (8 bytes for each parameter); lion one (4 bytes), and steps by signs, so "
        "its learning_rate is a third to a tenth of adamw's; adafactor the second alone, by rows and columns (almost "
        "nothing), without scaling steps by the size of the weights, so its learning_rate is like adamw's",
    )
    param_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="dtype of the weights that are trained: 4 bytes for each parameter, or 2; an update in bfloat16 is "
        "rounded up or down at random (by seed and step), so that it holds on average however small it is",
    )
    moment_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="dtype of the first moment: 4 bytes for each parameter, or 2; the second is always float32",
    )
    learning_rate: float = Field(default=5e-7, ge=0, description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="linear", description="how the rate falls after warm-up"
    )
    warmup_steps: int | None = Field(default=None, ge=0, description="steps over which the rate rises from 0")
    warmup_fraction: float | None = Field(
        default=0.1, ge=0, le=1, description="the same as a share of all steps; null: none"
    )
    beta1: float = Field(
        default=0.9, ge=0, le=0.999999, description="decay of the first moment (of its part of a step, for lion)"
    )
    beta2: float = Field(
        default=0.999,
        ge=0,
        le=0.999999,
        description="decay of the second moment (adamw), or of lion's only one (default 0.99)",
    )
    epsilon: float = Field(default=1e-8, ge=1e-30, description="added to the root of the second moment")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled weight decay (matrices and embeddings only)")
    clip_norm: float | None = Field(
        default=1.0, gt=0, description="largest global gradient norm; null turns clipping off"
    )

    @model_validator(mode="before")
    @classmethod
    def _lions_decay(cls, data: object) -> object:
        """Lion's own default (arXiv:2302.06675)."""
        if isinstance(data, Mapping) and data.get("name") == "lion":
            return {"beta2": 0.99, **data}
        return data


class CheckpointSettings(Section):
    """What is saved so that a run can go on where it stopped."""

    every: int | str = Field(
        default=100,
        description="save every this many steps, or passes over the data, as in '0.5 epochs' or '1 epoch' (and at the "
        "end)",
    )
    keep: int = Field(default=2, gt=0, description="newest checkpoints that are kept")
    keep_every: int | None = Field(
        default=None, gt=0, description="also keep, for ever, each checkpoint at a multiple of this"
    )
    best: str | None = Field(
        default=None,
        description="metric of the evaluations, such as eval_loss, eval_rewards/accuracies, eval/NAME/loss, pass_rate: "
        "the checkpoint that is best by it is kept, and exported in place of the last",
    )
    folder: str | None = Field(
        default=None,
        description="gs://BUCKET/PATH where checkpoints are kept, for hosts without a disk that they share or that "
        "outlasts them (extra gcs); by default they lie in the output folder",
    )
    allow_change: tuple[str, ...] = Field(default=(), description="settings whose change a resumed run accepts")

    @field_validator("every", mode="before")
    @classmethod
    def _steps_or_epochs(cls, value: object) -> object:
        return check_interval("checkpoint.every", value, never=False)

    @field_validator("folder")
    @classmethod
    def _is_a_bucket(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"gs://[^/]+/.*[^/]/*", value):
            raise ValueError(
                "checkpoint.folder: must be gs://BUCKET/PATH, as Orbax writes to no other store; for a disk, or a "
                "store that is mounted as one, leave it out and set output"
            )
        return value and value.rstrip("/")
