"""Settings: what is right comes through as it was written, and what is wrong is named by file, line and key."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dpo_jax.config import command as commands
from dpo_jax.config import rounds
from dpo_jax.config import run as config
from dpo_jax.config.advice import WITH_VALUE
from dpo_jax.config.elsewhere import FOREIGN, answer_to
from dpo_jax.config.run import CHANGES_MATHEMATICS, FIELDS, KEEPS_MATHEMATICS, Run, changed_mathematics, dump
from dpo_jax.errors import UserError
from dpo_jax.objectives import terms
from dpo_jax.objectives.table import KNOWN_AS
from dpo_jax.run.interrupts import Interrupts

GOOD = textwrap.dedent(
    """\
    # a comment
    model:
      path: models/tiny
    data:
      train: [a.jsonl, "b.jsonl"]
      eval: held_out.jsonl
      max_length: 512
    batch: {pairs: 32}
    objective:
      beta: 0.2
    optimizer:
      learning_rate: 5e-7
      warmup_fraction: 0.05
    evaluation:
      every: 10
    log:
      tensorboard: false
    steps: 100
    seed: 7
    output: runs/tiny
    """
)
ROOT = Path(__file__).resolve().parents[2]
PREAMBLE = "import sys\nfrom dpo_jax.config.command import *\nfrom dpo_jax.config.run import load\n@command\n"
COMMAND = PREAMBLE + "def main(argv): print(load(argv).seed)\nsys.exit(main())"


@pytest.fixture
def good(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(GOOD)
    return "run.yaml"


def problems(*argv: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        config.load(list(argv))
    return str(caught.value).splitlines()


def python(*arguments: str, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, env=environment, **options
    )


# ---------------------------------------------------------------------------------------------- what is right


def test_values_come_through(good):
    run = config.load([good])
    assert (run.model.path, run.data.train, run.batch.pairs) == ("models/tiny", ("a.jsonl", "b.jsonl"), 32)
    assert run.optimizer.learning_rate == 5e-7 and run.log.tensorboard is False
    assert (run.steps, run.epochs, run.seed) == (100, None, 7)


def test_later_files_and_overrides_win(good):
    Path("more.yaml").write_text("optimizer: {learning_rate: 1e-6}\nbatch.pairs: 16\n")
    run = config.load([good, "more.yaml", "seed=1", "--seed", "2", "--optimizer.weight-decay=0.1", "data.train=[c, d]"])
    assert (run.optimizer.learning_rate, run.optimizer.warmup_fraction, run.optimizer.weight_decay) == (1e-6, 0.05, 0.1)
    assert (run.batch.pairs, run.seed, run.data.train) == (16, 2, ("c", "d"))
    assert config.load([good, "mesh.data=2", "--mesh.fsdp", "-1"]).mesh.data == 2
    assert config.load([good, "optimizer={schedule: cosine, clip_norm: null}"]).optimizer.clip_norm is None


@pytest.mark.parametrize(
    ("text", "value"),
    [("5e-7", 5e-7), ("1E3", 1000.0), (".5", 0.5), ("2.", 2.0), ("+1.5e+2", 150.0), ("3", 3.0), ("010", 10.0)],
)
def test_numbers_are_read_as_people_write_them(good, text, value):
    assert config.load([good, f"optimizer.weight_decay={text}"]).optimizer.weight_decay == value


@pytest.mark.parametrize("text", ["no", "on", "2024-01-01", "'7'", "1:30", "0x10", "~/runs", "a#b", "true.d"])
def test_text_stays_text(good, text):
    assert config.load([good, f"output={text}"]).output == text.strip("'")


def test_a_run_without_a_length_is_one_epoch(good):
    assert config.load([good, "steps=null"]).epochs == 1.0
    assert config.load([good, "steps=null", "epochs=2"]).epochs == 2.0


def plain_run(*overrides: str) -> Run:
    return config.load(["model.path=m", "data.train=d", "output=o", *overrides])


def test_an_axis_that_takes_the_rest_takes_it_from_fsdp():
    assert (plain_run("mesh.data=-1").mesh.data, plain_run("mesh.data=-1").mesh.fsdp) == (-1, 1)
    assert plain_run("mesh.data=2").mesh.fsdp == -1


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("epochs=0.5", "data.eval=[a, b]", "evaluation.every=3"),
        ("optimizer.warmup_steps=3",),
        ("objective.name=sft",),
        ("objective=[{name: sigmoid, weight: 0.8, beta: 0.2}, {name: sft}]",),
        ("objective.name=simpo", "objective.beta=2.5"),
        ("reference.update_every=10",),
        ("evaluation={answers: a.jsonl, max_new_tokens: 3}", "checkpoint.allow_change=[seed, data.train]"),
        ("data.columns={prompt: [instruction, input], chosen: good}", "data.as_chat=true"),
        ("data.chat_template_kwargs={enable_thinking: false, tools: [a, {b: 1}]}",),
        ("evaluation.answers=null", "evaluation.max_new_tokens=3"),
        ("data.eval={kind: a.jsonl, safe: [b, c]}", "evaluation.every=0.5 epochs"),
        (
            "data.eval_fraction=0.1",
            "evaluation={every: 1 epoch, patience: 3}",
            "checkpoint.best=eval_rewards/accuracies",
        ),
        ("data.eval.kind=a", "data.eval.safe=b", "evaluation.every=7", "checkpoint.best=eval/safe/loss"),
        ("evaluation={answers: a.jsonl, every: 2}", "checkpoint.best=pass_rate"),
        ("evaluation={answers: a.jsonl, judge: rule}",),
        ("evaluation={answers: a.jsonl, judge: [rule, 'model:m', 'reward:r'], judge_template: t}",),
    ],
)
def test_what_is_dumped_or_printed_gives_the_same_run_again(tmp_path, capsys, overrides):
    run = plain_run(*overrides)
    assert Run.model_validate(json.loads(json.dumps(dump(run)))) == run
    with pytest.raises(SystemExit) as done:
        config.load(["model.path=m", "data.train=d", "output=o", *overrides, "--print-config"])
    assert not done.value.code
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    assert config.load([str(tmp_path / "again.yaml")]) == run
    assert config.digest(config.load([str(tmp_path / "again.yaml")])) == config.digest(run)


def test_the_digest_tells_runs_apart():
    seen = {config.digest(plain_run(*change)) for change in ((), ("seed=1",), ("output=p",), ("log.every=2",))}
    assert len(seen) == 4


# ---------------------------------------------------------------------------------------------- what is wrong

BAD = {
    # the whole text of a config, or a change to the good one (old, new): place, key, part of the remedy
    "unknown section": (("seed: 7", "sed: 7"), ":19: sed: ", "did you mean seed?"),
    "unknown key": (("  learning_rate", "  learning_rat"), ":12: optimizer.learning_rat: ", "optimizer.learning_rate?"),
    "trl name": (("seed: 7", "num_train_epochs: 7"), ":19: num_train_epochs: ", "here it is epochs"),
    "trl name in a section": (
        ("batch: {pairs: 32}", "batch: {per_device_train_batch_size: 8}"),
        ":8: batch.per_device_train_batch_size: ",
        "batch.pairs is a whole step",
    ),
    "name of another section": (("seed: 7", "beta: 0.1"), ":19: beta: ", "did you mean objective.beta?"),
    "three of that name": (("seed: 7", "every: 5"), ":19: every: ", "evaluation.every or checkpoint.every or log"),
    "no such feature": (("seed: 7", "plot_loss: true"), ":19: plot_loss: ", "log.tensorboard have the curves"),
    "an adapter elsewhere": (("seed: 7", "lora_r: 16"), ":19: lora_r: ", "here it is adapter.rank"),
    "secret": (("seed: 7", "hub_token: hf_abc"), ":19: hub_token: ", "read from the environment"),
    "text for a number": (("5e-7", "fast"), ":12: optimizer.learning_rate: ", '"fast": must be a number >= 0'),
    "fraction for a whole number": (("pairs: 32", "pairs: 1.5"), ":8: batch.pairs: ", "1.5: must be a whole number"),
    "boolean for a number": (("steps: 100", "steps: true"), ":18: steps: ", "true: must be a whole number > 0"),
    "number for a boolean": (("tensorboard: false", "tensorboard: 1"), ":17: log.tensorboard: ", "1: must be true or"),
    "no for a boolean": (("tensorboard: false", "tensorboard: no"), ":17: log.tensorboard: ", '"no": must be true'),
    "number for text": (("output: runs/tiny", "output: 7"), ":20: output: ", "7: must be text"),
    "list for text": (("path: models/tiny", "path: [a]"), ":3: model.path: ", '["a"]: must be text'),
    "number in a list of text": (("[a.jsonl, ", "[3, "), ":5: data.train: ", "must be text or a list of text"),
    "block in a list of text": (("[a.jsonl, ", "[{a: b}, "), ":5: data.train: ", "must be text or a list of text"),
    "block for a value": (("beta: 0.2", "beta: {a: 1}"), ":10: objective.beta.a: ", "takes a number > 0 or null, not"),
    "value for a block": (("batch: {pairs: 32}", "batch: 32"), ":8: batch: ", "a block of settings, such as batch."),
    "not one of": (("beta: 0.2", "name: ippo"), ":10: objective.name: ", "no objective 'ippo'; did you mean ipo?"),
    "too small": (("beta: 0.2", "beta: 0"), ":10: objective.beta: ", "0: must be a number > 0"),
    "too large": (("beta: 0.2", "label_smoothing: 0.5"), ":10: objective.label_smoothing: ", ">= 0 and < 0.5"),
    "infinite": (("5e-7", ".inf"), ":12: optimizer.learning_rate: ", "must be a number"),
    "too large for a number": (("5e-7", "1e999"), ":12: optimizer.learning_rate: ", "must be a number"),
    "not a number": (("5e-7", ".nan"), ":12: optimizer.learning_rate: ", "must be a number"),
    "null": (("pairs: 32", "pairs: null"), ":8: batch.pairs: ", "null: must be a whole number > 0"),
    "empty text": (("output: runs/tiny", "output: ''"), ":20: output: ", "is empty"),
    "empty list": (("[a.jsonl, \"b.jsonl\"]", "[]"), ":5: data.train: ", "at least one"),
    "missing": (("output: runs/tiny", ""), ": output: ", "not given: folder of everything"),
    "given twice": (("seed: 7", "steps: 7"), ":19: steps: ", "is given twice, first at bad.yaml:18"),
    "given twice, once dotted": (
        ("seed: 7", "objective.beta: 0.3"),
        ":19: objective.beta: ",
        "is given twice, first at bad.yaml:10",
    ),
    "section twice": (("seed: 7", "model: {}"), ":19: model: ", "is given twice, first at bad.yaml:2"),
    "anchor": (("steps: 100", "steps: &a 100"), ":18: ", "anchors and aliases"),
    "alias": (("seed: 7", "seed: *a"), ":19: ", "anchors and aliases"),
    "tag": (("seed: 7", "seed: !!python/object/apply:os.system [ls]"), ":19: ", "tags (!) are refused"),
    "tab": (("  path: models/tiny", "\tpath: models/tiny"), ":3: ", "a tab where YAML wants spaces"),
    "syntax": (("batch: {pairs: 32}", "batch: {pairs: 32"), ":9: ", "not valid YAML"),
    "two documents": (("seed: 7", "---"), ":19: ", "not valid YAML"),
    "list at the top": ("- a\n- b\n", ": ", "the top level must be `section:` blocks"),
    "nothing": ("", ": ", "holds no settings"),
    "not text": (b"model: \xff\xfe", ": ", "is not UTF-8 text (byte 7)"),
    "control character": ("model: \x00", ":1: ", "not valid YAML"),
    "too large a file": ("#" * (1 << 20) + "\n", ": ", "larger than 1 MiB"),
    "too deep": ("a: " + "[" * 500_000, ":1: ", "nested too deeply"),
    "too many values": ("a: 1\n" * 100_000, ":5000: ", "more than 10,000 values"),
    "steps and epochs": (("seed: 7", "epochs: 2"), ":18: steps: ", "100: give steps or epochs, not both"),
    "both warm-ups": (("beta: 0.2", "beta: 1\noptimizer.warmup_steps: 3"), ":14: optimizer.warmup_fraction: ", "not"),
    "warm-up too long": (("warmup_fraction: 0.05", "warmup_steps: 100"), ":13: optimizer.warmup_steps: ", "be less"),
    "nothing to evaluate": (("  eval: held_out.jsonl\n", ""), ":14: evaluation.every: ", "nothing to evaluate"),
    "nothing to generate": (("every: 10", "max_new_tokens: 10"), ":15: evaluation.max_new_tokens: ", "leave it"),
    "sft with a reference": (
        ("beta: 0.2", "name: sft\nreference: {mode: live}"),
        ":11: reference.mode: ",
        "reference.mode: none",
    ),
    "a setting of another objective": (("beta: 0.2", "gamma: 1"), ":10: objective.gamma: ", "sigmoid does not use it"),
    "out of an objective's own range": (
        ("beta: 0.2", "{name: exo_pair, label_smoothing: 0}"),
        ":10: objective.label_smoothing: ",
        "a number > 0 and < 0.5 for objective exo_pair",
    ),
    "a schedule of nothing": (("beta: 0.2", "beta_schedule: cosine"), ":10: objective.beta_schedule: ", "beta_end"),
    "a moving reference kept on disk": (
        ("seed: 7", "reference: {mode: cached, update_every: 3}"),
        ":19: reference.mode: ",
        "cannot be cached",
    ),
    "a reward model that answers": (
        ("beta: 0.2", "name: reward\nevaluation.answers: a.jsonl"),
        ":11: evaluation.answers: ",
        "answers nothing",
    ),
    "dpo without one": (("seed: 7", "reference: {mode: none}"), ":19: reference.mode: ", "compares with a reference"),
    "two rests": (("seed: 7", "mesh: {data: -1, fsdp: -1}"), ":19: mesh.data: ", "only one axis"),
    "no devices": (("seed: 7", "mesh: {tensor: 0}"), ":19: mesh.tensor: ", "0: must be > 0, or -1"),
    "keeps what is not there": (("seed: 7", "checkpoint.keep_every: 150"), ":19: checkpoint.keep_every: ", "a multi"),
    "output over the model": (("runs/tiny", "models/../models/tiny"), ":20: output: ", "must differ from model.path"),
    "a column of no layout": (
        ("  max_length: 512", "  columns: {promt: q}"),
        ":7: data.columns: ",
        "'promt' is no column of a layout; did you mean prompt?",
    ),
    "a column for two": (
        ("  max_length: 512", "  columns:\n    chosen: a\n    rejected: a"),
        ":9: data.columns: ",
        "'a' is given for chosen and for rejected; keep one",
    ),
    "a number for a column": (
        ("  max_length: 512", "  columns: {prompt: 3}"),
        ":7: data.columns: ",
        "must be a block of names and values or null",
    ),
    "text for a block": (
        ("  max_length: 512", "  columns: prompt"),
        ":7: data.columns: ",
        "must be a block of names and values",
    ),
    "two ways to hold out": (
        ("  max_length: 512", "  eval_fraction: 0.1"),
        ":7: data.eval_fraction: ",
        "data.eval has held-out pairs already",
    ),
    "all held out": (("  eval: held_out.jsonl", "  eval_fraction: 1"), ":6: data.eval_fraction: ", "> 0 and < 1"),
    "a set without a file": (("eval: held_out.jsonl", "eval: {a: []}"), ":6: data.eval: ", "at least one file"),
    "a set whose file has no name": (("eval: held_out.jsonl", "eval: {a: ' '}"), ":6: data.eval: ", "is empty"),
    "a set with a strange name": (("eval: held_out.jsonl", "eval: {a/b: c}"), ":6: data.eval: ", "cannot name a set"),
    "a set of numbers": (("eval: held_out.jsonl", "eval: {a: 3}"), ":6: data.eval: ", "must be text or a list"),
    "epochs without the word": (("every: 10", "every: 0.5"), ":15: evaluation.every: ", "in words, as in '0.5 epochs'"),
    "no epochs": (("every: 10", "every: 0.0 epochs"), ":15: evaluation.every: ", "must be a whole number of steps > 0"),
    "other words": (("every: 10", "every: 2 passes"), ":15: evaluation.every: ", "or '1 epoch', or null"),
    "never": (("every: 10", "every: 0"), ":15: evaluation.every: ", "must be a whole number of steps > 0"),
    "no saving": (("seed: 7", "checkpoint.every: 0"), ":19: checkpoint.every: ", "in words, as in '0.5 epochs'"),
    "saving never": (("seed: 7", "checkpoint.every: null"), ":19: checkpoint.every: ", "must be a whole number"),
    "steps kept of passes": (
        ("seed: 7", "checkpoint: {every: 1 epoch, keep_every: 10}"),
        ":19: checkpoint.keep_every: ",
        "give checkpoint.every in steps",
    ),
    "no cache, in other words": (
        ("seed: 7", "model.compile_cache: 'off'"),
        ":19: model.compile_cache: ",
        "null keeps none",
    ),
    "nobody to judge": (("every: 10", "answers: null\n  judge: rule"), ":16: evaluation.judge: ", "leave it out"),
    "no judges": (("every: 10", "answers: a\n  judge: []"), ":16: evaluation.judge: ", "name a judge"),
    "a judge twice": (("every: 10", "answers: a\n  judge: [rule, rule]"), ":16: evaluation.judge: ", "leave one out"),
    "a person": (("every: 10", "answers: a\n  judge: [rule, human]"), ":16: evaluation.judge: ", "waits for nobody"),
    "no kind of judge": (("every: 10", "answers: a\n  judge: [rule, it]"), ":16: evaluation.judge: ", "reward:FOLDER"),
    "a template that no judge uses": (
        ("every: 10", "answers: a\n  judge: [rule, 'reward:r']\n  judge_template: t"),
        ":17: evaluation.judge_template: ",
        "leave it out",
    ),
    "patience for nothing": (("every: 10", "every: 10\n  patience: 2"), ":16: evaluation.patience: ", "which metric"),
    "best of an unknown metric": (
        ("seed: 7", "checkpoint.best: eval_los"),
        ":19: checkpoint.best: ",
        "no such metric; did you mean eval_loss?",
    ),
    "best of anything": (("seed: 7", "checkpoint.best: beauty"), ":19: checkpoint.best: ", "such as eval_loss"),
    "best of no answers": (("seed: 7", "checkpoint.best: pass_rate"), ":19: checkpoint.best: ", "evaluation.answers"),
    "best of no set": (
        ("seed: 7", "checkpoint.best: eval/kind/loss"),
        ":19: checkpoint.best: ",
        "no such metric; did you mean eval_",
    ),
    "best of two": (("every: 10", "every: null\ncheckpoint.best: eval_loss"), ":16: checkpoint.best: ", "between"),
    "best against what moves": (
        ("seed: 7", "checkpoint.best: eval_loss\nreference.update_every: 3"),
        ":19: checkpoint.best: ",
        "another thing at each step under reference.update_every; choose eval_logps",
    ),
    "unknown change": (("seed: 7", "checkpoint.allow_change: [sed]"), ":19: checkpoint.allow_change: ", "'sed' is not"),
    "harmless change": (("seed: 7", "checkpoint.allow_change: [output]"), ":19: checkpoint.allow_change: ", "leave it"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "place", "remedy"), BAD.values(), ids=BAD)
def test_each_mistake_has_its_line(good, capsys, change, place, remedy):
    if isinstance(change, tuple):
        assert GOOD.count(change[0]) == 1
        change = GOOD.replace(*change)
    Path("bad.yaml").write_bytes(change if isinstance(change, bytes) else change.encode())
    lines = problems("bad.yaml")
    named = [line for line in lines if line.startswith(f"bad.yaml{place}") and remedy in line]
    assert len(named) == 1, lines
    assert all(line.isprintable() and len(line) < 300 for line in lines)
    assert commands.command(config.load)(["bad.yaml"]) == 2
    assert capsys.readouterr().err.splitlines() == [f"error: {line}" for line in lines]


COMMAND_LINE = {
    "seed": "its value is missing; write seed=VALUE",
    "seed=": "seed: null: must be a whole number >= 0",
    "seed=[": "seed: not valid YAML",
    "seed=*a": "seed: not valid YAML: anchors and aliases",
    "sed=3": "sed: no such setting; did you mean seed?",
    "=3": "no such setting",
    "optimizer=lion": "such as optimizer.name=lion",
    "batch=3": "batch: 3: must be a block of settings, such as batch.pairs=3",
    "evaluation.evry=3": "did you mean evaluation.every?",
    "--output": "its value is missing",
    "--dry-run": "--dry-run: no such setting",  # of another command
    "output=a\x1b[2J=b\udc80": "not valid YAML",
    "x" * 5000 + "=3": "no such setting",
    "a." * 3000 + "=3": "no such setting",
}


@pytest.mark.parametrize("word", COMMAND_LINE, ids=lambda word: ascii(word)[:20])
def test_mistakes_of_the_command_line_are_named_so(good, word):
    lines = problems(good, "--seed" if word == "seed" else word)
    assert len(lines) == 1 and lines[0].startswith("command line: ") and COMMAND_LINE[word] in lines[0]
    assert lines[0].isprintable() and len(lines[0]) < 300


def test_a_missing_file_is_named_with_its_neighbours(good):
    assert problems("rum.yaml") == ["rum.yaml: No such file or directory; did you mean run.yaml?"]
    assert problems("zzzzzzzzz") == [
        "zzzzzzzzz: No such file or directory; settings are given as FILE.yaml or section.key=value"
    ]
    Path("folder").mkdir()
    assert problems("folder")[0].startswith("folder: Is a directory")


def test_everything_that_is_wrong_is_said_at_once(good):
    Path("bad.yaml").write_text("model: {pth: m}\nbatch: {pairs: 0}\nsteps: 1\nsteps: x\n")
    lines = problems("bad.yaml", "objective.beta=-1", "nothing.yaml")
    places = ["nothing.yaml: ", "bad.yaml:4: steps: is given", "bad.yaml:1: model.pth: ", "bad.yaml:2: batch.pairs: "]
    places += ["bad.yaml:4: steps: ", "command line: objective.beta: "]
    assert len(lines) == len(places)
    for place in places:
        assert any(line.startswith(place) for line in lines), (place, lines)


def mixture(text):
    return problems("model.path=m", "data.train=d", "output=o", f"objective={text}")


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("[{name: sigmoid}, {nmae: sft}]", "block 2, nmae: objective sigmoid does not use it"),
        ("[{name: sigmoid}, {name: sfft}]", "block 2, name: no objective 'sfft'; did you mean sft?"),
        ("[{name: sigmoid, beta: -1}, {name: sft}]", "block 1, beta: must be a number > 0 for objective sigmoid"),
        ("[{name: sft, weight: x}]", "weight: must be a number >= 0"),
        ("[{name: kto}, {name: sigmoid}]", "name: kto and sigmoid want different data; train them one by one"),
        ("[{name: reward}, {name: sigmoid}]", "name: reward trains a scalar head"),
        ("[]", "names no objective"),
        ("[sigmoid, sft]", "a list of blocks is wanted"),
    ],
)
def test_what_is_wrong_with_a_mixture_is_named_with_its_block(good, text, remedy):
    (line,) = mixture(text)
    assert line.startswith("command line: objective") and remedy in line, line


def test_a_mixture_beside_settings_of_one_objective_is_refused(good):
    Path("run.yaml").write_text(GOOD.replace("  beta: 0.2", "- {name: sigmoid}\n- {name: sft}\nobjective.beta: 0.2"))
    (line,) = problems(good)
    assert line.startswith("run.yaml:12: objective.beta: 0.2: stands beside a list of objectives")


def test_what_takes_the_place_of_a_section_ends_what_was_given_of_it(good):
    mixture = config.load([good, "objective=[{name: sigmoid}, {name: sft}]"]).objective
    assert (
        mixture
        == config.load(
            ["model.path=m", "data.train=d", "output=o", "objective=[{name: sigmoid}, {name: sft}]"]
        ).objective
    )
    assert config.load([good, "objective=null"]).objective == plain_run().objective
    assert config.load([good, "objective=null", "objective.beta=0.7"]).objective.beta == 0.7
    Path("more.yaml").write_text("evaluation: null\n")
    assert config.load([good, "more.yaml"]).evaluation == plain_run("data.eval=e").evaluation


def test_an_override_wins_over_files_wherever_it_stands(good):
    orders = (["seed=3", good], [good, "seed=3"], ["--seed", "3", good], ["seed=2", good, "seed=3"])
    assert [config.load(argv).seed for argv in orders] == [3] * 4


def test_a_config_of_another_command_or_trainer_is_told_as_a_whole(good):
    Path("rounds.yaml").write_text(GOOD + "rounds: {number: 3, prompts: p.jsonl, judge: rule}\n")
    (line,) = problems("rounds.yaml")
    assert line.startswith("rounds.yaml:21: rounds.number: is of the command rounds; run it with ")
    Path("trl.yaml").write_text("model_name_or_path: m\ndataset_name: d\noutput_dir: o\nbeta: 0.1\n")
    (line,) = problems("trl.yaml")
    assert line.startswith("trl.yaml: has settings of another trainer (model_name_or_path, dataset_name, output_dir, ")
    assert line.endswith("config trl.yaml writes the file that is wanted")
    names = ["model_name_or_path=m", "output_dir=o", "dataset_name=d"]  # a few of their names in a run of ours
    assert len(problems(good, *names)) == 3


def test_nothing_at_all_is_answered_with_where_to_begin():
    (line,) = problems()
    assert line.startswith("command line: no settings; give CONFIG.yaml, such as one that ")


def test_a_name_that_a_section_has_in_a_longer_form_is_looked_for_there_first():
    (line,) = problems("model.path=m", "data.train=d", "output=o", "model.dtype=bfloat16")
    assert line.endswith("did you mean model.compute_dtype or model.gradient_dtype?")


@pytest.mark.parametrize("name", ["dpo", "R-DPO", "Bradley_Terry", "nll"])
def test_objectives_are_known_by_their_other_names(good, name):
    (line,) = problems("model.path=m", "data.train=d", "output=o", f"objective.name={name}")
    assert KNOWN_AS[name.lower().replace("-", "_")] in line


def test_the_reference_is_what_the_objective_asks_for():
    modes = {"sigmoid": "cached", "simpo": "none", "sft": "none", "orpo": "none", "mpo": "cached", "reward": "none"}
    for name, mode in modes.items():
        assert plain_run(f"objective.name={name}").reference.mode == mode
    assert plain_run("objective.reference_free=true").reference.mode == "none"
    assert plain_run("reference.update_every=5").reference.mode == "live"


def test_several_contradictions_are_said_at_once(good):
    lines = problems(good, "objective.name=sft", "epochs=1", "output=models/tiny")
    assert [line.split(": ")[1] for line in lines] == ["steps", "output", "objective.beta"]


KNOWN_NAMES = {key.split(".")[-1] for key in FIELDS}
ONE_OF_EACH = {answer: name for name, answer in FOREIGN.items() if name not in KNOWN_NAMES}


@pytest.mark.parametrize("answer", ONE_OF_EACH)
def test_names_from_elsewhere_lead_to_ours(good, answer):
    (line,) = problems(good, f"{ONE_OF_EACH[answer].replace('*', 'a')}=1")
    assert answer in FIELDS or len(answer) > 20
    assert answer in line


def test_what_a_name_from_elsewhere_means_is_a_setting_that_there_is():
    """An answer of the form section.key is one of ours, and settings that advice names exist."""
    for answer in set(FOREIGN.values()):
        assert answer in FIELDS or " " in answer
        sections = "|".join({key.split(".")[0] for key in FIELDS if "." in key})
        named = re.findall(rf"\b((?:{sections})\.[a-z_0-9]+)\b", answer)
        assert [key for key in named if key not in FIELDS and key != "metrics.jsonl"] == []


def test_the_name_of_an_objective_may_stand_for_its_block(good):
    Path("named.yaml").write_text("objective: hinge\n")
    assert plain_run("objective=simpo") == plain_run("objective.name=simpo")
    assert plain_run("named.yaml").objective.name == "hinge"
    assert plain_run("named.yaml", "objective=ipo", "objective.beta=0.2") == plain_run(
        "objective.name=ipo", "objective.beta=0.2"
    )
    assert plain_run("objective={name: ipo, beta: 0.2}", "objective=simpo") == plain_run("objective=simpo")
    (line,) = problems(good, "objective=dpo")
    assert line.startswith('command line: objective.name: "dpo": ') and "sigmoid is DPO" in line


@pytest.mark.parametrize("name", ["SimPO", "Sig-moid", "IPO"])
def test_an_objective_in_other_letters_is_recognised(good, name):
    (line,) = problems(good, f"objective.name={name}")
    near = name.lower().replace("-", "")
    assert line.endswith(f"did you mean {near}?")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("data.path", "data.train"),
        ("data.file", "data.train"),
        ("data.validation", "data.eval"),
        ("model.name", "model.path"),
        ("reference.model", "reference.path"),
    ],
)
def test_what_a_section_has_under_another_name_is_looked_for_there(good, name, key):
    assert problems(good, f"{name}=x") == [f"command line: {name}: no such setting; did you mean {key}?"]


MEANT = {
    "objective.name=orpo objective.beta=0.1": "objective orpo does not use it; odds_weight is TRL's beta of ORPO",
    "objective.name=orpo objective.lambda=0.1": "no such setting; ORPO's lambda is objective.odds_weight",
    "objective.lambda_u=1": "did you mean objective.undesirable_weight?",
    "objective.name=rpo objective.alpha=1": "no such setting; RPO's alpha is objective.sft_weight",
    "objective.name=ipo objective.tau=0.1": "beta is IPO's tau",
    "objective.name=robust objective.epsilon=0.1": "did you mean objective.label_smoothing?",
    "objective.name=simpo objective.margin=1": "did you mean objective.gamma?",
    "objective.sft_weight=1": "objective rpo takes sft_weight",
    "objective.lambdas=1": "no such setting; --help lists them all",
    "objective.bata=1": "did you mean objective.beta?",
    "objective=[{name: orpo, lambda: 0.1}]": "lambda: objective orpo does not use it; odds_weight is TRL's beta",
}


@pytest.mark.parametrize("words", MEANT)
def test_what_papers_and_trl_call_a_setting_of_an_objective_leads_to_ours(words):
    given = [words] if "[" in words else words.split()
    (line,) = problems("model.path=m", "data.train=d", "output=o", *given)
    assert MEANT[words] in line and line.startswith("command line: objective.")


def test_what_a_setting_is_meant_by_is_one_that_the_objective_or_the_one_named_takes():
    for (objective, key), meant in terms.MEANT.items():
        assert key not in terms.takes(objective)
        another = re.match(r"objective (\w+) takes (\w+)$", meant)
        name = another[1] if another else objective
        assert (another[2] if another else meant.split()[0]) in terms.takes(name) or "block" in meant


def test_of_two_settings_that_exclude_each_other_the_advised_null_turns_one_off(good):
    (line,) = problems(good, "epochs=2")
    assert "steps=null" in line
    assert config.load([good, "epochs=2", "steps=null"]).epochs == 2
    (line,) = problems("model.path=m", "data.train=d", "output=o", "data.eval=e", "data.eval_fraction=0.1")
    assert "data.eval=null" in line
    (line,) = problems(good, "optimizer.warmup_steps=3")
    assert "optimizer.warmup_steps=null" in line


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("eval_accuracy", "eval_rewards/accuracies"),
        ("acc", "eval_rewards/accuracies"),
        ("logps/accuracie", "eval_logps/accuracies"),
    ],
)
def test_the_metric_that_is_likely_meant_is_offered_first(given, meant):
    words = ["data.eval=e", "evaluation.every=5"]
    (line,) = problems("model.path=m", "data.train=d", "output=o", *words, f"checkpoint.best={given}")
    assert line.endswith(f"did you mean {meant}?")
    assert plain_run(*words, f"checkpoint.best={meant}").checkpoint.best == meant


@pytest.mark.parametrize("name", WITH_VALUE)
def test_a_value_that_is_advised_for_a_name_from_elsewhere_is_taken(good, name):
    (line,) = problems(good, f"{name}=true")
    assert f"here it is {WITH_VALUE[name]}" in line
    words = [word.rstrip(",") for word in WITH_VALUE[name].split() if "=" in word]
    assert words and answer_to(name) in WITH_VALUE[name]
    plain_run(*(word.replace("OWNER", "me") for word in words))


def test_what_a_name_from_elsewhere_may_be_is_listed_where_it_is_a_choice(good):
    (line,) = problems(good, "optim=adamw_torch")
    assert line.endswith("here it is optimizer.name, one of adamw, lion, adafactor")


SECRETS = ("hf_abcdefghijklmnopqrstuvwxyz", "ghp_abcdefghijklmnopqrstuvwxyz", "https://me:hunter2@host/x", "swordfish")
UNKNOWN = ("wandb_api_key", "model.token", "password", "hf_token")


@pytest.mark.parametrize(
    ("key", "secret"),
    [(key, secret) for key in (*UNKNOWN, "seed", "data.layout") for secret in SECRETS[: 4 if key in UNKNOWN else 3]],
)
def test_no_secret_is_printed(good, capsys, key, secret):
    assert commands.command(config.load)([good, f"{key}={secret}"]) == 2
    assert commands.command(config.load)([good, f"{key}=[{secret}"]) == 2
    printed = capsys.readouterr()
    assert secret not in printed.err + printed.out and "hunter2" not in printed.err


def test_no_secret_is_printed_with_the_settings(good, capsys):
    with pytest.raises(SystemExit):
        config.load([good, f"data.train={SECRETS[2]}", "--print-config"])
    assert "hunter2" not in capsys.readouterr().out


def test_five_hundred_mutations_never_give_a_traceback(good, capsys):
    generator = random.Random(20)
    pieces = "\t,\n,: ,- ,{,},[,],',\",&a ,*a,!!set ,? ,|,#,\\,<<: ,%,null,1e-3,-1,true,model:,\x00,\u202e,,".split(",")
    pieces += ["---\n", "...", "@", "9" * 30]
    refused = 0
    for _ in range(500):
        text = GOOD
        for _ in range(generator.randint(1, 4)):
            at, length = generator.randrange(len(text)), generator.choice([0, 0, 1, 3, 20])
            text = text[:at] + generator.choice(pieces) + text[at + length :]
        Path("mutant.yaml").write_text(text)
        try:
            config.load(["mutant.yaml"])
        except UserError as error:
            refused += 1
            for line in str(error).splitlines():
                assert line.startswith("mutant.yaml:") and line.isprintable() and len(line) < 400
    assert refused > 300


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=4))
def test_no_command_line_gives_a_traceback(tmp_path_factory, words):
    words = [word for word in words if "\x00" not in word and word not in ("-h", "--help")]
    with pytest.raises(UserError):
        config.load(["data.train=d", *words])


# ---------------------------------------------------------------------------------------------- the mathematics


def test_every_setting_is_claimed():
    assert not CHANGES_MATHEMATICS & KEEPS_MATHEMATICS
    assert CHANGES_MATHEMATICS | KEEPS_MATHEMATICS == set(FIELDS)


def test_a_change_of_the_mathematics_is_named():
    old, new = dump(plain_run()), dump(plain_run("optimizer.learning_rate=1e-6", "steps=3", "log.every=5", "output=p"))
    assert changed_mathematics(old, new) == [
        "optimizer.learning_rate: 5e-07 -> 1e-06",
        "steps: null -> 3",
        "epochs: 1.0 -> null",
    ]
    assert changed_mathematics(old, json.loads(json.dumps(old))) == []


def test_a_change_of_a_block_is_named_whole():
    old, new = dump(plain_run()), dump(plain_run("data.columns={prompt: q}", "data.chat_template_kwargs.mood=calm"))
    assert changed_mathematics(old, new) == [
        'data.columns: null -> {"prompt": "q"}',
        'data.chat_template_kwargs: null -> {"mood": "calm"}',
    ]
    run = plain_run("data.columns={prompt: q}", "checkpoint.allow_change=[data.columns]")
    assert run.checkpoint.allow_change == ("data.columns",)


def test_a_dump_of_another_version_is_compared_by_defaults():
    new = dump(plain_run())
    old = json.loads(json.dumps(new))
    del old["optimizer"]["beta2"]
    assert changed_mathematics(old, new) == []
    old["optimizer"]["nesterov"] = True
    assert changed_mathematics(old, new) == ["optimizer.nesterov: true -> null"]


# ---------------------------------------------------------------------------------------------- commands


def test_in_python_a_run_is_checked_as_well():
    with pytest.raises(ValidationError, match="give steps or epochs"):
        Run.model_validate({"model": {"path": "m"}, "data": {"train": "d"}, "output": "o", "steps": 1, "epochs": 1})


def test_every_setting_has_a_description():
    assert [key for key, field in FIELDS.items() if not field.description] == []


def test_help_lists_every_setting_and_imports_nothing_heavy():
    code = "try: load(['--help'])\nfinally: sys.stderr.write(' '.join(sys.modules))"
    done = python("-c", f"import sys\nfrom dpo_jax.config.run import load\n{code}")
    assert done.returncode == 0
    assert not {"jax", "transformers", "numpy", "flax", "torch"} & set(done.stderr.split())
    for key in FIELDS:
        assert f"\n  {key}  (" in done.stdout


def test_the_schema_needs_no_config(capsys):
    with pytest.raises(SystemExit):
        config.load(["--print-schema"])
    schema = json.loads(capsys.readouterr().out)
    assert schema["properties"].keys() == {key.split(".")[0] for key in FIELDS}


@pytest.mark.parametrize(
    ("argv", "code", "err"),
    [
        (["run.yaml"], 0, ""),
        (["run.yaml", "steps=x"], 2, 'error: command line: steps: "x": must be a whole number > 0 or null\n'),
        (["ran.yaml"], 2, "error: ran.yaml: No such file or directory; did you mean run.yaml?\n"),
    ],
)
def test_a_command_prints_one_line_and_no_traceback(good, argv, code, err):
    done = python("-c", COMMAND, *argv, cwd=".")
    assert (done.returncode, done.stderr) == (code, err)


@pytest.mark.parametrize("argv", [["run.yaml", "optimizer.lr=1"], ["run.yaml", "steps=0"], ["nothing.yaml"]])
def test_train_refuses_settings_in_one_line(good, argv):
    done = python("-m", "dpo_jax.train", *argv, cwd=".")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")


def test_a_reader_that_goes_away_is_no_error(good):
    code = PREAMBLE + "def main(argv):\n    while True: print('x' * 100)\nsys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize(
    "words",
    [
        ("objective.name=ipo", "objective.label_smoothing=0.0"),
        ("objective.name=simpo", "objective.sft_weight=0", "reference.mode=none"),
    ],
)
def test_a_value_that_changes_nothing_may_be_given(good, words):
    """It stands in the file of another objective, say; another value of it is refused still."""
    run = config.load([good, "objective.beta=0.2", *words])
    assert [term.name for term in run.objective.terms] == [words[0].split("=")[1]]
    key = words[1].split("=")[0]
    with pytest.raises(UserError, match=f"{key}: 0.3: objective .* does not use it"):
        config.load([good, *words[:1], f"{key}=0.3"])


@pytest.mark.parametrize(
    ("words", "off", "left"),
    [
        (("evaluation.answers=a.jsonl", "evaluation.max_new_tokens=7"), ("evaluation.answers=null",), "max_new_tokens"),
        (("evaluation.every=7",), ("data.eval=null",), "every"),
        (("reference.update_every=3", "reference.update_rate=0.5"), ("reference.update_every=null",), "update_rate"),
    ],
)
def test_what_null_turns_off_takes_along_what_only_it_would_use(good, words, off, left):
    """A file has both, and the command line turns one off; without a word of it, what is left over is refused."""
    run = config.load([good, *words, *off])
    assert run == config.load([good, "data.eval=null", "evaluation.every=null"] if left == "every" else [good])
    Path("plain.yaml").write_text(GOOD.replace("  eval: held_out.jsonl\n", "").replace("  every: 10", "  every: null"))
    with pytest.raises(UserError, match=left):
        config.load(["plain.yaml", words[-1]])


def test_a_value_that_turns_off_what_is_not_there_may_be_given(good):
    run = config.load([good, "objective.beta=null", "objective.name=reward", "log.token_statistics=false"])
    assert run.objective.trains_reward_model
    with pytest.raises(UserError, match="log.token_statistics: true: a reward model has no tokens"):
        config.load([good, "objective.beta=null", "objective.name=reward", "log.token_statistics=true"])


def test_blocks_of_names_are_put_together_from_files_and_the_command_line(good):
    Path("more.yaml").write_text("data:\n  columns: {prompt: q}\n  chat_template_kwargs: {a: {b: [1, x]}}\n")
    run = config.load([good, "more.yaml", "data.columns.chosen=good", "data.chat_template_kwargs.a.c=2"])
    assert run.data.columns == {"prompt": "q", "chosen": "good"}
    assert run.data.chat_template_kwargs == {"a": {"b": [1, "x"], "c": 2}}
    assert config.load([good, "more.yaml", "data.columns=null"]).data.columns is None
    for name in ("chosen", "prompt"):
        run = config.load([good, "more.yaml", "data.columns=null", f"data.columns.{name}=c"])
        assert run.data.columns == {name: "c"}


def test_faults_of_ours_keep_their_traceback(capsys):
    def main(argv):
        raise {"k": KeyboardInterrupt, "b": BrokenPipeError, "v": ValueError}[argv[0]]

    assert commands.command(main)(["k"]) == 130
    assert capsys.readouterr().err == "stopped from the keyboard; run the same command again\n"
    with pytest.raises(ValueError):
        commands.command(main)(["v"])


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_that_asks_to_end_is_answered_in_one_line(capsys, name):
    """Where it comes before the loop, or in the export: there it would end the process without a word."""
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # these tests may run under nohup
    assert commands.command(lambda argv: os.kill(os.getpid(), number))([]) == 75
    assert capsys.readouterr().err == f"stopped by {name}; run the same command again\n"
    assert signal.signal(number, before) == signal.SIG_DFL


def test_a_hangup_that_nohup_ignores_stays_ignored(capsys):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert commands.command(lambda argv: os.kill(os.getpid(), signal.SIGHUP))([]) == 0
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
        assert interrupts.asked is None
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
        assert interrupts.asked == signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_that_python_drops_comes_again(capsys):
    """What a handler raises in the end of an object goes nowhere: the run would not stop at once, nor say why."""

    class Ends:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    hook = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.asked == signal.SIGINT
        Ends()
        time.sleep(10)
    assert "ignored" not in capsys.readouterr().err and sys.unraisablehook is hook


def test_a_pipe_of_ours_that_broke_is_a_fault():
    code = PREAMBLE + "def main(argv): raise BrokenPipeError('worker')\nsys.exit(main())"
    done = python("-c", code)
    assert done.returncode == 1 and "BrokenPipeError: worker" in done.stderr


def test_arguments_of_other_commands_are_refused_in_one_line():
    parser = commands.Parser("sample", "Answer.")
    parser.add_argument("folder")
    with pytest.raises(UserError, match=r"command line: .*folder.*; see python -m dpo_jax.sample --help"):
        parser.parse_args([])


def test_messages_cannot_forge_lines_or_move_the_cursor(capsys):
    def main(argv):
        raise UserError("row \x1b[2J\x9b \u202e hf_abcdefghijklmnopqrstuvwxyz\nsecond")

    assert commands.command(main)([]) == 2
    assert capsys.readouterr().err == "error: row \\x1b[2J\\x9b \\u202e ***\nerror: second\n"


def test_configs_of_the_repository_load():
    loads = {"rounds.yaml": rounds.load}
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        loads.get(path.name, config.load)([str(path)])


def test_a_later_value_replaces_sets_of_held_out_data_and_sets_replace_a_value(good):
    Path("sets.yaml").write_text("data: {eval: {kind: a.jsonl, safe: b.jsonl}}\n")
    assert config.load([good, "sets.yaml"]).data.eval == {"kind": "a.jsonl", "safe": "b.jsonl"}
    assert config.load([good, "sets.yaml", "data.eval.safe=c"]).data.eval == {"kind": "a.jsonl", "safe": "c"}
    assert config.load([good, "sets.yaml", "data.eval=one.jsonl"]).data.eval == "one.jsonl"
    assert config.load([good, "sets.yaml", "data.eval=null", "data.eval_fraction=0.1"]).data.eval is None
    assert config.load([good, "data.eval.kind=a"]).data.eval_sets == {"kind": "a"}


def test_what_null_turns_off_takes_what_looked_at_it_along(good):
    watching = ("checkpoint.best=eval_loss", "evaluation.patience=2")
    off = config.load([good, *watching, "data.eval=null"])
    assert (off.evaluation.every, off.checkpoint.best, off.evaluation.patience) == (None, None, None)
    assert config.load([good, *watching, "checkpoint.best=null"]).evaluation.patience is None
    both = config.load([good, *watching, "data.eval=null", "data.eval_fraction=0.5"])
    assert both.evaluation.patience == 2 and both.checkpoint.best == "eval_loss"
