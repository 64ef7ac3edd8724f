"""`fit` is the command: the same bits, the same going on; and it leaves the process as it found it."""

import json
import logging
import os
import re
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from dpo_jax import Result, fit, train
from dpo_jax.config import keywords
from dpo_jax.errors import UserError
from dpo_jax.files import file_digest
from dpo_jax.objectives.pairs import LossOutput
from dpo_jax.objectives.rows import Objective, Setting
from dpo_jax.objectives.table import OBJECTIVES
from dpo_jax.python.fit import _problems_of_calls
from dpo_jax.reporting.journal import read_records
from tests.conftest import ROOT
from tests.support.tiny_rows import write, yes_or_no
from tests.support.worlds import write_model

STEPS = 4
ROWS = yes_or_no(14)
SETTINGS = {
    "objective": "sigmoid",
    "beta": 0.2,
    "steps": STEPS,
    "batch": {"pairs": 4, "micro_tokens": 256},
    "max_length": 64,
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
    "log": {"every": 2},
    "evaluation.every": 2,
    "checkpoint.every": 1,
}
WORDS = [
    "objective.name=sigmoid",
    "objective.beta=0.2",
    f"steps={STEPS}",
    "batch={pairs: 4, micro_tokens: 256}",
    "data.max_length=64",
    "optimizer={learning_rate: 1e-3, warmup_steps: 0}",
    "log.every=2",
    "evaluation.every=2",
    "checkpoint.every=1",
]


class Enough(Exception):
    pass


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write_model(root / "model", num_hidden_layers=2)
    write(root / "train.jsonl", *ROWS[:10])
    write(root / "eval.jsonl", *ROWS[10:])
    return root


def fitted(world, output, rows=None, **more):
    given = {"train": ROWS[:10] if rows is None else rows, "evaluate": iter(ROWS[10:]), "output": output}
    return fit(world / "model", **(given | SETTINGS | more))


def state():
    """What a function must leave as it was."""
    names = [None, *("absl orbax jax datasets httpx httpx2 filelock asyncio transformers".split())]
    loggers = [logging.getLogger(name) for name in names]
    return {
        "jax": {name: str(value) for name, value in jax.config.values.items()},
        "environment": dict(os.environ),
        "logs": [(log.level, list(log.filters), log.propagate, log.disabled) for log in loggers],
        "root": list(logging.root.handlers),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        "hooks": (sys.excepthook, sys.unraisablehook, sys.stdout, sys.stderr),
        "random": np.random.get_state()[1].tolist(),  # that of Python is drawn from by beartype, which checks tests
        "folder": os.getcwd(),
    }


@pytest.fixture(scope="module")
def heard(world):
    """A run in a thread that is not the main one, whoever called being told of everything, where somebody has set jax
    to 64 bits."""
    jax.config.update("jax_enable_x64", True)
    steps, evaluations, before = [], [], state()
    calls = {"on_step": lambda *said: steps.append(said), "on_evaluation": lambda *said: evaluations.append(said)}
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(fitted, world, world / "heard", **calls).result()
    assert state() == before
    jax.config.update("jax_enable_x64", False)
    return result, steps, evaluations


def weights(result):
    return file_digest(result.model / "model.safetensors")


def test_the_bits_are_those_of_the_command(world, heard):
    files = [
        f"model.path={world / 'model'}",
        f"data.train={world / 'train.jsonl'}",
        f"data.eval={world / 'eval.jsonl'}",
    ]
    assert train.main([*files, *WORDS, f"output={world / 'command'}"]) == 0
    assert weights(heard[0]) == weights(Result(world / "command"))
    assert heard[0].after == Result(world / "command").after


def test_each_step_and_evaluation_is_told_whatever_is_written(heard):
    result, steps, evaluations = heard
    assert [step for step, _ in steps] == list(range(1, STEPS + 1))
    assert [step for step, _ in evaluations] == [0, 2, STEPS]
    told = dict(steps)
    for record in read_records(result.folder / "metrics.jsonl"):
        if "loss" in record:
            assert told[record["step"]]["loss"] == record["loss"]
    assert result.metrics["loss"].steps.tolist() == [1, 2, 4]
    assert evaluations[-1][1]["eval_loss"] == result.after["eval_loss"]


def test_a_result_says_what_came_of_it(heard):
    result, _, _ = heard
    assert result.finished and result.step == STEPS and result.model == result.folder / "model"
    steps, losses = result.metrics["eval_loss"]
    assert steps.tolist() == [0, 2, 4] and losses.dtype == np.float64
    assert (result.before["eval_loss"], result.after["eval_loss"]) == (losses[0], losses[-1])
    assert "finished" in repr(result) and "held-out loss" in repr(result)


