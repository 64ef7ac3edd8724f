"""Whether a folder survives a round trip and PyTorch sees the model that we see: the proof that a user can repeat.

The folder is loaded, written again, and every tensor and file of the two is compared. Where torch is installed, it
reads both, and its logits are held against each other and against ours. One copy of the model is in memory at a time.
"""

import contextlib
import gc
import importlib.util
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from dpo_jax.errors import UserError, one_line, printable
from dpo_jax.files import file_digest, size_text
from dpo_jax.hf import beside, tensors
from dpo_jax.hf.beside import WRITTEN_ANEW
from dpo_jax.hf.checkpoint import load_hf, save_hf
from dpo_jax.hf.configs import find_model, quiet, read_spec
from dpo_jax.hf.merge import merge
from dpo_jax.hf.merged import FILES
from dpo_jax.hf.quantisation import KEY
from dpo_jax.hf.quantised import opened, without_quantisation
from dpo_jax.hf.tensors import Tensors, local_folder
from dpo_jax.model.attention import causal
from dpo_jax.model.decoder import Model, hidden, logits, scalar_scores

ROWS, LENGTH = 3, 24
"""Rows of random token ids that the logits are compared on, and their length."""
ALLOWED = 2e-4
"""Largest difference of float32 logits between PyTorch and JAX, for logits up to 1; it grows with the largest one."""


class Check(NamedTuple):
    """One comparison: what, what was found, and whether it is as it should be (None: only said, not compared)."""

    what: str
    found: str
    ok: bool | None

    def __str__(self) -> str:
        """One line."""
        verdict = {True: "ok", False: "DIFFERS", None: "-"}[self.ok]
        return printable(f"{verdict:<8} {self.what:<24} {self.found}")


class Verification(NamedTuple):
    """Everything that was compared; `ok` if nothing differs. `quantised` names the method that packed the folder."""

    folder: Path
    checks: tuple[Check, ...]
    quantised: str = ""

    @property
    def ok(self) -> bool:
        """Whether no comparison failed."""
        return all(check.ok is not False for check in self.checks)


def check(
    folder_or_hub_id: str | Path,
    *,
    keep: str | Path | None = None,
    torch: bool = True,
    say: Callable[[str], object] = lambda line: None,
) -> Verification:
    """Loads a folder, exports it, and compares the two, in PyTorch too if it is installed.

    Of a folder of packed weights the dequantised ones are compared, and PyTorch sees the export only.

    Args:
      folder_or_hub_id: of the model.
      keep: where the export stays; it must not exist, or be empty. None uses a temporary folder.
      torch: whether logits are compared in PyTorch. False is for models that take too long or too much memory.
      say: takes each line as it is known, first what is going to be done and what that takes.

    Raises:
      UserError: the folder is not one that can be loaded, or there is no room for the export or for PyTorch's model.
    """
    folder = find_model(folder_or_hub_id)
    read_spec(folder)
    source = opened(folder)
    if keep is not None:
        tensors.check_target(Path(keep), replace=False)
    torch = torch and has_torch()
    say(_plan(source, keep, torch))
    found: list[Check] = []
    with _place(keep) as target:
        for one in _compared(source, target, torch):
            say(str(one))
            found.append(one)
    return Verification(folder, tuple(found), source.quantised)


def check_adapter(
    base: str | Path,
    adapter: str | Path,
    *,
    keep: str | Path | None = None,
    torch: bool = True,
    say: Callable[[str], object] = lambda line: None,
) -> Verification:
    """Merges an adapter into its base in float32, and compares the logits of the two, and those of PEFT.

    Args:
      base: folder or hub id.
      adapter: PEFT folder or hub id.
      keep: where the merged model stays.
      torch: whether logits are compared in PyTorch, with PEFT where that is installed.
      say: takes each line as it is known.

    Raises:
      UserError: as `check`, or the adapter is not one of this base.
    """
    folder = local_folder(base)
    read_spec(folder)
    if keep is not None:
        tensors.check_target(Path(keep), replace=False)
    torch = torch and has_torch()
    say(_plan(opened(folder), keep, torch))
    found: list[Check] = []
    with _place(keep) as target:
        for one in _adapter_compared(folder, local_folder(adapter, FILES), target, torch):
            say(str(one))
            found.append(one)
    return Verification(folder, tuple(found))


