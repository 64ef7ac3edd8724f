"""What each backend of attention can do, as data; which one a run takes, and why one cannot be taken.

A new backend is a module of this folder (see dispatch.py for its three functions) and a row of `BACKENDS`.
"""

import dataclasses
import importlib
import importlib.util
import itertools
import math
from collections.abc import Iterator

from dpo_jax.model import spec as specs


@dataclasses.dataclass(frozen=True)
class Backend:
    """What a backend can do."""

    platforms: tuple[str, ...]
    dtypes: tuple[str, ...]
    features: frozenset[str] = frozenset()
    """Of `window`, `softcap`, `sinks`, `alibi` and `value width` (other than the key's)."""
    head_step: int = 1
    """Channels of a head come in multiples of this,"""
    head_most: int | None = None
    """and are at most this."""
    capability: float | None = None
    """Least compute capability of an NVIDIA GPU; None where that is not what counts."""
    capability_below: float | None = None
    """Compute capability from which on it does not run any more."""
    packages: tuple[str, ...] = ()
    """What it needs beside JAX; imported by the same names with `_` for `-`."""
    private: bool = False
    """Whether it uses what JAX, or its package, does not promise to keep; its module's `missing` says what is gone."""
    proven: tuple[str, ...] = ()
    """Platforms for which tests hold what it computes against the plain formula (run there, interpreted, or by its
    kernel's contract), and whose compiler takes it; `auto` chooses it on no other,"""
    proven_heads: frozenset[int] | None = None
    """and, where this is not None, for heads of no other number of channels."""


@dataclasses.dataclass(frozen=True)
class Device:
    """What attention runs on."""

    platform: str
    capability: float | None = None
    """Compute capability of an NVIDIA GPU."""


FLOATS = ("float32", "bfloat16")
"""Of kernels that were tried in these; none was in float16, which is left to xla."""
BACKENDS = {
    "splash": Backend(
        ("tpu",), FLOATS, frozenset({"window", "softcap", "sinks", "value width"}), private=True, proven=("tpu",)
    ),
    "tokamax": Backend(
        ("gpu",),
        ("bfloat16",),
        frozenset({"window", "softcap"}),
        head_step=8,
        head_most=256,
        capability=9.0,
        capability_below=10.0,
        packages=("tokamax",),
        private=True,
        proven=("gpu",),
        proven_heads=frozenset({32, 64, 128, 256}),
    ),
    "cudnn": Backend(
        ("gpu",),
        ("bfloat16",),
        frozenset({"window"}),
        head_step=8,
        head_most=256,
        capability=9.0,
        private=True,
        proven=("gpu",),
    ),
    "xla": Backend(
        ("cpu", "gpu", "tpu"),
        (*FLOATS, "float16"),
        frozenset({"window", "softcap", "sinks", "alibi", "value width"}),
        proven=("cpu",),
    ),
}
"""In the order that `auto` prefers them; xla, the last one, does everything everywhere."""

TILES = {"gpu": 2048, "tpu": 256}
"""Slots of a tile of scores for xla, by platform; elsewhere `attention.TILE`.

On an H200, rows of 1,280 slots took 56 ms by tiles of 64, 11 ms by tiles of 256 and 3.9 ms whole. No TPU was tried.
"""

FEATURES = {
    "window": "sliding windows",
    "softcap": "soft cap of its scores",
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
            case specs.MLA():
                found |= {"value width"} if mixer.value_dim != mixer.plain_dim + mixer.rope_dim else set()
    return frozenset(found)


def head_sizes(spec: specs.DecoderSpec) -> set[int]:
    """Channels of a query's head, of every kind of attention that a decoder has."""
    found = set()
    for mixer in {layer.mixer for layer in spec.layers}:
        match mixer:
            case specs.Attention():
                found.add(mixer.head_dim)
            case specs.MLA():
                found.add(mixer.plain_dim + mixer.rope_dim)
    return found


def why_not(name: str, spec: specs.DecoderSpec, dtype: str, device: Device) -> str | None:
    """The rule by which a backend cannot compute a decoder's attention; None if it can."""
    return next(_broken_rules(name, BACKENDS[name], spec, dtype, device), None)


def unfit(name: str, device: Device) -> str | None:
    """The rule by which a backend cannot run on a device, or here at all, whatever the model; None if it can."""
    backend = BACKENDS[name]
    return next(itertools.chain(_rule_of_platform(backend, device), _rules_of_device(name, backend, device)), None)


def _broken_rules(name: str, backend: Backend, spec: specs.DecoderSpec, dtype: str, device: Device) -> Iterator[str]:
    yield from _rule_of_platform(backend, device)
    if dtype not in backend.dtypes:
        yield f"computes in {' and '.join(backend.dtypes)} and model.compute_dtype is {dtype}"
    yield from (f"has no {FEATURES[need]}, and the model does" for need in FEATURES if need in lacking(backend, spec))
    for size in sorted(head_sizes(spec)):
        if size % backend.head_step:
            yield f"takes heads of multiples of {backend.head_step} channels, and the model's have {size}"
        if backend.head_most is not None and size > backend.head_most:
            yield f"takes heads of up to {backend.head_most} channels, and the model's have {size}"
    yield from _rules_of_device(name, backend, device)


def _rule_of_platform(backend: Backend, device: Device) -> Iterator[str]:
    if device.platform not in backend.platforms:
        yield f"runs on {' and '.join(backend.platforms)} and the devices are of platform {device.platform}"


def _rules_of_device(name: str, backend: Backend, device: Device) -> Iterator[str]:
    if backend.capability is not None and not _in_range(backend, device.capability):
        wanted = "or more" if backend.capability_below is None else f"to below {backend.capability_below}"
        found = "no NVIDIA GPU" if device.capability is None else f"of {device.capability}"
        yield f"takes NVIDIA GPUs of compute capability {backend.capability} {wanted}, and this device is {found}"
    for package in backend.packages:
        if importlib.util.find_spec(package.replace("-", "_")) is None:
            yield f"needs the package {package}, which is not installed (pip install 'dpo_jax[cuda]', Python 3.12)"
    if backend.private and (gone := importlib.import_module(f"dpo_jax.model.backends.{name}").missing()):
        yield gone


def _in_range(backend: Backend, capability: float | None) -> bool:
    least, below = backend.capability or 0.0, backend.capability_below or math.inf
    return capability is not None and least <= capability < below


def lacking(backend: Backend, spec: specs.DecoderSpec) -> frozenset[str]:
    """Features that a decoder needs and a backend does not have."""
    return features(spec) - backend.features


def candidates(spec: specs.DecoderSpec, dtype: str, device: Device) -> list[str]:
    """The backends that can compute a decoder's attention and are proven for the platform, in their order; xla last."""
    return [
        name
        for name, backend in BACKENDS.items()
        if name == "xla" or (_is_proven(backend, spec, device) and why_not(name, spec, dtype, device) is None)
    ]


def automatic(spec: specs.DecoderSpec, dtype: str, device: Device) -> str:
    """The backend to take where none is asked for, and none can be tried: the first of the candidates."""
    return candidates(spec, dtype, device)[0]


def _is_proven(backend: Backend, spec: specs.DecoderSpec, device: Device) -> bool:
    heads = backend.proven_heads
    return device.platform in backend.proven and (heads is None or head_sizes(spec) <= heads)
