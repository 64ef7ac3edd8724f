"""How the tensors of a folder are laid out in files, and in which dtype."""

from collections.abc import Collection, Mapping
from typing import Any, Literal

from dpo_jax.hf import tensors
from dpo_jax.hf.tensors import TensorInfo

SHARD_BYTES = 5 * 10**9
EXPORT_DTYPES = {"float32": "F32", "bfloat16": "BF16"}
Dtype = Literal["keep", "float32", "bfloat16"]


def layout(
    infos: dict[str, TensorInfo], weights: Collection[str], dtype: Dtype, max_shard_bytes: int | None = None
) -> dict[str, TensorInfo]:
    """The tensors with the dtype that weights are to have, in files of a usual size if that is another than theirs."""
    if dtype != "keep":
        infos = {
            name: info._replace(dtype=EXPORT_DTYPES[dtype]) if name in weights else info for name, info in infos.items()
        }
        max_shard_bytes = SHARD_BYTES if max_shard_bytes is None else max_shard_bytes
    return infos if max_shard_bytes is None else tensors.split(infos, max_shard_bytes)


def by_file(infos: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of each file."""
    files: dict[str, dict[str, TensorInfo]] = {}
    for name, info in infos.items():
        files.setdefault(info.file, {})[name] = info
    return files


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A `config.json` that names another dtype, by the key that it has for it."""
    return {**config, "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype": dtype}
