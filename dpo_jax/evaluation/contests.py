"""Two models' answers to the same prompts, and what judges say of them; every answer and verdict is kept at once."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data.templates import Codec
from dpo_jax.evaluation.generate import Decoding, generate
from dpo_jax.evaluation.judging import Contest, Judge, Verdict
from dpo_jax.evaluation.ledger import Ledger
from dpo_jax.evaluation.statistics import Summary, summary
from dpo_jax.evaluation.winrate import Asked, Question, prompt_tokens, text_of
from dpo_jax.model.decoder import Model

AT_ONCE = 64
"""Prompts that are answered, and contests that are judged, before what was found is written down."""


class Answering(NamedTuple):
    """A model that answers, with its own tokenizer."""

    model: Model
    coder: Codec
    decoding: Decoding
    seed: int
    batch_size: int = 16


def answered(asked: Sequence[Asked | Question], ledger: Ledger, opened: Callable[[], Answering]) -> list[str]:
    """An answer to each prompt; those that the ledger has are not written again, and a model that has none to write is
    not opened."""
    if len(ledger.rows) < len(asked):
        speaker = opened()
        ids = [prompt_tokens(item.prompt, speaker.coder, item.where) for item in asked]
        while (start := len(ledger.rows)) < len(asked):
            end = start - start % AT_ONCE + AT_ONCE
            first = end - AT_ONCE
            # drawn anew for each stretch, which begins with the same prompts however often it is interrupted
            seed = int(np.random.SeedSequence([speaker.seed, first]).generate_state(1)[0])
            given = generate(
                speaker.model.spec,
                speaker.model.params,
                ids[first:end],
                speaker.decoding,
                seed=seed,
                batch_size=speaker.batch_size,
            )
            for item, answer in list(zip(asked[first:end], given, strict=True))[start - first :]:
                text = text_of(speaker.coder.tokenizer, answer.tokens)
                row = {"prompt": item.prompt, "answer": text, "finished": answer.finished}
                ledger.add({**row, "tokens": len(answer.written)})
    return [str(row["answer"]) for row in ledger.rows[: len(asked)]]


def judged(judge: Judge, contests: Sequence[Contest], ledger: Ledger) -> list[Verdict]:
    """A verdict for each contest; those that the ledger has are not asked for again."""
    while (start := len(ledger.rows)) < len(contests):
        stretch = contests[start : start + AT_ONCE]
        for contest, verdict in zip(stretch, judge.compare(stretch), strict=True):
            ledger.add(_row(contest, verdict))
    return [_verdict(row) for row in ledger.rows[: len(contests)]]


def _row(contest: Contest, verdict: Verdict) -> dict[str, Any]:
    ends = {"outcome": verdict.outcome, "shown": verdict.shown, "swapped": verdict.swapped}
    numbers = {name: None if math.isnan(end) else end for name, end in ends.items()}
    return {"where": contest.asked.where, **numbers, "reason": verdict.reason}


def _verdict(row: Mapping[str, Any]) -> Verdict:
    shown, swapped = (math.nan if row[name] is None else float(row[name]) for name in ("shown", "swapped"))
    return Verdict(shown, swapped, str(row["reason"]))


def contests_of(asked: Sequence[Asked | Question], one: Sequence[str], other: Sequence[str]) -> list[Contest]:
    """The contests of two models' answers."""
    return [Contest(item, pair) for item, pair in zip(asked, zip(one, other, strict=True), strict=True)]


def said_of(contests: Sequence[Contest], verdicts: Sequence[Verdict]) -> Summary:
    """What the verdicts of these contests add up to."""
    return summary(verdicts, [(len(contest.answers[0]), len(contest.answers[1])) for contest in contests])
