"""What an evaluation of a model is of, in words: how much data of what kind, and which objective its numbers belong to.

A loss means nothing without its objective, and a model's own run may have had another one than is measured.
"""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.errors import UserError
from dpo_jax.objectives import terms
from dpo_jax.objectives.rows import Kind
from dpo_jax.objectives.settings import ObjectiveSettings, as_written
from dpo_jax.objectives.table import SCHEDULED


class Counted(NamedTuple):
    """How many examples an objective made of the pairs and the single answers of a file, and of what kind they are."""

    examples: int
    kind: Kind
    pairs: int
    singles: int

    def text(self) -> str:
        """What the file holds, in words, and what was made of it where that is something else.

        >>> Counted(60, "chosen", 0, 60).text(), Counted(120, "unpaired", 60, 0).text()
        ('60 single answers', '60 pairs, as 120 single answers')
        """
        held = _counted(self.pairs, "pairs"), _counted(self.singles, "single answers")
        said = " and ".join(filter(None, held))
        if not self.pairs or self.kind == "pairs":
            return said
        made = _counted(self.examples, terms.CALLED[self.kind])
        return f"{said}, as {made}" if self.kind != "chosen" else f"{said}, of a pair the chosen answer"

    def to_json(self) -> dict[str, int]:
        """The examples, which are called pairs whatever they are, and also by their name where it is another.

        >>> Counted(6, "pairs", 6, 0).to_json(), Counted(4, "unpaired", 0, 4).to_json()
        ({'pairs': 6}, {'pairs': 4, 'single_answers': 4})
        """
        found = {"single_answers": self.singles} if self.singles else {}
        if self.kind in ("unpaired", "rankings"):
            found = {terms.CALLED[self.kind].replace(" ", "_"): self.examples}
        return {"pairs": self.examples, **found}


def _counted(number: int, called: str) -> str:
    return f"{number:,} {called if number > 1 else called.removesuffix('s')}" if number else ""


def _blocks(objective: ObjectiveSettings) -> list[dict[str, Any]]:
    """The objectives with all their settings; of a scheduled beta that of the end, which the exported model had."""
    found = []
    for block in map(terms.with_defaults, objective.blocks):
        beta = {"beta": block["beta_end"]} if "beta_end" in block else {}
        found.append({key: value for key, value in {**block, **beta}.items() if key not in SCHEDULED})
    return found


def _unusual(block: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an objective that are not its defaults."""
    usual = {key: setting.default for key, setting in terms.takes(block["name"]).items()}
    usual |= {"name": block["name"], "weight": 1.0}
    return {key: value for key, value in block.items() if usual.get(key) != value}


def said_objective(objective: ObjectiveSettings) -> str:
    """`ipo, beta 0.1`: an objective, or the sum of several, with beta and whatever is not its default.

    >>> said_objective(ObjectiveSettings.model_validate({"name": "simpo", "gamma": 0.5}))
    'simpo, beta 2, gamma 0.5'
    """
    parts = []
    for block in _blocks(objective):
        numbers = {key: block[key] for key in ("beta",) if key in block} | _unusual(block)
        weight = f"{_plain(numbers.pop('weight'))} " if "weight" in numbers else ""
        said = (f"{key} {_plain(value)}" for key, value in numbers.items())
        parts.append(", ".join([weight + block["name"], *said]))
    return " + ".join(parts)


def _plain(value: object) -> str:
    """A setting's value as it is written.

    >>> _plain(2.0), _plain(True), _plain("js_divergence")
    ('2', 'true', 'js_divergence')
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    short = f"{value:g}" if isinstance(value, int | float) else str(value)
    return short if isinstance(value, str) or float(short) == value else str(value)


def words_for(objective: ObjectiveSettings) -> str:
    """What this command is to be given to measure an objective."""
    blocks = _blocks(objective)
    if objective.mixture is not None:
        mixture = [{"name": block["name"], **_unusual(block)} for block in blocks]
        return shlex.quote(f"objective.mixture={json.dumps(mixture)}")
    (block,) = blocks
    settings = _unusual(block)
    beta = [f"--beta {_plain(settings.pop('beta'))}"] if "beta" in settings else []
    others = (f"objective.{key}={_plain(value)}" for key, value in settings.items())
    return " ".join([f"objective.name={block['name']}", *beta, *others])


def trained_with(folder: Path) -> ObjectiveSettings | None:
    """The objective of the run that exported a folder; None where the folder does not say."""
    from dpo_jax.hf.tensors import OURS, read_json

    try:
        found = read_json(folder, OURS)["settings"]["objective"]
    except (OSError, UserError, LookupError, TypeError):
        return None
    objective = as_written(found)
    return None if objective is None or objective.problems() else objective


def other_objective(trained: ObjectiveSettings | None, measured: ObjectiveSettings, *, alone: bool) -> list[str]:
    """That a model was trained with another objective than the one that is measured, and how to measure that; `alone`
    where there is no reference."""
    if trained is None or _comparable(trained, alone) == _comparable(measured, alone):
        return []
    also = " --reference FOLDER" if alone and trained.compares else ""
    return [f"it was trained with {said_objective(trained)}; to measure that, give {words_for(trained)}{also}"]


def _comparable(objective: ObjectiveSettings, alone: bool) -> list[dict[str, Any]]:
    """Every setting of an objective; without the one that the lack of a reference decides."""
    return [{k: v for k, v in block.items() if not (alone and k == "reference_free")} for block in _blocks(objective)]
