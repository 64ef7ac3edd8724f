"""The terms of a loss, from blocks of settings: each checked against the table of objectives and filled with defaults.

Nothing here imports jax, so that settings can be read and checked at once.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from dpo_jax.errors import nearest
from dpo_jax.objectives.rows import Kind, Objective, Setting
from dpo_jax.objectives.table import KNOWN_AS, OBJECTIVES, RECIPES, SCHEDULED, WEIGHT


@dataclasses.dataclass(frozen=True)
class Term:
    """One objective of a mixture: its weight in the sum, and every setting that it takes."""

    name: str
    weight: Any
    settings: Mapping[str, Any]

    @property
    def row(self) -> Objective:
        """Its row of the table."""
        return OBJECTIVES[self.name]

    @property
    def uses_reference(self) -> bool:
        """Whether it compares with a reference."""
        return self.row.reference != "unused" and not self.settings.get("reference_free", False)

    @property
    def desensitizes(self) -> bool:
        """Whether tokens beyond the shared length weigh less (LD-DPO)."""
        return self.settings.get("ld_alpha", 1.0) != 1.0

    @property
    def weighting(self) -> str:
        """WPO's weights: none, wpo or wpo_clamped."""
        return self.settings.get("weighting", "none")

    def at_start(self) -> float | None:
        """Value where policy and reference agree, or None where that is no constant."""
        if self.row.at_start is None or not self.uses_reference or self.weighting != "none":
            return None
        value = self.weight * self.row.at_start(**self.settings)
        return value if math.isfinite(value) else None


def names() -> list[str]:
    """What `objective.name` may be."""
    return [*OBJECTIVES, *RECIPES]


def with_parts(names: Iterable[str]) -> tuple[str, ...]:
    """These objectives, each sum followed by what it is a sum of.

    >>> with_parts(["sigmoid", "rpo"])
    ('sigmoid', 'rpo', 'sft')
    """
    parts = ((name, *(part for part, _, _ in RECIPES[name].parts)) if name in RECIPES else (name,) for name in names)
    return tuple(dict.fromkeys(name for some in parts for name in some))


def takes(name: str) -> dict[str, Setting]:
    """The settings of an objective or a recipe, by name."""
    if name in OBJECTIVES:
        found = OBJECTIVES[name].takes
    else:
        recipe = RECIPES[name]
        fixed = {key for _, _, settings in recipe.parts for key in settings}
        parts = [OBJECTIVES[part].takes for part, _, _ in recipe.parts]
        found = {key: setting for part in parts for key, setting in part.items() if key not in fixed}
        found |= recipe.settings
    return found | SCHEDULED if "beta" in found else found


def with_defaults(block: Mapping[str, Any]) -> dict[str, Any]:
    """A block with every setting that its objective takes filled in; an unknown name is left as it is."""
    given = {key: value for key, value in block.items() if value is not None}
    if (name := given.get("name", "sigmoid")) not in names():
        return given
    defaults = _defaults(name)
    if given.get("divergence") != "alpha_divergence":
        defaults.pop("divergence_alpha", None)
    return {"name": name, **defaults, **given}


def make_terms(blocks: Iterable[Mapping[str, Any]]) -> tuple[Term, ...]:
    """The terms that blocks of settings describe: `{"name": ..., "weight": ..., setting: value, ...}` each.

    A recipe becomes its parts. Settings that are None count as not given.

    Raises:
      ValueError: a line for each thing that is wrong, `key: remedy`; in a mixture the key of block i is `i.key`.
    """
    blocks = [{key: value for key, value in block.items() if value is not None} for block in blocks]
    problems, terms = [], []
    for number, block in enumerate(blocks):
        found = list(_problems(block))
        prefix = f"{number}." if len(blocks) > 1 else ""
        problems += [f"{prefix}{line}" for line in found]
        if not found:
            terms += _expanded(block)
    problems = problems or list(_contradictions(terms))
    if problems:
        raise ValueError("\n".join(problems))
    return tuple(terms)


def meant_by(name: str) -> str:
    """What is likely to be meant by a name that no objective has."""
    plain = name.lower().replace("-", "_").replace(" ", "_")
    near = nearest(plain, names(), 0.5)
    return KNOWN_AS.get(plain, f"did you mean {near}?" if near else f"one of {', '.join(names())}")


NEUTRAL = {"label_smoothing": 0, "length_penalty": 0, "sft_weight": 0, "calibration_weight": 0, "weighting": False}
"""Values that change nothing, and so may be given to an objective that has no such setting."""


