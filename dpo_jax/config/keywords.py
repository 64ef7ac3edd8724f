"""A run's settings as keywords of a Python function: the same names, checks and messages as in YAML.

A keyword is a section with a mapping (`optimizer={"learning_rate": 1e-5}`), a setting by its full name
(`**{"optimizer.learning_rate": 1e-5}`), or the last part of a name that no other setting ends with
(`learning_rate=1e-5`). Imports neither jax nor transformers.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo_jax.config.run import FIELDS, SECTIONS, Run, validated
from dpo_jax.errors import short
from dpo_jax.settings import GivenSettings

MAIN = {
    "model": "model.path",
    "reference": "reference.path",
    "adapter": "adapter.path",
}
"""What a keyword sets that is given a text, and no mapping."""


def full_name(name: str) -> str:
    """The setting that a keyword means, or the keyword where it means none, or could mean several.

    >>> full_name("beta"), full_name("learning_rate"), full_name("steps"), full_name("every")
    ('objective.beta', 'optimizer.learning_rate', 'steps', 'every')
    """
    if name in FIELDS or name in SECTIONS or "." in name:
        return name
    found = [key for key in FIELDS if key.rsplit(".", 1)[-1] == name]
    return found[0] if len(found) == 1 else name


def run_of(keywords: Mapping[str, Any], files: Sequence[str] = (), *, origin: str, problems: Sequence[str] = ()) -> Run:
    """The run of YAML files and of keywords, which win over them.

    Args:
      keywords: values by keyword; None turns a setting off, as null does.
      files: read before, later ones win.
      origin: what the messages say that the keywords are given to.
      problems: what is known to be wrong already, to be said with the rest.

    Raises:
      UserError: one line for each thing that is wrong.
    """
    source = GivenSettings(problems=list(problems))
    for file in files:
        source.read(file)
    source.origin = origin
    given: dict[str, str] = {}
    for name, value in keywords.items():
        for key, inner in _flat(_key(name, value), value):
            if key in given:
                source.problems.append(f"{origin}: {short(key)}: is given twice, as {given[key]} and {name}; keep one")
            given[key] = name
            source.give(key, inner, origin, given)
    return validated(source)


def _key(name: str, value: object) -> str:
    return MAIN[name] if name in MAIN and isinstance(value, str | os.PathLike) else full_name(name)


def _flat(key: str, value: object) -> Iterator[tuple[str, Any]]:
    """A value, or the values of a section; names inside a section are names of its settings."""
    if isinstance(value, Mapping) and key in SECTIONS:
        for name, inner in value.items():
            yield f"{key}.{name}", inner
    else:
        yield key, value
