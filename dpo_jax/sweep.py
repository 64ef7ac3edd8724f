"""`python -m dpo_jax.sweep CONFIG key=a,b,... [key=value ...]`: a run for each combination of values, and a table.

    python -m dpo_jax.sweep configs/quickstart.yaml objective.beta=0.05,0.1,0.3 optimizer.learning_rate=2e-5,5e-5

Each run is an ordinary one, in a folder of its own below `output`, which says its values: OUTPUT/beta=0.05,... The runs
share tokenised data and reference log-probabilities. The same command again goes on where it stopped.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_jax.config import command as commands
from dpo_jax.config import run as config
from dpo_jax.errors import COMMAND_LINE, UserError

if TYPE_CHECKING:
    from dpo_jax.run.sweeping import Axis, PointResult

OPTIONS = (
    "  key=a,b,...    a setting with several values; one run for each combination of them",
    "  --jobs N       runs side by side, each on its share of the GPUs (default 1: one after the other)",
    "  --metric NAME  what the table is sorted by, as metrics.jsonl has it (default: checkpoint.best, but no loss or",
    "                 margin of different objectives; else the first there is of win rate, pass rate and held-out",
    "                 accuracy)",
)


@commands.command
def main(argv: Sequence[str]) -> int:
    """Check the settings of every run, then train them; 0 if all are done, 1 if one failed, 75 if one was stopped."""
    words, options = _options(argv)
    if not words or words[0] in ("-h", "--help"):
        config.load(["--help"], "sweep", options=OPTIONS)
    from dpo_jax.run import sweeping

    sweeping.check_metric(options.get("metric"))
    axes, rest = sweeping.axes_of(words)
    run = sweeping.check(axes, rest)
    folder = Path(run.output)
    sweeping.check_folder(folder)
    points = sweeping.points_of(axes, rest, folder, run.data.cache or str(folder / "cache"))
    jobs = _jobs(options.get("jobs", "1"), len(points))
    devices = sweeping.shares(jobs, os.environ)
    folder.mkdir(parents=True, exist_ok=True)
    sweeping.record(folder, run, axes, [], None)
    codes = sweeping.run_all(points, devices, _say)
    results = [sweeping.result_of(point, codes[point.name]) for point in points]
    metric = sweeping.metric_for(results, options.get("metric"), sweeping.metric_of_best(run, axes))
    results = sweeping.ranked(results, metric)
    sweeping.record(folder, run, axes, results, metric)
    _show(sweeping.table(axes, results, metric), metric)
    print(f"the record is in {folder / sweeping.RECORD}{_page(folder, axes, results)}")
    ended = set(codes.values())
    return 0 if ended == {0} else 75 if ended <= {0, 75, 130} else 1


def _options(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The words of settings, and the values of `--jobs` and `--metric`."""
    words, options, rest = [], {}, list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name in ("jobs", "metric"):
            if not equals and not rest:
                raise UserError(f"{COMMAND_LINE}: --{name}: its value is missing; write --{name} VALUE")
            options[name] = value if equals else rest.pop(0)
        else:
            words.append(word)
    return words, options


def _jobs(text: str, most: int) -> int:
    if not text.isdigit() or not 1 <= int(text):
        raise UserError(f"{COMMAND_LINE}: --jobs {text[:40]}: must be a whole number of at least 1")
    return min(int(text), most)


def _page(folder: Path, axes: "Sequence[Axis]", results: "Sequence[PointResult]") -> str:
    """Draw the page that compares the runs, if any has learned something, and say where it is."""
    from dpo_jax.page.render import PAGE, write_comparison

    runs = [result.point for result in results if result.metrics]
    if not runs:
        return ""
    title, names = f"Sweep of {', '.join(axis.key for axis in axes)}", [point.name for point in runs]
    page = write_comparison([point.folder for point in runs], folder / PAGE, title=title, names=names)
    return f", the page in {page}"


def _say(line: str) -> None:
    print(line, flush=True)


def _show(rows: Sequence[Sequence[str]], metric: str | None) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"sorted by {metric}, the best first" if metric else "in the order in which they were given")
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
