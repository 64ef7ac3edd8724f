"""`python -m dpo_jax.collect MODEL --prompts FILE --judge NAME --output FOLDER`: preferences out of a model's answers.

A model answers each prompt several times, a judge scores the answers, and the better ones are paired with the worse
ones, for `train`. A command that was stopped, however, goes on when it is given again.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from dpo_jax.config.command import Parser, command, quiet_libraries
from dpo_jax.config.judges import add_as_chat, add_judges, judges_of
from dpo_jax.data.readers import is_named_as_rows
from dpo_jax.errors import UserError
from dpo_jax.evaluation.judges.settings import KINDS, JudgeSettings
from dpo_jax.evaluation.settings import CollectSettings
from dpo_jax.files import locked
from dpo_jax.settings import COMMAND_LINE, allowed

if TYPE_CHECKING:
    from dpo_jax.evaluation.collecting import Writer
    from dpo_jax.evaluation.judging import Judge
    from dpo_jax.evaluation.winrate import Asked, Question
    from dpo_jax.hf.adapted import Adapted


@command
def main(argv: Sequence[str]) -> None:
    """The command."""
    options = _options(argv)
    settings, judge = _settings(options), _judge(options)
    quiet_libraries()
    folder = Path(options.output)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{COMMAND_LINE}: --output {folder}: is a file; name a folder")
    if is_named_as_rows(folder.name) and not folder.exists():
        raise UserError(
            f"{COMMAND_LINE}: --output {folder}: is the name of a file; name a folder, in which pairs.jsonl will be"
        )
    from dpo_jax.evaluation.collecting import collect, facts_of, read_asked
    from dpo_jax.evaluation.judges.opening import check_judge

    asked = read_asked(options.prompts, judge, as_chat=options.as_chat)
    model = _adapted(options)
    check_judge(judge)
    made_by = {
        "model": str(model.base),
        **facts_of(model),
        "dtype": options.dtype,
        "judge": judge.model_dump(mode="json"),
    }
    with locked(folder, f"{COMMAND_LINE}: --output"):
        result = collect(folder, made_by, asked, settings, lambda: _opened(options, model, judge, asked), _say)
    print(json.dumps(result) if options.json else "\n".join(lines(result, folder)))


def lines(result: dict[str, Any], folder: Path) -> list[str]:
    """What came of it, for people."""
    unpaired = f"{result['tied']} whose answers tie and {result['all_the_same']} whose answers are all the same"
    found = [
        f"{result['prompts']} prompts, {result['answers']} answers: {result['repeated']} repeat another, "
        f"{result['cut_off']} were cut off, {result['without_words']} say nothing",
        f"{result['rows']} rows of preferences in {folder / 'pairs.jsonl'}; left out are {unpaired}",
    ]
    if result["unjudged"]:
        found.append(f"{result['unjudged']} answers have no score, since the judge's replies could not be understood")
    if result["mean_score"] is not None:
        found.append(
            f"mean score {result['mean_score']:.3f}, of the best of each prompt {result['mean_best_score']:.3f}"
        )
    return found


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------- arguments


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("collect")
    parser.add_argument("folder", help="model folder, or hub id; or that of an adapter, which names its base")
    parser.add_argument("--prompts", required=True, metavar="FILE", help='a row {"prompt": ...} for each prompt')
    add_as_chat(parser)
    add_judges(parser)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where pairs.jsonl goes, and all answers")
    parser.add_argument("--adapter", metavar="FOLDER", help="PEFT adapter of the model: a folder, or hub id")
    for name, field in CollectSettings.model_fields.items():
        default, text = field.default, f"{field.description} (default {field.default})"
        kind: dict[str, Any] = (
            {"choices": ["best_worst", "ranked", "all"]} if name == "pairs" else {"type": type(default)}
        )
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help=text, **kind)
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="to compute in; auto: float32 on a CPU, bfloat16 elsewhere",
    )
    parser.add_argument("--tensor", type=int, default=1, metavar="N", help="devices that share each weight (default 1)")
    parser.add_argument("--json", action="store_true", help="print what came of it as JSON")
    options = parser.parse_args(argv)
    options.adapter_given = options.adapter
    return options


def _settings(options: argparse.Namespace) -> CollectSettings:
    """How answers are drawn and paired.

    Raises:
      UserError: names the first option that is wrong.
    """
    try:
        return CollectSettings(**{name: getattr(options, name) for name in CollectSettings.model_fields})
    except ValidationError as error:
        detail = error.errors()[0]
        name = str(detail["loc"][0])
        what = allowed(CollectSettings.model_fields[name])
        raise UserError(f"{COMMAND_LINE}: --{name.replace('_', '-')} {detail['input']}: must be {what}") from None


def _judge(options: argparse.Namespace) -> JudgeSettings:
    """The judge.

    Raises:
      UserError: there is not one, or a setting of it is wrong.
    """
    named = judges_of(options)
    if len(named) != 1:
        raise UserError(f"{COMMAND_LINE}: --judge: name one who judges: {KINDS}")
    return named[0]


# ---------------------------------------------------------------------------------------------- loading


def _adapted(options: argparse.Namespace) -> "Adapted":
    from dpo_jax.hf.adapted import adapted

    found = adapted(options.folder, options.adapter)
    if found.line:
        print(found.line, file=sys.stderr)
    return found


def _opened(
    options: argparse.Namespace, model: "Adapted", judge: JudgeSettings, asked: "Sequence[Asked | Question]"
) -> "tuple[Writer, Judge]":
    import jax

    from dpo_jax import sharding
    from dpo_jax.evaluation.collecting import open_writer
    from dpo_jax.evaluation.judges.opening import open_judge
    from dpo_jax.evaluation.winrate import texts_note
    from dpo_jax.run import compile_cache

    compile_cache.use(compile_cache.AUTO)
    mesh = sharding.make_mesh(-1, 1, options.tensor) if jax.device_count() > 1 or options.tensor != 1 else None
    kept = Path(options.output) / "judge"
    writer = open_writer(model.base, dtype=options.dtype, adapter=model.adapter, mesh=mesh)
    if note := texts_note(asked, writer.coder.tokenizer, "--as-chat"):
        _say(note)
    return writer, open_judge(judge, folder=kept, mesh=mesh)


if __name__ == "__main__":
    sys.exit(main())
