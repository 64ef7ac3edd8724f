"""Show what a run would train on: decoded pairs in colour, what is scored, what was cut, counts and lengths.

    python -m dpo_jax.preview CONFIG.yaml ... [section.key=value ...] [--pairs N]

Loads the tokenizer and the data, never the model. Without a terminal the same is written as plain text, where special
tokens stand in double brackets and what was cut between [cut: and ].
"""

import io
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from dpo_jax import config
from dpo_jax.data.encode import collect
from dpo_jax.data.encoded import Encoded
from dpo_jax.data.report import BAD, Report, clean
from dpo_jax.data.templates import special_ids
from dpo_jax.settings import UserError, printable

PAIRS = 3
CHARACTERS = 1600
"""Longest text that is shown of a prompt or a completion; the middle of a longer one is left out, and said so."""

BINS = 8
STYLES = {"prompt": "cyan", "chosen": "green", "rejected": "red", "cut": "dim strike", "special": "reverse"}


@config.command
def main(argv: Sequence[str]) -> int:
    """Print the report, the lengths, and some pairs of the training data and of the held-out data."""
    from dpo_jax.hf.tokenizer import load_tokenizer

    pairs, rest = _pairs(argv)
    run = config.load(rest, "preview")
    tokenizer = load_tokenizer(run.model.path, run.data.template)
    console = console_for(sys.stdout)
    given = {"train": (run.data.train, run.data.first), "eval": (run.data.eval, None)}
    reports = []
    for name, (sources, first) in given.items():
        if sources:
            encoded, report = collect(sources, tokenizer, run.data, run.data.cache, first=first)
            show(encoded, report, tokenizer, console, pairs=pairs, name=f"data.{name}")
            reports.append(report)
    for report in reports:
        report.check(run.data.max_bad_fraction)
    return 0


def _pairs(argv: Sequence[str]) -> tuple[int, list[str]]:
    """Take `--pairs N` (or `--pairs=N`) out of the arguments."""
    rest, count = list(argv), PAIRS
    for index, word in enumerate(rest):
        flag, equals, value = word.partition("=")
        if flag == "--pairs":
            given = value if equals else "".join(rest[index + 1 : index + 2])
            if not given.isdecimal():
                raise UserError(f"--pairs {clean(given)}: not a whole number; write --pairs {PAIRS}")
            return int(given), rest[:index] + rest[index + (1 if equals else 2) :]
    return count, rest


