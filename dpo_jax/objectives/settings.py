"""Settings of the objective; what each objective takes is in the table."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, create_model, model_validator

from dpo_jax.objectives.rows import Setting
from dpo_jax.objectives.terms import Term, make_terms, names, takes, with_defaults, with_parts
from dpo_jax.settings import GivenSettings, Section

SETTINGS: dict[str, str] = {
    "beta": "strength of the pull towards the reference",
    "beta_end": "beta at the last step, where it changes on the way",
    "beta_schedule": "how beta goes from beta to beta_end (default linear)",
    "label_smoothing": "chance that a pair is labelled the wrong way round",
    "reference_free": "leave the reference out of a loss that has one",
    "divergence": "f-divergence that holds the policy to the reference (f-DPO)",
    "divergence_alpha": "alpha of alpha_divergence, as in TRL: 0 is the forward KL, 1 the reverse KL",
    "ld_alpha": "weight of tokens beyond the length that both completions have (LD-DPO)",
    "weighting": "weigh a pair by how likely the policy is to say it (WPO), at most 1 if clamped",
    "tau": "temperature of discopop's gate",
    "gamma": "simpo's target margin",
    "length_penalty": "rdpo's cost of a token, in nats",
    "calibration_weight": "weight of cal_dpo's calibration",
    "adapt": "how much beta_dpo's beta follows the step's gaps",
    "keep_fraction": "share of pairs that beta_dpo keeps",
    "momentum": "of beta_dpo's running mean of gaps",
    "desirable_weight": "kto's weight of desirable completions",
    "undesirable_weight": "kto's weight of undesirable completions",
    "center": "pulls a reward model's scores towards 0 on average",
    "unlikelihood_weight": "weight of the rejected completion in unlikelihood, from 0 to 1",
    "sft_weight": "weight of sft in rpo and cpo",
    "odds_weight": "weight of the odds ratio in orpo",
}
"""What each setting is; one that is not here is given in the form of a list."""


def _field(name: str) -> tuple[Any, Any]:
    """Type and description of a setting, with bounds that hold for every objective that takes it."""
    found = [takes(objective)[name] for objective in names() if name in takes(objective)]
    choices, flag = found[0].choices, isinstance(found[0].default, bool)
    kind: Any = Literal[choices] if choices else bool if flag else float
    bounds = {} if choices or flag else _loosest(found)
    return kind | None, Field(default=None, description=SETTINGS[name], **bounds)


def _loosest(settings: Sequence[Setting]) -> dict[str, Any]:
    lows = [(s.least, "ge") if s.least is not None else (s.above, "gt") for s in settings]
    highs = [(s.most, "le") if s.most is not None else (s.below, "lt") for s in settings]
    ends = [min(lows)]
    if None not in dict(highs):
        ends.append(max(highs, key=lambda end: (end[0], end[1] == "le")))
    return {name: limit for limit, name in ends}


class _Named(Section):
    name: str = Field(default="sigmoid", description=f"sigmoid is DPO; one of {', '.join(names())}")
    weight: float | None = Field(default=None, ge=0, description="factor of this objective in a mixture (default 1)")


if TYPE_CHECKING:
    _Table = _Named
else:
    _Table = create_model("_Table", __base__=_Named, **{name: _field(name) for name in SETTINGS})


class ObjectiveSettings(_Table):
    """Which loss is minimised; a list of such blocks is a mixture. Each objective takes only some of these settings."""

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
    def objectives(self) -> tuple[str, ...]:
        """Names of the blocks' objectives, and of those that these are sums of."""
        return with_parts(str(block.get("name", "sigmoid")) for block in self.blocks)

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


def take_short_form(source: GivenSettings) -> None:
    """The name of an objective, or a list of them, in place of its block becomes the setting that holds one."""
    given, where = source.values.get("objective"), source.where.get("objective", "")
    if isinstance(given, str):
        name = source.values.pop("objective")
        if "objective.name" not in source.values:  # or it was given later, as what is earlier does not stay
            source.values["objective.name"], source.where["objective.name"] = name, where
    elif isinstance(given, tuple):
        source.values["objective.mixture"] = source.values.pop("objective")
        source.where["objective.mixture"] = where
        if not all(isinstance(block, dict) for block in given):
            wanted = "a list of blocks is wanted, such as [{name: sigmoid, weight: 0.8}, {name: sft, weight: 1}]"
            source.problems.append(f"{where}: objective: {wanted}")
            source.values.pop("objective.mixture")
