"""A run whose model comes from the hub and whose result goes back, against the stand-in."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

from dpo_jax import preview, train
from dpo_jax.config import run as config
from dpo_jax.hf import tensors
from dpo_jax.reporting.journal import Journal, read_records
from dpo_jax.run.sources import check_export, find_models
from tests.conftest import ROOT
from tests.support.hub_stand_in import READ_ONLY, TOKEN, Hub, Repository, at_hub, contents, serving, use
from tests.support.tiny_folders import write_folder
from tests.support.tiny_rows import assistant, byte_tokenizer, user, write

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

MODEL, RESULT = "org/tiny", "ada/tuned"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    tokenizer = byte_tokenizer()
    ids = {"vocab_size": 300, "num_hidden_layers": 1, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    write_folder(root / "model", **ids)
    tokenizer.save_pretrained(str(root / "model"))
    rows = [
        {"prompt": [user(f"Say {n}")], "chosen": [assistant("yes " * (n % 5 + 1))], "rejected": [assistant("no" * n)]}
        for n in range(1, 13)
    ]
    write(root / "train.jsonl", *rows)
    return root


@pytest.fixture
def far(world, tmp_path, monkeypatch):
    """The stand-in with the model, to one who may write for `ada`."""
    with serving() as hub:
        use(monkeypatch, hub, tmp_path / "home")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        hub.add(MODEL, world / "model")
        yield hub
        huggingface_hub.close_session()


def arguments(world, output, *more):
    given = {
        "model.path": MODEL,
        "data.train": world / "train.jsonl",
        "data.cache": world / "cache",
        "batch.pairs": 4,
        "batch.micro_tokens": 64,  # of one device, all steps have one shape
        "steps": 2,
        "optimizer.learning_rate": 1e-3,
        "optimizer.warmup_steps": 0,
        "checkpoint.every": 1,
        "log.tensorboard": "false",
        "log.report": False,  # a page takes longer than the steps
        "output": output,
    }
    return [f"{key}={value}" for key, value in given.items()] + list(more)


def record(output: Path) -> dict:
    return json.loads((output / "run.json").read_text())


def move_main(far: Hub, tmp_path: Path, repository: str = MODEL) -> str:
    """Other weights and another chat template become `main` at the hub."""
    folder = tmp_path / f"moved-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    for name, content in far.files(repository).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    weights = {name: array + np.float32(0.01) for name, array in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "you"))
    return far.add(repository, folder)


def refused(argv, capsys) -> str:
    """The one line of a refusal."""
    assert train.main(argv) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and TOKEN not in captured.err + captured.out
    (line,) = captured.err.splitlines()
    return line


def test_the_command_downloads_trains_and_pushes(world, tmp_path):
    with serving() as far:
        commit = far.add(MODEL, world / "model", private=True)
        far.repositories["ada/tiny"] = far.repositories.pop(MODEL)
        environment = os.environ | {
            "HF_ENDPOINT": far.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "JAX_PLATFORMS": "cpu",
        }
        argv = arguments(world, tmp_path / "run", "model.path=ada/tiny", f"export.push={RESULT}")
        command = [sys.executable, "-m", "dpo_jax.train", *argv]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert f"pushed: {far.url}/{RESULT}/commit/" in done.stdout and TOKEN not in done.stdout + done.stderr
        assert far.repositories[RESULT].private
        model = tmp_path / "run" / "model"
        assert at_hub(far, RESULT) == contents(model)
    assert record(tmp_path / "run")["facts"]["commit of model.path"] == commit
    assert json.loads((model / tensors.OURS).read_text())["commits"] == {"model": commit}
    card = (model / "README.md").read_text()
    assert "base_model: ada/tiny" in card and commit in card and str(tmp_path) not in card
    assert not any(TOKEN.encode() in content for content in contents(tmp_path / "run").values())
    assert (tmp_path / "home" / "hub" / "models--ada--tiny" / "snapshots" / commit).is_dir()


def stopped_after_one_step(world, output, monkeypatch, *more):
    """A run that got SIGTERM in its first step of two."""
    with monkeypatch.context() as patch:
        honest = Journal.step

        def step(self, now, metrics):
            honest(self, now, metrics)
            os.kill(os.getpid(), 15)

        patch.setattr(Journal, "step", step)
        assert train.main(arguments(world, output, *more)) == 75


@pytest.mark.nightly
def test_a_main_that_moves_does_not_move_a_run(world, far, tmp_path, monkeypatch):
    far.add("org/judge", world / "model")
    judge = move_main(far, tmp_path, "org/judge")
    more = ("reference.path=org/judge", "reference.revision=main")
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert train.main(arguments(world, whole, *more)) == 0
    stopped_after_one_step(world, parted, monkeypatch, *more)
    began = record(parted)["facts"]
    assert began["commit of reference.path"] == judge
    moved = {"model": move_main(far, tmp_path, MODEL), "reference": move_main(far, tmp_path, "org/judge")}
    assert train.main(arguments(world, parted, *more)) == 0
    assert record(parted)["facts"] == record(whole)["facts"] == began
    weights = [(output / "model" / "model.safetensors").read_bytes() for output in (whole, parted)]
    assert weights[0] == weights[1]
    new = config.load(arguments(world, tmp_path / "new", *more))
    assert find_models(new.model, new.reference, {}).commits == moved


@pytest.mark.nightly
def test_a_run_goes_on_without_the_hub(world, far, tmp_path, monkeypatch):
    stopped_after_one_step(world, tmp_path / "run", monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    far.asked.clear()
    assert train.main(arguments(world, tmp_path / "run")) == 0
    assert train.main(arguments(world, tmp_path / "run")) == 0  # finished already
    assert far.asked == []


def test_another_revision_is_another_run(world, far, tmp_path, monkeypatch, capsys):
    first = far.repositories[MODEL].refs["main"]
    stopped_after_one_step(world, tmp_path / "run", monkeypatch, "model.revision=main")
    far.repositories[MODEL].refs["v1"] = move_main(far, tmp_path)
    capsys.readouterr()
    more = ("model.revision=v1",)
    assert 'model.revision: "main" -> "v1"' in refused(arguments(world, tmp_path / "run", *more), capsys)
    allowed = (*more, "checkpoint.allow_change=[model.revision]")
    line = refused(arguments(world, tmp_path / "run", *allowed), capsys)
    assert f"commit of model.path was {first} and is now" in line


def test_the_reference_may_be_another_commit_of_the_same_model(world, far, tmp_path):
    first = far.repositories[MODEL].refs["main"]
    second = move_main(far, tmp_path)
    more = (f"model.revision={first}", f"reference.path={MODEL}")
    assert train.main(arguments(world, tmp_path / "run", *more)) == 0
    facts = record(tmp_path / "run")["facts"]
    assert (facts["commit of model.path"], facts["commit of reference.path"]) == (first, second)
    losses = [row["loss"] for row in read_records(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert losses[0] != pytest.approx(np.log(2), abs=1e-6)  # policy and reference are not the same


def test_what_cannot_be_had_is_one_line(world, far, tmp_path, monkeypatch, capsys):
    def run(*more):
        return refused(arguments(world, tmp_path / "run", *more), capsys)

    assert "model.path: there is no such folder, and the hub shows no 'org/none'" in run("model.path=org/none")
    assert "model.path: the hub has no 'org/tiny' at revision 'v9'" in run("model.revision=v9")
    line = run("reference.path=org/none")
    assert "reference.path: there is no such folder, and the hub shows no 'org/none'" in line
    folder = world / "model"
    line = run(f"model.path={folder}", "model.revision=main")
    assert "model.path: " in line and "which has no revision 'main'" in line
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    far.add("org/other", folder)
    assert "model.path: the hub does not know the token" in run("model.path=org/other")


def test_contradictions_and_tokens_are_refused_as_settings(world, tmp_path, capsys):
    for setting, part in {
        "reference.revision=v1": 'reference.revision: "v1": is of reference.path, which is not given',
        "export.private=false": "export.private: false: nothing is pushed without export.push",
        "export.push=tuned": 'export.push: "tuned": must be OWNER/NAME',
        "export.push=ada/../tuned": "must be OWNER/NAME",
        f"export.token={TOKEN}": "no such setting; the hub's token is read from the environment (HF_TOKEN)",
        "model_revision=v1": "here it is model.revision",
        "hub_model_id=ada/tuned": "here it is export.push",
    }.items():
        assert part in refused(arguments(world, tmp_path / "run", setting), capsys)


def test_preview_shows_the_revision_that_is_asked_for(world, far, tmp_path, capsys):
    assert preview.main(arguments(world, tmp_path / "run", "--pairs", "1")) == 0
    assert not far.count("model.safetensors")
    assert preview.main(arguments(world, tmp_path / "run", "model.revision=v9")) == 2
    assert "the hub has no 'org/tiny' at revision 'v9'" in capsys.readouterr().err


def test_a_push_that_cannot_be_is_refused_before_anything_is_read(world, far, tmp_path, monkeypatch, capsys):
    def run(name=RESULT):
        return refused(arguments(world, tmp_path / "run", f"export.push={name}"), capsys)

    assert "export.push: nothing could be pushed to 'bob/tuned'" in run("bob/tuned")
    far.add("ada/thesis", world / "model", private=True)
    assert "no export of dpo_jax and is left alone" in run("ada/thesis")
    far.repositories["ada/open"] = Repository(private=False)
    far.repositories["ada/open"].commit({})
    assert "the repository is public" in run("ada/open")
    check_export(config.load(arguments(world, tmp_path / "run", "export.push=ada/open", "export.private=false")).export)
    monkeypatch.setenv("HF_TOKEN", READ_ONLY)
    assert "may only read" in run()
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no token of the hub" in run()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in run()
    assert not far.count("resolve") and not (tmp_path / "run" / "run.json").exists()


def test_a_push_that_fails_loses_nothing_and_the_same_command_pushes_again(world, far, tmp_path, capsys):
    argv = arguments(world, tmp_path / "run", f"export.push={RESULT}", "export.private=false")
    far.faults["/commit/"] = 500
    line = refused(argv, capsys)
    model = tmp_path / "run" / "model"
    assert "the hub answered 500" in line and f"python -m dpo_jax.convert push {model} {RESULT} --public" in line
    assert record(tmp_path / "run")["finished"] and tensors.changed_files(model) == []
    before = contents(model)
    far.faults.clear()
    assert train.main(argv) == 0
    assert "pushed: " in capsys.readouterr().out
    assert at_hub(far, RESULT) == before == contents(model) and not far.repositories[RESULT].private
    far.asked.clear()
    assert train.main(argv) == 0 and far.asked == []  # once is enough


def test_a_model_that_cannot_be_trained_is_refused_before_its_weights_are_downloaded(world, far, tmp_path, capsys):
    folder = shutil.copytree(world / "model", tmp_path / "quantised")
    known = json.loads((folder / "config.json").read_text())
    quantised = {**known, "quantization_config": {"quant_method": "gptq", "bits": 3}}
    (folder / "config.json").write_text(json.dumps(quantised))
    far.add("org/quantised", folder)
    line = refused(arguments(world, tmp_path / "run", "model.path=org/quantised"), capsys)
    assert "quantization_config" in line
    assert far.count("org/quantised") and not far.count("model.safetensors")
    assert not (tmp_path / "run" / "data.json").exists()  # nor was anything tokenised
