"""Every kind of layer computes the same on one device, two, four and eight, however the mesh splits its weights."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import sharding, trees
from dpo_jax.hf.checkpoint import load_hf
from dpo_jax.hf.configs import read_spec
from dpo_jax.model import decoder
from dpo_jax.model.attention import causal
from dpo_jax.model.decoder import Execution, Model, abstract_params
from tests.conftest import ROOT
from tests.family_models import KINDS, our_logits, ours, own

pytest.importorskip("torch")
LOGIT = 5e-5
"""Largest difference allowed of a logit: a product that is shared out is added up in another order. Logits reach 17."""
MESHES = {
    "fsdp 2": {"fsdp": 2},
    "fsdp 4": {"fsdp": 4},
    "tensor 2, fsdp 2": {"tensor": 2, "fsdp": 2},
    "data 2, tensor 2": {"data": 2, "fsdp": 1, "tensor": 2},
}


def placed(folder: Path, mesh) -> Model:
    """The folder's model, each device's part read for it alone."""
    spec = read_spec(folder)
    return load_hf(folder, shardings=sharding.param_shardings(abstract_params(spec), mesh), spec=spec)


@functools.partial(jax.jit, static_argnums=(0, 3))
def shared_out(spec, params, ids, where):
    states = decoder.hidden(spec, params, ids, causal(*ids.shape), Execution(activations=where))
    return decoder.head_logits(spec, params, states.reshape(-1, spec.head_width)).reshape(*ids.shape, -1)


def sharded_logits(folder: Path, ids: np.ndarray, mesh) -> np.ndarray:
    """Logits of rows that are split over the mesh, with weights that are split too."""
    model, where = placed(folder, mesh), sharding.rows(mesh)
    return np.asarray(shared_out(model.spec, model.params, jax.device_put(jnp.asarray(ids), where), where))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", KINDS)
def test_a_mesh_changes_nothing(name, mesh):
    sizes = {"data": 1, "tensor": 1, **MESHES[mesh]}
    count = sizes["data"] * sizes["fsdp"] * sizes["tensor"]
    folder = own(name)
    wanted = our_logits(ours(folder.path), folder.ids)
    found = sharded_logits(
        folder.path, np.tile(folder.ids, (2, 1)), sharding.make_mesh(**sizes, devices=jax.devices()[:count])
    )
    np.testing.assert_allclose(found, np.tile(wanted, (2, 1, 1)), rtol=0, atol=LOGIT)
