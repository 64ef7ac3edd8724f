"""Collecting answers: a folder that is filled in any number of sittings is the folder that is filled in one."""

import json

import pytest

from dpo_jax.data.encode import collect as read_pairs
from dpo_jax.errors import UserError
from dpo_jax.evaluation import collecting
from dpo_jax.evaluation.collecting import Writer, collect, model_digest, open_writer
from dpo_jax.evaluation.settings import CollectSettings
from dpo_jax.evaluation.winrate import Asked
from tests.commands.test_sample import make
from tests.support.tiny_rows import user

ASKED = [Asked(text, f"p.jsonl:{n}") for n, text in enumerate(["Hi", "Name one.", "Why?", "Go on", "And?"], 1)]
SETTINGS = CollectSettings(answers=3, max_new_tokens=6, temperature=3.0, batch_size=3, seed=5)
MADE_BY = {"model": "tiny", "weights": "abc", "judge": {"name": "length"}}


class Killed(BaseException):
    """The process ends here."""


class Length:
    """The longer answer is the better one; ends the process at its `until`-th call."""

    name = "length"

    def __init__(self, until=None):
        self.until, self.calls = until, 0

    def score(self, asked, answers):
        self.calls += 1
        if self.calls == self.until:
            raise Killed
        return [float(len(answer)) for answer in answers]

    def compare(self, contests):
        raise AssertionError("a judge that scores is not asked to compare")


@pytest.fixture(scope="module")
def writer(tmp_path_factory) -> Writer:
    return open_writer(make(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(autouse=True)
def _parts_of_one_batch(monkeypatch):
    """So that these few prompts come in several parts."""
    monkeypatch.setattr(collecting, "BATCHES_OF_A_PART", 1)


def fill(folder, writer, judge=None, settings=SETTINGS, made_by=MADE_BY, asked=ASKED):
    folder.mkdir(exist_ok=True)
    return collect(folder, made_by, asked, settings, lambda: (writer, judge or Length()), lambda line: None)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, writer):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collecting, "BATCHES_OF_A_PART", 1)
        folder = tmp_path_factory.mktemp("collected") / "whole"
        result = fill(folder, writer)
    return folder, result


@pytest.mark.parametrize("kill_at", range(1, 6))
def test_a_process_that_was_killed_ends_with_the_same_bytes(kill_at, whole, writer, tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(Killed):
        fill(folder, writer, Length(until=kill_at))
    left = ".part.0123456789abcdef0123456789abcdef.tmp"
    (folder / left).write_text("half")
    (folder / "parts" / left).write_text("half")
    judge = Length()
    assert fill(folder, writer, judge) == whole[1]
    assert files(folder) == files(whole[0])
    assert not (folder / "parts").exists()
    assert judge.calls == 5 - (kill_at - 1)  # what was there was not judged again


@pytest.mark.parametrize("name", ["answers.jsonl", "pairs.jsonl", "record.json"])
def test_a_process_that_was_killed_between_the_last_files_does_too(name, whole, writer, tmp_path, monkeypatch):
    write = collecting.write_whole

    def killed(path, data):
        if path.name == name and "result" in (data if name == "record.json" else "result"):
            raise Killed
        write(path, data)

    monkeypatch.setattr(collecting, "write_whole", killed)
    with pytest.raises(Killed):
        fill(tmp_path / "out", writer)
    monkeypatch.setattr(collecting, "write_whole", write)
    assert fill(tmp_path / "out", writer) == whole[1]
    assert files(tmp_path / "out") == files(whole[0])


def test_what_is_whole_is_not_made_again(whole):
    assert collect(whole[0], MADE_BY, ASKED, SETTINGS, pytest.fail, pytest.fail) == whole[1]


def test_training_reads_what_was_collected(whole, writer):
    from dpo_jax.data.settings import DataSettings

    folder, result = whole
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert result["rows"] == len(rows) > 0 and result["answers"] == 15
    assert all(row["score_chosen"] > row["score_rejected"] for row in rows)
    for named in (folder / "pairs.jsonl", folder):
        settings = DataSettings(train=str(named), max_length=64)
        encoded, _ = read_pairs(settings.train, writer.coder.tokenizer, settings)
        assert encoded.num_pairs == len(rows)


def test_answers_to_a_prompt_differ_and_another_seed_draws_others(whole, writer, tmp_path):
    rows = [json.loads(line) for line in (whole[0] / "answers.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [item.prompt for item in ASKED]
    texts = [[answer["text"] for answer in row["answers"]] for row in rows]
    assert all(len(set(several)) > 1 for several in texts)
    fill(tmp_path / "other", writer, settings=SETTINGS.model_copy(update={"seed": 6}))
    assert (tmp_path / "other" / "answers.jsonl").read_bytes() != (whole[0] / "answers.jsonl").read_bytes()


def test_a_prompt_that_comes_again_gets_other_answers(writer, tmp_path):
    """Also in another part: what is drawn depends on the place in the whole list."""
    fill(tmp_path / "out", writer, asked=[ASKED[0]] * 3)
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert len({tuple(answer["text"] for answer in row["answers"]) for row in rows}) == 3


def test_ties_and_repetitions_are_counted_and_left_out(writer, tmp_path):
    class Equal(Length):
        def score(self, asked, answers):
            return [1.0] * len(answers)

    result = fill(tmp_path / "equal", writer, Equal())
    assert result["tied"] == len(ASKED) and result["rows"] == 0
    assert (tmp_path / "equal" / "pairs.jsonl").read_bytes() == b""
    cold = SETTINGS.model_copy(update={"temperature": 1e-6})
    result = fill(tmp_path / "cold", writer, settings=cold)
    assert result["all_the_same"] == len(ASKED) and result["repeated"] == 2 * len(ASKED) and result["rows"] == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": SETTINGS.model_copy(update={"answers": 4})}, r"sampling.answers: 3 -> 4"),
        ({"made_by": {**MADE_BY, "weights": "abd"}}, r'weights: "abc" -> "abd"'),
        ({"asked": ASKED[:4]}, "prompts:"),
        ({"asked": [*ASKED[:4], Asked([user("And?")], "p.jsonl:5")]}, "prompts:"),
    ],
)
def test_a_folder_of_other_settings_is_refused(changes, words, whole, writer):
    with pytest.raises(UserError, match=f"was made by other settings .{words}"):
        fill(whole[0], writer, **changes)


def test_a_model_may_lie_elsewhere(whole, writer):
    assert fill(whole[0], writer, made_by={**MADE_BY, "model": "moved"}) == whole[1]


def test_files_that_were_changed_and_strange_folders_are_refused(writer, tmp_path):
    fill(tmp_path / "out", writer)
    with (tmp_path / "out" / "pairs.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"pairs.jsonl is not as it was written; remove"):
        fill(tmp_path / "out", writer)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other things .thesis.txt"):
        fill(tmp_path / "full", writer)
    (tmp_path / "out" / "record.json").write_text("{")
    with pytest.raises(UserError, match="record.json is damaged"):
        fill(tmp_path / "out", writer)


def test_the_digest_of_a_model_is_of_all_that_its_answers_depend_on(tmp_path):
    folder = make(tmp_path / "tiny")
    first = model_digest(folder)
    (folder / "dpo_jax.json").write_text("{}")
    (folder / "README.md").write_text("words")
    assert model_digest(folder) == first
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert model_digest(folder) != first
