"""Attention over packed rows by JAX's splash kernel for TPUs, which skips blocks that a dynamic mask leaves empty.

The mask is one of bytes for each row, [T, T], made once for all layers: 16 MiB at 4096 slots.

Letters: B rows, T slots, H heads, K key-value heads, C channels of a key, E channels of a value, X either of them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax.model.attention import Bounds, Layout, VisibilityRules, visible
from dpo_jax.trees import Tree

LANES = 128
"""Slots, and channels, come in multiples of this."""


def prepare(layout: Layout, window: int | None, bounds: Bounds | None = None) -> Tree:
    """The kernel for each row's mask: a pytree with rows on the first axis."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    filled = -layout.group.shape[1] % LANES
    layout = Layout(*(jnp.pad(x, ((0, 0), (0, filled))) for x in layout))
    interpret = bounds is None or bounds.platform != "tpu"  # tests run the same kernel on a CPU; settings refuse that
    make = functools.partial(splash.make_splash_mha, head_shards=1, q_seq_shards=1, interpret=interpret)
    return jax.vmap(lambda seen: _marked(make(seen[None]), None))(visible(layout, window))


def keeps_scores(prepared: object) -> bool:
    """Whether the backward pass finds scores where the forward pass left them: it computes them again."""
    return False


def attend(
    query: Float[Array, "B T H C"],
    key: Float[Array, "B T K C"],
    value: Float[Array, "B T K E"],
    prepared: Tree,
    window: int | None,
    rules: VisibilityRules,
) -> Float[Array, "B T H E"]:
    """Attention of each slot to what it sees of its own tree; softmax in float32."""
    length, width = query.shape[1], value.shape[-1]
    scaled = (query.astype(jnp.float32) * rules.scale).astype(query.dtype)
    sinks = None if rules.sinks is None else rules.sinks.astype(jnp.float32)

    def one_row(ready, query, key, value):
        return _marked(ready, True, attn_logits_soft_cap=rules.softcap)(query, key, value, sinks=sinks)

    mixed = jax.vmap(one_row)(prepared, *(_by_head(x) for x in (scaled, key, value)))
    return mixed.transpose(0, 2, 1, 3)[:, :length, :, :width]


def _marked(kernel: Any, dynamic: bool | None, **options: Any) -> Any:
    """The kernel with other options, and with the mark of a dynamic mask, which must be no array: vmap makes it one."""
    infos = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
    return type(kernel)(*(info._replace(is_dynamic_mask=dynamic) for info in infos), **{**kernel.kwargs, **options})


def _by_head(x: Float[Array, "B T H X"]) -> Float[Array, "B H S Y"]:
    """Slots and channels filled up to whole lanes with zeros, which change no score."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES), (0, 0), (0, -x.shape[3] % LANES)))
    return x.transpose(0, 2, 1, 3)
