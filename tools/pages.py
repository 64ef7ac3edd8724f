"""Writes the pages that say what the code says: `python tools/pages.py [--check]`.

configs/README.md has the recipes and every setting, configs/METRICS.md every metric, and README.md between
`<!-- NAME -->` and `<!-- /NAME -->` the tables of objectives and of commands. A test holds all three to the code.
"""

import argparse
import inspect
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pydantic.fields import FieldInfo  # noqa: E402

from dpo_jax import recipes  # noqa: E402
from dpo_jax.config import rounds  # noqa: E402
from dpo_jax.config import run as config  # noqa: E402
from dpo_jax.config.console import COMMANDS  # noqa: E402
from dpo_jax.errors import UserError  # noqa: E402
from dpo_jax.objectives.table import OBJECTIVES  # noqa: E402
from dpo_jax.objectives.table import RECIPES as MIXTURES  # noqa: E402
from dpo_jax.reporting.metrics import BETTER, METRICS  # noqa: E402
from dpo_jax.settings import allowed  # noqa: E402

SETTINGS = """\
# Recipes and settings

Written by `python tools/pages.py` from the files beside this page and from the code. [GUIDE.md](GUIDE.md) says more of
what is behind the settings, [METRICS.md](METRICS.md) what each metric is.

## Recipes

Each is a file of settings. `python -m dpo_jax.recipes` lists them, `... NAME` prints one, and `... NAME --copy` writes
it, and what it reads, into `./configs`, also where the package is installed and no checkout is at hand. The header of
each says where its settings are from and what was run of it here. Those on CPU cores were run whole. The others were
run for two steps on a small model and data of the same shape. What they take is what `plan` says
(`python tools/recipes_plan.py`): the memory is predicted for data of the named lengths, the time is that of the steps
at best, without evaluations and the one pass of the reference.

"""
HOW = """\

## Settings

A run's settings are one YAML file or several, of which later ones win, and `section.key=value`, which win over files.
A key may also be written with its section, as in `batch.pairs: 16`; null, or a list of objectives, in place of a whole
section ends what an earlier file gave of it. Relative paths are relative to the current directory. All that is wrong is
reported at once, each in a line with its place, the value and what to do; what is unknown is refused with the nearest
name, also by the names that other trainers have. `train --help` prints this list, `--print-config` the settings that a
run would have, and `--print-schema` a JSON schema for editors.
"""
MEASURES = """\
# Metrics

Written by `python tools/pages.py` from `dpo_jax/reporting/metrics.py`.

`metrics.jsonl` in the folder of a run has a record for each step, and one for each evaluation, with `eval_` before each
name, or `eval/NAME/` where it is of one of several sets of held-out data; without the set's name it is of all of them
together. Names are TRL's where TRL has the metric. Not every objective has every metric; a number that is not finite is
null, beside `"nonfinite": true`. All are exact over the whole step. A loss is in the objective's own unit: nats for
`sigmoid` and all whose formula is a logarithm.

Better is what `checkpoint.best` can choose by, and which way.

"""


def cell(text: str) -> str:
    """Text as a cell of a table, in which no character is markup."""
    return re.sub(r"([|*])", r"\\\1", " ".join(text.split())).replace("<", "&lt;")


def code(text: str) -> str:
    """Text as code in a cell of a table."""
    return f"`{text.replace('|', chr(92) + '|')}`"


def table(*rows: tuple[str, ...]) -> str:
    """A table of these rows, of which the first is the head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]]) + "\n"


def objectives() -> str:
    """A row for each objective and recipe of objectives: its name, its loss, when to choose it, and the paper."""
    found = {**OBJECTIVES, **MIXTURES}
    rows = [(code(name), code(row.equation), row.when, row.paper) for name, row in found.items()]
    return table(("`objective.name`", "loss of a pair", "choose it when", "from"), *rows)


def commands() -> str:
    """A row for each command: its arguments in short, and what it does."""
    rows = [(code(f"{name} {command.takes}".strip()), cell(command.says)) for name, command in COMMANDS.items()]
    return table(("`dpo-jax`, or `python -m dpo_jax.`", "does"), *rows)


def recipe_rows() -> list[tuple[str, ...]]:
    """A row for each recipe."""
    rows = []
    for name in recipes.names():
        about, facts, _ = recipes.recipe(name)
        takes = re.split(" at best", facts["plan"])[0] if "plan" in facts else re.split(r" \(|[:;]", facts["here"])[0]
        rows.append((f"[{name}]({name}.yaml)", cell(about), facts["hardware"], cell(takes)))
    return rows


def setting_row(key: str, field: FieldInfo) -> tuple[str, ...]:
    """A setting: what it takes, its default as YAML has it, and what it means."""
    default = "required" if field.is_required() else code(json.dumps(field.get_default(call_default_factory=True)))
    return code(key), cell(allowed(field)), default, cell(field.description or "")


def settings_page() -> str:
    """The recipes, and the settings of each section with what they take, their default and their meaning."""
    parts = [SETTINGS, table(("recipe", "what it is", "hardware", "what it takes"), *recipe_rows()), HOW]
    sections = dict.fromkeys(key.rpartition(".")[0] for key in config.FIELDS)
    for section in sorted(sections, key=bool):  # those of no section first
        kind = config.Run.model_fields[section].annotation if section else config.Run
        rows = [setting_row(key, field) for key, field in config.FIELDS.items() if key.rpartition(".")[0] == section]
        parts += [f"\n### {section or 'run'}\n\n{inspect.cleandoc(kind.__doc__ or '')}\n\n"]
        parts += [table(("setting", "takes", "default", "means"), *rows)]
    rows = [setting_row(key, field) for key, field in rounds.FIELDS.items()]
    about = inspect.cleandoc(rounds.RoundsSettings.__doc__ or "")
    parts += [f"\n### {rounds.BLOCK}, of the command `rounds` alone\n\n{about}\n\n"]
    parts += [table(("setting", "takes", "default", "means"), *rows)]
    return "".join(parts)


def metrics_page() -> str:
    """Every metric, its unit, what it is, and which way is better."""
    rows = [(code(name), found.unit, cell(found.means), BETTER.get(name, "")) for name, found in METRICS.items()]
    return MEASURES + table(("name", "unit", "what it is", "better"), *rows)


def replaced(page: str, text: str, blocks: Mapping[str, str]) -> str:
    """The text of a page with these blocks between their marks `<!-- NAME -->` and `<!-- /NAME -->`.

    Raises:
      UserError: it has no place for one.
    """
    for name, written in blocks.items():
        block = re.compile(f"(<!-- {name} -->\n).*(<!-- /{name} -->)", re.DOTALL)
        if not block.search(text):
            raise UserError(f"{page} has no lines <!-- {name} --> and <!-- /{name} -->; put them where it goes")
        text = block.sub(lambda place, written=written: place[1] + written + place[2], text)
    return text


def pages() -> dict[str, str]:
    """Every page as it should be, by its path."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return {
        "README.md": replaced("README.md", readme, {"objectives": objectives(), "commands": commands()}),
        "configs/README.md": settings_page(),
        "configs/METRICS.md": metrics_page(),
    }


def main() -> int:
    """Write, or with `--check` tell by the exit code whether there is anything to write."""
    parser = argparse.ArgumentParser(description="The pages that say what the code says.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is stale")
    check = parser.parse_args().check
    stale = [path for path, text in pages().items() if not (ROOT / path).exists() or (ROOT / path).read_text() != text]
    for path in stale:
        print(path)
        if not check:
            (ROOT / path).write_text(pages()[path], encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
