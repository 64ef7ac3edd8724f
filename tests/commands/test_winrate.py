"""The command that compares two models' answers, and the judge of a run: both keep what was found."""

import json
import math
import re

import pytest

from dpo_jax import winrate
from dpo_jax.errors import UserError
from dpo_jax.evaluation.contests import verdicts_of
from dpo_jax.evaluation.judging import FIRST, SECOND, TIE, UNJUDGED, Contest, Verdict, compared
from dpo_jax.evaluation.winrate import Asked, Question, read_comparable
from dpo_jax.run.judging import METRICS, AgainstStart, RunJudge
from tests.commands.test_sample import make
from tests.support.chat_server import ChatServer, completion
from tests.support.tiny_rows import CHAT, GOOD, IDS, user, write

pytestmark = pytest.mark.compiles
QUESTIONS = [{"prompt": [user(f"Q{n}")], "good": "e"} for n in range(4)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models, and questions for them."""
    root = tmp_path_factory.mktemp("winrate")
    make(root / "one"), make(root / "two", seed=1)
    write(root / "questions.jsonl", *QUESTIONS)
    return root


@pytest.fixture
def run(place, capsys, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def run(*argv, models=("one", "two"), prompts="questions.jsonl", judge="rule", short=True):
        sides = [str(place / name) if (place / name).exists() else name for name in models]
        length = ("--max-new-tokens", "20") if short else ()
        code = winrate.main([*sides, "--prompts", str(place / prompts), "--judge", judge, *length, *map(str, argv)])
        return code, *capsys.readouterr()

    return run


def test_answers_and_verdicts_are_kept_and_nothing_is_done_twice(run, place, monkeypatch):
    from dpo_jax.evaluation import contests

    def says_a(number, text):
        return 200, {}, completion('{"better": "A"}')

    with ChatServer(says_a) as server:
        given = ("--judge", server.url, "--judge-model", "big", "--output", place / "out")
        code, out, err = run("--json", *given)
        assert code == 0, err
        found, asked = json.loads(out), server.requests
        monkeypatch.setattr(contests, "generate", None)  # would raise
        assert run("--json", *given)[1] == out and server.requests == asked
        (place / "out" / "answers-2.jsonl").write_bytes((place / "out" / "answers-2.jsonl").read_bytes()[:-5])
        monkeypatch.undo()
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert run("--json", *given)[1] == out and server.requests == asked
        code, out, _ = run(*given)
        assert "against" in out and "position bias" in out and "agree on" in out
        code, _, err = run("--seed", "1", *given)
        assert code == 2 and "another comparison" in err
    rule, always = found["judges"]
    assert found["prompts"] == 4 and rule["judge"] == "rule" and rule["contests"] == 4
    answers = [
        [json.loads(line)["answer"] for line in (place / "out" / f"answers-{n}.jsonl").read_text().splitlines()]
        for n in (1, 2)
    ]
    wins = sum("e" in one and "e" not in other for one, other in zip(*answers, strict=True))
    losses = sum("e" in other and "e" not in one for one, other in zip(*answers, strict=True))
    assert (rule["wins"], rule["losses"], rule["ties"]) == (wins, losses, 4 - wins - losses)
    assert always["win_rate"] == 0.5 and always["ties"] == 4 and always["unjudged"] == 0
    differ = sum(one != other for one, other in zip(*answers, strict=True))
    assert always["position_bias"] == differ / 4 and always["calls"] == asked == 2 * differ and differ


def test_prompts_that_are_texts_pass_by_a_chat_template_only_with_a_word(run, place):
    """A chat model that is asked without its template answers as it never would to a person."""
    write(place / "texts.jsonl", *({"prompt": f"Q{n}", "good": "e"} for n in range(3)), QUESTIONS[0])
    code, _, err = run(prompts="texts.jsonl")
    assert code == 0, err
    note = "note: 3 of 4 prompts are texts, and go on without this model's chat template; --as-chat makes messages of"
    assert err.count(note) == 2  # of each model
    assert "note: " not in run("--as-chat", prompts="texts.jsonl")[2]
    assert "note: " not in run()[2]


def test_a_file_of_preferences_is_compared_with_itself(run, place):
    write(place / "pairs.jsonl", CHAT, CHAT)
    with ChatServer(
        lambda number, text: (200, {}, completion("B" if text.index("Yo") > text.index("No") else "A"))
    ) as s:
        given = ("--json", "--judge-model", "m", "--output", place / "self")
        code, out, err = run(*given, models=("chosen", "rejected"), prompts="pairs.jsonl", judge=s.url)
    assert code == 0 and json.loads(out)["judges"][0]["wins"] == 2, err


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (("--judge", "rule"), "named twice"),
        (("--judge", "reward:nowhere"), "there is no folder|no such"),
        (("--judge", "oracle"), "must be rule, reward:FOLDER"),
        (("--judge", "http://x:1/v1"), "give --judge-model"),
        (("--judge", "http://me:pw@x/v1", "--judge-model", "m"), "no password"),
        (("--judge-model", "m"), "no judge that is named uses it"),
        (("--judge-body", "{"), "JSON object"),
        (("--max-samples", "0"), "at least 1"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_loaded(run, argv, match, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = run(*argv)
    assert code == 2 and re.search(match, err) and err.count("error:") == 1 and "pw" not in err.replace("password", "")


def test_the_rule_needs_patterns_and_given_answers_need_pairs(run, place):
    write(place / "bare.jsonl", {"prompt": "Hi"})
    code, _, err = run(prompts="bare.jsonl")
    assert code == 2 and "does not say what is good" in err
    code, _, err = run(models=("one", "chosen"))
    assert code == 2 and "has no such answers" in err


def test_prompts_come_from_every_kind_of_file(tmp_path):
    asked, given = read_comparable(str(write(tmp_path / "a.jsonl", GOOD, CHAT)))
    assert [item.prompt for item in asked] == ["Hi", [user("Hi?")]]
    assert given == {"chosen": ["yes", "Yo"], "rejected": ["no", "No"]}
    asked, given = read_comparable(str(write(tmp_path / "b.jsonl", QUESTIONS[0], {"prompt": "Hi"})), as_chat=True)
    assert isinstance(asked[0], Question) and asked[1].prompt == [user("Hi")] and given == {}
    with pytest.raises(UserError, match="c.jsonl:1: .*token ids"):
        read_comparable(str(write(tmp_path / "c.jsonl", IDS)))


# ---------------------------------------------------------------------------------------------- in a run


class Longer:
    """Prefers what is longer; says nothing that can be understood of x, and fails where it is told to."""

    name, fails, asked = "longer", False, 0

    def compare(self, contests):
        self.asked += len(contests)
        if self.fails:
            raise UserError("nothing answers there")
        found = compared(*([float(len(contest.answers[side])) for contest in contests] for side in (0, 1)))
        odd = Verdict(UNJUDGED, FIRST)
        return [odd if contest.answers[0] == "x" else end for contest, end in zip(contests, found, strict=True)]


def rows(*answers):
    return [{"prompt": f"Q{n}", "answer": answer} for n, answer in enumerate(answers)]


def test_a_runs_answers_are_compared_with_those_at_its_start(tmp_path):
    questions, judge = [Question(f"Q{n}", f"a:{n}", re.compile("e")) for n in range(3)], Longer()
    against = AgainstStart({"": RunJudge(judge)})
    (tmp_path / "answers").mkdir()

    def evaluate(step, *answers):
        lines = "".join(json.dumps(row) + "\n" for row in rows(*answers))
        (tmp_path / "answers" / f"{step}.jsonl").write_text(lines)
        return against(questions, rows(*answers), tmp_path, step)

    start = evaluate(0, "aa", "bb", "cc")
    assert start["win_rate"] == 0.5 and start["tie_rate"] == 1 and judge.asked == 0  # the same are tied, unasked
    found = evaluate(10, "aaa", "b", "cc")
    assert (found["win_rate"], found["tie_rate"], found["unjudged"]) == (0.5, pytest.approx(1 / 3), 0)
    assert found["win_rate_low"] < 0.5 < found["win_rate_high"] and judge.asked == 2
    assert evaluate(9, "aaa", "bbb", "x")["unjudged"] == 1  # and it is step 0 that counts, whatever is written when
    kept = [json.loads(line)["outcome"] for line in (tmp_path / "verdicts" / "10.jsonl").read_text().splitlines()]
    assert kept == [FIRST, SECOND, TIE] and not against.faults
    judge.fails = True
    assert all(math.isnan(value) for value in evaluate(20, "aaa", "b", "cc").values())
    assert "nothing answers" in against.faults[0]
    assert math.isnan(against(questions[:2], rows("a", "b"), tmp_path, 30)["win_rate"])
    assert "other prompts" in against.faults[1]


class Shorter(Longer):
    """Prefers what is shorter."""

    name = "shorter"

    def compare(self, contests):
        return super().compare([Contest(one.asked, one.answers[::-1]) for one in contests])


def test_each_judge_of_a_run_has_its_own_numbers_and_only_one_that_fails_has_none(tmp_path):
    questions, judges = [Question(f"Q{n}", f"a:{n}", re.compile("e")) for n in range(3)], (Longer(), Shorter())
    against = AgainstStart({label: RunJudge(judge) for label, judge in zip(("", "model"), judges, strict=True)})
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows("a", "b", "c")))
    found = against(questions, rows("aa", "bb", "c"), tmp_path, 5)
    assert list(found) == [*METRICS, *(f"{name}/model" for name in METRICS)]
    assert found["win_rate"] == pytest.approx(5 / 6) and found["win_rate/model"] == pytest.approx(1 / 6)
    written = [json.loads(line)["outcome"] for line in (tmp_path / "verdicts/model/5.jsonl").read_text().splitlines()]
    assert written == [SECOND, SECOND, TIE]
    judges[1].fails = True
    found = against(questions, rows("aa", "bb", "c"), tmp_path, 6)
    assert found["win_rate"] == pytest.approx(5 / 6) and math.isnan(found["win_rate/model"])
    assert against.faults == ["evaluation.judge: nothing answers there; this evaluation has no win_rate/model"]


def test_two_answers_that_are_the_same_are_tied():
    contest = Contest(Asked([user("Hi")], "a:1"), ("a", "a"))
    assert verdicts_of(Longer(), [contest])[0].outcome == TIE
