"""The model of any kept checkpoint of a run, as the run itself would have exported it."""

from pathlib import Path
from typing import Literal

import jax

from dpo_jax.config import run as config
from dpo_jax.errors import UserError
from dpo_jax.hf import checkpoint
from dpo_jax.hf.tokenizer import load_tokenizer
from dpo_jax.model.decoder import Model
from dpo_jax.model.settings import MeshSettings
from dpo_jax.model.weights import Weights
from dpo_jax.run import continuing, models, output, result, written
from dpo_jax.run.sources import find_models
from dpo_jax.training import checkpoints
from dpo_jax.training.settings import ReferenceSettings
from dpo_jax.training.step import ON_DISK, with_trained
from dpo_jax.trees import Params


def is_run(folder: Path) -> bool:
    """Whether this is the output folder of a run, and not of a model."""
    return (folder / output.CHECKPOINTS).is_dir() and not (folder / "config.json").exists()


def export_kept(
    folder: Path,
    target: Path,
    *,
    step: int | None = None,
    dtype: Literal["keep", "float32", "bfloat16"] | None = None,
    max_shard_bytes: int | None = None,
) -> int:
    """Write the model that a run had after a step as a Hugging Face folder; nothing in the run is touched.

    Args:
      folder: output folder of the run.
      target: folder to write; it must not exist yet, or be empty.
      step: of a checkpoint that is kept; None takes the newest.
      dtype: of the tensors; None takes the run's `export.dtype`.
      max_shard_bytes: as in `save_hf`.

    Returns:
      The step.

    Raises:
      UserError: the run has no such checkpoint, or it is damaged, or the model that the run began with is another.
    """
    known = output.recorded(folder)
    if not known:
        raise UserError(f"{folder} has no {output.RUN_FILE}, and no checkpoint that says what it is of; give a run")
    run = config.from_dump(known["settings"], str(folder / output.RUN_FILE))
    steps = checkpoints.kept_steps(folder / output.CHECKPOINTS)
    chosen = step if step is not None else max(steps, default=None)
    if chosen is None or chosen not in steps:
        raise UserError(
            f"{folder} has no checkpoint of step {chosen}; kept are {steps or 'none'}: see checkpoint.keep_every"
        )
    found = find_models(run.model, ReferenceSettings(mode="none"), known)
    tokenizer, scores = load_tokenizer(found.policy, run.data.template), run.objective.trains_reward_model
    found = found.resized(run.model, tokenizer)
    digest, was = models.weights_digest(found.policy), known["facts"].get(continuing.WEIGHTS)
    if was not in (None, digest):
        raise UserError(f"{found.policy}: {continuing.WEIGHTS} was {was} and is now {digest}; restore the model")
    mesh = models.make_mesh(MeshSettings(), run.model)
    how = {"scalar_head": scores, "rows": found.rows}
    spec, weights = models.load_policy(run.model, found.policy, mesh, run.optimizer.param_dtype, **how)
    weights = with_trained(weights, _trained(folder, chosen, weights))
    kept = dtype or written.KEEP[run.export.dtype]
    asked = run.export.model_copy(update={"dtype": "same" if kept == "keep" else kept})
    rounding = written.Rounding.of(asked, spec, found.policy, weights.trained, run.seed)
    model = Model(spec, rounding.at_random(weights).params)
    ending = models.check_ending(found, tokenizer, run.export, scalar_head=scores)
    card, files = result.described(run, found, ending, step=chosen)
    options = {"card": card, "extra_files": files, "dtype": kept, "max_shard_bytes": max_shard_bytes}
    checkpoint.save_hf(model, target, found.policy, **options)
    return chosen


def _trained(folder: Path, step: int, weights: Weights) -> Params:
    """The trained weights of a step, where those that the model began with are; no other part of its state is read."""
    name = ON_DISK["trained"]
    wanted = {
        name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), weights.trained)
    }
    for leaf in jax.tree.leaves(weights.trained):  # or they would stand beside those that are read
        leaf.delete()
    return checkpoints.read_part(folder / output.CHECKPOINTS, step, wanted)[name]
