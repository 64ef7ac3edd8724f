"""The paper's dialogue experiment, small (figure 3 of arXiv:2305.18290): win rates over its SFT, by temperature.

    python tools/dialogue.py MODEL TRAIN TEST WORK [--pairs 432] [--prompts 64] [--temperatures 0.25 0.7 1.0]
        [--dtype bfloat16]

MODEL is a chat model (SmolLM2-135M-Instruct by tools/smollm2.py), TRAIN and TEST are hh-rlhf files. Three stretches of
TRAIN that have no row in common: on the first the model is fine-tuned on chosen answers (SFT); on the second DPO, and
Preferred-FT (fine-tuning on chosen answers), go on from that; on the third a reward model is trained, which judges. Its
verdicts on answers to the first prompts of TEST are counted by `dpo_jax.winrate`, of DPO, Preferred-FT and the chosen
answers of TEST, each against SFT's answers at the same temperature. Every part is a run or a command of the project,
and the same command goes on where it stopped. Prints a table; WORK/winrates.json has all of it.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dpo_jax.errors import UserError  # noqa: E402
from dpo_jax.run import sweeping  # noqa: E402

SETTINGS = {
    "data.as_chat": True,
    "data.max_length": 384,
    "batch.pairs": 8,
    "epochs": 1,
    "optimizer.schedule": "linear",
    "optimizer.warmup_fraction": 0.1,
    "checkpoint.every": 20,
    "log.tensorboard": False,
    "log.token_statistics": False,
}


class Stage(NamedTuple):
    """A run: the run that it goes on from (None: MODEL), which stretch of the data it sees, and its own settings."""

    name: str
    start: str | None
    stretch: int
    settings: Mapping[str, Any]


STAGES = (
    Stage("sft", None, 0, {"objective.name": "sft", "optimizer.learning_rate": 2e-5}),
    Stage("dpo", "sft", 1, {"objective.beta": 0.1, "optimizer.learning_rate": 1e-5}),
    Stage("preferred-ft", "sft", 1, {"objective.name": "sft", "optimizer.learning_rate": 2e-5}),
    Stage("reward", None, 2, {"objective.name": "reward", "optimizer.learning_rate": 1e-4}),  # whose head begins at 0
)
COMPARED = ("dpo", "preferred-ft", "chosen")


def write_stretches(train: Path, work: Path, pairs: int) -> list[Path]:
    """The stretches of the training data, as files of their own.

    Raises:
      UserError: the file has too few rows.
    """
    lines = train.read_text("utf-8").splitlines(keepends=True)
    files = [work / f"rows-{number}.jsonl" for number in range(3)]
    if len(lines) < pairs * len(files):
        raise UserError(f"{train}: has {len(lines):,} rows, and {len(files)} x {pairs:,} are wanted; lower --pairs")
    for number, file in enumerate(files):
        file.write_text("".join(lines[number * pairs : (number + 1) * pairs]), "utf-8")
    return files


def train(stage: Stage, model: Path, rows: Path, work: Path, dtype: str) -> None:
    """Run `dpo_jax.train` to its end, computing in this dtype.

    Raises:
      UserError: it failed.
    """
    start = model if stage.start is None else work / stage.start / "model"
    own = {"model.path": str(start), "data.train": str(rows), "output": str(work / stage.name)}
    own["model.compute_dtype"] = dtype
    words = [f"{key}={json.dumps(value)}" for key, value in {**SETTINGS, **stage.settings, **own}.items()]
    point = sweeping.Point(stage.name, {}, tuple(words), work / stage.name)
    if code := sweeping.run_all([point], [{}], print)[stage.name]:
        raise UserError(f"{stage.name}: ended with exit code {code}; run the same command again")


def win_rate(name: str, temperature: float, test: Path, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What `dpo_jax.winrate` says of a run's answers, or of the chosen ones, against those of SFT.

    Raises:
      UserError: it failed.
    """
    side = name if name == "chosen" else str(work / name / "model")
    command = [sys.executable, "-m", "dpo_jax.winrate", side, str(work / "sft" / "model")]
    given = {
        "prompts": test,
        "max-samples": options.prompts,
        "max-new-tokens": options.new_tokens,
        "temperature": temperature,
        "dtype": options.dtype,
        "judge": f"reward:{work / 'reward' / 'model'}",
        "output": work / f"{name}-{temperature}",
    }
    words = itertools.chain.from_iterable((f"--{key}", str(value)) for key, value in given.items())
    done = subprocess.run([*command, *words, "--as-chat", "--json"], check=False, stdout=subprocess.PIPE)
    if done.returncode:
        raise UserError(f"winrate of {name} ended with exit code {done.returncode}; run the same command again")
    return json.loads(done.stdout)


def accuracy_of(judge: Path, test: Path, options: argparse.Namespace) -> float:
    """How often the judge prefers the chosen answers of TEST, which it was not trained on.

    Raises:
      UserError: it cannot be measured.
    """
    settings = ("data.as_chat=true", f"model.compute_dtype={options.dtype}")
    command = [sys.executable, "-m", "dpo_jax.evaluate", str(judge), str(test), *settings, "--json"]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE)
    if done.returncode:
        raise UserError(f"evaluate of the judge ended with exit code {done.returncode}; run the same command again")
    return json.loads(done.stdout)["rewards/accuracies"]


def rows_of(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table: a line for each comparison, with 95 % intervals."""
    lines = []
    for name, said in found.items():
        (judge,) = said["judges"]
        rate, low, high = (judge[key] for key in ("win_rate", "win_rate_low", "win_rate_high"))
        ends = f"{judge['wins']} won, {judge['ties']} tied, {judge['losses']} lost"
        lines.append(f"{name:<24} {rate:.1%} [{low:.1%}, {high:.1%}]  {ends}")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments and go on."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("model", "train", "test", "work"):
        parser.add_argument(name, type=Path, metavar=name.upper())
    parser.add_argument("--pairs", type=int, default=432, help="rows of each of the three stretches")
    parser.add_argument("--prompts", type=int, default=64, help="prompts of TEST that are answered")
    parser.add_argument("--new-tokens", type=int, default=96, help="longest answer")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.25, 0.7, 1.0])
    parser.add_argument("--dtype", default="auto", help="to compute in; bfloat16 is fast on CPUs that have it")
    options = parser.parse_args(argv)
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    files = write_stretches(options.train, work, options.pairs)
    for stage in STAGES:
        train(stage, options.model, files[stage.stretch], work, options.dtype)
    accuracy = accuracy_of(work / "reward" / "model", options.test, options)
    print(f"the judge prefers the chosen answer of {accuracy:.1%} of TEST's pairs")
    found = {}
    for temperature, name in itertools.product(options.temperatures, COMPARED):
        found[f"{name} at {temperature}"] = win_rate(name, temperature, options.test, work, options)
        (work / "winrates.json").write_text(json.dumps(found, indent=2) + "\n")
    print("\n".join(rows_of(found)))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
