"""`python -m dpo_jax.evaluate MODEL PAIRS --reference FOLDER`: how often a model prefers what people preferred.

A reward model's folder needs no reference. Without one, what a language model alone says is measured: how often it
gives the chosen answer the higher probability.
"""

import dataclasses
import json
import math
import re
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_jax.config import command as commands
from dpo_jax.config.judges import add_judges, judges_of
from dpo_jax.config.sections import sections_of
from dpo_jax.data.settings import BatchSettings, DataSettings
from dpo_jax.errors import COMMAND_LINE, UserError, printable, redacted
from dpo_jax.evaluation.measured import Counted, other_objective, said_objective, trained_with
from dpo_jax.model.settings import MeshSettings, ModelSettings
from dpo_jax.objectives import terms
from dpo_jax.objectives.settings import ObjectiveSettings
from dpo_jax.objectives.table import OBJECTIVES
from dpo_jax.reporting.metrics import EVALUATED, as_labelled, shown
from dpo_jax.reporting.settings import LogSettings
from dpo_jax.training.settings import ReferenceSettings

if TYPE_CHECKING:
    from dpo_jax.hf.adapted import Adapted

OF_ONE_MODEL = ("logps/", "logits/", "lengths/", "entropy", "mean_token_accuracy")
"""How the names of metrics begin that need no reference."""
WIN_RATE = "win_rate"
ASKED = {
    "reward_margin": "rewards/margins",
    "preference_accuracy": "rewards/accuracies",
    "win_rate": WIN_RATE,
    "loss": "loss",
    "kl": "kl",
}
"""What --metrics takes, and what it is called among the metrics; an accuracy without a reference is the model's own."""


@commands.command
def main(argv: Sequence[str]) -> int:
    """Read the arguments, then measure."""
    options = _options(argv)
    commands.quiet_libraries()
    model = _adapted(options)
    _check_models(options)
    with tempfile.TemporaryDirectory(prefix="dpo_jax-") as folder:
        blocks = _settings(options)
        how = {"quiet": options.json, "adapter": model.adapter, "called": _file_named(options.pairs)}
        found, counted = evaluate(blocks, Path(folder), **how)
    added = _leaves_reference_out(options)
    if options.metrics is not None:
        found = _chosen_metrics(options, found, model)
    elif added:
        found = {name: value for name, value in found.items() if name.startswith(OF_ONE_MODEL)}
    of = said_objective(blocks.objective) if any(map(_follows_objective, found)) else None
    if options.json:
        print(json.dumps({**counted.to_json(), **({"objective": of} if of else {}), **found}))
        return 0
    lines = _lines(found, counted, of) if options.metrics is None else _lines_of_chosen(found, counted, of)
    if added and options.metrics is None:
        lines.append(REFERENCE_GIVES)
    trained = trained_with(_folder_of(model)) if of or added else None
    print("\n".join([*lines, *other_objective(trained, blocks.objective, alone=options.reference is None)]))
    return 0


class EvaluatedBlocks(NamedTuple):
    """The blocks of settings that an evaluation needs."""

    model: ModelSettings
    reference: ReferenceSettings
    data: DataSettings
    batch: BatchSettings
    objective: ObjectiveSettings


