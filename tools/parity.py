"""Holds dpo_jax against numbers that TRL computed: `python tools/parity.py FOLDER`. Exit code 1 on a miss.

FOLDER holds `model/` and `ref/` (Hugging Face folders, the tokenizer in `model/`), `batch.json` with the `rows`
(prompt, chosen, rejected), `golden.json` with a case per set of DPOConfig arguments (`kwargs`, `loss`, `grad_norm`,
`metrics`), and, if there is one, `trajectory.json` with the log of some AdamW steps per `loss_type`.
"""

import argparse
import functools
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from dpo_jax.data.batches import Batches, pair_tokens
from dpo_jax.data.encode import Encoded, encode
from dpo_jax.data.settings import DataSettings
from dpo_jax.hf.checkpoint import load_hf
from dpo_jax.hf.tokenizer import load_tokenizer
from dpo_jax.model.decoder import Model
from dpo_jax.model.weights import Weights
from dpo_jax.objectives.terms import make_terms, takes
from dpo_jax.preference.loss import TrainingObjective, loss_and_gradient
from dpo_jax.preference.scoring import score_batch
from dpo_jax.training.optimizer import make_optimizer
from dpo_jax.training.settings import OptimizerSettings
from dpo_jax.training.step import fresh_state, make_step

TRL_NAMES = {
    "f_divergence_type": "divergence",
    "f_alpha_divergence_coef": "divergence_alpha",
    "discopop_tau": "tau",
    "ld_alpha": "ld_alpha",
    "beta": "beta",
}
"""Arguments of DPOConfig and the settings that they are here."""
TRL_BETA = 0.1
"""DPOConfig's default, for every loss; here a loss may have another."""
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
"""Losses that read label_smoothing in TRL 1.16; the others pass it over, where dpo_jax has conservative DPO."""
DATA = ("max_length", "truncation_mode", "precompute_ref_log_probs")
LOSS, EXPONENTIAL, METRIC, NORM, STEP = 1e-5, 1e-4, 5e-5, 1e-4, 1e-4
"""Relative differences that are allowed. TRL's float32 and float64 NumPy differ by up to 6e-6 in losses and 2.4e-5 in
metrics (small differences of large sums); exponential divergences multiply a rounding of the sums."""
TRAJECTORY = {"learning_rate": 5e-3, "schedule": "linear", "warmup_steps": 2, "weight_decay": 0.01}
"""Optimizer of the trajectories, in dpo_jax's words; their rate is `trls_rate`."""


class Line(NamedTuple):
    """One comparison."""

    case: str
    what: str
    theirs: float
    ours: float
    allowed: float

    @property
    def difference(self) -> float:
        """Relative; absolute where TRL's value is (nearly) nothing."""
        return abs(self.ours - self.theirs) / max(abs(self.theirs), 1e-3)

    @property
    def missed(self) -> bool:
        """Whether it is outside what is allowed."""
        return not self.difference <= self.allowed


class Folder(NamedTuple):
    """What the comparisons start from."""

    path: Path
    rows: Path
    policy: Model
    reference: Model


