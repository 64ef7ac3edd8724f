"""The models of a run: checked before any weights, read onto their devices, and put together with the objective."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dpo_jax import sharding, trees
from dpo_jax.data.tokenizer import Tokenizer
from dpo_jax.errors import UserError
from dpo_jax.files import digest_of, piece_digest, state_of
from dpo_jax.hf import checkpoint, ending, resize, tensors
from dpo_jax.hf.configs import read_spec
from dpo_jax.hf.ending import Ending
from dpo_jax.hf.settings import ExportSettings
from dpo_jax.model import expert_split, grouped, remat
from dpo_jax.model.backends import table
from dpo_jax.model.decoder import Execution, Model, abstract_params, held_in
from dpo_jax.model.quantised import Kind, kept_shapes
from dpo_jax.model.settings import AUTO, FITTING, MeshSettings, ModelSettings
from dpo_jax.model.spec import DecoderSpec, GatedDelta
from dpo_jax.model.weights import Weights, head_is_frozen
from dpo_jax.objectives.terms import Term
from dpo_jax.preference.loss import TrainingObjective
from dpo_jax.processes.here import Here
from dpo_jax.run.sources import Sources
from dpo_jax.training.settings import ReferenceSettings
from dpo_jax.trees import Params

PIECE = 1 << 28
"""Bytes of weights that a process reads at a time for their digest."""


def make_mesh(mesh: MeshSettings, model: ModelSettings, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh of this machine's devices, or of those that are given and that only a compiler knows.

    float32 means float32 also where matrix units round by default.
    """
    made = sharding.make_mesh(mesh.data, mesh.fsdp, mesh.tensor, devices, expert=mesh.expert, context=mesh.context)
    exact = compute_dtype(model, made) == "float32"
    jax.config.update("jax_default_matmul_precision", "highest" if exact else None)
    if devices is None:
        remat.check(model.remat, made.local_devices)
    return made


def compute_dtype(model: ModelSettings, mesh: jax.sharding.Mesh) -> str:
    """dtype of activations and matrix products."""
    if model.compute_dtype != "auto":
        return model.compute_dtype
    return "float32" if sharding.platform(mesh) == "cpu" else "bfloat16"


def load_model(
    folder: Path,
    mesh: jax.sharding.Mesh,
    dtype: str = "float32",
    *,
    scalar_head: bool = False,
    rows: int | None = None,
    adapter: Path | None = None,
) -> Model:
    """A folder's model, straight onto its shardings; with a scalar head, from a language model or a reward model.

    Leaves that are used in float32 whatever the dtype of computation (norm scales) are read in float32. The embedding
    gets at least so many `rows`; what an adapter changes is added.
    """
    spec = spec_of(folder, rows, scalar_head=scalar_head)
    return loaded(spec, folder, mesh, functools.partial(held_in, dtype=jnp.dtype(dtype)), adapter)


def spec_of(folder: Path, rows: int | None = None, *, scalar_head: bool) -> DecoderSpec:
    """The spec of a folder's model, with at least so many rows in its embedding; raises as `with_rows`."""
    return resize.with_rows(read_spec(folder, scalar_head=scalar_head), folder, rows)


def loaded(
    spec: DecoderSpec,
    folder: Path,
    mesh: jax.sharding.Mesh,
    held: Callable[[str], DTypeLike],
    adapter: Path | None = None,
    quantise: Mapping[str, Kind] | None = None,
) -> Model:
    """A folder's model on its shardings, each leaf in the dtype that `held` says, or quantised; with an adapter merged,
    if given."""
    kinds = quantise or {}
    shardings = sharding.param_shardings(abstract_quantised(spec, kinds), mesh)
    how = {"dtype": held, "shardings": shardings, "spec": spec, "adapter": adapter}
    return checkpoint.load_hf(folder, **how, quantise=kinds, unrounded=bool(kinds))


