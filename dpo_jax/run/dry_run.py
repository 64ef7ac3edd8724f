"""Everything that can be known of a run before anything is compiled, downloaded or written: `train ... --dry-run`."""

import shutil
import statistics
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import jax

from dpo_jax import sharding, trees
from dpo_jax.config.run import Run
from dpo_jax.data.arguments import dated
from dpo_jax.errors import redacted
from dpo_jax.evaluation.judges.opening import check_judge
from dpo_jax.files import size_text
from dpo_jax.hf.tensors import SIDE_FILES
from dpo_jax.intervals import is_at, steps_between
from dpo_jax.model.decoder import abstract_params
from dpo_jax.planning import costs, machine
from dpo_jax.planning.report import fit_line, scaled, table
from dpo_jax.reporting.journal import METRICS_FILE, read_records
from dpo_jax.run import continuing, models, output, program, result, sources
from dpo_jax.run.continuing import Past
from dpo_jax.run.data import Data, check_tokens, print_for_now, read_data
from dpo_jax.run.evaluator import read_prompts
from dpo_jax.run.fitting import room_of
from dpo_jax.run.prepare import Start, check_named, steps_over
from dpo_jax.run.program import PlannedStep
from dpo_jax.run.sources import Sources
from dpo_jax.training.reference import data_digest

MEASURED = 50
"""Newest steps of a run that is gone on with, whose time is looked at."""

SLOWER = 1.5
"""How much faster float32 is than the dtype that is computed in before that is said."""


def dry_run(run: Run) -> int:
    """Say, line by line, what training would find and take. Returns 0, or 1 where by prediction it does not fit.

    Of models no more than their configs and tokenizers is read; whoever judges answers is asked whether they are there.

    Raises:
      UserError: training would be refused.
    """
    folder = Path(run.output)
    output.check(folder)
    past = Past.of(folder)
    past.check_settings(run)
    if result.is_finished(run, past):
        print(f"{folder}: this run is finished already")
        return 0
    sources.check_export(run.export)
    check_named(run)
    mesh = models.make_mesh(run.mesh, run.model)
    with tempfile.TemporaryDirectory() as scratch:
        found, data = _read(run, folder, mesh, Path(run.data.cache or scratch))
    steps = _length(run, data, found, past)
    step = program.describe(run, found, data.train, mesh, room=room_of(mesh))
    print("\n".join(_model_lines(run, found, step)))
    fits, lines = memory_lines(step)
    print("\n".join(["", *lines, *disk_lines(run, step, folder)]))
    print("\n".join(["", *time_lines(run, step, data, steps - (past.step or 0), folder)]))
    return 0 if fits else 1


def _read(run: Run, folder: Path, mesh: jax.sharding.Mesh, cache: Path) -> tuple[Sources, Data]:
    """The models' folders and the data, looked at as training looks at them."""
    for judge in run.evaluation.judging.values():
        check_judge(judge)
    length, scores, terms = run.data.max_length, run.objective.trains_reward_model, run.objective.terms
    found = sources.find_models(run.model, run.reference, output.recorded(folder), SIDE_FILES, adapter=run.adapter)
    how = {"model": run.model, "reference": run.reference, "max_length": length, "scalar_head": scores}
    models.check_models(found, mesh, **how)
    found, tokenizer, _, policy = Start.of(run, found, mesh)
    data = read_data(run.data, tokenizer, cache, print_for_now, date=output.template_date(folder), seed=run.seed)
    data = data.examples(terms, length)
    check_tokens(data, policy.spec.vocab_size, tokenizer)
    read_prompts(
        run.evaluation, found.policy, dated(tokenizer, date=data.date).tokenizer, run.data.chat_template_kwargs
    )
    return found, data


def _length(run: Run, data: Data, found: Sources, past: Past) -> int:
    """Steps of the run, which may go on with these data and this length."""
    steps, train = steps_over(run, data), data.train
    facts = {continuing.STEPS: steps, continuing.PAIRS: train.num_pairs, continuing.DATA: data_digest(train)}
    for line in past.check_facts(run, {**found.facts(), **facts}, train):
        print(line)
    if past.step is not None:
        print(f"goes on after step {past.step:,}")
    return steps


def _model_lines(run: Run, found: Sources, step: PlannedStep) -> list[str]:
    whole, trained = abstract_params(step.objective.spec), step.trainer.abstract["trained"]
    here = any(found.policy.glob("*.safetensors"))
    execution, shapes = step.objective.execution, ", ".join(f"{rows} x {slots}" for rows, slots in step.shapes)
    sizes = " ".join(f"{axis}={size}" for axis, size in step.mesh.shape.items() if size > 1)
    kind = step.mesh.devices.flat[0].device_kind
    return [
        redacted(f"{run.model.path}: {trees.num_parameters(whole):,} parameters")
        + ("" if here else ", whose weights are not here yet")
        + f"; {trees.num_parameters(trained):,} numbers are trained, computed in {step.objective.compute_dtype}, "
        f"attention by {execution.attention}, remat {execution.remat}",
        f"{step.mesh.size} x {kind}{f' ({sizes})' if sizes else ''}: {step.load.tokens:,.0f} tokens a step, of which "
        f"{step.load.scored:,.0f} scored; {100 * step.load.tokens / step.load.slots:.0f} % filled rows of {shapes} "
        f"slots, {step.micro_batches:g} micro-batches",
    ]


