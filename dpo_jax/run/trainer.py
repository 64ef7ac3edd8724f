"""The compiled step of a run, the state it moves, and the batches it takes."""

import time
from collections.abc import Iterator
from typing import Any

import jax

from dpo_jax import sharding
from dpo_jax.data.batch import Batch
from dpo_jax.data.batches import Batches, Made, prefetch
from dpo_jax.data.workers import processes
from dpo_jax.model.weights import Weights
from dpo_jax.preference.loss import TrainingObjective
from dpo_jax.reporting.journal import Journal
from dpo_jax.run.reference import Reference
from dpo_jax.training.optimizer import make_optimizer, schedule, state_shardings, to_float32
from dpo_jax.training.settings import OptimizerSettings
from dpo_jax.training.step import State, fresh_state, make_step, with_trained
from dpo_jax.trees import Params

CORES_A_PROGRAM = 4
"""Cores for each program that is compiled at a time, as XLA itself uses several. A guess: more than two were not at
hand, and on two busy ones the quickstart's four shapes side by side took 19 % longer, and half as much memory again."""


class Trainer:
    """The compiled step, the weights it does not move, and the batches it takes.

    Attributes:
      objective: what is minimised.
      batches: of every step.
      mesh: where it runs.
      frozen: the weights that are not trained; a `Weights` without a trained tree.
      reference: frozen weights of a live reference, or None.
      moving: how the reference moves, or None.
      abstract: shapes and dtypes of the state.
      shardings: of the state.
    """

    def __init__(
        self,
        objective: TrainingObjective,
        weights: Weights,
        batches: Batches,
        reference: Reference,
        mesh: jax.sharding.Mesh,
        *,
        optimizer: OptimizerSettings,
        lr_ratio: float = 1.0,
        seed: int = 0,
    ):
        """Set up; nothing is compiled yet and the state is only described. A reference that moves becomes state.

        `lr_ratio` is of an adapter (see `make_optimizer`).
        """
        self.objective, self.batches, self.mesh, self.moving = objective, batches, mesh, reference.moving
        self.frozen = with_trained(weights, {})
        self._start = reference.weights if self.moving else None
        self.reference = None if self.moving else reference.weights
        self.optimizer = make_optimizer(optimizer, lr_ratio=lr_ratio)
        moving = jax.eval_shape(lambda weights: to_float32(weights.params), weights) if self.moving else None
        self.abstract = jax.eval_shape(self._fresh, weights.trained, moving)
        self.shardings = self._state_shardings()
        rate = schedule(optimizer, batches.steps)
        step = make_step(objective, self.optimizer, rate, steps=batches.steps, moving=self.moving, seed=seed)
        self._step = sharding.Compiled(step, mesh, out_shardings=(self.shardings, None), donate=(0,))

    def step(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        """One optimizer step; the old state is consumed."""
        return self._step(state, self.frozen, self.reference, batch)

    def weights(self, state: State) -> Weights:
        """The whole model's."""
        return with_trained(self.frozen, state["trained"])

    @property
    def recompilations(self) -> int:
        """Compilations since `compile`; 0 is what a run wants."""
        return self._step.recompilations

    def fresh(self, trained: Params) -> State:
        """The state before the first step; weights and a moving reference are the given arrays themselves."""
        given = {"trained": trained} | ({"reference": self._start} if self.moving else {})
        rest = jax.jit(
            lambda p: {k: v for k, v in self._fresh(p, None).items() if k not in given},
            out_shardings={k: v for k, v in self.shardings.items() if k not in given},
        )(trained)
        self._start = None
        return {**given, **rest}

    def _fresh(self, trained: Params, reference: Params | None) -> State:
        remembers, scaled = self.objective.remembers, self.objective.compute_dtype == "float16"
        return fresh_state(trained, self.optimizer, reference=reference, remembers=remembers, scaled=scaled)

    def target(self) -> Any:
        """Shapes, dtypes and shardings of the state, for restoring it."""
        return sharding.shape_of(self.abstract, self.shardings)

    def compile(self, journal: Journal) -> None:
        """Compile the step for each shape of the run, one at a time for every `CORES_A_PROGRAM` cores."""
        dummies = list(self.batches.dummies())
        signatures = [self._arguments(batch) for batch in dummies]
        began = time.perf_counter()
        shapes = " and ".join(f"{rows} x {slots}" for rows, slots in (batch.tokens.shape[2:] for batch in dummies))
        what, number = "compiling the training step", f"{len(dummies)} (rows x slots: {shapes})"
        journal.phase(f"{what} 1/{number}")
        for done in self._step.prepare(signatures, workers=max(1, processes(None) // CORES_A_PROGRAM)):
            journal.phase(f"{what} {min(done + 1, len(dummies))}/{number}")
        journal.note(f"compiled in {time.perf_counter() - began:.1f} s")

    def lower(self, dummy: Batch) -> jax.stages.Lowered:
        """The step for batches of this shape, lowered but not compiled."""
        return self._step.lower(*self._arguments(dummy))

    def _arguments(self, dummy: Batch) -> tuple[Any, Any, Any, Any]:
        """Shapes, dtypes and shardings of what the step takes."""
        batch = sharding.shape_of(dummy, sharding.batch_shardings(dummy, self.mesh))
        return self.target(), self.frozen, self.reference, batch

    def placed_batches(self, first: int, until: int) -> Iterator[Made]:
        """Batches from a step on, and before another, on their devices, made ahead by a thread."""
        return prefetch(lambda step: sharding.place(self.batches.at(step), self.mesh), range(first, until))

    def _state_shardings(self) -> Any:
        whole = sharding.replicated(self.mesh)
        trained = sharding.param_shardings(self.abstract["trained"], self.mesh)
        moments = state_shardings(self.abstract["optimizer"], self.abstract["trained"], trained, whole)
        found = {name: whole for name in self.abstract} | {"trained": trained, "optimizer": moments}
        if self.moving:
            found["reference"] = sharding.param_shardings(self.abstract["reference"], self.mesh)
        return found
