"""What a run needs to go on where it stopped: saved beside training, sealed with digests, verified before it is used.

Orbax writes and commits a step; it does not checksum array data (a flipped bit comes back as a wrong weight). So once
a step is committed, a background thread digests every file of it into `manifest.json`. What a folder can hold:

    100/  with manifest.json that verifies   usable
    100/  with manifest.json that does not   damaged, or of another step: renamed to 100.bad-<time>, never deleted
    100/  committed, but no manifest.json    unfinished: killed between commit and seal; an older step is used
    100.orbax-checkpoint-tmp/                killed while writing; removed when the folder is next opened
    sealed                                   the newest step that was ever sealed here
    anything else                            not ours: ignored

Old steps are removed only after a newer one is sealed. So from the first seal on there is always a sealed step, and a
folder with `sealed` but no usable step has lost something: that is an error, never a silent start from scratch.
"""

import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dpo_jax.errors import UserError
from dpo_jax.files import REMEDIES, move_aside, write_whole
from dpo_jax.processes.here import here
from dpo_jax.training.manifest import MANIFEST, damage_of, seal, steps_of
from dpo_jax.training.settings import CheckpointSettings
from dpo_jax.trees import Tree, paths

_SEALED = "sealed"
_LEFT_OVER = re.compile(r"[0-9]+\.(removed|orbax-checkpoint-tmp.*)")
# Orbax's default is 1200. When one host cannot write, the others learn it only after this long.
_TIMEOUT_SECONDS = 600
_PARTING_SECONDS = 5.0
"""How long a process of several that ends with an error waits for its last save where not all of them end with one: who
it would be saved with may be gone."""


