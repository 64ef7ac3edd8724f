"""The side-by-side stopwatch: dpo_jax and its rivals on the same pairs, and the parts of dpo_jax by themselves.

    python tools/bench.py compare tiny --trl VENV/bin/python --repeats 3
    python tools/bench.py compare smollm2_hh --model FOLDER --data hh_train.jsonl --trl VENV/bin/python
    python tools/bench.py micro [NAME ...]
    python tools/bench.py memory
    python tools/bench.py generate --model FOLDER [--transformers VENV/bin/python]

`compare` runs the programs in turn (A B A B ...), each in a process of its own and, on a CPU, on the same CPUs. It
believes a time only if the losses of all steps agree with ours; a rival whose losses do not gets no ratio. `micro`
measures single parts, each in a process of its own, `memory` what the compiled training step allocates, and `generate`
how fast answers are written beside transformers' generate.

Each call appends a line with all raw numbers, the commit and the machine to tools/benchmarks.jsonl (`--record FILE` for
another file, `--no-record` for none); `tools/bench_table.py` makes the tables of tools/BENCHMARKS.md of it.
"""

import argparse
import dataclasses
import functools
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dpo_jax.errors import UserError  # noqa: E402
from tools.benching import compare, generation, micro, records, workloads  # noqa: E402
from tools.benching.compare import OURS, Runner  # noqa: E402
from tools.runners.protocol import Spec  # noqa: E402

say = functools.partial(print, flush=True)

RIVALS = ("trl", "tunix", "easydel", "levanter")


def runners(arguments: argparse.Namespace) -> list[Runner]:
    """Ours, then each rival whose interpreter the command line names.

    Raises:
      UserError: an interpreter or a script is not there.
    """
    folder = Path(__file__).resolve().parent / "runners"
    found = [Runner(OURS, arguments.ours, str(folder / "ours.py"))]
    found += [
        Runner(name, python, str(folder / f"{name}.py"))
        for name in RIVALS
        if (python := getattr(arguments, name)) is not None
    ]
    for runner in found:
        for what in (runner.python, runner.script):
            if not Path(what).is_file():
                raise UserError(f"--{'ours' if runner.name == OURS else runner.name}: {what} is no file; give PYTHON")
    return found


def run_compare(arguments: argparse.Namespace) -> int:
    """Run everybody, judge, print and record. Exit code 1 if a program failed or its losses disagree."""
    if not 0 <= arguments.warmup < arguments.steps:
        raise UserError(f"--warmup: {arguments.warmup} must be less than the {arguments.steps} of --steps; lower it")
    programs = runners(arguments)
    if arguments.lora is not None and {runner.name for runner in programs} - {OURS, "trl"}:
        raise UserError("--lora: only trl is compared with an adapter; leave the others out")
    choice = workloads.Choice(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(workloads.Choice)})
    with tempfile.TemporaryDirectory() as folder:
        spec, facts = workloads.prepare(arguments.workload, choice, Path(folder))
        say(f"{arguments.workload}: {facts['pairs']} pairs, mean tokens {facts['mean_tokens']}, {choice.dtype}")
        about = records.about()
        runs = compare.alternate(programs, spec, arguments.repeats, arguments.timeout, say)
    result = compare.summary(runs, spec)
    say(*compare.lines_of(result), sep="\n")
    record = {"kind": "compare", **about, "workload": arguments.workload, "spec": portable(spec), "data": facts}
    keep(arguments, {**record, "runs": [dataclasses.asdict(run) for run in runs], "summary": result})
    return int(any("problem" in found for found in result.values()))


def portable(spec: Spec) -> dict[str, Any]:
    """The spec less the paths, which mean nothing elsewhere."""
    return {key: value for key, value in dataclasses.asdict(spec).items() if key not in ("model", "pairs", "adapter")}


def run_micro(arguments: argparse.Namespace) -> int:
    """Measure the named parts, each in a process of its own; or, as such a process, one of them."""
    options = micro.Options(arguments.model, arguments.data, arguments.threads, arguments.quick)
    if arguments.child:
        return micro.child(arguments.names, options)
    about = records.about()
    failed = 0
    for name in arguments.names or list(micro.NAMES):
        rows, problem = micro.in_child(name, options, arguments.ours, arguments.timeout)
        say(f"\n{name}", *(micro.lines(rows) if not problem else [f"failed: {problem}"]), sep="\n")
        failed += bool(problem)
        if not problem:
            keep(arguments, {"kind": "micro", **about, "name": name, "quick": arguments.quick, "rows": rows})
    return int(failed > 0)


def run_memory(arguments: argparse.Namespace) -> int:
    """Compile the training step for one shape and say what it allocates. Exit code 1 if more than is claimed."""
    from tools.benching import memory

    about = records.about()
    found = memory.measure(memory.Shape(vocabulary=arguments.vocabulary))
    say(*memory.lines(found), sep="\n")
    keep(arguments, {"kind": "memory", **about, **found})
    return int(bool(found["problems"]))


