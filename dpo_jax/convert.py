"""Hugging Face folders in and out: `python -m dpo_jax.convert export SOURCE TARGET`, `merge BASE ADAPTER TARGET`,
`check FOLDER`, `push FOLDER ID`; and `config FILE`, which rewrites another trainer's config as one of ours.

An export has the tensors, files and tokenizer of its source, read back and verified before the folder stands. Weights
are changed only by `--dtype`, which rounds them to nearest even; those that are packed (4 bits and the like) become
plain ones. The source may be the output folder of a run, whose checkpoints have the weights in the digits that they
were trained in.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dpo_jax.config.bridge.methods import METHODS
from dpo_jax.config.command import Parser, command, quiet_libraries
from dpo_jax.errors import UserError, printable, redacted, short
from dpo_jax.files import write_whole


def _export(argv: Sequence[str]) -> int:
    parser = Parser("convert export", "Write a Hugging Face model folder, every byte verified.")
    parser.add_argument("source", help="model folder, hub id, or the output folder of a run")
    parser.add_argument("target", help="folder to write; it must not exist yet, or be empty")
    parser.add_argument(
        "--dtype",
        choices=["keep", "float32", "bfloat16"],
        help="of the weights written; keep: as in the folder that was read, or that the run began with (default: keep, "
        "or export.dtype of a run)",
    )
    parser.add_argument(
        "--step",
        type=int,
        help="of a run: which of its checkpoints (default: its best, if it has exported that, or the newest)",
    )
    parser.add_argument("--max-shard-gb", type=float, help="split into files of at most this many GB (10^9 bytes)")
    options = parser.parse_args(argv)
    if options.max_shard_gb is not None and not 0 < options.max_shard_gb < 1e6:
        raise UserError(f"--max-shard-gb {options.max_shard_gb}: a number above zero is wanted")
    quiet_libraries()

    from dpo_jax.hf.checkpoint import load_hf, save_hf
    from dpo_jax.run.kept import export_kept, is_run

    limit = None if options.max_shard_gb is None else max(1, round(options.max_shard_gb * 1e9))
    source, target, said = Path(options.source), Path(options.target), ""
    if is_run(source):
        step = export_kept(source, target, step=options.step, dtype=options.dtype, max_shard_bytes=limit)
        said = f", the model after step {step}"
    elif options.step is not None:
        raise UserError(f"--step {options.step}: {options.source} is not the output folder of a run; leave it out")
    else:
        dtype = options.dtype or "keep"
        save_hf(load_hf(options.source), target, options.source, dtype=dtype, max_shard_bytes=limit)
    print(f"wrote and verified {target}{said}")
    return 0


def _merge(argv: Sequence[str]) -> int:
    parser = Parser(
        "convert merge",
        "Write a model with an adapter merged into its weights: added in float32, and rounded once.",
    )
    parser.add_argument("base", help="model folder, or hub id")
    parser.add_argument("adapter", help="folder of a PEFT adapter, or hub id")
    parser.add_argument("target", help="folder to write; it must not exist yet, or be empty")
    parser.add_argument(
        "--dtype",
        choices=["keep", "float32", "bfloat16"],
        default="keep",
        help="of the weights written; keep: as the base has them (default)",
    )
    options = parser.parse_args(argv)
    quiet_libraries()

    from dpo_jax.hf.merge import merge

    drift = merge(options.base, options.adapter, options.target, dtype=options.dtype)
    print(f"wrote and verified {options.target}: {drift}")
    return 0


def _check(argv: Sequence[str]) -> int:
    parser = Parser(
        "convert check",
        "Load a folder, export it, and compare every tensor, every file and, with PyTorch, the logits. "
        "Exit code 1 if anything differs.",
    )
    parser.add_argument("folder", help="model folder, or hub id; or that of an adapter, which names its base")
    parser.add_argument(
        "--adapter", metavar="FOLDER", help="check the model with this PEFT adapter: merged, and in PEFT itself"
    )
    parser.add_argument("--keep", metavar="TARGET", help="folder to leave the export in (default: a temporary folder)")
    parser.add_argument("--no-torch", dest="torch", action="store_false", help="compare tensors and files only")
    options = parser.parse_args(argv)
    quiet_libraries()

    from dpo_jax.hf.adapted import adapted
    from dpo_jax.hf.verify import check, check_adapter

    model = adapted(options.folder, options.adapter)
    if model.adapter is None:
        report = check(model.base, keep=options.keep, torch=options.torch, say=print)
        what = "the original, dequantised" if report.quantised else "the original"
        print(f"the export is {what}" if report.ok else f"the export is NOT {what}")
        return 0 if report.ok else 1
    if model.line:
        print(model.line)
    report = check_adapter(model.base, model.adapter, keep=options.keep, torch=options.torch, say=print)
    print("the merged model is the base with the adapter" if report.ok else "the merged model is NOT the base with it")
    return 0 if report.ok else 1


def _push(argv: Sequence[str]) -> int:
    parser = Parser("convert push", "Upload a model folder to the hub, as a private repository unless told otherwise.")
    parser.add_argument("folder", help="model folder, such as an export")
    parser.add_argument(
        "repo_id",
        metavar="REPO_ID",
        help="OWNER/NAME on the hub, which is made if it does not exist; or gs://BUCKET/PATH or s3://BUCKET/PATH",
    )
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    parser.add_argument("--revision", help="branch to upload to (default: main)")
    options = parser.parse_args(argv)
    quiet_libraries()

    from dpo_jax.hf.push import push

    print(push(options.folder, options.repo_id, private=not options.public, revision=options.revision))
    return 0


def _config(argv: Sequence[str]) -> int:
    parser = Parser(
        "convert config",
        "Rewrite a config of TRL, Axolotl, LLaMA-Factory, torchtune or the alignment handbook as one of ours: a YAML "
        "file that says of each line where it came from and what differs, and of each key that was left out why.",
    )
    parser.add_argument(
        "file", help="YAML or JSON; a Python script or notebook that calls TRL; or a shell script with its command"
    )
    parser.add_argument(
        "settings", nargs="*", metavar="section.key=value", help="settings of ours, in place of those of the file"
    )
    parser.add_argument("--devices", type=int, metavar="N", help="GPUs that it ran on; a step's batch is that of all")
    parser.add_argument("--method", choices=METHODS, help="what it trains, where the file does not say")
    parser.add_argument("--output", metavar="FILE", help="file to write, which must not exist yet (default: print)")
    options = parser.parse_intermixed_args(argv)
    if options.devices is not None and options.devices < 1:
        raise UserError(f"--devices {options.devices}: a whole number above zero is wanted")

    from dpo_jax.config.bridge.written import rewritten
    from dpo_jax.settings import GivenSettings

    overrides = GivenSettings()
    for setting in options.settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"{short(setting)}: settings behind the file are written section.key=value")
        overrides.override(key, value)
    target = None if options.output is None else Path(options.output)
    if target is not None and os.path.lexists(target):
        raise UserError(f"--output {short(str(target))}: is there already; name another file")
    text, asked = rewritten(options.file, overrides, method=options.method, devices=options.devices)
    if target is None:
        print(text, end="")
    else:
        write_whole(target, text)
        print(f"wrote {printable(str(target))}")
    for line in asked:
        print(f"asked: {printable(redacted(line))}", file=sys.stderr)
    return 0


ACTIONS: dict[str, Callable[[Sequence[str]], int]] = {
    "export": _export,
    "merge": _merge,
    "check": _check,
    "push": _push,
    "config": _config,
}


@command
def main(argv: Sequence[str]) -> int:
    """The command."""
    parser = Parser(
        "convert", "Read, write, compare and upload Hugging Face model folders, and rewrite configs; see ACTION --help."
    )
    parser.add_argument(
        "action",
        choices=ACTIONS,
        metavar="ACTION",
        help="export SOURCE TARGET: write a folder again, verified; merge BASE ADAPTER TARGET: write a model with an "
        "adapter in it; check FOLDER: compare a folder with its export; "
        "push FOLDER REPO_ID: upload a folder; config FILE: rewrite another trainer's config as one of ours",
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="of the action")
    options = parser.parse_args(argv)
    return ACTIONS[options.action](options.arguments)


if __name__ == "__main__":
    sys.exit(main())
