"""Records from rows: which layout the rows of a file have, and each row in normal form or why it is of no use."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from dpo_jax.data.layouts import LAYOUTS, Record, RowLayout, detect, to_record, unused_columns
from dpo_jax.data.messages import BadRow, texts_of
from dpo_jax.data.readers import Row, value_of
from dpo_jax.data.report import Report, clean
from dpo_jax.data.sources import SourceTable

_CONTROL = re.compile(r"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]")
_BIDIRECTIONAL = re.compile("[\u202a-\u202e\u2066-\u2069]")


class Stretch(NamedTuple):
    """Successive rows of one file, and the name of their layout; None where no row so far had one."""

    layout: str | None
    rows: list[Row]


def stretches(
    sources: Iterable[SourceTable], *, layout: str, first: int | None, report: Report, size: int
) -> Iterator[Stretch]:
    """All rows, up to `size` of a file at a time; each is counted in the report when it is read.

    With layout "auto", the first row of a file whose columns fit a layout decides for the whole file.

    Args:
      sources: files and data sets, in order.
      layout: one of LAYOUTS, or "auto".
      first: read no more rows than this.
      report: where rows and files are counted.
      size: rows of a stretch.
    """
    for table in sources:
        about = report.files.setdefault(table.name, {"layout": None, "rows": 0, "unused": []})
        found = None if layout == "auto" else layout
        about["layout"], rows = found, []
        for row in table.rows():
            if first is not None and report.rows >= first:
                break
            report.rows += 1
            about["rows"] += 1
            known = found
            if about["rows"] == 1 or found is None:
                found = _look(row, found, about)
            if rows and (len(rows) == size or found != known):
                yield Stretch(known, rows)
                rows = []
            rows.append(row)
        if rows:
            yield Stretch(found, rows)
        if first is not None and report.rows >= first:
            return


def _look(row: Row, found: str | None, about: dict[str, Any]) -> str | None:
    """The layout of a row, with what is to be said about its file; `found` where the row tells nothing."""
    try:
        value = _object(value_of(row))
        layout = LAYOUTS[found] if found else detect(value)
        about.update(layout=layout.name, unused=unused_columns(value, layout))
        return layout.name
    except (BadRow, RecursionError):
        return found


def read_record(row: Row, layout: str | None, max_characters: int) -> Record | BadRow:
    """A row in normal form, or why it is of no use.

    Args:
      row: one of a stretch.
      layout: of the stretch.
      max_characters: longest text of a prompt with one completion; a longer row is bad, before it costs any work.
    """
    try:
        value = _object(value_of(row))
        return _checked(row, value, LAYOUTS[layout] if layout else detect(value), max_characters)
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


def _checked(row: Row, value: dict[str, Any], layout: RowLayout, max_characters: int) -> Record:
    """The row in normal form, when its texts are such that a tokenizer can take them."""
    record = to_record(value, layout, file=row.file, line=row.line)
    sizes = [sum(map(len, texts_of(part))) for part in (record.prompt, *record.completions)]
    if (most := sizes[0] + max(sizes[1:])) > max_characters:
        raise BadRow("too many characters", f"{most:,} characters, at most {max_characters:,} (data.max_characters)")
    parts = (record.prompt, record.completions, record.tools, record.chat_template_kwargs)
    notes = text_notes([text for part in parts for text in texts_of(part)])
    return record if not notes else _with_notes(record, notes)


def _with_notes(record: Record, notes: tuple[tuple[str, str], ...]) -> Record:
    return Record(**{**record.__dict__, "notes": record.notes + notes})


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