def run_generate(arguments: argparse.Namespace) -> int:
    """Both programs write answers in turn."""
    if arguments.model is None:
        raise UserError("generate: --model is not given; name the folder")
    model = Path(arguments.model).expanduser().resolve()
    asked = generation.prompts(model, arguments.prompts, arguments.prompt_tokens)
    sizes = {"tokens": arguments.tokens, "threads": arguments.threads, "repeats": arguments.repeats}
    pythons = {"dpo_jax": arguments.ours, "transformers": arguments.transformers}
    about = records.about()
    with tempfile.TemporaryDirectory() as folder:
        spec = {"model": str(model), "prompts": asked, **sizes}
        found = generation.alternate(pythons, spec, Path(folder), arguments.timeout, say)
    rows = generation.rows(found, arguments.prompts * arguments.tokens)
    say(*micro.lines(rows), sep="\n")
    sizes |= {"prompts": arguments.prompts, "prompt_tokens": arguments.prompt_tokens, "model": model.name}
    keep(arguments, {"kind": "generate", **about, **sizes, "rows": rows})
    return 0


def keep(arguments: argparse.Namespace, record: dict[str, Any]) -> None:
    """Append the record, unless told not to."""
    if not arguments.no_record:
        records.append(record, arguments.record)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    whole = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = whole.add_subparsers(required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--record", type=Path, default=records.RECORDS, metavar="FILE", help="where the line goes")
    common.add_argument("--no-record", action="store_true", help="write no line")
    process = argparse.ArgumentParser(add_help=False)
    process.add_argument("--ours", default=sys.executable, metavar="PYTHON", help="interpreter for dpo_jax")
    process.add_argument("--threads", type=positive, default=cpus(), help="CPUs of each process (default: all)")
    process.add_argument("--timeout", type=float, default=7200.0, metavar="SECONDS", help="of one process")
    process.add_argument("--model", metavar="FOLDER", help="a Hugging Face folder")
    process.add_argument("--data", metavar="FILE", help="preference pairs")
    _add_compare(commands, [common, process])
    micro = commands.add_parser("micro", parents=[common, process], help="parts of dpo_jax by themselves")
    micro.add_argument("names", nargs="*", help="which (default: all)")
    micro.add_argument("--quick", action="store_true", help="small sizes, to try whether it runs")
    micro.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    micro.set_defaults(run=run_micro)
    written = commands.add_parser("generate", parents=[common, process], help="answers, beside transformers' generate")
    written.add_argument("--transformers", default=sys.executable, metavar="PYTHON", help="interpreter that has it")
    written.add_argument("--prompts", type=positive, default=16, help="prompts that are answered at once (default 16)")
    written.add_argument("--prompt-tokens", type=positive, default=32, help="tokens of each (default 32)")
    written.add_argument("--tokens", type=positive, default=128, help="tokens of each answer (default 128)")
    written.add_argument("--repeats", type=positive, default=2, help="processes of each program (default 2)")
    written.set_defaults(run=run_generate)
    memory = commands.add_parser("memory", parents=[common], help="what the compiled training step allocates")
    memory.add_argument("--vocabulary", type=positive, default=128256, metavar="N", help="tokens of the vocabulary")
    memory.set_defaults(run=run_memory)
    return whole


def _add_compare(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("compare", parents=parents, help="dpo_jax and its rivals, in turn")
    command.add_argument("workload", choices=workloads.WORKLOADS)
    for name in RIVALS:
        command.add_argument(f"--{name}", metavar="PYTHON", help=f"interpreter of an environment that has {name}")
    command.add_argument("--steps", type=positive, default=8, help="steps of each run (default 8)")
    command.add_argument("--warmup", type=int, default=2, help="first steps that do not count (default 2)")
    command.add_argument("--repeats", type=positive, default=3, help="runs of each program (default 3)")
    command.add_argument("--dtype", choices=compare.BOUNDS, default="float32", help="of activations and products")
    command.add_argument("--reference", choices=("default", "precomputed"), default="precomputed")
    command.add_argument("--pairs-per-step", type=positive, metavar="N", help="another number than the workload's")
    command.add_argument("--max-length", type=positive, metavar="N", help="another length than the workload's")
    command.add_argument("--lora", type=positive, metavar="RANK", help="train an adapter (dpo_jax and trl only)")
    command.set_defaults(run=run_compare)


def positive(text: str) -> int:
    """A whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return value


def cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv: Sequence[str] | None = None) -> int:
    """0 when all went well; 1 when a rival failed or disagrees; 2 with one line on stderr when the call is wrong."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
