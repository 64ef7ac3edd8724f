"""Messages in the words of Python: settings as keywords, and rows in memory by their number.

Checks know settings as YAML has them, and rows as lines of a file. A function that is called with keywords and with
rows says the same in its caller's notation.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from dpo_jax.config.console import program
from dpo_jax.config.keywords import MAIN, full_name
from dpo_jax.config.run import FIELDS
from dpo_jax.errors import UserError

SHORT = {"objective.name": "objective", **{key: name for name, key in MAIN.items()}}
"""Settings whose keyword is not the last part of their name."""
_KEYS = "|".join(re.escape(key) for key in sorted(FIELDS, key=len, reverse=True))
_GIVEN = re.compile(rf"(?<![\w.='])('?)({_KEYS})=(\{{[^{{}}]*\}}|\[[^\[\]]*\]|[\w./@%+~-]*[\w/])\1")
"""A setting with its value, perhaps in the quotes that a shell wants."""
_NUMBER = re.compile(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?")


@contextlib.contextmanager
def in_python(arguments: Mapping[str, str] | None = None, *, rows: Path | None = None) -> Iterator[None]:
    """Errors of users from inside are in the words of Python.

    Args:
      arguments: settings that are arguments of the function under other names.
      rows: file that rows in memory were written to.
    """
    try:
        yield
    except UserError as error:
        error.args = (said(str(error), arguments or {}, rows), *error.args[1:])
        raise


def said(text: str, arguments: Mapping[str, str], rows: Path | None = None) -> str:
    """A message in the words of Python.

    >>> said("r.jsonl:3: write 'data.columns={prompt: question}', or data.as_chat=true", {}, Path("r.jsonl"))
    'row 3: write columns={"prompt": "question"}, or as_chat=True'
    >>> said("steps: 3: null turns one off, as steps=null; or give data.eval", {"data.eval": "evaluate"})
    'steps: 3: null turns one off, as steps=None; or give evaluate'
    """
    if rows is not None:
        text = re.sub(rf"{re.escape(str(rows))}:(\d+)", r"row \1", text).replace(str(rows), "the rows")
    text = text.replace("; --help lists them all", f"; {program('train')} --help lists them all")
    text = _GIVEN.sub(lambda found: _keyword(found[2], found[3], arguments), text)
    for key, name in arguments.items():
        text = re.sub(rf"(?<![\w./]){re.escape(key)}(?![\w.]*\w)", name, text)
    return text


def _keyword(key: str, value: str, arguments: Mapping[str, str]) -> str:
    """A setting with its value as Python takes it: by a keyword of its own, or in the mapping of its section."""
    try:
        written = _written(yaml.safe_load(value))
    except yaml.YAMLError:
        return f"{key}={value}"
    section, _, name = key.rpartition(".")
    argument = arguments.get(key) if written != "None" else None  # an argument that is None is one that is not given
    keyword = argument or SHORT.get(key) or (name if full_name(name) == key else "")
    return f"{keyword}={written}" if keyword else f'{section}={{"{name}": {written}}}'


def _written(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_written(name)}: {_written(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_written, value)) + "]"
    return f'"{value}"' if isinstance(value, str) and not _NUMBER.fullmatch(value) else str(value)