def _adapter_compared(folder: Path, adapter: Path, target: Path, torch: bool) -> Iterator[Check]:
    model = load_hf(folder, adapter=adapter)
    rows = token_rows(model.spec.vocab_size, tensors.read_json(folder, "config.json").get("pad_token_id"))
    ours = our_logits(model, rows)
    del model
    yield Check("adapter", str(merge(folder, adapter, target, dtype="float32")), None)
    apart = _apart(our_logits(load_hf(target), rows), ours)
    yield Check("merged, logits", f"merged and base with adapter differ by {apart:.3g}", apart == 0.0)
    if not torch or not importlib.util.find_spec("peft"):
        able = has_torch() and importlib.util.find_spec("peft")
        why = "as asked" if able else "it needs PyTorch and PEFT: pip install torch peft"
        yield Check("PEFT", f"not compared, {why}", None)
        return
    for what, place, own in (("PyTorch, merged", target, None), ("PEFT", folder, adapter)):
        try:
            theirs, _ = torch_logits(place, rows, own)
        # transformers, torch and PEFT raise anything for a folder that they cannot load; that is the finding.
        except Exception as error:
            yield Check(
                what, str(error) if isinstance(error, UserError) else f"cannot run it: {one_line(error)}", False
            )
            continue
        yield _near(f"{what} and JAX, logits", theirs, ours)


def _near(what: str, theirs: np.ndarray, ours: np.ndarray) -> Check:
    """Whether PyTorch's logits (or scores) and ours are the same but for rounding."""
    apart, largest = _apart(theirs, ours), float(np.abs(theirs).max())
    allowed = ALLOWED * max(1.0, largest)
    return Check(what, f"differ by {apart:.2g}, allowed {allowed:.2g}; the largest is {largest:.3g}", apart <= allowed)


def _plan(source: Tensors, keep: str | Path | None, torch: bool) -> str:
    """What will be done, in a line; raises UserError if there is no room for it."""
    disk = sum(tensors.num_bytes(info.dtype, info.shape) for info in source.infos.values())
    memory = 4 * sum(math.prod(info.shape) for info in source.infos.values())
    place = Path(tempfile.gettempdir()) if keep is None else _standing(Path(keep).absolute().parent)
    free, available = shutil.disk_usage(place).free, psutil.virtual_memory().available
    if free < disk:
        remedy = "--keep FOLDER on a larger disk" if keep is None else "give a folder on a larger disk"
        raise UserError(f"the export takes {size_text(disk)} and {size_text(free)} are free in {place}; {remedy}")
    if torch and available < memory:
        raise UserError(
            f"comparing logits takes {size_text(memory)} of host memory and {size_text(available)} are available; "
            "--no-torch compares tensors and files only"
        )
    where = f"a temporary folder in {place}" if keep is None else str(keep)
    return printable(
        f"{source.folder}: {len(source.infos)} tensors; writes {size_text(disk)} to {where}; "
        f"takes {size_text(memory)} of memory, one float32 model at a time"
    )


def _standing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


@contextlib.contextmanager
def _place(keep: str | Path | None) -> Iterator[Path]:
    if keep is not None:
        yield Path(keep)
        return
    with tempfile.TemporaryDirectory(prefix="dpo_jax-check-") as folder:
        yield Path(folder) / "export"


