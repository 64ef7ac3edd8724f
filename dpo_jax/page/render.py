"""The page of a run, and a page that compares runs: one file each, without scripts, that needs no network."""

import functools
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import dpo_jax
from dpo_jax.errors import UserError, redacted
from dpo_jax.files import write_whole
from dpo_jax.page import answers, evidence, panels, sections, serving, summary, tables
from dpo_jax.page.drawing import Line, Plot, draw
from dpo_jax.page.folder import RunFolder, lines_of, read
from dpo_jax.page.texts import count, number, visible

PAGE = "report.html"
"""The page in the folder of its run."""
MARK = b'content="dpo_jax '
"""What a page of ours has near its beginning: only such a file is written over."""


def write_page(folder: Path | str) -> Path:
    """Draw the page of a run in its folder; returns its path.

    Raises:
      UserError: the folder is no run's.
    """
    path = Path(folder) / PAGE
    write_whole(path, page_of(read(folder)))
    return path


def write_comparison(
    folders: Sequence[Path | str],
    path: Path | str,
    *,
    title: str = "Runs compared",
    names: Sequence[str] | None = None,
) -> Path:
    """Draw a page that compares runs, in the order in which they are given; returns its path.

    Args:
      folders: of the runs.
      path: the file to write.
      title: of the page.
      names: what the runs are called; their folders' names where none are given.

    Raises:
      UserError: a folder is no run's, or something else stands at `path`.
    """
    path = Path(path)
    if path.is_dir() or (path.exists() and MARK not in path.read_bytes()[:2000]):
        raise UserError(f"{path}: is there and no page of runs; name another file")
    runs = [read(folder) for folder in folders]
    write_whole(path, page_of_runs(runs, title=title, names=names))
    return path


def page_of(run: RunFolder) -> str:
    """The page of a run, as HTML."""
    figures, histograms = panels.plots(run), panels.histograms(run.rewards)
    found, health = summary.evidence(run), sections.health(run)
    parts = {
        "title": f"{run.name} - {sections.title_of(run)}",
        "run": run,
        "subtitle": sections.title_of(run),
        "status": sections.status(run),
        "written": sections.written_at(run),
        "verdict": evidence.verdict(
            found,
            finished=run.finished,
            measured=all(summary.measured(run)),
            seen=bool(lines_of(run, "shared")),
            alarms=health["alarms"],
        ),
        "evidence": found,
        "results": summary.results(run),
        "what": sections.what(run),
        "health": health,
        "figures": _drawn(figures, 0),
        "thinned": any(part.curve.is_thinned for plot in figures for part in plot.parts if isinstance(part, Line)),
        "histograms": _drawn(histograms, len(figures)),
        "answers": answers.table(run),
        "differing": sections.differing(run) if run.settings else [],
        "every": sections.every(run),
        "data": sections.data_tables(run),
        "warnings": lines_of(run, "shared") + lines_of(run, "warnings"),
        "costs": sections.costs(run),
        "origin": sections.origin(run),
        "uses": serving.uses(run),
    }
    anchors = (("curves", "figures"), ("rewards", "histograms"), ("answers", "answers"), ("health", "health"))
    anchors += (("settings", "every"), ("data", "run"), ("costs", "run"), ("origin", "run"), ("use", "uses"))
    names = {"costs": "time and memory", "origin": "where it comes from", "use": "use it"}
    parts["sections"] = [(anchor, names.get(anchor, anchor)) for anchor, key in anchors if parts[key]]
    return _template("run.html.jinja").render(parts)


def page_of_runs(runs: Sequence[RunFolder], *, title: str, names: Sequence[str] | None = None) -> str:
    """A page that compares runs, as HTML."""
    names = _told_apart(runs) if names is None else list(names)
    plots = panels.compared(runs, names)
    keys = [_key(number) for number in range(len(runs))]
    parts = {
        "title": title,
        "runs": [
            (name, sections.title_of(run), sections.status(run), key)
            for name, run, key in zip(names, runs, keys, strict=True)
        ],
        "tables": [
            ("Settings that differ", tables.settings(runs, names)),
            ("Last values", tables.metrics(runs, names)),
        ],
        "figures": _drawn(plots, 0),
    }
    return _template("runs.html.jinja").render(parts)


def _told_apart(runs: Sequence[RunFolder]) -> list[str]:
    """The folders' names; where two are the same, with the folders that they are in."""
    names = [run.name for run in runs]
    return [
        name if names.count(name) == 1 else "/".join(run.path.resolve().parts[-2:])
        for name, run in zip(names, runs, strict=True)
    ]


def _key(run: int) -> Any:
    """The line by which a run is drawn."""
    from markupsafe import Markup

    colour, dash = panels.PALETTE[run % len(panels.PALETTE)], ("", "7 3", "2 2")[run // len(panels.PALETTE) % 3]
    line = f'style="stroke: var(--{colour}); stroke-width: 3; stroke-dasharray: {dash or "none"}"'
    return Markup(
        f'<svg width="22" height="10" viewBox="0 0 22 10" aria-hidden="true"><path d="M1 5H21" {line}/></svg>'
    )


def _drawn(plots: Sequence[Plot], before: int) -> list[tuple[Plot, Any]]:
    from markupsafe import Markup

    return [(plot, Markup(draw(plot, before + place))) for place, plot in enumerate(plots)]


@functools.cache
def _environment() -> Any:
    """Templates in which whatever is filled in is text: without secrets, visible, escaped."""
    import jinja2
    from markupsafe import Markup

    def shown(value: object) -> Any:
        return value if isinstance(value, Markup) else visible(redacted(str(value)))

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: resources.files("dpo_jax.page").joinpath(name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=shown,
        trim_blocks=True,
    )
    environment.filters |= {"thousands": count, "figures": number}
    style = resources.files("dpo_jax.page").joinpath("style.css").read_text("utf-8")
    environment.globals |= {"style": Markup(style), "version": dpo_jax.__version__}
    return environment


def _template(name: str) -> Any:
    return _environment().get_template(name)
