"""The journal: what it wrote is the truth, whatever stopped the run."""

import io
import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from dpo_jax.errors import UserError
from dpo_jax.reporting.journal import Journal, read_records
from dpo_jax.reporting.metrics import EVALUATED, METRICS, SUMMARY, TERMINAL, TIME_FIELDS
from dpo_jax.reporting.settings import LogSettings
from dpo_jax.reporting.terminal import summary
from tests.support.journals import FILE_ONLY, metrics, run, terminal


@settings(max_examples=30, deadline=None)
@given(saved=st.integers(1, 20), more=st.integers(0, 10), torn=st.integers(0, 30))
def test_a_resumed_file_is_that_of_a_run_that_was_never_stopped(tmp_path_factory, saved, more, torn):
    whole = run(tmp_path_factory.mktemp("whole"), range(1, 21))
    folder = tmp_path_factory.mktemp("torn")
    run(folder, range(1, saved + more + 1))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 99, "loss": 1.0, "more": "x" * 20})[:torn])
    assert run(folder, range(saved + 1, 21), resume_step=saved) == whole
    assert run(folder, range(1, 21)) == whole
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl"]


def test_a_run_that_goes_on_from_its_start_keeps_what_was_measured_there(tmp_path):
    with Journal(tmp_path, 20, FILE_ONLY, console=terminal()) as book:
        book.evaluation(0, {"loss": 0.7})
        book.step(1, metrics(1))
    with Journal(tmp_path, 20, FILE_ONLY, 0, console=terminal()) as book:
        book.step(1, metrics(1))
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [0, 1]


def test_each_line_is_there_as_soon_as_it_is_written(tmp_path):
    with Journal(tmp_path, 2, FILE_ONLY, console=terminal()) as book:
        book.step(1, metrics(1))
        assert read_records(tmp_path / "metrics.jsonl") == [{"step": 1, **metrics(1)}]


def test_what_is_not_finite_is_null_and_said(tmp_path):
    with Journal(tmp_path, 2, LogSettings(), console=terminal()) as book:
        book.step(1, {"loss": math.nan, "grad_norm": np.float32(np.inf), "epoch": np.float32(0.5)})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "loss": null, "grad_norm": null, "epoch": 0.5, "nonfinite": true}\n'


def test_a_broken_record_is_named_by_file_and_line(tmp_path):
    for line in ("{", "[1]", '{"loss": 1}', '{"step": "x"}', "\x00"):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + line + '\n{"step": 2}\n')
        with pytest.raises(UserError, match=r"metrics\.jsonl:2: "):
            read_records(tmp_path / "metrics.jsonl")


def test_held_out_metrics_have_the_prefix_once(tmp_path):
    with Journal(tmp_path, 2, FILE_ONLY, console=terminal()) as book:
        book.evaluation(2, {"loss": 0.5, "eval_kl": 0.25})
    assert read_records(tmp_path / "metrics.jsonl") == [{"step": 2, "eval_loss": 0.5, "eval_kl": 0.25}]


def test_due_is_the_first_the_last_and_every_nth():
    book = Journal("unused", 10, LogSettings(every=4), process=1)
    assert [step for step in range(1, 11) if book.due(step)] == [1, 4, 8, 10]


def test_other_processes_write_nothing(tmp_path):
    with Journal(tmp_path / "out", 2, LogSettings(loggers=("wandb",)), process=1, console=terminal()) as book:
        book.phase("compiling")
        book.step(1, metrics(1))
        book.note("hello")
    assert not list(tmp_path.iterdir())


def test_time_fields_are_metrics():
    assert set(TIME_FIELDS) <= set(METRICS)
    assert {name for name, _, _ in (*TERMINAL, *SUMMARY, *EVALUATED)} <= set(METRICS)


def everything(console: Console, folder) -> str:
    with Journal(folder, 20, FILE_ONLY, console=console) as book:
        for number in range(1, 4):
            book.phase(f"reference log-probabilities {number}/3 \x1b[2J")
        run_like = metrics(1) | {"grad_norm": math.inf, "pairs_per_second": 1e9}
        for step in range(1, 21):
            book.step(step, run_like)
        book.evaluation(20, {"rewards/accuracies": 0.5})
        book.note("[bold]saved\x07 \x9b2J\u202e to a/b\nerror: forged")
        book.phase("exporting \x1b[2J\x9b")
    summary({"eval_loss": 0.7, "eval_kl": None}, {"eval_loss": None, "pass_rate": 0.5}, console=console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [1, 7, 20, 40, 80, 200])
@pytest.mark.parametrize("live", [False, True], ids=["log", "tty"])
def test_no_width_and_no_text_upsets_a_terminal(tmp_path, width, live):
    text = everything(terminal(width, force_terminal=live), tmp_path)
    for evil in ("\x07", "\x9b", "\u202e", "\x1b[2J"):
        assert evil not in text
    assert "\nerror: forged" not in text
    assert "[bold]" in re.sub(r"\s", "", text)


def test_a_dumb_terminal_gets_plain_lines(tmp_path):
    console = terminal(80, force_terminal=True, _environ={"TERM": "dumb"})
    text = everything(console, tmp_path)
    assert "\x1b" not in text and "step 20/20  loss" in text


