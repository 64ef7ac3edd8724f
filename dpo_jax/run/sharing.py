"""What each of several hosts reads, holds and writes of a run, before anything is there."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import sharding
from dpo_jax.hf.checkpoint import entries_of
from dpo_jax.hf.shards import MAX_BYTES, by_file, split, spread
from dpo_jax.hf.tensors import DTYPES, SINGLE, TensorInfo, Tensors, read_json, tensor_names
from dpo_jax.hf.writing import size_of_file, writers
from dpo_jax.model.decoder import abstract_params, cast
from dpo_jax.model.spec import DecoderSpec
from dpo_jax.planning.hosts import HostShare, bytes_of, host_of, size_of
from dpo_jax.run.program import PlannedStep
from dpo_jax.trees import Tree

Placed = tuple[Tree, Tree]
"""A tree of shapes, and one of where its leaves lie."""


def shares(step: PlannedStep, folder: Path, hosts: int, *, adapter: bool) -> dict[str, HostShare]:
    """What each of so many hosts reads of the weights in `folder`, holds on its devices, and writes.

    Files of an export are those of the folder, or of 5 GB where it has no weights yet, or one for each host where these
    are more. What is left out: an `adapter`,
    or a model merged with one, which process 0 writes alone.
    """
    trainer, spec = step.trainer, step.objective.spec
    stored = _stored(folder)
    model = jax.eval_shape(lambda params: cast(params, DTYPES[stored]), abstract_params(spec))
    state = trainer.abstract, trainer.shardings
    kept = trainer.frozen.frozen, trainer.reference
    found = {
        "read of the weights": _share(step, hosts, (model, sharding.param_shardings(model, step.mesh))),
        "held on the devices between steps": _share(step, hosts, state, *((tree, _places(tree)) for tree in kept)),
        "written of a checkpoint": _share(step, hosts, state, once=True),
    }
    if not adapter:
        files = by_file(spread(_tensors(spec, folder, stored), hosts))
        by, written = writers(files, hosts), [0] * hosts
        for file, part in files.items():
            written[by[file]] += size_of_file(part)
        found["written of the model"] = HostShare.of(written, sum(written))
    return found


def _share(step: PlannedStep, hosts: int, *parts: Placed, once: bool = False) -> HostShare:
    at = host_of(step.mesh, hosts)
    by_host = [bytes_of(tree, places, at, once=once) for tree, places in parts]
    return HostShare.of(np.sum(by_host, axis=0).tolist(), sum(size_of(tree) for tree, _ in parts))


def _places(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _stored(folder: Path) -> str:
    """safetensors' name of the dtype that the folder's config names; float32 if it names none."""
    config = read_json(folder, "config.json")
    named = jnp.dtype(config.get("dtype") or config.get("torch_dtype") or "float32")
    return next((code for code, dtype in DTYPES.items() if dtype == named), "F32")


def _tensors(spec: DecoderSpec, folder: Path, stored: str) -> dict[str, TensorInfo]:
    if tensor_names(folder):
        return Tensors(folder).infos
    entries = entries_of(spec, folder)
    return split({entry.name: TensorInfo(SINGLE, stored, entry.shape) for entry in entries}, MAX_BYTES)
