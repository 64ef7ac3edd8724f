"""Settings as keywords are the settings of YAML: the same run, and the same words where something is wrong."""

import numpy as np
import pytest

from dpo_jax.config import keywords
from dpo_jax.config import run as config
from dpo_jax.config.run import FIELDS
from dpo_jax.errors import UserError

GIVEN = {"model": "m", "train": "t.jsonl", "output": "o"}
WORDS = ["model.path=m", "data.train=t.jsonl", "output=o"]


def of(**more):
    return keywords.run_of(GIVEN | more, origin="fit")


def problems(**more):
    with pytest.raises(UserError) as caught:
        of(**more)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"objective": "ipo", "beta": 0.2, "steps": 20}, ["objective.name=ipo", "objective.beta=0.2", "steps=20"]),
        ({"optimizer": {"learning_rate": 1e-5}}, ["optimizer.learning_rate=1e-5"]),
        ({"learning_rate": np.float64(1e-5), "pairs": np.int32(8)}, ["optimizer.learning_rate=1e-5", "batch.pairs=8"]),
        ({"data.max_length": 99, "max_characters": 400}, ["data.max_length=99", "data.max_characters=400"]),
        ({"train": ["a.jsonl", "b.jsonl"]}, ["data.train=[a.jsonl, b.jsonl]"]),
        ({"data": {"columns": {"prompt": ["q", "r"]}}}, ["data.columns={prompt: [q, r]}"]),
        ({"eval": {"one": "a", "two": ["b", "c"]}, "patience": None}, ["data.eval={one: a, two: [b, c]}"]),
        ({"chat_template_kwargs": {"deep": {"er": [1]}}}, ["data.chat_template_kwargs={deep: {er: [1]}}"]),
        (
            {"objective": [{"name": "sigmoid", "weight": 0.8}, {"name": "sft", "weight": 1}]},
            ["objective=[{name: sigmoid, weight: 0.8}, {name: sft, weight: 1}]"],
        ),
        ({"model": {"path": "m", "remat": "none"}, "reference": "r"}, ["model.remat=none", "reference.path=r"]),
        ({"adapter": {"rank": 4}, "seed": 3}, ["adapter.rank=4", "seed=3"]),
        ({"clip_norm": None}, ["optimizer.clip_norm=null"]),
    ],
)
def test_keywords_are_the_settings_of_a_command_line(given, words):
    assert of(**given) == config.load([*WORDS, *words])


def test_every_setting_whose_last_name_is_its_own_has_a_keyword():
    names = [key.rsplit(".", 1)[-1] for key in FIELDS]
    for key, name in zip(FIELDS, names, strict=True):
        alone = names.count(name) == 1 and name not in config.SECTIONS
        assert keywords.full_name(name) == (key if alone or "." not in key else name)
        assert keywords.full_name(key) == key


def test_a_file_is_read_first_and_keywords_win(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {path: m}\ndata: {train: t.jsonl}\nobjective: {beta: 0.3, name: ipo}\nsteps: 7\noutput: o\n"
    )
    run = keywords.run_of({"beta": 0.5}, [str(file)], origin="fit")
    assert (run.objective.beta, run.objective.name, run.steps) == (0.5, "ipo", 7)
    mixture = [{"name": "sigmoid"}, {"name": "sft"}]
    run = keywords.run_of({"objective": mixture}, [str(file)], origin="fit")
    assert [term.name for term in run.objective.terms] == ["sigmoid", "sft"]
    assert keywords.run_of({"objective": None}, [str(file)], origin="fit").objective.name == "sigmoid"
    with pytest.raises(UserError, match="stands beside a list of objectives"):
        keywords.run_of({"beta": 0.5, "objective": mixture}, [str(file)], origin="fit")


def test_all_that_is_wrong_is_said_at_once_in_the_words_of_yaml():
    found = problems(beta=-1, steps="many", learning_rte=1, every=3, batch=4)
    told = problems_of_yaml("objective.beta=-1", "steps=many", "learning_rte=1", "every=3", "batch=4")
    assert sorted(found) == sorted(line.replace("command line: ", "fit: ") for line in told)
    assert len(found) == 5 and any("did you mean optimizer.learning_rate?" in line for line in found)


def problems_of_yaml(*words):
    with pytest.raises(UserError) as caught:
        config.load([*WORDS, *words])
    return str(caught.value).splitlines()


def test_names_of_other_trainers_are_answered():
    assert problems(num_train_epochs=3) == ["fit: num_train_epochs: no such setting; here it is epochs"]


def test_what_is_given_twice_is_refused():
    (line,) = problems(beta=0.1, objective={"beta": 0.2})
    assert line == "fit: objective.beta: is given twice, as beta and objective; keep one"


def test_what_is_not_given_is_named():
    with pytest.raises(UserError) as caught:
        keywords.run_of({}, origin="fit")
    assert [line.split(": not given")[0] for line in str(caught.value).splitlines()] == [
        "fit: model.path",
        "fit: data.train",
        "fit: output",
    ]
