"""A model that is named in a command, with an adapter or as one."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from dpo_jax.errors import UserError, printable
from dpo_jax.hf.beside import ADAPTER_CONFIG
from dpo_jax.hf.merged import FILES
from dpo_jax.hf.peft_config import base_name
from dpo_jax.hf.tensors import local_folder


class Adapted(NamedTuple):
    """A base, and the folder of the adapter that goes with it; `line` says so where nobody named the base."""

    base: str
    adapter: Path | None
    line: str

    @property
    def name(self) -> str:
        """What to call the two, shortly."""
        return Path(self.base if self.adapter is None else self.adapter).expanduser().resolve().name


def adapted(model: str, adapter: str | None = None) -> Adapted:
    """The base and the adapter that a command means: of a model, a model and an adapter, or an adapter alone.

    An adapter alone (a folder, or what the hub has under the name) is of the base that its config names.

    Raises:
      UserError: two adapters are named, or the adapter's base cannot be told.
    """
    own = _adapter_alone(model)
    if own is None:
        return Adapted(model, None if adapter is None else local_folder(adapter, FILES), "")
    if adapter is not None:
        raise UserError(f"{model} is an adapter, and --adapter {adapter} is another; give a model, and one of them")
    base = base_name(own)
    if base is None:
        raise UserError(f"{own / ADAPTER_CONFIG} names no base_model_name_or_path; give BASE with --adapter {model}")
    try:
        local_folder(base, ("config.json",))
    except UserError as error:
        why = f"{model} is an adapter of {printable(base[:200])}, not a model: {error}"
        raise UserError(f"{why}; or give its base where it is: BASE --adapter {model}") from error
    return Adapted(base, own, f"{model} is an adapter of {printable(base)}, which its {ADAPTER_CONFIG} names")


def base_of(folder_or_hub_id: str | Path, adapter: str | Path | None) -> tuple[str, str | Path | None]:
    """The base and the adapter that are meant in Python, where an adapter that is named goes on top of whatever the
    other is.

    Raises:
      UserError: as `adapted`.
    """
    if adapter is not None:
        return os.fspath(folder_or_hub_id), adapter
    try:
        return adapted(os.fspath(folder_or_hub_id))[:2]
    except UserError as error:
        name = repr(os.fspath(folder_or_hub_id))
        raise UserError(re.sub(r"BASE (with )?--adapter .*$", f"load_hf(BASE, adapter={name})", str(error))) from error


def _adapter_alone(model: str) -> Path | None:
    """The folder of an adapter that is given as a model; None if it is none, or a model lies beside it."""
    folder = Path(model).expanduser()
    folder = folder if folder.exists() else local_folder(model, ("config.json", *FILES))
    has = {name for name in ("config.json", ADAPTER_CONFIG) if os.path.lexists(folder / name)}
    return folder if has == {ADAPTER_CONFIG} else None
