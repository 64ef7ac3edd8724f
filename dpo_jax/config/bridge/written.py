"""A conversion as YAML that a person can read: where each line came from, what differs, and what was left out."""

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

from dpo_jax.config.bridge.conversion import Conversion, Converted
from dpo_jax.config.bridge.datasets import trained_on
from dpo_jax.config.bridge.rules import converted
from dpo_jax.config.bridge.source import Given, config_of
from dpo_jax.config.bridge.trainers import METHODS, method_of, trainer_of
from dpo_jax.config.run import FIELDS, validated
from dpo_jax.errors import UserError, printable, redacted, short
from dpo_jax.settings import COMMAND_LINE, GivenSettings

WIDTH = 110
NEEDED = ("model.path", "data.train", "model.freeze", "optimizer.learning_rate", "objective.beta", "batch.pairs")
"""Settings for which no default of ours may stand in where a file does not say what they were."""
INSTEAD = {
    "steps": ("epochs",),
    "epochs": ("steps",),
    "data.eval": ("data.eval_fraction",),
    "data.eval_fraction": ("data.eval",),
    "optimizer.warmup_steps": ("optimizer.warmup_fraction",),
    "optimizer.warmup_fraction": ("optimizer.warmup_steps",),
}
"""What a setting of the command line takes the place of, beside itself."""


def settings_of(c: Conversion, overrides: GivenSettings) -> GivenSettings:
    """The settings of a conversion, each with the place it came from; those of the command line win.

    Raises:
      UserError: a line for each thing that must be given and is not.
    """
    found = GivenSettings(origin=short(c.config.file))
    for key, line in c.lines.items():
        place = next((given.line for given in line.origins if given.line), None)
        found.values[key] = line.value
        found.where[key] = f"{found.origin}:{place}" if place else found.origin
    found.problems += overrides.problems
    found.unreadable += overrides.unreadable
    for key, value in overrides.values.items():
        for other in INSTEAD.get(key, ("objective",) if key.startswith("objective.") else ()):
            found.values.pop(other, None)
        found.values[key], found.where[key] = value, COMMAND_LINE
    _refuse_one_set_for_both(found)
    missing = [key for key in NEEDED if key in c.asked and key not in found.values]
    if missing:
        lines = [f"{found.origin}: {key}: {c.asked[key]}; give {key}=VALUE behind the file" for key in missing]
        raise UserError("\n".join(lines))
    return found


def _refuse_one_set_for_both(found: GivenSettings) -> None:
    """A set of the command line must not be what the file has for the other purpose.

    Raises:
      UserError: it is.
    """
    held, trained = found.values.get("data.eval"), found.values.get("data.train")
    told = [key for key in ("data.train", "data.eval") if found.where.get(key) == COMMAND_LINE]
    if len(told) != 1 or not held or not trained or not trained_on(held, trained):
        return
    other = "data.eval" if told == ["data.train"] else "data.train"
    raise UserError(
        f"{COMMAND_LINE}: {told[0]}: {short(scalar(found.values[told[0]]))}: is {other} in {found.origin} as well; "
        f"give {other}=FILE behind the file, too"
    )


def rewritten(
    file: str, overrides: GivenSettings, *, method: str | None = None, devices: int | None = None
) -> tuple[str, list[str]]:
    """Another trainer's config as a YAML file of ours, and what it leaves open, a line each.

    Args:
      file: a config, a script that calls TRL, or a shell script.
      overrides: settings of ours that replace those of the file.
      method: one of METHODS; by default what the file says.
      devices: on which it ran; by default what the file says, or 1.

    Raises:
      UserError: what the file is, if it can be no run here; or a line for each setting that it lacks or that is wrong.
    """
    config = config_of(file)
    trainer = trainer_of(config)
    method, doubt = method_of(config, trainer, method)
    c = converted(config, trainer, method, devices=devices, told=frozenset(overrides.values))
    return text_of(c, overrides, doubt), questions(c, settings_of(c, overrides), doubt)


def text_of(c: Conversion, overrides: GivenSettings, doubt: str | None) -> str:
    """The file's text, which `train` takes.

    Raises:
      UserError: a line for each setting that is missing, or that our own settings refuse.
    """
    given = settings_of(c, overrides)
    copy = GivenSettings(
        dict(given.values), dict(given.where), list(given.problems), list(given.unreadable), given.origin
    )
    validated(copy)
    lines = [*_head(c, given, doubt), *_body(c, given), *_tail(c)]
    return redacted("\n".join(lines)) + "\n"


