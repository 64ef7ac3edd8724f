"""Preference data as arrays of token ids: read, tokenise, truncate, and keep the result."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from dpo_jax.data.encoded import Encoded, Entry
from dpo_jax.data.examples import ranks
from dpo_jax.data.layouts import Pair, Record
from dpo_jax.data.messages import BadRow, is_chat
from dpo_jax.data.records import Stretch, read_record, stretches, tables
from dpo_jax.data.report import AS_TEXT, Report, clean
from dpo_jax.data.settings import DataSettings
from dpo_jax.data.templates import Codec, Tokens, codec, template_digest, tokenize
from dpo_jax.data.tokenizer import Tokenizer
from dpo_jax.data.workers import in_order, processes
from dpo_jax.errors import UserError

CHUNK = 512
"""Rows that are tokenised in one call."""
ALONE = 8
"""Calls before processes are started: what these take is about what it takes to start them."""

# ------------------------------------------------------------------------------------------------ truncation


class Cut(NamedTuple):
    """What is kept of a prompt and its completions: one number per completion."""

    skip: list[int]
    """Tokens that the prompt's head loses; all of them where nothing is left of it."""
    start: list[int]
    """First scored token of the completion."""
    length: list[int]
    """Scored tokens."""


def keep_completion(prompt: int, completions: Sequence[int], max_length: int) -> Cut | None:
    """Keep the answers; the prompt loses its head, down to one token; then the answers lose their tails, all alike.

    prompt 6, answers 3 and 5, max_length 8   ->   the last 3 of the prompt with all of both answers
    prompt 6, answers 3 and 9, max_length 8   ->   the last token of the prompt, 3, and the first 7 of the 9
    """
    lengths = [min(length, max_length - 1) for length in completions]
    keep = min(prompt, max_length - max(lengths))
    return Cut([prompt - keep] * len(lengths), [0] * len(lengths), lengths)


def keep_start(prompt: int, completions: Sequence[int], max_length: int) -> Cut | None:
    """TRL's rule of that name: the first `max_length` tokens; None (the row is dropped) if the prompt fills them."""
    if prompt >= max_length:
        return None
    lengths = [min(length, max_length - prompt) for length in completions]
    return Cut([0] * len(lengths), [0] * len(lengths), lengths)


def keep_end(prompt: int, completions: Sequence[int], max_length: int) -> Cut | None:
    """TRL's rule of that name: the last `max_length` tokens of each sequence on its own.

    Where they begin inside the completion, or with it, their first token has no source and is not scored.
    """
    over = [max(0, prompt + length - max_length) for length in completions]
    start = [0 if cut < prompt else cut - prompt + 1 for cut in over]
    lengths = [length - at for length, at in zip(completions, start, strict=True)]
    return Cut([min(cut, prompt) for cut in over], start, lengths)


TRUNCATIONS: dict[str, Callable[[int, Sequence[int], int], Cut | None]] = {
    "keep_completion": keep_completion,
    "keep_start": keep_start,
    "keep_end": keep_end,
}

# ------------------------------------------------------------------------------------------------ units


@dataclass(frozen=True)
class Unit:
    """A record in token ids, before truncation."""

    prompt: list[int]
    completions: list[list[int]]
    unscored: list[list[tuple[int, int]]]
    pairs: tuple[Pair, ...]
    file: str
    line: int

    def with_pairs(self, pairs: Sequence[Pair]) -> "Unit":
        """The unit with these of its pairs, and the completions that they need."""
        used = sorted({index for pair in pairs for index in (pair.chosen, pair.rejected)})
        again = [pair._replace(chosen=used.index(pair.chosen), rejected=used.index(pair.rejected)) for pair in pairs]
        completions, unscored = ([part[index] for index in used] for part in (self.completions, self.unscored))
        return replace(self, completions=completions, unscored=unscored, pairs=tuple(again))


class EncodingRules(NamedTuple):
    """How rows become token ids: all that `encode_rows` needs beside the rows."""

    coder: Codec
    truncation: Literal["keep_completion", "keep_start", "keep_end"]
    max_length: int
    max_characters: int


class Sighting(NamedTuple):
    """A pair, or a single completion, by digests of its token ids and of those that would contradict it."""

    line: int
    same: bytes
    opposite: bytes
    desirable: bool | None
    """Of a single completion."""


class Part(NamedTuple):
    """What a stretch of rows of a file became; its numbers begin at 0, and its ranks are not known."""

    file: str
    encoded: Encoded
    report: Report
    sightings: list[Sighting]


