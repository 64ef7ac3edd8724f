"""Every family against PyTorch: `python tools/families.py FOLDER_OF_MODELS`.

Each model of the folder is loaded, exported and compared as `python -m dpo_jax.convert check` does it; where it holds a
`golden.safetensors` (`ids` and PyTorch's `logits`), the logits are held against those as well. A line for each, then
the largest difference. Exit code 1 if anything differs.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from dpo_jax.config.command import quiet_libraries
from dpo_jax.hf.checkpoint import load_hf
from dpo_jax.hf.verify import ALLOWED, check
from dpo_jax.model.decoder import logits


def golden_difference(folder: Path) -> float | None:
    """Largest difference between our logits and those in the folder's `golden.safetensors`; None if it has none."""
    file = folder / "golden.safetensors"
    if not file.exists():
        return None
    golden, model = load_file(file), load_hf(folder)
    with jax.default_matmul_precision("highest"):
        ours = logits(model.spec, model.params, jnp.asarray(golden["ids"]))
    return float(np.abs(np.asarray(ours) - golden["logits"]).max())


def line_of(folder: Path, *, torch: bool) -> tuple[bool, float, str]:
    """Whether a model is as it should be, the largest difference of its logits, and a line about it."""
    difference = golden_difference(folder)
    report = check(folder, torch=torch)
    wrong = [str(one) for one in report.checks if one.ok is False]
    close = difference is None or difference <= ALLOWED
    shown = "no golden logits" if difference is None else f"golden logits differ by {difference:.1e}"
    good = close and not wrong
    verdict, rest = "ok" if good else "DIFFERS", "; ".join(wrong) or "export: same"
    return good, difference or 0.0, f"{verdict:<8} {folder.name:<20} {shown}; {rest}"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="its folders that hold a config.json are the models")
    parser.add_argument("--no-torch", dest="torch", action="store_false", help="do not load the folders in PyTorch")
    options = parser.parse_args()
    quiet_libraries()
    found = []
    for folder in sorted(path.parent for path in options.folder.glob("*/config.json")):
        found.append(line_of(folder, torch=options.torch))
        print(found[-1][2], flush=True)
    good = sum(sound for sound, _, _ in found)
    largest = max((difference for _, difference, _ in found), default=0.0)
    print(f"{good} of {len(found)} as they should be; largest difference of logits {largest:.1e}")
    return 0 if found and good == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