def test_a_result_draws_figures_that_a_notebook_shows(heard):
    result, _, _ = heard
    assert result.plot()._repr_png_().startswith(b"\x89PNG")
    one, other = result.plot("loss", "eval_learning_rate").axes
    assert one.get_title().startswith("Loss") and other.get_title().startswith("Learning rate")
    labels = [line.get_label() for line in one.get_lines()]
    assert "training" in labels and "held-out" in labels
    with pytest.raises(UserError, match="los: no such metric was recorded; did you mean loss?"):
        result.plot("los")


def test_a_finished_run_comes_back_as_it_is(world, heard, capsys):
    before = {path: path.read_bytes() for path in heard[0].folder.rglob("*") if path.is_file()}
    again = fitted(world, world / "heard", on_step=lambda *_: pytest.fail("a finished run has no step"))
    assert "finished already" in capsys.readouterr().out and again.after == heard[0].after
    assert before == {path: path.read_bytes() for path in heard[0].folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_not_that_of_other_weights_at_the_same_place(world, heard, capsys):
    file, record = world / "model" / "model.safetensors", heard[0].folder / "run.json"
    content, known = file.read_bytes(), record.read_text()
    try:
        os.utime(file, (1, 1))
        fitted(world, world / "heard")
        assert json.loads(record.read_text())["weights"]["model"] == [[file.name, len(content), 10**9]]
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(
            UserError, match=r"whose digest of the weights at the start was \w+ and is now \w+; restore it"
        ):
            fitted(world, world / "heard")
        record.write_text(json.dumps({key: value for key, value in json.loads(known).items() if key != "weights"}))
        fitted(world, world / "heard")  # of a version that did not write it down
        file.unlink()
        record.write_text(known)
        fitted(world, world / "heard")
        assert capsys.readouterr().out.count("finished already") == 3
    finally:
        file.write_bytes(content)
        record.write_text(known)


def test_other_rows_are_another_run_and_leave_no_file(world, heard):
    with pytest.raises(UserError, match="holds a run whose digest of the training data"):
        fitted(world, world / "heard", rows=ROWS[:9])
    fitted(world, world / "heard", verbose=False)
    assert len(list((world / "heard" / "rows").iterdir())) == 2


@pytest.mark.nightly
def test_a_run_goes_on_after_ctrl_c_and_after_what_a_caller_raised(world, heard, capsys):
    def stop(step, metrics):
        print(f"heard {step}")
        if step == 1:
            signal.raise_signal(signal.SIGINT)

    def raise_enough(step, metrics):
        if step == 3:
            raise Enough

    before = state()
    with pytest.raises(KeyboardInterrupt):
        fitted(world, world / "stopped", on_step=stop, verbose=False)
    assert capsys.readouterr().out.splitlines() == ["heard 1"]  # and nothing but what the caller prints
    assert not Result(world / "stopped").finished
    with pytest.raises(Enough):
        fitted(world, world / "stopped", on_step=raise_enough)
    with pytest.raises(UserError, match="has not come to its end"):
        _ = Result(world / "stopped").model
    said = capsys.readouterr().out
    assert "resumed after step 1" in said
    assert weights(fitted(world, world / "stopped")) == weights(heard[0])
    assert "resumed after step 2" in capsys.readouterr().out
    assert state() == before


@pytest.mark.parametrize("outside", [signal.SIG_IGN, lambda *_: None])
def test_ctrl_c_is_raised_where_nobody_listens_outside(world, monkeypatch, outside):
    monkeypatch.setattr("dpo_jax.python.fit._train", lambda *_: 130)
    before = signal.signal(signal.SIGINT, outside)
    try:
        with pytest.raises(KeyboardInterrupt):
            fitted(world, world / "unheard")
    finally:
        signal.signal(signal.SIGINT, before)


def test_silent_runs_at_a_time_silence_themselves_alone(world, heard, monkeypatch, capsys):
    begun, end, before = threading.Semaphore(0), threading.Event(), sys.stdout

    def train(run, data, told):
        print("said by the run")
        begun.release()
        assert end.wait(60)
        told[0](1, {})
        return 0

    monkeypatch.setattr("dpo_jax.python.fit._train", train)
    with ThreadPoolExecutor(2) as pool:
        call = lambda step, metrics: print("said by a callback")  # noqa: E731
        runs = [pool.submit(fitted, world, world / "heard", on_step=call, verbose=False) for _ in range(2)]
        assert all(begun.acquire(timeout=60) for _ in runs)
        print("said by another thread")
        end.set()
    assert all(run.result().finished for run in runs) and sys.stdout is before
    assert capsys.readouterr().out.splitlines() == ["said by another thread", *["said by a callback"] * 2]


@pytest.mark.nightly
def test_a_finished_run_is_not_that_of_another_function_of_the_same_name(world, monkeypatch):
    def mine(slack):
        def function(pairs, *, beta):
            gap = beta * (pairs.policy_chosen - pairs.policy_rejected)
            return LossOutput(losses=jax.nn.relu(slack - gap), margins=gap)

        settings = {"beta": Setting(0.1, above=0)}
        return Objective(value=function, equation="", paper="", settings=settings, reference="unused")

    def run():
        return fitted(world, world / "mine", objective="mine", steps=1, verbose=False)

    monkeypatch.setitem(OBJECTIVES, "mine", mine(1.0))
    before = weights(run())
    monkeypatch.setitem(OBJECTIVES, "mine", mine(1.0))
    assert weights(run()) == before
    monkeypatch.setitem(OBJECTIVES, "mine", mine(2.0))
    with pytest.raises(UserError, match="objective.name: mine .*as another function.*name another output"):
        run()


def test_what_is_wrong_is_said_before_a_row_is_read_or_a_folder_made(world):
    rows = iter(ROWS)
    with pytest.raises(ValueError) as caught:
        fit(object(), train=rows, evaluate=0.5, output=world / "none", beta=-1, stepz=3)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4 and all(line.startswith("fit: ") for line in lines)
    assert "fit: model: is of type object; give a folder or hub id" in lines[0]
    assert len(list(rows)) == len(ROWS) and not (world / "none").exists()


def test_a_folder_of_other_things_gets_no_rows(world, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="holds other things"):
        fitted(world, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_rows_that_cannot_be_used_are_named_by_their_number(world, tmp_path):
    with pytest.raises(UserError, match=r"rows/train-\w+\.jsonl:2: no 'rejected'"):
        fitted(world, tmp_path / "bad", rows=[ROWS[0], {"prompt": "a", "chosen": "b"}], verbose=False)
    assert json.loads((tmp_path / "bad" / "rows").glob("train-*").__next__().read_text().splitlines()[0]) == ROWS[0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"eval_dataset": ROWS}, ["fit: eval_dataset: no such setting; here it is evaluate"]),
        ({"train_dataset": ROWS}, ["fit: train_dataset: no such setting; here it is train"]),
        (
            {"on_step": lambda metrics: None},
            [
                "fit: on_step: cannot be called with two arguments (too many positional arguments); give a function, "
                "to be called as on_step(step, metrics)"
            ],
        ),
        ({"callbacks": [print]}, ["fit: callbacks: no such argument; give functions to on_step= and on_evaluation="]),
        ({"callback": print}, ["fit: callback: no such argument; give functions to on_step= and on_evaluation="]),
        (
            {"steps": 3, "epochs": 2},
            ["fit: steps: 3: give steps or epochs, not both: null turns one off, as steps=None"],
        ),
    ],
)
def test_what_is_wrong_is_said_in_the_words_of_python(tmp_path, given, said):
    with pytest.raises(UserError) as caught:
        fit("m", train=ROWS, output=tmp_path / "out", **given)
    assert str(caught.value).splitlines() == said and not (tmp_path / "out").exists()


