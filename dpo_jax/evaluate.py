"""`python -m dpo_jax.evaluate MODEL PAIRS --reference FOLDER`: how often a model prefers what people preferred.

A reward model's folder needs no reference.
"""

import json
import math
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from dpo_jax.config import run as config
from dpo_jax.settings import UserError

SHOWN = (
    ("rewards/accuracies", "preference accuracy", "{:.1%}"),
    ("rewards/margins", "reward margin", "{:+.4f}"),
    ("logps/accuracies", "chosen more likely", "{:.1%}"),
    ("loss", "loss", "{:.4f}"),
    ("kl", "kl", "{:.5f}"),
)
"""What is printed: metric, label, format."""


@config.command
def main(argv: Sequence[str]) -> int:
    """Read the arguments, then measure."""
    options = _options(argv)
    config.quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="dpo_jax-") as folder:
        found, pairs = evaluate(_run(options, folder), quiet=options.json)
    print(json.dumps({"pairs": pairs, **found}) if options.json else "\n".join(_lines(found, pairs)))
    return 0


def evaluate(run: config.Run, quiet: bool = False) -> tuple[dict[str, float], int]:
    """Metrics of `run.model` against `run.reference` over the pairs of `run.data.train`, and how many these are."""
    from dpo_jax.hf.tokenizer import load_tokenizer
    from dpo_jax.run import compile_cache, models
    from dpo_jax.run import folder as stages
    from dpo_jax.run import sources as exchange
    from dpo_jax.run import trainer as loop

    compile_cache.use(run.model.compile_cache)
    folder = Path(run.output)
    mesh = models.make_mesh(run)
    sources = exchange.find_models(run, {})
    tokenizer = load_tokenizer(sources.policy, run.data.template)
    data = stages.load_data(run, tokenizer, folder, _silent if quiet else print)
    models.check_models(run, sources)
    policy = models.load_model(sources.policy, mesh, scalar_head=run.objective.trains_reward_model)
    problem = models.make_problem(run, policy, mesh)
    with stages.make_journal(run, folder, 1, None, process=int(quiet)) as journal:
        reference = stages.make_reference(run, sources, policy, problem, data, mesh, journal)
        held_out = stages.Data(data.train, data.train, data.dropped, data.report)
        logps = replace(reference, held_out=reference.train)
        measure = loop.Evaluator(run, problem, held_out, logps, tokenizer, mesh, None)
        journal.phase("evaluating")
        return measure(policy.params, folder, 0), data.train.num_pairs


def _options(argv: Sequence[str]) -> Namespace:
    parser = config.Parser(
        "evaluate", "Preference accuracy and reward margin of a model against a reference, or of a reward model."
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder (or hub id) of the model")
    parser.add_argument("pairs", metavar="PAIRS", nargs="+", help="file, folder or data set of preference pairs")
    parser.add_argument("--reference", metavar="FOLDER", help="what a language model is measured against")
    parser.add_argument("--beta", type=float, help="of a language model's rewards (default 0.1)")
    parser.add_argument("--max-length", type=int, default=1024, help="most tokens of a prompt and one completion")
    parser.add_argument("--batch", type=int, default=32, help="pairs at a time (default 32)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    return parser.parse_args(list(argv))


def _run(options: Namespace, folder: str) -> config.Run:
    """The settings that the stages take; what they write goes to the folder."""
    scores = _is_reward_model(options.model)
    if scores and (options.reference is not None or options.beta is not None):
        raise UserError("command line: a reward model has scores of its own; leave --reference and --beta out")
    if not scores and options.reference is None:
        raise UserError("command line: --reference is missing; name the folder that MODEL is measured against")
    objective = {"name": "reward"} if scores else {"beta": 0.1 if options.beta is None else options.beta}
    try:
        return config.Run.model_validate(
            {
                "model": {"path": options.model},
                "reference": {} if scores else {"path": options.reference},
                "data": {"train": tuple(options.pairs), "max_length": options.max_length},
                "batch": {"pairs": options.batch},
                "objective": objective,
                "log": {"tensorboard": False},
                "output": folder,
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "arguments"
        raise UserError(f"command line: {key}: {first['msg']}") from error


def _is_reward_model(path: str) -> bool:
    from dpo_jax.hf.configs import read_spec
    from dpo_jax.hf.tensors import local_folder

    return read_spec(local_folder(path)).scalar_head


def _lines(found: Mapping[str, float], pairs: int) -> list[str]:
    """The table; the accuracy with its standard error."""
    lines = [f"{pairs:,} pairs"]
    for name, label, form in SHOWN:
        if name not in found:
            continue
        share = found[name]
        error = f" +- {math.sqrt(share * (1 - share) / pairs):.1%}" if name.endswith("accuracies") else ""
        lines.append(f"{label:<20} {form.format(share)}{error}")
    return lines


def _silent(_: str) -> None:
    """Print nothing."""


if __name__ == "__main__":
    sys.exit(main())