def blocks_of(kwargs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The objectives that DPOConfig arguments ask TRL for, as blocks of settings.

    Raises:
      ValueError: an argument that is not known here.
    """
    given: dict[str, Any] = {"beta": TRL_BETA} | {key: value for key, value in kwargs.items() if key not in DATA}
    losses = given.pop("loss_type", "sigmoid")
    losses = [losses] if isinstance(losses, str) else losses
    weights = given.pop("loss_weights", None) or [1.0] * len(losses)
    smoothing, weighted = given.pop("label_smoothing", None), given.pop("use_weighting", False)
    if unknown := sorted(given.keys() - TRL_NAMES.keys()):
        raise ValueError(f"no setting here for DPOConfig argument {unknown[0]}")
    settings = {TRL_NAMES[key]: value for key, value in given.items()} | ({"weighting": "wpo"} if weighted else {})
    blocks = []
    for name, weight in zip(losses, weights, strict=True):
        block = {key: value for key, value in settings.items() if key in takes(name)}
        smooth = {"label_smoothing": smoothing} if smoothing is not None and name in SMOOTHED else {}
        blocks.append({"name": name, "weight": weight, **block, **smooth})
    if losses == ["sft"]:  # alone it does not look at rejected answers; TRL measures them all the same
        blocks.append({"name": "sigmoid", "weight": 0.0})
    return blocks


def open_folder(path: Path, scratch: Path) -> Folder:
    """Both models, and the rows as a file."""
    rows = scratch / "rows.jsonl"
    table = json.loads((path / "batch.json").read_text())["rows"]
    rows.write_text("".join(json.dumps(row) + "\n" for row in table))
    return Folder(path, rows, load_hf(path / "model"), load_hf(path / "ref"))


def encoded_rows(folder: Folder, kwargs: Mapping[str, Any]) -> Encoded:
    """The rows as TRL tokenises and truncates them."""
    truncation, length = kwargs.get("truncation_mode", "keep_start"), kwargs.get("max_length", 1024)
    data = DataSettings(train=str(folder.rows), truncation=truncation, max_length=length, max_bad_fraction=1.0)
    return encode(str(folder.rows), load_tokenizer(str(folder.path / "model")), data)[0]


def measure(folder: Folder, kwargs: Mapping[str, Any]) -> dict[str, float]:
    """Loss, gradient norm and metrics of one step over all rows."""
    encoded = encoded_rows(folder, kwargs)
    batch = Batches(encoded, encoded.num_pairs, 1, 1, order="file").at(0)
    objective = TrainingObjective(folder.policy.spec, make_terms(blocks_of(kwargs)))
    run = jax.jit(functools.partial(loss_and_gradient, objective))
    loss, metrics, gradient, _ = run(Weights(folder.policy.params), batch, folder.reference.params)
    found = {"loss": loss, "grad_norm": optax.tree.norm(gradient), **metrics}
    tokens = float(pair_tokens(encoded).sum())
    return {name: float(value) for name, value in found.items()} | {"num_tokens": tokens}


def compare_case(folder: Folder, case: str, golden: Mapping[str, Any]) -> Iterator[Line]:
    """Every number that TRL gives for a case."""
    if "ref_chosen_logps" in golden:
        yield from _compare_reference(folder, case, golden)
        return
    kwargs = golden["kwargs"]
    ours = measure(folder, kwargs)
    exponential = kwargs.get("f_divergence_type") in ("forward_kl", "alpha_divergence")
    yield Line(case, "loss", golden["loss"], ours["loss"], EXPONENTIAL if exponential else LOSS)
    yield Line(case, "grad_norm", golden["grad_norm"], ours["grad_norm"], NORM)
    for name, value in golden["metrics"].items():
        yield Line(case, name, value, ours[name], METRIC)


def _compare_reference(folder: Folder, case: str, golden: Mapping[str, Any]) -> Iterator[Line]:
    """The reference's log-probability of each row, computed ahead."""
    encoded = encoded_rows(folder, {})
    batch = Batches(encoded, encoded.num_pairs, 1, 1, order="file").at(0)
    tokens = np.asarray(jax.jit(functools.partial(score_batch, folder.reference.spec))(folder.reference.params, batch))
    sums = np.zeros(encoded.num_completions)
    for number, completion in enumerate(batch.ids[0, 0][batch.ids[0, 0] >= 0]):
        sums[completion] = tokens[0, 0][batch.completion[0, 0] == number].sum()
    for side, ids in (("chosen", encoded.chosen), ("rejected", encoded.rejected)):
        for row, value in enumerate(golden[f"ref_{side}_logps"]):
            yield Line(case, f"ref logp {side} {row + 1}", value, float(sums[ids[row]]), LOSS)
    yield Line(case, "loss", golden["loss"], measure(folder, {})["loss"], LOSS)


def trls_rate(settings: OptimizerSettings, steps: int) -> optax.Schedule:
    """The linear schedule of transformers, whose first step has a rate of 0; ours rises from above it."""
    warmup, peak = settings.warmup_steps or 0, settings.learning_rate
    parts = [optax.linear_schedule(0.0, peak, warmup), optax.linear_schedule(peak, 0.0, steps - warmup)]
    return optax.join_schedules(parts, [warmup])


def compare_trajectory(folder: Folder, loss_type: str, log: list[Mapping[str, float]]) -> Iterator[Line]:
    """The loss of each step of AdamW over all rows."""
    encoded = encoded_rows(folder, {})
    settings = OptimizerSettings.model_validate(TRAJECTORY)
    optimizer = make_optimizer(settings)
    objective = TrainingObjective(folder.policy.spec, make_terms(blocks_of({"loss_type": loss_type})))
    step = jax.jit(make_step(objective, optimizer, trls_rate(settings, len(log)), steps=len(log)))
    state = fresh_state(folder.policy.params, optimizer)
    for number, theirs in enumerate(log):
        batch = Batches(encoded, encoded.num_pairs, 1, len(log), order="file").at(number)
        state, found = step(state, Weights({}), folder.reference.params, batch)
        yield Line(f"{loss_type}, step {number + 1}", "loss", theirs["loss"], float(found["loss"]), STEP)


def compare(path: Path) -> Iterator[Line]:
    """Everything that the folder has numbers for."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = open_folder(path, Path(scratch))
        for case, golden in json.loads((path / "golden.json").read_text()).items():
            if not case.startswith("_"):
                yield from compare_case(folder, case, golden)
        if (path / "trajectory.json").exists():
            for loss_type, log in json.loads((path / "trajectory.json").read_text())["traj"].items():
                yield from compare_trajectory(folder, loss_type, log)


def _worst(lines: list[Line]) -> str:
    """Largest relative difference of each sort of number."""
    sorts = {"losses": [], "gradient norms": [], "steps of a trajectory": [], "metrics": []}
    for line in lines:
        sort = {"loss": "losses", "grad_norm": "gradient norms"}.get(line.what, "metrics")
        sorts["steps of a trajectory" if ", step " in line.case else sort].append(line.difference)
    return "worst: " + ", ".join(f"{name} {max(found):.1e}" for name, found in sorts.items() if found)


def main() -> int:
    """Print the table: losses and gradient norms, and every other number that missed."""
    parser = argparse.ArgumentParser(description="Compare dpo_jax with numbers of TRL.")
    parser.add_argument("folder", type=Path, help="folder with model, ref, batch.json and golden.json")
    parser.add_argument("--all", action="store_true", help="print metrics too")
    options = parser.parse_args()
    if not (options.folder / "golden.json").is_file():
        parser.error(f"{options.folder} has no golden.json")
    jax.config.update("jax_default_matmul_precision", "highest")
    print(f"{'case':34} {'what':22} {'TRL':>14} {'ours':>14} {'relative':>9}")
    lines: list[Line] = []
    for line in compare(options.folder):
        lines.append(line)
        if options.all or line.missed or line.what in ("loss", "grad_norm"):
            mark = "  MISSED" if line.missed else ""
            print(
                f"{line.case:34} {line.what:22} {line.theirs:14.7g} {line.ours:14.7g} {line.difference:9.1e}{mark}",
                flush=True,
            )
    missed = [line for line in lines if line.missed]
    print(
        f"{len({line.case for line in lines})} cases and steps, {len(lines)} numbers, {len(missed)} missed; "
        + _worst(lines)
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
