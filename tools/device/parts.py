"""The parts of the kit, in the order in which they run: each is a function that returns what goes into the record."""

import functools
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.files import file_digest
from tools.device import attention, steps
from tools.device.steps import Work

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = "jax jaxlib flax optax orbax-checkpoint transformers tokenizers numpy torch trl tokamax".split()
PACKAGES += ["nvidia-cudnn-cu13"]


class Place(NamedTuple):
    """Where a part works."""

    scratch: Path
    """Models and runs; it may be a memory disk."""
    out: Path
    """What is brought home."""
    quick: bool
    """Tiny models, to try whether the parts run."""


def versions(_: Place) -> dict[str, Any]:
    """Of packages and driver, and what the device's largest product and copy reach."""
    import jax
    import jax.numpy as jnp

    def known(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    size = 8192 if jax.default_backend() != "cpu" else 512
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    product = seconds_of(jax.jit(lambda a, b: a @ b), a, b)
    copied = seconds_of(jax.jit(lambda a: -a), jnp.tile(a, (8, 1)))
    return {
        "packages": {name: found for name in PACKAGES if (found := known(name))},
        "python": platform.python_version(),
        "devices": [str(getattr(device, "device_kind", device)) for device in jax.devices()],
        "driver": output_of(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]),
        "product_tflops": 2 * size**3 / product / 1e12,
        "copy_tb_per_second": 2 * 8 * a.nbytes / copied / 1e12,
    }


def seconds_of(function: Callable, *arrays: Any, repeats: int = 10) -> float:
    """Wall seconds of a call, the mean of some that follow each other."""
    import jax

    jax.block_until_ready([function(*arrays) for _ in range(2)])
    began = time.perf_counter()
    jax.block_until_ready([function(*arrays) for _ in range(repeats)])
    return (time.perf_counter() - began) / repeats


def output_of(command: list[str]) -> str:
    """What a command prints, or why it does not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stdout or done.stderr).strip()


def command(*words: str, seconds: float = 240.0) -> dict[str, Any]:
    """A command of the package in a process of its own: exit code, wall seconds, the end of what it says."""
    began = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, cwd=ROOT, timeout=seconds, env=os.environ
        )
    except subprocess.TimeoutExpired as late:
        return {"failed": f"not done after {seconds:.0f} s", "says": str(late.stdout or b"")[-1500:]}
    says = (done.stdout + done.stderr).strip()
    return {"exit": done.returncode, "seconds": round(time.perf_counter() - began, 1), "says": says[-3500:]}


def numerics(name: str, _: Place) -> dict[str, Any]:
    """A backend against the plain formula."""
    return attention.numerics(name)


def quickstart(place: Place) -> dict[str, Any]:
    """The whole main job, its export held against PyTorch, and an answer of the result."""
    folder = place.scratch / "quickstart"
    limits = ("epochs=null", "steps=4") if place.quick else ()
    found = {"train": command("-m", "dpo_jax.train", "configs/quickstart.yaml", f"output={folder}", *limits)}
    found["check"] = command("-m", "dpo_jax.convert", "check", str(folder / "model"))
    found["sample"] = command("-m", "dpo_jax.sample", str(folder / "model"), "--prompt", "What is 7 plus 5?")
    return found


def same_bits(place: Place) -> dict[str, Any]:
    """Whether a run ends with the same bits when it is run again, and when it stops half-way and goes on."""
    base = ("-m", "dpo_jax.train", "configs/quickstart.yaml", "epochs=null", "steps=20")
    folders = [place.scratch / name for name in ("whole", "again", "halves")]
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the three share the device
    with ThreadPoolExecutor() as pool:
        whole = [pool.submit(command, *base, f"output={folder}") for folder in folders[:2]]
        halves = pool.submit(stopped_and_resumed, base, folders[2])
        said = [*(one.result() for one in whole), *halves.result()]
    digests = {folder.name: digest(folder / "model" / "model.safetensors") for folder in folders}
    return {
        "digests": digests,
        "same": len(set(digests.values())) == 1 and "no such file" not in digests.values(),
        "says": said,
    }


def stopped_and_resumed(base: tuple[str, ...], folder: Path) -> list[dict[str, Any]]:
    """A run that is asked to stop when its journal has some steps, and the same command again."""
    words = [sys.executable, *base, f"output={folder}", "log.every=1"]
    child = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics, began = folder / "metrics.jsonl", time.monotonic()
    while child.poll() is None and time.monotonic() - began < 120:
        if metrics.exists() and metrics.read_text("utf-8").count('"loss"') >= 5:
            child.send_signal(signal.SIGINT)
            break
        time.sleep(0.02)
    says, _ = child.communicate(timeout=120)
    return [{"exit": child.returncode, "says": says[-800:]}, command(*base, f"output={folder}", "log.every=1")]


def digest(path: Path) -> str:
    """Of a file; the name of what is wrong if there is none."""
    return file_digest(path)[:16] if path.is_file() else "no such file"


def step(work: Work, name: str, place: Place) -> dict[str, Any]:
    """One timed run, with the profiler's table of kernels."""
    if place.quick:
        work = Work("tiny", pairs=4, steps=7, warmup=1, settings=work.settings)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace"
        found = steps.step_time(work, place.scratch, trace)
        if "failed" not in found:
            found["trace"] = steps.kernels(trace, place.out / f"{name}.trace.json.gz")
    return found


