"""What each backend of attention can do, as data; which one a run takes, and why one cannot be taken."""

import dataclasses

from dpo_jax.model import spec as specs


@dataclasses.dataclass(frozen=True)
class Backend:
    """What a backend can do."""

    platforms: tuple[str, ...]
    dtypes: tuple[str, ...]
    features: frozenset[str] = frozenset()
    """Of `window`, `softcap`, `sinks`, `alibi` and `value width` (other than the key's)."""
    verified: tuple[str, ...] = ()
    """Platforms on which it was run and held against the plain formula; `auto` chooses it on no other."""


FLOATS = ("float32", "bfloat16")
BACKENDS = {
    "splash": Backend(("tpu",), FLOATS, frozenset({"window", "softcap", "sinks", "value width"})),
    "xla": Backend(
        ("cpu", "gpu", "tpu"),
        FLOATS,
        frozenset({"window", "softcap", "sinks", "alibi", "value width"}),
        verified=("cpu",),
    ),
}
"""In the order that `auto` prefers them; xla, the last one, does everything everywhere."""

FEATURES = {
    "window": "sliding windows",
    "softcap": "a soft cap of its scores",
    "sinks": "attention sinks",
    "alibi": "linear position biases (alibi)",
    "value width": "values of another width than its keys",
}


def features(spec: specs.DecoderSpec) -> frozenset[str]:
    """What the attention of a decoder needs beside queries, keys and values."""
    found = set()
    for mixer in {layer.mixer for layer in spec.layers}:
        match mixer:
            case specs.Attention():
                found |= {"window"} if mixer.window is not None else set()
                found |= {"softcap"} if mixer.softcap is not None else set()
                found |= {"sinks"} if mixer.sinks else set()
                found |= {"alibi"} if mixer.alibi is not None else set()
            case specs.Latent():
                found |= {"value width"} if mixer.value_dim != mixer.plain_dim + mixer.rope_dim else set()
    return frozenset(found)


def why_not(name: str, spec: specs.DecoderSpec, dtype: str, platform: str) -> str | None:
    """The rule by which a backend cannot compute a decoder's attention; None if it can."""
    backend = BACKENDS[name]
    if platform not in backend.platforms:
        return f"runs on {' and '.join(backend.platforms)} and the devices are of platform {platform}"
    if dtype not in backend.dtypes:
        return f"computes in {' and '.join(backend.dtypes)} and model.compute_dtype is {dtype}"
    missing = [FEATURES[need] for need in FEATURES if need in features(spec) - backend.features]
    return f"has no {missing[0]}, and the model does" if missing else None


def automatic(spec: specs.DecoderSpec, dtype: str, platform: str) -> str:
    """The backend to take where none is asked for: the first that can, and was verified on the platform; or xla."""
    able = (
        name
        for name, backend in BACKENDS.items()
        if platform in backend.verified and why_not(name, spec, dtype, platform) is None
    )
    return next(able, "xla")
