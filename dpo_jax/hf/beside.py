"""What a model folder holds beside its tensors: which files an export takes over, and which must not be there.

Every file comes along but weights, hidden files, and what an export writes anew; so a tokenizer, a template or a
preprocessor of any kind is in the export too. All of them are looked at before anything of the folder is used: a link
that leads out of it, or a file that cannot be read, would otherwise be found when the training is over.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from dpo_jax import __version__
from dpo_jax.errors import UserError, printable
from dpo_jax.hf import tensors
from dpo_jax.hf.tensors import PICKLES, member, read_json

WRITTEN_ANEW = frozenset({"README.md", tensors.OURS, tensors.SUMS})
GENERATION = "generation_config.json"
"""Not taken over for a reward model, which generates nothing."""
MAY_BE_OTHERS = frozenset({GENERATION, "chat_template.jinja"})
"""Files of a folder in place of which an export may have its own."""
PACKING = frozenset({"quantize_config.json", "quant_config.json", "hf_quant_config.json"})
"""How weights are packed, which those of an export are not."""
ADAPTER, ADAPTER_CONFIG = "adapter_model", "adapter_config.json"
WEIGHTS = (".safetensors", *PICKLES, ".npy", ".gguf", ".onnx", ".onnx_data", ".tflite", ".mlmodel", ".index.json")
"""How names of weights end, and of lists of them, of any program."""
MOST_FILES = 10_000
PIECE = 1 << 20


def record(base: str, folder: Path, given: Collection[str]) -> dict[str, str]:
    """The file in which an export says what it is of, unless one is `given`: every byte of the base is read for it."""
    if tensors.OURS in given:
        return {}
    facts = {"version": __version__, "base_model": base, "base_digest": tensors.weights_digest(folder)}
    return {tensors.OURS: json.dumps(facts, indent=2) + "\n"}


def files(folder: Path, *, generation: bool = True, quantised: bool = False, own: Collection[str] = ()) -> list[str]:
    """Names of the files that an export takes over, `generation_config.json` among them unless told otherwise, and
    those that say how weights are packed unless these were; but for what it may have, and has, as its `own`.

    Those are all but hidden ones, weights, and what is written anew. A folder inside that holds weights of its own (an
    earlier checkpoint, another format) is another model, and stays behind whole.

    Raises:
      UserError: one of them leads out of the folder, is no regular file, or cannot be read; or there are too many.
    """
    found = sorted(_names(folder, ""))
    for name in found:
        path = member(folder, name)
        try:
            path.open("rb").close()
        except OSError as error:
            remedy = "make it readable, or take it out of a copy of the folder"
            raise UserError(f"{folder / name} cannot be read ({error.strerror}); {remedy}") from None
    left = (
        WRITTEN_ANEW
        | (MAY_BE_OTHERS & {*own})
        | (PACKING if quantised else set())
        | (set() if generation else {GENERATION})
    )
    return [name for name in found if name not in left]


def _names(folder: Path, inside: str) -> Iterator[str]:
    """Names below `inside`, a folder of the folder or the folder itself."""
    with os.scandir(folder / inside) as entries:
        there = sorted(entries, key=lambda entry: entry.name)
    if len(there) > MOST_FILES:
        raise UserError(f"{folder / inside} holds {len(there)} files, more than the {MOST_FILES} a model may have")
    if inside and any(entry.name.endswith(WEIGHTS) for entry in there):
        return
    for entry in there:
        name = f"{inside}{entry.name}"
        if entry.name.startswith((".", "__pycache__")) or entry.name.endswith(WEIGHTS):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _names(folder, f"{name}/")
        elif not _leads_to_own_folder(folder, name):
            yield name


def _leads_to_own_folder(folder: Path, name: str) -> bool:
    """Whether this is a link to a folder inside the folder, whose files are found there."""
    path = folder / name
    return path.is_symlink() and path.is_dir() and path.resolve().is_relative_to(folder.resolve())


def copy(folder: Path, names: Sequence[str], target: Path) -> dict[str, str]:
    """Copies files of a folder into a new one, some bytes at a time and down to the disk; SHA-256 by name."""
    return {name: _copied(member(folder, name), target / name) for name in names}


def _copied(source: Path, path: Path) -> str:
    digest = hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as old, path.open("xb") as new:
        while part := old.read(PIECE):
            digest.update(part)
            new.write(part)
        new.flush()
        os.fsync(new.fileno())
    return digest.hexdigest()


def check_run(folder: Path) -> None:
    """Refuses the folder of a run, which has what it has made inside.

    Raises:
      UserError: it is one; says where its model or adapter is.
    """
    if any(os.path.lexists(folder / name) for name in ("config.json", ADAPTER_CONFIG)):
        return
    for made, config in (("model", "config.json"), ("adapter", ADAPTER_CONFIG)):
        if os.path.lexists(folder / made / config):
            raise UserError(f"{folder} is the folder of a run, with its {made} in {folder / made}; give that")


def check_kind(folder: Path) -> None:
    """Refuses the folder of a run, which has its model inside, and that of an adapter (LoRA and the like).

    An adapter alone is no model, and beside one it would be ignored.

    Raises:
      UserError: it is one of them; says which, and what to do.
    """
    check_run(folder)
    if not os.path.lexists(folder / ADAPTER_CONFIG):
        return
    base = read_json(folder, ADAPTER_CONFIG).get("base_model_name_or_path")
    of = f" of {printable(base[:200])}" if isinstance(base, str) and base else ""
    merge = f"merge it into its base (python -m dpo_jax.convert merge BASE {folder} TARGET) and give TARGET"
    if os.path.lexists(folder / "config.json"):
        raise UserError(
            f"{folder / ADAPTER_CONFIG}: the folder holds an adapter{of} beside a model, which would be ignored here "
            f"and followed by transformers; take {ADAPTER_CONFIG} and {ADAPTER}.* out of a copy of it, or {merge}"
        )
    raise UserError(
        f"{folder} is an adapter{of}, not a model ({ADAPTER_CONFIG} without config.json); give its base and this: to "
        f"train model.path=BASE adapter.path={folder}, elsewhere BASE --adapter {folder}, in Python "
        f"load_hf(BASE, adapter={str(folder)!r}); or {merge}"
    )
