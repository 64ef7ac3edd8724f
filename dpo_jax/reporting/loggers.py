"""Where else metrics go: TensorBoard, and services that people know runs by. None of them can end a run.

Keys come from the environment, or from where the service's own login has left them: none is asked for, read or kept.
"""

import importlib
import math
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from dpo_jax.errors import UserError, one_line
from dpo_jax.reporting.seen import SeenEvaluation

SHOWN, LONGEST = 16, 2000
"""Answers of an evaluation that are sent as texts, and characters of each."""


@runtime_checkable
class Logger(Protocol):
    """Somewhere metrics go."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take over the metrics of a step; more of the same step may follow."""

    def show(self, step: int, seen: SeenEvaluation) -> None:
        """Take over what an evaluation has left beside its metrics."""

    def close(self) -> None:
        """Finish."""


class About(NamedTuple):
    """What a logger is told of a run.

    Attributes:
      project: that it belongs to.
      name: its own.
      tags: it is found by.
      settings: by name, as plain values.
      folder: its output.
      resumes: whether it goes on.
    """

    project: str
    name: str
    tags: tuple[str, ...]
    settings: Mapping[str, Any]
    folder: Path
    resumes: bool

    def known(self, service: str) -> str | None:
        """What the service knows the run by, if the run goes on and was there before."""
        try:
            return (self.folder / f"{service}_run").read_text() if self.resumes else None
        except OSError:
            return None

    def remember(self, service: str, run: str) -> None:
        """Keep what the service knows the run by."""
        (self.folder / f"{service}_run").write_text(run)


class TensorBoard:
    """Event files beside `metrics.jsonl`; a resumed run hides the events of the steps that it repeats."""

    def __init__(self, folder: Path, resume_step: int):
        """Write into `folder/tensorboard`."""
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2 as events

        event, log = (getattr(events, name) for name in ("Event", "SessionLog"))
        self._event, self._summary, first = event, summary, resume_step + 1
        (folder / "tensorboard").mkdir(exist_ok=True)
        # not its SummaryWriter, whose thread has nobody to tell that a disk is full; and with a suffix, since two files
        # that begin in the same second would be one, and the older one lost
        self._writer = EventsWriter(str(folder / "tensorboard" / "events"), filename_suffix=f".{first}")
        self._writer.write_event(event(wall_time=time.time(), step=first, session_log=log(status=log.START)))

    def _add(self, step: int, summary: object) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the finite metrics as scalars."""
        for name, value in finite(metrics).items():
            self._add(step, self._summary.scalar(name, value))
        self._writer.flush()

    def show(self, step: int, seen: SeenEvaluation) -> None:
        """Add answers as texts and rewards as histograms."""
        for number, row in enumerate(seen.answers[:SHOWN]):
            self._add(step, self._summary.text(f"answers/{number}", as_markdown(row)))
        for name, values in seen.rewards.items():
            self._add(step, self._summary.histogram(name, values, "auto"))
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class Wandb:
    """Weights & Biases. A run that goes on has the id that it had."""

    def __init__(self, about: About):
        """Begin a run, or go on with it."""
        self._module = _module("wandb")
        run = about.known("wandb") or uuid.uuid4().hex[:12]
        about.remember("wandb", run)
        # without a key it asks for one on a terminal, and would wait for ever
        self._module.setup(settings=self._module.Settings(login_timeout=1))
        begun = self._module.init(
            project=about.project,
            name=about.name,
            id=run,
            tags=list(about.tags),
            config=dict(about.settings),
            dir=str(about.folder),
            resume="allow",
            allow_val_change=True,  # a run that goes on may have more steps
        )
        if begun.disabled:
            raise RuntimeError(
                "it has no key; set WANDB_API_KEY, or WANDB_MODE=offline, or give the command wandb login"
            )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the finite metrics."""
        self._module.log(finite(metrics), step=step)

    def show(self, step: int, seen: SeenEvaluation) -> None:
        """Send answers as a table, and rewards as histograms."""
        found = {name: self._module.Histogram(values) for name, values in seen.rewards.items()}
        if seen.answers:
            found["answers"] = self._module.Table(columns=list(COLUMNS), data=cells(seen))
        if found:
            self._module.log(found, step=step)

    def close(self) -> None:
        """End the run."""
        self._module.finish()


