"""Services and TensorBoard: what they are sent, that a run that goes on is one run there, and that none ends it."""

import inspect
import json
import math
import os
import struct
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from dpo_jax.errors import UserError
from dpo_jax.reporting import loggers
from dpo_jax.reporting.journal import Background, Journal, read_records
from dpo_jax.reporting.seen import SeenEvaluation
from dpo_jax.reporting.settings import LogSettings
from tests.conftest import ROOT
from tests.support.journals import metrics, run, terminal

SERVICES = [*loggers.SERVICES]
BEGINS = {"wandb": "init", "trackio": "init", "mlflow": "start_run"}
LOGS = {"wandb": "log", "trackio": "log", "mlflow": "log_metrics"}
ENDS = {"wandb": "finish", "trackio": "finish", "mlflow": "end_run"}


class Double:
    """A package with the functions of all services: it keeps what it is called with, and fails where it is told to."""

    def __init__(self, fails_at: str = "", error: BaseException | None = None):
        self.fails_at, self.error, self.disabled = fails_at, error or RuntimeError("no\x1b[31m network"), False
        self.calls: list[tuple[str, tuple, dict]] = []

    def __getattr__(self, name):
        def call(*given, **named):
            self.calls.append((name, given, named))
            if name == self.fails_at:
                raise self.error
            return SimpleNamespace(disabled=self.disabled, info=SimpleNamespace(run_id=f"run{len(self.calls)}"))

        return call

    def of(self, name: str) -> list[dict]:
        return [{**dict(enumerate(given)), **named} for called, given, named in self.calls if called == name]


def log(*services: str, **more) -> LogSettings:
    return LogSettings(tensorboard=False, loggers=services, **more)