def _compared(source: Tensors, target: Path, torch: bool) -> Iterator[Check]:
    folder = source.folder
    model = load_hf(folder)
    rows = token_rows(model.spec.vocab_size, tensors.read_json(folder, "config.json").get("pad_token_id"))
    scalar, ours = model.spec.scalar_head, our_logits(model, rows) if torch else None
    save_hf(model, target, folder)
    del model
    yield _tensors(source, target)
    yield from _files(source, target, generation=not scalar)
    if ours is None:
        why = "as asked" if has_torch() else "PyTorch is not installed: pip install torch"
        yield Check("logits", f"not compared, {why}", None)
    elif source.quantised:
        rounded = our_logits(load_hf(target), rows)
        yield Check("logits, export", f"rounding the weights moved them by {_apart(ours, rounded):.2g}", None)
        why = f"that takes {source.quantised}'s own kernels, most of them for GPUs; PyTorch sees the export only"
        yield Check("PyTorch, original", f"not run: {why}", None)
        yield from _in_pytorch(None, target, rows, rounded)
    else:
        yield from _in_pytorch(folder, target, rows, ours)


# ---------------------------------------------------------------------------------------------- tensors and files


def _tensors(source: Tensors, target: Path) -> Check:
    """Names, dtypes, shapes, files and bytes."""
    names = [name for name in source.infos if name not in source.spare]
    try:
        export = Tensors(target)
        found = ((name, _difference(source, export, name)) for name in dict.fromkeys([*names, *export.infos]))
        wrong = [f"{name} ({difference})" for name, difference in found if difference]
    except UserError as error:
        return Check("tensors", str(error), False)
    if wrong:
        return Check("tensors", f"{len(wrong)} of {len(names)}: {_few(wrong)}", False)
    if source.quantised:
        return Check("tensors", f"{len(names)} with the names, bytes, dtypes and shapes of the dequantised ones", True)
    return Check("tensors", f"{len(names)} with the same names, bytes, dtypes, shapes and files", True)


def _difference(source: Tensors, export: Tensors, name: str) -> str:
    """What differs in a tensor, in words; empty if nothing does."""
    if name not in export.infos:
        return "missing"
    if name not in source.infos:
        return "extra"
    before, after = source.infos[name], export.infos[name]
    for what in ("dtype", "shape") if source.quantised else ("dtype", "shape", "file"):
        if getattr(before, what) != getattr(after, what):
            return f"{what} {getattr(before, what)} became {getattr(after, what)}"
    return "" if np.array_equal(_bits(source, name), _bits(export, name)) else "bytes"


def _bits(folder: Tensors, name: str) -> np.ndarray:
    return np.ascontiguousarray(folder.read(name)).reshape(-1).view(np.uint8)


def _files(source: Tensors, target: Path, *, generation: bool) -> Iterator[Check]:
    """Every file beside the tensors, byte for byte; and what the export says of itself."""
    folder, packed = source.folder, bool(source.quantised)
    before, after = _beside(folder), _beside(target)
    anew = WRITTEN_ANEW | ({"config.json", tensors.INDEX} if packed else set())
    wanted = {*beside.files(folder, generation=generation, quantised=packed), *(before & {tensors.INDEX})} - anew
    wrong = [
        f"{name} ({'missing' if name not in after else 'bytes'})"
        for name in sorted(wanted)
        if name not in after or file_digest(folder / name) != file_digest(target / name)
    ]
    wrong += [f"{name} (extra)" for name in sorted(after - wanted - anew)]
    same = f"{len(wanted)} with the same bytes: {_few(sorted(wanted), 12)}"
    yield Check("files", f"{len(wrong)} of {len(wanted)}: {_few(wrong)}" if wrong else same, not wrong)
    changed = tensors.changed_files(target)
    yield Check(tensors.SUMS, f"does not fit {_few(changed)}" if changed else "fits every file", not changed)
    if packed:
        plain = without_quantisation(tensors.read_json(folder, "config.json"))
        same = plain == tensors.read_json(target, "config.json")
        yield Check("config.json", f"{'the same' if same else 'another'}, without {KEY}", same)
    left = sorted(before - wanted - anew)
    if left:
        yield Check("left behind", _few(left), None)