def evaluate(
    settings: EvaluatedBlocks, folder: Path, quiet: bool = False, adapter: Path | None = None, called: str = "PAIRS"
) -> tuple[dict[str, float], Counted]:
    """Metrics of a model (with an adapter) against a reference over pairs, and how many these are.

    The folder is for what is cached; the pairs are `called` so where it is said what is being done.
    """
    from dpo_jax.hf.configs import read_spec
    from dpo_jax.hf.tensors import SIDE_FILES
    from dpo_jax.hf.tokenizer import load_tokenizer
    from dpo_jax.model.weights import Weights
    from dpo_jax.reporting.journal import Journal
    from dpo_jax.run import compile_cache, models
    from dpo_jax.run.attention_choice import attention_for
    from dpo_jax.run.data import Packing, check_tokens, print_for_now, read_data
    from dpo_jax.run.evaluator import Evaluator
    from dpo_jax.run.reference import ReferenceScorer, make_reference
    from dpo_jax.run.sources import find_models

    model, reference, rows, batch, wanted = settings
    scalar_head, length = wanted.trains_reward_model, rows.max_length
    compile_cache.use(model.compile_cache)
    mesh = models.make_mesh(MeshSettings(), model)
    checked = {"model": model, "reference": reference, "max_length": length, "scalar_head": scalar_head}
    models.check_models(find_models(model, reference, {}, SIDE_FILES), mesh, **checked)  # before weights are fetched
    sources = find_models(model, reference, {})
    if adapter is not None:  # the same folder without it is another model
        sources = dataclasses.replace(sources, reference_is_policy=False)
    tokenizer = load_tokenizer(sources.policy, rows.template)
    read = read_data(rows, tokenizer, folder, _silent if quiet else print_for_now, called=called)
    data, singles = read.examples(wanted.terms, length), int(read.train.single.sum())
    counted = Counted(data.train.num_pairs, terms.data_of(wanted.terms), read.train.num_pairs - singles, singles)
    check_tokens(data, read_spec(sources.policy, scalar_head=scalar_head).vocab_size, tokenizer)
    policy = models.load_model(sources.policy, mesh, scalar_head=scalar_head, adapter=adapter)
    weights = Weights(policy.params)
    attention = attention_for(model, policy.spec, mesh, length, _silent if quiet else print)
    model = model.model_copy(update={"attention": attention})
    objective = models.make_objective(model, wanted.terms, policy.spec, weights, mesh)
    packing = Packing.of(batch, length, wanted.terms, mesh)
    with Journal(folder, 1, LogSettings(tensorboard=False), process=int(quiet)) as journal:
        scorer = ReferenceScorer(mesh, packing, folder, journal)
        logps = make_reference(reference, sources, weights, objective, data, scorer).train
        measure = Evaluator(objective, mesh, held_out={"": packing.sweep(data.train, policy.spec, logps)})
        journal.phase("evaluating")
        return measure(weights, folder, 0), counted


def _file_named(pairs: Sequence[str]) -> str:
    """What to call the pairs where it is said what is being done: by the file's name, if there is one alone."""
    (name, *others) = pairs
    return "PAIRS" if others else printable(redacted(Path(name).name if Path(name).exists() else name))


def _chosen_metrics(options: Namespace, found: Mapping[str, float], model: "Adapted") -> dict[str, float | None]:
    """The metrics of --metrics, under the names that they were asked for by."""
    alone = options.reference is None and not _is_reward_model(options.model)
    known = {**ASKED, "preference_accuracy": "logps/accuracies"} if alone else ASKED
    chosen: dict[str, float | None] = {}
    for name in options.metrics:
        chosen |= _win_rate(options, model) if name == WIN_RATE else {name: found[known[name]]}
    return chosen


def _win_rate(options: Namespace, model: "Adapted") -> dict[str, float | None]:
    """How often the model's answers to the prompts of the pairs are preferred to the chosen answers."""
    from dpo_jax.evaluation.contests import answered, contests_of, open_answering, said_of, verdicts_of
    from dpo_jax.evaluation.judges.opening import open_judge
    from dpo_jax.evaluation.ledger import Ledger
    from dpo_jax.evaluation.winrate import read_comparable

    asked, given = read_comparable(options.pairs[0])
    asked, chosen = asked[: options.max_samples], given["chosen"][: options.max_samples]
    new = options.max_new_tokens
    texts = answered(asked, Ledger(None), lambda: open_answering(model.base, model.adapter, max_new_tokens=new))
    contests = contests_of(asked, texts, chosen)
    numbers = said_of(contests, verdicts_of(open_judge(options.judges[0]), contests)).numbers
    return {name: numbers[name] for name in (WIN_RATE, "win_rate_low", "win_rate_high", "tie_rate", "unjudged")}


def _check_metrics(options: Namespace) -> None:
    """Refuse metrics that cannot be measured, before anything is loaded.

    Raises:
      UserError: names the metric and what it needs.
    """
    options.judges = judges_of(options)
    options.metrics = None if options.metrics is None else options.metrics.split(",")
    wanted = options.metrics or []
    if unknown := [name for name in wanted if name not in ASKED]:
        raise UserError(f"command line: --metrics {printable(unknown[0])}: choose some of {','.join(ASKED)}")
    if options.max_samples is not None and options.max_samples < 1:
        raise UserError(f"command line: --max-samples {options.max_samples}: must be at least 1")
    if WIN_RATE not in wanted:
        if options.judges:
            raise UserError("command line: --judge: nothing is judged without --metrics win_rate; leave it out")
    elif len(options.judges) != 1:
        raise UserError("command line: --metrics win_rate: give one --judge, of answers against the chosen ones")
    elif options.judges[0].name == "rule" or len(options.pairs) > 1:
        raise UserError("command line: --metrics win_rate: give one file of pairs, and another judge than the rule")


