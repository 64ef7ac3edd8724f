"""The table of commands: what `dpo-jax` lists, starts and completes, and what the README says of them.

A command is a module `dpo_jax/NAME.py` with a function `main(argv)`, which is also `python -m dpo_jax.NAME`.
"""

import sys
from pathlib import Path
from typing import NamedTuple


class Command(NamedTuple):
    """A row of the table.

    Attributes:
      takes: its arguments, in short.
      says: what it does, in a line: its help begins with it.
    """

    takes: str
    says: str


COMMANDS: dict[str, Command] = {
    "train": Command("CONFIG.yaml [key=value]", "Train a model on preferences, and leave a Hugging Face folder."),
    "recipes": Command("[NAME]", "The runs that come with the package: a list, or the settings of one."),
    "preview": Command("CONFIG.yaml [key=value]", "Show what a run would train on: rows, lengths, what was cut."),
    "plan": Command(
        "CONFIG.yaml --devices N",
        "What a run will take on given devices: memory, operations, traffic, and time at best.",
    ),
    "doctor": Command(
        "[FOLDER or CONFIG.yaml]", "What this machine has, what it can do, and what stands in the way of a run."
    ),
    "sample": Command("MODEL", "Ask a model, or a model and its reference side by side."),
    "evaluate": Command(
        "MODEL PAIRS [data.key=value]",
        "Preference accuracy and reward margin of a model against a reference, or of a reward model.",
    ),
    "winrate": Command(
        "MODEL BASE --prompts FILE", "How often a model's answers are better than another's, by one judge or several."
    ),
    "collect": Command("MODEL --prompts FILE", "Preferences out of a model's own answers, told apart by a judge."),
    "rounds": Command("CONFIG.yaml [key=value]", "Collect and train, again and again, each round from the last model."),
    "sweep": Command("CONFIG.yaml key=a,b,...", "A run for each combination of values, and a table of them."),
    "convert": Command("ACTION", "Read, write, compare and upload Hugging Face model folders."),
    "report": Command(
        "RUN [RUN ...]",
        "Draw the page of a run again, as report.html in its folder; of several runs one that compares them.",
    ),
}


def program(command: str) -> str:
    """How this process was told to be that command: `dpo-jax train`, or `python -m dpo_jax.train`."""
    started = Path(sys.argv[0])
    if started.stem == "dpo-jax":
        return f"dpo-jax {command}".rstrip()
    whole = not command or (started.parent.name, started.name) == ("dpo_jax", "__main__.py")
    return f"python -m dpo_jax {command}".rstrip() if whole else f"python -m dpo_jax.{command}"


def listed() -> list[str]:
    """A line for each command."""
    width = max(map(len, COMMANDS))
    return [f"  {name:<{width}}  {command.says}" for name, command in COMMANDS.items()]
