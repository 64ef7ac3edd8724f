"""Settings of the objective, the reference, the optimizer, and of what a run measures, saves and logs."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from dpo_jax.settings import Section
from dpo_jax.terms import Term, make_terms, names, with_defaults


class ObjectiveSettings(Section):
    """Which loss is minimised; a list of such blocks is a mixture. Each objective takes only some of these settings."""

    name: str = Field(default="sigmoid", description=f"sigmoid is DPO; one of {', '.join(names())}")
    weight: float | None = Field(default=None, ge=0, description="factor of this objective in a mixture (default 1)")
    beta: float | None = Field(default=None, gt=0, description="strength of the pull towards the reference")
    beta_end: float | None = Field(default=None, gt=0, description="beta at the last step, where it changes on the way")
    beta_schedule: Literal["linear", "cosine"] | None = Field(
        default=None, description="how beta goes from beta to beta_end (default linear)"
    )
    label_smoothing: float | None = Field(
        default=None, ge=0, lt=0.5, description="chance that a pair is labelled the wrong way round"
    )
    reference_free: bool | None = Field(default=None, description="leave the reference out of a loss that has one")
    divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] | None = Field(
        default=None, description="f-divergence that holds the policy to the reference (f-DPO)"
    )
    divergence_alpha: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="alpha of alpha_divergence, as in TRL: 0 is the forward KL, 1 the reverse KL",
    )
    ld_alpha: float | None = Field(
        default=None, ge=0, le=1, description="weight of tokens beyond the length that both completions have (LD-DPO)"
    )
    weighting: Literal["none", "wpo", "wpo_clamped"] | None = Field(
        default=None, description="weigh a pair by how likely the policy is to say it (WPO), at most 1 if clamped"
    )
    tau: float | None = Field(default=None, gt=0, le=1, description="temperature of discopop's gate")
    gamma: float | None = Field(default=None, ge=0, description="simpo's target margin")
    length_penalty: float | None = Field(default=None, ge=0, description="rdpo's cost of a token, in nats")
    calibration_weight: float | None = Field(default=None, ge=0, description="weight of cal_dpo's calibration")
    adapt: float | None = Field(default=None, ge=0, description="how much beta_dpo's beta follows the step's gaps")
    keep_fraction: float | None = Field(default=None, gt=0, le=1, description="share of pairs that beta_dpo keeps")
    momentum: float | None = Field(default=None, ge=0, lt=1, description="of beta_dpo's running mean of gaps")
    desirable_weight: float | None = Field(default=None, ge=0, description="kto's weight of desirable completions")
    undesirable_weight: float | None = Field(default=None, ge=0, description="kto's weight of undesirable completions")
    center: float | None = Field(default=None, ge=0, description="pulls a reward model's scores towards 0 on average")
    sft_weight: float | None = Field(default=None, ge=0, description="weight of sft in rpo and cpo")
    odds_weight: float | None = Field(default=None, ge=0, description="weight of the odds ratio in orpo")
    mixture: tuple[dict[str, Any], ...] | None = Field(
        default=None, description="several objectives at once: objective is then a list of blocks, each with a weight"
    )

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, data: Any) -> Any:
        if isinstance(data, list | tuple):
            return {"mixture": tuple(data)}
        if isinstance(data, Mapping) and data.get("mixture") is None:
            return with_defaults(data)
        return data

    @property
    def blocks(self) -> tuple[Mapping[str, Any], ...]:
        """The objectives, one block of settings each."""
        if self.mixture is not None:
            return self.mixture
        return (self.model_dump(exclude={"mixture"}, exclude_none=True),)

    @property
    def terms(self) -> tuple[Term, ...]:
        """The terms of the loss.

        Raises:
          ValueError: a line for each thing that is wrong (see `terms.make_terms`).
        """
        return make_terms(self.blocks)

    @property
    def compares(self) -> bool | None:
        """Whether any term compares with a reference; None where the settings are wrong."""
        try:
            return any(term.uses_reference for term in self.terms)
        except ValueError:
            return None

    @property
    def trains_reward_model(self) -> bool:
        """Whether a scalar head is trained in place of a language model."""
        try:
            return any(term.row.model == "reward" for term in self.terms)
        except ValueError:
            return False

    def problems(self) -> list[str]:
        """A line `key: remedy` for each thing that is wrong."""
        if self.mixture is not None and (beside := sorted(self.model_fields_set - {"mixture"})):
            return [f"objective.{beside[0]}: stands beside a list of objectives; put it into a block of the list"]
        if self.mixture == ():
            return ["objective.mixture: names no objective"]
        try:
            self.terms  # noqa: B018 (asked for what it raises)
        except ValueError as error:
            return [self._problem(line) for line in str(error).splitlines()]
        return []

    def _problem(self, line: str) -> str:
        key, _, remedy = line.partition(": ")
        if self.mixture is None:
            return f"objective.{key}: {remedy}"
        number, dot, inner = key.rpartition(".")
        return f"objective.mixture: {f'block {int(number) + 1}, {inner}' if dot else inner}: {remedy}"


def as_written(objective: Any) -> ObjectiveSettings | None:
    """The settings that the values of `objective` give; None where they are wrong, which is reported elsewhere."""
    try:
        return ObjectiveSettings.model_validate(objective or {})
    except ValueError:
        return None


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
"""Rows of `config.IGNORED`: the setting, whether a run's optimizer would ignore it, and the remedy."""


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
    warmup_fraction: float = Field(default=0.1, ge=0, le=1, description="the same as a share of all steps")
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
    def _lions_decay(cls, data: Any) -> Any:
        """Lion's own default (arXiv:2302.06675)."""
        if isinstance(data, Mapping) and data.get("name") == "lion":
            return {"beta2": 0.99, **data}
        return data


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
