"""The arrays of a checkpoint, which Orbax writes, commits and reads: by all processes into one place, or by each into
its own."""

import logging
import sys
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dpo_jax.trees import Tree, paths

# Orbax's default is 1200. When one host cannot write, the others learn it only after this long.
TIMEOUT_SECONDS = 600
STATE, LEAVES, RECORD = "state", "leaves", "record"
"""What a step is saved as: arrays, what is said of each, and a run's own record, the last two as JSON."""


def manager(root: PurePath, *, shared: bool) -> ocp.CheckpointManager:
    """What writes steps into `root` and reads them: one folder of all processes, or of each process its own, where it
    writes every shard that its devices hold."""
    # in folders of their own all are primary, and no copy of a shard is another process's to write
    options = ocp.options.MultiprocessingOptions() if shared else ocp.options.MultiprocessingOptions(primary_host=None)
    handlers: dict[str, Any] = {
        name: ocp.JsonCheckpointHandler(multiprocessing_options=options) for name in (LEAVES, RECORD)
    }
    kinds = {} if shared else {"type_handler_registry": _own_shards()}
    handlers[STATE] = ocp.PyTreeCheckpointHandler(multiprocessing_options=options, **kinds)
    found = ocp.CheckpointManager(
        root,
        item_handlers=handlers,
        options=ocp.CheckpointManagerOptions(
            step_name_format=_Names(),
            cleanup_tmp_directories=False,  # by a thread, which a command that ends at once does not wait for
            save_root_metadata=False,
            async_options=ocp.AsyncOptions(timeout_secs=TIMEOUT_SECONDS),
            multiprocessing_options=options,
            enable_per_process_directory_creation=not shared,
        ),
    )
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_said_once)  # and for good: threads of Orbax's may outlive the manager
    if sys.unraisablehook is sys.__unraisablehook__:  # and nobody else's
        sys.unraisablehook = _without_late_answers
    return found


def to_save(state: Tree, record: dict[str, Any], *, shared: bool) -> ocp.args.Composite:
    """What a manager is to write: a tree of arrays and a record, which must be something that JSON can say."""
    return ocp.args.Composite(
        **{
            STATE: ocp.args.PyTreeSave(state),
            LEAVES: ocp.args.JsonSave(leaves(state, shared=shared)),
            RECORD: ocp.args.JsonSave(record),
        }
    )


def to_restore(abstract_state: Tree) -> ocp.args.Composite:
    """What a manager is to read: the whole state, to where `abstract_state` has it."""
    return ocp.args.Composite(**{STATE: _restored(abstract_state)})


def read_entries(step: PurePath, part: Tree) -> Tree:
    """Some entries of a step's state, to where `part` (`jax.ShapeDtypeStruct` with shardings) has them; no other array
    is read."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(step / STATE, args=_restored(part, partial_restore=True))


def leaves(tree: Tree, *, shared: bool) -> dict[str, str]:
    """Each leaf's dtype and shape by path, such as `{"params/w": "float32[4, 8]"}`; where every process writes what its
    devices hold, also which part of it that is, unless it is all: `"float32[4, 8] {0:2, 0:8}"`."""
    said = {path: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for path, leaf in paths(tree).items()}
    return said if shared else {path: said[path] + _own_part(leaf) for path, leaf in paths(tree).items()}


def is_part(said: str) -> bool:
    """Whether this, of `leaves`, is of a part."""
    return said.endswith("}")


def _own_part(leaf: Any) -> str:
    """Which part of an array the devices of this process hold; nothing if they hold all of it."""
    held = leaf.sharding.addressable_devices_indices_map(tuple(leaf.shape)).values()
    boxes = {tuple(axis.indices(size)[:2] for axis, size in zip(box, leaf.shape, strict=True)) for box in held}
    if sum(int(np.prod([end - begin for begin, end in box])) for box in boxes) == int(np.prod(leaf.shape)):
        return ""
    return " " + "".join(f"{{{', '.join(f'{begin}:{end}' for begin, end in box)}}}" for box in sorted(boxes))


def _restored(abstract: Tree, **more: Any) -> ocp.args.PyTreeRestore:
    targets = jax.tree.map(_target, abstract)
    arguments = ocp.checkpoint_utils.construct_restore_args(targets)
    return ocp.args.PyTreeRestore(item=targets, restore_args=arguments, **more)


def _target(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    assert leaf.sharding is not None, "restore needs a sharding for every leaf"
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _own_shards() -> Any:
    """Orbax's registry of what can be written, with arrays of which every process writes what its devices hold."""
    handler = ocp.type_handlers.ArrayHandler(primary_host=None, replica_id=None, use_replica_parallel=False)
    return ocp.type_handlers.create_type_handler_registry((jax.Array, handler))


class _Names(ocp.step.NameFormat):
    """Plain step numbers. Orbax is told of no earlier steps: it takes any folder with a number for one."""

    def build_name(self, step: int) -> str:
        return str(step)

    def find_all(self, base_path: object) -> Iterator[Any]:
        del base_path
        return iter(())

    def find_step(self, base_path: Any, step: int) -> Any:
        return ocp.step.standard_name_format().find_step(base_path, step)


def _said_once(record: logging.LogRecord) -> bool:
    """Drop the log of Orbax's errors that it also raises: one full disk is 500 lines of tracebacks from four threads,
    and from tasks that nobody waits for."""
    return record.exc_info is None or "orbax" not in record.pathname + record.getMessage()


def _without_late_answers(unraisable: Any) -> None:
    """Drop what TensorStore prints where a save has failed: an answer for each array, to a loop that is closed."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