def memory_lines(step: PlannedStep) -> tuple[bool, list[str]]:
    """Whether the step fits into a device, by prediction, and what it takes."""
    items, capacity = program.predicted(step), machine.memory_of_a_device()
    total = sum(items.values())
    named = [(name, size_text(size)) for name, size in items.items() if size]
    lines = [*table([*named, ("together", size_text(total))]), fit_line(total, capacity, "a device's memory")]
    return total <= capacity, ["memory of a device at a step's fullest moment, by prediction", *lines]


def disk_lines(run: Run, step: PlannedStep, folder: Path) -> list[str]:
    """What checkpoints take of the disk, and what is free there; or of the bucket that they lie in."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(step.trainer.abstract))
    kept = run.checkpoint.keep + (run.checkpoint.best is not None)
    if (bucket := run.checkpoint.folder) is not None:
        return [f"{bucket}: {kept} checkpoints of {size_text(size)} and one that is written; it was not asked for"]
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    most = (kept + 1) * size  # an old one goes when the next is whole
    verdict = "" if most < free else "; that does not fit: set output to a folder on a larger disk"
    return [f"disk: {kept} checkpoints of {size_text(size)} and one that is written, {size_text(free)} free{verdict}"]


class RunWork(NamedTuple):
    """Operations of a run's products, all devices together: of its steps, of the reference's pass over the data, and of
    its evaluations."""

    steps: float
    reference: float
    evaluations: float


def work_of(run: Run, step: PlannedStep, data: Data, left: int) -> RunWork:
    """What the steps that are `left`, the reference and evaluations multiply; another reference counts as the policy's
    size."""
    spec, pairs = step.objective.spec, run.batch.pairs
    forward = costs.forward_flops(spec, step.load)
    held_out = sum(encoded.num_pairs for encoded in data.held_out.values())
    one = costs.step_flops(spec, step.load, step.trainer.abstract["trained"])
    one += forward if run.reference.mode == "live" else 0.0
    sweep = forward * (data.train.num_pairs + held_out) / pairs if run.reference.mode == "cached" else 0.0
    asked = run.evaluation.every
    every = None if asked is None else steps_between(asked, data.train.num_pairs, pairs)
    times = evaluations_left(every, left, step.steps)
    return RunWork(one * left, sweep, forward * held_out / pairs * times)


def evaluations_left(every: Fraction | None, left: int, steps: int) -> int:
    """How often held-out data are measured while what is left of a run is made; at its start too, if all is."""
    between = sum(is_at(step, every) for step in range(steps - left + 1, steps)) if every is not None else 0
    return (left == steps) + between + (left > 0)


def time_lines(run: Run, step: PlannedStep, data: Data, left: int, folder: Path) -> list[str]:
    """Hours of what is left of a run: as measured where it has made steps, and what its products alone would take."""
    work = work_of(run, step, data, left)
    dtype, device = step.objective.compute_dtype, step.mesh.devices.flat[0]
    gflops = machine.matmul_gflops(device, dtype)
    rate = 1e9 * gflops * step.mesh.size / _alike(step.mesh)
    hours = sum(work) / rate / 3600
    parts = [f"{left:,} steps {scaled(work.steps, 'FLOP')}"]
    parts += [
        f"{name} {scaled(size, 'FLOP')}" for name, size in zip(RunWork._fields[1:], work[1:], strict=True) if size
    ]
    lines = [
        f"time of products of matrices alone: {_hours(hours)} ({', '.join(parts)}, at {scaled(rate, 'FLOP/s')} in "
        f"{dtype}, measured here on one product)",
        "  beside it: compiling, answers, checkpoints, and all else that a step does",
        *_faster_in_float32(device, dtype, gflops),
    ]
    records = read_records(folder / METRICS_FILE) if (folder / METRICS_FILE).exists() else []
    seconds = [record["step_seconds"] for record in records if record.get("step_seconds")][-MEASURED:]
    if seconds:
        each = statistics.median(seconds)
        lines.insert(
            0, f"time of {left:,} steps: {_hours(left * each / 3600)}, at {each:.3g} s each as measured so far"
        )
    return lines


def _faster_in_float32(device: Any, dtype: str, gflops: float) -> list[str]:
    """That this device is faster in float32 than in the 16 bits that were asked for, as CPUs before jax 0.12 are."""
    times = 1.0 if dtype == "float32" else machine.matmul_gflops(device, "float32") / gflops
    if times < SLOWER:
        return []
    return [f"  in float32 a product is {times:.1f} times as fast here: model.compute_dtype=float32"]


def _alike(mesh: jax.sharding.Mesh) -> int:
    """Devices that share the unit whose speed was measured: those of a CPU are all one."""
    return mesh.size if sharding.platform(mesh) == "cpu" else 1


def _hours(hours: float) -> str:
    return f"{hours:.2f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes" if hours >= 1 / 60 else "under a minute"
