"""`python -m dpo_jax.winrate MODEL BASE --prompts FILE --judge ...`: how often a model's answers beat another's.

Both models answer the same prompts; each judge compares the answers, in both orders. Answers, verdicts and what a
server or a person said are kept in the output folder as they come, and the same command goes on from there.
"""

import argparse
import contextlib
import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_jax.config.command import Parser, command, quiet_libraries
from dpo_jax.config.judges import add_as_chat, add_judges, judges_of
from dpo_jax.errors import COMMAND_LINE, UserError, printable
from dpo_jax.evaluation.judges import settings as judges
from dpo_jax.files import digest_of, write_whole

if TYPE_CHECKING:
    from dpo_jax.evaluation.contests import Answering
    from dpo_jax.evaluation.judging import Verdict
    from dpo_jax.evaluation.winrate import Asked, Question
    from dpo_jax.hf.adapted import Adapted

GIVEN = ("chosen", "rejected")
"""In place of a model: the answers of a file of preferences."""


class Contender(NamedTuple):
    """One of both that are compared: a model, or answers that a file of preferences has."""

    name: str
    model: "Adapted | None" = None
    answers: list[str] | None = None


@command
def main(argv: Sequence[str]) -> int:
    """Read the arguments, then compare."""
    options = _options(argv)
    quiet_libraries()
    from dpo_jax.evaluation.judges.opening import check_judge
    from dpo_jax.evaluation.winrate import read_comparable
    from dpo_jax.run import compile_cache

    asked, given = read_comparable(options.prompts, as_chat=options.as_chat)
    asked = asked[: options.max_samples]
    sides = [_side(name, adapter, given, options) for name, adapter in _named(options)]
    for settings in options.judges:
        _check_rule(settings, asked, options.prompts)
        check_judge(settings)
    compile_cache.use(compile_cache.AUTO)
    folder = _folder(options, asked, sides)
    found = compare(options, asked, sides, folder)
    write_whole(folder / "summary.json", json.dumps(found, indent=2) + "\n")
    print(json.dumps(found) if options.json else "\n".join(_lines(found, folder)))
    return 0


def compare(
    options: argparse.Namespace, asked: "Sequence[Asked | Question]", sides: Sequence[Contender], folder: Path
) -> dict[str, Any]:
    """The answers, the verdicts of each judge, and what they add up to, as plain JSON."""
    from dpo_jax.evaluation.contests import answered, contests_of, judged, said_of
    from dpo_jax.evaluation.judges.endpoint import EndpointJudge
    from dpo_jax.evaluation.judges.opening import open_judge
    from dpo_jax.evaluation.ledger import Ledger
    from dpo_jax.evaluation.statistics import agreement

    texts = []
    for number, side in enumerate(sides, 1):
        if side.answers is not None:
            texts.append(side.answers[: len(asked)])
            continue
        _say(options, f"{side.name}: answering {len(asked):,} prompts")
        with Ledger(folder / f"answers-{number}.jsonl") as ledger:
            texts.append(answered(asked, ledger, lambda side=side: _answering(side, options, asked)))
    contests = contests_of(asked, *texts)
    verdicts: dict[str, list[Verdict]] = {}
    rows: list[dict[str, Any]] = []
    for number, settings in enumerate(options.judges, 1):
        _say(options, f"{printable(settings.name)}: judging")
        judge = open_judge(settings, folder=folder / f"judge-{number}")
        with Ledger(folder / f"judge-{number}" / "verdicts.jsonl") as ledger:
            verdicts[judge.name] = judged(judge, contests, ledger)
        spent = judge.spent if isinstance(judge, EndpointJudge) else {}
        rows.append({"judge": judge.name, **said_of(contests, verdicts[judge.name]).numbers, **spent})
    pairs = [
        {"judges": [one, other], **agreement(verdicts[one], verdicts[other]).numbers}
        for one, other in itertools.combinations(verdicts, 2)
    ]
    return {"model": sides[0].name, "base": sides[1].name, "prompts": len(asked), "judges": rows, "agreement": pairs}


