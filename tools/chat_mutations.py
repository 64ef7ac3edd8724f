"""Rows in many shapes against the chat templates of many families: what dpo_jax makes of them, next to transformers.

    python tools/chat_mutations.py CHAT_TEMPLATES configs/quickstart/model [--rows 3000] [--seed 0]

CHAT_TEMPLATES is a folder of Jinja files by the names that trl gives them (`trl/chat_templates`). Each row is made of
words that come once each; its token ids must be those of `apply_chat_template` for the conversations that it means, or
the row is refused, or the difference is a choice that is documented. What the template leaves out must have been said,
and only the words of the answer may be scored. A table, with the number of rows that are equal/refused/a choice/other
for each kind and family, then the choices and the reasons of refusals, then the first of each kind of other. Exit
code 1 if there is any other.
"""

import argparse
import random
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dpo_jax.data.probes import renderer  # noqa: E402
from tools.mutating.compare import CHOICE, EQUAL, OTHER, REFUSED, Outcome, compare  # noqa: E402
from tools.mutating.families import FAMILIES, tokenizer_of  # noqa: E402
from tools.mutating.rows import KINDS, Words  # noqa: E402

VERDICTS = (EQUAL, REFUSED, CHOICE, OTHER)


class Tally:
    """Counts of outcomes by kind and family, and why."""

    def __init__(self):
        """Nothing is counted yet."""
        self.counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        self.reasons: dict[str, Counter[str]] = defaultdict(Counter)
        self.others: dict[tuple[str, str], str] = {}

    def add(self, kind: str, family: str, outcome: Outcome) -> None:
        """Count one row."""
        self.counts[kind, family][outcome.verdict] += 1
        if outcome.verdict == OTHER:
            self.others.setdefault((kind, family), outcome.detail)
        elif outcome.detail:
            self.reasons[f"{outcome.verdict}: {outcome.detail}"][kind] += 1

    def total(self, kind: str | None = None, family: str | None = None) -> Counter[str]:
        """Counts of a kind, of a family, or of all."""
        found: Counter[str] = Counter()
        for (one, other), counts in self.counts.items():
            if kind in (None, one) and family in (None, other):
                found += counts
        return found

    def lines(self) -> list[str]:
        """The table and what belongs to it."""
        families = list(dict.fromkeys(family for _, family in self.counts))
        kinds = list(dict.fromkeys(kind for kind, _ in self.counts))
        lines = [f"{'equal/refused/choice/other':<26}" + "".join(f"{name[:11]:>12}" for name in [*families, "all"])]
        for kind in [*kinds, None]:
            cells = [_cell(self.total(kind, family)) for family in [*families, None]]
            lines.append(f"{kind or 'all':<26}" + "".join(f"{cell:>12}" for cell in cells))
        for reason, by_kind in sorted(self.reasons.items()):
            shown = ", ".join(f"{kind} {count}" for kind, count in by_kind.most_common())
            lines.append(f"{reason}: {by_kind.total()} ({shown})")
        return lines + [f"other: {kind}, {family}: {detail}" for (kind, family), detail in self.others.items()]


def _cell(counts: Counter[str]) -> str:
    return "/".join(str(counts[verdict]) for verdict in VERDICTS)


def run(tokenizers: dict[str, Any], *, rows: int, seed: int, kinds: Sequence[str] = tuple(KINDS)) -> Tally:
    """Rows of each kind in turn for each family in turn, until there are so many."""
    tally = Tally()
    cells = [(kind, family) for kind in kinds for family in tokenizers]
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rows):
            kind, family = cells[number % len(cells)]
            words = Words(random.Random(f"{seed} {number}"))
            tokenizer = tokenizers[family]
            case = KINDS[kind](words, renderer(tokenizer, None, {}))
            tally.add(kind, family, compare(case, tokenizer, Path(folder)))
    return tally


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("templates", type=Path, help="folder of chat templates")
    parser.add_argument("base", type=Path, help="folder of a byte-level tokenizer")
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    tokenizers = {
        name: tokenizer_of(family, options.templates, options.base)
        for name, family in FAMILIES.items()
        if (options.templates / f"{family.template}.jinja").is_file()
    }
    tally = run(tokenizers, rows=options.rows, seed=options.seed)
    print("\n".join(tally.lines()))
    return 1 if tally.total()[OTHER] else 0


if __name__ == "__main__":
    sys.exit(main())