class Checkpoints:
    """The checkpoints of one run, in one folder that every process sees.

    `save` returns as soon as the arrays are copied to the host; writing, sealing and removing old steps happen behind
    training. A failed write surfaces at the next `save`, `wait` or `close`; earlier steps stay. The decision when to
    save is the caller's. Process 0 seals, verifies and removes; all processes call every method, in the same order.

        with Checkpoints(output / "checkpoints", settings, say=say) as checkpoints:
            step = checkpoints.latest()
            if step is not None:
                state, record = checkpoints.restore(step, abstract_state)
    """

    def __init__(self, folder: str | Path, settings: CheckpointSettings, *, say: Callable[[str], None] = print):
        """Open a folder, making it if it is not there, and remove what a killed run left half-written in it."""
        if "://" in str(folder):
            raise UserError(f"checkpoint folder {folder} is not a path; use a local or mounted folder")
        self.folder = Path(folder).absolute()
        self._settings = settings
        self._say = say if here().owns else _silent
        self._good: set[int] = set()
        self._pending: Future[None] | None = None
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            if here().owns:
                _remove_leftovers(self.folder)
            self._manager = ocp.CheckpointManager(self.folder, options=_options())
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_said_once)  # and for good: threads of Orbax's may outlive `close`
        if sys.unraisablehook is sys.__unraisablehook__:  # and nobody else's
            sys.unraisablehook = _without_late_answers

    def save(self, step: int, state: Tree, record: dict[str, Any], also: int | None = None) -> None:
        """Start saving a tree of arrays and a JSON-able record; a step that is already saved is left alone.

        Of the older steps, `also` is kept beside those that the settings keep.

        Raises:
          UserError: this save or the one before it could not be written, or the folder holds this step of another run.
        """
        self.wait()
        if step in self._good:
            return
        here().decide("checkpoint", lambda: self._make_way(step))
        items = {
            "state": ocp.args.StandardSave(state),
            "leaves": ocp.args.JsonSave(_leaves(state)),
            "record": ocp.args.JsonSave(record),
        }
        with self._writing(step):
            # `force` passes over Orbax's own rules for when to save; deciding that is the caller's.
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        self._pending = self._finisher.submit(self._finish, step, also)

    def latest(self) -> int | None:
        """The newest step that verifies, or None where nothing was ever finished.

        Damaged steps are renamed to `<step>.bad-<time>`. Every byte of the newest step is read.

        Raises:
          UserError: there were finished steps, and none of them can be used.
        """
        self.wait()
        found = here().decide("newest checkpoint", self._newest_usable)
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
        items = {"state": ocp.args.StandardRestore(jax.tree.map(_target, abstract_state))}
        state = self._manager.restore(step, args=ocp.args.Composite(**items))["state"]
        return state, self._read(step, "record")

    def read_record(self, step: int) -> dict[str, Any]:
        """A step's record alone; no array is read, so this is how settings are compared before anything is placed."""
        self.wait()
        if step not in self._good and (damage := damage_of(self.folder / str(step), "record/")):
            raise self._unusable(step, damage)
        return self._read(step, "record")

    def entries(self, step: int) -> set[str]:
        """Names of a saved step's entries, such as its weights and its moments; no array is read."""
        self.wait()
        self._require_usable(step)
        return {path.split("/")[0] for path in self._read(step, "leaves")}

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
        return not futures.wait([self._pending], _TIMEOUT_SECONDS if together else 0).done

    def _finish(self, step: int, also: int | None) -> None:
        """Behind training: wait for the commit, seal it, and only then remove old steps."""
        with self._writing(step):
            self._manager.wait_until_finished()
            if here().owns:
                seal(self.folder / str(step))
                write_whole(self.folder / _SEALED, f"{step}\n")
                self._remove_old(step, also)
        self._good.add(step)

    def _remove_old(self, newest: int, also: int | None) -> None:
        sealed = [step for step, path in steps_of(self.folder) if (path / MANIFEST).exists()]
        keep = {*sealed[: self._settings.keep], also}
        if self._settings.keep_every is not None:
            keep |= {step for step in sealed if step % self._settings.keep_every == 0}
        unfinished = {step for step, path in steps_of(self.folder) if step < newest and _unfinished(path)}
        for step in set(sealed) - keep | unfinished:
            self._good.discard(step)
            _remove(self.folder / str(step))

    def _newest_usable(self) -> int | None:
        for step, path in steps_of(self.folder):
            if not (path / MANIFEST).exists():
                if _unfinished(path):
                    self._say(f"checkpoint {path} was never finished; it is ignored")
                continue
            damage = damage_of(path)
            if damage is None:
                self._say_lost(newer_than=step)
                return step
            aside = move_aside(path, "bad")
            self._say(f"checkpoint {path} is damaged ({damage}); renamed to {aside.name}, looking for an older one")
        if (self.folder / _SEALED).exists() or any(self.folder.glob("*.bad-*")):
            raise UserError(
                f"no checkpoint in {self.folder} can be used, though the run had saved some; put one back, or delete "
                "this folder or choose another output to start from the beginning"
            )
        return None

    def _say_lost(self, *, newer_than: int) -> None:
        """Say that a newer step was sealed here and is no more, under its name or beside it."""
        with suppress(OSError, ValueError):
            sealed = int((self.folder / _SEALED).read_text())
            known = os.path.lexists(self.folder / str(sealed)) or any(self.folder.glob(f"{sealed}.bad-*"))
            if sealed > newer_than and not known:
                self._say(f"checkpoint {self.folder / str(sealed)} was saved and is gone; step {newer_than} is used")

    def _make_way(self, step: int) -> None:
        """Clear the name of a step that is about to be saved; what is not ours is moved, never deleted."""
        path = self.folder / str(step)
        if (path / MANIFEST).exists():
            raise UserError(
                f"checkpoint {path} exists already and this run did not start from it; "
                "delete the folder or choose another output"
            )
        if _unfinished(path):
            _remove(path)
        elif os.path.lexists(path):
            self._say(f"{path} is not a checkpoint and in the way; renamed to {move_aside(path, 'stray').name}")

    def _require_usable(self, step: int) -> None:
        if step not in self._good:
            if damage := damage_of(self.folder / str(step)):
                raise self._unusable(step, damage)
            self._good.add(step)

    def _require_fit(self, step: int, abstract_state: Tree) -> None:
        """Refuse a target whose leaves are not those of the checkpoint: Orbax would cast dtypes without a word."""
        saved, wanted = self._read(step, "leaves"), _leaves(abstract_state)
        different = [path for path in saved | wanted if saved.get(path) != wanted.get(path)]
        if different:
            path = different[0]
            raise UserError(
                f"checkpoint {self.folder / str(step)} does not fit this run: leaf {path} is "
                f"{saved.get(path, 'missing')} there and {wanted.get(path, 'missing')} here ({len(different)} of "
                f"{len(saved | wanted)} leaves differ); use the settings it was saved with, or another output"
            )

    def _read(self, step: int, item: str) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()}))[item]

    def _unusable(self, step: int, damage: str) -> UserError:
        return UserError(f"checkpoint {self.folder / str(step)} cannot be used ({damage}); choose another step")

    @contextmanager
    def _writing(self, step: int | None = None) -> Iterator[None]:
        """Turn what the machine refuses into one line; any other error is ours and passes as it is."""
        path = self.folder if step is None else self.folder / str(step)
        try:
            yield
        except Exception as error:
            if step is not None and here().owns:
                # Orbax leaves the space of a failed save to the next run; a full disk needs it now.
                for partial in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                    shutil.rmtree(partial, ignore_errors=True)
            if (reason := _disk_reason(error)) is None:
                raise
            raise UserError(
                f"cannot write checkpoint {path}: {reason}; earlier checkpoints are kept: free some space or correct "
                "the folder's permissions, then run the same command again"
            ) from error


