"""Writes the README's tables of objectives and commands from those in the code: `tools/readme_tables.py [--check]`."""

import argparse
import re
import sys
from pathlib import Path

from dpo_jax.config.console import COMMANDS
from dpo_jax.objectives.table import OBJECTIVES, RECIPES

README = Path(__file__).resolve().parents[1] / "README.md"


def objectives() -> list[str]:
    """A row for each objective and recipe: its name, its loss, when to choose it, and the paper."""
    lines = ["| `objective.name` | loss of a pair | choose it when | from |", "| --- | --- | --- | --- |"]
    for name, row in {**OBJECTIVES, **RECIPES}.items():
        equation = row.equation.replace("|", "\\|")
        lines.append(f"| `{name}` | `{equation}` | {row.when} | {row.paper} |")
    return lines


def commands() -> list[str]:
    """A row for each command: its arguments in short, and what it does."""
    rows = [f"| `{name} {command.takes}` | {command.says} |" for name, command in COMMANDS.items()]
    return ["| `dpo-jax ...` | |", "| --- | --- |", *rows]


TABLES = {"objectives": objectives, "commands": commands}


def updated(readme: str) -> str:
    """The README with the tables as they are now, each between `<!-- NAME -->` and `<!-- /NAME -->`."""
    for name, made in TABLES.items():
        block, table = re.compile(rf"(<!-- {name} -->\n).*(<!-- /{name} -->)", re.DOTALL), "\n".join(made()) + "\n"
        readme = block.sub(lambda found, table=table: found[1] + table + found[2], readme)
    return readme


def main() -> int:
    """Write, or with `--check` tell by the exit code whether there is anything to write."""
    parser = argparse.ArgumentParser(description="The README's tables of objectives and commands.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the README is stale")
    options = parser.parse_args()
    old = README.read_text()
    if options.check:
        return int(updated(old) != old)
    README.write_text(updated(old))
    return 0


if __name__ == "__main__":
    sys.exit(main())