def abstract_quantised(spec: DecoderSpec, kinds: Mapping[str, Kind]) -> Params:
    """Shapes and dtypes of the parameters where these kernels are kept in few bits."""
    found = {}
    for path, leaf in trees.paths(abstract_params(spec)).items():
        if path not in kinds:
            found[path] = leaf
            continue
        *outer, inputs, outputs = leaf.shape
        for name, like in kept_shapes(kinds[path], (inputs, outputs)).items():
            found[f"{path}/{name}"] = jax.ShapeDtypeStruct((*outer, *like.shape), like.dtype)
    return trees.from_paths(found)


def weights_digest(folder: Path, place: Here | None = None) -> str:
    """Digest of the weights of a folder: of all their pieces, which are read once while the files are the same.

    Of several processes, all of which call, each reads its share, if all see the same files; else all of them.
    """
    place = place or Here()
    files = [(tensors.member(folder, file), file) for file, *_ in tensors.stamps(folder)]
    seen = [[name, *state_of(path)] for path, name in files]
    shared = all(one == seen for one in place.everyone("files of weights", seen))
    pieces = [
        (path, start, *state)
        for (path, _), (_, *state) in zip(files, seen, strict=True)
        for start in range(0, state[0], PIECE)
    ]

    def read(share: Sequence[Any]) -> Iterator[str]:
        for piece in share:
            place.moved()
            yield _digest_of(*piece)

    found = place.by_turns("digests of weights", pieces, read) if shared else list(read(pieces))
    return digest_of("\n".join(found))


@functools.lru_cache(maxsize=1024)
def _digest_of(path: Path, start: int, *_state: int) -> str:
    return piece_digest(path, start, PIECE)


def check_models(
    sources: Sources,
    mesh: jax.sharding.Mesh,
    *,
    model: ModelSettings,
    reference: ReferenceSettings,
    max_length: int,
    scalar_head: bool,
) -> None:
    """Read the configs of the policy and of another reference, before any weights.

    Raises:
      UserError: a folder or its config is not as it must be, or the two models know different tokens.
    """
    policy = spec_of(sources.policy, sources.rows, scalar_head=scalar_head)
    _check_length("model.path", policy, max_length)
    attention_of(model, policy, mesh)
    check_mesh(policy, mesh)
    if model.router_aux and policy.experts is None:
        raise UserError(f"model.router_aux: {model.router_aux} balances experts, and there are none; leave it out")
    if reference.mode == "none" or sources.reference_is_policy:
        return
    other = spec_of(sources.reference, sources.rows, scalar_head=False)
    if other.vocab_size != policy.vocab_size:
        raise UserError(
            f"reference.path: {reference.path} knows {other.vocab_size} tokens and the policy "
            f"{policy.vocab_size}; give a reference with the policy's tokenizer"
        )
    _check_length("reference.path", other, max_length)
    attention_of(model, other, mesh)
    check_mesh(other, mesh)
    if reference.mode == "live" and other != policy:
        raise UserError(
            "reference.mode: live computes the reference as it computes the policy, and "
            f"reference.path {reference.path} is another kind of model; give mode: cached"
        )


def check_mesh(spec: DecoderSpec, mesh: jax.sharding.Mesh) -> None:
    """Whether the mesh can share rows of this model, whose heads context splits together with tensor, and experts.

    Raises:
      UserError: an axis does not divide the heads of a layer, or the experts; or these GPUs have no kernels for them.
    """
    expert_split.check(mesh, spec.experts)
    if spec.experts is not None and sharding.platform(mesh) == "gpu" and (gone := grouped.missing()) is not None:
        raise UserError(f"model.path: {gone}")
    tensor, context = mesh.shape["tensor"], mesh.shape["context"]
    mixers = {layer.mixer for layer in spec.layers}
    for heads in sorted({m.value_heads if isinstance(m, GatedDelta) else m.heads for m in mixers}):
        if context > 1 and heads % (tensor * context):
            most = math.gcd(heads, tensor * context)
            raise UserError(
                f"mesh.context: {context} with tensor={tensor} splits heads into {tensor * context} parts, and layers "
                f"have {heads}; choose sizes whose product divides {most}"
            )