def kept_steps(folder: Path) -> list[int]:
    """The steps of a folder of checkpoints that were sealed, in order; whether they verify is not looked at."""
    return sorted(step for step, path in (steps_of(folder) if folder.is_dir() else ()) if (path / MANIFEST).exists())


def read_part(folder: Path, step: int, part: Tree) -> Tree:
    """Some entries of a step's state, such as its weights without its moments; no other array is read.

    Args:
      folder: of checkpoints; nothing in it is touched.
      step: one of `kept_steps`.
      part: the entries, as trees of `jax.ShapeDtypeStruct` with shardings.

    Raises:
      UserError: the step is damaged, or a leaf is missing in it or differs in shape or dtype.
    """
    path = folder / str(step)
    if damage := damage_of(path):
        raise UserError(f"checkpoint {path} cannot be used ({damage}); choose another step")
    saved, wanted = json.loads((path / "leaves" / "metadata").read_text("utf-8")), _leaves(part)
    if wrong := next((leaf for leaf in wanted if saved.get(leaf) != wanted[leaf]), None):
        raise UserError(
            f"checkpoint {path} does not fit its model: leaf {wrong} is {saved.get(wrong, 'missing')} there and "
            f"{wanted[wrong]} here; give the run's own model"
        )
    targets = jax.tree.map(_target, part)
    arguments = ocp.checkpoint_utils.construct_restore_args(targets)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        wanted = ocp.args.PyTreeRestore(item=targets, restore_args=arguments, partial_restore=True)
        return reader.restore(path / "state", args=wanted)


class _Names(ocp.step.NameFormat):
    """Plain step numbers. Orbax is told of no earlier steps: it takes any folder with a number for one."""

    def build_name(self, step: int) -> str:
        return str(step)

    def find_all(self, base_path: object) -> Iterator[Any]:
        del base_path
        return iter(())

    def find_step(self, base_path: Any, step: int) -> Any:
        return ocp.step.standard_name_format().find_step(base_path, step)


def _options() -> ocp.CheckpointManagerOptions:
    return ocp.CheckpointManagerOptions(
        step_name_format=_Names(),
        cleanup_tmp_directories=False,  # by a thread of its own, which a command that ends at once does not wait for
        save_root_metadata=False,
        async_options=ocp.AsyncOptions(timeout_secs=_TIMEOUT_SECONDS),
    )


def _disk_reason(error: Exception) -> str | None:
    """The operating system's words, also where Orbax and TensorStore wrap them in errors of their own."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next((reason for reason in map(os.strerror, REMEDIES) if reason in str(error)), None)


def _said_once(record: logging.LogRecord) -> bool:
    """Drop the log of Orbax's errors that it also raises: one full disk is 500 lines of tracebacks from four threads,
    and from tasks that nobody waits for."""
    return record.exc_info is None or "orbax" not in record.pathname + record.getMessage()


def _without_late_answers(unraisable: Any) -> None:
    """Drop what TensorStore prints where a save has failed: an answer for each array, to a loop that is closed."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _silent(_: str) -> None:
    """Say nothing: every process but the first."""


def _target(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    assert leaf.sharding is not None, "restore needs a sharding for every leaf"
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _leaves(tree: Tree) -> dict[str, str]:
    """Each leaf's dtype and shape by path: `{"params/w": "float32[4, 8]"}`."""
    return {path: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for path, leaf in paths(tree).items()}


def _unfinished(path: Path) -> bool:
    """Whether this is a step that Orbax committed and nothing sealed."""
    committed = (path / "_CHECKPOINT_METADATA").exists() or (path / "commit_success.txt").exists()
    return committed and not path.is_symlink() and not (path / MANIFEST).exists()


def _remove(path: Path) -> None:
    """Delete a step; the rename comes first, so that a kill on the way leaves nothing that looks like a step."""
    doomed = path.with_name(f"{path.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _remove_leftovers(folder: Path) -> None:
    for path in folder.iterdir():
        if _LEFT_OVER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