def encode_rows(rules: EncodingRules, stretch: Stretch) -> Part:
    """The rows of a stretch as token ids. A pure function, which may be called in any process."""
    report, builder, sightings = Report(), _Builder(stretch.rows[0].file), []
    records = [read_record(row, stretch.layout, rules.max_characters) for row in stretch.rows]
    tokens = iter(tokenize([record for record in records if isinstance(record, Record)], rules.coder))
    for row, record in zip(stretch.rows, records, strict=True):
        where = {"file": row.file, "line": row.line}
        report.note(row.notes, **where)
        made = record if isinstance(record, BadRow) else _unit(record, next(tokens), report)
        if isinstance(made, BadRow):
            report.drop(made.kind, made.reason, **where)
            continue
        sightings += _sightings(made)
        if kept := _with_scores(truncated(made, rules, report), report):
            builder.add(*kept)
            report.kept += 1
            report.templated += isinstance(record, Record) and is_chat(record.completions[0])
            singles = [pair for pair in kept[0].pairs if pair.single]
            report.pairs += len(kept[0].pairs) - len(singles)
            report.singles += len(singles)
            report.undesirable += sum(pair.label == 0 for pair in singles)
    return Part(stretch.rows[0].file, builder.build(), report, sightings)


def _unit(record: Record, tokens: Tokens | BadRow, report: Report) -> Unit | BadRow:
    """A record as token ids; bad if they cannot be had, or if all of its completions are the same ids."""
    if isinstance(tokens, BadRow):
        return tokens
    unit = Unit(tokens.prompt, tokens.completions, tokens.unscored, record.pairs, record.file, record.line)
    pairs = _different(unit, [(0, len(ids)) for ids in unit.completions])
    if not pairs:
        return BadRow("identical completions", "chosen and rejected are the same token ids")
    report.note(tokens.notes + _left_out(unit, pairs), file=record.file, line=record.line)
    return unit if len(pairs) == len(unit.pairs) else unit.with_pairs(pairs)


def _different(unit: Unit, spans: Sequence[tuple[int, int]]) -> list[Pair]:
    """Pairs whose completions differ inside the spans (start, length); a single completion has none to differ from."""
    kept = [ids[start : start + length] for ids, (start, length) in zip(unit.completions, spans, strict=True)]
    return [pair for pair in unit.pairs if pair.single or kept[pair.chosen] != kept[pair.rejected]]


def _left_out(unit: Unit, pairs: Sequence[Pair]) -> tuple[tuple[str, str], ...]:
    count = len(unit.pairs) - len(pairs)
    return (("pair left out of a ranked row", f"{count} pairs of completions are the same tokens"),) if count else ()


def truncated(unit: Unit, rules: EncodingRules, report: Report) -> tuple[Unit, Cut] | None:
    """The unit and what is kept of it, or None when nothing is left to learn from; both are counted."""
    where = {"file": unit.file, "line": unit.line}
    lengths = [len(ids) for ids in unit.completions]
    cut = TRUNCATIONS[rules.truncation](len(unit.prompt), lengths, rules.max_length)
    if cut is None:
        report.drop("overlong prompt", f"{len(unit.prompt)} tokens, data.max_length {rules.max_length}", **where)
        return None
    pairs = _different(unit, list(zip(cut.start, cut.length, strict=True)))
    if len(pairs) < len(unit.pairs) and rules.truncation != "keep_completion":
        report.add("identical after truncation, kept", "as TRL does; its loss is ln 2 and its gradient 0", **where)
    elif not pairs:
        report.drop("identical after truncation", f"the first {cut.length[0]} tokens are the same", **where)
        return None
    elif len(pairs) < len(unit.pairs):
        report.note(_left_out(unit, pairs), **where)
        return truncated(unit.with_pairs(pairs), rules, report)
    if any(cut.skip):
        report.add("prompt truncated", f"{max(cut.skip)} of {len(unit.prompt)} tokens cut from its head", **where)
    if cut.length != lengths:
        most = max(whole - kept for whole, kept in zip(lengths, cut.length, strict=True))
        report.add("completion truncated", f"{most} tokens cut", **where)
    return unit, cut


def _with_scores(kept: tuple[Unit, Cut] | None, report: Report) -> tuple[Unit, Cut] | None:
    """What truncation kept, or None where it left others' words alone of a completion, which is counted."""
    if kept is None:
        return None
    unit, cut = kept
    for spans, start, length in zip(unit.unscored, cut.start, cut.length, strict=True):
        others = sum(max(0, min(end, start + length) - max(first, start)) for first, end in spans)
        if others >= length:
            reason = f"of the first {length} tokens of a completion, none is the assistant's"
            report.drop("nothing scored after truncation", reason, file=unit.file, line=unit.line)
            return None
    return kept


