"""Columns of files under other names: the mapping of a run (`data.columns`), applied to a row.

A mapping goes from a layout's column to the file's; to several, whose texts are joined by a line break, or whose values
are the items of a list where the layout wants one; or to a field inside a column, of each object where that is a list:

    {prompt: question, chosen: good, rejected: bad}      {prompt: [instruction, input]}
    {completions: [response_1, response_2]}              {completions: answers.text, ranks: answers.rank}
"""

from collections.abc import Mapping
from typing import Any

from dpo_jax.data.layouts import LAYOUTS, RANKS, SCORES
from dpo_jax.data.messages import BadRow, type_name
from dpo_jax.data.report import clean
from dpo_jax.errors import nearest

Columns = Mapping[str, str | tuple[str, ...]]

KNOWN = sorted(
    {name for layout in LAYOUTS.values() for name in (*layout.takes, *(one for many in layout.columns for one in many))}
)
"""Every column that some layout reads."""
GATHERED = ("completions", "responses", *RANKS, *SCORES)
"""Columns that hold a list, which several columns may be the items of."""
_ABSENT = object()


def problems_of(columns: Columns) -> list[str]:
    """What is wrong with a mapping, whatever the files."""
    found, seen = [], {}
    for name, given in columns.items():
        if name not in KNOWN:
            near = nearest(name, KNOWN)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(KNOWN)}"
            found.append(f"{clean(name, 80)!r} is no column of a layout; {hint}")
        for column in sources_of(given):
            if not column.strip():
                found.append(f"{name} has no name of a column; write one, or leave it out")
            if column in seen:
                found.append(f"{clean(column, 80)!r} is given for {seen[column]} and for {name}; keep one")
            seen[column] = name
    return found


def sources_of(given: str | tuple[str, ...]) -> tuple[str, ...]:
    """The file's columns of one entry of a mapping."""
    return (given,) if isinstance(given, str) else tuple(given)


def value_at(row: Mapping[str, Any], path: str) -> Any:
    """A column, or a field inside one: `info.post`; of a list of objects, that of each: `answers.rank`.

    What is not there is None inside a list, and `_ABSENT` otherwise.
    """
    if path in row:
        return row[path]
    column, _, field = path.partition(".")
    return _inside(row[column], field) if field and column in row else _ABSENT


def _inside(value: object, path: str) -> Any:
    if isinstance(value, list):
        found = [_inside(item, path) for item in value]
        nowhere = bool(found) and all(item is _ABSENT for item in found)
        return _ABSENT if nowhere else [None if item is _ABSENT else item for item in found]
    return value_at(value, path) if isinstance(value, Mapping) else _ABSENT


def _taken(row: Mapping[str, Any], columns: Columns) -> set[str]:
    """Columns of the row that the mapping reads something of."""
    paths = (path for given in columns.values() for path in sources_of(given))
    return {path if path in row else path.partition(".")[0] for path in paths}


def renamed(row: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """The row under the names that layouts read. Columns that the row lacks stay away.

    Raises:
      BadRow: columns that are to be joined hold something else than texts.
    """
    if not columns:
        return row
    taken = _taken(row, columns)
    kept = {name: value for name, value in row.items() if name not in taken and name not in columns}
    for name, given in columns.items():
        found = {path: value for path in sources_of(given) if (value := value_at(row, path)) is not _ABSENT}
        if isinstance(given, str):
            kept |= dict.fromkeys([name] if found else [], found.get(given))
        elif name in GATHERED:
            kept[name] = [found.get(path) for path in given]
        elif texts := [_text(value, path) for path, value in found.items() if value is not None]:
            kept[name] = "\n".join(text for text in texts if text.strip())
    return kept


def _text(value: object, column: str) -> str:
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{column} is {type_name(value)}; only texts can be joined")
    return value


def missing(row: Mapping[str, Any], columns: Columns) -> str | None:
    """What to say of columns of the mapping that a row lacks."""
    paths = (path for given in columns.values() for path in sources_of(given))
    gone = next((path for path in paths if value_at(row, path) is _ABSENT), None)
    if gone is None:
        return None
    near = nearest(gone, map(str, row))
    everywhere = "the mapping is for every file of data.train and data.eval: give all of them the same columns"
    hint = f"did you mean {clean(near, 80)}?" if near else everywhere if columns.keys() & row else "correct the mapping"
    return f"data.columns: no column {clean(gone, 80)!r} here; the columns are {listed(row)}; {hint}"


def replaced(row: Mapping[str, Any], columns: Columns) -> list[str]:
    """Columns of the file that are not read because another one takes their name."""
    taken = _taken(row, columns)
    return [name for name in columns if name in row and name not in taken]


def listed(row: Mapping[str, Any]) -> str:
    """The names of a row's columns, for a message."""
    names = sorted(clean(str(name), 40) for name in row)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") or "none"
