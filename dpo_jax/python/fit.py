"""`fit`: the command `python -m dpo_jax.train` as a function. It makes the same run, and trains it in the same way."""

import contextlib
import inspect
import json
import os
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.config import keywords
from dpo_jax.config.run import Run
from dpo_jax.errors import short
from dpo_jax.objectives.rows import Objective
from dpo_jax.python import rows
from dpo_jax.python.result import Result
from dpo_jax.python.silence import aloud, silent
from dpo_jax.python.wording import in_python

ARGUMENTS = {"data.train": "train", "data.eval": "evaluate", "model.path": "model"}
"""Settings that are arguments here."""
CALLBACK = re.compile("(.*_)?callbacks?|on_(log|step_end|evaluate|eval)")
"""What others call the arguments `on_step` and `on_evaluation`."""
STEP_LINES = 12
"""Steps that are shown while a run goes on, where lines are."""
OnRecord = Callable[[int, dict[str, float]], object]


def fit(
    model: object = None,
    *,
    train: object = None,
    evaluate: object = None,
    config: str | os.PathLike | Sequence[str | os.PathLike] = (),
    on_step: OnRecord | None = None,
    on_evaluation: OnRecord | None = None,
    verbose: bool = True,
    **settings: Any,
) -> Result:
    """Train a model on preferences: the run of the command line, with the same settings, checks, files and bits.

        result = fit(
            "Qwen/Qwen3-0.6B", train=rows, evaluate=held_out, output="runs/first",
            objective="sigmoid", beta=0.1, steps=20, optimizer={"learning_rate": 5e-6},
        )

    Calling it again with the same arguments goes on where it stopped, or returns what is there if it is finished.

    Args:
      model: folder or hub id of the model.
      train: preferences: a file, a folder, a hub data set, several of them; or rows in memory (dicts, a
        `datasets.Dataset`, an iterator, or lists by column), in any layout that a file may have. Rows are kept in
        `output/rows`, so that the run can be had again.
      evaluate: held-out preferences in the same forms, or several such sets by name.
      config: YAML files that are read first.
      on_step: called as `on_step(step, metrics)` after each step, a step late, as metrics come from the device then.
        What it raises ends the run, which can be gone on with, and is raised here. A finished run calls nobody.
      on_evaluation: called as `on_evaluation(step, metrics)` after each evaluation; so is what this raises.
      verbose: whether to print what the command prints; False prints nothing. Other threads are heard all the same.
      **settings: every setting of `python -m dpo_jax.train --help`: a section as a mapping
        (`optimizer={"learning_rate": 1e-5}`), or a setting by the last part of its name where no other ends so
        (`beta=0.1`). `output`, the folder of everything that the run writes, is needed.

    Returns:
      What came of it, read from the folder.

    Raises:
      UserError: a ValueError with a line for each thing that is wrong.
      KeyboardInterrupt: Ctrl-C, or a notebook's stop button. The run has been saved.
    """
    files = [config] if isinstance(config, str | os.PathLike) else config
    problems = _problems_of_calls({"on_step": on_step, "on_evaluation": on_evaluation})
    with contextlib.ExitStack() as stack:
        stack.enter_context(in_python(ARGUMENTS))
        run = _run_of(model, (train, evaluate), [os.fspath(file) for file in files], settings, problems)
        told = [_told(call) for call in (on_step, on_evaluation)]
        if not verbose:
            stack.enter_context(silent())
        stack.enter_context(_restored())
        code = _train(run, (train, evaluate), told)
    if code:  # stopped by a signal, which is for whoever listens to it outside, now that the run is saved
        signal.raise_signal(signal.SIGINT if code == 130 else signal.SIGTERM)
        if code == 130:  # nobody does, as in a script that runs in the background
            raise KeyboardInterrupt
    return Result(run.output)


def _problems_of_calls(calls: Mapping[str, object]) -> list[str]:
    """What is wrong with the caller's functions, by the name of their argument."""
    return [
        f"fit: {name}: {problem}; give a function, to be called as {name}(step, metrics)"
        for name, call in calls.items()
        if call is not None and (problem := _problem_of_call(call))
    ]


def _problem_of_call(call: object) -> str | None:
    if not callable(call):
        return f"is of type {type(call).__name__}"
    with contextlib.suppress(ValueError):  # some of C say nothing of their arguments
        try:
            inspect.signature(call).bind(0, {})
        except TypeError as error:
            return f"cannot be called with two arguments ({error})"
    return None


