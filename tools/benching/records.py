"""The file of what was measured: a JSON object per line, each with its commit and its machine."""

import datetime
import json
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from dpo_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "tools" / "benchmarks.jsonl"


def about() -> dict[str, Any]:
    """When, at which commit (and whether files differ from it), and on what machine."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short=10", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!tools/*.jsonl")),
        "hardware": hardware(),
    }


def hardware() -> dict[str, Any]:
    """Processor, CPUs, memory, and accelerators as the driver names them."""
    return {
        "processor": processor(),
        "cpus": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpus": gpus(),
    }


def processor() -> str:
    """The model's name, or the architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next((name for name in names if name), platform.processor() or platform.machine())


def gpus() -> list[str]:
    """Names of the NVIDIA accelerators; none where there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def append(record: Mapping[str, Any], path: Path = RECORDS) -> None:
    """Add a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def read(path: Path = RECORDS) -> list[dict[str, Any]]:
    """All records, oldest first; none where there is no file.

    Raises:
      UserError: a line is no record.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            known = isinstance(record, dict) and "kind" in record
        except ValueError:
            known = False
        if not known:
            raise UserError(f"{path}:{number}: is no record of a measurement; remove the line")
        records.append(record)
    return records