def _check_models(options: Namespace) -> None:
    """The same of what the models' configs, and the pairs, say."""
    from dpo_jax.evaluation.judges.opening import check_judge
    from dpo_jax.evaluation.winrate import read_comparable

    wanted, scores = options.metrics or [], _is_reward_model(options.model)
    needs = [name for name in wanted if name in ("reward_margin", "loss", "kl")]
    if options.reference is None and not scores and needs:
        raise UserError(f"command line: --metrics {needs[0]}: is measured against a --reference; name one")
    if scores and (strange := [name for name in wanted if name in (WIN_RATE, "kl")]):
        raise UserError(f"command line: --metrics {strange[0]}: is of language models; leave it out")
    if WIN_RATE in wanted:
        if not read_comparable(options.pairs[0])[1]:
            raise UserError(
                f"command line: --metrics win_rate: {options.pairs[0]} has no chosen answers to compare with"
            )
        check_judge(options.judges[0])


def _adapted(options: Namespace) -> "Adapted":
    """The model and its adapter; `options.model` is then the base."""
    from dpo_jax.hf.adapted import adapted

    model = adapted(options.model, options.adapter)
    if model.line:
        print(model.line, file=sys.stderr)
    options.model = model.base
    return model


def _options(argv: Sequence[str]) -> Namespace:
    parser = commands.Parser("evaluate", settings=True)
    parser.add_argument(
        "model", metavar="MODEL", help="Hugging Face folder (or hub id) of the model, or of an adapter of one"
    )
    parser.add_argument(
        "pairs",
        metavar="PAIRS",
        nargs="+",
        help="file, folder or data set of preference pairs; and settings of a run that are of data, batch or model, "
        "such as data.columns={prompt: question}",
    )
    parser.add_argument("--adapter", metavar="FOLDER", help="PEFT adapter of the model: a folder, or hub id")
    parser.add_argument("--reference", metavar="FOLDER", help="what a language model's rewards are measured against")
    parser.add_argument("--beta", type=float, help="of a language model's rewards (default 0.1)")
    parser.add_argument("--max-length", type=int, default=1024, help="most tokens of a prompt and one completion")
    parser.add_argument("--batch", type=int, default=32, help="pairs at a time (default 32)")
    parser.add_argument("--metrics", metavar="A,B", help=f"only these, in this order: {','.join(ASKED)}")
    parser.add_argument("--max-samples", type=int, metavar="N", help="only the first N pairs")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer of win_rate")
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    add_judges(parser)
    options = parser.parse_intermixed_args(list(argv))  # settings may stand behind options
    options.given = [word for word in options.pairs if _is_setting(word)]
    options.pairs = [word for word in options.pairs if not _is_setting(word)]
    if not options.pairs:
        raise UserError(f"{COMMAND_LINE}: PAIRS: not given: name the pairs to measure on, a file, folder or data set")
    _check_metrics(options)
    return options


OWN = {
    "model.path": "give it as MODEL",
    "data.train": "give it as PAIRS",
    "data.eval": "all of PAIRS is measured; leave it out",
    "data.eval_fraction": "all of PAIRS is measured; leave it out",
    "reference.path": "give it as --reference",
    "objective.beta": "give it as --beta",
}
"""Settings of a run that the arguments of this command are."""


def _is_setting(word: str) -> bool:
    """Whether one of PAIRS is `section.key=value`."""
    return re.match(r"[a-z]+\.[\w.]+=", word) is not None and not Path(word).exists()


def _settings(options: Namespace) -> EvaluatedBlocks:
    """The arguments as blocks of settings."""
    scores = _is_reward_model(options.model)
    if scores and (options.reference is not None or options.beta is not None):
        raise UserError("command line: a reward model has scores of its own; leave --reference and --beta out")
    alone = options.reference is None
    if alone and options.beta is not None and not _is_of_model_alone(options):
        raise UserError("command line: --beta is of rewards, which need a --reference; name one, or leave --beta out")
    arguments = {
        "model.path": options.model,
        "data.train": tuple(options.pairs),
        "data.first": options.max_samples,
        "data.max_length": options.max_length,
        "data.ending": "template" if scores else None,
        "batch.pairs": options.batch,
        **({"reference.mode": "none"} if alone else {"reference.path": options.reference}),
        **_objective(options, scores),
    }
    return EvaluatedBlocks(**sections_of(options.given, arguments, EvaluatedBlocks.__annotations__, OWN))


