"""Which file each tensor of a new folder is in, and in which dtype."""

import bisect
import json
from collections.abc import Collection, Mapping
from typing import Any, Literal

from dpo_jax.hf.tensors import SINGLE, TensorInfo, num_bytes

MAX_BYTES = 5 * 10**9
"""Of a file of a folder whose tensors are not as large as those that it was made of."""
EXPORT_DTYPES = {"float32": "F32", "bfloat16": "BF16"}
Dtype = Literal["keep", "float32", "bfloat16"]


def laid_out(
    infos: dict[str, TensorInfo],
    weights: Collection[str],
    dtype: str,
    max_bytes: int | None,
    *,
    packed: bool = False,
    writers: int = 1,
) -> dict[str, TensorInfo]:
    """The tensors of a new folder: weights in `dtype` unless it is "keep", in the files that they were in unless their
    size changes or `max_bytes` is given; unless it is, so many `writers` get a file each of what has several."""
    if dtype != "keep":
        new = EXPORT_DTYPES[dtype]
        infos = {name: info._replace(dtype=new) if name in weights else info for name, info in infos.items()}
    if max_bytes is not None:
        return split(infos, max_bytes)
    return spread(split(infos, MAX_BYTES) if dtype != "keep" or packed else infos, writers)


def spread(infos: dict[str, TensorInfo], count: int) -> dict[str, TensorInfo]:
    """Tensors of several files, which are fewer than `count`, in that many as equal as their order allows; others as
    they are."""
    if not 1 < len({info.file for info in infos.values()}) < count:
        return infos
    limits = range(1, sum(num_bytes(info.dtype, info.shape) for info in infos.values()) + 1)
    enough = bisect.bisect_left(limits, True, key=lambda limit: len(_groups(infos, limit)) <= count)
    return split(infos, limits[enough])


def split(infos: Mapping[str, TensorInfo], max_bytes: int) -> dict[str, TensorInfo]:
    """Tensors assigned to new files of at most `max_bytes` each (a larger tensor has a file of its own), in order."""
    groups = _groups(infos, max_bytes)
    files = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    files = files if len(groups) > 1 else [SINGLE]
    return {
        name: info._replace(file=file)
        for file, group in zip(files, groups, strict=True)
        for name, info in group.items()
    }


def _groups(infos: Mapping[str, TensorInfo], max_bytes: int) -> list[dict[str, TensorInfo]]:
    groups: list[dict[str, TensorInfo]] = [{}]
    room = max_bytes
    for name, info in infos.items():
        size = num_bytes(info.dtype, info.shape)
        if size > room and groups[-1]:
            groups.append({})
            room = max_bytes
        groups[-1][name] = info
        room -= size
    return groups


def index_text(infos: Mapping[str, TensorInfo]) -> str:
    """The index file that goes with sharded tensors."""
    total = sum(num_bytes(info.dtype, info.shape) for info in infos.values())
    weight_map = {name: info.file for name, info in sorted(infos.items())}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


def by_file(infos: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of each file."""
    files: dict[str, dict[str, TensorInfo]] = {}
    for name, info in infos.items():
        files.setdefault(info.file, {})[name] = info
    return files


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A `config.json` that names another dtype, by the key that it has for it."""
    return {**config, "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype": dtype}
