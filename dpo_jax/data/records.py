"""Records from rows: which layout the rows of a file have, and each row in normal form or why it is of no use."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from dpo_jax.data.columns import Columns, missing, no_layout, renamed, replaced, unread_prompt
from dpo_jax.data.layouts import LAYOUTS, Record, detect, detected, to_record, unused_columns
from dpo_jax.data.messages import BadRow, texts_of
from dpo_jax.data.readers import Row, value_of
from dpo_jax.data.report import Report, clean
from dpo_jax.data.sources import SourceTable
from dpo_jax.errors import UserError

_CONTROL = re.compile(r"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]")
_BIDIRECTIONAL = re.compile("[\u202a-\u202e\u2066-\u2069]")


class Stretch(NamedTuple):
    """Successive rows of one file, and the name of their layout; None where no row so far had one."""

    layout: str | None
    rows: list[Row]


class RowRules(NamedTuple):
    """How rows are read, beside what their columns say."""

    layout: str = "auto"
    """One of LAYOUTS, or "auto"."""
    columns: Columns = {}
    """See columns.py."""
    as_chat: bool = False
    """Whether texts are made into turns."""


def stretches(
    sources: Iterable[SourceTable], *, rules: RowRules, first: int | None, report: Report, size: int
) -> Iterator[Stretch]:
    """All rows, up to `size` of a file at a time; each is counted in the report when it is read.

    With layout "auto", the first row of a file whose columns fit a layout decides for the whole file.

    Args:
      sources: files and data sets, in order.
      rules: how rows are read.
      first: read no more rows than this.
      report: where rows and files are counted.
      size: rows of a stretch.

    Raises:
      UserError: the rows of a file fit no layout, lack a column of the mapping, or seem to have a prompt that the
        detected layout does not read.
    """
    for table in sources:
        look = _Look(rules, report.files.setdefault(table.name, {"layout": None, "rows": 0, "unused": []}))
        rows = []
        for row in table.rows():
            if first is not None and report.rows >= first:
                break
            report.rows += 1
            known = look.layout
            look.at(row)
            if rows and (len(rows) == size or look.layout != known):
                look.check()
                yield Stretch(known, rows)
                rows = []
            rows.append(row)
        look.check()
        if rows:
            yield Stretch(look.layout, rows)
        if first is not None and report.rows >= first:
            return


class _Look:
    """What the first rows of a file say about all of them, for the report as well."""

    def __init__(self, rules: RowRules, about: dict[str, Any]):
        self.rules, self.about = rules, about
        self.layout = None if rules.layout == "auto" else rules.layout
        self.strange: tuple[str, dict[str, Any]] | None = None
        """The first row without a layout, and its place."""
        about.update(layout=self.layout, detected=rules.layout == "auto")

    def at(self, row: Row) -> None:
        """Look at the next row, if there is still something to learn."""
        self.about["rows"] += 1
        if self.about["rows"] > 1 and self.layout is not None:
            return
        place = f"{clean(row.file, 400)}:{row.line}"
        try:
            given = _object(value_of(row))
            value = renamed(given, self.rules.columns)
        except (BadRow, RecursionError):
            return
        if problem := missing(given, self.rules.columns):
            raise UserError(f"{place}: {problem}")
        found = LAYOUTS[self.layout] if self.layout else detected(value)
        if found is None:
            self.strange = self.strange or (place, value)
            return
        if self.layout is None and (problem := unread_prompt(value, found, self.rules.columns)):
            raise UserError(f"{place}: {problem}")
        unused = [*unused_columns(value, found), *replaced(given, self.rules.columns)]
        self.about.update(layout=found.name, unused=unused)
        self.layout = found.name

    def check(self) -> None:
        """Refuse a file of which so many rows, or all, fit no layout."""
        if self.layout is None and self.strange is not None:
            place, value = self.strange
            raise UserError(f"{place}: {no_layout(value)}")


def read_record(row: Row, layout: str | None, rules: RowRules) -> Record | BadRow:
    """A row in normal form, or why it is of no use; `layout` is that of its stretch."""
    try:
        value = renamed(_object(value_of(row)), rules.columns)
        found = LAYOUTS[layout] if layout else detect(value)
        if rules.layout == "auto" and (problem := unread_prompt(value, found, rules.columns)):
            raise BadRow("prompt not read", problem)
        record = to_record(value, found, file=row.file, line=row.line, as_chat=rules.as_chat)
        parts = (record.prompt, record.completions, record.tools, record.chat_template_kwargs)
        notes = text_notes([text for part in parts for text in texts_of(part)])
        return replace(record, notes=record.notes + notes) if notes else record
    except BadRow as error:
        return error
    except RecursionError:
        return BadRow("nested too deep", "objects inside objects")


def _object(value: object) -> dict[str, Any]:
    if isinstance(value, BadRow):
        raise value
    if not isinstance(value, dict):
        raise BadRow("not an object", f"a row is {clean(json.dumps(value), 40)}, not an object with columns")
    return value


def text_notes(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """What is unusual about texts that can be used.

    Raises:
      BadRow: a text holds what no tokenizer takes: a lone surrogate, or a NUL.
    """
    found: dict[str, str] = {}
    for text in texts:
        if "\0" in text:
            raise BadRow("NUL character", f"at character {text.index(chr(0)) + 1} of a text")
        if not text.isascii():
            _encodable(text)
            if match := _BIDIRECTIONAL.search(text):
                found["bidirectional controls"] = f"U+{ord(match[0]):04X} changes the order of what is shown"
        if match := _CONTROL.search(text):
            found["control characters"] = f"U+{ord(match[0]):04X} in a text"
    return tuple(found.items())


def _encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("lone surrogate", f"\\u{ord(text[error.start]):04x} at character {error.start + 1}") from None
