"""Preference data as arrays of token ids: read, tokenise, truncate, and keep the result."""

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from dpo_jax.data.arguments import check_arguments, dated
from dpo_jax.data.cache import Entry, refused
from dpo_jax.data.encoded import Encoded, length_tables
from dpo_jax.data.layouts import Pair, Record
from dpo_jax.data.messages import BadRow, is_chat, shared_length
from dpo_jax.data.ranges import DIFFER
from dpo_jax.data.readers import Row
from dpo_jax.data.records import RowRules, Stretch, read_record, stretches
from dpo_jax.data.report import AS_TEXT, NO_PROMPT, Report, clean
from dpo_jax.data.settings import DataSettings
from dpo_jax.data.sources import tables
from dpo_jax.data.templates import Codec, Tokens, codec, template_digest, tokenize
from dpo_jax.data.together import ONE_FOLDER, EncodedPart, Make, Sighting, do_share, gathered
from dpo_jax.data.tokenizer import Tokenizer
from dpo_jax.data.truncation import TRUNCATIONS, Cut, fitted, shortened
from dpo_jax.data.units import Builder, Unit, joined, prompt_keys
from dpo_jax.data.workers import in_order, processes
from dpo_jax.errors import UserError
from dpo_jax.files import held
from dpo_jax.processes.here import Here, is_seen

CHUNK = 512
"""Rows that are tokenised in one call."""
ALONE = 8
"""Calls before processes are started: what these take is about what it takes to start them."""


class EncodingRules(NamedTuple):
    """How rows become token ids: all that `encode_rows` needs beside the rows."""

    coder: Codec
    truncation: Literal["keep_completion", "keep_start", "keep_end"]
    max_length: int
    max_characters: int
    rows: RowRules = RowRules()


def encode_rows(rules: EncodingRules, stretch: Stretch) -> EncodedPart:
    """The rows of a stretch as token ids. A pure function, which may be called in any process."""
    report, builder, sightings = Report(), Builder(stretch.rows[0].file), []
    records = [_read(row, stretch, rules) for row in stretch.rows]
    tokens = iter(tokenize([record for record in records if isinstance(record, Record)], rules.coder))
    for row, record in zip(stretch.rows, records, strict=True):
        where = {"file": row.file, "line": row.line}
        report.note(row.notes, **where)
        made = record if isinstance(record, BadRow) else _unit(record, next(tokens), rules, report)
        if isinstance(made, BadRow):
            report.drop(made.kind, made.reason, **where)
            continue
        sightings += _sightings(made)
        made = _fitted(made, record, rules)
        if isinstance(made, BadRow):
            report.drop(made.kind, made.reason, **where)
        elif kept := _with_scores(truncated(made, rules, report), report):
            builder.add(*kept)
            _count(kept[0], record, report)
    return EncodedPart(stretch.rows[0].file, builder.build(), report, sightings)


def _read(row: Row, stretch: Stretch, rules: EncodingRules) -> Record | BadRow:
    record = read_record(row, stretch, rules.rows)
    return record if isinstance(record, BadRow) else shortened(record, rules.max_characters, rules.truncation)


def _count(unit: Unit, record: Record | BadRow, report: Report) -> None:
    """Count a row that is kept."""
    report.kept += 1
    report.templated += isinstance(record, Record) and is_chat(record.completions[0])
    report.texts += isinstance(record, Record) and isinstance(record.completions[0], str)
    singles = [pair for pair in unit.pairs if pair.single]
    report.pairs += len(unit.pairs) - len(singles)
    report.singles += len(singles)
    report.undesirable += sum(pair.label == 0 for pair in singles)


def _unit(record: Record, tokens: Tokens | BadRow, rules: EncodingRules, report: Report) -> Unit | BadRow:
    """A record as token ids; bad if they cannot be had, or if all of its completions are the same ids."""
    if isinstance(tokens, BadRow):
        return tokens
    bos, before = rules.coder.bos, rules.coder.before
    head = len(before) if tuple(tokens.prompt[: len(before)]) == before else 0
    head = head or int(bos is not None and tokens.prompt[:1] == [bos])
    named = {"file": record.file, "line": record.line, "keys": prompt_keys(record.prompt, tokens.prompt)}
    unit = Unit(tokens.prompt, tokens.completions, tokens.unscored, record.pairs, **named, head=head)
    pairs = _different(unit, [(0, len(ids)) for ids in unit.completions])
    if not pairs:
        return BadRow("identical completions", "chosen and rejected are the same token ids")
    empty = isinstance(record.prompt, str) and not record.prompt.strip()
    notes = tokens.notes + _left_out(unit, pairs) + (((NO_PROMPT, "the prompt is empty"),) if empty else ())
    report.note(notes, file=record.file, line=record.line)
    return unit if len(pairs) == len(unit.pairs) else unit.with_pairs(pairs)


