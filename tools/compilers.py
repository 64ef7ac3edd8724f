"""Hold the project to the compilers of accelerators: no device and no driver are needed.

python tools/compilers.py test gpu|tpu FOLDER [...]    install one in FOLDER, and run tests/compilers with it
python tools/compilers.py compile [NAME ...]           compile real models' steps, and record what becomes of them
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dpo_jax.planning import compilers  # noqa: E402
from dpo_jax.planning.chips import CHIPS  # noqa: E402
from tools.benching import records  # noqa: E402
from tools.compiling.programs import MODELS, PROGRAMS, Program  # noqa: E402
from tools.compiling.report import RECORDS  # noqa: E402


def test(platform: str, folder: Path, rest: list[str]) -> int:
    """Make a virtual environment there (3.4 GB for GPUs, 0.7 GB for TPUs) if there is none, and run the tests in it."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        extras = f"compile-{platform},test"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-e", f"{ROOT}[{extras}]"], check=True)
    return subprocess.run([python, "-m", "pytest", "-m", "", "-n", "1", "tests/compilers", *rest], cwd=ROOT).returncode


def compile_all(names: list[str]) -> int:
    """Compile programs one after the other, those whose compiler is installed here, and keep a record of each."""
    for name in names or PROGRAMS:
        program = PROGRAMS[name]
        if (gone := compilers.missing(CHIPS[program.chip])) is not None:
            print(f"{name}: left out: {gone}")
            continue
        plan = planned(program)
        with RECORDS.open("a", encoding="utf-8") as file:
            about = {key: value for key, value in records.about().items() if key != "hardware"}
            print(json.dumps({"kind": "compiled", "name": name, **about, "plan": plan}), file=file)
        print(
            f"{name}: MFU {100 * plan['mfu']['step']:.1f} %, peak {plan['memory']['compiler']['peak'] / 2**30:.2f} GiB"
        )
    return 0


def planned(program: Program) -> dict[str, Any]:
    """What `plan --compiler real` says, in a process of its own; exchanges are left out but for what they send."""
    with tempfile.TemporaryDirectory() as folder:
        model, run = Path(folder) / program.model, Path(folder) / "run.yaml"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(MODELS[program.model]), "utf-8")
        run.write_text(f"output: {folder}/out\nmodel: {{path: {model}}}\ndata: {{train: none.jsonl}}\n", "utf-8")
        words = ["-m", "dpo_jax.plan", str(run), "--compiler", "real", "--json", *program.arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{program}: {done.stderr.strip().splitlines()[-1]}")
    plan = json.loads(done.stdout)
    found = plan.pop("collectives")
    plan["sent"] = {
        "hidden": sum(row["bytes"] for row in found if row["hides"]),
        "waited for": sum(row["bytes"] for row in found if not row["hides"]),
        "largest": max((row["bytes"] / row["times"] for row in found), default=0.0),
    }
    plan["settings"] = list(program.settings)
    return plan


def main() -> int:
    """One of the two."""
    parser = argparse.ArgumentParser(description="Hold the project to the compilers of accelerators.")
    commands = parser.add_subparsers(dest="command", required=True)
    tested = commands.add_parser("test", help="install a compiler and run its tests; more arguments go to pytest")
    tested.add_argument("platform", choices=["gpu", "tpu"])
    tested.add_argument("folder", type=Path)
    made = commands.add_parser("compile", help="compile steps of real models, and record what becomes of them")
    made.add_argument("names", nargs="*", choices=[[], *PROGRAMS], metavar="NAME", help=", ".join(PROGRAMS))
    options, rest = parser.parse_known_args()
    if options.command == "test":
        return test(options.platform, options.folder, rest)
    return compile_all(options.names)


if __name__ == "__main__":
    sys.exit(main())