class _Builder:
    """Grows the arrays of an `Encoded` of one file, unit by unit."""

    def __init__(self, file: str):
        self.file = file
        self.tokens: list[np.ndarray] = []
        self.scored: list[np.ndarray] = []
        self.size = 0
        self.columns: dict[str, list] = {field.name: [] for field in fields(Encoded) if field.name not in _WHOLE}

    def add(self, unit: Unit, cut: Cut) -> None:
        """Append a unit: the prompt, then each completion."""
        into, number = self.columns, len(self.columns["prompt_start"])
        first = len(into["completion_start"])
        prompt = {"prompt_start": self._append(unit.prompt), "prompt_length": len(unit.prompt)}
        self._row(**prompt, file=0, line=unit.line)
        for ids, unscored, skip, start, length in zip(unit.completions, unit.unscored, *cut, strict=True):
            self._row(
                completion_unit=number,
                completion_start=self._append(ids, unscored) + start,
                completion_length=length,
                completion_skip=skip,
                truncated=bool(skip) or length < len(ids),
            )
        for pair in unit.pairs:
            where = {"chosen": first + pair.chosen, "rejected": first + pair.rejected}
            self._row(pair_unit=number, **where, weight=pair.weight, margin=pair.margin, label=pair.label)

    def _row(self, **values: object) -> None:
        for name, value in values.items():
            self.columns[name].append(value)

    def _append(self, ids: list[int], unscored: Sequence[tuple[int, int]] = ()) -> int:
        self.tokens.append(np.asarray(ids, np.int32))
        self.scored.append(np.ones(len(ids), bool))
        for start, end in unscored:
            self.scored[-1][start:end] = False
        self.size += len(ids)
        return self.size - len(ids)

    def build(self) -> Encoded:
        """The arrays, without ranks."""
        columns = {name: np.asarray(values, _DTYPES.get(name, np.int32)) for name, values in self.columns.items()}
        tokens = np.concatenate(self.tokens) if self.tokens else np.zeros(0, np.int32)
        scored = np.concatenate(self.scored) if self.scored else np.zeros(0, bool)
        unranked = np.zeros(len(columns["completion_unit"]), np.int32)
        files = (self.file,) if self.tokens else ()
        return Encoded(tokens=tokens, scored=scored, files=files, rank=unranked, **columns)


_WHOLE = ("tokens", "scored", "files", "rank")
_DTYPES = {
    "scored": np.bool_,
    "prompt_start": np.int64,
    "completion_start": np.int64,
    "weight": np.float32,
    "margin": np.float32,
    "label": np.float32,
    "truncated": np.bool_,
}
_COUNTED = {
    "prompt_start": "tokens",
    "completion_start": "tokens",
    "completion_unit": "prompt_start",
    "pair_unit": "prompt_start",
    "chosen": "completion_start",
    "rejected": "completion_start",
}
"""Columns that are places in another one, and that one."""


def _joined(parts: Sequence[Encoded]) -> Encoded:
    """The data of all parts, one after another, with ranks."""
    files = tuple(dict.fromkeys(file for part in parts for file in part.files))
    columns: dict[str, np.ndarray] = {}
    for name in (field.name for field in fields(Encoded) if field.name != "files"):
        arrays = [getattr(part, name) for part in parts] or [np.zeros(0, _DTYPES.get(name, np.int32))]
        columns[name] = np.concatenate(arrays)
        if of := _COUNTED.get(name):
            sizes = [len(getattr(part, of)) for part in parts]
            before = np.cumsum([0, *sizes[:-1]], dtype=columns[name].dtype)
            columns[name] += np.repeat(before[: len(parts)], [len(array) for array in arrays][: len(parts)])
    numbers = [files.index(part.files[0]) if part.files else 0 for part in parts]
    columns["file"] += np.repeat(np.asarray(numbers, np.int32), [part.num_units for part in parts])
    encoded = Encoded(files=files, **columns)
    return replace(encoded, rank=ranks(encoded))


def _build(pieces: Iterable[Stretch], rules: EncodingRules, report: Report, workers: int) -> Encoded:
    parts, seen = [], _Seen()
    with closing(in_order(encode_rows, rules, pieces, workers=workers, alone=ALONE)) as made:
        for part in made:
            report.merge(part.report)
            about = report.files[part.file]
            about["as_text"] = about.get("as_text", 0) + part.report.counts.get(AS_TEXT, 0)
            seen.compare(part, report)
            parts.append(part.encoded)
    encoded = _joined(parts)
    report.lengths = _lengths(encoded) if encoded.num_pairs else {}
    return encoded


