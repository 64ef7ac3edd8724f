"""What a row of the table of objectives is, and the settings that it takes. Nothing here imports jax."""

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from dpo_jax.errors import UserError

Kind = Literal["pairs", "rankings", "unpaired", "chosen"]
"""What one entry of a step is."""


class Setting(NamedTuple):
    """A setting of an objective: its default, and what it may be."""

    default: float | bool | str
    above: float | None = None
    least: float | None = None
    below: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()

    def allowed(self) -> str:
        """What it may be, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if isinstance(self.default, bool):
            return "true or false"
        signs = ((">", self.above), (">=", self.least), ("<", self.below), ("<=", self.most))
        return "a number" + " and".join(f" {sign} {limit:g}" for sign, limit in signs if limit is not None)

    def accepts(self, value: object) -> bool:
        """Whether a value is one of them."""
        if self.choices:
            return value in self.choices
        if isinstance(self.default, bool):
            return isinstance(value, bool)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return not (
            (self.above is not None and value <= self.above)
            or (self.least is not None and value < self.least)
            or (self.below is not None and value >= self.below)
            or (self.most is not None and value > self.most)
        )


MODIFIERS: dict[str, Setting] = {
    "ld_alpha": Setting(1.0, least=0, most=1),
    "weighting": Setting("none", choices=("none", "wpo", "wpo_clamped")),
    "reference_free": Setting(False),
}
"""What changes an objective from outside: LD-DPO's length desensitisation, WPO's weights, and no reference."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """A row of the table.

    Attributes:
      value: `(pairs, **settings) -> LossOutput`, or module and name of such a function, "pairwise.sigmoid".
      equation: the loss of one pair, in the letters of pairwise.py.
      paper: where it comes from.
      when: what it is for, in a few words.
      settings: what it takes beside the modifiers.
      data: what one entry of a step is: a pair of completions, all ranked completions of a prompt, one completion that
        is desirable or not, or the chosen completion alone.
      per: what the sum over a step is divided by: its entries, or the tokens of their chosen completions.
      scope: "step" where the value of one entry depends on the step's others.
      reference: whether it compares with a reference; "optional" where `reference_free` may leave it out.
      modifiers: which of MODIFIERS it takes.
      uses: which of the pairs' numbers it takes beside weight: "margin", "label", and "length" where it has no meaning
        without the numbers of tokens.
      at_start: its value where policy and reference agree, by its settings, if that is a constant.
      reward: whether a completion's reward is beta times its whole log-ratio, or times the mean over its tokens.
      model: what kind of model it trains.
      measured_as: objective that stands for it on held-out data; None is itself.
      remembers: how many numbers it carries from step to step.
    """

    value: Callable[..., Any] | str
    equation: str
    paper: str
    when: str = ""
    settings: Mapping[str, Setting] = dataclasses.field(default_factory=dict)
    data: Kind = "pairs"
    per: Literal["pairs", "chosen_tokens"] = "pairs"
    scope: Literal["pair", "step"] = "pair"
    reference: Literal["needed", "optional", "unused"] = "needed"
    modifiers: tuple[str, ...] = ("ld_alpha", "weighting")
    uses: tuple[str, ...] = ()
    at_start: Callable[..., float] | None = None
    reward: Literal["sum", "average"] = "sum"
    model: Literal["language", "reward"] = "language"
    measured_as: str | None = None
    remembers: int = 0

    def __post_init__(self):
        """Refuse settings that are no `Setting`."""
        for name, value in self.settings.items():
            if not isinstance(value, Setting):
                raise UserError(
                    f"Objective: settings: {name}: {value!r}: must be a dpo_jax.objectives.table.Setting, which says "
                    f"what it may be; write {name!r}: Setting({value!r})"
                )

    @property
    def function(self) -> Callable[..., Any]:
        """`(pairs, **settings) -> LossOutput`."""
        if callable(self.value):
            return self.value
        module, _, name = self.value.partition(".")
        return getattr(importlib.import_module(f"dpo_jax.objectives.{module}"), name)

    @property
    def takes(self) -> dict[str, Setting]:
        """Every setting that it takes, modifiers included."""
        modifiers = self.modifiers + (("reference_free",) if self.reference == "optional" else ())
        return {**self.settings, **{name: MODIFIERS[name] for name in modifiers}}


class NamedSum(NamedTuple):
    """A sum of rows with a name of its own: parts (name, weight, fixed settings) and what it takes."""

    parts: tuple[tuple[str, float | str, Mapping[str, Any]], ...]
    """A weight that is a text is the setting of that name."""
    equation: str
    paper: str
    when: str
    settings: Mapping[str, Setting] = {}
    """Settings that are not those of a part."""
