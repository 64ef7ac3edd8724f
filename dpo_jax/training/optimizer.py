"""The optimizers, their schedule, where their state lives, and the table that says which leaves decay."""

import math

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, BFloat16, Float32, PRNGKeyArray

from dpo_jax import trees
from dpo_jax.errors import UserError
from dpo_jax.training.settings import OptimizerSettings
from dpo_jax.trees import Params, Tree

DECAY: tuple[tuple[str, bool], ...] = (
    (r".*/kernel", True),
    (r".*/lora/(a|b|magnitude)", True),  # magnitudes too, as transformers' Trainer decays all that no name excepts
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
    """Learning rate of each step, counted from 0: a rise over the W steps of the warm-up, then the chosen fall to 0.

    Step i of the warm-up has `peak (i + 1) / (W + 1)`: no step has a rate of 0, which would learn nothing.
    """
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
    return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), after], [warmup])


def warmup_steps(settings: OptimizerSettings, steps: int) -> int:
    """Steps of warm-up: as given, or the given share of all steps, rounded up, but for the last one."""
    if settings.warmup_steps is not None:
        return settings.warmup_steps
    return min(math.ceil(steps * (settings.warmup_fraction or 0.0)), steps - 1)


def same_rates(settings: OptimizerSettings, steps: int, other: int, first: int) -> bool:
    """Whether the `first` steps of a run of `steps` and of one of `other` have the same learning rates."""
    made = jnp.arange(first)
    return bool(jnp.array_equal(schedule(settings, steps)(made), schedule(settings, other)(made)))


def check_warmup(settings: OptimizerSettings, steps: int) -> None:
    """Whether the rate reaches its peak.

    Raises:
      UserError: the warm-up is as long as the run.
    """
    if warmup_steps(settings, steps) >= steps:
        raise UserError(
            f"optimizer.warmup_steps: {settings.warmup_steps} is no less than the {steps} steps of the run, which "
            "would never have its learning rate; lower it"
        )


def make_optimizer(settings: OptimizerSettings, *, lr_ratio: float = 1.0) -> optax.GradientTransformationExtraArgs:
    """Clipping, the optimizer's direction, and decoupled decay; the caller multiplies by minus the learning rate.

    Its `update` wants the norm of all gradients, `norm=`. If that is finite, so are directions and moments: no gradient
    is larger, its square is finite too, and no denominator is 0.

    `lr_ratio` is the learning rate of an adapter's B over that of everything else (LoRA+, arXiv:2402.12354).

    Gradients and parameters are given to it in float32 whatever the parameters are kept in (see `to_float32`).
    Adafactor (arXiv:1804.04235) is without momentum, relative steps and scaling by parameters; a stack of layers is
    clipped as one block.
    """
    parts: list[optax.GradientTransformation] = []
    if settings.clip_norm is not None:
        parts.append(clipped(settings.clip_norm))
    match settings.name:
        case "adamw":
            first = settings.moment_dtype
            parts.append(optax.scale_by_adam(settings.beta1, settings.beta2, settings.epsilon, mu_dtype=first))
        case "lion":
            parts.append(optax.scale_by_lion(settings.beta1, settings.beta2, mu_dtype=settings.moment_dtype))
        case "adafactor":
            parts += [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
    if settings.weight_decay:
        parts.append(optax.add_decayed_weights(settings.weight_decay, mask=decay_mask))
    if lr_ratio != 1.0:
        parts.append(optax.stateless(lambda updates, _: _faster(updates, lr_ratio)))
    return optax.chain(*parts)


def _faster(directions: Tree, ratio: float) -> Params:
    """The directions with those of each B times `ratio`."""
    table = trees.paths(directions)
    return trees.from_paths({path: x * ratio if path.endswith("/lora/b") else x for path, x in table.items()})


def clipped(largest: float) -> optax.GradientTransformationExtraArgs:
    """Gradients times `min(1, largest / norm)`, the norm being that of all of them together, which the caller has.

    One factor for all, which is multiplied where a gradient is used; optax's own divides, and keeps the quotients.
    """

    def update(updates, state, params=None, **extra):
        del params
        factor = jnp.minimum(1.0, largest / extra["norm"])
        return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def to_float32(params: Params) -> Params:
    """Parameters in float32, which optimizers compute in."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)


def state_shardings(state: Tree, params: Params, places: Params, whole: NamedSharding) -> Tree:
    """Where an optimizer's state goes: each moment where its parameter is, and what is of no parameter to `whole`.

    A factored moment, which a parameter's shape less one axis tells, is split like the axes that it has left.
    """
    shapes, by_path = trees.paths(params), trees.paths(places)

    def place(path, leaf):
        parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        name = next((n for n in ("/".join(parts[i:]) for i in range(len(parts))) if n in shapes), None)
        if name is None:
            return whole
        shape, given = shapes[name].shape, by_path[name]
        axes = (*given.spec, *(None,) * (len(shape) - len(given.spec)))
        if leaf.shape == shape:
            return given
        for axis in range(len(shape)):
            if leaf.shape == shape[:axis] + shape[axis + 1 :]:
                return NamedSharding(whole.mesh, P(*axes[:axis], *axes[axis + 1 :]))
        return whole

    return jax.tree_util.tree_map_with_path(place, state)


def decay_mask(params: Params) -> Params:
    """True for each leaf that decays; an unclaimed leaf is an error."""
    return trees.map_by_rules(params, DECAY, table="weight decay")


def apply_updates(params: Params, directions: Tree, learning_rate: jax.Array, key: PRNGKeyArray) -> Params:
    """`params - learning_rate * directions`, leaf by leaf; leaves in bfloat16 are rounded at random by the key."""
    leaves, structure = jax.tree.flatten(params)
    moved = []
    for number, (leaf, direction) in enumerate(zip(leaves, jax.tree.leaves(directions), strict=True)):
        to = leaf.astype(jnp.float32) - learning_rate * direction
        moved.append(to if leaf.dtype == jnp.float32 else stochastically_rounded(to, jax.random.fold_in(key, number)))
    return jax.tree.unflatten(structure, moved)


def stochastically_rounded(x: Float32[Array, "*B"], key: PRNGKeyArray) -> BFloat16[Array, "*B"]:
    """One of the two bfloat16 numbers around x, the nearer one the more often: the mean over keys is x.

    A float32 is a bfloat16 with 16 digits more; a random number of 16 digits is added to it, and what is left behind
    the first 16 is cut off. What bfloat16 can say is left alone. Drawn by element, so alike however x is split.
    """
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = (lax.bitcast_convert_type(x, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
    return lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)