def _fitted(unit: Unit, record: Record | BadRow, rules: EncodingRules) -> Unit | BadRow:
    """The unit of a conversation whose prompt is made to fit by keep_completion; others are as they were."""
    longest = max(map(len, unit.completions))
    if rules.truncation != "keep_completion" or len(unit.prompt) + longest <= rules.max_length:
        return unit
    if isinstance(record, BadRow) or not is_chat(record.prompt):
        return unit
    found = fitted(record, rules.coder, rules.max_length - min(longest, rules.max_length - 1))
    if isinstance(found, BadRow):
        return BadRow("overlong prompt", f"the template does not take it without its oldest turns: {found.reason}")
    if len(found.prompt) >= rules.max_length:
        what = f"{len(found.prompt)} tokens without the turns that could go, data.max_length {rules.max_length}"
        return BadRow("overlong prompt", what)
    start = shared_length(unit.prompt, found.prompt)
    end = min(shared_length(unit.prompt[::-1], found.prompt[::-1]), len(found.prompt) - start)
    gone = unit.prompt[start : len(unit.prompt) - end]
    stays = len(found.prompt) - 1  # then keep_completion takes nothing more of it
    return replace(unit, prompt=gone + found.prompt, head=stays, gone=len(gone), turns=found.messages)


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
    lengths, prompt = [len(ids) for ids in unit.completions], len(unit.prompt) - unit.gone
    cut = TRUNCATIONS[rules.truncation](prompt, lengths, rules.max_length, unit.head)
    if cut is None:
        report.drop("overlong prompt", f"{prompt} tokens, data.max_length {rules.max_length}", **where)
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
    if rules.truncation == "keep_completion":
        unit = _head_kept(unit, cut.skip[0])
    cut = cut._replace(skip=[skip + unit.gone for skip in cut.skip])
    if any(cut.skip):
        turns = f", {unit.turns} whole messages among them" if unit.turns else ""
        report.add("prompt truncated", f"{max(cut.skip)} of {len(unit.prompt)} tokens cut{turns}", **where)
        report.count_cut("prompt truncated", max(cut.skip))
    if cut.length != lengths:
        lost = [whole - kept for whole, kept in zip(lengths, cut.length, strict=True)]
        report.add("completion truncated", f"{max(lost)} tokens cut", **where)
        report.count_cut("completion truncated", sum(lost))
    return unit, cut


def _head_kept(unit: Unit, skip: int) -> Unit:
    """The unit with the head of its prompt behind the tokens that it loses, so that what is read is one piece."""
    head, ids = unit.head, unit.prompt[unit.gone :]
    if not skip or skip + head >= len(ids):
        return unit
    return replace(unit, prompt=[*unit.prompt[: unit.gone], *ids[head : head + skip], *ids[:head], *ids[head + skip :]])


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


def _seen(made: Iterable[EncodedPart], report: Report) -> Iterator[Encoded]:
    """The parts; the report knows each when it is taken."""
    seen = _Seen()
    for part in made:
        report.merge(part.report)
        about = report.files[part.file]
        about["as_text"] = about.get("as_text", 0) + part.report.counts.get(AS_TEXT, 0)
        seen.compare(part, report)
        yield part.encoded


def _measured(encoded: Encoded, report: Report) -> None:
    """Write the tables of lengths into the report."""
    report.lengths = length_tables(encoded) if encoded.num_pairs else {}


class _Seen:
    """Entries that were met, by digest, to find the ones that come twice and the ones that contradict each other."""

    def __init__(self):
        self.where: dict[bytes, tuple[str, int]] = {}

    def compare(self, part: EncodedPart, report: Report) -> None:
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


# ------------------------------------------------------------------------------------------------ whole


def encode(
    sources: str | Sequence[str],
    tokenizer: Tokenizer,
    settings: DataSettings,
    cache: str | Path | None = None,
    *,
    first: int | None = None,
    date: str | None = None,
    place: Here | None = None,
) -> tuple[Encoded, Report]:
    """Rows of all sources as token ids, and the report of what became of their rows, when it can be accepted.

    Arguments as of `collect`.

    Raises:
      UserError: more than data.max_bad_fraction of the rows are bad, none is left, or what `collect` raises.
    """
    encoded, report = collect(sources, tokenizer, settings, cache, first=first, date=date, place=place)
    report.check(settings.max_bad_fraction)
    return encoded, report


