"""A run's settings: YAML files and `section.key=value` overrides become one frozen, validated `Run`.

Everything that is wrong is reported at once, one line each: `FILE:LINE: key: value: remedy`. Relative paths are
relative to the current directory. Imports neither jax nor transformers, so that `--help` answers at once.
"""

import functools
import json
import os
import sys
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

import dpo_jax
from dpo_jax.config import completion
from dpo_jax.config.advice import advice, another_kind, no_block
from dpo_jax.config.console import COMMANDS, program
from dpo_jax.config.rules import ADAPTER_RATE, IGNORED, RULES, best_problem, only_merged
from dpo_jax.data.settings import BatchSettings, DataSettings
from dpo_jax.errors import UserError, redacted, short
from dpo_jax.evaluation.settings import EvaluationSettings
from dpo_jax.files import digest_of
from dpo_jax.hf.settings import ExportSettings
from dpo_jax.model.settings import AdapterSettings, MeshSettings, ModelSettings
from dpo_jax.objectives import terms
from dpo_jax.objectives.settings import ObjectiveSettings, as_written, take_short_form
from dpo_jax.processes.settings import DistributedSettings
from dpo_jax.reporting.settings import AlarmSettings, LogSettings
from dpo_jax.settings import COMMAND_LINE, GivenSettings, Section, allowed, described, shown
from dpo_jax.training.settings import CheckpointSettings, OptimizerSettings, ReferenceSettings, fitting_mode


class Run(Section):
    """One training run, whole: what is trained, on what, how, and what comes out."""

    model: ModelSettings
    data: DataSettings
    batch: BatchSettings = Field(default_factory=BatchSettings)
    objective: ObjectiveSettings = Field(default_factory=ObjectiveSettings)
    adapter: AdapterSettings = Field(default_factory=AdapterSettings)
    reference: ReferenceSettings = Field(default_factory=ReferenceSettings)
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings)
    mesh: MeshSettings = Field(default_factory=MeshSettings)
    distributed: DistributedSettings = Field(default_factory=DistributedSettings)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)
    log: LogSettings = Field(default_factory=LogSettings)
    alarms: AlarmSettings = Field(default_factory=AlarmSettings)
    export: ExportSettings = Field(default_factory=ExportSettings)
    steps: int | None = Field(default=None, gt=0, description="length of the run in optimizer steps")
    epochs: float | None = Field(
        default=None, gt=0, description="length of the run in passes over the data (default: 1)"
    )
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="orders the data and draws what is random")
    output: str = Field(description="folder of everything the run writes")

    @property
    def export_kinds(self) -> tuple[str, ...]:
        """What the run leaves: an adapter's folder, a whole model ("merged"), or both."""
        if not self.adapter.used:
            return ("merged",)
        kind = self.export.kind or ("merged" if only_merged(self) else "adapter")
        return ("adapter", "merged") if kind == "both" else (kind,)

    @model_validator(mode="before")
    @classmethod
    def _what_follows_from_the_rest(cls, data: object) -> Any:
        """One epoch unless told; the reference, and the end of an answer, that the objective asks for."""
        if not isinstance(data, Mapping):
            return data
        length = {"epochs": 1.0} if data.get("steps") is None and data.get("epochs") is None else {}
        objective, reference = as_written(data.get("objective")), data.get("reference") or {}
        if isinstance(reference, Mapping) and reference.get("mode") is None:
            reference = {**reference, "mode": fitting_mode(objective, reference)}
        rows, found = data.get("data"), {**data, **length, "reference": reference}
        scores = objective is not None and objective.trains_reward_model
        if scores and isinstance(rows, Mapping) and rows.get("ending") is None:
            found["data"] = {**rows, "ending": "template"}
        found |= _of_adapters(data.get("adapter"), data.get("optimizer"))
        return _without_left_overs(found)

    @model_validator(mode="after")
    def _consistent(self) -> "Run":
        found = [f"{key}: {remedy}" for key, broken, remedy in RULES if broken(self)]
        found += filter(None, [best_problem(self)])
        found += self.objective.problems()
        found += [f"{key}: {reason}" for key, ignores, reason in IGNORED if ignores(self) and _given(self, key)]
        found += [
            f"{key}: is empty; write a name, or leave the setting out" for key in FIELDS if _is_blank(_get(self, key))
        ]
        found += [
            f"checkpoint.allow_change: {key!r} is not a setting that decides a run's mathematics; leave it out"
            for key in self.checkpoint.allow_change
            if key not in CHANGES_MATHEMATICS
        ]
        if found:
            raise ValueError("\n".join(found))
        return self


