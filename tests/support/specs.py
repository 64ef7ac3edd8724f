"""A small decoder of the plain kind, for tests that need any decoder."""

from typing import Any

from dpo_jax.model.spec import MLP, Attention, DecoderSpec, Layer, Norm


def plain_spec(
    *, width: int, layers: int, heads: int, mlp_width: int, windows: tuple[int | None, ...] = (), **fields: Any
) -> DecoderSpec:
    """Layers of llama's kind over 50 tokens with two key-value heads; each has its window.

    Of `fields`, those of `DecoderSpec` go there and the others to each layer's attention.
    """
    top = {name: fields.pop(name) for name in list(fields) if name in DecoderSpec.__dataclass_fields__}
    norm = Norm(1e-6)
    kinds = [
        Layer(Attention(heads, 2, fields.get("head_dim", width // heads), **_rest(fields, window)), MLP(mlp_width))
        for window in (windows or (None,) * layers)
    ]
    return DecoderSpec(50, width, tuple(kinds), norm, **top)


def _rest(fields: dict[str, Any], window: int | None) -> dict[str, Any]:
    return {"window": window, **{name: value for name, value in fields.items() if name != "head_dim"}}
