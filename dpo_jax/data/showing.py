"""Tokenised rows as people read them: decoded in colour, what is scored and what was cut, lengths and counts."""

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from dpo_jax.data.encoded import Encoded
from dpo_jax.data.report import BAD, Report, clean
from dpo_jax.data.tokenizer import Tokenizer, added_ids
from dpo_jax.errors import printable

CHARACTERS = 1600
"""Longest text that is shown of a prompt or a completion; the middle of a longer one is left out, and said so."""

BINS = 8
STYLES = {
    "prompt": "cyan",
    "chosen": "green",
    "rejected": "red",
    "completion": "green",
    "desirable": "green",
    "undesirable": "red",
    "not scored": "dim",
    "cut": "dim strike",
    "control token": "reverse",
}
DEFAULTS = {"weight": 1.0, "margin": 0.0, "label": 1.0}
"""Numbers of a pair that are not worth showing."""


def console_for(stream: Any) -> Console:
    """A console that neither fails on a narrow encoding nor guesses at colours where there is no terminal."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return Console(file=stream, highlight=False, markup=False, emoji=False)


def show(encoded: Encoded, report: Report, tokenizer: Tokenizer, console: Console, *, pairs: int, name: str) -> None:
    """Write one data set to the console: report, lengths, and so many of its pairs or single completions."""
    write(console, Text(name, "bold"))
    for line in report.lines():
        write(console, Text(line, "yellow" if line.startswith(f"{BAD}:") else ""))
    if encoded.num_pairs:
        show_pairs(encoded, report, tokenizer, console, pairs=pairs)


def show_pairs(encoded: Encoded, report: Report, tokenizer: Tokenizer, console: Console, *, pairs: int) -> None:
    """Write the lengths of a data set, and so many of its pairs or single completions."""
    for line in histogram(encoded, "█" if console.encoding.lower().startswith("utf") else "#"):
        write(console, Text(line))
    plain = console.color_system is None
    names = chosen_names(encoded, report)
    shown = {
        "prompt",
        "not scored",
        "cut",
        "control token",
        *names.tolist(),
        *(["rejected"] if "chosen" in names else []),
    }
    legend = Text(", ").join(Text(part, style) for part, style in STYLES.items() if part in shown)
    write(console, Text("\ncolours: ") + legend + Text("; the rest of a completion is scored"))
    for entry in np.unique(np.linspace(0, encoded.num_pairs - 1, min(pairs, encoded.num_pairs)).astype(int)).tolist():
        for text in entry_texts(encoded, entry, str(names[entry]), tokenizer, plain=plain):
            write(console, text)


def write(console: Console, text: Text) -> None:
    """Print text whose lines are broken only where a terminal needs it."""
    console.print(text, soft_wrap=not console.is_terminal)


# ------------------------------------------------------------------------------------------------ lengths


def histogram(encoded: Encoded, block: str) -> list[str]:
    """Lengths of prompts, chosen and rejected as bars beside each other, 60 columns wide, and of single completions.

    tokens     prompt            chosen            rejected
       0- 127  ########    810   ########  1,102   #######   1,048
    """
    lengths, single = encoded.completion_length, encoded.single
    prompts = encoded.sequence_lengths() - lengths
    series = {
        "prompt": prompts[encoded.chosen],
        "chosen": lengths[encoded.chosen[~single]],
        "rejected": lengths[encoded.rejected[~single]],
        "completion": lengths[encoded.chosen[single]],
    }
    series = {name: values for name, values in series.items() if len(values)}
    width = -(-(max(int(values.max()) for values in series.values()) + 1) // BINS)
    counts = [np.bincount(values // width, minlength=BINS) for values in series.values()]
    most = max(int(count.max()) for count in counts)
    lines = ["tokens       " + "".join(f"{name:<16}" for name in series).rstrip()]
    for row in range(BINS):
        bars = [f"{block * -(-7 * int(count[row]) // most):<7}{count[row]:>7,}  " for count in counts]
        lines.append(f"{row * width:>5}-{(row + 1) * width - 1:<5}  " + "".join(bars).rstrip())
    return lines


# ------------------------------------------------------------------------------------------------ examples


def chosen_names(encoded: Encoded, report: Report) -> np.ndarray:
    """What the chosen completion of each entry is called: so, or, of a single completion, what its row's label says."""
    layouts = [report.files.get(file, {}).get("layout") for file in encoded.files]
    labelled = np.asarray([layout == "unpaired" for layout in layouts])[encoded.file[encoded.pair_unit]]
    alone = np.where(labelled, np.where(encoded.label > 0, "desirable", "undesirable"), "completion")
    return np.where(encoded.single, alone, "chosen")


