"""What the devices of this machine have and can do, measured."""

import time
from typing import Any

MATMUL_SIZE = {"cpu": 1024}  # else 8192: an accelerator needs that much to be busy


def matmul_gflops(device: Any, dtype: str, *, seconds: float = 0.2) -> float:
    """Billions of operations per second of a compiled square matrix product, best of the calls made in `seconds`."""
    import jax
    import jax.numpy as jnp

    size = MATMUL_SIZE.get(device.platform, 8192)
    left = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(jnp.matmul)
    product(left, left).block_until_ready()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        product(left, left).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best / 1e9


def memory_of_a_device() -> int:
    """Bytes that one device may use; CPU devices share the host's free memory evenly."""
    import jax
    import psutil

    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return limit or psutil.virtual_memory().available // jax.local_device_count()
