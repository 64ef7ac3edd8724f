"""What a run says beside its metrics, kept in `notes.jsonl`: alarms, what went on from where, what ended it. And what
it shows."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from dpo_jax.errors import printable, redacted
from dpo_jax.files import write_whole

NOTES_FILE = "notes.jsonl"
ALARM = "alarm: "
"""How a line begins that says that the metrics look unhealthy."""


def read_notes(path: Path) -> list[dict[str, Any]]:
    """Notes `{"step", "note"}` of a run, oldest first; a line that is none, or is torn, is left out."""
    found = []
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError:
        return []
    for line in lines:
        try:
            note = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(note, dict) and isinstance(note.get("step"), int) and isinstance(note.get("note"), str):
            found.append(note)
    return found


class Notes:
    """`notes.jsonl`, made with the first note. Losing it costs a part of the page, so nobody waits for it."""

    def __init__(self, folder: Path, resume_step: int):
        """Go on after step `resume_step`: what was said of later steps is dropped, as its metrics are."""
        self._path = path = folder / NOTES_FILE
        if path.exists():
            kept = [note for note in read_notes(path) if note["step"] <= resume_step]
            write_whole(path, "".join(_line(note["step"], note["note"]) for note in kept))

    def write(self, step: int, note: str) -> None:
        """Add a note on what was so after this step. It is on the terminal too: a full disk loses no more than this."""
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(_line(step, note))


def _line(step: int, note: str) -> str:
    return json.dumps({"step": step, "note": printable(redacted(note))}) + "\n"


@runtime_checkable
class PageWriter(Protocol):
    """What is drawn of a run for people to look at. It never raises an error; it says one, once."""

    def refresh(self, say: Callable[[str], None]) -> None:
        """Draw it again if it is old."""

    def end(self, say: Callable[[str], None]) -> None:
        """Draw it as it is to stay."""
