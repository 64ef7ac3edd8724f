"""`python tools/compilers.py gpu|tpu FOLDER`: install an accelerator's compiler and hold the project to it.

No device and no driver are needed. A virtual environment is made in FOLDER (3.4 GB for GPUs, 0.7 GB for TPUs) if it is
not there, and the tests of tests/compilers are run in it, the nightly ones too. More arguments go to pytest.
"""

import argparse
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Install what is not there, and run the tests."""
    parser = argparse.ArgumentParser(description="Hold the project to the compilers of accelerators.")
    parser.add_argument("platform", choices=["gpu", "tpu"])
    parser.add_argument("folder", type=Path)
    options, rest = parser.parse_known_args()
    python = options.folder / "bin" / "python"
    if not python.exists():
        venv.create(options.folder, with_pip=True)
        extras = f"compile-{options.platform},test"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-e", f"{ROOT}[{extras}]"], check=True)
    return subprocess.run([python, "-m", "pytest", "-m", "", "-n", "1", "tests/compilers", *rest], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
