"""The steps of a run in an object store, `gs://BUCKET/PATH`, so that hosts need no disk in common, and none that lasts.

A store keeps what it has taken, and says of each object its size and a checksum. So a step is sealed with what the
store says of its objects and held against that again, and nothing is read back. Objects come one by one: a step without
a manifest was never finished. What else writes to the same place is noticed, as no lock would outlive a kill.
"""

import importlib.util
import json
import re
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

from dpo_jax.errors import UserError, one_line
from dpo_jax.files import digest_of, write_whole
from dpo_jax.training.manifest import MANIFEST, Damaged, claims_of, difference, text_of

CHECKSUMS = ("crc32c", "md5Hash")
"""What a store says of an object's bytes; the first that it says counts."""
_PARTS = {"state", "leaves", "record", "_CHECKPOINT_METADATA", "commit_success.txt", "descriptor"}
"""What Orbax writes into a step."""
_SEALED, _RECORDS = "sealed", "records"
_STORES = ("gcsfs", "google", "aiohttp", "fsspec")
"""Packages whose errors are a store's."""


class Bucket:
    """The steps at an address of a store, with the methods of `folder.Folder`."""

    remedy = "check the network, and that the credentials of this machine may write there"

    def __init__(self, address: str):
        """Of an address, where nothing need be yet.

        Raises:
          UserError: what reaches such a store is not installed.
        """
        if importlib.util.find_spec("gcsfs") is None:
            raise UserError(f"checkpoint.folder: {address} needs gcsfs; pip install 'dpo_jax[gcs]'")
        from etils import epath
        from etils.epath import backend

        self.root: PurePath = epath.Path(address)
        # the very one that Orbax asks, so that neither remembers what the other has deleted
        self._store, self._path = backend.fsspec_backend.fs(address), address.removeprefix("gs://")
        self._marked: str | None = None
        self._kept: dict[Path, str] = {}

    def open(self, *, sweep: bool) -> None:
        """Write an object and delete it again; there is nothing to `sweep`.

        Raises:
          UserError: the store cannot be reached, or refuses.
        """
        del sweep
        probe = f"{self._path}/probe-{uuid.uuid4().hex}"
        self._ask(self._store.pipe_file, probe, b"?")
        self._ask(self._store.rm_file, probe)
        self._marked = self._mark()

    def at(self, step: int) -> PurePath:
        """Where a step lies."""
        return self.root / str(step)

    def numbers(self) -> list[int]:
        """All names that are a step number, newest first."""
        return sorted((int(name) for name in self._names() if re.fullmatch(r"0|[1-9][0-9]*", name)), reverse=True)

    def is_empty(self) -> bool:
        """Whether nothing is there at all."""
        return not self._names()

    def is_there(self, step: int) -> bool:
        """Whether any object's name begins as the step's do."""
        return bool(self._objects(step))

    def is_sealed(self, step: int) -> bool:
        """Whether the step was finished; what is in it now is not looked at."""
        return MANIFEST in self._objects(step)

    def is_unfinished(self, step: int) -> bool:
        """Whether these are objects of a step as Orbax writes them, and there is no manifest."""
        names = self._objects(step)
        return MANIFEST not in names and {name.split("/")[0] for name in names} <= _PARTS

    def seal(self, step: int) -> None:
        """Write down what the store says of each object of a step, then that it is the newest.

        Raises:
          UserError: another run has sealed a step here since this one began.
        """
        found = self._mark()
        if found != self._marked:
            raise UserError(
                f"checkpoint.folder: another run writes to {self.root} too, and has saved a step meanwhile; give each "
                "run one of its own"
            )
        table = {name: list(about) for name, about in self._objects(step).items()}
        self._write(f"{step}/{MANIFEST}", text_of(step, table))
        self._marked = f"{step} {uuid.uuid4().hex}\n"
        self._write(_SEALED, self._marked)

    def newest_ever(self) -> int | None:
        """The newest step that was ever sealed here."""
        with suppress(ValueError, AttributeError, IndexError):
            return int((self._mark() or "").split()[0])
        return None

    def lost(self, step: int | None = None) -> bool:
        """Whether a step, or any, was found damaged and moved aside."""
        which = r"\d+" if step is None else str(step)
        return any(re.match(rf"{which}\.bad-", name) for name in self._names())

    def damage(self, step: int, under: str = "") -> str | None:
        """How the objects of a sealed step whose names begin with `under` are not as they were sealed."""
        found = self._objects(step)
        try:
            claims = claims_of(self._read(f"{step}/{MANIFEST}"), str(step), under)
        except FileNotFoundError:
            return f"{MANIFEST} is missing"
        except (Damaged, ValueError) as error:
            return str(error)
        for claim in claims:
            if claim.name not in found:
                return f"{claim.name} is missing"
            if said := difference(claim, *found[claim.name]):
                return said
        return None

    def read(self, step: int, item: str) -> dict[str, Any]:
        """What was saved as JSON beside the arrays: `record` or `leaves`."""
        return json.loads(self._read(f"{step}/{item}/metadata"))

    def move_aside(self, step: int, why: str) -> str:
        """Copy a step to `STEP.WHY-<time>` within the store, delete it here, and say how it is called now."""
        name = f"{step}.{why}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:9]}"
        for part in self._objects(step):
            self._ask(self._store.copy, f"{self._path}/{step}/{part}", f"{self._path}/{name}/{part}")
        self.remove(step)
        return name

    def remove(self, step: int) -> None:
        """Delete a step; its manifest goes first, so that a kill on the way leaves a step that was never finished."""
        with suppress(FileNotFoundError):
            self._ask(self._store.rm_file, f"{self._path}/{step}/{MANIFEST}")
        with suppress(FileNotFoundError):
            self._ask(self._store.rm, [f"{self._path}/{step}/{part}" for part in self._objects(step)])

    def clear(self, step: int) -> None:
        """Nothing: what was written of a step is removed where the step is saved again."""

    def keep_records(self, run: Path, names: Iterable[str]) -> None:
        """Keep a copy of those small files of a run whose names match, as they are now, for `bring_records`."""
        for path in sorted(path for name in names for path in run.glob(name) if path.is_file()):
            whole = path.read_bytes()
            if path.suffix == ".jsonl":  # of which a line may just be written
                whole = whole[: whole.rfind(b"\n") + 1]
            if self._kept.get(path) != (digest := digest_of(whole)):
                self._ask(self._store.pipe_file, f"{self._path}/{_RECORDS}/{path.relative_to(run).as_posix()}", whole)
                self._kept[path] = digest

    def bring_records(self, run: Path) -> None:
        """Write the files that were kept into a folder of a run that has lost them."""
        start = f"{self._path}/{_RECORDS}/"
        with suppress(FileNotFoundError):
            for name in self._ask(self._store.find, start):
                path = run / name.removeprefix(start)
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_whole(path, self._ask(self._store.cat_file, name))

    def reason(self, error: Exception) -> str | None:
        """What the store, or what was between, has said."""
        whose = type(error).__module__.split(".")[0]
        from_store = whose in _STORES or isinstance(error, OSError) or str(self.root) in str(error)
        return one_line(error) if from_store or "storage/v1" in str(error) else None

    def _names(self) -> list[str]:
        """First parts of the names of all objects here."""
        with suppress(FileNotFoundError):
            entries = [str(entry).rstrip("/") for entry in self._ask(self._store.ls, self._path, detail=False)]
            return [entry.rsplit("/", 1)[1] for entry in entries if entry != self._path]
        return []

    def _objects(self, step: int) -> dict[str, tuple[int, str]]:
        """Size (bytes) and checksum of each object of a step, by its name below that."""
        start = f"{self._path}/{step}/"
        with suppress(FileNotFoundError):
            found = self._ask(self._store.find, start, detail=True)
            return {name.removeprefix(start): _about(name, info) for name, info in found.items() if name[-1] != "/"}
        return {}

    def _mark(self) -> str | None:
        with suppress(FileNotFoundError):
            return self._read(_SEALED)
        return None

    def _read(self, name: str) -> str:
        return self._ask(self._store.cat_file, f"{self._path}/{name}").decode("utf-8")

    def _write(self, name: str, text: str) -> None:
        self._ask(self._store.pipe_file, f"{self._path}/{name}", text.encode("utf-8"))

    def _ask(self, call: Callable[..., Any], *arguments: Any, **how: Any) -> Any:
        """Call the store, past what is remembered of it; raises FileNotFoundError where an object is not there.

        Raises:
          UserError: the store cannot be reached, or refuses.
        """
        self._store.invalidate_cache()
        try:
            return call(*arguments, **how)
        except FileNotFoundError:
            raise
        except Exception as error:
            if (reason := self.reason(error)) is None:
                raise
            raise UserError(f"checkpoint.folder: {self.root}: {reason}; {self.remedy}") from error


def _about(name: str, info: dict[str, Any]) -> tuple[int, str]:
    sums = [str(info[kind]) for kind in CHECKSUMS if info.get(kind)]
    if not sums:
        raise UserError(f"checkpoint.folder: the store gives no checksum of {name}; choose a folder on a disk")
    return int(info["size"]), sums[0]
