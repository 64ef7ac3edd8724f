"""Settings of the objective; what each objective takes is in the table."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from dpo_jax.objectives.terms import Term, make_terms, names, with_defaults
from dpo_jax.settings import Section


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
    def _with_defaults(cls, data: object) -> object:
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


def as_written(objective: object) -> ObjectiveSettings | None:
    """The settings that the values of `objective` give; None where they are wrong, which is reported elsewhere."""
    try:
        return ObjectiveSettings.model_validate(objective or {})
    except ValueError:
        return None
