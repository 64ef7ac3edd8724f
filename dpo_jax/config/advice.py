"""What to do about keys that are no settings: the nearest one, ours for another trainer's, or another command."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic.fields import FieldInfo

from dpo_jax.config.console import program
from dpo_jax.config.elsewhere import answer_to
from dpo_jax.errors import nearest, short
from dpo_jax.settings import allowed


def advice(key: str, fields: Mapping[str, FieldInfo]) -> str:
    """What to do about a key that is none of the settings `fields`."""
    parent, _, name = key.rpartition(".")
    if parent in fields:
        return f"{parent} takes {allowed(fields[parent])}, not a block"
    of_section = [known for known in fields if parent and known.startswith(f"{parent}.") and known.endswith(f"_{name}")]
    of_name = [known for known in fields if known.rpartition(".")[2] == name]
    if likely := of_section or of_name:
        return f"no such setting; did you mean {' or '.join(likely)}?"
    if answer := answer_to(name):
        return f"no such setting; here it is {answer}" if answer in fields else f"no such setting; {answer}"
    by_name = {known.rpartition(".")[2]: known for known in fields}
    near = nearest(key[:80], fields, 0.7) or by_name.get(nearest(name[:80], by_name, 0.7) or "")
    return f"no such setting; did you mean {near}?" if near else "no such setting; --help lists them all"


def another_kind(where: Mapping[str, str], unknown: Sequence[str], given: Mapping[str, Any]) -> str | None:
    """What to do with settings that are not of a run at all: of rounds, or of another trainer; None if they may be.

    `where` has the place of each key, `unknown` those that are no settings, and `given` the others, by section.
    """
    if rounds := next((key for key in unknown if key == "rounds" or key.startswith("rounds.")), None):
        return f"{where[rounds]}: {short(rounds)}: is of the command rounds; run it with {program('rounds')}"
    theirs = [key for key in unknown if "." not in key and answer_to(key)]
    if len(theirs) < 3 or any(given[section] for section in ("model", "data")):
        return None
    file = where[theirs[0]].partition(":")[0]
    return (
        f"{file}: has settings of another trainer ({', '.join(theirs[:3])}, ...), and no model or data as they are "
        f"given here; {program('convert')} config {file} writes the file that is wanted"
    )
