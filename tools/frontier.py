"""The paper's experiment, small: expected true reward against divergence from the reference, by method (figure 2, left,
of arXiv:2305.18290).

    python tools/frontier.py WORK [--seeds 3] [--jobs 2] [--rows FILE] [--figure FILE] [--small]

A world whose reward is known exactly (tools/fronts/world.py), a model of two million parameters that has learned its
language (SFT, also the reference), and for each seed pairs of its own answers, labelled by the Bradley-Terry model of
the true reward. On the same pairs: DPO, IPO, KTO, SimPO, Preferred-FT (SFT on the chosen answers) and unlikelihood,
each at several strengths and stages of training; a reward model, and with it best-of-N (its KL is log N - (N - 1)/N)
and PPO. Every policy answers the same held-out prompts at temperature 1. Everything is trained by `dpo_jax.train` but
for PPO, which is in tools/fronts/ppo.py.

Rows are appended as they are measured (`--rows`), so that the same command goes on where it stopped. At the end the
envelopes are compared, seed by seed, and the figure is drawn. Needs dpo_jax to be importable, and Matplotlib.
"""

import argparse
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dpo_jax.errors import UserError  # noqa: E402
from dpo_jax.model.decoder import Model  # noqa: E402
from dpo_jax.run import sweeping  # noqa: E402
from dpo_jax.run.kept import export_kept  # noqa: E402
from tools import quickstart  # noqa: E402
from tools.fronts import figure, measure, ppo, world  # noqa: E402
from tools.fronts.measure import Language  # noqa: E402


class Size(NamedTuple):
    """How large the experiment is."""

    width: int
    layers: int
    reviews: int
    pairs: int
    held_out: int
    steps: tuple[int, ...]
    """After which steps policies are measured."""
    ppo_rounds: tuple[int, ...]
    best_of: int


WHOLE = Size(192, 4, 16_000, 2048, 256, (16, 64, 128, 256), (5, 15, 30), 64)
SMALL = Size(64, 2, 1_500, 128, 64, (4, 8), (2,), 4)
RATE = 1e-4
METHODS: dict[str, Sequence[Mapping[str, Any]]] = {
    "DPO": [{"name": "sigmoid", "beta": beta} for beta in (0.05, 0.1, 0.5, 1.0)],
    "IPO": [{"name": "ipo", "beta": beta} for beta in (0.3, 1.0)],
    "KTO": [{"name": "kto", "beta": beta} for beta in (0.1, 0.5)],
    "SimPO": [{"name": "simpo", "beta": beta, "gamma": 0.5} for beta in (1.0, 4.0)],
    "Preferred-FT": [{"name": "sft"}],
    "Unlikelihood": [{"name": "unlikelihood", "unlikelihood_weight": weight} for weight in (0.1, 0.5, 1.0)],
}
PPO_KL = (0.05, 0.2)
QUIET = ("log.tensorboard=false", "log.token_statistics=false", "log.every=8", "log.report=false", "data.max_length=80")


class Rows:
    """The measurements, appended to a file."""

    def __init__(self, path: Path):
        """Go on with those that are there; a last line that was cut off is dropped."""
        self._path, self.found = path, list[dict[str, Any]]()
        lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
        self.found = [json.loads(line) for line in lines if line.endswith("\n")]
        if lines and not lines[-1].endswith("\n"):
            path.write_text("".join(lines[:-1]), "utf-8")

    def has(self, **what: Any) -> bool:
        """Whether there is a row that says this."""
        return any(all(row.get(key) == value for key, value in what.items()) for row in self.found)

    def add(self, what: Mapping[str, Any], numbers: Mapping[str, float]) -> None:
        """Write a row down."""
        row = {**what, **{name: round(value, 5) for name, value in numbers.items()}}
        self.found.append(row)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)


def words(settings: Mapping[str, Any], objective: Mapping[str, Any]) -> list[str]:
    """A run's settings as `dpo_jax.train` takes them."""
    given = {**settings, **{f"objective.{name}": value for name, value in objective.items()}}
    return [f"{key}={json.dumps(value)}" for key, value in given.items()] + list(QUIET)


def label(objective: Mapping[str, Any]) -> str:
    """What tells one strength of a method from another."""
    return ",".join(f"{name}={value}" for name, value in objective.items() if name != "name") or "-"


# ---------------------------------------------------------------------------------------------- before the methods


def held_out_prompts(size: Size) -> list[str]:
    """Prompts that every policy is measured on, and none is trained on."""
    return world.prompts(size.held_out, "held out")


def training_prompts(size: Size, seed: int) -> list[str]:
    """Prompts of a seed's pairs, and of its PPO."""
    return world.prompts(size.pairs, f"pairs {seed}", held_out_prompts(size))