def console_for(stream: Any) -> Console:
    """A console that neither fails on a narrow encoding nor guesses at colours where there is no terminal."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return Console(file=stream, highlight=False, markup=False, emoji=False)


def show(encoded: Encoded, report: Report, tokenizer: Any, console: Console, *, pairs: int, name: str) -> None:
    """Write one data set to the console: report, lengths, pairs."""
    _write(console, Text(name, "bold"))
    for line in report.lines():
        _write(console, Text(line, "yellow" if line.startswith(f"{BAD}:") else ""))
    if not encoded.num_pairs:
        return
    for line in histogram(encoded, "█" if console.encoding.lower().startswith("utf") else "#"):
        _write(console, Text(line))
    legend = [Text(part, STYLES[part]) for part in ("prompt", "chosen", "rejected", "cut", "special")]
    _write(
        console, Text("\ncolours: ") + Text(", ").join(legend) + Text("; every token of chosen and rejected is scored")
    )
    for pair in np.unique(np.linspace(0, encoded.num_pairs - 1, min(pairs, encoded.num_pairs)).astype(int)).tolist():
        for text in pair_texts(encoded, pair, tokenizer, plain=console.color_system is None):
            _write(console, text)


def _write(console: Console, text: Text) -> None:
    console.print(text, soft_wrap=not console.is_terminal)


# ------------------------------------------------------------------------------------------------ lengths


def histogram(encoded: Encoded, block: str) -> list[str]:
    """Lengths of prompts, chosen and rejected as bars beside each other, 60 columns wide.

    tokens     prompt            chosen            rejected
       0- 127  ########    810   ########  1,102   #######   1,048
    """
    lengths = encoded.completion_length
    prompts = encoded.sequence_lengths() - lengths
    series = [prompts[encoded.chosen], lengths[encoded.chosen], lengths[encoded.rejected]]
    width = -(-(max(int(values.max()) for values in series) + 1) // BINS)
    counts = [np.bincount(values // width, minlength=BINS) for values in series]
    most = max(int(count.max()) for count in counts)
    lines = ["tokens       " + "".join(f"{name:<16}" for name in ("prompt", "chosen", "rejected")).rstrip()]
    for row in range(BINS):
        bars = [f"{block * -(-7 * int(count[row]) // most):<7}{count[row]:>7,}  " for count in counts]
        lines.append(f"{row * width:>5}-{(row + 1) * width - 1:<5}  " + "".join(bars).rstrip())
    return lines


# ------------------------------------------------------------------------------------------------ pairs


def pair_texts(encoded: Encoded, pair: int, tokenizer: Any, *, plain: bool) -> Iterator[Text]:
    """One pair: where it is from, the prompt, both completions, and what was cut of each."""
    unit = int(encoded.pair_unit[pair])
    file = clean(encoded.files[int(encoded.file[unit])], 400)
    numbers = f"weight {encoded.weight[pair]:g}, margin {encoded.margin[pair]:g}"
    yield Text(f"\npair {pair + 1:,} of {encoded.num_pairs:,}, {file}:{encoded.line[unit]}, {numbers}", "bold")
    chosen, rejected = int(encoded.chosen[pair]), int(encoded.rejected[pair])
    completions = {"chosen": chosen, "rejected": rejected}
    skips = {name: int(encoded.completion_skip[index]) for name, index in completions.items()}
    shared = skips["chosen"] == skips["rejected"] < encoded.prompt_length[unit]
    for name, index in {"prompt": chosen, **completions}.items():
        head, tail = encoded.cut(index)
        if name == "prompt":
            if shared:
                yield _heading("prompt", len(encoded.prompt(index)), len(head))
                yield _body(tokenizer, [(head, "cut"), (encoded.prompt(index), "prompt")], plain)
            continue
        ids = encoded.completion(index)
        before = [] if shared else [(head, "cut"), (encoded.prompt(index), "prompt")]
        yield _heading(name, len(ids), len(tail) + (0 if shared else len(head)))
        yield _body(tokenizer, [*before, (ids, name), (tail, "cut")], plain)


def _heading(name: str, kept: int, cut: int) -> Text:
    scored = "not scored" if name == "prompt" else "all scored"
    return Text(f"{name}: {kept:,} tokens, {scored}" + (f", {cut:,} cut" if cut else ""), f"bold {STYLES[name]}")


def _body(tokenizer: Any, parts: Sequence[tuple[np.ndarray, str]], plain: bool) -> Text:
    body = Text()
    for ids, name in parts:
        if len(ids):
            body.append_text(_part(tokenizer, ids.tolist(), name, plain))
    return body


def _part(tokenizer: Any, ids: list[int], name: str, plain: bool) -> Text:
    """Tokens as text in the part's colour; in plain text, cuts and special tokens are bracketed instead."""
    text = Text()
    for run, is_special in _runs(ids, special_ids(tokenizer)):
        shown = _lines(tokenizer.decode(run, skip_special_tokens=False))
        if is_special:
            shown = f"⟦{shown}⟧" if plain else shown
        text.append(shown, f"{STYLES[name]} {STYLES['special']}" if is_special else STYLES[name])
    text = _shortened(text)
    return Text("[cut: ") + text + Text("]") if plain and name == "cut" else text


def _runs(ids: Sequence[int], special: frozenset[int]) -> Iterator[tuple[list[int], bool]]:
    """Ordinary tokens in runs, special tokens one by one."""
    run: list[int] = []
    for token in ids:
        if token not in special:
            run.append(token)
            continue
        if run:
            yield run, False
        yield [token], True
        run = []
    if run:
        yield run, False


def _lines(text: str) -> str:
    """Text whose line breaks are real and whose other control characters are written out."""
    return "\n".join(printable(line) for line in text.split("\n"))


def _shortened(text: Text) -> Text:
    if len(text) <= CHARACTERS:
        return text
    half = CHARACTERS // 2
    left_out = Text(f" ... {len(text) - 2 * half:,} characters not shown ... ", "dim")
    return text[:half] + left_out + text[-half:]


if __name__ == "__main__":
    sys.exit(main())
