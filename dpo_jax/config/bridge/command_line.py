"""A command that starts another trainer, as a shell script has it: `accelerate launch dpo.py --beta 0.1 ...`."""

import re
import shlex
import string
from pathlib import Path
from typing import Any

from dpo_jax.config.bridge.source import Config, Given, yaml_config
from dpo_jax.errors import UserError, short
from dpo_jax.settings import GivenSettings

PROGRAMS = ("trl", "llamafactory-cli", "axolotl", "tune")
"""Programs with a word for the action behind them."""
DEVICES = ("num_processes", "nproc_per_node", "nproc-per-node", "num_gpus")
NODES = ("nnodes", "num_nodes")


def command_config(file: str, text: str) -> Config:
    """The settings of the first command of a shell script that starts a trainer, over those of a config it names.

    Raises:
      UserError: no command here starts one, or its config is not to be found.
    """
    for words in _commands(file, text):
        at = next((index for index, word in enumerate(words) if _starts(word)), None)
        if at is not None:
            return _config(file, words, at)
    raise UserError(
        f"{short(file)}: no command in it starts a script such as dpo.py, trl, llamafactory-cli, axolotl or tune"
    )


def _commands(file: str, text: str) -> list[list[str]]:
    """The commands, word by word, with the script's own variables put in."""
    found, variables = [], {}
    for line in text.replace("\\\r\n", " ").replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(string.Template(line).safe_substitute(variables), comments=True)
        except ValueError as error:
            raise UserError(
                f"{short(file)}: {short(line.strip())}: cannot be read ({error}); correct the quotes"
            ) from None
        while words and (named := re.fullmatch(r"(?:export )?(\w+)=(.*)", words[0], re.DOTALL)):
            variables[named[1]] = named[2]
            words = words[1:]
        found += [words] if words else []
    return found


def _starts(word: str) -> bool:
    return word.endswith(".py") or Path(word).name in PROGRAMS


def _config(file: str, words: list[str], at: int) -> Config:
    program = Path(words[at]).name
    launcher, rest = dict(_options(words[:at])), words[at + 1 :]
    method = re.sub(r"^(run_|train_)|\.py$|_trainer|_modeling|_script", "", program)
    if program in PROGRAMS:
        options = [word for word in rest if not word.startswith("-")]
        method = options[0] if options else ""
        rest = rest[rest.index(method) + 1 :] if method else rest
    given = [*_options(rest)]
    config = Config(file, {}, method=method)
    names = [value for key, value in given if key == "config"] + [word for word in rest[:1] if _is_config(word)]
    if names:
        config.given |= _named_config(file, str(names[0])).given
    config.given |= {key: Given(key, value) for key, value in given if key != "config"}
    launcher |= {key: value for key, value in given if key in (*DEVICES, *NODES)}
    devices = next((launcher[name] for name in DEVICES if isinstance(launcher.get(name), int)), None)
    nodes = next((launcher[name] for name in NODES if isinstance(launcher.get(name), int)), 1)
    config.devices = devices if devices is None or "num_processes" in launcher else devices * nodes
    for name in (*DEVICES, *NODES):
        config.given.pop(name, None)
    return config


def _is_config(word: str) -> bool:
    return word.endswith((".yaml", ".yml", ".json"))


def _named_config(file: str, name: str) -> Config:
    for path in (Path(name), Path(file).parent / name):
        if path.is_file():
            return yaml_config(str(path))
    raise UserError(f"{short(file)}: its command reads {short(name)}, which is not here; run this where it is")


def _options(words: list[str]) -> list[tuple[str, Any]]:
    """`--key value ...`, `--key=value`, `--flag`, `--no_flag` and `key=value` as pairs; other words are left alone."""
    found: list[tuple[str, Any]] = []
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if word.startswith("-"):
            key, equals, value = word.lstrip("-").partition("=")
            end = index
            while not equals and end < len(words) and not _is_option(words[end]):
                end += 1
            values = [value] if equals else words[index:end]
            index = end
            found.append(_pair(key, values))
        elif re.match(r"[A-Za-z_][\w.]*=", word):
            key, _, value = word.partition("=")
            found.append((key, _scalar(value)))
    return found


def _is_option(word: str) -> bool:
    return (word.startswith("-") and not re.fullmatch(r"-\.?\d.*", word)) or bool(re.match(r"[A-Za-z_][\w.]*=", word))


def _pair(key: str, values: list[str]) -> tuple[str, Any]:
    key = key.replace("-", "_")
    if not values:
        return (key.removeprefix("no_"), False) if key.startswith("no_") else (key, True)
    return key, _scalar(values[0]) if len(values) == 1 else tuple(map(_scalar, values))


def _scalar(text: str) -> Any:
    """A word as YAML has it: a list in brackets as well, and what is no YAML as it stands."""
    read = GivenSettings()
    read.override("word", text)
    return read.values.get("word", text)
