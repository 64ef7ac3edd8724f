"""Measures dpo_jax on a machine with an accelerator and no network: one folder to carry there, one command to run.

    python tools/device_kit.py build FOLDER         # here: the package, wheels that such a machine lacks, run.sh
    bash FOLDER/run.sh OUT [--only PART ...]        # there: OUT/kit.json has what was measured, OUT/kit.log the rest
    python tools/device_kit.py keep OUT             # here: into tools/device_runs.jsonl, whence BENCHMARKS.md has it
    python tools/device_kit.py run OUT              # on a machine where the package is installed already

The machine is an ordinary one with Python 3.12, jax 0.11 for CUDA, flax, optax, orbax, torch and transformers 5.17.
Each part runs in a process of its own, and its result is written as it ends: a crash or a time limit takes one part.
`--quick` tries all parts with tiny models, on whatever device there is.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WHEELS = (
    "transformers==5.24.0 huggingface_hub==2.4.0 httpx2==2.16.2 httpcore2==2.16.2 truststore datasets==5.2.0 "
    "dill==0.4.1 multiprocess==0.70.19 pydantic==2.14.4 pydantic-core==2.50.5 annotated-types typing-inspection "
    "tensorboardX==2.6.5 trl==1.16.0 tokamax==0.0.17 einshape qwix==0.1.8 immutabledict hf-xet==1.8.0 click==8.5.1"
).split()
"""What the machine lacks or has in an older version, each with its needs: nothing is fetched there."""
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (34, 31, 28, 27, 24, 17, 5)] + ["manylinux2014_x86_64"]
MADE_FROM = "made_from.json"
"""Of the package in a kit: the commit."""
LEAST_SECONDS, NO_TIME = 20.0, "no time left"
MOST_BYTES = 60 * 10**6
RUN = """\
#!/usr/bin/env bash
# Everything that the kit measures: bash run.sh OUT [--only PART ...]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
site=${TMPDIR:-/tmp}/dpo_jax_kit
pip="python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir"
$pip --upgrade --target "$site" "$here"/wheels/*.whl
mkdir -p "$site/xprof/cli/tools"  # tokamax imports the profiler's reader, which it needs for nothing that is done here
touch "$site/xprof/__init__.py" "$site/xprof/cli/__init__.py" "$site/xprof/cli/tools/__init__.py"
touch "$site/xprof/cli/tools/get_kernel_stats_tool.py"
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
exec python3 "$here/package/tools/device_kit.py" run "$@"
"""


def build(folder: Path) -> None:
    """Write the kit.

    Raises:
      SystemExit: a wheel cannot be had, or the kit is too large.
    """
    wheels = folder / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--implementation", "cp", *platforms, "-d", str(wheels), *WHEELS]
    if subprocess.run(command).returncode:
        raise SystemExit("device_kit: pip could not download the wheels above; is the package index reachable?")
    package = folder / "package"
    shutil.rmtree(package, ignore_errors=True)
    for name in ("dpo_jax", "tools", "configs"):
        shutil.copytree(ROOT / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
    from tools.benching import records

    about = records.about()
    (package / MADE_FROM).write_text(json.dumps({key: about[key] for key in ("commit", "dirty")}), "utf-8")
    (folder / "run.sh").write_text(RUN, "utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        raise SystemExit(f"device_kit: {folder} has {size:,} bytes, more than {MOST_BYTES:,}; leave a wheel out")
    print(f"{folder}: {size / 1e6:.1f} MB; take it along, and there: bash {folder.name}/run.sh OUT")


def run(out: Path, names: Sequence[str], seconds: float, quick: bool) -> None:
    """Run the parts one after the other, within the time."""
    from tools.benching import records
    from tools.device.parts import PARTS

    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    made_from = ROOT / MADE_FROM
    about = records.about() | (json.loads(made_from.read_text("utf-8")) if made_from.exists() else {})
    record: dict[str, Any] = {"kind": "device", **about, "quick": quick, "parts": {}}
    disk = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=disk) as scratch:
        for name in names or list(PARTS):
            left = seconds - (time.monotonic() - began)
            print(f"== {name}", flush=True)
            limit = min(PARTS[name][1], left)
            tried = left >= LEAST_SECONDS
            record["parts"][name] = in_child(name, out, Path(scratch), limit, quick) if tried else {"failed": NO_TIME}
            text = json.dumps(record, indent=1)
            (out / "kit.json.tmp").write_text(text + "\n", "utf-8")
            (out / "kit.json.tmp").replace(out / "kit.json")


def in_child(name: str, out: Path, scratch: Path, seconds: float, quick: bool) -> dict[str, Any]:
    """A part in a process group of its own, which is ended when its time is over."""
    answer = scratch / "answer.json"
    answer.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "part", name, str(out), str(scratch), str(answer)]
    began = time.monotonic()
    with (out / "kit.log").open("a", encoding="utf-8") as log:
        print(f"\n== {name}", file=log, flush=True)
        child = subprocess.Popen(
            [*command, *(["--quick"] if quick else [])], stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            return {"failed": f"not done after {seconds:.0f} s"}
    took = {"part_seconds": round(time.monotonic() - began, 1)}
    if code or not answer.exists():
        return {"failed": f"exit code {code}; see kit.log", **took}
    return {**json.loads(answer.read_text("utf-8")), **took}


def part(name: str, out: Path, scratch: Path, answer: Path, quick: bool) -> None:
    """One part, in this process."""
    from tools.device.parts import PARTS, Place

    found = PARTS[name][0](Place(scratch, out, quick))
    answer.write_text(json.dumps(found), "utf-8")


def main() -> None:
    """Build the kit, or run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, dest="what")
    commands.add_parser("build", help="write the folder to carry along").add_argument("folder", type=Path)
    commands.add_parser("keep", help="add to the records").add_argument("out", type=Path)
    running = commands.add_parser("run", help="measure on this machine")
    running.add_argument("out", type=Path)
    running.add_argument("--only", nargs="+", default=(), metavar="PART", help="these parts alone")
    running.add_argument("--seconds", type=float, default=1200.0, help="for everything (default 1200)")
    running.add_argument("--quick", action="store_true", help="tiny models")
    child = commands.add_parser("part")
    child.add_argument("name")
    for name in ("out", "scratch", "answer"):
        child.add_argument(name, type=Path)
    child.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    match given.what:
        case "build":
            build(given.folder.absolute())
        case "keep":
            from tools.device import report

            report.keep(given.out)
        case "run":
            run(given.out.absolute(), given.only, given.seconds, given.quick)
        case _:
            part(given.name, given.out, given.scratch, given.answer, given.quick)


if __name__ == "__main__":
    main()
