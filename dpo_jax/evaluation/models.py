"""A model that answers or judges: a folder's, on the devices of this machine."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dpo_jax import sharding
from dpo_jax.data.tokenizer import Tokenizer
from dpo_jax.errors import UserError
from dpo_jax.evaluation.generate import Decoding, check
from dpo_jax.evaluation.winrate import stop_tokens
from dpo_jax.hf.checkpoint import load_hf
from dpo_jax.hf.configs import find_model, read_spec
from dpo_jax.hf.tensors import SIDE_FILES, local_folder
from dpo_jax.hf.tokenizer import generation_settings
from dpo_jax.model.decoder import Model, abstract_params, held_in


def open_model(
    folder_or_hub_id: str | Path,
    *,
    dtype: str = "auto",
    adapter: Path | None = None,
    mesh: Mesh | None = None,
    scalar_head: bool = False,
) -> Model:
    """The model of a folder, with an adapter if there is one, split over a mesh, or all devices of this machine.

    Args:
      folder_or_hub_id: where it is.
      dtype: to compute in; auto is float32 on a CPU, bfloat16 elsewhere. Norm scales stay in float32, as in training.
      adapter: folder of a PEFT adapter.
      mesh: where it lies; None splits each weight over all devices.
      scalar_head: whether it must be a reward model; a language model otherwise.

    Raises:
      UserError: there is no such model, it cannot be read, or it has the other head.
    """
    folder = find_model(folder_or_hub_id)
    spec = read_spec(folder, scalar_head=None if scalar_head else False)
    if scalar_head and not spec.scalar_head:
        raise UserError(
            f"{folder}: is a language model, and has no scores; give the folder of a reward model, such as "
            "objective.name=reward leaves"
        )
    if mesh is None and jax.device_count() > 1:
        mesh = sharding.make_mesh(fsdp=1, tensor=-1)
    places = None if mesh is None else sharding.param_shardings(abstract_params(spec), mesh)
    if dtype == "auto":
        platform = jax.default_backend() if mesh is None else sharding.platform(mesh)
        dtype = "float32" if platform == "cpu" else "bfloat16"
    held = functools.partial(held_in, dtype=jnp.dtype(dtype))
    return load_hf(folder, dtype=held, shardings=places, spec=spec, adapter=adapter)


def decoding_of(
    folder_or_hub_id: str | Path,
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    named: Callable[[str], str] = str,
) -> Decoding:
    """How tokens are chosen: as is given, and else as generation_config.json says, if that wants tokens drawn.

    Temperature 0 is greedy. `named` is what the caller calls an argument, for what is refused.

    Raises:
      UserError: a number is out of range, or would be ignored.
    """
    own = generation_settings(local_folder(folder_or_hub_id, SIDE_FILES), tokenizer)
    if temperature is None:
        temperature = own.temperature if own.do_sample else 0.0
    ignored = [name for name, value in (("top_p", top_p), ("top_k", top_k)) if value is not None]
    if temperature == 0 and ignored:
        raise UserError(f"{named(ignored[0])}: greedy decoding draws nothing; give a temperature too")
    usual = (own.top_p, own.top_k) if own.do_sample and temperature else (1.0, 0)
    decoding = Decoding(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=usual[0] if top_p is None else top_p,
        top_k=usual[1] if top_k is None else top_k,
        stop=stop_tokens(folder_or_hub_id, tokenizer),
    )
    check(decoding)
    return decoding
