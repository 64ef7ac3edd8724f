"""What a step takes of a device's memory, and which policy of remat the device has room for."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from dpo_jax import sharding, trees
from dpo_jax.data.batch import Batch
from dpo_jax.files import size_text
from dpo_jax.model import remat
from dpo_jax.model.settings import AUTO
from dpo_jax.planning import memory
from dpo_jax.preference.loss import TrainingObjective
from dpo_jax.preference.micro_batches import micro_batch
from dpo_jax.run.trainer import Trainer

SHARE = 0.95
"""Of a device's memory, which a step may fill: the rest is for what a prediction leaves out, and for gaps."""


def needed(trainer: Trainer, dummy: Batch) -> dict[str, int]:
    """Bytes of one device by item, at the fullest moment of a step with a batch of this shape."""
    mesh, packed = trainer.mesh, jax.eval_shape(lambda batch: micro_batch(batch, 0), dummy)
    found = memory.state_items(trainer.abstract, trainer.shardings)
    if trainer.reference is not None:
        shared, places = trees.paths(trainer.frozen.frozen), sharding.param_shardings(trainer.reference, mesh)
        own = {path: leaf for path, leaf in trees.paths(trainer.reference).items() if path not in shared}
        found["reference"] = memory.per_device(own, {path: trees.paths(places)[path] for path in own})
    found["batch"] = memory.per_device(dummy, sharding.batch_shardings(dummy, mesh))
    if frozen := trainer.frozen.frozen:
        found["frozen parameters"] = memory.per_device(frozen, sharding.param_shardings(frozen, mesh))
    weights, several = trainer.weights(trainer.abstract), dummy.real.shape[0] > 1
    return found | memory.step_items(trainer.objective, weights, packed, mesh, several=several)


def room_of(mesh: jax.sharding.Mesh) -> int | None:
    """Bytes that a step may fill of one of these devices; None where they do not say what they have."""
    told = mesh.local_devices[0].memory_stats() or {}
    return int(SHARE * told["bytes_limit"]) if "bytes_limit" in told else None


def fitted(
    make: Callable[[TrainingObjective], Trainer],
    objective: TrainingObjective,
    asked: str,
    room: int | None,
    say: Callable[[str], Any] = print,
) -> Trainer:
    """The trainer whose step keeps as much as there is room for, where `model.remat` asks for that.

    It is the same for the same settings, data and kind of device: a run that resumes keeps what it kept before.

    Args:
      make: the trainer of an objective; nothing of it is computed.
      objective: the objective, which keeps what was asked for, or by `auto` as much as possible.
      asked: `model.remat`.
      room: bytes of a device, see `room_of`.
      say: takes a line where less is kept than by default.
    """
    if asked != AUTO or room is None:
        return make(objective)
    made: dict[str, tuple[Trainer, int]] = {}

    def bytes_of(policy: str) -> int:
        execution = dataclasses.replace(objective.execution, remat=policy)
        trainer = make(dataclasses.replace(objective, execution=execution))
        dummy = max(trainer.batches.dummies(), key=lambda dummy: dummy.tokens.size)
        made[policy] = trainer, sum(needed(trainer, dummy).values())
        return made[policy][1]

    policy = remat.fitting(bytes_of, room)
    if policy != objective.execution.remat:
        takes = ", ".join(f"{name} {size_text(taken)}" for name, (_, taken) in made.items())
        say(f"model.remat: {policy} (a step may take {size_text(room)} of each device; by prediction it takes {takes})")
    return made[policy][0]
