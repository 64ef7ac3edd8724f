"""A folder's model whose weights and rows are split over a mesh; processes of their own import it too."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import sharding
from dpo_jax.hf.checkpoint import load_hf
from dpo_jax.hf.configs import read_spec
from dpo_jax.model import decoder
from dpo_jax.model.attention import causal
from dpo_jax.model.decoder import Execution, Model, abstract_params


def placed(folder: Path, mesh) -> Model:
    """The folder's model, each device's part read for it alone."""
    spec = read_spec(folder)
    return load_hf(folder, shardings=sharding.param_shardings(abstract_params(spec), mesh), spec=spec)


@functools.partial(jax.jit, static_argnums=(0, 3))
def shared_out(spec, params, ids, mesh):
    execution = Execution(activations=sharding.activations(mesh), head=sharding.head_split(mesh))
    states = decoder.hidden(spec, params, ids, causal(*ids.shape), execution)
    return decoder.head_logits(spec, params, states.reshape(-1, spec.head_width)).reshape(*ids.shape, -1)


def sharded_logits(folder: Path, ids: np.ndarray, mesh) -> np.ndarray:
    """Logits of rows that are split over the mesh, with weights that are split too."""
    model, ids = placed(folder, mesh), jax.device_put(jnp.asarray(ids), sharding.rows(mesh))
    return np.asarray(shared_out(model.spec, model.params, ids, mesh))