class Trackio(Wandb):
    """trackio, which has wandb's functions, and knows a run by its name."""

    def __init__(self, about: About):
        """Begin a run, or go on with it."""
        self._module = _module("trackio")
        run = about.known("trackio") or f"{about.name}-{uuid.uuid4().hex[:6]}"
        about.remember("trackio", run)
        config = {**about.settings, **({"tags": list(about.tags)} if about.tags else {})}
        self._module.init(project=about.project, name=run, config=config, resume="allow", embed=False)


class MLflow:
    """MLflow: at MLFLOW_TRACKING_URI, or where it keeps runs by itself."""

    def __init__(self, about: About):
        """Begin a run, or go on with it; what a run was begun with cannot be changed there."""
        self._module = _module("mlflow")
        self._module.set_experiment(about.project)
        known = about.known("mlflow")
        if known is not None:
            self._module.start_run(run_id=known)
            return
        begun = self._module.start_run(run_name=about.name, tags=dict.fromkeys(about.tags, "true"))
        about.remember("mlflow", begun.info.run_id)
        self._module.log_params({name: str(value)[:LONGEST] for name, value in about.settings.items()})

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the finite metrics."""
        self._module.log_metrics(finite(metrics), step=step)

    def show(self, step: int, seen: SeenEvaluation) -> None:
        """Send the file of answers."""
        if seen.file is not None:
            self._module.log_artifact(str(seen.file), "answers")

    def close(self) -> None:
        """End the run."""
        self._module.end_run()


SERVICES: dict[str, Callable[[About], Logger]] = {"wandb": Wandb, "trackio": Trackio, "mlflow": MLflow}
"""By their names in `log.loggers`, which are those of their packages."""
COLUMNS = ("prompt", "answer", "good")


def check(services: Iterable[str]) -> None:
    """Refuse services whose package is not there.

    Raises:
      UserError: names the first one.
    """
    for name in services:
        _module(name)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (name, None):
            raise
        raise UserError(f"log.loggers: {name}: is not installed; pip install {name}, or leave it out") from None


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that are numbers."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def cells(seen: SeenEvaluation) -> list[list[str]]:
    """The answers as a table of texts."""
    return [[_text(row.get(name)) for name in COLUMNS] for row in seen.answers[:SHOWN]]


def as_markdown(row: Mapping[str, Any]) -> str:
    """A question and its answer, each as a block of code, so that nothing in them is markup."""
    blocks = {name: "\n".join(f"    {line}" for line in _text(row.get(name)).splitlines()) for name in COLUMNS}
    return "\n\n".join(f"**{name}**\n\n{block}" for name, block in blocks.items())


def _text(value: object) -> str:
    """A prompt (a text, or turns), an answer or a mark as text; of control characters only line breaks stay."""
    if isinstance(value, list):
        turns = [turn if isinstance(turn, Mapping) else {"content": turn} for turn in value]
        value = "\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in turns)
    text = str(value)
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} ... {len(text) - LONGEST:,} characters more"
    return "\n".join("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in text.split("\n"))


class Guarded:
    """A logger that the run does not depend on: when it fails, it is left out from then on, with one warning."""

    def __init__(self, name: str, make: Callable[[], Logger], warn: Callable[[str], None]):
        """Make the logger. That its package is missing is an error at once, not a warning later."""
        self._name, self._warn = name, warn
        self._logger: Logger | None = None
        self._attempt(lambda: setattr(self, "_logger", make()))

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # a service may raise anything; a night of training must not end so
            self._logger = None
            self._warn(f"warning: {self._name} is switched off: {one_line(error)}")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write, if the logger still works."""
        if (logger := self._logger) is not None:
            self._attempt(lambda: logger.write(step, metrics))

    def show(self, step: int, seen: SeenEvaluation) -> None:
        """Show, if the logger still works."""
        if (logger := self._logger) is not None:
            self._attempt(lambda: logger.show(step, seen))

    def close(self) -> None:
        """Close, if the logger still works."""
        if (logger := self._logger) is not None:
            self._attempt(logger.close)
