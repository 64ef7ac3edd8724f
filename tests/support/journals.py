"""Journals of runs that were never made."""

import io

from rich.console import Console

from dpo_jax.reporting.journal import UNKNOWN, Background, Journal
from dpo_jax.reporting.settings import LogSettings

FILE_ONLY = LogSettings(tensorboard=False)


def metrics(step: int) -> dict[str, float]:
    return {"loss": 0.7 / step, "rewards/accuracies": 0.5, "rewards/margins": -0.25, "num_tokens": 10 * step}


def terminal(width: int = 80, **options) -> Console:
    return Console(file=io.StringIO(), width=width, color_system=None, **options)


def run(
    folder,
    steps: range,
    resume_step: int = -1,
    log: LogSettings = FILE_ONLY,
    console: Console | None = None,
    background: Background = UNKNOWN,
):
    """Steps of a run of 20, with an evaluation at the start and after every fifth."""
    with Journal(folder, 20, log, resume_step, console=console or terminal(), background=background) as book:
        if 1 in steps:
            book.evaluation(0, {"loss": 0.7})
        for step in steps:
            book.step(step, metrics(step))
            if step % 5 == 0:
                book.evaluation(step, {"loss": 0.1})
        if resume_step == 20:  # nothing is left but to measure, as for another dtype of the export
            book.evaluation(20, {"loss": 0.1})
    return (folder / "metrics.jsonl").read_bytes()
