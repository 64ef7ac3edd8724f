"""Settings of `python -m dpo_jax.rounds`: those of a run, and a block `rounds:` on top.

Imports neither jax nor transformers.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError

from dpo_jax.config import run as config
from dpo_jax.config.rules import only_merged
from dpo_jax.errors import UserError, nearest, printable, short
from dpo_jax.evaluation.judges.settings import JudgeSettings
from dpo_jax.evaluation.settings import CollectSettings
from dpo_jax.settings import GivenSettings, allowed, described

BLOCK = "rounds"


class RoundsSettings(CollectSettings):
    """Rounds of iterative DPO: the last model answers prompts, a judge pairs the answers, a run trains on the pairs."""

    number: int = Field(default=3, gt=0, le=1000, description="how many rounds; more may be asked for later")
    prompts: str = Field(description='file of {"prompt"} rows (with "good" for the rule) that the models answer')
    prompts_a_round: int | None = Field(
        default=None, gt=0, description="answer so many prompts in each round, one after the other (default: all)"
    )
    held_out: str | None = Field(
        default=None, description="file of prompts that nothing is trained on; each round's model is judged on them"
    )
    judge: JudgeSettings = Field(description="who judges; a block of settings, or the judge's name")
    reference: Literal["start", "first"] = Field(
        default="start", description="what a round's model is held to: where the round starts, or the first model"
    )


FIELDS = {f"{BLOCK}.{name}": field for name, field in RoundsSettings.model_fields.items() if name != "judge"}
FIELDS |= {f"{BLOCK}.judge.{name}": field for name, field in JudgeSettings.model_fields.items()}
"""Every setting of the block, by its full name."""
TAKEN_CARE_OF = {
    "data.train": "each round trains on what it has collected; leave it out",
    "reference.path": "rounds.reference says which model it is: start or first; leave it out",
    "reference.revision": "rounds.reference says which model it is: start or first; leave it out",
    "export.push": "the rounds' models stay here; push one with python -m dpo_jax.convert push",
    "reference.adapter": "rounds.reference says which it is: start or first; leave it out",
    "data.eval_fraction": "a share of what a round collects would be new in each; give rounds.held_out",
}
"""Settings of a run that the rounds decide, or cannot follow."""


def load(argv: Sequence[str]) -> tuple[config.Run, RoundsSettings]:
    """The settings of the rounds, and those of each round's run, whose data.train is to be filled in.

    Raises:
      UserError: one line for each thing that is wrong.
    """
    found: list[RoundsSettings] = []
    run = config.load(argv, BLOCK, options=_help(), taken=lambda source: found.extend(_taken(source)))
    if run.adapter.used:
        _check_adapter(run, found[0])
    return run, found[0]


def _check_adapter(run: config.Run, settings: RoundsSettings) -> None:
    """Refuse an adapter that a later round cannot go on from, or be held to.

    Raises:
      UserError: a line for each reason.
    """
    found = []
    if cause := only_merged(run):
        found.append(f"adapter: the next round goes on from its folder, which {cause} has none of; leave it out")
    elif "adapter" not in run.export_kinds:
        found.append(f"export.kind: {run.export.kind}: the next round goes on from the adapter; give adapter or both")
    if run.adapter.path is not None and settings.reference == "first":
        found.append("rounds.reference: first: would be a second adapter beside that of the last round; give start")
    if found:
        raise UserError("\n".join(found))


def _taken(source: GivenSettings) -> list[RoundsSettings]:
    for key, why in TAKEN_CARE_OF.items():
        if source.values.get(key) is not None:
            source.problems.append(f"{source.where[key]}: {key}: {why}")
    source.values["data.train"], source.where["data.train"] = COLLECTED, source.origin
    values, where = {}, {}
    for key in [key for key in source.values if key == BLOCK or key.startswith(f"{BLOCK}.")]:
        values[key.removeprefix(f"{BLOCK}.")], where[key] = source.values.pop(key), source.where[key]
    given, judge = _nested(values)
    unknown = [name for name in given if name not in RoundsSettings.model_fields]
    unknown += [f"judge.{name}" for name in judge if name not in JudgeSettings.model_fields]
    known = [*RoundsSettings.model_fields, *(f"judge.{name}" for name in JudgeSettings.model_fields)]
    for name in unknown:
        near = nearest(name[:80], known, 0.6)
        remedy = f"did you mean {BLOCK}.{near}?" if near else "--help lists them all"
        place = next((where[key] for key in where if key.startswith(f"{BLOCK}.{name}")), source.origin)
        source.problems.append(f"{place}: {short(f'{BLOCK}.{name}')}: no such setting; {remedy}")
    judge = {name: value for name, value in judge.items() if name in JudgeSettings.model_fields}
    given = {name: value for name, value in given.items() if name in RoundsSettings.model_fields}
    try:
        return [RoundsSettings.model_validate({**given, **({"judge": judge} if judge else {})}, strict=True)]
    except ValidationError as error:
        source.problems += [_problem(source, where, detail) for detail in error.errors()]
        return []


COLLECTED = "collected/pairs.jsonl"
"""Stands in data.train until a round has collected its own."""


def _nested(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The block's own settings, and those of its judge, who may be given by name alone."""
    judge = {key.removeprefix("judge."): value for key, value in values.items() if key.startswith("judge.")}
    given = {key: value for key, value in values.items() if not key.startswith("judge.")}
    if isinstance(given.get("judge"), str):
        judge = {"name": given.pop("judge"), **judge}
    return given, judge


def _problem(source: GivenSettings, where: dict[str, str], detail: Mapping[str, Any]) -> str:
    name = ".".join(map(str, detail["loc"]))
    key = f"{BLOCK}.{name}"
    place = where.get(key) or where.get(key.rpartition(".")[0]) or source.origin
    if detail["type"] == "missing":
        section = JudgeSettings if name.startswith("judge.") else RoundsSettings
        return f"{place}: {key}: not given: {section.model_fields[name.rpartition('.')[2]].description}"
    if detail["type"] == "value_error":
        return f"{place}: {key}: {detail['msg'].removeprefix('Value error, ')}"
    field = RoundsSettings.model_fields.get(name)
    remedy = f"must be {allowed(field)}" if field is not None and name != "judge" else detail["msg"]
    return f"{place}: {key}: {printable(str(detail['input']))[:60]}: {remedy}"


def _help() -> list[str]:
    """The settings of the block, in lines."""
    lines = (line for key, field in FIELDS.items() for line in described(key, field))
    return ["", f"{BLOCK}: {RoundsSettings.__doc__}", *lines]