MEANT = {
    (objective, key): meant
    for objective, keys, meant in (
        ("orpo", "beta lambda orpo_alpha", "odds_weight is TRL's beta of ORPO, the paper's lambda"),
        ("ipo", "tau", "beta is IPO's tau"),
        ("hinge", "gamma", "beta is RSO's gamma"),
        ("rpo", "alpha rpo_alpha", "sft_weight is RPO's alpha"),
        ("cpo", "alpha cpo_alpha", "sft_weight is TRL's cpo_alpha"),
        ("cpo", "gamma simpo_gamma", "objective simpo takes gamma"),
        ("simpo", "gamma_beta_ratio", "gamma is the ratio times beta"),
        ("simpo", "sft_weight cpo_alpha", "a block {name: sft, weight: 1} beside it adds that (CPO-SimPO)"),
        ("sigmoid", "sft_weight rpo_alpha", "objective rpo takes sft_weight"),
        ("sigmoid", "gamma", "objective simpo takes gamma"),
        ("sigmoid", "length_penalty", "objective rdpo takes length_penalty"),
        ("rdpo", "alpha", "length_penalty is R-DPO's alpha"),
        ("reward", "center_rewards_coefficient", "center is TRL's center_rewards_coefficient"),
        ("discopop", "discopop_tau", "tau is TRL's discopop_tau"),
    )
    for key in keys.split()
}
"""What a key is meant by that an objective does not take: its name here, or the objective that takes it."""


def _refusal(key: str, name: str, known: Iterable[str]) -> str:
    meant = f"{MEANT[name, key]}; " if (name, key) in MEANT else ""
    return f"{key}: objective {name} does not use it; {meant}it takes {', '.join(known) or 'no settings'}"


def _problems(block: Mapping[str, Any]) -> Iterable[str]:
    name = block.get("name", "sigmoid")
    if name not in names():
        return [f"name: no objective {name!r}; {meant_by(str(name))}"]
    known = takes(name)
    if not WEIGHT.accepts(block.get("weight", 1.0)):
        return [f"weight: must be {WEIGHT.allowed()}"]
    found = []
    for key, value in block.items():
        if key in ("name", "weight"):
            continue
        if key not in known and key in NEUTRAL and value == NEUTRAL[key]:
            continue
        if key not in known:
            found.append(_refusal(key, name, known))
        elif not known[key].accepts(value):
            found.append(f"{key}: must be {known[key].allowed()} for objective {name}")
    if "beta_schedule" in block and "beta_end" not in block:
        found.append("beta_schedule: nothing is scheduled without beta_end; give it, or leave this out")
    if "divergence_alpha" in block and block.get("divergence") != "alpha_divergence":
        found.append("divergence_alpha: only divergence alpha_divergence uses it; leave it out")
    return found


def _expanded(block: Mapping[str, Any]) -> list[Term]:
    """The terms of a block that is right, with defaults filled in."""
    name, weight = block.get("name", "sigmoid"), block.get("weight", 1.0)
    parts = ((name, 1.0, {}),) if name in OBJECTIVES else RECIPES[name].parts
    own = {} if name in OBJECTIVES else RECIPES[name].settings
    terms = []
    for part, factor, fixed in parts:
        if isinstance(factor, str):
            factor = block.get(factor, own[factor].default)
        given = {key: value for key, value in block.items() if key in takes(part)}
        terms.append(Term(part, weight * factor, {**_defaults(part), **given, **fixed}))
    return terms


def _defaults(name: str) -> dict[str, Any]:
    """What the settings of an objective are that nobody gave; a beta that nobody scheduled stays as it is."""
    return {key: setting.default for key, setting in takes(name).items() if key not in SCHEDULED}


def _contradictions(terms: list[Term]) -> Iterable[str]:
    """What cannot be added up in one step."""
    kinds = {term.row.data for term in terms} - {"chosen"}
    if len(kinds) > 1:
        yield f"name: {' and '.join(sorted(term.name for term in terms))} want different data; train them one by one"
    if "rankings" in kinds or "unpaired" in kinds:
        if any(term.row.data == "chosen" for term in terms):
            yield "name: sft looks at chosen answers of pairs, which the others' data does not have; leave it out"
    if len({term.row.model for term in terms}) > 1:
        yield "name: reward trains a scalar head, the others a language model; train them one by one"
    if len([term for term in terms if term.row.remembers]) > 1:
        yield "name: only one objective of a mixture may remember earlier steps"


CALLED: dict[Kind, str] = {
    "pairs": "pairs",
    "rankings": "rankings",
    "unpaired": "single answers",
    "chosen": "answers",
}
"""What the entries of a step are called, of each kind."""


def data_of(terms: Iterable[Term]) -> Kind:
    """What one entry of a step is."""
    for term in terms:
        if term.row.data != "chosen":
            return term.row.data
    return "chosen"
