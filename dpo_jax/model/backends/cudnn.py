"""Attention over packed rows by cuDNN's flash attention for packed rows, text by text.

A prompt stands once for each of its completions (see `texts`), so every text is a causal segment: the plainest thing
that the kernel does. It takes NVIDIA GPUs from compute capability 9.0 on. JAX has no public function for packed rows:
all that is used of its private one stands in `_kernel` and `_kernel_back`, and `missing` says whether it still is what
it was.

The kernel writes a float32 for each place, head and text of a row: `texts T branches H 4` bytes a row. What is kept
for the backward pass is those of each slot alone: `T H 4`.

Letters: B rows, T slots, L places, M texts of a row, N texts of all rows, H heads, K key-value heads, C channels.
"""

import functools
import inspect
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from dpo_jax.model.attention import Bounds, Layout, VisibilityRules
from dpo_jax.model.backends.texts import Kernel, Texts, by_copies, by_text, lay_out, of_places

TAKES = (
    "query key value q_seqlen kv_seqlen q_offsets kv_offsets scale mask_type sliding_window_length return_residual"
).split()
"""Parameters of JAX's private function that are used,"""
RULE = "_dot_product_attention_bwd_rule"
RULE_TAKES = (
    "scale seed dropout_rate variadic_args mask_type layout sliding_window_length return_residual res grad_output"
).split()
"""and of the rule of its gradient;"""
RULE_KNOWS = {*RULE_TAKES, "is_training", "cudnn_version", "score_mod"}
"""some versions have more of these: jax 0.10 the first, 0.12 the others."""
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
    rule = inspect.signature(getattr(private, RULE)).parameters if hasattr(private, RULE) else {}
    if not set(RULE_TAKES) <= set(rule) <= RULE_KNOWS:
        return (
            f"needs JAX's private cuDNN attention, and that of jax {jax.__version__} has another rule of its gradient"
        )
    return None


def _has(private: ModuleType) -> bool:
    return hasattr(private, "dot_product_attention") and hasattr(getattr(private, "MaskType", None), "PADDING_CAUSAL")


def prepare(layout: Layout, window: int | None, bounds: Bounds | None) -> Texts:
    """The texts of each row; the same for all layers. There is room for two at least (see `_segments`).

    Raises:
      ValueError: the number of texts is not bounded.
    """
    if bounds is None:
        raise ValueError("cudnn lays texts out, and wants to know how many there are at most; give bounds")
    return lay_out(layout, bounds._replace(texts=max(bounds.texts, 2)))


def keeps_scores(prepared: object) -> bool:
    """Whether the backward pass finds scores where the forward pass left them: it computes them again."""
    return False


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
    how = _How(float(rules.scale), window)
    kernel = Kernel(functools.partial(_forward, how), functools.partial(_backward, how))
    return by_copies(kernel, query, key, value, texts.places, texts)


class _How(NamedTuple):
    """What is known when the computation is compiled."""

    scale: float
    window: int | None


def _forward(
    how: _How,
    query: Float[Array, "B L H C"],
    key: Float[Array, "B L K C"],
    value: Float[Array, "B L K C"],
    texts: Texts,
) -> tuple[Float[Array, "B L H C"], tuple[Array, ...]]:
    """The result and log-sum-exps by place; what lies outside of the texts may be anything.

    Raises:
      ValueError: the rows of this device have more elements than offsets can count.
    """
    if query.size >= OFFSETS:
        raise ValueError(
            f"cudnn counts {query.size} elements of queries in 32 bits, of which {OFFSETS - 1} fit; "
            "set batch.micro_tokens to less"
        )
    out, stats = _kernel(query, key, value, _segments(texts), how)
    return out, (by_text(stats, texts),)


def _backward(
    how: _How, query, key, value, out, kept: tuple[Array, ...], texts: Texts, slope: Float[Array, "B L H C"]
) -> tuple[Array, Array, Array]:
    """The slopes along queries, keys and values; what lies outside of the texts may be anything."""
    return _kernel_back(query, key, value, _segments(texts), how, of_places(kept[0], texts), out, slope)


def _segments(texts: Texts) -> tuple[Int[Array, "B M"], Int[Array, "B N"]]:
    """Sizes of a row's segments, and where each begins, -1 for none; one segment would be taken for a plain row."""
    return texts.size, jnp.pad(texts.start, ((0, 0), (0, 1)), constant_values=-1)


def _kernel(query, key, value, segments, how: _How) -> tuple[Float[Array, "B L H C"], Float32[Array, "N H L"]]:
    """Causal attention within each segment, and the log-sum-exps of each, one segment after the other."""
    from jax._src.cudnn import fused_attention_stablehlo as private

    key, value = (_for_each_query(private, x, query.shape[2]) for x in (key, value))
    attended: Any = private.dot_product_attention(
        query,
        key,
        value,
        q_seqlen=segments[0],
        kv_seqlen=segments[0],
        q_offsets=segments[1],
        kv_offsets=segments[1],
        scale=how.scale,
        mask_type=private.MaskType.PADDING_CAUSAL,
        sliding_window_length=how.window,
        return_residual=True,
    )
    return attended


def _kernel_back(query, key, value, segments, how: _How, stats, out, slope) -> tuple[Array, Array, Array]:
    """The gradient of `_kernel`, by the rule that JAX has for it."""
    from jax._src.cudnn import fused_attention_stablehlo as private

    wide = [_for_each_query(private, x, query.shape[2]) for x in (key, value)]
    (size, start), unused = segments, jnp.zeros(0, query.dtype)
    rule = getattr(private, RULE)
    takes = inspect.signature(rule).parameters
    further = ((),) if "score_mod" in takes else ()
    given = {
        "scale": how.scale,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": private.MaskType.PADDING_CAUSAL,
        "layout": private.AttentionLayout.BTNH.value,
        "sliding_window_length": how.window,
        "is_training": True,
        "cudnn_version": 0,
        "score_mod": None,
        "return_residual": False,
        "res": (query, *wide, unused, size, size, start, start, unused, unused, *further, stats, out),
        "grad_output": slope,
    }
    to_query, to_key, to_value, *_ = rule(*(given[name] for name in takes))
    return to_query, _by_key(to_key, key.shape[2]), _by_key(to_value, key.shape[2])


def _for_each_query(private: ModuleType, x: Float[Array, "B L K C"], heads: int) -> Float[Array, "B L _ C"]:
    """Keys or values, one for each head of the queries where JAX counts offsets in those."""
    return x if x.shape[2] == heads or _counts_key_heads(private) else jnp.repeat(x, heads // x.shape[2], axis=2)


def _by_key(slope: Float[Array, "B L _ C"], heads: int) -> Float[Array, "B L K C"]:
    """The sum over the queries' heads of each key's head, in float32."""
    if slope.shape[2] == heads:
        return slope
    parts = slope.reshape(*slope.shape[:2], heads, -1, slope.shape[3])
    return parts.sum(axis=3, dtype=jnp.float32).astype(slope.dtype)


def _counts_key_heads(private: ModuleType) -> bool:
    """Whether offsets of keys are counted in their own heads: jax 0.10 counts them in those of the queries."""
    fix = getattr(private, "_fix_seqlen_offsets", None)
    if fix is None:
        return False
    with jax.ensure_compile_time_eval():
        sizes, offsets = jnp.array([[1, 1]], jnp.int32), jnp.array([[0, 1, -1]], jnp.int32)
        found = fix(sizes, sizes, offsets, offsets, jnp.zeros((1, 2, 2, 8)), jnp.zeros((1, 2, 1, 8)))
        return found[3].tolist()[0][1] == 8
