"""`python -m dpo_jax.plan CONFIG --devices N [--chip h100] [key=value ...]`: what a run will take.

The run's own training step is compiled for that many virtual devices of this CPU, without weights: of the model only
`config.json` is read. Memory, operations and traffic are those of that program; the time is an estimate.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from dpo_jax.config import command as commands
from dpo_jax.config import run as config
from dpo_jax.config.command import Parser
from dpo_jax.config.run import Run
from dpo_jax.errors import UserError
from dpo_jax.planning.chips import CHIPS, Chip

ON_CPU = "a CPU's compiler computes products of 16 bits in float32, so its temporaries are more than an accelerator's"


@commands.command
def main(argv: Sequence[str]) -> int:
    """Read the settings, compile for virtual devices, and print the plan."""
    parser = Parser("plan", "What a run will take on given devices: memory, operations, traffic, and time at best.")
    parser.add_argument("--devices", type=int, required=True, help="how many devices there will be, on all hosts")
    parser.add_argument("--hosts", type=int, help="hosts, or ICI domains (default: as few as the chip allows)")
    parser.add_argument("--chip", choices=list(CHIPS), default="h100", help="what a device is (default: h100)")
    parser.add_argument("--prompt-tokens", type=int, help="made-up data: mean length of prompts")
    parser.add_argument("--completion-tokens", type=int, help="made-up data: mean length of completions")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.usage = f"{parser.prog} CONFIG.yaml ... --devices N [options] [section.key=value ...]"
    options, rest = parser.parse_known_args(argv)
    chip = CHIPS[options.chip]
    hosts = _hosts(parser, options, chip)
    run = _as_on_accelerators(config.load(rest, "plan"))
    commands.quiet_libraries()
    plan = make_plan(run, options.devices, hosts, chip, lengths=(options.prompt_tokens, options.completion_tokens))
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


def _as_on_accelerators(run: Run) -> Run:
    """The run with the dtype that `auto` is on accelerators."""
    if run.model.compute_dtype != "auto":
        return run
    return run.model_copy(update={"model": run.model.model_copy(update={"compute_dtype": "bfloat16"})})


def make_plan(
    run: Run, devices: int, hosts: int, chip: Chip, *, lengths: tuple[int | None, int | None] = (None, None)
) -> dict[str, Any]:
    """The plan as plain values. JAX must not have been started with another number of devices.

    Args:
      run: its settings.
      devices: how many.
      hosts: over how many hosts they are spread, in equal parts.
      chip: what they are.
      lengths: mean tokens of prompts and completions of made-up data; if both are None the run's own data are read, if
        they are there.

    Raises:
      UserError: training would refuse the settings, the model or the mesh; or JAX has other devices already.
    """
    import jax

    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError as error:
        raise UserError(f"--devices: {devices}: JAX is running with other devices; plan in a new process") from error
    jax.config.update("jax_enable_compilation_cache", False)  # what comes from it leaves no text of the program
    from dpo_jax.run import models, program
    from dpo_jax.run.data import ACCELERATOR_ATTENTION_LENGTH

    mesh = models.make_mesh(run.mesh, run.model)
    sources = program.find_config(run, mesh)
    encoded, data, run = program.data_for(run, sources, lengths)
    step = program.describe(run, sources, encoded, mesh, attention_length=ACCELERATOR_ATTENTION_LENGTH)
    return _measured(run, step, data, hosts, chip)


def _measured(run: Run, step: Any, data: str, hosts: int, chip: Chip) -> dict[str, Any]:
    import jax.numpy as jnp

    from dpo_jax import trees
    from dpo_jax.model.decoder import abstract_params
    from dpo_jax.planning import costs, estimate, hlo, report
    from dpo_jax.run import program

    mesh, spec, devices = step.mesh, step.objective.spec, step.mesh.size
    predicted = program.predicted(step)
    compiled, text = program.compile_step(step)
    found_program = program.program_of(step, text)
    found = hlo.collectives(found_program, devices)
    items = program.moved_by(step)
    inside, across = estimate.traffic(found, devices // hosts)
    useful = costs.step_flops(spec, step.load, step.trainer.abstract["trained"])
    flops, note = hlo.product_flops(found_program), ""
    if found_program.uncounted:
        note = f"{found_program.uncounted} inner loops whose length is a value are counted once: more is computed"
    work = estimate.Work(flops, estimate.memory_traffic(items, step.micro_batches), inside, across, useful)
    time = estimate.estimate(work, chip)
    bounds = {"overlapped": time.overlapped, "serial": time.serial}
    return {
        "model": {
            "path": run.model.path,
            "parameters": trees.num_parameters(abstract_params(spec)),
            "compute_dtype": step.objective.compute_dtype,
            "remat": run.model.remat,
        },
        "devices": devices,
        "hosts": hosts,
        "chip": chip.title,
        "mesh": {axis: size for axis, size in mesh.shape.items() if axis in ("data", "fsdp", "tensor")},
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
        "memory": {
            "predicted": predicted,
            "compiler": program.reported(compiled),
            "note": "" if step.objective.compute_dtype == "float32" else ON_CPU,
            "capacity": chip.memory,
        },
        "flops": {"useful": useful, "device": flops, "note": note},
        "memory_traffic": work.memory_bytes,
        "traffic": {"inside": inside, "across": across},
        "collectives": report.collective_rows(found, devices // hosts),
        "theory": estimate.theory(
            items.shard,
            4 * items.shard // jnp.dtype(step.objective.compute_dtype).itemsize,
            data=mesh.shape["data"],
            fsdp=mesh.shape["fsdp"],
            micro_batches=step.micro_batches,
        ),
        "time": {**time.parts, "bottleneck": time.bottleneck, **bounds},
        "mfu": {name: estimate.utilisation(work, chip, devices, seconds) for name, seconds in bounds.items()},
        "assumed": list(estimate.ASSUMED),
    }


if __name__ == "__main__":
    sys.exit(main())
