"""Attention over packed rows by JAX's splash kernel for TPUs, which skips blocks of the mask in which nothing is seen.

The kernel knows heads and no rows, and each head may have a mask of its own: so the rows' heads are given to it one
after the other, and all rows are one call of it, where `vmap` would make a loop over rows of it. The mask is made once
for all layers: for each row a byte for each pair of slots, twice (16 MiB each at 4096 slots).

Letters: B rows, T slots, S slots filled up to whole blocks, I blocks of a row, N slots of a block, H heads, K key-value
heads, C channels of a key, E channels of a value, X either of them.
"""

import dataclasses
import functools
import importlib
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dpo_jax.model.attention import Bounds, Layout, VisibilityRules, visible

LANES = 128
"""Slots of a block come in multiples of this."""
MOST = 768
"""Slots of a block at most. By libtpu, heads of 256 channels in float32 fit v5e, v5p and v6e so; 1024 do not."""
STEP = 96
"""What a block costs beside its scores, in slots: `(N + STEP) N` is the time of a block of N by N."""
FUSED = 4
"""Blocks of a row up to which one kernel computes all gradients; it writes the queries' once for each of them."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["kind", "seen", "turned"], meta_fields=["interpret"])
@dataclasses.dataclass(frozen=True)
class MaskBlocks:
    """The mask of each row by blocks of queries and keys.

    Attributes:
      kind: 0 where a block of queries sees nothing of a block of keys, 2 where all of it, else 1.
      seen: the mask of each pair of blocks.
      turned: the same, with keys on the axis before the last.
      interpret: whether the kernel is computed step by step, as tests on a CPU do.
    """

    kind: Int[Array, "B I I"]
    seen: Bool[Array, "B I I N N"]
    turned: Bool[Array, "B I I N N"]
    interpret: bool


PACKAGE = "jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_"
WANTED = {
    "kernel": {
        "BlockSizes": {"block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "use_fused_bwd_kernel"},
        "SplashAttentionKernel": {"fwd_mask_info", "dq_mask_info", "dkv_mask_info"},
    },
    "mask_info": {"MaskInfo": {"data_next", "mask_next", "block_mask", "partial_mask_blocks", "is_dynamic_mask"}},
}
"""Classes that are used of JAX's modules, and parameters of theirs."""


def missing() -> str | None:
    """What this JAX lacks; None if it has it all."""
    for module, classes in WANTED.items():
        try:
            found = importlib.import_module(PACKAGE + module)
        except ImportError as error:
            return f"needs JAX's splash attention, which jax {jax.__version__} does not have ({error})"
        for name, takes in classes.items():
            known = inspect.signature(getattr(found, name)).parameters if hasattr(found, name) else {}
            if gone := sorted(takes - set(known)):
                return f"needs JAX's splash attention, and {name} of jax {jax.__version__} takes no {gone[0]}"
    return None


def block_of(length: int) -> int:
    """Slots of a block, for rows of this length: those that fill it up to little, and are large."""

    def cost(block: int) -> float:
        return (-(-length // block) * block) ** 2 * (1 + STEP / block)

    return min(range(LANES, MOST + 1, LANES), key=cost)


def prepare(layout: Layout, window: int | None, bounds: Bounds | None = None) -> MaskBlocks:
    """The mask of each row; the same for all layers with this window."""
    length = layout.group.shape[1]
    block = block_of(length)
    layout = Layout(*(jnp.pad(x, ((0, 0), (0, -length % block))) for x in layout))
    count = layout.group.shape[1] // block
    seen = visible(layout, window).reshape(-1, count, block, count, block).transpose(0, 1, 3, 2, 4)
    kind = jnp.where(seen.all(axis=(3, 4)), 2, seen.any(axis=(3, 4)).astype(jnp.int32))
    return MaskBlocks(kind, seen, seen.swapaxes(3, 4), bounds is None or bounds.platform != "tpu")


def keeps_scores(prepared: object) -> bool:
    """Whether the backward pass finds scores where the forward pass left them: it computes them again."""
    return False


def attend(
    query: Float[Array, "B T H C"],
    key: Float[Array, "B T K C"],
    value: Float[Array, "B T K E"],
    blocks: MaskBlocks,
    window: int | None,
    rules: VisibilityRules,
) -> Float[Array, "B T H E"]:
    """Attention of each slot to what it sees of its own tree; softmax in float32."""
    batch, length, heads, _ = query.shape
    filled = blocks.kind.shape[1] * blocks.seen.shape[3]
    scaled = (query.astype(jnp.float32) * rules.scale).astype(query.dtype)
    sinks = None if rules.sinks is None else jnp.tile(rules.sinks.astype(jnp.float32), batch)
    kernel = _kernel(blocks, heads, rules.softcap)
    mixed = kernel(*(_by_head(x, filled) for x in (scaled, key, value)), sinks=sinks)
    return mixed.reshape(batch, heads, filled, -1).transpose(0, 2, 1, 3)[:, :length]


def _kernel(blocks: MaskBlocks, heads: int, softcap: float | None) -> Any:
    """The kernel for all heads of all rows. What it gives, and what its backward pass wants of it, is named."""
    splash = importlib.import_module(PACKAGE + "kernel")
    count, size = blocks.kind.shape[1], blocks.seen.shape[3]
    fused = count <= FUSED
    of_queries = None if fused else size
    blocks_of = splash.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_q_dq=of_queries,
        block_kv_dq=of_queries,
        use_fused_bwd_kernel=fused,
    )
    by_query, by_key = (_mask_info(blocks, heads, turned=turned) for turned in (False, True))
    return splash.SplashAttentionKernel(
        by_query,
        None if fused else by_query,
        by_key,
        block_sizes=blocks_of,
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name="context",
        mask_function=None,
        interpret=blocks.interpret,
    )


def _mask_info(blocks: MaskBlocks, heads: int, *, turned: bool) -> Any:
    """The masks as the kernel wants them, by head.

    While blocks of keys (of queries, if `turned`) are gone through in order, those that are skipped name the last one
    that was not, so that nothing is fetched for them.
    """
    info = importlib.import_module(PACKAGE + "mask_info").MaskInfo
    kind, axis = blocks.kind, 1 if turned else 2
    order = lax.broadcasted_iota(jnp.int32, kind.shape, axis)
    number = jnp.arange(kind.size, dtype=jnp.int32).reshape(kind.shape)
    number = jnp.where(kind == 1, number, number[:, :1, :1])
    by_head = (
        jnp.repeat(x, heads, axis=0)
        for x in (
            lax.cummax(jnp.where(kind > 0, order, 0), axis),
            lax.cummax(number, axis),
            kind.astype(jnp.int8),
        )
    )
    data_next, mask_next, block_mask = by_head
    masks = blocks.turned if turned else blocks.seen
    return info(data_next, mask_next, block_mask, masks.reshape(-1, *masks.shape[3:]), None, is_dynamic_mask=True)


def _by_head(x: Float[Array, "B T H X"], filled: int) -> Float[Array, "N S X"]:
    """All rows' heads, one after the other; slots filled up with zeros."""
    x = jnp.pad(x, ((0, 0), (0, filled - x.shape[1]), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
    return x.reshape(-1, *x.shape[2:])