def with_answers(folder):
    """Left by evaluations after steps 0 and 5, as a run leaves it."""
    for name in ("answers", "evaluations"):
        (folder / name).mkdir(parents=True)
    rows = [
        {"prompt": "Hi?", "answer": "**no**\n<b>\x1b[2J", "good": False},
        {"prompt": [{"role": "user", "content": "x"}]},
    ]
    for step in (0, 5):
        (folder / "answers" / f"{step}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        rewards = {"chosen": np.array([0.5, 1.5, np.nan], np.float32), "rejected": np.zeros(3, np.float32)}
        np.savez(folder / "evaluations" / f"{step}.npz", **rewards)


@pytest.fixture
def double(monkeypatch):
    made: list[Double] = []

    def become(*how) -> Double:
        made.append(Double(*how))
        monkeypatch.setattr(loggers.importlib, "import_module", lambda name: made[-1])
        return made[-1]

    return become


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_gets_finite_metrics_settings_answers_and_its_own_run_again(tmp_path, double, service):
    with_answers(tmp_path)
    about = {"project": "kind", "name": "first try", "tags": ("dpo", "tiny")}
    known = Background(settings={"optimizer.learning_rate": 5e-7, "objective.name": "sigmoid"})
    first = double()
    run(tmp_path, range(1, 8), log=log(service, **about), background=known)
    second = double()
    run(tmp_path, range(6, 9), 5, log(service, **about), background=known)
    (begun,), (again,) = first.of(BEGINS[service]), second.of(BEGINS[service])
    sent = [(call["step"], call[0]) for call in first.of(LOGS[service])]
    assert (3, metrics(3)) in sent and (5, {"eval_loss": 0.1}) in sent
    assert [call["step"] for call in second.of(LOGS[service])] == [6, 7, 8]
    assert len(first.of(ENDS[service])) == len(second.of(ENDS[service])) == 1
    if service == "mlflow":
        assert first.of("set_experiment") == second.of("set_experiment") == [{0: "kind"}]
        assert (begun["run_name"], set(begun["tags"])) == ("first try", {"dpo", "tiny"})
        assert again == {"run_id": (tmp_path / "mlflow_run").read_text()}
        assert first.of("log_params") == [{0: {"optimizer.learning_rate": "5e-07", "objective.name": "sigmoid"}}]
        assert second.of("log_params") == []  # they cannot be changed there
        assert [call[0] for call in first.of("log_artifact")] == [str(tmp_path / f"answers/{n}.jsonl") for n in (0, 5)]
        return
    assert begun["project"] == "kind" and begun["resume"] == again["resume"] == "allow"
    assert begun["config"].items() >= known.settings.items()
    key = "id" if service == "wandb" else "name"
    assert begun[key] == again[key] and begun["name"].startswith("first try")
    assert list(begun["tags"] if service == "wandb" else begun["config"]["tags"]) == ["dpo", "tiny"]
    table = first.of("Table")[0]
    assert table["columns"] == ["prompt", "answer", "good"] and table["data"][0] == [
        "Hi?",
        "**no**\n<b>\\x1b[2J",
        "False",
    ]
    assert len(first.of("Histogram")) == 2 * 3  # of chosen and rejected answers, and of their margins


@pytest.mark.parametrize("service", SERVICES)
def test_what_a_service_is_called_with_is_what_its_package_takes(tmp_path, double, service):
    """The double against the real package, where it is installed: names of functions and of their arguments."""
    real = pytest.importorskip(service)
    with_answers(tmp_path)
    kept = double()
    for steps, resume_step in ((range(1, 8), -1), (range(6, 8), 5)):
        run(tmp_path, steps, resume_step, log(service, tags=("a",)), background=Background(settings={"steps": 2}))
    for name, given, named in kept.calls:
        takes = inspect.signature(getattr(real, name))
        takes.bind(*[None] * ("self" in takes.parameters), *given, **named)  # wandb.log is that of a run to come


@pytest.mark.parametrize("error", [RuntimeError("no\x1b[31m network"), SystemExit("no\x1b[31m network")])
@pytest.mark.parametrize(("service", "fails_at"), [(s, f[s]) for s in SERVICES for f in (BEGINS, LOGS, ENDS)])
def test_a_service_that_fails_costs_one_warning_and_no_record(tmp_path, double, service, fails_at, error):
    kept, console = double(fails_at, error), terminal(200)
    run(tmp_path, range(1, 21), log=log(service), console=console)
    said = console.file.getvalue()
    assert said.count(f"warning: {service} is switched off: {type(error).__name__}: no\\x1b[31m network") == 1
    assert len(kept.of(fails_at)) == 1 and kept.calls[-1][0] == fails_at
    assert len(read_records(tmp_path / "metrics.jsonl")) == 25


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_that_is_not_installed_is_refused_before_anything_is_written(tmp_path, monkeypatch, service):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(loggers.importlib, "import_module", missing)
    with pytest.raises(UserError, match=f"log.loggers: {service}: is not installed; pip install {service}"):
        Journal(tmp_path, 2, log(service), console=terminal())
    assert not (tmp_path / "metrics.jsonl").exists()


def test_what_an_evaluation_left_may_be_missing_or_damaged(tmp_path):
    assert SeenEvaluation.of(tmp_path, 3) == SeenEvaluation(None, [], {})
    with_answers(tmp_path)
    (tmp_path / "answers" / "0.jsonl").write_text("{")
    (tmp_path / "evaluations" / "0.npz").write_bytes(b"PK no")
    assert SeenEvaluation.of(tmp_path, 0) == SeenEvaluation(None, [], {})
    np.savez(tmp_path / "evaluations" / "5.npz", **{"safe/chosen": np.ones(2), "safe/rejected": np.zeros(2)})
    found = SeenEvaluation.of(tmp_path, 5)
    assert found.file == tmp_path / "answers" / "5.jsonl" and len(found.answers) == 2
    assert {name: values.tolist() for name, values in found.rewards.items()} == {
        "eval/safe/rewards/chosen": [1, 1],
        "eval/safe/rewards/rejected": [0, 0],
        "eval/safe/rewards/margins": [1, 1],
    }


# ---------------------------------------------------------------------------------------------- TensorBoard


def events(folder):
    """Of all event files, in the order in which they were begun."""
    from tensorboardX.proto import event_pb2

    for path in sorted((folder / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            yield event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_tensorboard_hides_what_a_resumed_run_repeats(tmp_path):
    run(tmp_path, range(1, 8), log=LogSettings())
    run(tmp_path, range(6, 10), resume_step=5, log=LogSettings())
    shown: dict[int, float] = {}
    for event in events(tmp_path):
        if event.session_log.status == 1 and event.step:  # START
            shown = {step: value for step, value in shown.items() if step < event.step}
        for value in event.summary.value:
            if value.tag == "loss":
                assert event.step not in shown
                shown[event.step] = value.simple_value
    assert sorted(shown) == list(range(1, 10))
    np.testing.assert_allclose([shown[step] for step in range(1, 10)], [0.7 / step for step in range(1, 10)], rtol=1e-6)


def test_tensorboard_shows_answers_as_text_in_which_nothing_is_markup_and_rewards_as_histograms(tmp_path):
    with_answers(tmp_path)
    run(tmp_path, range(1, 6), log=LogSettings())
    values = {(event.step, value.tag): value for event in events(tmp_path) for value in event.summary.value}
    for step in (0, 5):
        text = values[step, "answers/0/text_summary"].tensor.string_val[0].decode()
        plain = [line for line in text.splitlines() if line and not line.startswith("    ")]
        assert plain == ["**prompt**", "**answer**", "**good**"]  # all else is in blocks of code
        assert "    **no**\n    <b>\\x1b[2J" in text and "\x1b" not in text
        assert "    user: x" in values[step, "answers/1/text_summary"].tensor.string_val[0].decode()
        for name, total in (("chosen", 2.0), ("rejected", 0.0), ("margins", 2.0)):
            histogram = values[step, f"eval_rewards/{name}"].histo
            assert histogram.num == 2 if name != "rejected" else 3  # nan is in no bin
            assert histogram.sum == pytest.approx(total) and math.isfinite(histogram.max)


def test_a_long_answer_is_cut_and_only_the_first_are_sent():
    rows = [{"prompt": "p", "answer": "x" * 10_000, "good": True}] * 100
    table = loggers.cells(SeenEvaluation(None, rows, {}))
    assert len(table) == loggers.SHOWN and len(table[0][1]) < 2 * loggers.LONGEST
    assert "8,000 characters more" in table[0][1]


# ---------------------------------------------------------------------------------------------- the real packages

SCRIPT = """
import sys
from pathlib import Path
from rich.console import Console
from dpo_jax.reporting.journal import Background
from tests.support.journals import run
from tests.reporting.test_loggers import log
folder, service = Path(sys.argv[1]), sys.argv[2]
how = {"log": log(service, project="kind", name="first", tags=("a", "b")), "background": Background({"steps": 20})}
how["console"] = Console(width=200)
run(folder, range(1, 8), **how)
run(folder, range(6, 11), 5, **how)
from dpo_jax.reporting.journal import read_records
assert len(read_records(folder / "metrics.jsonl")) == 13
"""


def in_a_process(folder, service, code=SCRIPT, **environment):
    offline = {"WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": str(folder / "mlruns"), "TRACKIO_DIR": str(folder / "t")}
    env = {**os.environ, **offline, "MLFLOW_ALLOW_FILE_STORE": "true", "PYTHONPATH": str(ROOT), **environment}
    words = [sys.executable, "-c", code, str(folder), service]
    done = subprocess.run(words, env=env, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def wandb_records(file):
    """Of an offline run: a log of LevelDB's kind in one block, whose records are protobufs."""
    from wandb.proto import wandb_internal_pb2 as records

    data, at = file.read_bytes(), 7
    assert len(data) < 32768
    while at < len(data):
        _, length, kind = struct.unpack_from("<IHB", data, at)
        assert kind == 1  # whole
        yield records.Record.FromString(data[at + 7 : at + 7 + length])
        at += 7 + length


@pytest.mark.nightly
@pytest.mark.parametrize("service", SERVICES)
def test_the_real_package_without_a_network_has_one_run_with_every_step(tmp_path, service):
    pytest.importorskip(service)
    with_answers(tmp_path)
    said = in_a_process(tmp_path, service)
    assert "is switched off" not in said
    name = (tmp_path / f"{service}_run").read_text()
    if service == "wandb":
        found = sorted((tmp_path / "wandb").glob(f"offline-run-*-{name}"))
        assert 1 <= len(found) <= 2  # both parts began in one second, or not; they are of one run
        records = [record for path in found for file in path.glob("*.wandb") for record in wandb_records(file)]
        begun = [record.run for record in records if record.WhichOneof("record_type") == "run"]
        assert {(r.run_id, r.project, r.display_name, *r.tags) for r in begun} == {(name, "kind", "first", "a", "b")}
        rows = [record.history for record in records if record.WhichOneof("record_type") == "history"]
        sent = [{"".join(item.nested_key) or item.key: item.value_json for item in row.item} for row in rows]
        assert [int(row["_step"]) for row in sent if "loss" in row] == [*range(1, 8), *range(6, 11)]
        assert all(json.loads(row["loss"]) == metrics(int(row["_step"]))["loss"] for row in sent if "loss" in row)
        return
    if service == "mlflow":
        code = """
import sys, mlflow
from pathlib import Path
client, run = mlflow.MlflowClient(), Path(sys.argv[1], "mlflow_run").read_text()
found = client.get_run(run)
print(found.data.params, sorted({m.step for m in client.get_metric_history(run, "loss")}), found.info.run_name)
print([a.path for a in client.list_artifacts(run, "answers")], found.data.tags["a"])
print("runs", len(client.search_runs(["0", found.info.experiment_id])))
"""
        said = in_a_process(tmp_path, service, code)
        assert f"{{'steps': '20'}} {[*range(1, 11)]} first" in said
        assert "['answers/0.jsonl', 'answers/5.jsonl'] true" in said and "runs 1\n" in said
        return
    code = """
import sys, trackio
from pathlib import Path
from trackio.sqlite_storage import SQLiteStorage
name = Path(sys.argv[1], "trackio_run").read_text()
assert SQLiteStorage.get_runs("kind") == [name], SQLiteStorage.get_runs("kind")
print(sorted({row["step"] for row in SQLiteStorage.get_logs("kind", name) if "loss" in row}))
"""
    assert str([*range(1, 11)]) in in_a_process(tmp_path, service, code)


def test_a_wandb_that_disabled_itself_is_said_to_be_off(tmp_path, double):
    kept, console = double(), terminal(200)
    kept.disabled = True
    run(tmp_path, range(1, 4), log=log("wandb"), console=console)
    assert "warning: wandb is switched off: RuntimeError: it has no key; set WANDB_API_KEY" in console.file.getvalue()
    assert kept.of("log") == []


@pytest.mark.nightly
def test_wandb_without_a_key_and_with_a_terminal_neither_asks_for_ever_nor_ends_the_run(tmp_path):
    pytest.importorskip("wandb")
    import pty

    main, side = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    env = {name: value for name, value in env.items() if not name.startswith("WANDB_")}
    env |= {"WANDB_BASE_URL": "http://127.0.0.1:9"}  # nobody is there
    words = [sys.executable, "-c", SCRIPT, str(tmp_path), "wandb"]
    child = subprocess.Popen(words, env=env, cwd=tmp_path, stdin=side, stdout=side, stderr=side)
    os.close(side)
    said = b""
    try:
        while more := os.read(main, 4096):
            said += more
    except OSError:  # the other side was closed
        pass
    assert child.wait(timeout=300) == 0, said[-3000:]
    assert said.count(b"warning: wandb is switched off: RuntimeError: it has no key; set WANDB_API_KEY") == 2
    assert len(read_records(tmp_path / "metrics.jsonl")) == 13
