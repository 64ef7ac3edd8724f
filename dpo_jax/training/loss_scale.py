"""The loss scale of float16, whose smallest numbers are larger than many slopes: as torch.amp.GradScaler by default.

The loss is multiplied before it is differentiated, and the float32 gradient divided. Where a slope overflows the step
is skipped and the scale halved; after `INTERVAL` good steps it is doubled. All scales are powers of two, so that
scaling rounds nothing.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

START = 2.0**16
INTERVAL = 2000
"""Good steps in a row after which the scale is doubled."""
NAMES = ("loss_scale", "good_steps")
"""Entries of a state whose loss is scaled: the scale, float32, and the good steps since it last changed."""


class LossScale(NamedTuple):
    """A scale, and how many good steps it has served since it changed."""

    scale: Float[Array, ""]
    good_steps: Int[Array, ""]

    @classmethod
    def of(cls, state: dict[str, Any]) -> "LossScale | None":
        """That of a step's state; None where its loss is not scaled."""
        return cls(*(state[name] for name in NAMES)) if NAMES[0] in state else None

    def entries(self) -> dict[str, Array]:
        """As they stand in a state."""
        return dict(zip(NAMES, self, strict=True))

    def blamed(self, loss: Float[Array, ""]) -> Bool[Array, ""]:
        """Whether a gradient that is not finite may be the scale's own doing, so that a smaller scale is the remedy.

        The loss itself is not scaled. A scale of one or less makes nothing overflow that did not without it.
        """
        return jnp.isfinite(loss) & (self.scale > 1)

    def after(self, finite: Bool[Array, ""]) -> "LossScale":
        """The scale of the next step, where loss and gradient of this one were finite or not."""
        good = (self.good_steps + 1) * finite.astype(jnp.int32)
        grown = jnp.where(jnp.isfinite(2 * self.scale), 2 * self.scale, self.scale)
        scale = jnp.where(good == INTERVAL, grown, self.scale)
        return LossScale(jnp.where(finite, scale, self.scale / 2), good % INTERVAL)


def fresh() -> LossScale:
    """The scale of the first step."""
    return LossScale(jnp.float32(START), jnp.int32(0))


def fitted(target: dict[str, Any], saved: Collection[str]) -> dict[str, Any]:
    """A state's shapes and shardings, with the entries of a scale if they are saved and without them if not.

    A run that goes on in another dtype of computation has a scale where there was none, or none where there was one.
    """
    rest = {name: leaf for name, leaf in target.items() if name not in NAMES}
    if NAMES[0] not in saved:
        return rest
    where = target["step"].sharding
    shapes = jax.eval_shape(lambda: fresh().entries())
    return rest | {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where) for name, leaf in shapes.items()}


def completed(state: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
    """A restored state with the target's entries: a fresh scale where it had none, none where none is wanted."""
    if NAMES[0] not in target:
        return {name: leaf for name, leaf in state.items() if name not in NAMES}
    if NAMES[0] in state:
        return state
    return state | {name: jax.device_put(leaf, target[name].sharding) for name, leaf in fresh().entries().items()}
