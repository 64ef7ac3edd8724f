"""Measurements of what goes from disk to the device and back: import, export, checkpoints."""

import tempfile
from pathlib import Path
from typing import Any

import jax

from dpo_jax.hf.checkpoint import load_hf, save_hf
from dpo_jax.training.checkpoints import Checkpoints
from dpo_jax.training.optimizer import make_optimizer
from dpo_jax.training.settings import CheckpointSettings, OptimizerSettings
from dpo_jax.training.step import fresh_state
from tools.benching.micro import Options, Row, once
from tools.benching.workloads import write_tiny
from tools.runners.protocol import peak_bytes

LARGER = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 32000, "head_dim": 96}
"""100 million parameters."""


def files(options: Options) -> list[Row]:
    """Seconds and bytes by second of each way, of the folder of --model, else of a random one.

    `grew MiB` is by how much the process's peak rose. Files that were just written are in the system's cache, so this
    measures the code rather than the disk. A checkpoint is float32 weights and two moments; `save` is how long
    training waits, `sealed` until it is whole and digested on disk.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        changes = {} if options.quick else LARGER
        source = Path(options.model).expanduser() if options.model else write_tiny(folder / "model", **changes)
        found = []
        model = _measured(found, "import", lambda: jax.block_until_ready(load_hf(source)), _bytes)
        _measured(found, "export", lambda: save_hf(model, folder / "export", like=source), lambda _: _bytes(model))
        found += _checkpoint(model, folder / "checkpoints")
    return found


def _checkpoint(model: Any, folder: Path) -> list[Row]:
    found: list[Row] = []
    optimizer = make_optimizer(OptimizerSettings())
    state = jax.block_until_ready(fresh_state(model.params, optimizer))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    size = _size(state)
    with Checkpoints(folder, CheckpointSettings()) as checkpoints:
        _measured(found, "save", lambda: checkpoints.save(1, state, {}), lambda _: size)
        _measured(found, "sealed", checkpoints.wait, lambda _: size)
        _measured(found, "restore", lambda: jax.block_until_ready(checkpoints.restore(1, shapes)), lambda _: size)
    return found


def _measured(found: list[Row], name: str, call: Any, size_of: Any) -> Any:
    before = peak_bytes()
    result, cost = once(call)
    size = size_of(result)
    grew = (peak_bytes() - before) / 2**20
    found.append({"what": name, **cost, "MiB": size / 2**20, "MiB/s": size / 2**20 / cost["s"], "grew MiB": grew})
    return result


def _bytes(model: Any) -> int:
    return _size(model.params)


def _size(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
