"""AdamW, its schedule, and the table that says which leaves decay."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpo_jax import trees
from dpo_jax.training.settings import OptimizerSettings

DECAY: tuple[tuple[str, bool], ...] = (
    (r".*/kernel", True),
    (r"(embed|head|positions|inputs)/embedding", True),
    (r".*/bias", False),
    (r".*norm/scale", False),
    (r".*/(sinks|decay_rate|decay_bias|scalar)", False),
    (r".*/router/(correction|channel_scale|expert_scale)", False),
    (r".*/mlp/act/(positive|negative|beta|eps)", False),
)
"""Which leaves weight decay acts on: matrices and embeddings, as in transformers; not biases, norm scales or other
vectors."""


def schedule(settings: OptimizerSettings, steps: int) -> optax.Schedule:
    """Learning rate of each step, counted from 0: a linear rise from 0 over the warm-up, then the chosen fall to 0."""
    warmup = warmup_steps(settings, steps)
    peak, rest = settings.learning_rate, max(steps - warmup, 1)
    match settings.schedule:
        case "constant":
            after = optax.constant_schedule(peak)
        case "linear":
            after = optax.linear_schedule(peak, 0.0, rest)
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def warmup_steps(settings: OptimizerSettings, steps: int) -> int:
    """Steps of warm-up: as given, or the given share of all steps, rounded up."""
    if settings.warmup_steps is not None:
        return settings.warmup_steps
    return int(-(-steps * settings.warmup_fraction // 1))


def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
    """Clipping, Adam's moments in float32, and decoupled decay; the caller multiplies by minus the learning rate."""
    parts = [] if settings.clip_norm is None else [optax.clip_by_global_norm(settings.clip_norm)]
    parts.append(optax.scale_by_adam(settings.beta1, settings.beta2, settings.epsilon))
    if settings.weight_decay:
        parts.append(optax.add_decayed_weights(settings.weight_decay, mask=decay_mask))
    return optax.chain(*parts)


def decay_mask(params: Any) -> Any:
    """True for each leaf that decays; an unclaimed leaf is an error."""
    return trees.map_by_rules(params, DECAY, table="weight decay")


def descend(params: Any, directions: Any, learning_rate: jax.Array) -> Any:
    """`params - learning_rate * directions`, leaf by leaf."""
    return jax.tree.map(lambda p, d: p - jnp.asarray(learning_rate, p.dtype) * d, params, directions)
