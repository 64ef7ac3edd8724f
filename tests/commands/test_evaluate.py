"""What `evaluate` prints says how much of what was measured, of which objective, and what else could be."""

import json
import shutil

import pytest

from dpo_jax import evaluate
from tests.support.tiny_rows import write
from tests.support.worlds import write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, an export of it that says of itself that it was trained with ipo, pairs, and single answers."""
    root = write_world(tmp_path_factory.mktemp("world"), 2, 6)
    shutil.copytree(root / "model", root / "export")
    settings = {"objective": {"name": "ipo", "beta": 0.3}}
    (root / "export" / "dpo_jax.json").write_text(json.dumps({"settings": settings}))
    rows = [json.loads(line) for line in (root / "eval.jsonl").read_text().splitlines()]
    singles = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    write(root / "singles.jsonl", *singles)
    write(root / "labelled.jsonl", *({**row, "label": number % 2 == 0} for number, row in enumerate(singles)))
    return root


@pytest.fixture
def said(world, capsys):
    """The lines that `evaluate` prints of a model and a file of the world, with more behind them."""

    def run(model, file, *more):
        capsys.readouterr()
        assert evaluate.main([str(world / model), str(world / file), *more]) == 0
        return capsys.readouterr().out.splitlines()

    return run


@pytest.mark.nightly
def test_a_printed_loss_is_said_to_be_that_of_an_objective_and_the_runs_own_is_named(world, said):
    against = ("--reference", str(world / "model"))
    lines = said("export", "eval.jsonl", *against)
    assert "6 pairs (+- is one standard error); reward margin and loss of sigmoid, beta 0.1" in lines
    assert lines[-1] == "it was trained with ipo, beta 0.3; to measure that, give objective.name=ipo --beta 0.3"
    own = said("export", "eval.jsonl", *against, *lines[-1].rpartition("give ")[2].split())
    assert "6 pairs (+- is one standard error); reward margin and loss of ipo, beta 0.3" in own
    assert own[-1].startswith("kl ")
    chosen = said("export", "eval.jsonl", *against, "--metrics", "loss")
    assert "6 pairs; loss of sigmoid, beta 0.1" in chosen and chosen[-1] == lines[-1]
    found = json.loads(said("export", "eval.jsonl", *against, "--json")[-1])
    assert found["pairs"] == 6 and found["objective"] == "sigmoid, beta 0.1"


def test_the_file_is_called_by_its_name(world, said):
    lines = said("model", "eval.jsonl", "--reference", str(world / "export"))
    assert lines[0] == "eval.jsonl" and "data.train" not in "\n".join(lines)
    assert any(line.startswith("reference log-probabilities of eval.jsonl") for line in lines)
    assert said("model", "eval.jsonl", str(world / "train.jsonl"))[0] == "PAIRS"


def test_a_model_alone_is_said_to_want_a_reference_for_more(said):
    lines = said("model", "eval.jsonl")
    assert lines[-1] == evaluate.REFERENCE_GIVES and "6 pairs (+- is one standard error)" in lines
    assert evaluate.REFERENCE_GIVES not in said("model", "eval.jsonl", "objective.name=sft")
    assert said("export", "eval.jsonl")[-1].endswith("give objective.name=ipo --beta 0.3 --reference FOLDER")


def test_an_objective_of_the_model_alone_takes_its_beta_and_has_its_loss(said):
    lines = said("model", "eval.jsonl", "objective.name=simpo", "--beta", "1.5")
    assert "6 pairs (+- is one standard error); reward margin and loss of simpo, beta 1.5" in lines
    lines = said("model", "eval.jsonl", "objective.reference_free=true", "--beta", "0.2")
    assert any(line.endswith("loss of sigmoid, beta 0.2, reference_free true") for line in lines)
    assert lines[-1].startswith("loss ")


@pytest.mark.nightly
def test_single_answers_are_counted_as_such(world, said):
    lines = said("model", "singles.jsonl", "objective.name=sft")
    assert "6 single answers (+- is one standard error); loss of sft" in lines
    kto = ("objective.name=kto", "--reference", str(world / "export"))
    lines = said("model", "labelled.jsonl", *kto)
    assert "6 single answers (+- is one standard error); reward margin and loss of kto, beta 0.1" in lines
    assert any(line.startswith("preference accuracy (of single answers, by KTO's baseline) ") for line in lines)
    assert "6 pairs, as 12 single answers; loss of kto, beta 0.1" in said(
        "model", "eval.jsonl", *kto, "--metrics", "loss"
    )
    found = json.loads(said("model", "labelled.jsonl", *kto, "--json")[-1])
    assert found["pairs"] == found["single_answers"] == 6
