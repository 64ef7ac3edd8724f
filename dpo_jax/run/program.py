"""A run's own training step, compiled without weights for whatever devices there are, and what it takes."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import sharding
from dpo_jax.config.run import Run
from dpo_jax.data.batch import Batch
from dpo_jax.data.batches import Batches
from dpo_jax.data.encode import encode
from dpo_jax.data.encoded import Encoded
from dpo_jax.data.sources import is_here
from dpo_jax.data.split import split
from dpo_jax.errors import UserError
from dpo_jax.hf.tensors import SIDE_FILES
from dpo_jax.hf.tokenizer import load_tokenizer
from dpo_jax.model.decoder import cast
from dpo_jax.model.weights import Weights
from dpo_jax.objectives.terms import data_of
from dpo_jax.planning import costs, hlo, memory
from dpo_jax.planning.costs import Load
from dpo_jax.planning.estimate import Moved
from dpo_jax.planning.lengths import COMPLETION_TOKENS, PROMPT_TOKENS, UNITS_PER_STEP, made_up
from dpo_jax.preference.loss import TrainingObjective
from dpo_jax.preference.micro_batches import micro_batch
from dpo_jax.run import models
from dpo_jax.run.data import Packing, examples, number_of_steps
from dpo_jax.run.fitting import fitted, needed
from dpo_jax.run.policy import Policy, policy_of
from dpo_jax.run.reference import Reference, held_as, moving_reference
from dpo_jax.run.sources import Sources, find_models
from dpo_jax.run.trainer import Trainer
from dpo_jax.training.settings import ReferenceSettings

CONFIG_ONLY = ("config.json",)
OWN_DATA = "those of data.train"
"""What the data of a plan are where they are the run's own."""
LOOKED_AT = 4
"""Steps whose batches are made to see what a step has to do."""


@dataclasses.dataclass(frozen=True)
class PlannedStep:
    """A run's step on a mesh, described but not compiled."""

    objective: TrainingObjective
    trainer: Trainer
    dummy: Batch
    load: Load
    micro_batches: float
    steps: int
    """Of the whole run."""
    shapes: tuple[tuple[int, int], ...]
    """Rows and slots of each shape that steps come in; `dummy` has the one with the most slots."""

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """Where it runs."""
        return self.trainer.mesh

    @property
    def packed(self) -> Batch:
        """Shapes of one micro-batch."""
        return jax.eval_shape(lambda batch: micro_batch(batch, 0), self.dummy)


def find_config(run: Run, mesh: jax.sharding.Mesh) -> Sources:
    """Folders with at least the `config.json` of the run's models.

    Raises:
      UserError: there is none, or training would refuse the models.
    """
    needed = (*CONFIG_ONLY, *SIDE_FILES) if run.model.resize_embedding else CONFIG_ONLY
    sources = find_models(run.model, run.reference, {}, needed, adapter=run.adapter)
    if run.model.resize_embedding:
        sources = sources.resized(run.model, load_tokenizer(sources.policy))
    models.check_models(
        sources,
        mesh,
        model=run.model,
        reference=run.reference,
        max_length=run.data.max_length,
        scalar_head=run.objective.trains_reward_model,
    )
    return sources


def read_data(run: Run, sources: Sources) -> Encoded:
    """The run's own data, tokenised; nothing is left behind, unless the run names a cache.

    Raises:
      UserError: they, or the tokenizer, cannot be read.
    """
    tokenizer = load_tokenizer(sources.policy, run.data.template)
    with tempfile.TemporaryDirectory() as folder:
        found, _ = encode(run.data.train, tokenizer, run.data, run.data.cache or folder, first=run.data.first)
    if run.data.eval_fraction is not None:
        found = split(found, run.data.eval_fraction, run.seed).train
    return examples(found, run.objective.terms, run.data.max_length)


def data_for(
    run: Run, sources: Sources, lengths: tuple[int | None, int | None] = (None, None)
) -> tuple[Encoded, str, Run]:
    """Tokenised pairs, what they are in words, and the run that goes over them.

    The run's own, if no `lengths` (mean tokens of prompts and of completions) are given and its files are here; else
    made-up ones, and the run is then a few steps long.
    """
    names = (run.data.train,) if isinstance(run.data.train, str) else run.data.train
    if lengths == (None, None) and all(map(is_here, names)):
        return read_data(run, sources), OWN_DATA, run
    if data_of(run.objective.terms) == "rankings":
        raise UserError(
            f"objective.name: {run.objective.name} takes rankings, and made-up data are pairs; give data.train files "
            "that are here"
        )
    prompt, completion = lengths[0] or PROMPT_TOKENS, lengths[1] or COMPLETION_TOKENS
    what = f"made up, prompts of {prompt} and completions of {completion} tokens on average"
    if lengths == (None, None):
        what += f", as data.train {names[0]} is not here"
    sizes = {"prompt_tokens": prompt, "completion_tokens": completion, "max_length": run.data.max_length}
    pairs = examples(made_up(run.batch.pairs, **sizes), run.objective.terms, run.data.max_length)
    return pairs, what, run.model_copy(update={"steps": UNITS_PER_STEP, "epochs": None})


