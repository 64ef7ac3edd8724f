"""Show what a run would train on: decoded rows in colour, what is scored, what was cut, counts and lengths.

    python -m dpo_jax.preview CONFIG.yaml ... [section.key=value ...] [--pairs N]

Loads the tokenizer and the data, never the model. Without a terminal the same is written as plain text, where control
tokens stand in double brackets (the same letters without brackets are plain text), what is read and not scored between
[not scored: and ], and what was cut between [cut: and ].
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_jax.config import command as commands
from dpo_jax.config import run as config
from dpo_jax.errors import UserError, short

if TYPE_CHECKING:
    from dpo_jax.data.encoded import Encoded
    from dpo_jax.data.split import DataSplit

PAIRS = 3
SHOWN = ("model", "data")
"""Sections of settings that a preview reads."""


@commands.command
def main(argv: Sequence[str]) -> int:
    """Print the report, the lengths, and some pairs or completions of the training data and of the held-out data."""
    pairs, rest = _pairs(argv)
    run = config.load(
        rest, "preview", options=[f"  --pairs N  how many pairs to show (default {PAIRS})"], sections=SHOWN
    )
    from rich.text import Text

    from dpo_jax.data.encode import collect
    from dpo_jax.data.showing import console_for, show, show_pairs, write
    from dpo_jax.data.split import set_name, shared_line
    from dpo_jax.hf.tensors import SIDE_FILES
    from dpo_jax.hf.tokenizer import load_tokenizer
    from dpo_jax.run import output
    from dpo_jax.run.sources import find

    tokenizer = load_tokenizer(find("model", run.model.path, run.model.revision, SIDE_FILES), run.data.template)
    date = output.template_date(Path(run.output))
    console = console_for(sys.stdout)
    train, report = collect(run.data.train, tokenizer, run.data, run.data.cache, first=run.data.first, date=date)
    parts, reports = _parts(run, train), [report]
    show(train if parts is None else parts.train, report, tokenizer, console, pairs=pairs, name="data.train")
    if parts is not None:
        write(console, Text("\ndata.eval_fraction", "bold"))
        write(console, Text(parts.line()))
        show_pairs(parts.held_out, report, tokenizer, console, pairs=pairs)
    for name, sources in run.data.eval_sets.items():
        encoded, report = collect(sources, tokenizer, run.data, run.data.cache, date=date)
        show(encoded, report, tokenizer, console, pairs=pairs, name=set_name(name))
        if line := shared_line(set_name(name), encoded, train):
            write(console, Text(f"\n{line}", "yellow"))
        reports.append(report)
    for report in reports:
        report.check(run.data.max_bad_fraction)
    return 0


def _parts(run: config.Run, train: "Encoded") -> "DataSplit | None":
    """The training data in two, where a share of it is held out."""
    from dpo_jax.data.split import split

    wanted = run.data.eval_fraction is not None and train.num_pairs > 0
    return split(train, run.data.eval_fraction or 0.0, run.seed) if wanted else None


def _pairs(argv: Sequence[str]) -> tuple[int, list[str]]:
    """Take `--pairs N` (or `--pairs=N`) out of the arguments."""
    rest, count = list(argv), PAIRS
    for index, word in enumerate(rest):
        flag, equals, value = word.partition("=")
        if flag == "--pairs":
            given = value if equals else "".join(rest[index + 1 : index + 2])
            if not given.isdecimal():
                raise UserError(f"--pairs {short(given)}: not a whole number; write --pairs {PAIRS}")
            return int(given), rest[:index] + rest[index + (1 if equals else 2) :]
    return count, rest


if __name__ == "__main__":
    sys.exit(main())