def mine(pairs, *, beta):
    return pairs


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (mine, "the function mine"),
        ([{"name": mine}], "the function mine"),
        ({"name": mine, "beta": 0.1}, "the function mine"),
        (Objective(value=mine, equation="", paper=""), "a row"),
    ],
)
def test_a_function_in_the_place_of_an_objective_is_told_how_to_become_one(tmp_path, given, what):
    with pytest.raises(UserError) as caught:
        fit("m", train=ROWS, output=tmp_path / "out", objective=given)
    assert str(caught.value) == (
        f"fit: objective: {what} is no name; give it one by a row of the table, OBJECTIVES[NAME] = Objective(...) of "
        "dpo_jax.objectives.table, and then objective=NAME: see configs/notebooks/your_own_objective.ipynb"
    )
    assert (ROOT / "configs/notebooks/your_own_objective.ipynb").exists()


def test_the_null_that_is_advised_turns_off_what_a_file_gives(tmp_path):
    (tmp_path / "run.yaml").write_text("model: {path: m}\ndata: {train: t, eval: e}\noutput: o\n")
    with pytest.raises(UserError, match="data.eval_fraction.* as eval=None"):
        fit(config=tmp_path / "run.yaml", eval_fraction=0.1)
    assert keywords.run_of({"eval": None, "eval_fraction": 0.1}, [str(tmp_path / "run.yaml")], origin="fit")


def test_advice_that_is_followed_literally_is_taken(world, tmp_path):
    rows = [{"question": "Why?", "good": "yes", "bad": "no"}]
    with pytest.raises(UserError) as caught:
        fitted(world, tmp_path / "out", rows)
    advised = eval(re.search(r"columns=(\{.*?\})", str(caught.value))[1])
    assert advised == {"prompt": "question", "chosen": "good", "rejected": "bad"}


def test_a_function_that_is_none_is_refused_at_the_call():
    (line,) = _problems_of_calls({"on_step": "x", "on_evaluation": print})
    assert line == "fit: on_step: is of type str; give a function, to be called as on_step(step, metrics)"