def entry_texts(encoded: Encoded, entry: int, name: str, tokenizer: Tokenizer, *, plain: bool) -> Iterator[Text]:
    """One entry: where it is from, the prompt, the chosen completion under that name, the rejected one, and any cut."""
    unit = int(encoded.pair_unit[entry])
    yield Text(f"\n{_title(encoded, entry)}", "bold")
    completions = {name: int(encoded.chosen[entry])}
    if not encoded.single[entry]:
        completions["rejected"] = int(encoded.rejected[entry])
    skips = {int(encoded.completion_skip[index]) for index in completions.values()}
    shared = len(skips) == 1 and max(skips) < encoded.prompt_length[unit]
    for name, index in {"prompt": int(encoded.chosen[entry]), **completions}.items():
        head, tail = encoded.cut(index)
        if name == "prompt":
            if shared:
                yield _heading("prompt", len(encoded.prompt(index)), len(head))
                yield _body(tokenizer, [(head, "cut"), (encoded.prompt(index), "prompt")], plain)
            continue
        ids = encoded.completion(index)
        before = [] if shared else [(head, "cut"), (encoded.prompt(index), "prompt")]
        scored = encoded.scored_of(index)
        yield _heading(name, len(ids), len(tail) + (0 if shared else len(head)), int(scored.sum()))
        borders = np.flatnonzero(np.diff(scored)) + 1
        owners = [name if own else "not scored" for own in scored[np.append(0, borders)].tolist()]
        parts = list(zip(np.split(ids, borders), owners, strict=True))
        yield _body(tokenizer, [*before, *parts, (tail, "cut")], plain)


def _title(encoded: Encoded, entry: int) -> str:
    """Number of the entry among its like, its row, and what is unusual about its weight, margin and label."""
    alike = encoded.single == encoded.single[entry]
    what = "completion" if encoded.single[entry] else "pair"
    unit = int(encoded.pair_unit[entry])
    file = clean(encoded.files[int(encoded.file[unit])], 400)
    numbers = {name: getattr(encoded, name)[entry] for name in DEFAULTS if what == "pair" or name == "weight"}
    unusual = [f", {name} {value:g}" for name, value in numbers.items() if value != DEFAULTS[name]]
    place = f"{what} {alike[: entry + 1].sum():,} of {alike.sum():,}"
    return f"{place}, {file}:{encoded.line[unit]}{''.join(unusual)}"


def _heading(name: str, kept: int, cut: int, scored: int = 0) -> Text:
    share = f"{scored:,} scored" if 0 < scored < kept else "all scored" if scored else "not scored"
    return Text(f"{name}: {kept:,} tokens, {share}" + (f", {cut:,} cut" if cut else ""), f"bold {STYLES[name]}")


def _body(tokenizer: Tokenizer, parts: Sequence[tuple[np.ndarray, str]], plain: bool) -> Text:
    body = Text()
    for ids, name in parts:
        if len(ids):
            body.append_text(_part(tokenizer, ids.tolist(), name, plain))
    return body


def _part(tokenizer: Tokenizer, ids: list[int], name: str, plain: bool) -> Text:
    """Tokens as text in the part's colour; in plain text, what is not scored and control tokens are bracketed."""
    text = Text()
    for run, is_control in _runs(ids, added_ids(tokenizer)):
        shown = _lines(tokenizer.decode(run, skip_special_tokens=False))
        if is_control:
            shown = f"⟦{shown}⟧" if plain else shown
        text.append(shown, f"{STYLES[name]} {STYLES['control token']}" if is_control else STYLES[name])
    text = _shortened(text)
    return Text(f"[{name}: ") + text + Text("]") if plain and name in ("cut", "not scored") else text


def _runs(ids: Sequence[int], control: frozenset[int]) -> Iterator[tuple[list[int], bool]]:
    """Ordinary tokens in runs, control tokens one by one."""
    run: list[int] = []
    for token in ids:
        if token not in control:
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