def _comment(text: str, first: str = "", indent: str = "") -> list[str]:
    """A text as comment lines; those after the first are indented."""
    shown = printable(text)
    return textwrap.wrap(
        shown, WIDTH, initial_indent=f"{indent}# {first}", subsequent_indent=f"{indent}#     ", break_long_words=False
    )


def _head(c: Conversion, given: GivenSettings, doubt: str | None) -> Iterator[str]:
    name = Path(c.config.file).name
    yield from _comment(f"{METHODS[c.method]} in JAX, from {name} of {c.trainer.name} (`convert config`).")
    yield from _comment(
        'Behind each line: the key it was made of. "Differs" says what the two trainers do not have in common.'
    )
    asked = questions(c, given, doubt)
    if asked:
        yield "#"
        yield from _comment("What the file does not say; look at these first:")
        for text in asked:
            yield from _comment(text, "- ")


def questions(c: Conversion, given: GivenSettings, doubt: str | None) -> list[str]:
    """What the file leaves open, a line each."""
    told = {key for key, place in given.where.items() if place == COMMAND_LINE}
    open_ = [f"{key}: {what}" for key, what in c.asked.items() if not told & {key, *INSTEAD.get(key, ())}]
    return ([f"method: {doubt}"] if doubt else []) + [printable(line) for line in open_]


def _body(c: Conversion, given: GivenSettings) -> Iterator[str]:
    order = {key: number for number, key in enumerate([*FIELDS, "objective"])}
    sections = dict.fromkeys(key.split(".")[0] for key in FIELDS if "." in key)
    for section in sections:
        keys = [key for key in given.values if key.split(".")[0] == section]
        if not keys:
            continue
        yield ""
        if keys == [section]:
            yield from _line(c, given, section, section, "")
            continue
        yield f"{section}:"
        for key in sorted(keys, key=lambda key: order.get(key, 0)):
            yield from _line(c, given, key, key.partition(".")[2], "  ")
    rest = [key for key in given.values if "." not in key and key not in sections]
    if rest:
        yield ""
    for key in sorted(rest, key=lambda key: order.get(key, 0)):
        yield from _line(c, given, key, key, "")


def _line(c: Conversion, given: GivenSettings, key: str, name: str, indent: str) -> Iterator[str]:
    own = given.where.get(key) != COMMAND_LINE
    line = c.lines[key] if own else Converted(given.values[key], ())
    for note in line.notes:
        yield from _comment(note, "" if key == "batch.pairs" else "Differs: ", indent)
    value = given.values[key]
    origin = _origin(c, line) if own else "given with the command"
    if key == "objective":
        yield f"{indent}{name}:  # {origin}"
        yield from (f"{indent}  - {scalar(block)}" for block in value)
    else:
        yield f"{indent}{name}: {scalar(value)}  # {origin}"


def _origin(c: Conversion, line: Converted) -> str:
    """The keys that a line was made of, with their lines in the file; and the defaults."""
    parts = list(dict.fromkeys(_named(_entry(given)) for given in line.origins))
    parts += [f"{c.trainer.name}'s default {name}" for name in line.standard]
    return printable("; ".join(parts)) or "follows from the rest"


def _entry(given: Given) -> Given:
    """The entry of a list that a key is part of: `datasets.0` of `datasets.0.path`."""
    entry = re.match(r".*?\.\d+(?=\.)", given.key)
    return Given(entry[0], None, given.line) if entry else given


def _named(given: Given) -> str:
    return f"{given.key} (line {given.line})" if given.line else given.key


def scalar(value: object) -> str:
    """A value in YAML, on one line: what our reader takes back as the same value."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{scalar(str(key))}: {scalar(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(scalar, value)) + "]"
    if isinstance(value, float):
        return f"{value:.12g}" if "e" not in f"{value:.12g}" else f"{value:.12g}".replace("e-0", "e-")
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", value):
        return (
            value if value.lower() not in ("null", "true", "false", "none", "yes", "no", "on", "off") else f'"{value}"'
        )
    text = json.dumps(value, ensure_ascii=False)
    return "".join(one if one.isprintable() else f"\\U{ord(one):08x}" for one in text)


def _tail(c: Conversion) -> Iterator[str]:
    """What was left out, the keys of one reason together."""
    reasons: dict[str, list[str]] = {}
    for key, why in c.left.items():
        given = c.config.given[key]
        reasons.setdefault(why, []).append(_named(given))
    if not reasons:
        return
    yield ""
    yield from _comment("Left out, and why:")
    for why, keys in reasons.items():
        hint = f"here it is {why}" if why in FIELDS else why
        yield from _comment(f"{', '.join(keys)}: {hint}", "- ")