def _run_of(
    model: object, data: tuple[Any, Any], files: Sequence[str], given: Mapping[str, Any], problems: Sequence[str] = ()
) -> Run:
    """The run of all arguments; rows are not read before everything else is right."""
    (train, evaluate), problems, given = data, list(problems), dict(given)
    for name in [name for name in given if CALLBACK.fullmatch(name)]:
        given.pop(name)
        problems.append(f"fit: {short(name)}: no such argument; give functions to on_step= and on_evaluation=")
    if (what := _function_in(given.get("objective", given.get("objective.name")))) is not None:
        given = {name: value for name, value in given.items() if not name.startswith("objective")}
        problems.append(
            f"fit: objective: {what} is no name; give it one by a row of the table, OBJECTIVES[NAME] = Objective(...) "
            "of dpo_jax.objectives.table, and then objective=NAME: see configs/notebooks/your_own_objective.ipynb"
        )
    if model is not None:
        given["model"] = model
    if not isinstance(model, str | os.PathLike | Mapping | None):
        given["model"] = type(model).__name__
        problems.append(
            f"fit: model: is of type {type(model).__name__}; give a folder or hub id: dpo_jax.save_hf, or "
            "save_pretrained of transformers (of the tokenizer too), makes a folder"
        )
    if train is not None:
        given["data.train"] = _named(train)
    if evaluate is not None:
        sets = {name: _named(inner) for name, inner in _sets(evaluate).items()}
        given["data.eval"] = sets.get("", sets)
    return keywords.run_of(given, files, origin="fit", problems=problems)


def _function_in(objective: object) -> str | None:
    """A function, or a row of one, in the place of an objective's name, in words; None where there is none."""
    if isinstance(objective, list | tuple):
        return next(filter(None, map(_function_in, objective)), None)
    if isinstance(objective, Mapping):
        return _function_in(objective.get("name"))
    if isinstance(objective, Objective):
        return "a row"
    return f"the function {short(getattr(objective, '__name__', 'given'))}" if callable(objective) else None


def _told(call: OnRecord | None) -> OnRecord | None:
    """The caller's function, whose prints are seen."""
    if call is None:
        return None

    def told(step: int, metrics: dict[str, float]) -> None:
        with aloud():
            call(step, metrics)

    return told


def _restored() -> contextlib.AbstractContextManager[None]:
    from dpo_jax.python.restoring import restored

    return restored()


def _train(run: Run, data: tuple[Any, Any], calls: Sequence[OnRecord | None]) -> int:
    from dpo_jax.run import output
    from dpo_jax.run.recorder import Listener
    from dpo_jax.train import train

    left: dict[str, str] = {}
    if any(map(rows.are_rows, (data[0], *_sets(data[1]).values()))):
        with output.opened(run) as folder:
            run = _with_rows(run, *data, folder, left)
    with rows.explained(left):
        return train(run, Listener(*calls, lines=STEP_LINES))


# ---------------------------------------------------------------------------------------------- rows


def _sets(source: object) -> dict[str, Any]:
    """Held-out data by the name of the set; "" is the only one."""
    return {str(name): inner for name, inner in source.items()} if isinstance(source, Mapping) else {"": source}


def _named(source: object) -> Any:
    """What is given as paths, with a name in the place of rows."""
    return "rows" if rows.are_rows(source) else source


def _with_rows(run: Run, train: object, evaluate: object, folder: Path, left: dict[str, str]) -> Run:
    """The run over files of the rows, in its folder; files of other rows that no run names any more are removed."""
    from dpo_jax.run import output

    place = folder / output.ROWS
    found: dict[str, Any] = {}
    if rows.are_rows(train):
        found["train"] = str(rows.keep(train, place, "train", left))
    kept = {
        name: str(rows.keep(inner, place, f"evaluate-{name}".rstrip("-"), left))
        for name, inner in _sets(evaluate).items()
        if rows.are_rows(inner)
    }
    if kept:
        found["eval"] = {**run.data.eval_sets, **kept} if "" not in kept else kept[""]
    named = json.dumps([found, output.recorded(folder).get("settings", {}).get("data", {})])
    for file in place.glob("*.jsonl"):
        if file.name not in named:
            file.unlink()
    return run.model_copy(update={"data": run.data.model_copy(update=found)})
