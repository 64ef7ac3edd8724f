"""Parts of dpo_jax by themselves: which there are, and how each is measured in a process of its own.

A measurement is a function of `Options` that returns rows, each a dict of words and numbers. The process tells its peak
memory besides, which would be another's if two measurements shared it.
"""

import dataclasses
import importlib
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.errors import UserError
from tools.runners import protocol

ROOT = Path(__file__).resolve().parents[2]

NAMES = {
    "head": ("micro_compute", "log-probabilities of scored tokens: fused head against whole logits"),
    "layouts": ("micro_compute", "loss and gradient of the same pairs: shared prompts, packed, padded"),
    "pairs": ("micro_compute", "loss and gradient of the same pairs in steps of 4, 16 and 64"),
    "rows": ("micro_compute", "loss and gradient of the same tokens in rows of 256 to 4096, and attention's share"),
    "packing": ("micro_data", "planning and packing a million pairs"),
    "hosts": ("micro_hosts", "a hundred million pairs on 64 hosts, as one of them sees them"),
    "growth": ("micro_data", "tokenising, planning and packing 1x, 4x and 16x pairs"),
    "tokenisation": ("micro_data", "texts to token ids"),
    "files": ("micro_files", "import, export, checkpoint"),
}
"""Name of a measurement -> the module that has a function of that name, and what it measures."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line decides. Where no model or data is given, a measurement makes its own."""

    model: str | None
    data: str | None
    threads: int
    quick: bool

    def arguments(self) -> list[str]:
        """The same as words of a command line."""
        words = ["--threads", str(self.threads)]
        words += ["--model", self.model] if self.model else []
        words += ["--data", self.data] if self.data else []
        return words + (["--quick"] if self.quick else [])


Row = dict[str, Any]


def in_child(name: str, options: Options, python: str, timeout: float) -> tuple[list[Row], str]:
    """The rows of a measurement that another process makes, or what went wrong.

    Raises:
      UserError: there is no such measurement.
    """
    if name not in NAMES:
        raise UserError(f"micro: {name} is no measurement; choose of {', '.join(NAMES)}")
    command = [python, str(ROOT / "tools" / "bench.py"), "micro", name, "--child", "--no-record", *options.arguments()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return [], f"not done after {timeout:.0f} s; give --timeout"
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return [], f"exit code {done.returncode}: {said[-1] if said else 'nothing on stderr'}"
    return json.loads(done.stdout.splitlines()[-1]), ""


def child(names: Sequence[str], options: Options) -> int:
    """Measure one part and print its rows as the last line of stdout."""
    protocol.bind(options.threads)
    (name,) = names
    module = importlib.import_module(f"tools.benching.{NAMES[name][0]}")
    measure: Callable[[Options], list[Row]] = getattr(module, name)
    rows = [*measure(options), {"what": "whole process", "peak MiB": protocol.peak_bytes() / 2**20}]
    print(json.dumps(rows))
    return 0


def timed(call: Callable[[], Any], repeats: int) -> Row:
    """Median wall and CPU seconds of a call, and the least and greatest wall; it is called once before, unmeasured."""
    call()
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), protocol.cpu_seconds()
        call()
        walls.append(time.perf_counter() - wall)
        cpus.append(protocol.cpu_seconds() - cpu)
    return {"s": statistics.median(walls), "min": min(walls), "max": max(walls), "CPU-s": statistics.median(cpus)}


def once(call: Callable[[], Any]) -> tuple[Any, Row]:
    """What a call returns, and its wall and CPU seconds, with nothing warm."""
    wall, cpu = time.perf_counter(), protocol.cpu_seconds()
    result = call()
    return result, {"s": time.perf_counter() - wall, "CPU-s": protocol.cpu_seconds() - cpu}


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table for the terminal, a column for every key that any row has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([shown(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]


def shown(value: Any) -> str:
    """Four digits of a number; anything else as it is."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
