"""What an evaluation is of, in words: how much of what, and which objective."""

import json

import pytest

from dpo_jax.evaluation.measured import Counted, other_objective, said_objective, trained_with, words_for
from dpo_jax.objectives.settings import ObjectiveSettings


def objective(**given):
    return ObjectiveSettings.model_validate(given)


@pytest.mark.parametrize(
    ("counted", "text", "more"),
    [
        (Counted(6, "pairs", 6, 0), "6 pairs", {}),
        (Counted(1, "pairs", 1, 0), "1 pair", {}),
        (Counted(60, "chosen", 0, 60), "60 single answers", {"single_answers": 60}),
        (Counted(7, "chosen", 6, 1), "6 pairs and 1 single answer, of a pair the chosen answer", {"single_answers": 1}),
        (Counted(120, "unpaired", 0, 120), "120 single answers", {"single_answers": 120}),
        (Counted(120, "unpaired", 60, 0), "60 pairs, as 120 single answers", {"single_answers": 120}),
        (Counted(12, "rankings", 36, 0), "36 pairs, as 12 rankings", {"rankings": 12}),
    ],
)
def test_what_a_file_holds_is_counted_and_named(counted, text, more):
    assert counted.text() == text and counted.to_json() == {"pairs": counted.examples, **more}


@pytest.mark.parametrize(
    ("given", "said", "words"),
    [
        ({}, "sigmoid, beta 0.1", "objective.name=sigmoid"),
        ({"name": "ipo", "beta": 0.3}, "ipo, beta 0.3", "objective.name=ipo --beta 0.3"),
        ({"name": "ipo", "beta": 0.12345678}, "ipo, beta 0.12345678", "objective.name=ipo --beta 0.12345678"),
        ({"name": "simpo", "gamma": 0.5}, "simpo, beta 2, gamma 0.5", "objective.name=simpo objective.gamma=0.5"),
        ({"beta": 0.2, "beta_end": 0.4}, "sigmoid, beta 0.4", "objective.name=sigmoid --beta 0.4"),
        (
            {"reference_free": True},
            "sigmoid, beta 0.1, reference_free true",
            "objective.name=sigmoid objective.reference_free=true",
        ),
        (
            {"mixture": ({"name": "sigmoid", "weight": 0.8}, {"name": "sft"})},
            "0.8 sigmoid, beta 0.1 + sft",
            """'objective.mixture=[{"name": "sigmoid", "weight": 0.8}, {"name": "sft"}]'""",
        ),
    ],
)
def test_an_objective_is_said_with_its_beta_and_how_to_give_it(given, said, words):
    assert said_objective(objective(**given)) == said and words_for(objective(**given)) == words


def test_an_export_says_what_it_was_trained_with_and_nothing_else_does(tmp_path):
    file = tmp_path / "dpo_jax.json"
    assert trained_with(tmp_path) is None
    file.write_text(json.dumps({"settings": {"objective": {"name": "ipo", "beta": 0.3}}}))
    assert trained_with(tmp_path) == objective(name="ipo", beta=0.3)
    for odd in ("[]", "{", "{}", '{"settings": []}', '{"settings": {"objective": {"name": "\\u001b[2J"}}}'):
        file.write_text(odd)
        assert trained_with(tmp_path) is None


def test_only_another_objective_than_that_of_the_run_is_told():
    ipo = objective(name="ipo", beta=0.3)
    (line,) = other_objective(ipo, objective(), alone=False)
    assert line == "it was trained with ipo, beta 0.3; to measure that, give objective.name=ipo --beta 0.3"
    (line,) = other_objective(ipo, objective(reference_free=True), alone=True)
    assert line.endswith("--beta 0.3 --reference FOLDER")
    assert other_objective(ipo, ipo, alone=False) == other_objective(None, ipo, alone=False) == []
    assert other_objective(objective(), objective(reference_free=True), alone=True) == []
    assert other_objective(objective(), objective(reference_free=True), alone=False)
