"""A config of another trainer as a table: every key that the file gives, with its value and its line.

Read are YAML (and JSON), Python scripts (`script.py`) and command lines (`command_line.py`). Nothing is executed.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpo_jax.errors import UserError, short
from dpo_jax.settings import SIZE_LIMIT, GivenSettings


@dataclasses.dataclass(frozen=True)
class Given:
    """One key of a config: its name there (nested ones with dots), its value, and its line, if it has one."""

    key: str
    value: Any
    line: int | None = None


@dataclasses.dataclass(frozen=True)
class Computed:
    """In place of a value: the text of an expression that only a run of the script could evaluate."""

    text: str
    question: str | None = None
    """What to ask of it, where that is not only that it is computed."""


@dataclasses.dataclass
class Config:
    """What a file says, in order, and what its form tells beside: the method of a script or command, the devices."""

    file: str
    given: dict[str, Given]
    method: str | None = None
    devices: int | None = None

    def __contains__(self, key: str) -> bool:
        """Whether the file has a key, or keys below it."""
        return key in self.given or any(name.startswith(f"{key}.") for name in self.given)

    def value(self, key: str) -> Any:
        """A key's value; None where it is not given."""
        return self.given[key].value if key in self.given else None


def flattened(key: str, value: object, line: int | None) -> Iterator[Given]:
    """The leaves of a value: those of mappings and of lists of mappings have names with dots, `datasets.0.path`."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from flattened(f"{key}.{name}", inner, line)
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value):
            yield from flattened(f"{key}.{number}", item, line)
    else:
        yield Given(key, tuple(value) if isinstance(value, list) else value, line)


def text_of(file: str) -> str:
    """A file's text.

    Raises:
      UserError: it cannot be read, or is no text of at most 1 MiB.
    """
    try:
        with open(file, "rb") as handle:
            content = handle.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise UserError(
            f"{short(file)}: {error.strerror or error}; give the config, script or command to read"
        ) from None
    if len(content) > SIZE_LIMIT:
        raise UserError(f"{short(file)}: is larger than 1 MiB; no config of a trainer is")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{short(file)}: is not UTF-8 text (byte {error.start})") from None


def yaml_config(file: str) -> Config:
    """The keys of a YAML or JSON file.

    Raises:
      UserError: it is no such file, or gives a key twice.
    """
    read = GivenSettings()
    read.read(file)
    if faults := read.unreadable + read.problems:
        raise UserError("\n".join(faults))
    found: dict[str, Given] = {}
    for key, value in read.values.items():
        line = read.where[key].rpartition(":")[2]
        found |= {one.key: one for one in flattened(key, value, int(line) if line.isdecimal() else None)}
    return Config(file, found)


def config_of(file: str) -> Config:
    """What a file says, whatever its form.

    Raises:
      UserError: it cannot be read, or says nothing of a training run.
    """
    from dpo_jax.config.bridge.command_line import command_config
    from dpo_jax.config.bridge.script import notebook_text, script_config

    suffix = Path(file).suffix.lower()
    if suffix == ".py":
        return script_config(file, text_of(file))
    if suffix == ".ipynb":
        return script_config(file, notebook_text(file, text_of(file)))
    if suffix in (".sh", ".bash", ".txt", ".slurm", ".sbatch"):
        return command_config(file, text_of(file))
    return yaml_config(file)