def collect(
    sources: str | Sequence[str],
    tokenizer: Tokenizer,
    settings: DataSettings,
    cache: str | Path | None = None,
    *,
    first: int | None = None,
    date: str | None = None,
    place: Here | None = None,
) -> tuple[Encoded, Report]:
    """Rows of all sources as token ids, and the report, however bad it is.

    Args:
      sources: files, folders or data sets (see sources.py).
      tokenizer: of transformers.
      settings: layout, lengths, template and limits. Its own `train`, `eval`, `first` and `cache` are not read.
      cache: folder that keeps the result by content; None keeps nothing.
      first: read no more rows than this.
      date: the day that a template writes which writes one (YYYY-MM-DD); None is today.
      place: of this process among those that make it together, all of which call, and see the same cache; None: it is
        made by this one alone.

    Raises:
      UserError: a source, the template or the cache cannot be used.
    """
    place = place or Here()
    template = _template(settings.template)
    arguments, digest = settings.chat_template_kwargs or {}, template_digest(tokenizer, template)
    check_arguments(arguments, tokenizer, template)
    tokenizer, template, date = dated(tokenizer, template, date)
    opened = place.in_turn("data sources", lambda: tables(sources, stream=settings.stream))  # one downloads
    entry = Entry.of(cache, opened, tokenizer, settings, template, first, place) if cache is not None else None
    if entry and (found := _kept(entry, place)):
        return found
    report = Report(template=digest, arguments=arguments, date=date)
    coder = codec(
        tokenizer,
        template=template,
        control_tokens=settings.control_tokens,
        score_tool_results=settings.score_tool_results,
        ending=settings.ending or ("terminator" if settings.truncation == "keep_completion" else "template"),
        arguments=arguments,
    )
    limit = settings.max_characters or 64 * settings.max_length
    rows = RowRules(settings.layout, settings.columns or {}, settings.as_chat)
    rules = EncodingRules(coder, settings.truncation, settings.max_length, limit, rows)
    pieces = stretches(opened, rules=rows, first=first, report=report, size=CHUNK)
    make = partial(in_order, encode_rows, rules, workers=_workers(settings.workers, place), alone=ALONE)
    if entry and place.count > 1:
        return _made_together(entry, place, make, pieces, report)
    with closing(make(pieces)) as made:
        return _whole(entry, _seen(made, report), report), report


def _whole(entry: Entry | None, parts: Iterable[Encoded], report: Report) -> Encoded:
    """The parts as one, kept if there is a place for it."""
    if entry:
        return entry.write(parts, report, _measured)
    encoded = joined(parts)
    _measured(encoded, report)
    return encoded


def _workers(wanted: int | None, place: Here) -> int:
    """Processes that tokenise for this one; by default those of one host share its cores."""
    sharers = 1 if wanted is not None else place.everyone("hosts that tokenise", place.host).count(place.host)
    return max(1, processes(wanted) // sharers) if sharers > 1 else processes(wanted)


def _kept(entry: Entry, place: Here) -> tuple[Encoded, Report] | None:
    """What is kept already, if process 0 finds that it is sound.

    Raises:
      UserError: not all processes have the same data, tokenizer, template and versions.
    """
    place.same(DIFFER, {"digest of data, tokenizer and template": entry.folder.name})
    found = entry.read() if place.owns else None
    there = place.decide("whether tokenised data is kept", lambda: found is not None)
    return _made_by_others(entry, place) if there and not place.owns else found


def _made_by_others(entry: Entry, place: Here) -> tuple[Encoded, Report]:
    """What process 0 has looked at, or written."""
    found = entry.read(check=False) if is_seen(entry.folder) else None
    if found is None:
        raise UserError(
            f"data.cache: process {place.process} ({place.host}) does not see {entry.folder}, which process 0 wrote; "
            + ONE_FOLDER
        )
    return found


def _made_together(
    entry: Entry, place: Here, make: Make, pieces: Iterator[Stretch], report: Report
) -> tuple[Encoded, Report]:
    """The whole, of which each process has made its share."""
    folder = entry.folder.with_name(place.decide("folder for shares", lambda: _share_folder(entry)))
    if not place.owns:
        do_share(place, folder, make, pieces)
        place.decide("tokenised data", lambda: None)
        return _made_by_others(entry, place)
    made: list[Encoded] = []

    def work() -> None:
        with held(folder), closing(gathered(place, folder, make, pieces)) as parts:
            made.append(_whole(entry, _seen(parts, report), report))

    try:
        place.decide("tokenised data", work)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return made[0], report


def _share_folder(entry: Entry) -> str:
    folder = entry.staging()
    with refused(folder.parent):
        folder.mkdir(parents=True)
    return folder.name


def _template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.template={clean(path)}: cannot be read: {clean(str(error))}") from error
