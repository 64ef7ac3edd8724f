"""What makes the settings of a run contradict each other, and what a run as it stands would ignore."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from dpo_jax.errors import nearest
from dpo_jax.evaluation.settings import JUDGE
from dpo_jax.model.settings import SHAPE, AdapterSettings
from dpo_jax.reporting.metrics import AGAINST_REFERENCE, BETTER, OF_ANSWERS, held_out_of, recorded
from dpo_jax.training.settings import UNUSED

if TYPE_CHECKING:
    from dpo_jax.config.run import Run

ADAPTER_RATE = 5e-6
"""Learning rate of adapters where none is given: TRL's advice, ten times that of a whole model."""
LOW_ADAPTER_RATE = 2e-6
"""Below this an adapter hardly moves in a run of the usual length, and that is said."""


def only_merged(run: "Run") -> str | None:
    """Why the result of an adapter's run can only be written as a whole model."""
    causes = {
        "adapter.dora": run.adapter.dora,
        "adapter.modules_to_save": run.adapter.modules_to_save != (),
        "a reward model": run.objective.trains_reward_model,
    }
    return next((name for name, there in causes.items() if there), None)


def measures(run: "Run") -> bool:
    """Whether anything is measured on held-out data."""
    return run.data.holds_out or run.evaluation.answers is not None


USUAL = {"acc": "rewards/accuracies", "margin": "rewards/margins", "loss": "loss", "perplexity": "loss"}
"""What is likely to be meant by a metric whose name has this in it, and is none of those that there are."""


def best_problem(run: "Run") -> str | None:
    """What is wrong with the metric that the best checkpoint is to be chosen by: `checkpoint.best: remedy`."""
    if run.checkpoint.best is None:
        return None
    held_out, metric = held_out_of(run.checkpoint.best)
    sets = [name for name in run.data.eval_sets if name]
    names = [metric if metric in OF_ANSWERS else recorded(metric) for metric in BETTER]
    names += [recorded(metric, name) for name in sets for metric in BETTER if metric not in OF_ANSWERS]
    if run.checkpoint.best not in [*names, *map(recorded, OF_ANSWERS)]:
        in_set = held_out if held_out in sets else ""
        usual = (recorded(name, in_set) for word, name in USUAL.items() if word in metric.lower())
        near = nearest(run.checkpoint.best, names, 0.8) or next(usual, None) or nearest(run.checkpoint.best, names)
        listed = (
            "choose one of the evaluations, such as eval_loss, eval_rewards/accuracies, eval/NAME/loss or pass_rate"
        )
        return f"checkpoint.best: no such metric; {f'did you mean {near}?' if near else listed}"
    if metric == "pass_rate" and run.evaluation.answers is None:
        return "checkpoint.best: is measured on answers to evaluation.answers, which is not given"
    if metric == "win_rate" and run.evaluation.judge is None:
        return "checkpoint.best: is what evaluation.judge says, which is not given"
    if metric not in OF_ANSWERS and not run.data.holds_out:
        return "checkpoint.best: is measured on held-out pairs; give data.eval or data.eval_fraction"
    scheduled = any(term.settings.get("beta_end") is not None for term in run.objective.terms)
    if metric.startswith(AGAINST_REFERENCE) and (scheduled or run.reference.update_every is not None):
        what = "objective.beta_end" if scheduled else "reference.update_every"
        return f"checkpoint.best: means another thing at each step under {what}; choose eval_logps/accuracies"
    return None