def _beside(folder: Path) -> set[str]:
    """Names of files in a folder that hold no tensors and are not hidden."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {n for n in names if not n.endswith(".safetensors") and not any(p.startswith(".") for p in n.split("/"))}


def _few(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ---------------------------------------------------------------------------------------------- logits


def has_torch() -> bool:
    """Whether PyTorch is installed."""
    return importlib.util.find_spec("torch") is not None


def token_rows(vocab_size: int, padding: int | None = None) -> np.ndarray:
    """Fixed pseudo-random token ids, [ROWS, LENGTH], none of which is padding."""
    rows = np.random.default_rng(0).integers(0, vocab_size, (ROWS, LENGTH))
    return np.where(rows == padding, (rows + 1) % vocab_size, rows)


def our_logits(model: Model, rows: np.ndarray) -> np.ndarray:
    """Logits [ROWS, LENGTH, V] of the rows, or a reward model's scores [ROWS, 1], with full float32 products."""
    tokens = jnp.asarray(rows, jnp.int32)
    with jax.default_matmul_precision("highest"):
        if not model.spec.scalar_head:
            return np.asarray(logits(model.spec, model.params, tokens))
        states = jax.jit(hidden, static_argnums=0)(model.spec, model.params, tokens, causal(*tokens.shape))
        return np.asarray(scalar_scores(model.spec, model.params, states[:, -1])[:, None])


def _in_pytorch(folder: Path | None, target: Path, rows: np.ndarray, ours: np.ndarray) -> Iterator[Check]:
    """Both folders in PyTorch: which names it misses, its logits of the two, and its logits and ours; or of None, only
    those of the target."""
    try:
        before, names = (None, {}) if folder is None else torch_logits(folder, rows)
        after, names_after = torch_logits(target, rows)
    # transformers and torch raise anything for a folder that they cannot load; that is the finding.
    except Exception as error:
        yield Check(
            "PyTorch", str(error) if isinstance(error, UserError) else f"cannot run it: {one_line(error)}", False
        )
        return
    problems = [f"{kind} {_few(sorted(map(str, found)))}" for kind, found in names_after.items() if found]
    told = "; ".join(problems) or "no tensor is missing or unexpected"
    passed_by = all(not found for kind, found in names.items() if kind != "unexpected_keys")
    yield Check("PyTorch, tensors", told, not problems if before is None else names_after == names and passed_by)
    what = "scores" if ours.ndim == 2 else "logits"
    if before is not None:
        apart = _apart(before, after)
        yield Check(f"PyTorch, {what}", f"original and export differ by {apart:.3g}", apart == 0.0)
    yield _near(f"PyTorch and JAX, {what}", after, ours)


def _apart(left: np.ndarray, right: np.ndarray) -> float:
    """Largest absolute difference; infinite where shapes differ, NaN where a number is NaN."""
    return float(np.abs(left - right).max()) if left.shape == right.shape else math.inf


def torch_logits(folder: Path, rows: np.ndarray, adapter: Path | None = None) -> tuple[np.ndarray, Mapping[str, set]]:
    """Logits (or scores, [ROWS, 1]) of PyTorch in float32, and the names that it missed or did not expect, by kind.

    An adapter is put on by PEFT.

    Raises:
      Exception: whatever transformers raises.
    """
    import torch

    with quiet(), _without_bars():
        model, info = _class(folder).from_pretrained(
            str(folder),
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(adapter)).eval()
        with torch.no_grad():
            found = [model(torch.tensor(row[None]), use_cache=False).logits[0].numpy() for row in rows]
    del model
    gc.collect()
    return np.stack(found), {kind: set(names) for kind, names in info.items()}


def _class(folder: Path) -> Any:
    """The class that the config names, or what transformers takes for a language model of the family."""
    import transformers

    kinds = tensors.read_json(folder, "config.json").get("architectures") or []
    return next(
        (found for kind in kinds if (found := getattr(transformers, kind, None))), transformers.AutoModelForCausalLM
    )


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