def learned(work: Path, size: Size) -> Path:
    """The folder of the model that has learned the world's language: SFT, and the reference of everything."""
    blank, reviews, output = work / "blank", work / "reviews.jsonl", work / "sft"
    if not (blank / "model.safetensors").exists():
        world.write_blank_model(blank, width=size.width, layers=size.layers)
        quickstart.write_random_weights(blank, 0, np.float32)
    if not reviews.exists():
        world.write_reviews(reviews, size.reviews, 0)
    settings = {
        "model.path": str(blank),
        "data.train": str(reviews),
        "batch.pairs": 64,
        "epochs": 2,
        "optimizer.learning_rate": 2e-3,
        "optimizer.schedule": "cosine",
        "checkpoint.every": 1000,
        "output": str(output),
    }
    train([sweeping.Point("sft", {}, tuple(words(settings, {"name": "sft"})), output)], 1)
    return output / "model"


def train(points: Sequence[sweeping.Point], jobs: int) -> None:
    """Run `dpo_jax.train` for each, `jobs` at a time.

    Raises:
      UserError: one of them failed.
    """
    codes = sweeping.run_all(points, [{} for _ in range(jobs)], print)
    if bad := [name for name, code in codes.items() if code]:
        raise UserError(f"{bad[0]} ended with exit code {codes[bad[0]]}; see its log")


def write_pairs(path: Path, reference: Model, language: Language, size: Size, seed: int) -> None:
    """Two answers of the reference to each of the prompts, and which of them is preferred."""
    if path.exists():
        return
    prompts, rng = training_prompts(size, seed), random.Random(f"labels {seed}")
    both = [measure.samples(reference, language, prompts, seed=1000 * seed + turn) for turn in (1, 2)]
    rows = []
    for prompt, *answers in zip(prompts, *both, strict=True):
        texts = [f" {answer.text.strip()}" for answer in answers]
        if texts[0] != texts[1] and all(text.strip() for text in texts):
            rows.append(
                {"prompt": prompt, **dict(zip(("chosen", "rejected"), world.preferred(texts, rng), strict=True))}
            )
    partly = path.with_suffix(".tmp")
    world.write_jsonl(partly, rows)
    partly.replace(path)


# ---------------------------------------------------------------------------------------------- the methods


def points(folder: Path, reference: Path, pairs: Path, size: Size, seed: int) -> Iterator[tuple[dict[str, Any], Any]]:
    """Every run of a seed, with what its rows say of it."""
    for method, objectives in [*METHODS.items(), ("reward model", [{"name": "reward"}])]:
        for objective in objectives:
            name = f"{objective['name']}-{label(objective)}"
            settings = {
                "model.path": str(reference),
                "data.train": str(pairs),
                "data.cache": str(folder / "cache"),
                "batch.pairs": 32,
                "steps": size.steps[-1],
                "seed": seed,
                "optimizer.learning_rate": RATE,
                "optimizer.schedule": "constant",
                "optimizer.warmup_steps": size.steps[0],
                "checkpoint.every": size.steps[0],
                "checkpoint.keep_every": size.steps[0],
                "output": str(folder / name),
            }
            point = sweeping.Point(name, {}, tuple(words(settings, objective)), folder / name)
            yield {"method": method, "setting": label(objective), "seed": seed}, point


class Ground(NamedTuple):
    """What every measurement needs: the reference and its language, prompts nobody trained on, and the rows so far."""

    reference: Model
    language: Language
    prompts: list[str]
    rows: Rows

    def measure(self, what: Mapping[str, Any], policy: Model) -> None:
        """A row of a policy."""
        numbers = measure.measured(policy, self.reference, self.language, self.prompts, seed=what["seed"])
        self.rows.add(what, numbers)


def measure_run(ground: Ground, what: Mapping[str, Any], folder: Path, steps: Sequence[int]) -> None:
    """A row for each of these steps of a run."""
    for step in steps:
        if not ground.rows.has(**what, step=step):
            with tempfile.TemporaryDirectory() as temporary:
                target = Path(temporary) / "model"
                export_kept(folder, target, step=step, dtype="float32")
                ground.measure({**what, "step": step}, measure.load(target))


def best_of(ground: Ground, judge: Model, most: int, seed: int) -> None:
    """Rows of the best of N answers of the reference, by the reward model; its KL is log N - (N - 1)/N."""
    if ground.rows.has(method="Best of N", seed=seed, setting=f"N={most}"):
        return
    scored, worth = [], []
    for turn in range(most):
        found = measure.samples(ground.reference, ground.language, ground.prompts, seed=7_000_003 * (seed + 1) + turn)
        scored.append(measure.scores(judge, found))
        worth.append([world.reward(sample.text) for sample in found])
    number = 2
    while number <= most:
        what = {"method": "Best of N", "setting": f"N={number}", "seed": seed, "step": 0}
        if not ground.rows.has(**what):
            ground.rows.add(what, best(np.asarray(scored), np.asarray(worth), number))
        number *= 2