def describe(
    run: Run,
    sources: Sources,
    encoded: Encoded,
    mesh: jax.sharding.Mesh,
    *,
    attention_length: int | None = None,
    room: int | None = None,
) -> PlannedStep:
    """The step that `train` would compile for this data on this mesh: the same functions, with shapes for arrays.

    Args:
      run: its settings.
      sources: from `find_config`.
      encoded: from `read_data`, or made up.
      mesh: of any devices, virtual ones too.
      attention_length: lay rows out as where attention costs this much (see `run.data`); None is that of the mesh.
      room: bytes that the step may take of a device, for `model.remat: auto`; None keeps as much as it can.
    """
    spec = models.spec_of(sources.policy, sources.rows, scalar_head=run.objective.trains_reward_model)
    terms = run.objective.terms
    policy = policy_of(run, sources, mesh)
    weights, how = policy.abstract(mesh), {"statistics": run.log.token_statistics, "dropout": policy.dropout}
    objective = models.make_objective(run.model, terms, spec, weights, mesh, **how)
    steps = number_of_steps(encoded.num_pairs, run.batch.pairs, steps=run.steps, epochs=run.epochs)
    reference = _reference(run.reference, policy, weights, objective, mesh)
    packing = Packing.of(run.batch, run.data.max_length, terms, mesh, attention_length=attention_length)
    batches = packing.steps(encoded, spec, steps, shuffle=run.data.shuffle, seed=run.seed)
    how = {"optimizer": run.optimizer, "lr_ratio": run.adapter.lr_ratio, "seed": run.seed}
    trainer = fitted(
        lambda objective: Trainer(objective, weights, batches, reference, mesh, **how),
        objective,
        run.model.remat,
        room,
        lambda line: None,
    )
    dummies = sorted(batches.dummies(), key=lambda dummy: -dummy.tokens.size)
    made = _some(batches)
    load = costs.mean_load([costs.load_of(batch, costs.windows_of(spec)) for batch in made])
    micro = float(np.mean([int(batch.micro_batches) for batch in made]))
    shapes = tuple(dummy.tokens.shape[2:] for dummy in dummies)
    return PlannedStep(trainer.objective, trainer, dummies[0], load, micro, steps, shapes)


def _some(batches: Batches) -> list[Batch]:
    return [batches.at(int(step)) for step in np.unique(np.linspace(0, batches.steps - 1, LOOKED_AT).astype(int))]


def _reference(
    settings: ReferenceSettings,
    policy: Policy,
    weights: Weights,
    objective: TrainingObjective,
    mesh: jax.sharding.Mesh,
) -> Reference:
    """Shapes of a live reference's weights."""
    moving = moving_reference(settings)
    if settings.mode != "live":
        return Reference(moving=moving)
    dtype = jnp.dtype(held_as(moving, objective))
    params = jax.eval_shape(lambda weights: cast(policy.reference(weights, settings.adapter), dtype), weights)
    return Reference(weights=sharding.shape_of(params, sharding.param_shardings(params, mesh)), moving=moving)


# ---------------------------------------------------------------------------------------------- what it takes


def predicted(step: PlannedStep) -> dict[str, int]:
    """Bytes of one device by item, at the step's fullest moment."""
    return needed(step.trainer, step.dummy)


def reported(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes of one device as the compiler has planned them: arguments, results, what of them is shared, temporaries."""
    stats = compiled.memory_analysis()
    if stats is None:
        raise UserError("the compiler of this platform reports no memory; plan for another with python -m dpo_jax.plan")
    sizes = {name: int(getattr(stats, f"{name}_size_in_bytes")) for name in ("argument", "output", "alias", "temp")}
    return sizes | {"peak": sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"]}


def compile_step(step: PlannedStep) -> tuple[jax.stages.Compiled, str]:
    """The compiled step, and the text of its program for one device (see hlo.py)."""
    return compile_with_text(step.trainer.lower(step.dummy), step.mesh.size)


def compile_with_text(lowered: jax.stages.Lowered, devices: int) -> tuple[jax.stages.Compiled, str]:
    """A compiled function, and the text of its program for one of so many devices, as the partitioner leaves it.

    Raises:
      RuntimeError: the compiler left no such text; then its name for the pass has changed.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning", "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        if devices == 1:  # nothing to partition
            return compiled, lowered.as_text(dialect="hlo")
        texts = sorted(Path(folder).glob("*after_spmd-partitioning*.txt"))
        if not texts:
            raise RuntimeError("XLA wrote no program after its pass spmd-partitioning; was it renamed?")
        return compiled, texts[-1].read_text()


def program_of(step: PlannedStep, text: str) -> hlo.Program:
    """The step's program, its loop over micro-batches counted as often as a step runs it on average."""
    return hlo.parse(text, unknown=step.micro_batches)


def moved_by(step: PlannedStep) -> Moved:
    """What the traffic to a device's memory is made of."""
    weights = step.trainer.weights(step.trainer.abstract)
    params = jax.eval_shape(lambda weights: weights.params, weights)
    places = sharding.param_shardings(params, step.mesh)
    narrow = jax.eval_shape(functools.partial(cast, dtype=jnp.dtype(step.objective.compute_dtype)), params)
    shard = memory.per_device(narrow, places)
    kept = memory.activation_bytes(step.objective, step.packed, step.mesh, remat="none")
    return Moved(shard * sharding.weight_shards(step.mesh), shard, memory.per_device(params, places), kept)