def _objective(options: Namespace, scores: bool) -> dict[str, Any]:
    """What the arguments say of the objective, where the settings may name one.

    Raises:
      UserError: it compares with a reference, and there is none.
    """
    if scores:
        return {"objective.name": "reward"}
    given = _given(options)
    named = given.get("objective.name")
    known = named if named in terms.names() else "sigmoid"
    takes, alone = terms.takes(known), options.reference is None
    beta = {"objective.beta": options.beta} if options.beta is not None else {}
    if "objective.mixture" in given or not alone:
        return beta
    if "reference_free" in takes:
        return {**beta, "objective.reference_free": True}
    if known in OBJECTIVES and OBJECTIVES[known].reference != "unused":
        raise UserError(f"{COMMAND_LINE}: objective.name={known} compares with a reference; give --reference FOLDER")
    return beta


def _given(options: Namespace) -> dict[str, str]:
    """The settings behind the arguments, as they were written."""
    return dict(word.split("=", 1) for word in options.given)


def _is_of_model_alone(options: Namespace) -> bool:
    """Whether an objective is given that compares with no reference."""
    given = _given(options)
    block = {"name": given.get("objective.name", "sigmoid")}
    if block["name"] not in terms.names():
        return False
    if "reference_free" in terms.takes(block["name"]):
        block |= {"reference_free": given.get("objective.reference_free") == "true"}
    return not any(term.uses_reference for term in terms.make_terms([block]))


def _leaves_reference_out(options: Namespace) -> bool:
    """Whether the objective compares with no reference for want of one, so that its loss and rewards mean little."""
    added = _objective(options, _is_reward_model(options.model))
    return "objective.reference_free" in added and "objective.reference_free" not in _given(options)


def _is_reward_model(path: str) -> bool:
    from dpo_jax.hf.configs import read_spec
    from dpo_jax.hf.tensors import SIDE_FILES, local_folder

    return read_spec(local_folder(path, SIDE_FILES)).scalar_head


REFERENCE_GIVES = (
    "--reference FOLDER gives preference accuracy, reward margin and loss too, measured against that model"
)
"""Said of a language model that was measured alone."""


def _follows_objective(name: str) -> bool:
    """Whether a metric, under its own name or that of --metrics, has its unit from the objective."""
    return name in ("loss", "reward_margin", "rewards/margins")


def _head(counted: Counted, found: Mapping[str, Any], of: str | None, error: str = "") -> str:
    """What was measured on how much, and which objective gives the numbers their meaning."""
    margin = "reward_margin" in found or "rewards/margins" in found
    parts = [name for name, there in (("reward margin", margin), ("loss", "loss" in found)) if there]
    return f"{counted.text()}{error}" + (f"; {' and '.join(parts)} of {of}" if of else "")


def _lines(found: Mapping[str, Any], counted: Counted, of: str | None) -> list[str]:
    """The table; the accuracy with its standard error."""
    lines = [_head(counted, found, of, " (+- is one standard error)")]
    rows = [row for row in as_labelled(EVALUATED, found) if row[0] in found]
    width = max((len(label) for _, label, _ in rows), default=0)
    for name, label, form in rows:
        share, said = found[name], shown(found, name, form)
        has_error = name.endswith("accuracies") and said.endswith("%")
        error = f" +- {math.sqrt(share * (1 - share) / counted.examples):.1%}" if has_error else ""
        lines.append(f"{label:<{max(width, 20)}} {said}{error}")
    return lines


def _lines_of_chosen(found: Mapping[str, float | None], counted: Counted, of: str | None) -> list[str]:
    """The metrics of --metrics, a line each."""
    rows = [f"{name:<20} {'-' if value is None else f'{value:.4f}'}" for name, value in found.items()]
    return [_head(counted, found, of), *rows]


def _folder_of(model: "Adapted") -> Path:
    """Where it may be said how a model was trained."""
    from dpo_jax.hf.tensors import SIDE_FILES, local_folder

    return model.adapter if model.adapter is not None else local_folder(model.base, SIDE_FILES)


def _silent(_: str) -> None:
    """Print nothing."""


if __name__ == "__main__":
    sys.exit(main())