def best(scored: np.ndarray, worth: np.ndarray, number: int) -> dict[str, float]:
    """Mean reward of the best of `number` among [answers, prompts], over all groups that do not overlap."""
    groups = len(scored) // number
    scored, worth = (array[: groups * number].reshape(groups, number, -1) for array in (scored, worth))
    chosen = np.take_along_axis(worth, scored.argmax(1)[:, None], axis=1)[:, 0]
    by_prompt = chosen.mean(0)
    return {
        "reward": float(by_prompt.mean()),
        "reward_error": float(by_prompt.std(ddof=1) / len(by_prompt) ** 0.5),
        "kl": math.log(number) - (number - 1) / number,
    }


def measure_ppo(ground: Ground, judge: Model, size: Size, seed: int) -> None:
    """Rows of PPO at each of its penalties."""
    prompts = training_prompts(size, seed)
    for kl in PPO_KL:
        what = {"method": "PPO", "setting": f"kl={kl}", "seed": seed}
        if ground.rows.has(**what, step=size.ppo_rounds[-1]):
            continue
        how = ppo.Plan(kl, 1e-4, size.ppo_rounds, seed)
        for number, policy in ppo.train(ground.reference, judge, ground.language, prompts, how):
            if not ground.rows.has(**what, step=number):
                ground.measure({**what, "step": number}, policy)


def one_seed(ground: Ground, work: Path, folder: Path, size: Size, seed: int, jobs: int) -> None:
    """All rows of a seed."""
    mine = work / f"seed-{seed}"
    mine.mkdir(exist_ok=True)
    pairs = mine / "pairs.jsonl"
    write_pairs(pairs, ground.reference, ground.language, size, seed)
    what = {"method": "SFT", "setting": "-", "seed": seed, "step": 0}
    if not ground.rows.has(**what):
        ground.measure(what, ground.reference)
    runs = list(points(mine, folder, pairs, size, seed))
    train([point for said, point in runs if not _is_measured(ground.rows, said, size, point)], jobs)
    for said, point in runs:
        if said["method"] != "reward model":
            measure_run(ground, said, point.folder, size.steps)
    judge = measure.load(mine / "reward--" / "model")
    best_of(ground, judge, size.best_of, seed)
    measure_ppo(ground, judge, size, seed)


def _is_measured(rows: Rows, what: Mapping[str, Any], size: Size, point: sweeping.Point) -> bool:
    if what["method"] == "reward model":
        return (point.folder / "model" / "model.safetensors").exists()
    return rows.has(**what, step=size.steps[-1])


# ---------------------------------------------------------------------------------------------- the whole


def report(rows: Sequence[Mapping[str, Any]]) -> None:
    """What DPO's envelope is above the others', and how much of each method there is."""
    found = figure.curves(rows)
    for other in found:
        if other == "DPO" or "DPO" not in found:
            continue
        compared = figure.compare(found, "DPO", other)
        half = len(compared.grid) // 2
        middle, where, most = compared.differences[half], compared.grid[half], compared.grid[-1]
        print(
            f"DPO above {other} by {middle.mean:+.3f} +- {middle.half:.3f} at {where:.2f} nats; the interval is above "
            f"0 at {compared.apart:.0%} of the divergences up to {most:.2f} that they share"
        )
    for method, seeds in found.items():
        best_rewards = [float(curve[1][-1]) for curve in seeds.values()]
        print(f"{method:<14} best reward {statistics.fmean(best_rewards):+.3f} at up to {figure.reach(seeds):.2f} nats")


def main() -> None:
    """Read the arguments and go on."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--rows", type=Path, default=None, help="file of measurements (default WORK/rows.jsonl)")
    parser.add_argument("--figure", type=Path, default=None, help="SVG file to draw")
    parser.add_argument("--small", action="store_true", help="minutes, to see that it goes; its numbers say nothing")
    options = parser.parse_args()
    size, work = SMALL if options.small else WHOLE, options.work
    work.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    folder = learned(work, size)
    reference = measure.load(folder)
    prompts = held_out_prompts(size)
    rows = Rows(options.rows or work / "rows.jsonl")
    ground = Ground(reference, Language.of(folder), prompts, rows)
    for seed in range(options.seeds):
        one_seed(ground, work, folder, size, seed, options.jobs)
    report(rows.found)
    if options.figure:
        figure.draw(rows.found, options.figure)
    print(f"{(time.monotonic() - began) / 60:.1f} minutes in this go")


if __name__ == "__main__":
    main()
