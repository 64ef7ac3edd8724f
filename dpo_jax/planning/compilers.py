"""Devices that exist for a compiler only: XLA's own for TPUs and for NVIDIA GPUs compile a step for them, here.

The compilers come in the wheels of `jax[tpu]` and `jax[cuda13]` and want neither a device nor a driver. What a program
needs, does and exchanges is theirs; what it takes in seconds is an estimate at most. A GPU's kernels are not tuned
without one, so their speed is not to be read from it.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

from dpo_jax.errors import UserError
from dpo_jax.planning.chips import Chip, Gpu, Tpu

WHEELS = {"tpu": ("libtpu", "dpo_jax[compile-tpu]"), "gpu": ("jax_cuda13_plugin", "dpo_jax[compile-gpu]")}
"""Module of each platform's compiler, and the extra that brings it."""
ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""What libtpu is told so that it looks for no machine around it."""
CUDNN = 91400
"""Version of cuDNN that compiled programs are for, as JAX writes it."""


def missing(chip: Chip) -> str | None:
    """What has to be installed before a step can be compiled for a chip; None if nothing."""
    module, extra = WHEELS[chip.platform]
    if importlib.util.find_spec(module) is not None:
        return None
    return f"the compiler for {chip.title} is not installed (pip install '{extra}')"


def chosen(asked: str, chip: Chip) -> bool:
    """Whether the chip's own compiler is taken where `auto`, `real` or `cpu` is asked for.

    Raises:
      UserError: it is asked for and not installed.
    """
    if asked == "real" and (gone := missing(chip)) is not None:
        raise UserError(f"--compiler: real: {gone}")
    return asked != "cpu" and missing(chip) is None


def version(chip: Chip) -> str:
    """Which compiler of which version it is, in words."""
    module, _ = WHEELS[chip.platform]
    package = {"libtpu": "libtpu", "jax_cuda13_plugin": "jaxlib"}[module]
    return f"XLA's for {chip.title} ({package} {importlib.metadata.version(package)})"


def devices(chip: Chip, count: int, hosts: int) -> list[Any]:
    """So many compile-only devices of JAX, on so many hosts; the chip's compiler must be installed.

    Raises:
      UserError: it knows no topology of so many.
    """
    from jax.experimental import topologies

    match chip.compiler:
        case Gpu() as gpu:
            asked = {"topology_name": chip.name, "platform": "cuda", "target_config": target_text(gpu)}
            asked["topology"] = f"1x{hosts}x{count // hosts}"
        case Tpu() as tpu:
            asked = {"topology_name": f"{tpu.name}:{torus(tpu, count)}", "platform": "tpu"}
            for name, value in ALONE.items():
                os.environ.setdefault(name, value)
    try:
        found = topologies.get_topology_desc(**asked)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--devices: {count}: no {chip.title} topology of these can be described ({reason})") from error
    return list(found.devices)


def torus(tpu: Tpu, count: int) -> str:
    """Chips along each axis of a slice of so many devices, as Cloud TPU names it: 4x4, or 2x2x4.

    Raises:
      UserError: there is no such slice.
    """
    axes = 2 if tpu.flat else 3
    chips, left = divmod(count, tpu.cores)
    sides = _sides(chips, axes) if not left else None
    if sides is None:
        raise UserError(
            f"--devices: {count}: a slice of {tpu.name} has a power of two of chips, at least 4"
            + (f", of {tpu.cores} devices each" if tpu.cores > 1 else "")
        )
    return "x".join(map(str, sides))


def _sides(chips: int, axes: int) -> Sequence[int] | None:
    """The most even sides whose product is a power of two, the short ones first, as slices are; 2x2x1 for 4."""
    if chips < 4 or chips & (chips - 1):
        return None
    power = chips.bit_length() - 1
    if axes == 3 and power == 2:
        return (2, 2, 1)
    return sorted(2 ** (power // axes + (axis < power % axes)) for axis in range(axes))


def target_text(gpu: Gpu) -> str:
    """What XLA asks of a GPU (its GpuTargetConfigProto), as text."""
    major, minor = divmod(round(10 * gpu.capability), 10)
    feature = "ACCELERATED_FEATURES" if gpu.accelerated else "NONE"
    scalars = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": gpu.shared_memory,
        "threads_per_core_limit": gpu.threads,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.fpus,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": int(gpu.bandwidth),
        "l2_cache_size": gpu.cache,
        "clock_rate_ghz": gpu.clock / 1e9,
        "device_memory_size": gpu.memory,
        "shared_memory_per_block_optin": gpu.shared_memory - 1024,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "device_address_bits": 64,
    }
    lines = [f"  {name}: {value}" for name, value in scalars.items()]
    lines += [f"  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}"]
    lines += [f'  {name}: "13.0.0"' for name in ("driver_version", "runtime_version", "compile_time_toolkit_version")]
    lines += ['  dnn_version: "9.14.0"', f'  name: "{gpu.title}"']
    dnn = "dnn_version_info { major: 9 minor: 14 patch: 0 }"
    return "\n".join(
        ["gpu_device_info {", *lines, "}", 'platform_name: "CUDA"', dnn, f'device_description_str: "{gpu.title}"']
    )


@contextlib.contextmanager
def answering_for(chip: Chip) -> Iterator[None]:
    """While this lasts, libraries that ask for this process's device while they lower hear of the chip.

    Of JAX its cuDNN attention asks, and (not of 0.10) its kernels of Triton; tokamax, where that is installed. The step
    itself is what a run compiles.
    """
    if not isinstance(chip.compiler, Gpu):
        yield
        return
    gpu = chip.compiler
    private = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    capability = str(gpu.capability)
    answers: dict[str, Any] = {
        "check_cudnn_version": lambda: CUDNN,
        "check_compute_capability": lambda asked: float(asked) <= gpu.capability,
        "is_cuda_compute_capability_equal": lambda asked: asked == capability,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(private, **answers))
        if importlib.util.find_spec("jax._src.pallas.triton.gpu_info") is not None:
            triton = importlib.import_module("jax._src.pallas.triton.gpu_info")
            told = triton.GpuInfo(gpu_version=None, arch_name=capability, compute_capability=round(10 * gpu.capability))
            stack.enter_context(mock.patch.object(triton, "get_gpu_info", lambda: told))
        if importlib.util.find_spec("tokamax") is not None:
            stack.enter_context(_tokamax_for(gpu, capability))
        yield


@contextlib.contextmanager
def _tokamax_for(gpu: Gpu, capability: str) -> Iterator[None]:
    with warnings.catch_warnings(), mock.patch.object(sys, "argv", sys.argv[:1]):
        warnings.simplefilter("ignore")  # of the packages below it
        names = ("gpu_utils", "config", "mosaic_gpu")
        utils, settings, mosaic = (importlib.import_module(f"tokamax._src.{name}") for name in names)
    device = SimpleNamespace(platform="gpu", compute_capability=capability, core_count=gpu.cores, device_kind=gpu.title)
    asked = mock.patch.object(utils, "_compute_capability", lambda device=None: gpu.capability)
    backend = mock.patch.object(mosaic, "backend", SimpleNamespace(get_default_device=lambda: device))
    with asked, backend, settings.cross_compile(True):
        yield
