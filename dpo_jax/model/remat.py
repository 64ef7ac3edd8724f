"""What the backward pass keeps of a layer: values have names, and a policy (`settings.REMATS`) says which are kept.

qkv             queries, keys and values as attention sees them; the convolution's inputs of a delta rule
context         what attention, or the delta rule, gives: a kernel's output is no matrix product to XLA; and what
                attention's backward pass wants of its forward pass beside that, the log-sum-exps
attention_out   its projection back
experts         the grouped products of experts, which are loops to XLA and no matrix products
mlp_out         what the MLP or the experts of a layer give
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

from dpo_jax.errors import UserError
from dpo_jax.model.settings import AUTO, FITTING, REMATS

T = TypeVar("T")
NAMES = ("qkv", "context", "attention_out", "experts", "mlp_out")
HOST = "pinned_host"


def named(x: T, name: str) -> T:
    """The same value, or tree of values, under one of `NAMES`."""
    assert name in NAMES, name
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, name), x)


def cheap(function: Callable[..., T]) -> Callable[..., T]:
    """The same function, whose inside no policy keeps: for what is done element by element, faster than it is read."""
    return jax.checkpoint(function)


def recomputed(layer: Callable, policy: str) -> Callable:
    """The same function of one layer, whose backward pass keeps what the policy says.

    Raises:
      KeyError: there is no such policy.
    """
    row, policies = REMATS[policy], jax.checkpoint_policies
    if row.keeps is None:
        return layer
    if row.host:
        keeps = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(row.keeps),
            offload_src="device",
            offload_dst=HOST,
        )
    else:
        keeps = policies.save_only_these_names(*row.keeps)
    if row.products:
        keeps = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, keeps)
    return jax.checkpoint(layer, policy=keeps)


def fitting(bytes_of: Callable[[str], int], free: int | None) -> str:
    """The policy that computes least again of those whose bytes fit; the last of them if none does.

    Args:
      bytes_of: what a step takes by a policy.
      free: what there is; None where that is not known, and then it is the first.
    """
    if free is None:
        return FITTING[0]
    return next((policy for policy in FITTING if bytes_of(policy) <= free), FITTING[-1])


def check(policy: str, devices: Sequence[Any]) -> None:
    """Whether these devices can do what a policy asks for.

    Raises:
      UserError: it keeps values in the host's memory, which they cannot reach.
    """
    if policy == AUTO or not REMATS[policy].host:
        return
    for device in devices:
        kinds = [memory.kind for memory in device.addressable_memories()]
        if HOST not in kinds:
            raise UserError(
                f"model.remat: {policy} keeps values in the host's memory, and {device.platform} devices reach "
                f"{', '.join(kinds) or 'no memory that they name'} only; set names or block"
            )
