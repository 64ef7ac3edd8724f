"""How large the numbers of a `config.json` may be, looked at before transformers or anyone here counts up to them.

A count of layers or labels is a loop in transformers' own reading of a config, and a billion of them takes all memory.
What passes here is held against the tensors themselves by `mapping.claim`, which counts no further than they do.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_jax.errors import UserError, short
from dpo_jax.hf.keys import HARMLESS

MOST_LAYERS = 512
"""The deepest public decoder has 126."""
MOST_LABELS = 100_000
MOST = 2**31 - 1
"""Of any other number that says how something is built: sizes of arrays and positions are 32-bit integers."""
LAYERS = re.compile(r"(.*_)?(n_layer|layers|depth)")
LABELS = re.compile(r"_?num_labels")


def check(table: object, file: Path) -> None:
    """Refuses a config with a number that nothing could be built by.

    Raises:
      UserError: names the key, the number, and the most that it may be.
    """
    for name, value in _numbers(table, ""):
        key = name.rsplit(".", 1)[-1]
        most = MOST_LAYERS if LAYERS.fullmatch(key) else MOST_LABELS if LABELS.fullmatch(key) else MOST
        if value > most and (most != MOST or key not in HARMLESS):
            shown = str(value) if value < 10**30 else f"{float(min(value, 10**300)):.0e}"
            raise UserError(
                f"{file}: {short(name)} = {shown}: a model has at most {most}; the file is damaged or no model's, "
                "so fetch it again"
            )


def _numbers(value: object, name: str) -> Iterator[tuple[str, int | float]]:
    """Every number of a tree of tables and lists, with the names on the way to it."""
    waiting: list[tuple[str, Any]] = [(name, value)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{name}.{key}" if name else str(key), one) for key, one in value.items()]
        elif isinstance(value, list):
            waiting += [(name, one) for one in value if isinstance(one, dict | list | int | float)]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value
