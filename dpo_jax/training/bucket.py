"""The steps of a run in an object store, `gs://BUCKET/PATH`, so that hosts need no disk in common, and none that lasts.

A store keeps what it has taken, and says of each object its size and a checksum. So a step is sealed with what the
store says of its objects and held against that again, and nothing is read back. Objects come one by one: a step without
a manifest was never finished. What else writes to the same place is noticed, as no lock would outlive a kill.
"""

import json
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.files import digest_of, write_whole
from dpo_jax.processes.here import Here
from dpo_jax.stores import REMEDY, Store
from dpo_jax.training.manifest import MANIFEST, Damaged, claims_of, difference, text_of

_PARTS = {"state", "leaves", "record", "_CHECKPOINT_METADATA", "commit_success.txt", "descriptor"}
"""What Orbax writes into a step."""
_SEALED, _RECORDS = "sealed", "records"


class Bucket:
    """The steps at an address of a store, with the methods of `folder.Folder`."""

    remedy = REMEDY
    shared = True

    def __init__(self, address: str):
        """Nothing need be there yet; raises as `Store`."""
        self._store = Store(address, "checkpoint.folder")
        from etils import epath

        self.root: PurePath = epath.Path(self._store.address)
        self._marked: str | None = None
        self._kept: dict[Path, str] = {}

    def open(self, place: Here) -> None:
        """Try whether it can be written to; nothing is left half-written. Raises as `Store.check`."""
        del place
        self._store.check()
        self._marked = self._mark()

    def at(self, step: int) -> PurePath:
        """Where a step lies."""
        return self.root / str(step)

    def numbers(self) -> list[int]:
        """All names that are a step number, newest first."""
        names = self._store.names()
        return sorted((int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]*", name)), reverse=True)

    def is_empty(self) -> bool:
        """Whether nothing is there at all."""
        return not self._store.names()

    def is_there(self, step: int) -> bool:
        """Whether any object's name begins as the step's do."""
        return bool(self._store.objects(str(step)))

    def is_sealed(self, step: int) -> bool:
        """Whether the step was finished; what is in it now is not looked at."""
        return MANIFEST in self._store.objects(str(step))

    def is_unfinished(self, step: int) -> bool:
        """Whether these are objects of a step as Orbax writes them, and there is no manifest."""
        names = self._store.objects(str(step))
        return MANIFEST not in names and {name.split("/")[0] for name in names} <= _PARTS

    def looked_at(self, step: int, place: Here) -> dict[str, tuple[int, str]]:
        """What the store says of each object of a step, on process 0; nothing is read."""
        return dict(self._store.objects(str(step))) if place.owns else {}

    def seal(self, step: int, table: Mapping[str, tuple[int, str]]) -> None:
        """Write down what is in a step.

        Raises:
          UserError: another run has sealed a step here since this one began.
        """
        if self._mark() != self._marked:
            raise UserError(
                f"checkpoint.folder: another run writes to {self.root} too, and has saved a step meanwhile; give each "
                "run one of its own"
            )
        listed = {name: list(about) for name, about in table.items()}
        self._store.write(f"{step}/{MANIFEST}", text_of(step, listed).encode())

    def mark(self, step: int) -> None:
        """Write down that a sealed step is the newest."""
        self._marked = f"{step} {uuid.uuid4().hex}\n"
        self._store.write(_SEALED, self._marked.encode())

    def newest_ever(self) -> int | None:
        """The newest step that was ever sealed here."""
        with suppress(ValueError, IndexError):
            return int((self._mark() or "").split()[0])
        return None

    def lost(self, step: int | None = None) -> bool:
        """Whether a step, or any, was found damaged and moved aside."""
        which = r"\d+" if step is None else str(step)
        return any(re.match(rf"{which}\.bad-", name) for name in self._store.names())

    def damage(self, step: int, under: str = "", *, process: int = 0, processes: int = 1) -> str | None:
        """How the objects of a sealed step whose names begin with `under` are not as they were sealed, as the store
        says, without reading one: the first of several processes asks."""
        if process:
            return None
        found = self._store.objects(str(step))
        try:
            claims = claims_of(self._store.read(f"{step}/{MANIFEST}").decode(), str(step), under)
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
        return json.loads(self._store.read(f"{step}/{item}/metadata"))

    def move_aside(self, step: int, why: str) -> str:
        """Copy a step to `STEP.WHY-<time>` within the store, delete it here, and say how it is called now."""
        name = f"{step}.{why}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:9]}"
        for part in self._store.objects(str(step)):
            self._store.copy(f"{step}/{part}", f"{name}/{part}")
        self.remove(step)
        return name

    def remove(self, step: int) -> None:
        """Delete a step; its manifest goes first, so that a kill on the way leaves a step that was never finished."""
        self._store.delete([f"{step}/{MANIFEST}"])
        self._store.delete([f"{step}/{part}" for part in self._store.objects(str(step))])

    def clear(self, step: int) -> None:
        """Nothing: what was written of a step is removed where the step is saved again."""

    def keep_records(self, run: Path, names: Iterable[str]) -> None:
        """Keep a copy of those small files of a run whose names match, as they are now, for `bring_records`."""
        for path in sorted(path for name in names for path in run.glob(name) if path.is_file()):
            whole = path.read_bytes()
            if path.suffix == ".jsonl":  # of which a line may just be written
                whole = whole[: whole.rfind(b"\n") + 1]
            if self._kept.get(path) != (digest := digest_of(whole)):
                self._store.write(f"{_RECORDS}/{path.relative_to(run).as_posix()}", whole)
                self._kept[path] = digest

    def bring_records(self, run: Path) -> None:
        """Write the files that were kept into a folder of a run that has lost them."""
        for name in self._store.objects(_RECORDS):
            path = run / name
            if ".." not in path.parts and not path.exists():  # a store's names lead nowhere else
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, self._store.read(f"{_RECORDS}/{name}"))

    def reason(self, error: Exception) -> str | None:
        """What the store, or what was between, has said."""
        return self._store.reason(error)

    def _mark(self) -> str | None:
        with suppress(FileNotFoundError):
            return self._store.read(_SEALED).decode()
        return None
