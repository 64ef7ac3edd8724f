"""Configs of other trainers become ours: sixty in their shapes, every key accounted for; what cannot be is refused."""

import functools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from dpo_jax import convert
from dpo_jax.config import run as config
from dpo_jax.config.bridge import rules, source, trainers, written
from dpo_jax.config.elsewhere import answer_to
from dpo_jax.config.run import FIELDS
from dpo_jax.errors import UserError
from dpo_jax.settings import GivenSettings
from tests.config.bridge.public_configs import PUBLIC, Public


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return name


def told(*settings: str) -> GivenSettings:
    given = GivenSettings()
    for setting in settings:
        given.override(*setting.split("=", 1))
    return given


@functools.cache
def ours(public: Public) -> tuple[str, list[str]]:
    file = write(public.name, public.text)
    return written.rewritten(file, told(*public.told), method=public.method, devices=public.devices)


@functools.cache
def conversion(public: Public):
    read = source.config_of(write(public.name, public.text))
    trainer = trainers.trainer_of(read)
    method, _ = trainers.method_of(read, trainer, public.method)
    given = frozenset(told(*public.told).values)
    return rules.converted(read, trainer, method, devices=public.devices, told=given)


def value_of(run: config.Run, key: str) -> Any:
    if key == "objective.blocks":
        return list(run.objective.blocks)
    found = functools.reduce(getattr, key.split("."), run)
    return list(found) if isinstance(found, tuple) else found


