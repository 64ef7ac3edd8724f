"""dpo_jax under the stopwatch: `PYTHON tools/runners/ours.py SPEC.json [--trace FOLDER] [key=value ...]`.

It is called as protocol.py says; what comes after the spec are settings that a spec has no word for.

It is `dpo_jax.train` less the export: the same parts with the same settings, the loop with its prefetching thread, its
journal and its alarms. Only the journal also tells the stopwatch, and nothing is saved. A step is reported as the loop
records it: when the device has it, while the next one already runs. The reference is always computed ahead.
"""

# protocol comes first, and makes Events before anything heavy is imported
from protocol import Events, Spec, cpu_seconds, spec_of_command_line  # isort: split

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("dpo_jax", "jax", "jaxlib", "flax", "optax", "numpy", "transformers")


def settings(spec: Spec, folder: Path) -> list[str]:
    """The command line of `dpo_jax.train` that means the spec."""
    return [
        f"output={folder / 'run'}",
        f"model.path={spec.model}",
        f"model.compute_dtype={spec.dtype}",
        f"data.train={spec.pairs}",
        "data.layout=tokenized",
        f"data.first={spec.steps * spec.pairs_per_step}",
        f"data.max_length={spec.max_length}",
        "data.shuffle=false",
        f"batch.pairs={spec.pairs_per_step}",
        f"steps={spec.steps}",
        "objective.name=sigmoid",
        f"objective.beta={spec.beta}",
        "reference.mode=cached",
        f"optimizer.learning_rate={spec.learning_rate}",
        "optimizer.schedule=constant",
        "optimizer.warmup_steps=0",
        f"optimizer.beta1={spec.beta1}",
        f"optimizer.beta2={spec.beta2}",
        f"optimizer.epsilon={spec.epsilon}",
        "optimizer.weight_decay=0",
        f"optimizer.clip_norm={'null' if spec.clip_norm is None else spec.clip_norm}",
        *([] if spec.adapter is None else [f"adapter.path={spec.adapter}", "reference.adapter=base"]),
    ]


ADAMW = ("optimizer.beta1=", "optimizer.beta2=", "optimizer.epsilon=")


def without_overruled(words: list[str], more: Sequence[str]) -> list[str]:
    """The settings less those of AdamW where `more` names another optimizer, which would refuse them."""
    other = any(word.startswith("optimizer.name=") for word in more)
    return [word for word in words if not (other and word.startswith(ADAMW))]


class Compiling:
    """Seconds that XLA has spent on compiling so far."""

    def __init__(self):
        """Listen from now on."""
        import jax

        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            self.seconds += duration_secs


class Unsaved:
    """Stands where the checkpoints do and keeps nothing: no rival saves anything either."""

    def save(self, *_: Any, **__: Any) -> bool:
        """Save nothing."""
        return False


class Traced:
    """Lets JAX's profiler watch two of the last steps, where a folder is given."""

    def __init__(self, folder: Path | None, steps: int):
        """Of so many steps."""
        self.folder, self.first = folder, steps - 4

    def after(self, step: int) -> None:
        """A step is done."""
        import jax

        if self.folder is not None and step == self.first:
            jax.profiler.start_trace(self.folder)
        if self.folder is not None and step == self.first + 2:
            jax.profiler.stop_trace()


def run(spec: Spec, events: Events, folder: Path, more: Sequence[str] = (), trace: Path | None = None) -> None:
    """The parts of `dpo_jax.train.train`, up to the last step; `more` are settings that the spec has no word for."""
    from dpo_jax.config import command as commands
    from dpo_jax.config import run as config

    settled = config.load([*without_overruled(settings(spec, folder), more), *more])
    commands.quiet_libraries()

    from dpo_jax.planning import costs
    from dpo_jax.reporting.journal import Journal
    from dpo_jax.run import output
    from dpo_jax.run.prepare import Job
    from dpo_jax.train import advance

    class Timed(Journal):
        """A journal that also tells the stopwatch."""

        def phase(self, text: str) -> None:
            super().phase(text)
            if text == "training":
                events.ready()

        def step(self, step: int, metrics: Any) -> None:
            super().step(step, metrics)
            traced.after(step - 1)
            events.step(step - 1, float(metrics["loss"]), spec.pairs_per_step)

    compiling, traced = Compiling(), Traced(trace, spec.steps)
    with output.opened(settled) as made:
        job = Job.read(settled, made)
        wanted = spec.steps * spec.pairs_per_step
        if job.data.train.num_pairs != wanted:
            found = job.data.train.num_pairs
            raise ValueError(f"{spec.pairs}: {found} of {wanted} pairs can be used; leave the others out")
        model, weights = job.load_policy()
        objective = job.objective(model, weights)
        with Timed(made, spec.steps, settled.log) as journal:
            wall, cpu, compiled = time.perf_counter(), cpu_seconds(), compiling.seconds
            reference = job.reference(objective, weights, journal, resumes=False)
            compiled = compiling.seconds - compiled
            events.reference(time.perf_counter() - wall, cpu_seconds() - cpu, wanted, compiled)
            trainer = job.trainer(objective, weights, reference)
            recorder = job.recorder(trainer, job.evaluator(objective, weights, reference), journal, after=0)
            state = trainer.fresh(weights.trained)
            del weights
            unsaved: Any = Unsaved()
            advance(trainer, state, recorder, unsaved)
    decoder, batches = objective.spec, [trainer.batches.at(step) for step in range(spec.warmup, spec.steps)]
    load = costs.mean_load([costs.load_of(batch, costs.windows_of(decoder)) for batch in batches])
    shapes = [f"{shape.rows}x{shape.length}" for shape in trainer.batches.shapes]
    events.done(
        PACKAGES,
        device_peak(),
        compile_wall=compiling.seconds,
        late_compilations=trainer.recompilations,
        row_shapes=shapes,
        useful_flops=costs.step_flops(decoder, load, trainer.abstract["trained"]),
        tokens=load.tokens,
        slots=load.slots,
    )


def device_peak() -> int | None:
    """Most bytes that were in use on one accelerator; None on a CPU, which does not tell."""
    import jax

    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [found["peak_bytes_in_use"] for found in stats if found and "peak_bytes_in_use" in found]
    return max(peaks, default=None)


def main() -> None:
    """Run the spec of the command line."""
    events, spec, more = Events(), spec_of_command_line(more=True), sys.argv[2:]
    trace = Path(more[1]) if more[:1] == ["--trace"] else None
    with tempfile.TemporaryDirectory() as folder:
        run(spec, events, Path(folder), more[2:] if trace else more, trace)


if __name__ == "__main__":
    main()
