"""Writes the `plan:` lines of the published recipes in configs/: `python tools/recipes_plan.py [NAME ...]`.

Each is what `python -m dpo_jax.plan` says of the recipe on the hardware that its header names, by this CPU's compiler,
with made-up data of the lengths that the header's `data:` names, and the model's config.json as it is on the hub. The
memory is predicted, the times are at best, and neither has the reference's pass or the evaluations.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import textwrap
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dpo_jax import recipes  # noqa: E402
from dpo_jax.config import run as config  # noqa: E402
from dpo_jax.files import configs_folder  # noqa: E402
from dpo_jax.planning.chips import CHIPS  # noqa: E402
from tests.support.hub_configs import HUB  # noqa: E402

QWEN2, LLAMA3, MISTRAL = HUB["Qwen2.5-0.5B-Instruct"], HUB["Llama-3.1-8B-Instruct"], HUB["Mistral-7B-v0.1"]
WIDER = {"hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16, "num_key_value_heads": 16}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2-0.5B-Instruct": QWEN2,  # the sizes of Qwen2.5's
    "Qwen/Qwen3-0.6B": HUB["Qwen3-0.6B"],
    "alignment-handbook/zephyr-7b-sft-full": MISTRAL,
    "allenai/Llama-3.1-Tulu-3-8B-SFT": LLAMA3,
    "facebook/opt-350m": HUB["opt-350m"],
    "meta-llama/Llama-3.2-1B-Instruct": HUB["Llama-3.2-1B-Instruct"],
    "meta-llama/Meta-Llama-3-8B-Instruct": LLAMA3,
    "microsoft/phi-2": HUB["phi-2"],
    "mistralai/Mistral-7B-v0.1": MISTRAL,
    "trl-lib/qwen1.5-1.8b-sft": {**QWEN2, **WIDER, "tie_word_embeddings": False},
}
"""What stands in config.json of each model of a recipe; a test holds those of HUB to their known sizes."""
HARDWARE = re.compile(r"(\d+) x (.+)")
LENGTHS = re.compile(r"prompts of ([\d,]+) tokens and answers of ([\d,]+)")
COUNT = re.compile(r"([\d,]+) (?:pairs|dialogues|answers)")


def number(text: str) -> int:
    """A whole number as people write it: 61,135."""
    return int(text.replace(",", ""))


def found(pattern: re.Pattern[str], text: str) -> tuple[str, ...]:
    """The groups of what a fact of a header says."""
    match = pattern.search(text)
    assert match is not None, f"{text}: has no {pattern.pattern}"
    return match.groups()


def plan_of(name: str) -> dict[str, Any]:
    """What the command says, as plain values."""
    facts = recipes.recipe(name).facts
    devices, title = found(HARDWARE, facts["hardware"])
    chip = next(chip.name for chip in CHIPS.values() if chip.title == title)
    prompt, answer = found(LENGTHS, facts["data"])
    file = configs_folder() / f"{name}.yaml"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[config.load([str(file)]).model.path]))
        lengths = ["--prompt-tokens", prompt, "--completion-tokens", answer, "--compiler", "cpu", "--json"]
        given = [str(file), f"model.path={folder}", "--devices", devices, "--chip", chip, *lengths]
        command = [sys.executable, "-m", "dpo_jax.plan", *given]
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def line_of(name: str, plan: dict[str, Any]) -> str:
    """A `plan:` line: memory of a device, steps and seconds, hours."""
    run = config.load([str(configs_folder() / f"{name}.yaml")])
    pairs = number(*found(COUNT, recipes.recipe(name).facts["data"]))
    steps = run.steps or math.ceil(pairs * (run.epochs or 1) / run.batch.pairs)
    memory = sum(plan["memory"]["predicted"].values())
    share = 100 * memory / plan["memory"]["capacity"]
    least, most = plan["time"]["overlapped"], plan["time"]["serial"]
    return (
        f"{memory / 2**30:.1f} GiB a device ({share:.0f} %), {steps:,} steps of {least:.2g} to {most:.2g} s, "
        f"{span(steps * least, steps * most)} at best (jax {version('jax')})"
    )


def span(least: float, most: float) -> str:
    """Two times in the unit that suits the longer one, with two digits.

    >>> span(3600 * 1.24, 3600 * 2), span(90, 200), span(1, 1.5)
    ('1.2 to 2 hours', '1.5 to 3.3 minutes', '1 to 1.5 seconds')
    """
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if most >= size:
            return f"{least / size:.2g} to {most / size:.2g} {unit}"
    return f"{least:.2g} to {most:.2g} seconds"


def with_plan(text: str, line: str) -> str:
    """A recipe with this `plan:` line in place of its own."""
    written = textwrap.wrap(line, 120, initial_indent="# plan: ", subsequent_indent="#   ", break_on_hyphens=False)
    return re.sub(r"^# plan:.*\n(?:#   .*\n)*", "\n".join(written).replace("\\", "\\\\") + "\n", text, flags=re.M)


def main() -> int:
    """Plan those that are named, or all, and write their lines."""
    parser = argparse.ArgumentParser(description="The plan: lines of the published recipes.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="of these recipes (default: all that have such a line)"
    )
    given = parser.parse_args().names or [name for name in recipes.names() if "plan" in recipes.recipe(name).facts]
    for name in given:
        line = line_of(name, plan_of(name))
        file = configs_folder() / f"{name}.yaml"
        file.write_text(with_plan(file.read_text(), line))
        print(f"{name}: {line}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
