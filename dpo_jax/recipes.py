"""`python -m dpo_jax.recipes [NAME] [--copy]`: the runs that come with the package, by name.

A recipe is a file of settings in `configs/`, which an installed package has too. Its first comment is a line about the
run; then, each behind its name, where the settings are from, the data, the hardware, what `plan` says of it, and what
was run of it here:

    # DPO of somebody's model on somebody's pairs.
    #
    # from: REPOSITORY, FILE; PAPER, arXiv:NUMBER
    # hardware: 8 x H100 SXM
    # here: what was run; a longer text goes on
    #   in lines that are indented
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dpo_jax.config import command as commands
from dpo_jax.errors import UserError, nearest, short
from dpo_jax.files import configs_folder, write_whole

FACTS = ("from", "data", "hardware", "plan", "here")
"""What a header may say of a run, in this order; `from`, `hardware` and `here` are in every one."""
NAMED = re.compile(r"(?<![\w/.])configs/[\w./-]*\w")
"""A file or folder of `configs/`, as the settings of a recipe name it."""


class Recipe(NamedTuple):
    """A file of settings: the line about it, the facts of its header by name, and all of its text."""

    about: str
    facts: dict[str, str]
    text: str


def names() -> list[str]:
    """Names of all recipes."""
    return sorted(path.stem for path in configs_folder().glob("*.yaml"))


def parsed(text: str) -> Recipe:
    """A recipe of its text.

    >>> parsed("# A run.\\n#\\n# from: a paper,\\n#   arXiv:1\\n# here: nothing\\n#\\n# More.\\n\\nsteps: 1\\n").facts
    {'from': 'a paper, arXiv:1', 'here': 'nothing'}
    """
    about, facts, last = "", dict[str, str](), ""
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        said = line.removeprefix("#").rstrip()
        name, colon, value = said.strip().partition(":")
        if not about:
            about = said.strip()
        elif colon and name in FACTS:
            last = name
            facts[name] = value.strip()
        elif last and said.startswith("   "):
            facts[last] += f" {said.strip()}"
        else:
            last = ""
    return Recipe(about, facts, text)


def recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
      UserError: there is none.
    """
    return parsed((configs_folder() / f"{_known(name)}.yaml").read_text(encoding="utf-8"))


def _known(name: str) -> str:
    known, given = names(), name.removeprefix("configs/").removesuffix(".yaml")
    if given in known:
        return given
    near = nearest(given[:80], known, 0.5)
    hint = f"did you mean {near}?" if near else "`python -m dpo_jax.recipes` lists them"
    raise UserError(f"{short(name)}: no recipe of this name; {hint}")


def files(name: str) -> dict[str, bytes]:
    """A recipe, and what its run reads from `configs/`: contents by path.

    Raises:
      UserError: there is no such recipe.
    """
    settings = "\n".join(line.partition("#")[0] for line in recipe(name).text.splitlines())
    found = {}
    for path in dict.fromkeys([f"configs/{_known(name)}.yaml", *NAMED.findall(settings)]):
        source = configs_folder() / path.removeprefix("configs/")
        parts = [source] if source.is_file() else sorted(part for part in source.rglob("*") if part.is_file())
        found |= {f"{path}{str(part)[len(str(source)) :]}": part.read_bytes() for part in parts}
    return found


def copy(name: str, target: Path) -> list[str]:
    """Write a recipe and what it reads below a folder, at the paths that it names.

    Raises:
      UserError: a file is there already and is another one. Then nothing is written.
    """
    found = files(name)
    for path, content in found.items():
        there = target / path
        if there.exists() and (not there.is_file() or there.read_bytes() != content):
            raise UserError(f"{path}: is there already, and is not the recipe's; move it away, or run this elsewhere")
    for path, content in found.items():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(target / path, content)
    return list(found)


def listed() -> list[str]:
    """A line for each recipe: its name, the hardware it is meant for, and what it is."""
    rows = [(name, found.facts["hardware"], found.about) for name in names() for found in [recipe(name)]]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return [f"{name:<{widths[0]}}  {hardware:<{widths[1]}}  {about}" for name, hardware, about in rows]


@commands.command
def main(argv: Sequence[str]) -> int:
    """List the recipes, print one, or copy one with what it reads."""
    parser = commands.Parser("recipes")
    parser.add_argument("name", nargs="?", help="print this recipe, for a file of your own (default: list them all)")
    parser.add_argument(
        "--copy", action="store_true", help="write it, and what it reads, into ./configs in place of printing it"
    )
    options = parser.parse_args(list(argv))
    if options.name is None:
        if options.copy:
            parser.error("--copy: which recipe? write recipes NAME --copy")
        print("\n".join(listed()))
    elif options.copy:
        print("\n".join(copy(options.name, Path())))
    else:
        print(recipe(options.name).text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
