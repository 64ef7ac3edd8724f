"""Writes the README's table of objectives from the table in the code: `python tools/objectives_table.py [--check]`."""

import argparse
import re
import sys
from pathlib import Path

from dpo_jax.objectives.table import OBJECTIVES, RECIPES

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCK = re.compile(r"(<!-- objectives -->\n).*(<!-- /objectives -->)", re.DOTALL)


def table() -> str:
    """A row for each objective and recipe: its name, its loss, when to choose it, and the paper."""
    lines = ["| `objective.name` | loss of a pair | choose it when | from |", "| --- | --- | --- | --- |"]
    for name, row in {**OBJECTIVES, **RECIPES}.items():
        equation = row.equation.replace("|", "\\|")
        lines.append(f"| `{name}` | `{equation}` | {row.when} | {row.paper} |")
    return "\n".join(lines) + "\n"


def updated(readme: str) -> str:
    """The README with the table as it is now."""
    return BLOCK.sub(lambda found: found[1] + table() + found[2], readme)


def main() -> int:
    """Write, or with `--check` tell by the exit code whether there is anything to write."""
    parser = argparse.ArgumentParser(description="The README's table of objectives.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the README is stale")
    options = parser.parse_args()
    old = README.read_text()
    if options.check:
        return int(updated(old) != old)
    README.write_text(updated(old))
    return 0


if __name__ == "__main__":
    sys.exit(main())
