"""`python -m dpo_jax.plan CONFIG --devices N [--chip h100] [key=value ...]`: what a run will take.

The run's own training step is compiled without weights, of which only `config.json` is read: by the chip's own compiler
where that is installed, else for as many virtual devices of this CPU. Memory, operations and traffic are those of that
program; the time is an estimate.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dpo_jax.config import command as commands
from dpo_jax.config.command import Parser
from dpo_jax.errors import UserError
from dpo_jax.planning import compilers
from dpo_jax.planning.chips import CHIPS, Chip

if TYPE_CHECKING:
    import jax

    from dpo_jax.config.run import Run
    from dpo_jax.run.program import PlannedStep

ON_CPU = "a CPU's compiler computes products of 16 bits in float32, so its temporaries are more than an accelerator's"


@commands.command
def main(argv: Sequence[str]) -> int:
    """Read the settings, compile for virtual devices, and print the plan."""
    parser = Parser("plan", settings=True)
    parser.add_argument("--devices", type=int, required=True, help="how many devices there will be, on all hosts")
    parser.add_argument("--hosts", type=int, help="hosts, or ICI domains (default: as few as the chip allows)")
    parser.add_argument("--chip", choices=list(CHIPS), default="h100", help="what a device is (default: h100)")
    parser.add_argument("--prompt-tokens", type=int, help="made-up data: mean length of prompts")
    parser.add_argument("--completion-tokens", type=int, help="made-up data: mean length of completions")
    parser.add_argument(
        "--compiler",
        choices=["auto", "real", "cpu"],
        default="auto",
        help="what compiles the step: the chip's own compiler (real; no device is needed: pip install "
        "'dpo_jax[compile-gpu]' or 'dpo_jax[compile-tpu]'), this CPU's, or the chip's if it is installed (auto)",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.usage = f"{parser.prog} CONFIG.yaml ... --devices N [options] [section.key=value ...]"
    options, rest = parser.parse_known_args(argv)
    chip = CHIPS[options.chip]
    hosts = _hosts(parser, options, chip)
    from dpo_jax.config import run as config

    run = _as_on_accelerators(config.load(rest, "plan"))
    commands.quiet_libraries()
    lengths, real = (options.prompt_tokens, options.completion_tokens), compilers.chosen(options.compiler, chip)
    plan = make_plan(run, options.devices, hosts, chip, lengths=lengths, real=real)
    if options.json:
        print(json.dumps(plan, indent=2))
    else:
        from dpo_jax.planning import report

        print("\n".join(report.plan_lines(plan)))
    return 0


def _hosts(parser: Parser, options: argparse.Namespace, chip: Chip) -> int:
    devices = options.devices
    for name in ("devices", "hosts", "prompt_tokens", "completion_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: {value}: must be > 0")
    hosts = -(-devices // chip.domain) if options.hosts is None else options.hosts
    if devices % hosts:
        parser.error(f"--hosts: {hosts}: does not divide {devices} devices; give hosts of equal size")
    if devices // hosts > chip.domain:
        parser.error(
            f"--hosts: {hosts}: {devices // hosts} devices a host; {chip.title} joins at most {chip.domain}; give more"
        )
    return hosts


def _as_on_accelerators(run: "Run") -> "Run":
    """The run with the dtype that `auto` is on accelerators."""
    if run.model.compute_dtype != "auto":
        return run
    return run.model_copy(update={"model": run.model.model_copy(update={"compute_dtype": "bfloat16"})})


def make_plan(
    run: "Run",
    devices: int,
    hosts: int,
    chip: Chip,
    *,
    lengths: tuple[int | None, int | None] = (None, None),
    real: bool = False,
) -> dict[str, Any]:
    """The plan as plain values. JAX must not have been started with another number of devices.

    Args:
      run: its settings.
      devices: how many.
      hosts: over how many hosts they are spread, in equal parts.
      chip: what they are.
      lengths: mean tokens of prompts and completions of made-up data; if both are None the run's own data are read, if
        they are there.
      real: compile with the chip's own compiler, which must be installed.

    Raises:
      UserError: training would refuse the settings, the model or the mesh; JAX has other devices already; or the chip's
        compiler is not installed, or knows no such topology.
    """
    import jax

    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 1 if real else devices)
    except RuntimeError as error:
        raise UserError(f"--devices: {devices}: JAX is running with other devices; plan in a new process") from error
    jax.config.update("jax_enable_compilation_cache", False)  # what comes from it leaves no text of the program
    from dpo_jax.run import models, program
    from dpo_jax.run.data import ACCELERATOR_ATTENTION_LENGTH
    from dpo_jax.run.fitting import SHARE
    from dpo_jax.run.sharing import shares

    mesh = models.make_mesh(run.mesh, run.model, compilers.devices(chip, devices, hosts) if real else None)
    with compilers.answering_for(chip) if real else contextlib.nullcontext():
        sources = program.find_config(run, mesh)
        steps = run.steps
        encoded, data, run = program.data_for(run, sources, lengths)
        made_up = data != program.OWN_DATA
        how = {"attention_length": ACCELERATOR_ATTENTION_LENGTH, "room": int(SHARE * chip.memory)}
        step = program.describe(run, sources, encoded, mesh, **how)
        found: dict[str, Any] = _planned(run, step, data, hosts, chip) | {"steps": steps if made_up else step.steps}
        shared = shares(step, sources.policy, hosts, adapter=run.adapter.used) if hosts > 1 else {}
        found["of_a_host"] = {name: share._asdict() for name, share in shared.items()}
        lowered = step.trainer.lower(step.dummy)
    made = (_as_compiled if real else _on_cpu)(lowered, step, hosts, chip, found["flops"]["useful"])
    for part in ("memory", "flops"):
        found[part] |= made.pop(part)
    found["compiler"] = compilers.version(chip) if real else "this CPU's"
    return found | made


def _planned(run: "Run", step: "PlannedStep", data: str, hosts: int, chip: Chip) -> dict[str, Any]:
    """What is known before anything is compiled."""
    from dpo_jax import trees
    from dpo_jax.model.decoder import abstract_params
    from dpo_jax.planning import costs
    from dpo_jax.run import program

    mesh, spec = step.mesh, step.objective.spec
    return {
        "model": {
            "path": run.model.path,
            "parameters": trees.num_parameters(abstract_params(spec)),
            "compute_dtype": step.objective.compute_dtype,
            "remat": step.objective.execution.remat,
            "attention": step.objective.execution.attention,
        },
        "devices": mesh.size,
        "hosts": hosts,
        "chip": chip.title,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1 or axis in ("data", "fsdp", "tensor")},
        "batch": {
            "pairs": run.batch.pairs,
            "data": data,
            "tokens": step.load.tokens,
            "scored": step.load.scored,
            "filled": step.load.tokens / step.load.slots,
            "micro_batches": step.micro_batches,
            "shape": list(step.shapes[0]),
            "shapes": [list(shape) for shape in step.shapes],
        },
        "memory": {"predicted": program.predicted(step), "capacity": chip.memory, "note": ""},
        "flops": {"useful": costs.step_flops(spec, step.load, step.trainer.abstract["trained"])},
    }


def _on_cpu(
    lowered: "jax.stages.Lowered", step: "PlannedStep", hosts: int, chip: Chip, useful: float
) -> dict[str, Any]:
    """What a CPU's compiler says of the partitioned program, and what may follow for the chip."""
    import jax.numpy as jnp

    from dpo_jax import sharding
    from dpo_jax.planning import estimate, exchanges, hlo, report
    from dpo_jax.run import program

    mesh, devices = step.mesh, step.mesh.size
    compiled, text = program.compile_with_text(lowered, devices)
    found_program = program.program_of(step, text)
    found, items = exchanges.collectives(found_program, devices), program.moved_by(step)
    inside, across = estimate.traffic(found, devices // hosts)
    flops, note = hlo.product_flops(found_program), ""
    if found_program.uncounted:
        note = f"{found_program.uncounted} inner loops whose length is a value are counted once: more is computed"
    work = estimate.Work(flops, estimate.memory_traffic(items, step.micro_batches), inside, across, useful)
    time = estimate.estimate(work, chip)
    bounds = {"overlapped": time.overlapped, "serial": time.serial}
    wide = step.objective.compute_dtype == "float32"
    return {
        "memory": {"compiler": program.reported(compiled)} | ({} if wide else {"note": ON_CPU}),
        "flops": {"device": flops, "note": note},
        "memory_traffic": work.memory_bytes,
        "traffic": {"inside": inside, "across": across},
        "collectives": report.collective_rows(found, devices // hosts),
        "theory": estimate.theory(
            items.shard,
            4 * items.shard // jnp.dtype(step.objective.compute_dtype).itemsize,
            data=mesh.shape["data"],
            fsdp=sharding.weight_shards(mesh),
            micro_batches=step.micro_batches,
        ),
        "time": {**time.parts, "bottleneck": time.bottleneck, **bounds},
        "mfu": {name: estimate.utilisation(useful, chip, devices, seconds) for name, seconds in bounds.items()},
        "assumed": list(estimate.ASSUMED),
    }


def _as_compiled(
    lowered: "jax.stages.Lowered", step: "PlannedStep", hosts: int, chip: Chip, useful: float
) -> dict[str, Any]:
    """What the chip's own compiler made of the step."""
    from dpo_jax.planning import compiled, costs, estimate, report
    from dpo_jax.run import program

    spec, devices = step.objective.spec, step.mesh.size
    made = lowered.compile()
    found = compiled.read(made.as_text() or "", devices, step.micro_batches)
    attention = 3.0 * costs.attention_flops(spec, step.load) / devices
    seconds = compiled.seconds_of(found, chip, devices // hosts, attention_flops=attention)
    return {
        "memory": {"compiler": program.reported(made)},
        "flops": {"device": sum(found.products.values()), "by_dtype": found.products},
        "memory_traffic": found.moved if chip.platform == "gpu" else None,
        "kernels": found.kernels,
        "launches": found.launches if chip.platform == "gpu" else None,
        "waits": found.waits if chip.platform == "gpu" else None,
        "cycles": found.cycles if chip.platform == "tpu" else None,
        "collectives": report.collective_rows(found.exchanged, devices // hosts),
        "time": {**dataclasses.asdict(seconds), "step": seconds.step},
        "mfu": {"step": estimate.utilisation(useful, chip, devices, seconds.step)},
        "assumed": list(compiled.ASSUMED),
    }


if __name__ == "__main__":
    sys.exit(main())
