"""Attention over packed rows by cuDNN's flash attention for packed rows, text by text.

A prompt stands once for each of its completions (see `texts`), so every text is a causal segment: the plainest thing
that the kernel does. It takes NVIDIA GPUs from compute capability 9.0 on. JAX has no public function for packed rows:
all that is used of its private one stands in `_kernel`, and `missing` says whether it still is what it was.

The kernel keeps a float32 for each query, head and text of a row: `texts T branches H 4` bytes a row.

Letters: B rows, T slots, L places, M texts of a row, H heads, K key-value heads, C channels.
"""

import inspect
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_jax.model.attention import Bounds, Layout, VisibilityRules
from dpo_jax.model.backends.texts import Texts, gather, lay_out, spread

TAKES = "query key value q_seqlen kv_seqlen q_offsets kv_offsets scale mask_type sliding_window_length".split()
"""Parameters of JAX's private function that are used."""
OFFSETS = 2**31
"""Offsets are counted in elements, in 32 bits."""


def missing() -> str | None:
    """What this JAX lacks; None if it has it all."""
    try:
        from jax._src.cudnn import fused_attention_stablehlo as private
    except ImportError as error:
        return f"needs JAX's private cuDNN attention, which jax {jax.__version__} does not have ({error})"
    found = inspect.signature(private.dot_product_attention).parameters if _has(private) else {}
    gone = [name for name in TAKES if name not in found]
    if gone:
        return f"needs JAX's private cuDNN attention, and that of jax {jax.__version__} takes no {gone[0]}"
    return None


def _has(private: ModuleType) -> bool:
    return hasattr(private, "dot_product_attention") and hasattr(getattr(private, "MaskType", None), "PADDING_CAUSAL")


def prepare(layout: Layout, window: int | None, bounds: Bounds | None) -> Texts:
    """The texts of each row; the same for all layers.

    Raises:
      ValueError: the number of texts is not bounded.
    """
    if bounds is None:
        raise ValueError("cudnn lays texts out, and wants to know how many there are at most; give bounds")
    return lay_out(layout, bounds)


def keeps_scores(prepared: object) -> bool:
    """Whether the backward pass finds more than a result where the forward pass left it: copies, here always."""
    return True


def attend(
    query: Float[Array, "B T H C"],
    key: Float[Array, "B T K C"],
    value: Float[Array, "B T K C"],
    texts: Texts,
    window: int | None,
    rules: VisibilityRules,
) -> Float[Array, "B T H C"]:
    """Attention of each slot to what it sees of its own tree; softmax in float32.

    A window counts tokens of a text, whose positions rise by one from each to the next.
    """
    query, key, value = (spread(x, texts.places) for x in (query, key, value))
    return gather(_kernel(query, key, value, texts.start, texts.size, rules.scale, window), texts.places)


def _kernel(
    query: Float[Array, "B L H C"],
    key: Float[Array, "B L K C"],
    value: Float[Array, "B L K C"],
    start: Int[Array, "B M"],
    size: Int[Array, "B M"],
    scale: float,
    window: int | None,
) -> Float[Array, "B L H C"]:
    """Causal attention within each segment; what lies outside of them, of result and gradients, may be anything.

    Raises:
      ValueError: the rows of this device have more elements than offsets can count.
    """
    from jax._src.cudnn import fused_attention_stablehlo as private

    if query.size >= OFFSETS:
        raise ValueError(
            f"cudnn counts {query.size} elements of queries in 32 bits, of which {OFFSETS - 1} fit; "
            "set batch.micro_tokens to less"
        )
    if key.shape[2] != query.shape[2] and not _counts_key_heads(private):
        key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    if start.shape[1] == 1:  # a single segment would be taken for a row that is not packed
        start, size = (jnp.pad(x, ((0, 0), (0, 1)), constant_values=-1) for x in (start, size))
    offsets = jnp.pad(start, ((0, 0), (0, 1)), constant_values=-1)
    attended: Any = private.dot_product_attention(
        query,
        key,
        value,
        q_seqlen=size,
        kv_seqlen=size,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=float(scale),
        mask_type=private.MaskType.PADDING_CAUSAL,
        sliding_window_length=window,
    )
    return attended


def _counts_key_heads(private: ModuleType) -> bool:
    """Whether offsets of keys are counted in their own heads: jax 0.10 counts them in those of the queries."""
    fix = getattr(private, "_fix_seqlen_offsets", None)
    if fix is None:
        return False
    with jax.ensure_compile_time_eval():
        sizes, offsets = jnp.array([[1, 1]], jnp.int32), jnp.array([[0, 1, -1]], jnp.int32)
        found = fix(sizes, sizes, offsets, offsets, jnp.zeros((1, 2, 2, 8)), jnp.zeros((1, 2, 1, 8)))
        return found[3].tolist()[0][1] == 8