def test_a_log_is_calm(tmp_path):
    console = terminal()
    with Journal(tmp_path, 4_000, FILE_ONLY, console=console) as book:
        for number in range(500):
            book.phase(f"reference log-probabilities {number}/500")
        for step in range(1, 4_001):
            book.step(step, metrics(1))
    lines = console.file.getvalue().splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert len(lines) - len(steps) == 1
    assert 190 <= len(steps) <= 203 and "4000/4000" in steps[-1]
    assert len({line.index("loss") for line in steps}) == 1


class Gone(io.StringIO):
    """A terminal whose window was closed."""

    def write(self, text):
        raise OSError("gone")


def test_a_terminal_that_went_away_does_not_stop_the_run(tmp_path):
    run(tmp_path, range(1, 21), console=Console(file=Gone(), width=80))
    assert len(read_records(tmp_path / "metrics.jsonl")) == 25


def test_a_letter_that_the_terminal_lacks_is_written_out(tmp_path):
    raw = io.BytesIO()
    with Journal(tmp_path, 2, FILE_ONLY, console=Console(file=io.TextIOWrapper(raw, "ascii"), width=80)) as book:
        book.note("modèle")
    assert raw.getvalue() == b"mod\\xe8le\n"


def test_the_summary_sets_before_beside_after():
    console = terminal()
    summary(
        {"step": 0, "eval_rewards/accuracies": 0.5, "eval_loss": 0.69314},
        {"step": 9, "eval_rewards/accuracies": 0.714, "eval_loss": 0.4, "pass_rate": 0.875, "eval_other": 1.0},
        console=console,
    )
    assert console.file.getvalue().splitlines() == [
        "held-out accuracy   50.0% ->  71.4%",
        "held-out loss      0.6931 -> 0.4000",
        "pass rate               - ->  87.5%",
    ]


def test_an_accuracy_of_single_answers_is_said_to_be_one(tmp_path):
    """Beside it the margin may be negative, as no share of pairs would have it."""
    console = terminal()
    measured = {"rewards/accuracies": 0.8, "rewards/margins": -0.05, "objective/kto_baseline": 0.0}
    named = {f"eval/kind/{metric}": value for metric, value in measured.items()}
    with Journal(tmp_path, 2, FILE_ONLY, console=console) as book:
        book.evaluation(0, {**measured, **named})
    (record,) = read_records(tmp_path / "metrics.jsonl")
    summary(record, record, console=console)
    line, first, _, second, _ = console.file.getvalue().splitlines()
    label = "accuracy (of single answers, by KTO's baseline)"
    assert f"held-out {label} 80.0%  held-out margin -0.050" in line
    assert first.startswith(f"held-out {label} ") and second.startswith(f"kind: {label} ")


def test_what_is_not_finite_is_said_to_be(tmp_path):
    """It is null in the record, which is what the summary is made of."""
    console = terminal()
    with Journal(tmp_path, 2, FILE_ONLY, console=console) as book:
        book.evaluation(0, {"loss": math.nan, "rewards/margins": math.inf, "rewards/accuracies": 0.5})
    (record,) = read_records(tmp_path / "metrics.jsonl")
    assert record["eval_loss"] is None and record["eval_rewards/margins"] is None
    summary(record, record, console=console)
    said = console.file.getvalue()
    assert "held-out loss not finite" in said and "held-out margin    not finite -> not finite" in said
    assert "held-out accuracy       50.0% ->      50.0%" in said


def test_sets_with_names_have_rows_of_their_own_and_one_word_in_a_line(tmp_path):
    console, measured = terminal(), {"loss": 0.5, "rewards/accuracies": 0.75, "rewards/margins": 0.1}
    sets = {f"eval/{name}/{metric}": value for name in ("kind", "safe") for metric, value in measured.items()}
    with Journal(tmp_path, 2, FILE_ONLY, console=console) as book:
        book.evaluation(2, {**measured, **sets})
    (record,) = read_records(tmp_path / "metrics.jsonl")
    assert record == {"step": 2, **{f"eval_{name}": value for name, value in measured.items()}, **sets}
    assert console.file.getvalue().splitlines() == [
        "evaluation after step 2  held-out accuracy 75.0%  held-out margin +0.100  held-out loss 0.5000  "
        "kind 75.0%  safe 75.0%"
    ]
    console = terminal()
    summary({"eval_loss": 0.7, "eval/kind/loss": 0.6}, {"eval_loss": 0.4, "eval/safe/loss": 0.3}, console=console)
    assert console.file.getvalue().splitlines() == [
        "held-out loss  0.7000 -> 0.4000",
        "kind: loss     0.6000 ->      -",
        "safe: loss          - -> 0.3000",
    ]


def test_records_of_earlier_versions_have_todays_names(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval_good_answers": 0.5, "eval_loss": 1.0}\n')
    assert read_records(tmp_path / "metrics.jsonl") == [{"step": 0, "eval_pass_rate": 0.5, "eval_loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "good_answers": 0.5}\n')
    assert read_records(tmp_path / "metrics.jsonl") == [{"step": 0, "pass_rate": 0.5}]


def test_nothing_measured_gives_no_summary():
    console = terminal()
    summary({}, {}, console=console)
    assert console.file.getvalue() == ""


def test_an_accuracy_that_is_only_rounding_is_shown_as_tied(capsys):
    before = {"eval_rewards/accuracies": 0.0078, "eval_rewards/margins": 1e-7}
    summary(before, {"eval_rewards/accuracies": 0.9, "eval_rewards/margins": 0.5}, console=Console(width=80))
    line = next(line for line in capsys.readouterr().out.splitlines() if "accuracy" in line)
    assert "tied" in line and "90.0%" in line and "0.8%" not in line