def like(found: Any, wanted: Any) -> bool:
    """Equal, with lists for tuples; a block may have settings beside those that are wanted."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(key in found and like(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(like, found, wanted))
    return found == (tuple(wanted) if isinstance(found, tuple) else wanted)


def test_there_are_sixty_of_five_trainers():
    names = {trainers.trainer_of(source.config_of(write(public.name, public.text))).name for public in PUBLIC}
    assert len(PUBLIC) == 60 and len({public.name for public in PUBLIC}) >= 55 and len(names) == 5


@pytest.mark.parametrize("public", PUBLIC, ids=lambda public: public.name)
def test_a_public_config_becomes_a_run(public):
    text, asked = ours(public)
    run = config.load([write("ours.yaml", text)])
    found = {key: value_of(run, key) for key in public.becomes}
    assert {key: found[key] for key in found if not like(found[key], public.becomes[key])} == {}
    open_ = {line.split(":")[0] for line in asked}
    assert open_ - {"--devices", "export.push", "data.max_length"} == set(public.asks)


@pytest.mark.parametrize("public", PUBLIC, ids=lambda public: public.name)
def test_every_key_is_accounted_for(public):
    c = conversion(public)
    text = ours(public)[0].replace("\n#     ", " ")
    assert [key for key in c.config.given if not c.settled(key)] == []
    assert [key for key, why in c.left.items() if "not known here" in why] == []
    for key, given in c.config.given.items():
        entry = written._entry(given).key
        assert key in text or entry in text
        assert given.line is None or f"(line {given.line})" in text


@pytest.mark.parametrize("public", PUBLIC, ids=lambda public: public.name)
def test_every_setting_says_where_it_came_from(public):
    text, _ = ours(public)
    settings = [line for line in text.splitlines() if re.match(r"\s*[a-z_0-9]+: \S", line)]
    assert settings and all("  # " in line for line in settings)
    run = config.load([write("ours.yaml", text)])
    c = conversion(public)
    assert config.dump(run) == config.dump(config.validated(written.settings_of(c, told(*public.told))))


def test_the_learning_rate_and_beta_of_a_silent_config_are_written_down():
    text, _ = written.rewritten(
        write("dpo/c.yaml", "model_name_or_path: m\ndataset_name: d\noutput_dir: o\nld_alpha: 1\n"), told()
    )
    assert re.search(r"learning_rate: 1e-6  # TRL's default learning_rate", text)
    assert re.search(r"beta: 0.1  # TRL's default beta", text)
    assert re.search(r"pairs: 8  # TRL's default per_device_train_batch_size", text)
    assert "epochs: 3  # TRL's default num_train_epochs" in text and "warmup_steps: 0  # TRL's default" in text


def test_the_batch_is_that_of_all_devices_and_asked_about():
    file = write(
        "c.yaml",
        "base_model: m\nrl: dpo\nlearning_rate: 1e-6\nmicro_batch_size: 3\ngradient_accumulation_steps: 5\n"
        "datasets: [{path: d}]\n",
    )
    pairs = {}
    for devices in (None, 1, 8):
        text, asked = written.rewritten(file, told(), devices=devices)
        pairs[devices] = config.load([write("o.yaml", text)]).batch.pairs
        assert any("--devices" in line for line in asked) == (devices is None)
    assert pairs == {None: 15, 1: 15, 8: 120}


def test_what_the_command_line_gives_wins_and_answers():
    public = next(public for public in PUBLIC if public.name == "mine.yaml" and public.asks)
    file = write(public.name, public.text)
    text, asked = written.rewritten(file, told("data.train=here.jsonl", "steps=7", "objective.name=ipo"), devices=1)
    run = config.load([write("o.yaml", text)])
    assert (run.data.train, run.steps, run.epochs, run.objective.name) == ("here.jsonl", 7, None, "ipo")
    assert asked == []


def test_a_data_set_of_llama_factory_is_looked_up_beside_the_config():
    columns = {"prompt": "q", "chosen": "a", "rejected": "b"}
    entry = {"hf_hub_url": "org/mine", "ranking": True, "subset": "en", "split": "test", "columns": columns}
    write("there/data/dataset_info.json", json.dumps({"mine": entry}))
    text, asked = written.rewritten(
        write("there/c.yaml", "model_name_or_path: m\nstage: dpo\ndataset: mine\noutput_dir: o\nlearning_rate: 1e-6\n"),
        told(),
        devices=1,
    )
    run = config.load([write("o.yaml", text)])
    assert run.data.train == "org/mine:en:test" and run.data.as_chat
    assert run.data.columns == {"chosen": "a", "rejected": "b", "prompt": "q"} and asked == []


# ------------------------------------------------------------------------------------------------ what is refused

BASE = "model_name_or_path: m\noutput_dir: o\n"
REFUSED = {
    "grpo": ("grpo.yaml", "base_model: m\nrl: grpo\ndatasets: [{path: d}]\n", "generates and rewards answers"),
    "ppo": ("ppo.yaml", BASE + "stage: ppo\ndataset: d\n", "generates and rewards answers"),
    "pretraining": ("pt.yaml", BASE + "stage: pt\ndataset: c4_demo\n", "pretrains on plain text"),
    "axolotl's pretraining": ("p.yml", "base_model: m\npretraining_dataset: [{path: d}]\n", "pretrains on plain text"),
    "a GRPO script": ("g.py", "from trl import GRPOConfig\nGRPOConfig(learning_rate=1)\n", "calls GRPOConfig"),
    "a distillation": (
        "kd.yaml",
        "tokenizer: {_component_: t}\noptimizer: {_component_: o}\nkd_loss: {_component_: k}\n",
        "distils",
    ),
    "an evaluation": ("e.yaml", "tokenizer: {_component_: t}\nmodel: {_component_: m}\n", "nothing is trained"),
    "accelerate": ("a.yaml", "compute_environment: LOCAL_MACHINE\nnum_processes: 8\n", "accelerate launch"),
    "deepspeed": ("d.json", '{"zero_optimization": {"stage": 3}}', "DeepSpeed"),
    "a merge": ("m.yaml", BASE + "export_dir: x\n", "merges or exports"),
    "our own": ("o.yaml", "model: {path: m}\ndata: {train: d}\n", "of this package already"),
    "nobody's": ("n.yaml", "a: 1\n", "no config of TRL"),
    "no method": ("n.yaml", BASE + "dataset_name: d\nlearning_rate: 1e-6\n", "give --method"),
    "no model": ("n/dpo.yaml", "dataset_name: d\nbeta: 0.1\n", "model.path=VALUE"),
    "no data": ("dpo.yaml", BASE + "beta: 0.1\n", "data.train=VALUE"),
    "no rate": ("a.yml", "base_model: m\nrl: dpo\ndatasets: [{path: d}]\n", "optimizer.learning_rate=VALUE"),
    "no notebook": ("n.ipynb", "{}", "is no notebook"),
    "a layer count": (
        "f.yaml",
        BASE + "stage: sft\nfinetuning_type: freeze\ndataset: identity\n",
        "model.freeze=VALUE",
    ),
    "another loss": (
        "l.yaml",
        BASE + "dataset_name: d\nloss_type: alphapo\ncpo_alpha: 0\n",
        "l.yaml:4: loss 'alphapo'",
    ),
    "unpaired APO": (
        "k.yaml",
        BASE + "dataset_name: d\nloss_type: apo_zero_unpaired\ndesirable_weight: 1\n",
        "objective.name=kto",
    ),
    "a value out of range": (
        "v.yaml",
        BASE + "dataset_name: d\nbeta: -1\nld_alpha: 1\n",
        "v.yaml:4: objective.beta: -1",
    ),
    "no arguments": ("s.py", "from trl import DPOTrainer\nparser.parse()\n", "give a file NAME.sh"),
    "no Python": ("s.py", "def f(:\n", "is not Python"),
    "no command": ("s.sh", "echo hello\n", "no command in it"),
    "a config that is not here": ("s.sh", "trl dpo --config gone.yaml\n", "gone.yaml, which is not here"),
    "quotes": ("s.sh", "trl dpo --x 'a\n", "correct the quotes"),
    "a key twice": ("t.yaml", BASE + "beta: 1\nbeta: 2\n", "is given twice"),
    "no YAML": ("t.yaml", "a: [1\n", "not valid YAML"),
    "no file": ("gone/../nothing.sh", None, "No such file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_one_line(name, capsys):
    file, text, part = REFUSED[name]
    if text is not None:
        write(file, text)
    assert convert.main(["config", file]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and part in err and err.count("\n") == 1


def test_the_command_prints_and_never_overwrites(capsys):
    public = PUBLIC[0]
    file = write(public.name, public.text)
    assert convert.main(["config", file, "--devices", "4", "seed=3"]) == 0
    out, err = capsys.readouterr()
    assert "seed: 3  # given with the command" in out and err == ""
    assert config.load([write("o.yaml", out)]).batch.pairs == 64
    assert convert.main(["config", file, "--devices", "4", "seed=3", "--output", "new.yaml"]) == 0
    assert Path("new.yaml").read_text() == out
    for target in ("new.yaml", file):
        before = Path(target).read_text()
        assert convert.main(["config", file, "--output", target]) == 2 and Path(target).read_text() == before
    capsys.readouterr()
    assert convert.main(["config", file]) == 0 and "asked: --devices: " in capsys.readouterr().err
    for wrong in (["--devices", "0"], ["seed"], ["sed=3"], ["--method", "ppo"]):
        assert convert.main(["config", file, *wrong]) == 2


def test_what_a_script_computes_is_asked_for_and_never_guessed():
    call = "DPOTrainer(model='m', args=DPOConfig({}), train_dataset=load_dataset('d'))"
    start = "from trl import DPOConfig, DPOTrainer\nSETTINGS = dict(beta=0.3)\nOURS = {'beta': 0.3}\n"
    needed = {
        "learning_rate=rate * 2, output_dir='o'": "optimizer.learning_rate",
        "beta=b, output_dir='o'": "objective.beta",
        "per_device_train_batch_size=n // 2, output_dir='o'": "batch.pairs",
    }
    for arguments, key in needed.items():
        file = write("s.py", f"{start}{call.format(arguments)}\n")
        with pytest.raises(UserError, match=f"{key}: .*is computed there.*give {key}=VALUE"):
            written.rewritten(file, told())
        assert "3  # given with the command" in written.rewritten(file, told(f"{key}=3"))[0]
    text, asked = written.rewritten(write("s.py", f"{start}{call.format('**OURS')}\n"), told(), devices=1)
    assert "beta: 0.3  # beta (line" in text and asked == []
    _, asked = written.rewritten(write("s.py", f"{start}{call.format('**SETTINGS, seed=1')}\n"), told(), devices=1)
    assert len(asked) == 1 and "SETTINGS is computed there" in asked[0]


@pytest.mark.parametrize(
    "change",
    [
        "select(range(9))",
        "filter(good)",
        "map(turn)",
        "rename_column('a', 'b')",
        "train_test_split(test_size=0.1)['train']",
    ],
)
@pytest.mark.parametrize("rows", ["rows = load_dataset('d').{}", "raw = load_dataset('d')\nrows = raw.{}"])
def test_what_a_script_does_to_the_rows_is_asked_about(change, rows):
    call = "DPOTrainer(model='m', args=DPOConfig(output_dir='o'), train_dataset=rows)"
    file = write("s.py", f"from trl import DPOConfig, DPOTrainer\n{rows.format(change)}\n{call}\n")
    text, asked = written.rewritten(file, told(), devices=1)
    method = change.partition("(")[0]
    assert len(asked) == 1 and asked[0].startswith(f"data.train: dataset.{method} is computed there ({method}(")
    assert f"dataset.{method} (line" in text
    plain = write("t.py", f"from trl import DPOConfig, DPOTrainer\n{rows.format('shuffle(3)')}\n{call}\n")
    assert written.rewritten(plain, told(), devices=1)[1] == []


@pytest.mark.parametrize("named", ["held = load_dataset({})", "held = load_dataset({}).shuffle()"])
def test_a_data_set_that_a_trainer_measures_on_is_not_trained_on(named):
    calls = ("'json', data_files='t.jsonl', split='train'", "'json', data_files='h.jsonl', split='train'")
    made = [f"rows = load_dataset({calls[0]})", named.format(calls[1])]
    for order in (made, made[::-1]):
        ends = "DPOTrainer(model='m', args=DPOConfig(output_dir='o'), train_dataset=rows, eval_dataset=held)"
        file = write("s.py", "\n".join(["from trl import DPOConfig, DPOTrainer", *order, ends, ""]))
        text = written.rewritten(file, told(), devices=1)[0]
        assert '  train: "t.jsonl"' in text and '  eval: "h.jsonl"' in text


def test_a_notebook_is_its_code():
    public = next(public for public in PUBLIC if public.name == "quick.py")
    sources = (["!pip install trl\n", "%cd /x\n"], public.text)
    cells = [{"cell_type": "markdown", "source": ["DPOConfig("]}]
    cells += [{"cell_type": "code", "source": source} for source in sources]
    file = write("n.ipynb", json.dumps({"cells": cells}))
    run = config.load([write("o.yaml", written.rewritten(file, told())[0])])
    assert run.objective.name == "kto" and run.model.path == "org/base-7b"


def test_a_file_is_not_held_out_from_itself():
    text = (
        "model_name_or_path: m\ndataset_name: pairs.jsonl\neval_strategy: steps\neval_steps: 10\nloss_type: sigmoid\n"
    )
    made, asked = written.rewritten(write("t.yaml", text), told(), method="dpo", devices=1)
    assert "eval:" not in made and [line.partition(":")[0] for line in asked] == ["data.eval_fraction"]
    made, asked = written.rewritten(write("t.yaml", text), told("data.eval_fraction=0.05"), method="dpo", devices=1)
    assert "eval_fraction: 0.05" in made and asked == []


def test_data_sets_that_need_different_columns_are_asked_about():
    sets = "[{path: a, type: chatml.intel}, {path: b, type: chatml.ultra}]"
    text = f"base_model: m\nrl: dpo\nlearning_rate: 1e-6\ndatasets: {sets}\n"
    _, asked = written.rewritten(write("c.yaml", text), told(), devices=1)
    assert [line.partition(":")[0] for line in asked] == ["data.columns"]


def test_nothing_of_a_script_runs():
    public = next(public for public in PUBLIC if public.name == "quick.py")
    text = f"open('ran', 'w')\n__import__('os').system('touch ran')\n{public.text}"
    assert "kto" in written.rewritten(write("evil.py", text), told())[0]
    write("evil.sh", "touch ran; trl dpo --model_name_or_path $(touch ran) --dataset_name d --beta `touch ran`0.1\n")
    with pytest.raises(UserError):
        written.rewritten("evil.sh", told())
    assert not Path("ran").exists()


def test_hostile_text_stays_in_its_place():
    hostile = 'x\\n\\"y: {z} # \\x1b[31m\\u2028'
    text, _ = written.rewritten(
        write(
            "h.yaml",
            f'{BASE}beta: 0.1\nld_alpha: 1\ndataset_name: "{hostile}"\n"evil\\nkey: 1": 2\nhub_token: hf_{"a" * 30}\n',
        ),
        told(),
    )
    run = config.load([write("o.yaml", text)])
    assert run.data.train == 'x\n"y: {z} # \x1b[31m\u2028'
    assert all(line.isprintable() for line in text.split("\n")) and "hf_aaa" not in text


@pytest.mark.parametrize(
    "per_epoch, every", [("1", "1 epoch"), ("2", "0.5 epochs"), ("12", "0.083333 epochs"), ("0.5", "2 epochs")]
)
def test_saving_so_many_times_a_pass_becomes_an_interval_that_is_read(per_epoch, every):
    public = next(public for public in PUBLIC if public.name == "instruct-dpo-lora-8b.yml")
    file = write("saves.yml", public.text.replace("saves_per_epoch: 1", f"saves_per_epoch: {per_epoch}"))
    text, _ = written.rewritten(file, told(*public.told), method=public.method, devices=public.devices)
    assert config.load([write("ours.yaml", text)]).checkpoint.every == every


@pytest.mark.parametrize("per_epoch", ["often", "true", "[1]", "-1", "0"])
def test_saving_no_times_a_pass_is_one_line_or_left_out(per_epoch):
    public = next(public for public in PUBLIC if public.name == "instruct-dpo-lora-8b.yml")
    file = write("saves.yml", public.text.replace("saves_per_epoch: 1", f"saves_per_epoch: {per_epoch}"))
    try:
        text, _ = written.rewritten(file, told(*public.told), method=public.method, devices=public.devices)
    except UserError as error:
        assert "saves_per_epoch" in str(error)
    else:
        assert config.load([write("ours.yaml", text)]).checkpoint.every == 100


def test_a_hundred_mutations_never_give_a_traceback():
    generator = random.Random(3)
    pieces = [
        "\t",
        "\n",
        ": ",
        "- ",
        "{",
        "}",
        "[",
        "]",
        '"',
        "null",
        "true",
        "-1",
        "1e99",
        "[1, a]",
        "{a: 1}",
        "0",
        "''",
        "x",
        "(",
        ")",
    ]
    done = 0
    for _ in range(100):
        public = generator.choice(PUBLIC)
        text = public.text
        for _ in range(generator.randint(1, 4)):
            at, length = generator.randrange(len(text)), generator.choice([0, 0, 1, 3, 12])
            text = text[:at] + generator.choice(pieces) + text[at + length :]
        try:
            found, _ = written.rewritten(write(f"m/{public.name}", text), told(*public.told), devices=1)
            config.load([write("o.yaml", found)])
            done += 1
        except UserError:
            pass
    assert 20 < done < 100


@pytest.mark.nightly
def test_any_value_may_be_anything():
    """A key of another kind than it should be is a line of an error, or left out: for each key of each trainer."""
    for public in (PUBLIC[1], PUBLIC[22], PUBLIC[30], PUBLIC[45], PUBLIC[55]):
        lines = public.text.splitlines()
        for number, line in enumerate(lines):
            if not (found := re.match(r"(\s*[\w-]+): ?\S+$", line)):
                continue
            for value in ("[a, 1]", "{a: 1}", "-3", "0", "text", "true", "0.5", "1e30"):
                changed = [*lines[:number], f"{found[1]}: {value}", *lines[number + 1 :]]
                try:
                    written.rewritten(write(f"m/{public.name}", "\n".join(changed)), told(*public.told), devices=1)
                except UserError as error:
                    assert str(error)


# ------------------------------------------------------------------------------- what a script trains and measures on

A = "load_dataset('json', data_files='a.jsonl', split='train')"
B = "load_dataset('json', data_files='b.jsonl')"
TWO = "load_dataset('json', data_files={'train': 'a.jsonl', 'test': 'b.jsonl'}"
LOADED = {
    "a split of the file": f"t = {A}\ne = load_dataset('json', data_files={{'test': 'b.jsonl'}}, split='test')",
    "a file each": f"t = {A}\ne = {B[:-1]}, split='train')",
    "a list of one": f"t = {A}\ne = load_dataset('json', data_files=['b.jsonl'], split='train')",
    "by keyword": f"t = {A}\ne = load_dataset(path='json', data_files='b.jsonl')['train']",
    "two splits": f"d = {TWO})\nt = d['train']\ne = d['test']",
    "both at once": f"t, e = {TWO}, split=['train', 'test'])",
    "a name again": f"t = {A}\nt = t.shuffle(1)\nd = {B}\nd = d['train']\ne = d",
    "a constant": f"F = 'b.jsonl'\nt = {A}\ne = load_dataset('json', data_files={{'dev': F}}, split='dev')",
    "where asked for": f"t = {A}\ne = {B}['train'] if measured else None",
}
"""Lines of a script that trains on a.jsonl and measures on b.jsonl."""
SETS = {
    "t = load_dataset('json', data_files={'x': ['a', 'c']}, split='x')\n"
    "e = load_dataset('json', data_files=['b', 'd'], split='train', data_dir='f')": (["a", "c"], ["f/b", "f/d"]),
    "d = load_dataset('json', data_files={'train': 'a', 'test': 'b'})\nt, e = d['test'], d['train']": ("b", "a"),
    "t = load_from_disk('rows')\ne = load_from_disk('held')": ("rows", "held"),
    "d = load_from_disk('x/d')\nt = d['train']\ne = d['test']": ("x/d:train", "x/d:test"),
    "d = load_dataset('o/d', 'c')\nt = d['train_p']\ne = d['test_p']": ("o/d:c:train_p", "o/d:c:test_p"),
    "t = load_dataset('o/d', split='train[:90%]')\ne = load_dataset('o/d', split='train[90%:]')": (
        "o/d:train[:90%]",
        "o/d:train[90%:]",
    ),
    "t = load_dataset('o/d')\nx = load_dataset('o/x', split='test')\ne = {'x': x, 'y': load_dataset('o/y')}": (
        "o/d",
        {"x": "o/x:test", "y": "o/y"},
    ),
}


def script(lines: str) -> str:
    args = "DPOConfig(output_dir='o', eval_strategy='steps', eval_steps=3)"
    call = f"DPOTrainer(model='m', args={args}, train_dataset=t, eval_dataset=e)"
    return write("s.py", f"from trl import DPOConfig, DPOTrainer\n{lines}\n{call}\n")


@pytest.mark.parametrize("lines", [*LOADED.values(), *SETS], ids=[*LOADED, *map(str, range(len(SETS)))])
def test_rows_are_followed_from_what_a_trainer_is_given_to_what_loads_them(lines):
    text, asked = written.rewritten(script(lines), told(), devices=1)
    run = config.load([write("o.yaml", text)])
    train, held = SETS.get(lines, ("a.jsonl", "b.jsonl"))
    assert like(run.data.train, train) and like(run.data.eval, held)
    assert asked == [] and run.evaluation.every == 3
    assert "# eval_dataset (line " in text and "eval_dataset_" not in text and "dataset_name" not in text


UNREAD = {
    "e = make(3)": "line 4 was not understood; give data.eval=FILE behind the file",
    "e = load_dataset('json', data_files=f(x))": "line 3 was not understood; give data.eval=FILE behind the file",
    "e = load_dataset('json', data_files={'x': 'b'}, split='test')": "line 3 was not understood; give data.eval=FILE",
    "e = load_dataset('json', data_files='b', split='train[:9%]')": "files have no such part as train[:9%]",
    "e = load_dataset('json', data_files='b/*.jsonl')['train']": "files are named one by one here",
    "e = load_dataset('o/d', data_files='b.jsonl')['train']": "download it and name its files",
    "e = load_dataset('o/d')[args.split]": "line 4 was not understood; give data.eval=FILE behind the file",
    "e = load_dataset('o/x')\nif y: e = load_dataset('o/y')": "line 5 was not understood; give data.eval=FILE",
    "d = t.train_test_split(test_size=0.1)\ne = d['test']": "line 5 is a share of the rows; give data.eval_fraction=0",
    "e = prepare(load_dataset('o/x'))": "eval_dataset.prepare is computed there (prepare(",
    "e = [load_dataset('o/x')]": "line 4 was not understood; give data.eval=FILE behind the file",
}


@pytest.mark.parametrize("lines", UNREAD)
def test_held_out_rows_that_cannot_be_followed_are_asked_about_in_terms_of_the_script(lines):
    file = script(f"t = {A}\n{lines}")
    text, asked = written.rewritten(file, told(), devices=1)
    (line,) = [line for line in asked if line.startswith("data.eval: ")]
    assert re.sub(r"line \d", "line N", UNREAD[lines]) in re.sub(r"line \d", "line N", line)
    assert "not known here" not in text and config.load([write("o.yaml", text)]).data.train == "a.jsonl"
    _, asked = written.rewritten(file, told("data.eval=b.jsonl"), devices=1)
    assert [line for line in asked if "data.eval" in line] == []


def test_rows_for_training_that_cannot_be_followed_are_those_of_the_only_call_or_asked_for():
    _, asked = written.rewritten(script(f"x = {A}\nt = f({{'x': x}}).y\ne = None"), told(), devices=1)
    assert "data.train: the training data set of line 5 was not understood, and is taken as that of line 2" in asked
    with pytest.raises(UserError, match="the training data set of line 5 was not understood; give data.train=VALUE"):
        written.rewritten(script("x = 3\nt = make(x)\ne = None"), told(), devices=1)
    with pytest.raises(UserError, match="download it and name its files"):
        written.rewritten(script("t = load_dataset('o/d', data_dir='x')\ne = None"), told(), devices=1)


# ------------------------------------------------------------------------------- nothing is held out from itself

AXOLOTL = "base_model: m\nrl: dpo\nlearning_rate: 1e-6\nevals_per_epoch: 2\n"
TUNE = (
    "tokenizer: {_component_: t}\nmodel: {_component_: m}\noptimizer: {_component_: torch.optim.AdamW, lr: 1e-6}\n"
    "loss: {_component_: x.DPOLoss}\ncheckpointer: {_component_: c, checkpoint_dir: m}\nbatch_size: 2\n"
    "run_val_every_n_steps: 5\n"
)
PART = "_component_: torchtune.datasets.preference_dataset, source: json, data_files: a.json"
SAME = {
    "handbook": BASE + "beta: 0.1\neval_strategy: steps\ndataset_mixer: {a.jsonl: 1.0}\n"
    "dataset_splits: [train_prefs, test_prefs]\n",
    "handbook, two splits": BASE + "beta: 0.1\neval_strategy: steps\ndataset_mixer: {a.jsonl.gz: 1.0}\n"
    "dataset_splits: [train_a, train_b, test_a]\n",
    "TRL": BASE + "beta: 0.1\ndataset_name: a.jsonl\neval_dataset_name: ./a.jsonl\neval_dataset_split: test\n",
    "TRL, the Hub": BASE + "beta: 0.1\ndataset_name: o/d\neval_dataset_name: o/d\neval_dataset_split: train[:9%]\n",
    "Axolotl": AXOLOTL + "datasets: [{path: a.csv, split: train}]\ntest_datasets: [{path: a.csv, split: test}]\n",
    "LLaMA-Factory": BASE + "stage: dpo\ndataset: dpo_en_demo\neval_dataset: dpo_en_demo\nlearning_rate: 1e-6\n",
    "torchtune": TUNE + f"dataset: {{{PART}, split: 'train[:9%]'}}\ndataset_val: {{{PART}, split: 'train[9%:]'}}\n",
}


@pytest.mark.parametrize("name", SAME)
def test_what_is_trained_on_is_never_held_out(name):
    text, asked = written.rewritten(write("dpo/c.yaml", SAME[name]), told(), devices=1)
    run = config.load([write("o.yaml", text)])
    assert run.data.eval is None and isinstance(run.data.train, str)
    (line,) = [line for line in asked if line.startswith("data.eval_fraction: ")]
    assert "is what is trained on" in line and ("Hub" in name or "a file has no splits" in line)
    assert "not known" not in text
    text, asked = written.rewritten("dpo/c.yaml", told("data.eval=held.jsonl"), devices=1)
    assert config.load([write("o.yaml", text)]).data.eval == "held.jsonl"
    assert not any("data.eval" in line for line in asked)


def test_of_several_held_out_sets_those_that_are_trained_on_are_left_out():
    sets = "datasets: [{path: a.jsonl}]\ntest_datasets: [{path: a.jsonl}, {path: b.jsonl}]\n"
    text, _ = written.rewritten(write("c.yaml", AXOLOTL + sets), told(), devices=1)
    assert '  eval: "b.jsonl"' in text and "Differs: left out: a.jsonl is what is trained on" in text
    lines = "t = load_dataset('o/d')\ne = {'x': t['train'], 'y': load_dataset('o/y')}"
    text, _ = written.rewritten(script(lines), told(), devices=1)
    assert config.load([write("o.yaml", text)]).data.eval == {"y": "o/y"}


def test_a_set_of_the_command_line_is_not_what_the_file_has_for_the_other_purpose():
    sets = "datasets: [{path: a.jsonl}]\ntest_datasets: [{path: b.jsonl}]\n"
    file = write("c.yaml", AXOLOTL + sets)
    for word, other in (("data.train=b.jsonl", "data.eval"), ("data.eval=[./a.jsonl]", "data.train")):
        with pytest.raises(UserError, match=f"command line: .*is {other} in c.yaml as well; give {other}=FILE"):
            written.rewritten(file, told(word), devices=1)
    for word in ("data.train=3", "data.eval={a: 3}", "data.train=[3]"):
        with pytest.raises(UserError, match="must be"):
            written.rewritten(file, told(word), devices=1)
    both = told("data.train=b.jsonl", "data.eval=a.jsonl")
    assert '  train: "b.jsonl"' in written.rewritten(file, both, devices=1)[0]


# --------------------------------------------------------------------------------------------- keys that are not known


def test_a_key_that_is_spelled_wrongly_is_answered_with_the_one_that_is_likely_meant():
    text = BASE + "beta: 0.1\ndataset_name: d\nlerning_rate: 1e-5\nzqx: 1\n"
    text, asked = written.rewritten(write("dpo.yaml", text), told(), devices=1)
    assert "lerning_rate: is not known here, and left out; did you mean learning_rate?" in asked
    assert "zqx: is not known here, and left out" in asked and "did you mean learning_rate?" in text
    with pytest.raises(UserError, match=r"loss 'sigmod' is no objective here \(did you mean sigmoid\?\); give "):
        written.rewritten(write("dpo.yaml", BASE + "dataset_name: d\nloss_type: sigmod\n"), told(), devices=1)


def test_what_a_name_of_llama_factory_is_taken_as_is_said():
    text = BASE + "stage: dpo\ndataset: dpo_en_demo\nlearning_rate: 1e-6\nplot_loss: true\n"
    text, _ = written.rewritten(write("f.yaml", text), told(), devices=1)
    assert "Differs: dpo_en_demo stands in LLaMA-Factory's own dataset_info.json there, and is taken as that" in text
    assert "report.html draws the curves" in text


# ----------------------------------------------------------------------------------------------------------- hints

DPO_CONFIG = """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps average_tokens_across_devices max_grad_norm label_smoothing_factor
    bf16 fp16 bf16_full_eval fp16_full_eval tf32 activation_checkpointing activation_checkpointing_kwargs
    gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode
    use_liger_kernel liger_kernel_config use_cache neftune_noise_alpha torch_empty_cache_steps auto_find_batch_size
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
    include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size
    prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps
    include_for_metrics batch_eval_metrics save_only_model save_strategy save_steps save_on_each_node save_total_limit
    enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config
    parallelism_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names
    train_sampling_strategy length_column_name ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
    ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug skip_memory_metrics do_train do_eval
    do_predict resume_from_checkpoint local_rank
    model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout dataset_num_proc max_length truncation_mode
    padding_free pad_to_multiple_of precompute_ref_log_probs precompute_ref_batch_size loss_type loss_weights ld_alpha
    f_divergence_type f_alpha_divergence_coef label_smoothing beta use_weighting discopop_tau activation_offloading
    sync_ref_model ref_model_mixup_alpha ref_model_sync_steps pad_token