RULES: tuple[tuple[str, Callable[["Run"], bool], str], ...] = (
    (
        "steps",
        lambda r: r.steps is not None and r.epochs is not None,
        "give steps or epochs, not both: null turns one off, as steps=null",
    ),
    (
        "reference.mode",
        lambda r: r.objective.compares is False and r.reference.mode != "none",
        "the objective compares with no reference; leave it out, or set reference.mode: none",
    ),
    (
        "reference.mode",
        lambda r: r.objective.compares is True and r.reference.mode == "none",
        "the objective compares with a reference; set cached or live, or objective.reference_free: true if it may",
    ),
    (
        "reference.mode",
        lambda r: r.reference.update_every is not None and r.reference.mode == "cached",
        "a reference that moves cannot be cached; set reference.mode: live",
    ),
    (
        "evaluation.answers",
        lambda r: r.objective.trains_reward_model and r.evaluation.answers is not None,
        "a reward model answers nothing; leave it out",
    ),
    (
        "optimizer.warmup_steps",
        lambda r: r.steps is not None and (r.optimizer.warmup_steps or 0) >= r.steps,
        "must be less than steps",
    ),
    (
        "model.freeze",
        lambda r: r.adapter.used and r.model.freeze != (),
        "an adapter trains nothing of the model but adapter.modules_to_save; leave it out",
    ),
    (
        "model.quantise",
        lambda r: r.model.quantise is not None and not r.adapter.used,
        "only what is not trained can be kept in few bits; give adapter.rank, or leave it out",
    ),
    (
        "optimizer.param_dtype",
        lambda r: r.adapter.used and r.optimizer.param_dtype != "float32",
        "the factors of an adapter are float32; leave it out",
    ),
    (
        "reference.update_every",
        lambda r: r.adapter.used and r.reference.update_every is not None,
        "the reference of an adapter stays, as in TRL; leave it out, or train the whole model",
    ),
    (
        "model.resize_embedding",
        lambda r: r.adapter.used and r.model.resize_embedding,
        "an adapter leaves the embedding as it is; leave it out, or train the whole model",
    ),
    (
        "export.kind",
        lambda r: r.adapter.used and r.export.kind in ("adapter", "both") and only_merged(r) is not None,
        "an adapter's folder that every server reads holds plain factors only; with adapter.dora, "
        "adapter.modules_to_save or a reward model set export.kind: merged",
    ),
    ("data.train", lambda r: r.data.train == (), "must name at least one file, folder or data set"),
    (
        "data.eval",
        lambda r: r.data.eval == {} or () in r.data.eval_sets.values(),
        "must name at least one file, folder or data set, or be left out",
    ),
    (
        "data.eval_fraction",
        lambda r: r.data.eval is not None and r.data.eval_fraction is not None,
        "data.eval has held-out pairs already; keep one of the two: null turns one off, as data.eval=null",
    ),
    (
        "checkpoint.best",
        lambda r: r.checkpoint.best is not None and r.evaluation.every is None and measures(r),
        "nothing is measured between the start and the end; give evaluation.every",
    ),
    (
        "evaluation.patience",
        lambda r: r.evaluation.patience is not None and r.checkpoint.best is None,
        "waits for nothing; say with checkpoint.best which metric is to become better",
    ),
    (
        "checkpoint.keep_every",
        lambda r: r.checkpoint.keep_every is not None and isinstance(r.checkpoint.every, str),
        "counts steps; give checkpoint.every in steps as well, of which it is a multiple",
    ),
    (
        "checkpoint.keep_every",
        lambda r: isinstance(r.checkpoint.every, int) and (r.checkpoint.keep_every or 0) % r.checkpoint.every != 0,
        "must be a multiple of checkpoint.every; there are no checkpoints in between",
    ),
    ("output", lambda r: os.path.abspath(r.output) == os.path.abspath(r.model.path), "must differ from model.path"),
)
"""What makes two settings contradict each other: the key that is at fault, the test, the remedy."""

IGNORED: tuple[tuple[str, Callable[["Run"], bool], str], ...] = (
    ("reference.path", lambda r: r.reference.mode == "none", "reference.mode none reads no reference; leave it out"),
    (
        "reference.update_every",
        lambda r: r.reference.mode == "none",
        "reference.mode none has no reference that could move; leave it out",
    ),
    (
        "reference.update_rate",
        lambda r: r.reference.update_every is None,
        "nothing moves without reference.update_every; leave it out",
    ),
    ("log.token_statistics", lambda r: r.objective.trains_reward_model, "a reward model has no tokens; leave it out"),
    (
        "optimizer.warmup_fraction",
        lambda r: r.optimizer.warmup_steps is not None,
        "give warmup_steps or warmup_fraction, not both: optimizer.warmup_steps=null turns that one off",
    ),
    *UNUSED,
    *(
        (f"adapter.{name}", lambda r: not r.adapter.used, "nothing is adapted; give adapter.rank, or adapter.path")
        for name in AdapterSettings.model_fields
        if name not in ("rank", "path")
    ),
    *(
        (f"adapter.{name}", lambda r: r.adapter.path is not None, "adapter.path has its own; leave it out")
        for name in SHAPE
    ),
    (
        "evaluation.every",
        lambda r: not measures(r),
        "nothing to evaluate; give data.eval, data.eval_fraction or evaluation.answers",
    ),
    (
        "reference.adapter",
        lambda r: r.adapter.path is None or r.reference.mode == "none" or r.reference.path is not None,
        "there is no adapter.path whose start could be the reference; leave it out",
    ),
    (
        "export.kind",
        lambda r: not r.adapter.used,
        "the whole model is trained and written; leave it out, or give adapter.rank",
    ),
    (
        "export.rounding",
        lambda r: r.adapter.used,
        "a merged model is rounded to nearest, and an adapter not at all; leave it out",
    ),
    (
        "evaluation.max_new_tokens",
        lambda r: r.evaluation.answers is None,
        "nothing is generated without evaluation.answers; leave it out",
    ),
    (
        "evaluation.judge",
        lambda r: r.evaluation.answers is None,
        "there are no answers to compare without evaluation.answers; leave it out",
    ),
    *(
        (f"evaluation.judge_{name}", lambda r: r.evaluation.judge is None, "nobody judges without evaluation.judge")
        for name in JUDGE
    ),
)
"""What a run as it stands would ignore: giving one of these is an error, and `config.run.dump` leaves them out."""