def check_ending(sources: Sources, tokenizer: Tokenizer, export: ExportSettings, *, scalar_head: bool) -> Ending | None:
    """How the answers of a run end, and whether the policy's folder stops there; None for a reward model.

    Raises:
      UserError: as `ending_of`; or the setting would do nothing.
    """
    ending.check_setting(export.align_eos, scalar_head)
    return None if scalar_head else ending.ending_of(sources.policy, tokenizer)


def notes(sources: Sources, end: Ending | None, export: ExportSettings) -> list[str]:
    """What is to be said of the folder that a run leaves, at its start and on its card."""
    found = [] if end is None else [end.line(export.align_eos)]
    if sources.rows is not None:
        before = read_spec(sources.policy).vocab_size
        more = sources.rows - before
        found.append(
            f"the embedding has {before:,} rows and gets {more:,} more, each the mean of those (model.resize_embedding)"
            if more > 0
            else f"the embedding's {before:,} rows are enough for the tokenizer, and are left (model.resize_embedding)"
        )
    return [line for line in found if line]


def attention_of(model: ModelSettings, spec: DecoderSpec, mesh: jax.sharding.Mesh) -> str:
    """What computes the attention of this model on this mesh; raises as `attention_backend`."""
    return attention_backend(model.attention, spec, compute_dtype(model, mesh), device_of(mesh.devices.flat[0]))


def attention_backend(name: str, spec: DecoderSpec, dtype: str, device: table.Device) -> str:
    """What computes the attention of this model in this dtype on this device, where `name` is asked for.

    Raises:
      UserError: the one that is asked for cannot; says by which rule.
    """
    if name == "auto":
        return table.automatic(spec, dtype, device)
    reason = table.why_not(name, spec, dtype, device)
    if reason is not None:
        raise UserError(f"model.attention: {name} {reason}; give auto, or xla, which does everything everywhere")
    return name


def device_of(device: Any) -> table.Device:
    """What attention needs to know of one of JAX's devices."""
    capability = str(getattr(device, "compute_capability", "")) if device.platform == "gpu" else ""
    number = capability.replace(".", "", 1).isdecimal()  # that of an AMD GPU is a name
    return table.Device(device.platform, float(capability) if number else None)


def _check_length(setting: str, spec: DecoderSpec, max_length: int) -> None:
    if spec.positions is not None and max_length > spec.positions:
        raise UserError(
            f"data.max_length: {max_length} is more than the {spec.positions} positions that {setting} "
            f"knows; set it to {spec.positions} or less"
        )


def make_objective(
    model: ModelSettings,
    terms: tuple[Term, ...],
    spec: DecoderSpec,
    weights: Weights,
    mesh: jax.sharding.Mesh,
    *,
    statistics: bool = True,
    dropout: float = 0.0,
) -> TrainingObjective:
    """The objective on this model; of its weights (arrays or shapes) it matters which are trained, and `dropout` is of
    their adapter."""
    where, split, attention = sharding.activations(mesh), sharding.head_split(mesh), attention_of(model, spec, mesh)
    platform, frozen = sharding.platform(mesh), head_is_frozen(spec, weights)
    policy = FITTING[0] if model.remat == AUTO else model.remat  # until the step's bytes are known
    execution = Execution(model.scan_layers, policy, where, attention, platform, split, frozen)
    return TrainingObjective(
        spec=spec,
        terms=terms,
        compute_dtype=compute_dtype(model, mesh),
        rounded_gradients=model.gradient_dtype == "compute",
        execution=execution,
        statistics=statistics,
        router_aux=spec.router_aux if model.router_aux is None else model.router_aux,
        dropout=dropout,
    )