def beside_trl(work: Work, place: Place) -> dict[str, Any]:
    """dpo_jax and TRL in turn."""
    work = Work("tiny", pairs=4, steps=5, warmup=1) if place.quick else work
    return steps.rivals(work, place.scratch, repeats=1 if place.quick else 2)


NAMED = "--xla_gpu_enable_command_buffer="
"""Kernels are launched one by one, so that the profiler knows which operation each is of."""
SLICES = "--xla_gpu_enable_dynamic_slice_fusion=true"
"""Products read a layer's weights where they lie, among those of all layers."""
BIG = ("optimizer.param_dtype=bfloat16", "optimizer.name=adafactor")


def timed(name: str, work: Work, seconds: float = 240) -> tuple[str, tuple[Callable[[Place], Any], float]]:
    """An entry of the table."""
    return name, (functools.partial(step, work, name.replace(" ", "_")), seconds)


def with_attention(name: str, *more: str) -> Work:
    """The 0.6B step with a backend."""
    return Work("0.6B", settings=(f"model.attention={name}", *more))


PARTS: dict[str, tuple[Callable[[Place], Any], float]] = {
    "versions": (versions, 90),
    **{f"numerics {name}": (functools.partial(numerics, name), 150) for name in ("cudnn", "tokamax", "xla")},
    "timings": (lambda _: attention.timings(), 150),
    "quickstart": (quickstart, 300),
    "same_bits": (same_bits, 300),
    **dict(
        [
            timed("0.6B", Work("0.6B")),
            timed("0.6B named", Work("0.6B", flags=NAMED)),
            timed("0.6B slices", Work("0.6B", flags=SLICES)),
            timed("0.6B none", Work("0.6B", settings=("model.remat=none",), flags=SLICES)),
            *(timed(f"0.6B {name}", with_attention(name)) for name in ("xla", "cudnn", "tokamax")),
            *(timed(f"0.6B {n} 16k", with_attention(n, "batch.micro_tokens=16384")) for n in ("cudnn", "tokamax")),
            timed("1B", Work("1B")),
            timed("8B", Work("8B", steps=11, settings=BIG), 420),
        ]
    ),
    "beside TRL": (functools.partial(beside_trl, Work("0.6B", pairs=8, steps=10, warmup=3)), 420),
}
"""By name: what it does, and the most seconds that it may take."""
