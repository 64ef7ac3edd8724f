"""`python -m dpo_jax.doctor [CONFIG]`: what this machine has, what it can do, and what stands in the way of a run.

With a run's settings also whether its training step fits: the step is compiled without weights for this machine's
devices, and what it needs is set against the memory that was found.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_jax.config.command import Parser, command, quiet_libraries
from dpo_jax.files import GIB, size_text
from dpo_jax.planning.machine import matmul_gflops, memory_of_a_device

if TYPE_CHECKING:
    from dpo_jax.config.run import Run
    from dpo_jax.run.sources import Sources

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "pydantic",
    "tensorboardX",
)
LITTLE_DISK = 20 * GIB
BF16_FAST_ON_CPU = (0, 12)  # the first jax whose CPU products in bfloat16 are faster than in float32


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something in the way. What is broken ends the doctor with exit code 1; the rest is advice."""

    what: str
    remedy: str
    broken: bool = False

    def __str__(self) -> str:
        """One line."""
        return f"{'broken' if self.broken else 'advice'}: {self.what}; {self.remedy}"


def versions() -> dict[str, str | None]:
    """Versions of Python, the operating system and the packages; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "os": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def host(folder: Path) -> dict[str, Any]:
    """Processors, memory, the disk under `folder`, and where compiled programs are kept."""
    import psutil

    disk = shutil.disk_usage(folder)
    return {
        "processors": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "memory_free_bytes": psutil.virtual_memory().available,
        "disk_free_bytes": disk.free,
        "disk_bytes": disk.total,
        "compile_cache": _compile_cache(),
    }


def _compile_cache() -> str | None:
    from dpo_jax.run.compile_cache import AUTO, folder_for

    folder = folder_for(AUTO)
    return None if folder is None else str(folder)


def devices() -> list[dict[str, Any]]:
    """What jax computes on: kind, memory, and measured speed of a matrix product."""
    import jax

    return [
        {
            "device": str(device),
            "kind": device.device_kind,
            "platform": device.platform,
            "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
            "gflops_float32": matmul_gflops(device, "float32"),
            "gflops_bfloat16": matmul_gflops(device, "bfloat16"),
        }
        for device in jax.local_devices()
    ]


def accelerators_present(root: Path = Path("/dev")) -> list[str]:
    """Kinds of accelerator that the operating system shows, whether or not jax can use them."""
    signs = {"NVIDIA GPU": "nvidia[0-9]*", "TPU": "accel[0-9]*"}
    found = [kind for kind, pattern in signs.items() if any(root.glob(pattern))]
    if "NVIDIA GPU" not in found and shutil.which("nvidia-smi"):
        found.append("NVIDIA GPU")
    return found


EXTRAS = {"NVIDIA GPU": "pip install 'dpo_jax[cuda]'", "TPU": "pip install 'dpo_jax[tpu]'"}


def problems(report: dict[str, Any]) -> list[Finding]:
    """What a report says that somebody should do something about."""
    found = [
        Finding(f"{name} is not installed", f"pip install {name}", broken=True)
        for name, version in report["versions"].items()
        if version is None
    ]
    if "failure" in report:
        found.append(Finding(f"jax cannot compute here: {report['failure']}", _jax_remedy(report), broken=True))
    platforms = {device["platform"] for device in report["devices"]}
    if platforms == {"cpu"}:
        found += [
            Finding(
                f"this machine has a {kind}, but jax sees none",
                f"{EXTRAS[kind]}; check JAX_PLATFORMS and the driver",
                True,
            )
            for kind in report["accelerators"]
        ]
    if platforms == {"cpu"} and _release(report["versions"]["jax"]) < BF16_FAST_ON_CPU:
        found.append(
            Finding(
                "a step in bfloat16 is slower on a CPU before jax 0.12, also where a product alone is not",
                "keep model.compute_dtype: auto (float32 here), or use Python >= 3.12 with a newer jax",
            )
        )
    if report["host"]["disk_free_bytes"] < LITTLE_DISK:
        found.append(
            Finding(
                f"only {size_text(report['host']['disk_free_bytes'])} of disk are free here",
                "a checkpoint takes 12 bytes per parameter and two are kept: set output to a folder on a larger disk",
            )
        )
    if report["host"]["compile_cache"] is None:
        found.append(Finding("compiled programs are not kept", "unset JAX_ENABLE_COMPILATION_CACHE to start faster"))
    return found


def _jax_remedy(report: dict[str, Any]) -> str:
    extras = [EXTRAS[kind] for kind in report["accelerators"]]
    return f"{' or '.join(extras) or 'reinstall jax and jaxlib of the same version'}; check JAX_PLATFORMS"


def _release(version: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in (version or "0").split(".")[:2] if part.isdigit())


def examine(folder: Path) -> dict[str, Any]:
    """Everything the doctor looks at. What jax refuses to do is in `failure`."""
    quiet_libraries()
    report: dict[str, Any] = {"versions": versions(), "accelerators": accelerators_present(), "devices": []}
    try:
        report["devices"] = devices()
    except Exception as error:  # whatever it is, it is the finding
        report["failure"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    report["host"] = host(folder)
    report["problems"] = [dataclasses.asdict(problem) for problem in problems(report)]
    return report


def rendered(report: dict[str, Any]) -> str:
    """The report as aligned lines."""
    host_found = report["host"]
    rows = [(name, version or "not installed") for name, version in report["versions"].items()]
    rows += [
        ("processors", str(host_found["processors"])),
        ("memory", f"{size_text(host_found['memory_bytes'])}, {size_text(host_found['memory_free_bytes'])} free"),
        ("disk here", f"{size_text(host_found['disk_bytes'])}, {size_text(host_found['disk_free_bytes'])} free"),
        ("compiled programs", host_found["compile_cache"] or "not kept"),
    ]
    rows += [(device["device"], _speed(device)) for device in report["devices"]]
    lines = [f"{name:<20} {value}" for name, value in rows]
    found = [str(Finding(**problem)) for problem in report["problems"]]
    return "\n".join([*lines, "", *(found or ["nothing stands in the way"])])


def _speed(device: dict[str, Any]) -> str:
    memory = f", {size_text(device['memory_bytes'])}" if device["memory_bytes"] else ""
    speed = f"float32 {device['gflops_float32']:,.0f}, bfloat16 {device['gflops_bfloat16']:,.0f} GFLOP/s"
    return f"{device['kind']}{memory}; matrix product {speed}"


def fit(run: "Run") -> dict[str, Any]:
    """Bytes of a device that a run's step takes here, predicted by item and as the compiler has planned them.

    Raises:
      UserError: training would refuse the settings, the model, the data or the mesh.
    """
    from dpo_jax.run import models, program

    mesh = models.make_mesh(run.mesh, run.model)
    sources = program.find_config(run, mesh)
    notes = _notes(run, sources)
    encoded, data, run = program.data_for(run, sources)
    step = program.describe(run, sources, encoded, mesh)
    compiled = step.trainer.lower(step.dummy).compile()
    return {
        "data": data,
        "devices": mesh.size,
        "compute_dtype": step.objective.compute_dtype,
        "predicted": program.predicted(step),
        "compiler": program.reported(compiled),
        "capacity": memory_of_a_device(),
        "notes": notes,
    }


def _notes(run: "Run", sources: "Sources") -> list[str]:
    """What training would say of the folder that it leaves; nothing where the tokenizer is not here."""
    from dpo_jax.hf.tokenizer import TOKENIZER_FILES, load_tokenizer
    from dpo_jax.run import models

    if not any((sources.policy / name).exists() for name in TOKENIZER_FILES):
        return []
    tokenizer, scores = load_tokenizer(sources.policy, run.data.template), run.objective.trains_reward_model
    end = models.check_ending(sources, tokenizer, run.export, scalar_head=scores)
    return models.notes(sources, end, run.export)


def fit_lines(found: dict[str, Any]) -> list[str]:
    """The fit as text."""
    from dpo_jax.planning.report import fit_line, memory_lines

    head = f"the training step on {found['devices']} devices in {found['compute_dtype']}; lengths: {found['data']}"
    last = fit_line(found["compiler"]["peak"], found["capacity"], "a device's memory")
    return [head, *memory_lines(found["predicted"], found["compiler"], ""), last, *found["notes"]]


@command
def main(argv: Sequence[str]) -> int:
    """Print what was found; 1 if something is broken, or if a run was given and does not fit."""
    parser = Parser("doctor", settings=True)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    what = "where runs would be written (default: here), or a run's CONFIG.yaml: does it fit?"
    parser.add_argument("folder", nargs="?", default=Path(), type=Path, help=what)
    parser.add_argument("settings", nargs="*", help="with CONFIG.yaml: section.key=value ...")
    arguments = parser.parse_args(argv)
    path: Path = arguments.folder
    from dpo_jax.config import run as config

    run = config.load([str(path), *arguments.settings], "doctor") if path.is_file() else None
    if run is None and arguments.settings:
        parser.error(f"{arguments.settings[0]}: belongs to a CONFIG.yaml, and {path} is none; leave it out")
    if run is None and not path.is_dir():
        parser.error(f"{path}: no such folder")
    report = examine(Path() if run is not None else path)
    fits = True
    if run is not None and "failure" not in report:
        report["fit"] = fit(run)
        fits = report["fit"]["compiler"]["peak"] <= report["fit"]["capacity"]
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print("\n".join([rendered(report), *(["", *fit_lines(report["fit"])] if "fit" in report else [])]))
    return int(any(problem["broken"] for problem in report["problems"]) or not fits)


if __name__ == "__main__":
    sys.exit(main())
