"""The models of a run: read onto their devices, checked before that, and put together with the objective."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from dpo_jax import sharding
from dpo_jax.config.run import Run
from dpo_jax.hf import checkpoint as hf
from dpo_jax.hf import tensors
from dpo_jax.hf.configs import read_spec
from dpo_jax.model import remat
from dpo_jax.model.backends import table
from dpo_jax.model.decoder import Execution, Model, abstract_params, held_in
from dpo_jax.model.spec import DecoderSpec
from dpo_jax.preference.loss import Problem
from dpo_jax.run.sources import Sources, is_policy
from dpo_jax.settings import UserError


def make_mesh(run: Run) -> jax.sharding.Mesh:
    """The mesh of this machine's devices; float32 means float32 also where matrix units round by default."""
    if compute_dtype(run) == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    mesh = sharding.make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
    remat.check(run.model.remat, mesh.local_devices)
    return mesh


def compute_dtype(run: Run) -> str:
    """dtype of activations and matrix products."""
    if run.model.compute_dtype != "auto":
        return run.model.compute_dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def load_model(folder: Path, mesh: jax.sharding.Mesh, dtype: str = "float32", *, scalar_head: bool = False) -> Model:
    """A folder's model, straight onto its shardings; with a scalar head, from a language model or a reward model.

    Leaves that are used in float32 whatever the dtype of computation (norm scales) are read in float32.
    """
    spec = read_spec(folder, scalar_head=scalar_head)
    shardings = sharding.param_shardings(abstract_params(spec), mesh)
    held = functools.partial(held_in, dtype=jnp.dtype(dtype))
    return hf.load_hf(folder, dtype=held, shardings=shardings, spec=spec)


@functools.cache
def weights_digest(folder: Path) -> str:
    """Digest of the weights of a folder; every byte of them is read, so once is enough."""
    return tensors.weights_digest(folder)


def check_models(run: Run, sources: Sources) -> None:
    """Read the configs of the policy and of another reference, before any weights.

    Raises:
      UserError: a folder or its config is not as it must be, or the two models know different tokens.
    """
    policy = read_spec(sources.policy, scalar_head=run.objective.trains_reward_model)
    _check_length(run, "model.path", policy)
    attention_backend(run, policy)
    if run.model.router_aux and policy.experts is None:
        raise UserError(f"model.router_aux: {run.model.router_aux} balances experts, and there are none; leave it out")
    if run.reference.mode == "none" or is_policy(run):
        return
    reference = read_spec(sources.reference, scalar_head=False)
    if reference.vocab_size != policy.vocab_size:
        raise UserError(
            f"reference.path: {run.reference.path} knows {reference.vocab_size} tokens and the policy "
            f"{policy.vocab_size}; give a reference with the policy's tokenizer"
        )
    _check_length(run, "reference.path", reference)
    attention_backend(run, reference)
    if run.reference.mode == "live" and reference != policy:
        raise UserError(
            "reference.mode: live computes the reference as it computes the policy, and "
            f"reference.path {run.reference.path} is another kind of model; give mode: cached"
        )


def attention_backend(run: Run, spec: DecoderSpec) -> str:
    """What computes the attention of this model.

    Raises:
      UserError: the one that the settings ask for cannot; says by which rule.
    """
    name, dtype, device = run.model.attention, compute_dtype(run), _device()
    if name == "auto":
        return table.automatic(spec, dtype, device)
    reason = table.why_not(name, spec, dtype, device)
    if reason is not None:
        raise UserError(f"model.attention: {name} {reason}; give auto, or xla, which does everything everywhere")
    return name


def _device() -> table.Device:
    """What the run computes on."""
    platform = jax.default_backend()
    capability = str(getattr(jax.local_devices()[0], "compute_capability", "")) if platform == "gpu" else ""
    number = capability.replace(".", "", 1).isdecimal()  # that of an AMD GPU is a name
    return table.Device(platform, float(capability) if number else None)


def _check_length(run: Run, setting: str, spec: DecoderSpec) -> None:
    if spec.positions is not None and run.data.max_length > spec.positions:
        raise UserError(
            f"data.max_length: {run.data.max_length} is more than the {spec.positions} positions that {setting} "
            f"knows; set it to {spec.positions} or less"
        )


def make_problem(run: Run, model: Model, mesh: jax.sharding.Mesh) -> Problem:
    """The objective on this model."""
    where, split, attention = sharding.rows(mesh), sharding.head_split(mesh), attention_backend(run, model.spec)
    execution = Execution(run.model.scan_layers, run.model.remat, where, attention, split)
    return Problem(
        spec=model.spec,
        terms=run.objective.terms,
        compute_dtype=compute_dtype(run),
        execution=execution,
        statistics=run.log.token_statistics,
        router_aux=model.spec.router_aux if run.model.router_aux is None else run.model.router_aux,
    )


def shares(run: Run, spec: DecoderSpec) -> bool:
    """Whether prompts are laid out once for all their completions."""
    return run.batch.share_prompts and spec.shares_trunk(run.data.max_length)
