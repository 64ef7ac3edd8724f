"""Files by ranges of bytes: what all processes of a run have to know of a file, each finds out of its share of it.

Of any file that is its digest. Of JSON Lines it is where the lines are too, so that a process can go past the rows of
the others without reading them.
"""

import functools
import hashlib
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.data.arrow import Part, Undecoded, check_unchanged
from dpo_jax.data.readers import Row
from dpo_jax.data.report import clean
from dpo_jax.files import state_of
from dpo_jax.processes.here import DIFFER, Here

PIECE = 1 << 24
"""Bytes that a process looks at, at a time."""
SIGNED = 4096
"""Bytes at the start of each piece by which processes tell that they have the same file."""
GROUP = 256
"""Rows that are read together."""


class Group(NamedTuple):
    """Lines that follow each other: bytes of the file, how many lines these are, and how many of them hold a row."""

    size: int
    lines: int
    rows: int


class Look(NamedTuple):
    """What a process found in a piece: its digest, where the first line begins in it, and the lines that begin there.

    The last of them may end in another piece.
    """

    digest: str
    first: int
    groups: list[Group]


@dataclass(eq=False)
class RangedFile:
    """A file of this machine, at which several processes look together. The file is to stay as it is meanwhile."""

    path: Path
    name: str
    """In messages."""
    has_lines: bool
    """Whether it is of JSON Lines, and not packed."""

    def __post_init__(self) -> None:
        """Nobody has looked at it yet."""
        self._state, self._looks = state_of(self.path), list[Look]()

    def digest(self, place: Here) -> str:
        """SHA-256 of what all pieces are; the same for any number of processes.

        Raises:
          UserError: another process has another file of this name.
        """
        if place.count > 1:
            place.same(DIFFER, {clean(self.name, 400): f"{self._state[0]} bytes of digest {self._sign()}"})
        pieces = range(-(-self._state[0] // PIECE))
        looks = place.by_turns("files", pieces, lambda share: [self._look(number, place) for number in share])
        found = [Look(digest, first, [Group(*some) for some in groups]) for digest, first, groups in looks]
        self._looks = found if place.count > 1 and self.has_lines else []
        return hashlib.sha256("\n".join(look.digest for look in found).encode()).hexdigest()

    def rows(self) -> Iterator[Row] | None:
        """Rows of JSON Lines, which are read where they are wanted; None where processes have not looked at the file
        together."""
        return self._rows() if self._looks else None

    def _rows(self) -> Iterator[Row]:
        line = 1
        for number, look in enumerate(self._looks):
            start = number * PIECE + look.first
            for group in look.groups:
                read = _Range(str(self.path), self.name, self._state, start, group.size)
                if group.lines == group.rows:
                    part = Rows(read, group.rows)
                    yield from (Row(self.name, line + index, Undecoded(part, index)) for index in range(group.rows))
                else:
                    lines = enumerate(read(), line)
                    yield from (Row(self.name, at, value) for at, value in lines if value.strip())
                start, line = start + group.size, line + group.lines

    def _look(self, number: int, place: Here) -> Look:
        place.moved()
        start = number * PIECE
        with open(self.path, "rb") as file:
            file.seek(max(start - 1, 0))
            before = file.read(1) if start else b"\n"
            data = file.read(PIECE)
            digest = hashlib.sha256(data).hexdigest()
            if place.count == 1 or not self.has_lines:
                return Look(digest, 0, [])
            first = 0 if before == b"\n" else data.find(b"\n") + 1 or len(data)
            rest = file.readline() if first < len(data) and not data.endswith(b"\n") else b""
        return Look(digest, first, list(_groups(io.BytesIO(data[first:] + rest))))

    def _sign(self) -> str:
        """A digest of how each piece begins, and of the end."""
        size, digest = self._state[0], hashlib.sha256()
        with open(self.path, "rb") as file:
            for start in (*range(0, size, PIECE), max(size - SIGNED, 0)):
                file.seek(start)
                digest.update(file.read(SIGNED))
        return digest.hexdigest()[:16]


class _Range(NamedTuple):
    """Successive lines of a file."""

    path: str
    name: str
    state: tuple[int, int, int]
    start: int
    size: int

    def __call__(self) -> list[bytes]:
        """Read them."""
        check_unchanged(self.path, self.name, self.state)
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return list(io.BytesIO(file.read(self.size)))


class Rows(Part):
    """Rows of JSON Lines, yet to be parsed."""

    @functools.cached_property
    def values(self) -> list[Any]:
        """Lines."""
        return self.load()

    def __reduce__(self) -> tuple[Any, ...]:
        """Without what was read."""
        return Rows, (self.load, self.count)


def _groups(lines: Iterator[bytes]) -> Iterator[Group]:
    while some := list(itertools.islice(lines, GROUP)):
        yield Group(sum(map(len, some)), len(some), sum(bool(line.strip()) for line in some))