def _of_adapters(adapter: object, optimizer: object) -> dict[str, Any]:
    """An adapter's learning rate, where none is given: ten times that of a whole model."""
    used = isinstance(adapter, Mapping) and (adapter.get("rank") is not None or adapter.get("path") is not None)
    given = optimizer if isinstance(optimizer, Mapping) else {}
    if not used or (optimizer is not None and not isinstance(optimizer, Mapping)) or "learning_rate" in given:
        return {}
    return {"optimizer": {**given, "learning_rate": ADAPTER_RATE}}


MEASURED = ("data.eval", "data.eval_fraction", "evaluation.answers")
"""What gives an evaluation something to measure."""
# What null turns off by name, as on a command line after a file, takes along what nothing but it would use.
LEFT_OVER = (
    ("evaluation.max_new_tokens", ("evaluation.answers",)),
    ("evaluation.every", MEASURED),
    ("evaluation.patience", MEASURED),
    ("evaluation.patience", ("checkpoint.best",)),
    ("checkpoint.best", MEASURED),
    ("reference.update_rate", ("reference.update_every",)),
)


def _without_left_overs(data: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a run without those of LEFT_OVER whose users are all off, one of them by name."""
    found = dict(data)
    for key, users in LEFT_OVER:
        section, name = key.split(".")
        blocks = [(found.get(user.split(".")[0]), user.split(".")[1]) for user in users]
        values = [block.get(user, ...) for block, user in blocks if isinstance(block, Mapping)]
        off = None in values and all(value in (None, ...) for value in values)
        if off and isinstance(block := found.get(section), Mapping):
            found[section] = {inner: value for inner, value in block.items() if inner != name}
    return found


# Every setting is in one of the next two: does another value lead to another model (beyond float reassociation)?
CHANGES_MATHEMATICS = frozenset(
    """
    model.path model.revision model.compute_dtype model.gradient_dtype data.train data.layout data.max_length
    data.truncation data.ending
    data.template data.control_tokens data.max_characters data.shuffle data.first batch.pairs reference.mode
    data.eval_fraction data.columns data.as_chat data.chat_template_kwargs data.score_tool_results
    reference.path reference.revision reference.update_every reference.update_rate optimizer.learning_rate
    optimizer.schedule optimizer.warmup_steps optimizer.warmup_fraction optimizer.beta1 optimizer.beta2
    optimizer.epsilon optimizer.weight_decay optimizer.clip_norm steps epochs seed model.router_aux
    optimizer.name optimizer.param_dtype optimizer.moment_dtype model.freeze model.resize_embedding reference.adapter
    model.quantise adapter.rank adapter.alpha adapter.targets adapter.layers adapter.dropout adapter.rslora adapter.dora
    adapter.rank_pattern adapter.alpha_pattern adapter.lr_ratio adapter.modules_to_save adapter.path adapter.revision
    """.split()
) | {f"objective.{name}" for name in ObjectiveSettings.model_fields}
KEEPS_MATHEMATICS = frozenset(
    """
    model.scan_layers model.remat model.attention model.compile_cache data.eval data.max_bad_fraction data.cache
    data.workers data.stream batch.micro_tokens batch.share_prompts
    mesh.data mesh.fsdp mesh.expert mesh.tensor mesh.context
    evaluation.every evaluation.answers evaluation.max_new_tokens evaluation.patience
    evaluation.judge evaluation.judge_template evaluation.judge_model evaluation.judge_key_variable
    evaluation.judge_call_budget checkpoint.every checkpoint.keep checkpoint.folder
    checkpoint.keep_every checkpoint.best
    checkpoint.allow_change log.every log.report log.tensorboard log.loggers log.project log.name log.tags
    log.token_statistics log.max_nonfinite
    distributed.coordinator distributed.processes distributed.process distributed.timeout distributed.start_timeout
    output alarms.enabled alarms.chosen_drift alarms.kl export.dtype export.rounding export.align_eos export.kind
    export.push export.private
    """.split()
)


def _walk(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _walk(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


FIELDS: dict[str, FieldInfo] = dict(_walk(Run))
BLOCKS = [
    key
    for key, field in FIELDS.items()
    if any(typing.get_origin(kind) is dict for kind in typing.get_args(field.annotation))
]
"""Settings that are blocks themselves, of names that are not settings."""
SECTIONS = {key.split(".")[0] for key in FIELDS if "." in key}


def _get(run: Run, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), run)


def _is_blank(value: object) -> bool:
    if isinstance(value, tuple | dict):
        return any(map(_is_blank, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and not value.strip()


def _given(run: Run, key: str) -> bool:
    section, name = key.split(".")
    value = _get(run, key)
    return name in getattr(run, section).model_fields_set and value is not None and value is not False


def problems_of(source: GivenSettings, error: ValidationError, section: str = "") -> Iterator[str]:
    """One line for each setting that is at fault, of a run or of one section; pydantic reports a union once per
    member."""
    seen: set[str] = set()
    for detail in error.errors():
        if detail["type"] == "value_error":
            for line in detail["msg"].removeprefix("Value error, ").splitlines():
                key, _, remedy = line.partition(": ")
                yield _problem(source, key, remedy)
            continue
        parts = [section] * bool(section) + [str(part) for part in detail["loc"]]
        key = next((key for key in (".".join(parts[:2]), parts[0]) if key in FIELDS), None)
        if key is None:  # a default of an objective of the caller's own, whose name no setting of ours has
            as_a_list = "give it in the form of a list, as in objective: [{name: mine, slack: 2}]"
            yield _problem(source, "objective.name", f"has settings of its own ({parts[-1]}); {as_a_list}")
            return
        hidden = detail["type"] == "missing" and (source.unreadable or parts[0] in source.values)
        if key not in seen and not hidden:
            yield _problem(source, key, f"must be {allowed(FIELDS[key])}")
        seen.add(key)


def _problem(source: GivenSettings, key: str, remedy: str) -> str:
    if key not in source.values:
        what = FIELDS[key].description if FIELDS[key].is_required() else remedy
        return f"{source.origin}: {key}: not given: {what}"
    return f"{source.where[key]}: {key}: {shown(source.values[key])}: {remedy}"


def validated(source: GivenSettings) -> Run:
    """The run that settings describe; `source.values` changes on the way.

    Raises:
      UserError: one line for each thing that is wrong, each with the place it came from.
    """
    for block in BLOCKS:
        source.gather(block)
    take_short_form(source)
    nested: dict[str, Any] = {section: {} for section in SECTIONS}
    for key, value in source.values.items():
        if key in FIELDS:
            *section, name = key.split(".")
            (nested[section[0]] if section else nested)[name] = value
        elif key in SECTIONS and value is not None:
            source.problems.append(f"{source.where[key]}: {key}: {shown(value)}: {no_block(key, value, FIELDS)}")
        elif key not in SECTIONS:
            source.problems.append(f"{source.where[key]}: {short(key)}: {advice(key, FIELDS)}")
    if other := another_kind(source.where, [key for key in source.values if key not in FIELDS], nested):
        raise UserError(other)
    try:
        run = Run.model_validate(nested, strict=True)
    except ValidationError as error:
        source.problems += problems_of(source, error)
    if problems := source.unreadable + source.problems:
        raise UserError(redacted("\n".join(problems)))
    return run


def load(
    argv: Sequence[str],
    command: str = "train",
    *,
    options: Sequence[str] = (),
    sections: Sequence[str] = (),
    taken: Callable[[GivenSettings], None] = lambda source: None,
) -> Run:
    """The run that YAML files (left to right) and overrides (`key=value`, `--key value`, `--key=value`) describe.

    Later ones win, and overrides win over files wherever they stand. `--help`, `--print-config` and `--print-schema`
    print and exit. The help also has the lines `options`, of what the command takes beside settings, and of the
    settings those of `sections`; all, where none are named. `taken` takes out of what is given the settings that are
    not a run's.

    Raises:
      UserError: one line for each thing that is wrong.
    """
    if completion.ASKED in os.environ:
        completion.of_settings(options)
    if not argv:
        raise UserError(f"{COMMAND_LINE}: no settings; give CONFIG.yaml, such as one that {program('recipes')} lists")
    source = GivenSettings()
    shows = _take(source, argv, lambda: _help(command, options, sections or ("", *SECTIONS)))
    taken(source)
    run = validated(source)
    if shows:
        sys.exit(print(redacted(yaml.safe_dump(dump(run), sort_keys=False)), end=""))
    return run


def _take(source: GivenSettings, argv: Sequence[str], helped: Callable[[], str]) -> bool:
    """Take over the files, and then the overrides, of a command line; whether it asks to print the settings."""
    shows, rest, overrides = False, list(argv), []
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            sys.exit(print(helped()))
        if word == "--print-schema":
            sys.exit(print(json.dumps(Run.model_json_schema(), indent=2)))
        if word == "--print-config":
            shows = True
        elif not word.startswith("-") and ("=" not in word or os.path.isfile(word)):
            source.read(word)
        else:
            key, equals, value = word.removeprefix("--").partition("=")
            if not equals and (not rest or rest[0].startswith("--")):
                known = key in FIELDS or not word.startswith("--")
                missing = f"its value is missing; write {short(key)}=VALUE"
                source.problems.append(f"{COMMAND_LINE}: {short(word)}: {missing if known else advice(key, FIELDS)}")
            else:
                overrides.append((key, value if equals else rest.pop(0)))
    for key, value in overrides:
        source.override(key, value)
    return shows


def _help(command: str, options: Sequence[str], sections: Collection[str]) -> str:
    lines = [
        f"usage: {program(command)} {'[options] ' * bool(options)}CONFIG.yaml ... [section.key=value ...]",
        "",
        COMMANDS[command].says,
        *options,
        "",
        "Later files win, and overrides over files. Values are YAML; relative paths start from the current directory.",
        "--print-config prints the settings a run would have, --print-schema a JSON schema for editors.",
    ]
    section = None
    for key, field in FIELDS.items():
        head = key.split(".")[0] if "." in key else ""
        if head not in sections:
            continue
        if head != section:
            section = head
            lines += [
                "",
                f"{section}: {getattr(Run.model_fields[section].annotation, '__doc__', '')}" if section else "run:",
            ]
        lines += described(key, field)
    return "\n".join(lines)


def dump(run: Run) -> dict[str, Any]:
    """The settings as plain JSON values, less those that this run ignores, and less how its processes find
    each other; but for that, `Run.model_validate(dump(run)) == run`."""
    settings = run.model_dump(mode="json", exclude={"distributed"})
    objective = {key: value for key, value in settings["objective"].items() if value is not None}
    settings["objective"] = {"mixture": objective["mixture"]} if "mixture" in objective else objective
    for key, ignores, _ in IGNORED:
        section, name = key.split(".")
        if ignores(run):
            settings[section].pop(name, None)
    if not run.adapter.used:
        settings.pop("adapter")
    if not run.model.freeze:
        settings["model"].pop("freeze")
    return settings


def same_everywhere(run: Run) -> dict[str, Any]:
    """What all processes of a run must have been started with: every setting by its name, and the version."""
    own = ("distributed.coordinator", "distributed.process")
    settings = {key: _get(run, key) for key in FIELDS if key not in own}
    plain = json.loads(json.dumps(settings, default=lambda value: value.model_dump(mode="json")))
    return {**plain, "version of dpo_jax": dpo_jax.__version__}


def from_dump(settings: Mapping[str, Any], origin: str) -> Run:
    """The run that a `dump` is of; `origin` is the file that it was read from.

    Raises:
      UserError: it is not one of this version's.
    """
    try:
        return Run.model_validate(settings)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{origin}: settings.{where}: {error.errors()[0]['msg']}; it is of another version") from None


def digest(run: Run) -> str:
    """SHA-256 of all settings, in hexadecimal."""
    return digest_of(json.dumps(dump(run), sort_keys=True))


def changed_mathematics(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two `dump`s and would lead to another model: lines `key: old -> new`.

    A setting that a dump lacks has its default value; one that is not known here counts as a change.
    """
    before, after = dict(_flat(_completed(old))), dict(_flat(_completed(new)))
    keys = [key for key in {**dict.fromkeys(FIELDS), **before, **after} if key not in KEEPS_MATHEMATICS]
    default = {key: None if field.is_required() else field.default for key, field in FIELDS.items()}
    pairs = ((key, before.get(key, default.get(key)), after.get(key, default.get(key))) for key in keys)
    return [redacted(f"{key}: {shown(a)} -> {shown(b)}") for key, a, b in pairs if a != b and shown(a) != shown(b)]


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of a `dump` by its full name, the objective's defaults filled in."""
    return dict(_flat(_completed(settings)))


def differing(settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What in a `dump` is not as in a run with this model, data, objective and kind of training of which nothing else
    is said: the value and what it would be, by full name. What has no default would be `...`.
    """
    given = flat(settings)
    if (mixture := given.get("objective.mixture")) is not None:
        objective = {"mixture": mixture}
    else:
        objective = {"name": given.get("objective.name", "sigmoid")}
    said = {"objective": objective, "output": "run", "model": {"path": "."}, "data": {"train": "."}}
    said |= {"steps": given["steps"]} if given.get("steps") is not None else {}
    said |= {"adapter": {"rank": 8}} if given.get("adapter.rank") or given.get("adapter.path") else {}
    usual = {key: field.default for key, field in FIELDS.items()} | flat(dump(Run.model_validate(said)))
    usual |= {key: ... for key, field in FIELDS.items() if field.is_required()} | {"adapter.rank": ...}
    usual["objective.name"] = "sigmoid"
    return {key: (value, usual.get(key)) for key, value in given.items() if usual.get(key) != value}


def _completed(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings with the objective's defaults filled in, as a dump of an earlier version may lack some."""
    objective = settings.get("objective")
    if not isinstance(objective, Mapping) or objective.get("mixture") is not None:
        return settings
    return {**settings, "objective": terms.with_defaults(objective)}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and prefix + name not in FIELDS:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