# ---------------------------------------------------------------------------------------------- arguments


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("winrate")
    parser.add_argument("model", metavar="MODEL", help="folder of a model, an adapter or a run; a hub id; or `chosen`")
    parser.add_argument("base", metavar="BASE", help="the same of what it is compared with; or `chosen`, `rejected`")
    parser.add_argument("--adapter", metavar="FOLDER", help="PEFT adapter of MODEL")
    parser.add_argument("--base-adapter", metavar="FOLDER", help="PEFT adapter of BASE")
    parser.add_argument("--prompts", metavar="FILE", required=True, help='rows of {"prompt"[, "good"]}, or preferences')
    add_as_chat(parser)
    parser.add_argument("--max-samples", type=int, metavar="N", help="only the first N prompts")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, which is greedy, unless given")
    parser.add_argument("--seed", type=int, default=0, help="decides what is drawn (default 0)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="prompts at a time (default 16)")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    parser.add_argument("--output", metavar="FOLDER", help="where all is kept (default: a folder below winrate/)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    add_judges(parser)
    options = parser.parse_args(list(argv))
    options.judges = judges_of(options)
    if not options.judges:
        raise UserError(f"{COMMAND_LINE}: name who judges, with --judge: {judges.KINDS}")
    for name, least in (("max_samples", 1), ("max_new_tokens", 1), ("batch_size", 1), ("temperature", 0), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and not least <= value < 2**32:
            raise UserError(f"{COMMAND_LINE}: --{name.replace('_', '-')} {value}: must be at least {least}")
    return options


def _named(options: argparse.Namespace) -> list[tuple[str, str | None]]:
    return [(options.model, options.adapter), (options.base, options.base_adapter)]


def _side(name: str, adapter: str | None, given: Mapping[str, list[str]], options: argparse.Namespace) -> Contender:
    """What is meant by MODEL or BASE, looked at without its weights."""
    from dpo_jax.hf.adapted import adapted
    from dpo_jax.hf.configs import read_spec
    from dpo_jax.hf.tensors import SIDE_FILES, local_folder
    from dpo_jax.run.output import ADAPTER, MODEL

    if name in GIVEN:
        if name not in given:
            raise UserError(
                f"{COMMAND_LINE}: {name}: {options.prompts} has no such answers; give a file of preferences"
            )
        if adapter is not None:
            raise UserError(f"{COMMAND_LINE}: {name} are answers of a file, which take no adapter; leave it out")
        return Contender(name, answers=given[name])
    inner = [Path(name).expanduser() / part for part in (MODEL, ADAPTER)]
    run = next((str(path) for path in inner if path.is_dir() and not (path.parent / "config.json").exists()), name)
    model = adapted(run, adapter)
    if model.line:
        print(model.line, file=sys.stderr)
    read_spec(local_folder(model.base, SIDE_FILES), scalar_head=False)
    return Contender(name if adapter is None else f"{name} with {adapter}", model)


def _check_rule(settings: judges.JudgeSettings, asked: "Sequence[Asked | Question]", file: str) -> None:
    if settings.name == judges.RULE and any(not hasattr(item, "good") for item in asked):
        raise UserError(
            f'{COMMAND_LINE}: --judge rule: {file} does not say what is good; write rows of {{"prompt", "good"}}'
        )


def _folder(options: argparse.Namespace, asked: "Sequence[Asked | Question]", sides: Sequence[Contender]) -> Path:
    """The output folder, new or of this very comparison."""
    from dpo_jax.hf.tensors import local_folder, stamps
    from dpo_jax.run.sources import ADAPTER_FILES

    files = [
        [
            *(stamps(local_folder(side.model.base))),
            *(stamps(side.model.adapter, ADAPTER_FILES) if side.model.adapter else ()),
        ]
        if side.model
        else digest_of(json.dumps(side.answers))
        for side in sides
    ]
    decoding = [options.max_new_tokens, options.temperature, options.seed, options.dtype, options.batch_size]
    names = [settings.model_dump(include={"name", "template", "model", "body", "seed"}) for settings in options.judges]
    prompts = digest_of(
        json.dumps([[item.prompt, getattr(getattr(item, "good", None), "pattern", None)] for item in asked])
    )
    what = {"model": sides[0].name, "base": sides[1].name, "files": files, "prompts": prompts, "decoding": decoding}
    identity = json.dumps({**what, "judges": names}, indent=2) + "\n"
    short = "-".join(Path(side.name).name or "model" for side in sides)
    default = Path("winrate") / f"{printable(short)[:80]}-{digest_of(identity)[:8]}"
    folder = default if options.output is None else Path(options.output).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "comparison.json"
    with contextlib.suppress(FileNotFoundError):
        if file.read_text(encoding="utf-8", errors="replace") != identity:
            raise UserError(f"{COMMAND_LINE}: --output {folder}: is of another comparison; name a new folder")
        return folder
    if any(folder.iterdir()):
        raise UserError(f"{COMMAND_LINE}: --output {folder}: holds other files; name a new folder")
    write_whole(file, identity)
    return folder


def _answering(side: Contender, options: argparse.Namespace, asked: "Sequence[Asked | Question]") -> "Answering":
    from dpo_jax.evaluation.contests import open_answering
    from dpo_jax.evaluation.winrate import texts_note

    assert side.model is not None
    how = {"dtype": options.dtype, "seed": options.seed, "batch_size": options.batch_size}
    new, temperature = options.max_new_tokens, options.temperature
    opened = open_answering(side.model.base, side.model.adapter, max_new_tokens=new, temperature=temperature, **how)
    if note := texts_note(asked, opened.coder.tokenizer, "--as-chat"):
        _say(options, note)
    return opened


# ---------------------------------------------------------------------------------------------- what is shown


def _say(options: argparse.Namespace, line: str) -> None:
    if not options.json:
        print(line, file=sys.stderr, flush=True)


def _lines(found: Mapping[str, Any], folder: Path) -> list[str]:
    """The table: a row for each judge, what is to be known beside it, and where everything is."""
    width = max(len("judge"), *(len(printable(row["judge"])) for row in found["judges"]))
    lines = [f"{found['model']} against {found['base']}: {found['prompts']:,} prompts", ""]
    heading = ("win rate", "95 %", "wins", "ties", "losses", "of decided", "p", "at equal length", "position bias")
    form = "  {:>8}  {:>13}  {:>5}  {:>5}  {:>6}  {:>10}  {:>7}  {:>15}  {:>13}"
    lines.append("judge".ljust(width) + form.format(*heading))
    lines += [printable(row["judge"]).ljust(width) + form.format(*_cells(row)) for row in found["judges"]]
    one, other = (found["judges"][0][f"length_{place}"] for place in ("first", "second"))
    if one is not None and other is not None:
        lines += ["", f"mean length of an answer: {one:.0f} characters, and {other:.0f}"]
    lines += [
        f"{row['judge']}: no verdict on {row['unjudged']:,} of {found['prompts']:,} contests; they are left out"
        for row in found["judges"]
        if row["unjudged"]
    ]
    lines += [
        f"{' and '.join(pair['judges'])} agree on {_percent(pair['share'])} (kappa {_number(pair['kappa'])})"
        for pair in found["agreement"]
    ]
    return [*map(printable, lines), f"everything is in {printable(str(folder))}"]


def _cells(row: Mapping[str, Any]) -> list[str]:
    ends = f"{_percent(row['win_rate_low'])} - {_percent(row['win_rate_high'])}"
    counts = [f"{row[name]:,}" for name in ("wins", "ties", "losses")]
    rest = (_at_equal_length(row), _number(row["position_bias"]))
    return [_percent(row["win_rate"]), ends, *counts, _percent(row["decided_win_rate"]), f"{row['p_value']:.2g}", *rest]


def _at_equal_length(row: Mapping[str, Any]) -> str:
    """With its interval, which is wide where few answers are of about the same length."""
    rate, *ends = (row[f"length_controlled_{name}"] for name in ("win_rate", "low", "high"))
    known = rate is not None and all(end is not None and math.isfinite(end) for end in ends)
    return f"{_percent(rate)} ({ends[0]:.0%}-{ends[1]:.0%})" if known else _percent(rate)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
