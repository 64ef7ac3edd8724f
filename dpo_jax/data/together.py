"""Tokenising by all processes of a run together, in a folder that all of them see: each does its share of the pieces,
and process 0 puts what they became in order."""

import io
import itertools
import json
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpo_jax.data.cache import refused
from dpo_jax.data.encoded import Encoded
from dpo_jax.data.records import Stretch
from dpo_jax.data.report import Report
from dpo_jax.data.units import COLUMNS
from dpo_jax.errors import UserError
from dpo_jax.files import write_whole
from dpo_jax.processes.here import Here, is_seen

RUN = 8
"""Pieces that follow each other and are of one process: of a file that need not be read to go past them (Parquet's row
groups), it reads little beyond its own."""
LOOKS_AGAIN = 0.05
"""Seconds between two looks for a piece that another process is to make."""
ONE_FOLDER = "give a folder that all hosts see in the same state, or one of each host's own"


class Sighting(NamedTuple):
    """A pair, or a single completion, by digests of its token ids and of those that would contradict it."""

    line: int
    same: bytes
    opposite: bytes
    desirable: bool | None
    """Of a single completion."""


class EncodedPart(NamedTuple):
    """What a stretch of rows of a file became; its numbers begin at 0."""

    file: str
    encoded: Encoded
    report: Report
    sightings: list[Sighting]


Make = Callable[[Iterable[Stretch]], Generator[EncodedPart, None, None]]
"""What pieces become, in their order."""


def do_share(place: Here, folder: Path, make: Make, pieces: Iterable[Stretch]) -> None:
    """Of every process but 0: make its pieces, each a file of the folder, which process 0 has made. When that is gone,
    process 0 has given up, and says why.

    Raises:
      UserError: the folder cannot be written; or what making the pieces raises.
    """
    if not is_seen(folder):
        raise UserError(f"data.cache: process {place.process} ({place.host}) does not see {folder}; {ONE_FOLDER}")
    shared = _Shared(pieces)
    with closing(make(shared.of(place.process, place.count))) as made:
        for turn, part in enumerate(made):
            place.moved()
            try:
                with refused(folder.parent):
                    write_whole(_file(folder, _number(turn, place.process, place.count)), to_bytes(part))
            except UserError:
                if folder.exists():
                    raise
                return
    place.meet("shares made")


def gathered(place: Here, folder: Path, make: Make, pieces: Iterable[Stretch]) -> Generator[EncodedPart, None, None]:
    """Of process 0: what all pieces became, in their order. Its own it makes, and for those of others it waits.

    When a part comes, its piece has been read here too, so that what was counted in reading is known.
    """
    shared, own = _Shared(pieces), deque[EncodedPart]()
    with closing(make(shared.of(0, place.count))) as mine:
        for number in itertools.count():
            who = _whose(number, place.count)
            if shared.count <= number or not (own or who):
                own.extend(itertools.islice(mine, 1))  # reads on, as far as the next piece that is its own
            if shared.count <= number:
                break
            place.moved()
            yield _awaited(place, folder, number, who) if who else own.popleft()
    place.meet("shares made")  # or the folder would go while others still write


class _Shared:
    """Pieces of which each process takes its share; all look at all of them, so that rows mean the same to everyone.

    Attributes:
      count: of pieces that were looked at.
    """

    def __init__(self, pieces: Iterable[Stretch]):
        self._pieces, self.count = pieces, 0

    def of(self, process: int, processes: int) -> Iterator[Stretch]:
        """Those of a process."""
        for piece in self._pieces:
            self.count += 1
            if _whose(self.count - 1, processes) == process:
                yield piece


def _whose(number: int, processes: int) -> int:
    """The process that makes a piece."""
    return number // RUN % processes


def _number(turn: int, process: int, processes: int) -> int:
    """The piece that a process makes after so many others; `_whose` read the other way."""
    return (turn // RUN * processes + process) * RUN + turn % RUN


def _awaited(place: Here, folder: Path, number: int, who: int) -> EncodedPart:
    """A piece of another process, once it is there."""
    path = _file(folder, number)
    with place.waiting(f"process {who} (tokenising)"):
        while not path.exists():
            time.sleep(LOOKS_AGAIN)
    part = from_bytes(path.read_bytes())
    path.unlink()
    return part


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number}.npz"


def to_bytes(part: EncodedPart) -> bytes:
    """A part as a file has it; `from_bytes` is the inverse."""
    seen = [(one.line, one.same.hex(), one.opposite.hex(), one.desirable) for one in part.sightings]
    about = {"file": part.file, "files": part.encoded.files, "report": part.report.to_dict(), "sightings": seen}
    # underscored, since savez has an argument `file` of its own
    columns = {f"_{name}": getattr(part.encoded, name) for name in COLUMNS}
    buffer = io.BytesIO()
    np.savez(buffer, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **columns)
    return buffer.getvalue()


def from_bytes(data: bytes) -> EncodedPart:
    """A part of a file."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        about = json.loads(arrays["about"].tobytes())
        columns = {name: arrays[f"_{name}"] for name in COLUMNS}
    seen = [
        Sighting(line, bytes.fromhex(same), bytes.fromhex(opposite), desirable)
        for line, same, opposite, desirable in about["sightings"]
    ]
    encoded = Encoded(files=tuple(about["files"]), **columns)
    return EncodedPart(about["file"], encoded, Report.from_dict(about["report"]), seen)
