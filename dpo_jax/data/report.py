"""What happened to the rows: counts by class, examples with file and line, lengths. Nothing vanishes unsaid."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dpo_jax.errors import UserError, printable

EXAMPLES = 5
"""Rows that are named for each class; all are counted."""

BAD, TOO_LONG, UNRANKED, NOTED = "bad", "too long", "without preference", "noted"
WEIGHTLESS, REVERSED, NO_PROMPT = "weight of 0", "reversed pair", "no prompt"
RENDERED, AS_TEXT = "rendered text", "rendered text, kept as text"
MERGED = "prompt merges with the answer"
LEFT_OUT = "left out by the chat template"
WHOLLY = {
    WEIGHTLESS: "nothing would be learned; correct the column weight, or remove it",
    REVERSED: "the answers in rejected would be learned; remove the column label, or swap chosen and rejected",
}
"""What cannot be meant of every row, and what would come of it."""

KINDS = {
    # The row cannot be used, and counts against data.max_bad_fraction.
    "not JSON": BAD,
    "nested too deep": BAD,
    "duplicate key": BAD,
    "invalid UTF-8": BAD,
    "not an object": BAD,
    "missing column": BAD,
    "null value": BAD,
    "wrong type": BAD,
    "not finite": BAD,
    "unknown role": BAD,
    "empty conversation": BAD,
    "two system messages": BAD,
    "last message not assistant": BAD,
    "empty prompt": BAD,
    MERGED: BAD,
    "empty completion": BAD,
    "identical completions": BAD,
    "prompts differ": BAD,
    "prompt not a prefix": BAD,
    "label out of range": BAD,
    "lone surrogate": BAD,
    "NUL character": BAD,
    "prompt not read": BAD,
    "template error": BAD,
    "reserved template argument": BAD,
    "token id out of range": BAD,
    # The row is sound but data.max_length leaves nothing of it to learn from; it is left out and stops nothing.
    "overlong prompt": TOO_LONG,
    "identical after truncation": TOO_LONG,
    "nothing scored after truncation": TOO_LONG,
    # The row is sound but prefers nothing; it is left out and stops nothing.
    "no preference": UNRANKED,
    "no rank or score": UNRANKED,
    "only answer to its prompt": UNRANKED,
    "question without ranked answers": UNRANKED,
    "deleted message": UNRANKED,
    "message that failed review": UNRANKED,
    "missing parent": UNRANKED,
    # The row is used, and this is worth knowing.
    "byte-order mark": NOTED,
    "conversation as JSON text": NOTED,
    "null left out": NOTED,
    "control characters": NOTED,
    "bidirectional controls": NOTED,
    "control-token text": NOTED,
    RENDERED: NOTED,
    AS_TEXT: NOTED,
    LEFT_OUT: NOTED,
    "not scored: others' words": NOTED,
    "prompt repeated in a completion": NOTED,
    "tie in a ranked row": NOTED,
    "completion without a rank": NOTED,
    "pair left out of a ranked row": NOTED,
    "completion of several turns": NOTED,
    "prompt tokens not a prefix": NOTED,
    "no end of turn": NOTED,
    "too many characters": NOTED,
    "prompt truncated": NOTED,
    "completion truncated": NOTED,
    "identical after truncation, kept": NOTED,
    "duplicate pair": NOTED,
    "conflicting pair": NOTED,
    "duplicate completion": NOTED,
    "conflicting completion": NOTED,
    WEIGHTLESS: NOTED,
    REVERSED: NOTED,
    NO_PROMPT: NOTED,
}
"""Every class of row and what becomes of such a row."""


def clean(text: str, limit: int = 200) -> str:
    """Data as it may be shown on a terminal: on one line, without control characters, not too long."""
    return printable(text) if len(text) <= limit else printable(text[: limit - 3]) + "..."


@dataclass
class Report:
    """Counts of one pass over the data.

    `rows` read = `kept` + `bad` + `too_long` + `unranked` + `joined`. A row of a ranked layout counts as kept while one
    of its pairs is.

    Attributes:
      unranked: rows that are sound and prefer nothing: ties, answers without a rank or without another.
      joined: rows that are part of another row's ranking (see gathering.py).
      pairs: pairs of completions in the rows that are kept.
      singles: rows that are kept and have one completion; `undesirable` of them are so.
      files: by file: its layout and whether it was detected, its rows, the columns that nothing reads, rows whose
        rendered text stays text; the known data set that it is of, if it is of one, and the mapping from there.
      counts: rows (or pairs, for classes that speak of pairs) by class.
      examples: `file:line: reason` of the first rows of each class.
      cut: tokens that were cut off, by class.
      lengths: tokens of prompts, chosen, rejected, single completions and whole sequences: min, median, p90, p99, max,
        mean.
      template: digest of the model's chat template; `templated` of the rows that are kept went through it, `texts` are
        plain texts, and the rest token ids.
      arguments: of the template, for all rows.
      date: the day that the template writes (YYYY-MM-DD), if it may write one.
      cache: what the cache had to do with it.
    """

    rows: int = 0
    kept: int = 0
    bad: int = 0
    too_long: int = 0
    unranked: int = 0
    joined: int = 0
    pairs: int = 0
    singles: int = 0
    undesirable: int = 0
    templated: int = 0
    texts: int = 0
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, dict[str, float]] = field(default_factory=dict)
    template: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    date: str = ""
    cache: str = ""

    def add(self, kind: str, reason: str, *, file: str, line: int) -> None:
        """Count one row of a class, and remember the first few by name."""
        if kind not in KINDS:
            raise KeyError(f"{kind!r} is not in report.KINDS")
        self.counts[kind] = self.counts.get(kind, 0) + 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < EXAMPLES:
            examples.append(f"{clean(file, 400)}:{line}: {clean(reason)}")

    def count_cut(self, kind: str, tokens: int) -> None:
        """Count tokens that a row of a class has lost."""
        self.cut[kind] = self.cut.get(kind, 0) + tokens

    def drop(self, kind: str, reason: str, *, file: str, line: int) -> None:
        """Count one row that is left out, for a reason that makes it bad, too long, or without preference."""
        self.add(kind, reason, file=file, line=line)
        count = {BAD: "bad", TOO_LONG: "too_long", UNRANKED: "unranked"}[KINDS[kind]]
        setattr(self, count, getattr(self, count) + 1)

    def note(self, notes: Iterable[tuple[str, str]], *, file: str, line: int) -> None:
        """Count what is unusual about one row that is used."""
        for kind, reason in notes:
            self.add(kind, reason, file=file, line=line)

    def merge(self, part: "Report") -> None:
        """Take over what was counted of further rows, which come after those that were counted here."""
        rows = ("rows", "kept", "bad", "too_long", "unranked", "joined")
        for name in (*rows, "pairs", "singles", "undesirable", "templated", "texts"):
            setattr(self, name, getattr(self, name) + getattr(part, name))
        for kind, count in part.counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + count
            examples = self.examples.setdefault(kind, [])
            examples += part.examples[kind][: EXAMPLES - len(examples)]
        for kind, tokens in part.cut.items():
            self.count_cut(kind, tokens)

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> "Report":
        """What `to_dict` gave."""
        return cls(**table)

    def lines(self) -> list[str]:
        """The report as plain text."""
        share = f" ({self.bad / self.rows:.2%})" if self.bad else ""
        head = f"{self.rows:,} rows read: {self.kept:,} kept ({self._contents()}), {self.bad:,} bad{share}, "
        more = f", {self.unranked:,} without preference" if self.unranked else ""
        more += f", {self.joined:,} joined with others into ranked rows" if self.joined else ""
        lines = [f"{head}{self.too_long:,} left out as too long{more}"]
        for name, about in self.files.items():
            unused = f"; columns not used: {clean(', '.join(about['unused']))}" if about["unused"] else ""
            known = f"; known as {about['known']}" if "known" in about else ""
            layout = f"layout {about['layout'] or 'unknown'}"
            lines.append(f"{clean(name, 400)}: {about['rows']:,} rows, {layout}{known}{unused}")
        for effect in (BAD, TOO_LONG, UNRANKED, NOTED):
            for kind in sorted(self._of(effect), key=lambda kind: -self.counts[kind]):
                lines.append(f"{effect}: {kind}: {self.counts[kind]:,}")
                lines += [f"  {example}" for example in self.examples.get(kind, [])]
        for name, table in self.lengths.items():
            lines.append(f"tokens of {name}: " + ", ".join(f"{key} {value:,.0f}" for key, value in table.items()))
        lines += self._about_template() if self.template else []
        lines += [f"warning: {line}" for line in self.warnings()]
        return lines + ([f"cache: {self.cache}"] if self.cache else [])

    def _about_template(self) -> list[str]:
        """Which rows go through the model's chat template, with what; those that are texts or token ids do not."""
        of = f"{self.templated:,} of {self.kept:,} rows" if self.templated else "no row"
        lines = [
            f"chat template: sha256 {self.template[:12]}, used for {'all rows' if self.templated == self.kept else of}"
        ]
        if self.templated and self.arguments:
            given = clean(", ".join(f"{name}={value!r}" for name, value in self.arguments.items()))
            lines.append(f"chat template arguments: {given}; give the same wherever the model is asked")
        if self.templated and self.date:
            lines.append(f"chat template date: where it writes the day, it writes {self.date}")
        return lines

    def warnings(self) -> list[str]:
        """What is wrong with the whole: texts where a model knows turns, one kind alone of what labels tell apart."""
        lines = []
        if self.texts and self.template:
            lines.append(
                f"{self.texts:,} of {self.kept:,} rows are texts without the turns that this model knows; "
                "data.as_chat=true makes turns of them"
            )
        told = any(about["layout"] == "unpaired" for about in self.files.values())
        if not told or self.pairs or self.undesirable not in (0, self.singles) or not self.singles:
            return lines
        kind, other = ("undesirable", "desirable") if self.undesirable else ("desirable", "undesirable")
        return [*lines, f"all {self.singles:,} completions are {kind}; an objective of labels wants some {other} ones"]

    def _contents(self) -> str:
        """What the rows that are kept hold."""
        parts = [f"{self.pairs:,} pairs"] if self.pairs or not self.singles else []
        parts += [f"{self.singles:,} single completions"] if self.singles else []
        return ", ".join(parts) + (f", {self.undesirable:,} of them undesirable" if self.undesirable else "")

    def _of(self, effect: str) -> list[str]:
        return [kind for kind in self.counts if KINDS[kind] == effect]

    def check(self, max_bad_fraction: float | None) -> None:
        """Refuse data with too many bad rows (None: with any), or with none that is left.

        Raises:
          UserError: one line with the largest classes and a row of each.
        """
        self._check_prompts()
        self._check_bad(max_bad_fraction)
        for name, about in self.files.items():
            if 2 * about.get("as_text", 0) > about["rows"] - about.get("joined", 0):
                raise UserError(
                    f"{clean(name, 400)}: {about['as_text']:,} of {about['rows']:,} rows hold texts that a chat "
                    "template rendered already, whose marks would be plain text; set data.control_tokens=tokens to "
                    "take them as they are, or give messages"
                )
        if not self.kept:
            where = ", ".join(clean(name, 400) for name in self.files) or "the data"
            what = self._largest(BAD, TOO_LONG, UNRANKED) if self.rows else "there are no rows"
            remedy = "raise data.max_length" if self.too_long > self.bad else "give at least one usable row"
            if self.unranked > self.bad + self.too_long:
                remedy = "give answers to one prompt in rows that follow each other, with ranks or scores that differ"
            raise UserError(f"0 rows left of {self.rows:,} in {where}: {what}; {remedy}")

        for kind, consequence in WHOLLY.items():
            if self.counts.get(kind, 0) >= self.rows - self.bad - self.unranked - self.joined > 0:
                raise UserError(f"all rows, as {self.examples[kind][0]}: {consequence}")

    def _check_bad(self, max_bad_fraction: float | None) -> None:
        """Refuse too many bad rows."""
        if not self.rows or self.bad / self.rows <= (max_bad_fraction or 0.0):
            return
        bad, share = f"{self.bad:,} of {self.rows:,} rows are bad", f"{self.bad / self.rows:.2%}"
        if max_bad_fraction is None:
            raise UserError(f"{bad}: {self._largest(BAD)}; correct the rows, or leave them out")
        raise UserError(
            f"{bad} ({share}, data.max_bad_fraction is {max_bad_fraction:.2%}): {self._largest(BAD)}; correct the rows "
            "or raise data.max_bad_fraction"
        )

    def _check_prompts(self) -> None:
        """Refuse data of a detected layout most of whose prompts are empty: the prompts must stand somewhere else."""
        empty = [kind for kind in (NO_PROMPT, "empty prompt") if self.counts.get(kind)]
        count = sum(self.counts[kind] for kind in empty)
        if 2 * count > self.rows - self.unranked - self.joined and any(
            about.get("detected") for about in self.files.values()
        ):
            raise UserError(
                f"{count:,} of {self.rows:,} prompts are empty (first: {self.examples[empty[0]][0]}); name the "
                "prompt's column with data.columns={prompt: COLUMN}, or, if they are to be so, set data.layout"
            )

    def _largest(self, *effects: str) -> str:
        kinds = [kind for effect in effects for kind in self._of(effect)]
        kinds = sorted(kinds, key=lambda kind: -self.counts[kind])
        shown = [f"{self.counts[kind]:,} {kind} (first: {self.examples[kind][0]})" for kind in kinds[:4]]
        return "; ".join(shown + [f"{self.counts[kind]:,} {kind}" for kind in kinds[4:]])
