"""What objectives are functions of: log-probabilities of pairs, and what an objective says of each pair.

Letters as in pairwise.py.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from dpo_jax.errors import UserError, nearest, short

Scalar = float | Float[Array, ""]
Numbers = ArrayLike | Sequence[Any]
"""One for each pair: an array, or a list."""


class Sums(NamedTuple):
    """Log-probabilities over a part of each completion, in nats."""

    policy_chosen: Float[Array, "*P"]
    policy_rejected: Float[Array, "*P"]
    reference_chosen: Float[Array, "*P"]
    reference_rejected: Float[Array, "*P"]


class Ranking(NamedTuple):
    """All completions of each prompt with their rank (0 is best, equals share one, -1 is no completion)."""

    policy: Float[Array, "*P W"]
    reference: Float[Array, "*P W"]
    rank: Int[Array, "*P W"]


class Pairs(NamedTuple):
    """What an objective may look at, one value per pair; `make_pairs` fills in what is not given.

    Attributes:
      chosen_length: scored tokens, as `rejected_length`.
      margin: by how much, in nats, the chosen reward should be ahead.
      label: chance that the chosen completion is the better one; for KTO 1 means desirable and 0 undesirable.
      weight: factor of the pair's loss; applied by whoever adds the losses up.
      real: false where an entry only fills up the array.
      noise: a uniform number in (0, 1), for objectives that draw.
      shared: sums over the first `min(chosen_length, rejected_length)` tokens of each completion (LD-DPO).
      alignment: for chosen and rejected, mean over the tokens of `log p(token) - log sum_v p(v)^2` (WPO).
      assumed: () where lengths were not given, and are 1.
      ranking: all ranked completions, where more than two are compared.
    """

    policy_chosen: Float[Array, "*P"]
    policy_rejected: Float[Array, "*P"]
    reference_chosen: Float[Array, "*P"]
    reference_rejected: Float[Array, "*P"]
    chosen_length: Float[Array, "*P"]
    rejected_length: Float[Array, "*P"]
    margin: Float[Array, "*P"]
    label: Float[Array, "*P"]
    weight: Float[Array, "*P"]
    real: Bool[Array, "*P"]
    noise: Float[Array, "*P"] | None = None
    shared: Sums | None = None
    alignment: tuple[Float[Array, "*P"], Float[Array, "*P"]] | None = None
    ranking: Ranking | None = None
    assumed: tuple[()] | None = None


class LossOutput(NamedTuple):
    """What an objective says of each pair: its loss, and the quantity that it makes grow.

    `memory` is what an objective that remembers earlier steps wants to be given at the next one.
    """

    losses: Float[Array, "*P"]
    margins: Float[Array, "*P"]
    memory: Float[Array, " m"] | None = None


def as_numbers(name: str, value: Numbers, shape: tuple[int, ...] | None = None) -> Array:
    """What a caller gave, as an array: of a shape, or one number for all.

    Raises:
      UserError: it is none.
    """
    try:
        found = jnp.asarray(None if isinstance(value, str) else value)  # a text is asked to be a dtype
    except (TypeError, ValueError):
        raise UserError(f"{name}: {short(str(value))}: must be numbers, one for each pair") from None
    if jnp.issubdtype(found.dtype, jnp.complexfloating):
        raise UserError(f"{name}: is of {found.dtype}: must be real numbers, one for each pair")
    if shape is not None and found.shape not in (shape, ()):
        raise UserError(f"{name}: has the shape {found.shape} beside {shape} of what comes first; give as many of each")
    return found


def make_pairs(
    policy_chosen: Numbers,
    policy_rejected: Numbers,
    reference_chosen: Numbers = 0.0,
    reference_rejected: Numbers = 0.0,
    **more: Any,
) -> Pairs:
    """`Pairs` in float32 of one shape, the reference cut off from gradients.

    Args:
      policy_chosen: log-probabilities of the chosen completions, in nats; the shape of everything else.
      policy_rejected: of the rejected completions.
      reference_chosen: the reference's; 0 where there is none.
      reference_rejected: the reference's.
      **more: other fields of `Pairs`; lengths, labels and weights are 1 and margins 0 where they are not given.

    Raises:
      UserError: something is no numbers, or neither one for each pair nor one for all; or there is no such field.
    """
    if unknown := next((name for name in more if name not in Pairs._fields), None):
        near = nearest(unknown, Pairs._fields)
        raise UserError(f"{short(unknown)}: is no field of Pairs" + (f"; did you mean {near}?" if near else ""))
    shape = as_numbers("policy_chosen", policy_chosen).shape

    def full(name: str, value: Numbers) -> Array:
        return jnp.broadcast_to(as_numbers(name, value, shape).astype(jnp.float32), shape)

    more.setdefault("assumed", None if {"chosen_length", "rejected_length"} <= more.keys() else ())
    ones, zeros = ("chosen_length", "rejected_length", "label", "weight"), ("margin",)
    filled = {name: full(name, more.pop(name, 1.0)) for name in ones}
    filled |= {name: full(name, more.pop(name, 0.0)) for name in zeros}
    reference = full("reference_chosen", reference_chosen), full("reference_rejected", reference_rejected)
    reference = jax.lax.stop_gradient(reference)
    real = more.pop("real", jnp.ones(shape, bool))
    for name in ("shared", "ranking"):
        if (part := more.get(name)) is not None:
            data = {key: jax.lax.stop_gradient(value) for key, value in part._asdict().items() if "reference" in key}
            more[name] = part._replace(**data)
    policy = full("policy_chosen", policy_chosen), full("policy_rejected", policy_rejected)
    return Pairs(*policy, *reference, **filled, real=real, **more)
