"""The model of any kept checkpoint of a run, as the run itself would have exported it."""

from pathlib import Path
from typing import Literal

from dpo_jax.config import run as config
from dpo_jax.errors import UserError
from dpo_jax.hf.tokenizer import load_tokenizer
from dpo_jax.model.settings import MeshSettings
from dpo_jax.run import continuing, models, output, result
from dpo_jax.run.adapted import Text
from dpo_jax.run.checkpoints import trained_at
from dpo_jax.run.policy import policy_of
from dpo_jax.run.sources import find_models
from dpo_jax.training import steps
from dpo_jax.training.settings import ReferenceSettings
from dpo_jax.training.step import with_trained


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
      step: of a checkpoint that is kept; None takes the one that the run has exported as its best, or the newest.
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
    place = steps.at(folder / output.CHECKPOINTS)
    kept = steps.kept(place)
    best = (known.get("best") or {}).get("step")
    newest = best if best in kept else max(kept, default=None)
    chosen = newest if step is None else step
    if chosen is None or chosen not in kept:
        raise UserError(
            f"{folder} has no checkpoint of step {chosen}; kept are {kept or 'none'}: see checkpoint.keep_every"
        )
    found = find_models(run.model, ReferenceSettings(mode="none"), known, adapter=run.adapter)
    tokenizer = load_tokenizer(found.policy, run.data.template)
    found = found.resized(run.model, tokenizer)
    digest, was = models.weights_digest(found.policy), known["facts"].get(continuing.WEIGHTS)
    if was not in (None, digest):
        raise UserError(f"{found.policy}: {continuing.WEIGHTS} was {was} and is now {digest}; restore the model")
    mesh = models.make_mesh(MeshSettings(), run.model)
    policy = policy_of(run, found, mesh)
    weights = policy.load(mesh, run.seed)
    weights = with_trained(weights, trained_at(place, chosen, weights))
    ending = models.check_ending(found, tokenizer, run.export, scalar_head=run.objective.trains_reward_model)
    card, files = result.described(run, found, ending, known.get("changed", []), step=chosen)
    options = {} if max_shard_bytes is None else {"max_shard_bytes": max_shard_bytes}
    text = Text(card, files, run.model.path)
    result.write(run.export_kinds[0], run, policy, weights, target, text, dtype=dtype, **options)
    return chosen