"""
"""Every argument of DPOConfig in TRL 1.16 (139: transformers' 114 and its own 25)."""
MODEL_CONFIG = """
    model_name_or_path model_revision dtype attn_implementation use_peft lora_r lora_alpha lora_dropout
    lora_target_modules lora_target_parameters lora_modules_to_save lora_task_type use_rslora use_dora load_in_8bit
    load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage
"""
REMOVED = """
    ref_model_init_kwargs model_adapter_name ref_adapter_name force_use_ref_model use_logits_to_keep label_pad_token_id
    padding_value max_prompt_length max_completion_length tools use_liger_loss reference_free rpo_alpha
    generate_during_eval
"""
AXOLOTL_RL = """
    rl rl_beta dpo_beta dpo_label_smoothing dpo_use_weighting dpo_loss_type dpo_loss_weights dpo_padding_free
    dpo_use_liger_kernel dpo_norm_loss dpo_use_logits_to_keep dpo_generate_during_eval rpo_alpha orpo_alpha simpo_gamma
    cpo_alpha kto_desirable_weight kto_undesirable_weight precompute_ref_log_probs reward_model process_reward_model
    center_rewards_coefficient num_labels max_completion_length use_vllm vllm_mode vllm_server_host vllm_server_port
    vllm_server_timeout vllm_guided_decoding_regex reward_funcs reward_weights generation_batch_size num_generations
    log_completions num_completions_to_print importance_sampling_level sync_ref_model ref_model_mixup_alpha
    ref_model_sync_steps scale_rewards temperature top_p top_k min_p repetition_penalty generation_kwargs
    chat_template_kwargs num_iterations epsilon epsilon_high use_liger_loss loss_type mask_truncated_completions
    rollout_func multi_objective_aggregation vllm_enable_sleep_mode
"""
FACTORY_RL = """
    pref_beta pref_ftx pref_bco_weight pref_loss dpo_label_smoothing kto_chosen_weight kto_rejected_weight simpo_gamma
    ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards ref_model ref_model_adapters
    ref_model_quantization_bit reward_model reward_model_adapters reward_model_quantization_bit reward_model_type
    ld_alpha stage finetuning_type
"""


@pytest.mark.parametrize("names", [DPO_CONFIG, MODEL_CONFIG, REMOVED, AXOLOTL_RL, FACTORY_RL], ids=range(5))
def test_every_argument_of_the_others_has_an_answer(names):
    known = {key.rpartition(".")[2] for key in FIELDS}
    unknown = [name for name in names.split() if answer_to(name) is None and name not in known]
    assert unknown == []
    assert len(DPO_CONFIG.split()) == 139
