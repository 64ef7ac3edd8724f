"""What a shell offers where TAB is pressed: commands, their options, settings by name and their values.

argcomplete speaks with the shells. It runs `dpo-jax` itself, with the line so far in the environment, and the parser
that would have read the line answers.
"""

import argparse
import importlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from dpo_jax.config.console import COMMANDS
from dpo_jax.errors import UserError

ASKED = "_ARGCOMPLETE"
"""Variable in the environment where a shell asks; the number of words that come before the arguments."""
SHELLS = ("bash", "zsh", "fish", "tcsh", "powershell")


def script(shell: str) -> str:
    """What a shell must evaluate, so that it completes `dpo-jax`.

    Raises:
      UserError: argcomplete is not installed.
    """
    try:
        argcomplete = importlib.import_module("argcomplete")
    except ModuleNotFoundError:
        raise UserError("--completion: argcomplete is not installed; pip install argcomplete") from None
    return argcomplete.shellcode(["dpo-jax"], shell=shell)


def dispatch(top: argparse.ArgumentParser) -> None:
    """Have the command on the line answer, or `top` while its name is being typed; does not return."""
    words = _typed()
    if len(words) < 2 or words[1] not in COMMANDS:
        answer(top)
    module, depth = importlib.import_module(f"dpo_jax.{words[1]}"), 2
    main, actions = module.main, vars(module).get("ACTIONS", {})
    if len(words) > 2 and words[2] in actions:
        main, depth = actions[words[2]], 3
    os.environ[ASKED] = str(depth)
    main([])
    sys.exit(0)


def answer(parser: argparse.ArgumentParser, *, settings: bool = False) -> None:
    """Write down what may come next, and exit."""
    argcomplete = importlib.import_module("argcomplete")
    if settings:
        known = [action for action in parser._actions if action.dest == "settings"]
        takes: Any = known[0] if known else parser.add_argument("settings", nargs="*")
        takes.completer = _words
    argcomplete.autocomplete(parser, always_complete_options=False)
    sys.exit(0)


def of_settings(options: Sequence[str]) -> None:
    """Answer for a command that reads files of settings, `key=value`, and the flags that lines of its help begin with;
    does not return."""
    parser = argparse.ArgumentParser(add_help=False)
    flags = [word for line in options for word in re.findall(r"^\s+(--[\w-]+)", line)]
    for flag in (*flags, "--help", "--print-config", "--print-schema"):
        parser.add_argument(flag, action="store_true")
    answer(parser, settings=True)


def _typed() -> list[str]:
    """Whole words of the line before the cursor."""
    line = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
    return line.split()[: None if line.endswith(" ") else -1]


def _words(prefix: str, **_: Any) -> Iterator[str]:
    """Settings `key=`, or the values of the one that is being given, or files of settings."""
    from dpo_jax.config.run import FIELDS
    from dpo_jax.objectives.terms import names

    key, given, value = prefix.partition("=")
    if not given:
        yield from (f"{name}=" for name in FIELDS)
        yield from _files(prefix, ".yaml")
        return
    if key in FIELDS:
        values = names() if key == "objective.name" else list(_values(FIELDS[key].annotation))
        yield from (f"{key}={found}" for found in values or _files(value))


def _values(annotation: object) -> Iterator[str]:
    """Values by name that a setting of this type takes; none where it takes others."""
    if get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    elif annotation is bool:
        yield from ("true", "false")
    else:
        for inner in get_args(annotation):
            yield from _values(inner)


def _files(prefix: str, ending: str = "") -> Iterator[str]:
    """Folders, and files with this ending, that begin so."""
    folder, slash, head = prefix.rpartition("/")
    place = Path(folder + slash)
    for path in sorted(place.iterdir()) if place.is_dir() else []:
        if path.name.startswith(head) and (path.is_dir() or path.name.endswith(ending)):
            yield f"{folder}{slash}{path.name}{'/' if path.is_dir() else ''}"
