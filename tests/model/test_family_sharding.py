"""Every kind of layer computes the same on one device, two, four and eight, however the mesh splits its weights."""

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dpo_jax import sharding
from tests.support.family_models import KINDS, allowed, our_logits, ours, own
from tests.support.sharded import placed, sharded_logits
from tests.support.tiers import LIGHT_MIXERS, by_day, by_pairs

pytest.importorskip("torch")
MESHES = {
    "tensor 2": {"fsdp": 1, "tensor": 2},
    "fsdp 4": {"fsdp": 4},
    "data 2, tensor 2": {"data": 2, "fsdp": 1, "tensor": 2},
    "tensor 2, context 2": {"fsdp": 1, "tensor": 2, "context": 2},
    "fsdp 2, context 2": {"fsdp": 2, "context": 2},
}
ON_EIGHT = ("gpt_oss", "deepseek_v3", "qwen3_5_text", "bloom", "opt_narrow", "gemma4_everything")
EIGHT = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from pathlib import Path
from dpo_jax import sharding
from tests.support.sharded import sharded_logits
for name, sizes in (("tensor", {"data": 2, "tensor": 2}), ("context", {"tensor": 2, "context": 2})):
    mesh = sharding.make_mesh(**sizes)
    for folder in map(Path, sys.argv[1:]):
        np.save(folder / f"{name}.npy", sharded_logits(folder, np.load(folder / "ids.npy"), mesh))
"""


def mesh_of(sizes: dict[str, int]):
    return sharding.make_mesh(**sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])


SHARDED = ("gpt_oss", "qwen3_5_text", "bloom")
DAY = [(name, "data 2, tensor 2") for name in LIGHT_MIXERS] + [(name, "tensor 2, context 2") for name in SHARDED]


@pytest.mark.parametrize(("name", "mesh"), by_pairs(itertools.product(KINDS, MESHES), DAY))
def test_a_mesh_changes_nothing(name, mesh):
    found = sharded_logits(own(name).path, four_rows(name), mesh_of(MESHES[mesh]))
    np.testing.assert_allclose(found, wanted_of(name), rtol=0, atol=allowed(wanted_of(name)))


def four_rows(name: str) -> np.ndarray:
    """The folder's rows, and the same backwards."""
    return np.concatenate([own(name).ids, own(name).ids[:, ::-1]])


@functools.cache
def wanted_of(name: str) -> np.ndarray:
    """Their logits on one device."""
    model, ids = ours(own(name).path), four_rows(name)
    return np.concatenate([our_logits(model, ids[:2]), our_logits(model, ids[2:])])


@functools.cache
def on_eight() -> dict[tuple[str, str], np.ndarray]:
    """Logits found on eight devices, by the model's name and that of the mesh.

    In a process of its own, as the number of devices is settled when JAX starts; one row for each part of the batch,
    and no two alike, so that it shows if they are mixed up.
    """
    folders = {name: own(name).path for name in ON_EIGHT}
    for name, folder in folders.items():
        np.save(folder / "ids.npy", four_rows(name))
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", EIGHT, *map(str, folders.values())],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {
        (name, mesh): np.load(folder / f"{mesh}.npy")
        for name, folder in folders.items()
        for mesh in ("tensor", "context")
    }


@pytest.mark.nightly
@pytest.mark.parametrize("name", ON_EIGHT)
@pytest.mark.parametrize("mesh", ["tensor", "context"])
def test_eight_devices_change_nothing(name, mesh):
    found, wanted = on_eight()[name, mesh], wanted_of(name)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=allowed(wanted))


@pytest.mark.parametrize("name", by_day(KINDS, LIGHT_MIXERS))
def test_matrices_are_split(name):
    """Over four devices no device holds more than half of the weights; what is whole is small."""
    model = placed(own(name).path, mesh_of({"fsdp": 2, "tensor": 2}))
    leaves = jax.tree.leaves(model.params)
    own_part = sum(leaf.addressable_shards[0].data.size for leaf in leaves)
    assert own_part < 0.5 * sum(leaf.size for leaf in leaves)
