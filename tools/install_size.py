"""What an installation takes: packages, megabytes and seconds, what each direct dependency adds, and the CPU of --help.

    python tools/install_size.py python3.11 [python3.12 ...] [--json]

For each Python, a new virtual environment in a temporary folder gets this checkout by pip, as a user would; everything
is measured in there. Seconds of installing depend on the network and on pip's cache; CPU-seconds less so.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REPEATS = 5
TOOLS = {"pip", "setuptools", "wheel"}
"""Packages that a virtual environment begins with."""
LOOK = """
import importlib, importlib.metadata, json, re
from pathlib import Path

def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()

found = {plain(d.metadata["Name"]): d for d in importlib.metadata.distributions()}

def needs(name):
    for line in (found[name].requires or []) if name in found else []:
        if "extra ==" not in line:
            inner = plain(re.match(r"[A-Za-z0-9._-]+", line)[0])
            if inner in found:
                yield inner

def closure(roots):
    seen, rest = set(), list(roots)
    while rest:
        if (name := rest.pop()) not in seen:
            seen.add(name)
            rest.extend(needs(name))
    return seen

def size(name):
    files = (Path(found[name].locate_file(file)) for file in found[name].files or [])
    return sum(file.stat().st_size for file in files if file.is_file())

direct = sorted(set(needs("dpo-jax")))
adds = {name: sorted(closure(direct) - closure([d for d in direct if d != name])) for name in direct}
sizes = {name: size(name) for name in found}
commands = list(importlib.import_module("dpo_jax.config.console").COMMANDS)
print(json.dumps({"sizes": sizes, "adds": adds, "commands": commands}))
"""


def spent(words: list[str]) -> tuple[float, float, subprocess.CompletedProcess[str]]:
    """Wall seconds and CPU-seconds of a command, and what it wrote; it must succeed."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, cwd=tempfile.gettempdir())
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr[-2000:]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


def measured(python: str) -> dict[str, Any]:
    """An installation for one Python, and what was found in it."""
    with tempfile.TemporaryDirectory() as folder:
        spent([python, "-m", "venv", folder])
        inside, program = f"{folder}/bin/python", f"{folder}/bin/dpo-jax"
        wall, cpu, _ = spent([inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(ROOT)])
        looked = json.loads(spent([inside, "-c", LOOK])[2].stdout)
        sizes = {name: size for name, size in looked["sizes"].items() if name not in TOOLS}
        adds = {
            name: {"packages": len(more), "megabytes": round(sum(map(sizes.__getitem__, more)) / 1e6, 1)}
            for name, more in looked["adds"].items()
        }
        asked = {"import dpo_jax": [inside, "-c", "import dpo_jax"], "--help": [program, "--help"]}
        asked |= {f"{name} --help": [program, name, "--help"] for name in looked["commands"]}
        helps: dict[str, list[float]] = {name: [] for name in asked}
        for _ in range(REPEATS):
            for name, words in asked.items():
                helps[name].append(spent(words)[1])
        return {
            "python": spent([inside, "-V"])[2].stdout.split()[1],
            "packages": len(sizes),
            "megabytes": round(sum(sizes.values()) / 1e6),
            "seconds": round(wall, 1),
            "cpu_seconds": round(cpu, 1),
            "only_by": adds,
            "largest": {name: round(sizes[name] / 1e6, 1) for name in sorted(sizes, key=lambda n: -sizes[n])[:12]},
            "help_cpu_seconds": {name: round(sorted(values)[len(values) // 2], 3) for name, values in helps.items()},
        }


def lines(found: dict[str, Any]) -> list[str]:
    """One installation in words."""
    only = [
        f"  {name}: {add['packages']} packages, {add['megabytes']} MB that nothing else needs"
        for name, add in sorted(found["only_by"].items(), key=lambda item: -item[1]["megabytes"])
        if add["packages"]
    ]
    return [
        f"Python {found['python']}: {found['packages']} packages, {found['megabytes']} MB, installed in "
        f"{found['seconds']} s ({found['cpu_seconds']} CPU-seconds)",
        *only,
        "  largest: " + ", ".join(f"{name} {size} MB" for name, size in found["largest"].items()),
        "  CPU-seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in found["help_cpu_seconds"].items()),
    ]


def main() -> int:
    """Install, measure, print."""
    parser = argparse.ArgumentParser(description="What an installation takes.")
    parser.add_argument("pythons", metavar="PYTHON", nargs="+", help="interpreter to make the environment with")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each")
    options = parser.parse_args()
    for python in options.pythons:
        found = measured(python)
        print(json.dumps(found) if options.json else "\n".join(lines(found)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