class _Seen:
    """Entries that were met, by digest, to find the ones that come twice and the ones that contradict each other."""

    def __init__(self):
        self.where: dict[bytes, tuple[str, int]] = {}

    def compare(self, part: Part, report: Report) -> None:
        """Note what the next part repeats or contradicts."""
        for one in part.sightings:
            here = (part.file, one.line)
            what, how = "pair", "the other way round"
            if one.desirable is not None:
                what, how = "completion", "undesirable" if one.desirable else "desirable"
            if earlier := self.where.get(one.opposite):
                self._note(report, here, f"conflicting {what}", f"{how} at {_place(earlier)}")
            if (earlier := self.where.setdefault(one.same, here)) != here:
                self._note(report, here, f"duplicate {what}", f"the same as {_place(earlier)}")

    def _note(self, report: Report, here: tuple[str, int], kind: str, reason: str) -> None:
        report.add(kind, reason, file=here[0], line=here[1])


def _place(where: tuple[str, int]) -> str:
    return f"{clean(where[0], 400)}:{where[1]}"


def _sightings(unit: Unit) -> Iterator[Sighting]:
    """The pairs of a unit, for `_Seen`."""
    prompt, *answers = (_digest(ids) for ids in (unit.prompt, *unit.completions))
    for pair in unit.pairs:
        better, worse, desirable = answers[pair.chosen], answers[pair.rejected], None
        same, opposite = better + worse, worse + better
        if pair.single:
            desirable = pair.label > 0
            same, opposite = better + bytes([desirable]), better + bytes([not desirable])
        yield Sighting(unit.line, prompt + same, prompt + opposite, desirable)


def _digest(ids: list[int]) -> bytes:
    return hashlib.blake2b(np.asarray(ids, np.int32).tobytes(), digest_size=16).digest()


def _lengths(encoded: Encoded) -> dict[str, dict[str, float]]:
    sequences = encoded.sequence_lengths()
    prompts = (sequences - encoded.completion_length)[encoded.chosen]
    lengths, single = encoded.completion_length, encoded.single
    parts = {
        "prompt": prompts,
        "chosen": lengths[encoded.chosen[~single]],
        "rejected": lengths[encoded.rejected[~single]],
        "completion": lengths[encoded.chosen[single]],
        "prompt + completion": sequences,
    }
    return {name: _summary(values) for name, values in parts.items() if len(values)}


def _summary(values: np.ndarray) -> dict[str, float]:
    names = {"min": 0, "median": 50, "p90": 90, "p99": 99, "max": 100}
    table = {name: float(np.percentile(values, share)) for name, share in names.items()}
    return {**table, "mean": float(values.mean())}


# ------------------------------------------------------------------------------------------------ whole


def encode(
    sources: str | Sequence[str],
    tokenizer: Tokenizer,
    settings: DataSettings,
    cache: str | Path | None = None,
    *,
    first: int | None = None,
) -> tuple[Encoded, Report]:
    """Rows of all sources as token ids, and the report of what became of their rows, when it can be accepted.

    Arguments as of `collect`.

    Raises:
      UserError: more than data.max_bad_fraction of the rows are bad, none is left, or what `collect` raises.
    """
    encoded, report = collect(sources, tokenizer, settings, cache, first=first)
    report.check(settings.max_bad_fraction)
    return encoded, report


def collect(
    sources: str | Sequence[str],
    tokenizer: Tokenizer,
    settings: DataSettings,
    cache: str | Path | None = None,
    *,
    first: int | None = None,
) -> tuple[Encoded, Report]:
    """Rows of all sources as token ids, and the report, however bad it is.

    Args:
      sources: files, folders or data sets (see records.py).
      tokenizer: of transformers.
      settings: layout, lengths, template and limits. Its own `train`, `eval`, `first` and `cache` are not read.
      cache: folder that keeps the result by content; None keeps nothing.
      first: read no more rows than this.

    Raises:
      UserError: a source, the template or the cache cannot be used.
    """
    template = _template(settings.template)
    opened = tables(sources)
    entry = Entry.of(cache, opened, tokenizer, settings, template, first) if cache is not None else None
    if entry and (found := entry.read()):
        return found
    report = Report(template=template_digest(tokenizer, template))
    coder = codec(
        tokenizer,
        template=template,
        control_tokens=settings.control_tokens,
        score_tool_results=settings.score_tool_results,
        ending=settings.ending or ("terminator" if settings.truncation == "keep_completion" else "template"),
    )
    limit = settings.max_characters or 64 * settings.max_length
    rules = EncodingRules(coder, settings.truncation, settings.max_length, limit)
    pieces = stretches(opened, layout=settings.layout, first=first, report=report, size=CHUNK)
    encoded = _build(pieces, rules, report, processes(settings.workers))
    if entry:
        report.cache = entry.write(encoded, report)
    return encoded, report


def _template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.template={clean(path)}: cannot be read: {clean(str(error))}") from error
