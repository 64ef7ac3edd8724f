"""Records from rows: which layout the rows of a file have, and each row in normal form or why it is of no use."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any, NamedTuple

from dpo_jax.data.columns import Columns, missing, renamed, replaced
from dpo_jax.data.gathering import GATHERERS
from dpo_jax.data.guesses import no_layout, unread_preference, unread_prompt
from dpo_jax.data.known import KnownSet, recognised
from dpo_jax.data.layouts import LAYOUTS, Record, RowLayout, detect, detected, to_record, unused_columns
from dpo_jax.data.messages import BadRow, texts_of
from dpo_jax.data.readers import Row, value_of
from dpo_jax.data.report import Report, clean
from dpo_jax.data.sources import SourceTable
from dpo_jax.errors import UserError

_CONTROL = re.compile(r"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]")
_BIDIRECTIONAL = re.compile("[\u202a-\u202e\u2066-\u2069]")


class RowRules(NamedTuple):
    """How rows are read, beside what their columns say."""

    layout: str = "auto"
    """One of LAYOUTS, or "auto"."""
    columns: Columns = {}
    """See columns.py."""
    as_chat: bool = False
    """Whether texts are made into turns."""


class Stretch(NamedTuple):
    """Successive rows of one file, and the name of their layout; None where no row so far had one."""

    layout: str | None
    rows: list[Row]
    known: KnownSet | None = None
    """The data set that the file is of, where its columns are those of one that is known."""
    gathered: bool = False
    """Whether the rows are ranked rows that were made of the file's (see gathering.py)."""


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
        detected layout does not read; or what gathering raises.
    """
    for table in sources:
        about = report.files.setdefault(table.name, {"layout": None, "rows": 0, "unused": []})
        look = _Look(rules, about)
        known, rows = look.found, []
        for row in look.gathered(islice(table.rows(), None if first is None else max(first - report.rows, 0))):
            report.rows += row.count
            report.joined += row.count - 1
            about["rows"] += row.count
            if row.count > 1:
                about["joined"] = about.get("joined", 0) + row.count - 1
            if rows and (len(rows) == size or look.found != known):
                look.check()
                yield Stretch(known[0], rows, *known[1:])
                rows = []
            known = look.found
            rows.append(row)
        look.check()
        if rows:
            yield Stretch(known[0], rows, *known[1:])
        if first is not None and report.rows >= first:
            return


class _Look:
    """What the first rows of a file say about all of them, for the report as well."""

    def __init__(self, rules: RowRules, about: dict[str, Any]):
        self.rules, self.about = rules, about
        self.layout = None if rules.layout == "auto" else rules.layout
        self.known: KnownSet | None = None
        self.strange: tuple[str, dict[str, Any]] | None = None
        """The first row without a layout, and its place."""
        self.looked = False
        about.update(layout=self.layout, detected=rules.layout == "auto")

    @property
    def found(self) -> tuple[str | None, KnownSet | None, bool]:
        """Of the rows that come next: the rest of a Stretch."""
        gathers = self.layout in GATHERERS
        return "ranked" if gathers else self.layout, self.known, gathers

    def gathered(self, rows: Iterator[Row]) -> Iterator[Row]:
        """The rows; from the first on whose layout is to be gathered, the ranked rows that are made of them."""
        for row in rows:
            self.at(row)
            gather = GATHERERS.get(self.layout or "")
            yield from [row] if gather is None else gather(chain([row], rows), self.read)

    def at(self, row: Row) -> None:
        """Look at the next row, if there is still something to learn."""
        if self.looked and self.layout is not None:
            return
        self.looked = True
        place = f"{clean(row.file, 400)}:{row.line}"
        try:
            given = _object(value_of(row))
            known = recognised(given)
            self.known = known if known and self.rules.layout in ("auto", known.layout) else None
            columns = columns_of(self.rules, self.known)
            value = renamed(given, columns)
        except (BadRow, RecursionError):
            return
        if problem := missing(given, columns):
            raise UserError(f"{place}: {problem}")
        layout = self.layout or (self.known.layout if self.known else None)
        found = LAYOUTS[layout] if layout else detected(value)
        if found is None:
            self.strange = self.strange or (place, value)
            return
        if self.layout is None:
            if problem := unread_prompt(value, found, columns) or unread_preference(value, found):
                raise UserError(f"{place}: {problem}")
        unused = [*unused_columns(value, found), *replaced(given, columns)]
        self.about.update(layout=found.name, unused=unused)
        if self.known:
            self.about["known"] = self.known.title
        self.layout = found.name

    def read(self, value: object) -> dict[str, Any]:
        """A row's value under the names of its layout, if it is one to be used."""
        return _named(value, self.rules, self.known)

    def check(self) -> None:
        """Refuse a file of which so many rows, or all, fit no layout."""
        if self.layout is None and self.strange is not None:
            place, value = self.strange
            raise UserError(f"{place}: {no_layout(value)}")


def columns_of(rules: RowRules, known: KnownSet | None) -> Columns:
    """The mapping of a file: the run's, before that of the data set that the file is of."""
    return {**known.columns, **rules.columns} if known else rules.columns


def _named(value: object, rules: RowRules, known: KnownSet | None) -> dict[str, Any]:
    given = _object(value)
    for name, values in known.without.items() if known else ():
        if name in given and given[name] in values:
            raise BadRow("no preference", f"{name} is {given[name]!r}")
    return renamed(given, columns_of(rules, known))


def read_record(row: Row, stretch: Stretch, rules: RowRules) -> Record | BadRow:
    """A row of a stretch in normal form, or why it is of no use."""
    try:
        value = _object(value_of(row)) if stretch.gathered else _named(value_of(row), rules, stretch.known)
        found = LAYOUTS[stretch.layout] if stretch.layout else detect(value)
        columns = columns_of(rules, stretch.known)
        if rules.layout == "auto" and not stretch.gathered:
            _check_prompt(value, found, columns)
        record = to_record(value, found, file=row.file, line=row.line, as_chat=rules.as_chat)
        parts = (record.prompt, record.completions, record.tools, record.chat_template_kwargs)
        notes = text_notes([text for part in parts for text in texts_of(part)])
        return replace(record, notes=record.notes + notes) if notes else record
    except BadRow as error:
        return error
    except RecursionError:
        return BadRow("nested too deep", "objects inside objects")


def _check_prompt(value: dict[str, Any], layout: RowLayout, columns: Columns) -> None:
    """Refuse a row whose prompt stands where its detected layout does not look."""
    if layout.name == "implicit" and "prompt" in value:
        raise BadRow("wrong type", "this row has a prompt, the file's first rows had none; set data.layout=pair")
    if problem := unread_prompt(value, layout, columns):
        raise BadRow("prompt not read", problem)


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
