"""What a run needs to go on where it stopped: saved beside training, sealed with digests, verified before it is used.

Orbax writes and commits a step; it does not checksum array data (a flipped bit comes back as a wrong weight). So once
a step is committed, a background thread digests every file of it into `manifest.json`. What a folder can hold (a bucket
has the same but for names that end with tmp):

    100/  with manifest.json that verifies   usable
    100/  with manifest.json that does not   damaged, or of another step: renamed to 100.bad-<time>, never deleted
    100/  committed, but no manifest.json    unfinished: killed between commit and seal; an older step is used
    100.orbax-checkpoint-tmp/                killed while writing; removed when the folder is next opened
    sealed                                   the newest step that was ever sealed here
    anything else                            not ours: ignored

Old steps are removed only after a newer one is sealed. So from the first seal on there is always a sealed step, and a
folder with `sealed` but no usable step has lost something: that is an error, never a silent start from scratch.

Where the processes share no disk and have no bucket, each keeps what its devices hold in a folder of its own, and does
there what process 0 does else. A step then counts if all have it; `sealed` is written once all have sealed it.
"""

import contextvars
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.files import digest_of
from dpo_jax.processes.here import here
from dpo_jax.training import arrays, steps
from dpo_jax.training.folder import Folder
from dpo_jax.training.settings import CheckpointSettings
from dpo_jax.training.steps import Steps
from dpo_jax.trees import Tree

_PARTING_SECONDS = 5.0
"""How long a process of several that ends with an error waits for its last save where not all of them end with one: who
it would be saved with may be gone."""


