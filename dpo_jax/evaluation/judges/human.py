"""People as a judge: a page at a time on a terminal, without a word of who wrote what.

Which answer stands where is drawn from the seed and the contest, so it is the same when the page is seen again. Each
key is kept at once; a page that was answered is never shown again.
"""

import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.evaluation.chat import visible
from dpo_jax.evaluation.judges.asking import conversation
from dpo_jax.evaluation.judging import FIRST, SECOND, TIE, Contest, Verdict
from dpo_jax.evaluation.ledger import Ledger
from dpo_jax.files import digest_of

KEYS = {"a": FIRST, "b": SECOND, "t": TIE}
STOPS = ("q", "")
"""Stop: the key, and the end of the input."""


class HumanJudge:
    """Asks whoever sits at the terminal."""

    name = "human"

    def __init__(
        self,
        ledger: Ledger,
        *,
        seed: int = 0,
        read: Callable[[str], str] | None = None,
        show: Callable[[str], Any] = print,
    ):
        """Pages that the ledger has are not shown again; `read(prompt)` gives a key, and "" at the end of the input."""
        self._ledger, self._seed, self._read, self._show = ledger, seed, read or _key, show
        self._said = {row["contest"]: row["end"] for row in ledger.rows}

    def compare(self, contests: Sequence[Contest]) -> list[Verdict]:
        """What was said of each contest. People see each in one order, so both orders of a verdict are the same.

        Raises:
          UserError: the person stopped; what was said is kept, and the same command goes on.
        """
        keys = [digest_of("\0".join((conversation(one.asked.prompt), *one.answers))) for one in contests]
        missing = {key: one for key, one in zip(keys, contests, strict=True) if key not in self._said}
        for number, (key, contest) in enumerate(missing.items(), 1):
            self._ask(key, contest, f"{number} of {len(missing)}")
        return [Verdict(self._said[key], self._said[key]) for key in keys]

    def _ask(self, key: str, contest: Contest, place: str) -> None:
        swapped = random.Random(f"{self._seed} {key}").random() < 0.5
        one, other = reversed(contest.answers) if swapped else contest.answers
        rule = "-" * 72
        pages = (f"\n{rule}\n{place}", conversation(contest.asked.prompt), f"{rule}\nA", one, f"{rule}\nB", other, rule)
        for text in pages:
            self._show(visible(text))
        while (said := self._read("better: a, b, t(ie); q to stop > ").strip().lower()[:1]) not in KEYS:
            if said in STOPS:
                raise UserError("human: stopped; what was said is kept, and the same command goes on from there")
        end = 1 - KEYS[said] if swapped else KEYS[said]
        self._ledger.add({"contest": key, "end": end, "swapped": swapped})
        self._said[key] = end


def _key(prompt: str) -> str:
    """A key of the keyboard, or the first of a line where the input is no terminal; "" at its end."""
    print(prompt, end="", flush=True)
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line if not line or line.strip() else "?"
    import termios
    import tty

    handle = sys.stdin.fileno()
    before = termios.tcgetattr(handle)
    try:
        tty.setcbreak(handle)
        pressed = sys.stdin.read(1)
    finally:
        termios.tcsetattr(handle, termios.TCSADRAIN, before)
    print(visible(pressed))
    return "q" if pressed == "\x04" else pressed if pressed.strip() else "?"
