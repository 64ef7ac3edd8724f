"""A run whose chat template writes the day keeps the one on which it began."""

import pytest

from dpo_jax.config.run import Run
from dpo_jax.data import arguments
from dpo_jax.errors import UserError
from dpo_jax.evaluation.winrate import prompt_tokens
from dpo_jax.run import output
from dpo_jax.run.continuing import Past
from dpo_jax.run.prepare import Job
from tests.support.tiny_rows import CHATML, byte_tokenizer, user, write, yes_or_no
from tests.support.worlds import write_model

DATED = "{{ strftime_now('%d %b %Y') }} " + CHATML


@pytest.fixture
def run(tmp_path):
    write_model(tmp_path / "model", num_hidden_layers=1, tokenizer=byte_tokenizer(template=DATED))
    asked = write(tmp_path / "answers.jsonl", {"prompt": [user("Say 3")], "good": "."})
    return Run.model_validate(
        {
            "model": {"path": str(tmp_path / "model")},
            "data": {"train": str(write(tmp_path / "train.jsonl", *yes_or_no(4)))},
            "batch": {"pairs": 2},
            "evaluation": {"answers": str(asked)},
            "output": str(tmp_path / "run"),
        }
    )


def begun(run, monkeypatch, date) -> Job:
    """The run, begun or gone on with on a day."""
    monkeypatch.setattr(arguments, "today", lambda: date)
    with output.opened(run) as folder:
        past = Past.of(folder)
        past.check_settings(run)
        job = Job.read(run, folder)
        job.record(past)
        (folder / "checkpoints" / "1").mkdir(parents=True, exist_ok=True)  # it has learned something
    return job


def test_a_run_that_was_stopped_at_night_goes_on_in_the_morning(run, tmp_path, monkeypatch, capsys):
    first = begun(run, monkeypatch, "2021-03-04")
    again = begun(run, monkeypatch, "2021-03-05")
    assert first.data.train.tokens.tolist() == again.data.train.tokens.tolist()
    assert output.recorded(tmp_path / "run")["facts"][output.DATE] == again.data.date == "2021-03-04"
    assert capsys.readouterr().out.count("where it writes the day, it writes 2021-03-04") == 2
    (question,) = again.prompts.questions  # what the model is asked has the same day
    asked = again.tokenizer.decode(prompt_tokens(question.prompt, again.prompts.coder))
    assert asked.startswith("04 Mar 2021 <|im_start|>user\nSay 3")
    other = begun(run.model_copy(update={"output": str(tmp_path / "other")}), monkeypatch, "2021-03-05")
    assert other.data.date == "2021-03-05"


def test_other_arguments_of_the_template_are_another_run(run, monkeypatch):
    begun(run, monkeypatch, "2021-03-04")
    data = run.data.model_copy(update={"columns": {"prompt": "prompt"}})
    with pytest.raises(UserError, match="another setting, data.columns: null -> "):
        begun(run.model_copy(update={"data": data}), monkeypatch, "2021-03-04")