class Checkpoints:
    """The checkpoints of one run, in one folder that every process sees, in a bucket (see `steps.at`), or in as many
    folders as there are processes.

    `save` returns as soon as the arrays are copied to the host; writing, sealing and removing old steps happen behind
    training. A failed write surfaces at the next `save`, `wait` or `close`; earlier steps stay. The decision when to
    save is the caller's. Process 0 seals, verifies and removes (in folders of their own, each process); all processes
    call every method, in the same order.

        with Checkpoints(output / "checkpoints", settings, say=say) as checkpoints:
            step = checkpoints.latest()
            if step is not None:
                state, record = checkpoints.restore(step, abstract_state)
    """

    def __init__(
        self,
        folder: str | Path,
        settings: CheckpointSettings,
        *,
        say: Callable[[str], None] = print,
        records: Sequence[str] = (),
    ):
        """Open a folder, making it if it is not there, and remove what a killed run left half-written in it.

        A bucket keeps a copy of the `records` of the run that the folder is in: patterns of names.
        """
        self._run, self._records = Path(folder).parent, records
        self.place = steps.at(folder)
        self._settings = settings
        self._say = say if here().owns else _silent
        self._good: set[int] = set()
        self._pending: Future[None] | None = None
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        with self._writing():
            self.place.open(here())
            self._manager = arrays.manager(self.place.root, shared=self.place.shared)

    def save(self, step: int, state: Tree, record: dict[str, Any], also: int | None = None) -> None:
        """Start saving a tree of arrays and a JSON-able record; a step that is already saved is left alone.

        Of the older steps, `also` is kept beside those that the settings keep.

        Raises:
          UserError: this save or the one before it could not be written, or the folder holds this step of another run.
        """
        self.wait()
        if step in self._good:
            return
        self._each("checkpoint", lambda: self._make_way(step))
        if not self.place.shared:
            record = here().decide("record of a checkpoint", lambda: record)
        with self._writing(step):
            # `force` passes over Orbax's own rules for when to save; deciding that is the caller's.
            items = arrays.to_save(state, record, shared=self.place.shared)
            self._manager.save(step, args=items, force=True)
        self._pending = self._finisher.submit(contextvars.copy_context().run, self._finish, step, also)

    def latest(self) -> int | None:
        """The newest step that verifies, or None where nothing was ever finished.

        Damaged steps are renamed to `<step>.bad-<time>`. Every byte of the newest step is read, by one process or
        another.

        Raises:
          UserError: there were finished steps, and none of them can be used.
        """
        self.wait()
        found = self._newest_usable()
        if found is not None:
            self._good.add(found)
        return found

    def restore(self, step: int, abstract_state: Tree) -> tuple[Tree, dict[str, Any]]:
        """A step's state and record; the state has the target's structure, and its shardings on any devices.

        Args:
          step: a saved step, as `latest` gives it.
          abstract_state: tree of `jax.ShapeDtypeStruct` (or arrays) with shardings.

        Raises:
          UserError: the step is damaged, or a leaf is missing, new, or differs in shape or dtype; nothing is cast.
        """
        self.wait()
        self._require_usable(step)
        self._require_fit(step, abstract_state)
        state = self._manager.restore(step, args=arrays.to_restore(abstract_state))[arrays.STATE]
        return state, self.place.read(step, arrays.RECORD)

    def read_record(self, step: int) -> dict[str, Any]:
        """A step's record alone; no array is read, so this is how settings are compared before anything is placed."""
        self.wait()
        if step not in self._good and (damage := self.place.damage(step, f"{arrays.RECORD}/")):
            raise self._unusable(step, damage)
        return self.place.read(step, arrays.RECORD)

    def entries(self, step: int) -> set[str]:
        """Names of a saved step's entries, such as its weights and its moments; no array is read."""
        self.wait()
        self._require_usable(step)
        return {path.split("/")[0] for path in self.place.read(step, arrays.LEAVES)}

    def kept(self) -> list[int]:
        """Steps that were sealed, in order; whether they verify is not looked at."""
        return steps.kept(self.place)

    def wait(self) -> None:
        """Return when the last save is written, sealed and the old steps are removed; raise if it failed."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Exception:
            # Orbax raises the same failure once more in this thread; it is reported already.
            with suppress(Exception):
                self._manager.wait_until_finished()
            raise

    def check(self) -> None:
        """With several processes: raise at once if the last save failed, since the others wait for this one."""
        if here().count > 1 and self._pending is not None and self._pending.done():
            self.wait()

    def close(self) -> None:
        """Finish the last save and release the threads."""
        try:
            self.wait()
        finally:
            self._finisher.shutdown()
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        """The folder itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close; a failed last save is raised, unless something else went wrong before: then it is only said."""
        if kind is not None and here().count > 1 and self._hangs():
            return  # the process ends now: see `processes.starting.end_early`
        try:
            self.close()
        except UserError as error:
            if kind is None:
                raise
            self._say(str(error))

    def _hangs(self) -> bool:
        """Whether the last save may never come to an end. All processes call, each of which ends with an error."""
        if self._pending is None:
            return False
        together = here().come("an error", _PARTING_SECONDS)
        return not futures.wait([self._pending], arrays.TIMEOUT_SECONDS if together else 0).done

    def _finish(self, step: int, also: int | None) -> None:
        """Behind training: wait for the commit, seal it, and only then remove old steps."""
        with self._writing(step):
            self._manager.wait_until_finished()
            table = self.place.looked_at(step, here())
            if self._keeps:
                self.place.seal(step, table)
                if not self.place.shared:
                    here().everyone("sealed", None, beside=True)
                self.place.mark(step)
                self.place.keep_records(self._run, self._records)
                self._remove_old(step, also)
        self._good.add(step)

    def _remove_old(self, newest: int, also: int | None) -> None:
        there = self.place.numbers()
        sealed = [step for step in there if self.place.is_sealed(step)]
        keep = {*sealed[: self._settings.keep], also}
        if self._settings.keep_every is not None:
            keep |= {step for step in sealed if step % self._settings.keep_every == 0}
        unfinished = {step for step in {*there} - {*sealed} if step < newest and self.place.is_unfinished(step)}
        for step in set(sealed) - keep | unfinished:
            self._good.discard(step)
            self.place.remove(step)

    @property
    def _keeps(self) -> bool:
        """Whether it is this process that seals, sets aside and removes steps."""
        return here().owns or not self.place.shared

    def _each(self, name: str, work: Callable[[], Any]) -> None:
        """Have process 0 do something, or each process in its own folder; raises on all what one of them refuses."""
        if self.place.shared:
            here().decide(name, work)
            return
        refused = None
        try:
            work()
        except UserError as error:
            refused = str(error)
        if first := next(filter(None, here().everyone(name, refused)), None):
            raise UserError(first)

    def _newest_usable(self) -> int | None:
        for step in sorted({step for own in here().everyone("checkpoints", self._numbers()) for step in own})[::-1]:
            if not self._is_sealed(step):
                continue
            damage = damage_of(self.place, step)
            if damage is None:
                self._each("newest checkpoint", lambda step=step: self._say_lost(newer_than=step))
                self._check_alike(step)
                return step
            self._each("damaged checkpoint", lambda step=step, damage=damage: self._set_aside(step, damage))
        self._each("no checkpoint", self._refuse_none)
        return None

    def _numbers(self) -> list[int]:
        return self.place.numbers() if self._keeps else []

    def _is_sealed(self, step: int) -> bool:
        if not self.place.shared:
            return self._is_sealed_by_all(step)
        return here().decide("sealed checkpoint", lambda: self.place.is_sealed(step) or self._ignored(step))

    def _ignored(self, step: int) -> bool:
        if self.place.is_unfinished(step):
            self._say(f"checkpoint {self.place.at(step)} was never finished; it is ignored")
        return False

    def _is_sealed_by_all(self, step: int) -> bool:
        """Whether every process has sealed a step in its own folder. If they did once and one has lost it, the others
        set it aside; if they never did, it is one that was never finished."""
        assert isinstance(self.place, Folder)
        newest = self.place.newest_ever()
        said = here().everyone("sealed checkpoint", [self.place.is_sealed(step), newest is not None and newest >= step])
        if lacking := [str(process) for process, (sealed, _) in enumerate(said) if not sealed]:
            if any(once for _, once in said):
                self._set_aside(step, f"process {', '.join(lacking)} does not have it")
            else:
                self.place.unseal(step)
                self._ignored(step)
        return not lacking

    def _set_aside(self, step: int, damage: str) -> None:
        moved = f"renamed to {self.place.move_aside(step, 'bad')}, " if self.place.is_there(step) else ""
        self._say(f"checkpoint {self.place.at(step)} is damaged ({damage}); {moved}looking for an older one")

    def _check_alike(self, step: int) -> None:
        """Refuse steps of several runs in folders of their own; raises as `Here.same`."""
        if not self.place.shared:
            record = digest_of(json.dumps(self.place.read(step, arrays.RECORD), sort_keys=True))
            here().same(f"checkpoint {step}", {"the digest of its record": record})

    def _refuse_none(self) -> None:
        if self.place.newest_ever() is not None or self.place.lost():
            raise UserError(
                f"no checkpoint in {self.place.root} can be used, though the run had saved some; put one back, or "
                "delete this folder or choose another output to start from the beginning"
            )

    def _say_lost(self, *, newer_than: int) -> None:
        """Say that a newer step was sealed here and is no more, under its name or beside it."""
        sealed = self.place.newest_ever()
        if sealed is None or sealed <= newer_than or self.place.is_there(sealed) or self.place.lost(sealed):
            return
        self._say(f"checkpoint {self.place.at(sealed)} was saved and is gone; step {newer_than} is used")

    def _make_way(self, step: int) -> None:
        """Clear the name of a step that is about to be saved; what is not ours is moved, never deleted."""
        path = self.place.at(step)
        if self.place.is_sealed(step):
            raise UserError(
                f"checkpoint {path} exists already and this run did not start from it; "
                "delete the folder or choose another output"
            )
        if self.place.is_unfinished(step):
            self.place.remove(step)
        elif self.place.is_there(step):
            self._say(f"{path} is not a checkpoint and in the way; renamed to {self.place.move_aside(step, 'stray')}")

    def _require_usable(self, step: int) -> None:
        if step not in self._good:
            if damage := damage_of(self.place, step):
                raise self._unusable(step, damage)
            self._good.add(step)

    def _require_fit(self, step: int, abstract_state: Tree) -> None:
        """Refuse a target whose leaves are not those of the checkpoint: Orbax would cast dtypes without a word."""
        saved = self.place.read(step, arrays.LEAVES)
        wanted = arrays.leaves(abstract_state, shared=self.place.shared)
        different = [path for path in saved | wanted if saved.get(path) != wanted.get(path)]
        if different:
            path = different[0]
            parts = any(arrays.is_part(said) for said in [*saved.values(), *wanted.values()])
            raise UserError(
                f"checkpoint {self.place.at(step)} does not fit this run: leaf {path} is "
                f"{saved.get(path, 'missing')} there and {wanted.get(path, 'missing')} here ({len(different)} of "
                f"{len(saved | wanted)} leaves differ); use the settings it was saved with, "
                f"{'and the same hosts in the same order, ' if parts else ''}or another output"
            )

    def _unusable(self, step: int, damage: str) -> UserError:
        return UserError(f"checkpoint {self.place.at(step)} cannot be used ({damage}); choose another step")

    @contextmanager
    def _writing(self, step: int | None = None) -> Iterator[None]:
        """Turn what the machine refuses into one line; any other error is ours and passes as it is."""
        path = self.place.root if step is None else self.place.at(step)
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if step is not None and self._keeps:
                self.place.clear(step)
            if (reason := self.place.reason(error)) is None:
                raise
            raise UserError(
                f"cannot write checkpoint {path}: {reason}; earlier checkpoints are kept: {self.place.remedy}, then "
                "run the same command again"
            ) from error


def _silent(_: str) -> None:
    """Say nothing: every process but the first."""


def damage_of(there: Steps, step: int) -> str | None:
    """What is wrong with a sealed step, of which each process looks at its share, or at its own; all of them call."""
    place = here()
    share = (place.process, place.count) if there.shared else (0, 1)
    own = there.damage(step, process=share[0], processes=share[1])
    said = own if own is None or there.shared else f"process {place.process}: {own}"
    return next(filter(None, place.everyone("damage of a checkpoint", said)), None)


def read_part(there: Steps, step: int, part: Tree) -> Tree:
    """Some entries of a step's state, such as its weights without its moments; no other array is read.

    Args:
      there: where the step is; nothing is touched.
      step: one of `steps.kept`.
      part: the entries, as trees of `jax.ShapeDtypeStruct` with shardings.

    Raises:
      UserError: the step is damaged, or a leaf is missing in it or differs in shape or dtype.
    """
    path = there.at(step)
    if damage := damage_of(there, step):
        raise UserError(f"checkpoint {path} cannot be used ({damage}); choose another step")
    saved, wanted = there.read(step, arrays.LEAVES), arrays.leaves(part, shared=there.shared)
    if wrong := next((leaf for leaf in wanted if saved.get(leaf) != wanted[leaf]), None):
        found = saved.get(wrong, "missing")
        remedy = "give the run's own model"
        if arrays.is_part(found):
            remedy = "it holds one host's part, as each kept its own; run the same training on those hosts again"
        raise UserError(
            f"checkpoint {path} does not fit its model: leaf {wrong} is {found} there and {wanted[wrong]} here; "
            f"{remedy}"
        )
    return arrays.read_entries(path, part)
