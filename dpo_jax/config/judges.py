"""The arguments of a command that asks models and judges: who judges, and how prompts that are texts are asked."""

import argparse
import json

from pydantic import ValidationError

from dpo_jax.errors import COMMAND_LINE, UserError, printable
from dpo_jax.evaluation.judges import settings as judges
from dpo_jax.evaluation.judges.settings import JudgeSettings


def add_judges(parser: argparse.ArgumentParser) -> None:
    """The arguments that name judges: --judge, and one for each of their settings."""
    parser.add_argument("--judge", action="append", default=[], metavar="WHO", help=f"{judges.KINDS}; may be repeated")
    for name, field in JudgeSettings.model_fields.items():
        if name not in ("name", "seed"):
            flag = f"--judge-{name.replace('_', '-')}"
            parser.add_argument(flag, metavar="X", help=field.description, dest=f"judge_{name}")


def add_as_chat(parser: argparse.ArgumentParser) -> None:
    """The argument that has prompts which are texts asked through the chat template."""
    parser.add_argument("--as-chat", action="store_true", help="make a user's message of prompts that are texts")


def judges_of(options: argparse.Namespace) -> list[JudgeSettings]:
    """The judges that are named, each with the settings that are of its kind.

    Raises:
      UserError: a judge or a setting is not as it must be, or no judge uses a setting.
    """
    names = [name for name in JudgeSettings.model_fields if name not in ("name", "seed")]
    given = {name: getattr(options, f"judge_{name}") for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    if "body" in given:
        try:
            given["body"] = json.loads(given["body"])
        except ValueError as error:
            raise UserError(f"{COMMAND_LINE}: --judge-body: must be a JSON object ({error})") from error
    found, used = [], set()
    for name in options.judge:
        try:
            mine = {key: value for key, value in given.items() if key in judges.used_by(name)}
            found.append(JudgeSettings.model_validate({"name": name, "seed": getattr(options, "seed", 0), **mine}))
        except ValidationError as error:
            first = error.errors()[0]
            at = "".join(f"-{str(part).replace('_', '-')}" for part in first["loc"] if part != "name")
            what = first["msg"].removeprefix("Value error, ")
            raise UserError(f"{COMMAND_LINE}: --judge{at} {printable(name)}: {what}") from error
        except ValueError as error:
            raise UserError(f"{COMMAND_LINE}: --judge {printable(name)}: {error}") from error
        used |= mine.keys()
    if idle := sorted(given.keys() - used):
        raise UserError(f"{COMMAND_LINE}: --judge-{idle[0].replace('_', '-')}: no judge that is named uses it")
    if len({settings.name for settings in found}) < len(found):
        raise UserError(f"{COMMAND_LINE}: --judge: the same judge is named twice; leave one out")
    return found
