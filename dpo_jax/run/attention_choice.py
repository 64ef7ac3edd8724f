"""Which backend of attention a run takes: the fastest of those that are proven for its devices and agree with the plain
formula there (see `attention_check`).

What was found is kept beside the compiled programs, so that later runs on such a device begin at once. On a CPU, and
wherever there is one way only, nothing is computed.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax import files
from dpo_jax.errors import UserError
from dpo_jax.model import spec as specs
from dpo_jax.model.backends import table
from dpo_jax.model.settings import ModelSettings
from dpo_jax.run import compile_cache
from dpo_jax.run.attention_check import ROWS, BackendVerdict, Case, best, by_backend, cases_of, graded, judged
from dpo_jax.run.models import attention_of, compute_dtype, device_of

SCORES, STEP = 2**28, 512
"""Bytes of one array of scores in float32, and slots that rows of the batch come in."""


@dataclasses.dataclass(frozen=True)
class ChosenBackend:
    """The backend that a run takes, and what is to be said of it, line by line."""

    name: str
    lines: tuple[str, ...] = ()


def choose(
    asked: str, spec: specs.DecoderSpec, dtype: str, device: Any, max_length: int, folder: Path | None
) -> ChosenBackend:
    """The backend for a run on such devices, by what is computed on this one now, or was before.

    Args:
      asked: `model.attention`, which was found to be possible.
      spec: the model.
      dtype: of the computation.
      device: one of them, of this process.
      max_length: tokens of the longest text.
      folder: of compiled programs; None keeps nothing.

    Raises:
      UserError: the backend that was asked for computes something else there, or all of them do.
    """
    names = table.candidates(spec, dtype, device_of(device)) if asked == "auto" else [asked]
    length = length_for(spec, max_length)
    cases = cases_of(spec, length)
    if names == ["xla"] or device.platform == "cpu" or not cases:
        return ChosenBackend(names[0])
    verdicts, again = _kept(names, cases, dtype, length, device, folder)
    wrong = {name: found.wrong for name, found in verdicts.items() if found.wrong is not None}
    if len(wrong) == len(verdicts):
        name, why = next(iter(wrong.items()))
        remedy = "give auto" if asked != "auto" else "run on another device, or with another version of JAX"
        raise UserError(
            f"model.attention: {name} is not the plain formula on this {device.device_kind}: {why}; {remedy}"
        )
    name = list(verdicts)[_agreed(list(verdicts).index(best(verdicts) or names[-1]))]
    times = [f"{other} {found.milliseconds:.3g} ms" for other, found in verdicts.items() if found.milliseconds]
    when = "by an earlier run" if again else "now"
    said = (
        f"attention: {name} (held against the plain formula on this device {when}: {', '.join(times) or 'not timed'})"
    )
    return ChosenBackend(name, (*(f"attention: {other} is not used: {why}" for other, why in wrong.items()), said))


def attention_for(
    model: ModelSettings,
    spec: specs.DecoderSpec,
    mesh: jax.sharding.Mesh,
    max_length: int,
    say: Callable[[str], None] = print,
) -> str:
    """The backend for a run with these settings (see `choose`); says which it is where there was a choice."""
    name = attention_of(model, spec, mesh)
    asked = model.attention if name != "xla" else name
    folder = compile_cache.folder_for(model.compile_cache)
    choice = choose(asked, spec, compute_dtype(model, mesh), mesh.local_devices[0], max_length, folder)
    for line in choice.lines:
        say(line)
    return choice.name


def length_for(spec: specs.DecoderSpec, max_length: int) -> int:
    """Slots of a row of the batch: whole texts, as far as the scores of the plain formula fit into `SCORES` bytes."""
    heads = max((case.heads for case in cases_of(spec, STEP)), default=1)
    fits = math.isqrt(SCORES // (4 * ROWS * heads))
    return max(STEP, min(-(-max_length // STEP), fits // STEP) * STEP)


def _agreed(index: int) -> int:
    """That of process 0: what hosts measure differs."""
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(index)))


def _kept(
    names: Sequence[str], cases: Mapping[Case, int], dtype: str, length: int, device: Any, folder: Path | None
) -> tuple[dict[str, BackendVerdict], bool]:
    """The verdicts on these backends, and whether they are of an earlier run."""
    about = {
        "names": list(names),
        "cases": [[*case, layers] for case, layers in cases.items()],
        "dtype": dtype,
        "length": length,
        "device": [device.platform, device.device_kind, device.client.platform_version],
        "versions": {package: _version(package) for package in ("dpo_jax", "jax", "jaxlib", *_packages(names))},
    }
    text = json.dumps(about, sort_keys=True)
    path = None if folder is None else folder / "attention" / f"{files.digest_of(text)[:24]}.json"
    if path is not None and (found := _read(path, names)) is not None:
        return found, True
    with jax.default_device(device):
        candidates = {name: functools.partial(by_backend, name) for name in names}
        found = judged(candidates, cases, dtype, length, platform=device.platform)
    graded.cache_clear()
    if path is not None:
        with contextlib.suppress(OSError):  # as with compiled programs: what is not kept is found again
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_whole(path, json.dumps({"about": about, "found": found}, indent=1))
    return found, False


def _read(path: Path, names: Sequence[str]) -> dict[str, BackendVerdict] | None:
    """What another run wrote; None if nothing, or nothing that can be read."""
    try:
        found = json.loads(path.read_text())["found"]
        return {name: BackendVerdict(*found[name]) for name in names}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _packages(names: Sequence[str]) -> list[str]:
    return [package for name in names for package in table.BACKENDS[name].packages]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
