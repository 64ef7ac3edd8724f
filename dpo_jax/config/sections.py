"""Some sections of a run's settings alone, for a command that takes no whole run."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from dpo_jax.config.advice import advice
from dpo_jax.config.run import BLOCKS, FIELDS, problems_of
from dpo_jax.errors import COMMAND_LINE, UserError, redacted, short
from dpo_jax.settings import GivenSettings, Section


def sections_of(
    words: Sequence[str], arguments: Mapping[str, Any], kinds: Mapping[str, type[Section]], own: Mapping[str, str]
) -> dict[str, Any]:
    """The sections that a command's arguments, and settings after them, describe.

    Args:
      words: settings as `section.key=value`, which win over the arguments.
      arguments: what arguments of the command give, by setting.
      kinds: the sections that are wanted, by name.
      own: settings that only an argument gives, and what to say of each.

    Raises:
      UserError: one line for each thing that is wrong.
    """
    source = GivenSettings()
    for word in words:
        key, _, value = word.partition("=")
        source.override(key, value)
    for block in BLOCKS:
        source.gather(block)
    for key in source.values:
        if key in own or key not in FIELDS or key.partition(".")[0] not in kinds:
            why = own.get(key) or (advice(key, FIELDS) if key not in FIELDS else "is not used here; leave it out")
            source.problems.append(f"{COMMAND_LINE}: {short(key)}: {why}")
    for key, value in arguments.items():
        source.values.setdefault(key, value)
        source.where.setdefault(key, COMMAND_LINE)
    found = {}
    for name, kind in kinds.items():
        mine = {key.partition(".")[2]: value for key, value in source.values.items() if key.startswith(f"{name}.")}
        try:
            found[name] = kind.model_validate(
                {key: mine[key] for key in mine if f"{name}.{key}" in FIELDS}, strict=True
            )
        except ValidationError as error:
            source.problems += problems_of(source, error, name)
    if problems := source.unreadable + source.problems:
        raise UserError(redacted("\n".join(problems)))
    return found
