"""A server as a judge: its verdicts as they are prepared, whatever goes wrong on the way, and none of them twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from dpo_jax.errors import UserError
from dpo_jax.evaluation.judges.asking import Template
from dpo_jax.evaluation.judges.endpoint import TRIES, EndpointJudge, waiting
from dpo_jax.evaluation.judges.replies import end_of
from dpo_jax.evaluation.judges.settings import JudgeSettings
from dpo_jax.evaluation.judging import FIRST, SECOND, TIE
from dpo_jax.evaluation.ledger import Ledger
from dpo_jax.evaluation.statistics import summary
from tests.support.chat_server import ChatServer, better, completion, prepared

KEY = "sk-" + "secret0" * 4
SHORT = 0.5
"""Seconds until a call is given up: a stall is always longer, and a reply that is slower is asked for again."""


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def judge(server, ledger=None, key=None, **settings):
    given = {"name": server.url, "model": "big", "attempts": 60, **settings}
    return EndpointJudge(JudgeSettings(**given), Template(), ledger or Ledger(None), key=key, pause=0.001)


def expected(contests):
    """The outcomes that the qualities in the answers ask for."""
    ends = {"A": FIRST, "B": SECOND, "tie": TIE}
    return [ends[better(" ".join(contest.answers))] for contest in contests]


def trouble(share, seed=0):
    """Failures of every kind, for a share of all calls, drawn anew each time that something is asked."""
    draw = random.Random(seed)
    cut = completion('{"reason": "x", "better": "A"}')[:-30]
    kinds = [
        lambda: (429, {"retry-after": "0"}, b"{}"),
        lambda: (429, {}, b"slow down"),
        lambda: (500, {}, b"<html>oops</html>"),
        lambda: (503, {"retry-after": "0.01"}, b"busy"),
        lambda: (200, {}, cut),  # the JSON of the API is cut
        lambda: (200, {}, b""),  # the connection is closed
        lambda: (200, {}, b"null"),
        lambda: (200, {}, completion(None)),
    ]
    rare = [
        lambda: (200, {}, [b"{", 3 * SHORT, b"}"]),  # it stalls
        lambda: (200, {}, [b" " if n % 2 else 0.1 for n in range(40)]),  # it drips, and no read takes long
        lambda: (200, {}, completion("I like both of them, A and B.")),
    ]

    def behave(number, text):
        if draw.random() >= share:
            return None
        return draw.choice(rare if draw.random() < 0.05 else kinds)()

    return behave


# ---------------------------------------------------------------------------------------------- verdicts


def test_verdicts_of_200_prepared_pairs_are_as_prepared():
    contests = prepared(200)
    with ChatServer() as server:
        found = judge(server).compare(contests)
        assert server.requests == 400 and max(server.judged.values()) == 1
    assert [verdict.outcome for verdict in found] == expected(contests)
    assert all(verdict.shown == verdict.swapped for verdict in found)
    assert Counter(expected(contests)) == {FIRST: 66, TIE: 67, SECOND: 67} and "it is so" in found[0].reason


def test_a_judge_that_always_says_a_has_a_bias_of_one():
    with ChatServer(lambda number, text: (200, {}, completion('{"better": "A"}'))) as server:
        found = judge(server).compare(prepared(20))
    said = summary(found, [(1, 1)] * 20)
    assert said.win_rate.value == 0.5 and said.position_bias == 1.0


def test_failures_of_every_kind_change_no_verdict(tmp_path):
    contests, path = prepared(150), tmp_path / "calls.jsonl"
    with ChatServer(trouble(0.35)) as server, Ledger(path) as ledger:
        asked = judge(server, ledger, timeout=SHORT, calls_at_once=16)
        found = asked.compare(contests)
        before = server.requests
        assert before > 350 and asked.compare(contests) == found and server.requests == before
        assert [verdict.outcome for verdict in found] == expected(contests)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    understood = Counter(row["key"] for row in rows if row.get("said") and end_of(row["said"]) is not None)
    assert len(understood) == 300 and set(understood.values()) == {1}


def test_a_file_that_was_cut_anywhere_loses_what_was_cut_and_nothing_else(tmp_path):
    """A kill leaves some beginning of the file."""
    contests, path = prepared(20), tmp_path / "calls.jsonl"
    with ChatServer() as server:
        with Ledger(path) as ledger:
            wanted = judge(server, ledger).compare(contests)
        whole, draw = path.read_bytes(), random.Random(1)
        for size in [0, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(4))]:
            path.write_bytes(whole[:size])
            kept, before = whole[:size].count(b"\n"), server.requests
            with Ledger(path) as ledger:
                assert len(ledger.rows) == kept and judge(server, ledger).compare(contests) == wanted
            assert server.requests - before == 40 - kept and path.read_bytes().count(b"\n") == 40


def test_nonsense_is_asked_for_again_then_counted_and_never_guessed(tmp_path):
    def behave(number, text):
        return (200, {}, completion("As a model I cannot choose.")) if "Question 1?" in text else None

    with ChatServer(behave) as server, Ledger(tmp_path / "calls.jsonl") as ledger:
        asked = judge(server, ledger)
        found = asked.compare(prepared(3))
        assert not found[1].given and found[0].given and found[2].given and server.requests == 4 + 2 * TRIES
        assert asked.spent == {"calls": 10, "tokens": 70, "no_verdict": 2}
    with ChatServer(behave) as other, Ledger(tmp_path / "calls.jsonl") as ledger:
        again = EndpointJudge(asked._settings, Template(), ledger, pause=0.001)
        assert not again.compare(prepared(3))[1].given and other.requests == 0


@pytest.mark.parametrize(
    ("said", "end"),
    [
        ('{"reason": "B is rude", "better": "A"}', FIRST),
        ('```json\n{"better": "b"}\n```', SECOND),
        ('Sure! {"better": "Answer B", "reason": "x"} I hope that helps.', SECOND),
        ('{"better": "tie"}', TIE),
        ('<think>Is A better? {"better": "A"}</think> {"better": "B"}', SECOND),
        ('{"better": "A", "reason": "it is more hel', FIRST),
        ("**B**", SECOND),
        ("Answer A.", FIRST),
        ("After all: [[B]]", SECOND),
        ("[[C]]", TIE),
        ("A or B?", None),
        ('{"better": "A"} or {"better": "B"}', None),
        ('{"reason": "one short sentence", "better": "A" or "B" or "tie"}', None),
        ('{"better": "A or B"}', None),
        ('{"better": "', None),
        ('{"better": "A', None),
        ('{"better": null}', None),
        ('{"better": "Paris"}', None),
        ('{"better": "A"} {"better": ', None),
        ("<think>I would say A", None),
        ("A better question is needed", None),
        ("[[A]] [[B]]", None),
        ("", None),
    ],
)
def test_a_reply_that_can_be_meant_in_one_way_is_a_verdict(said, end):
    assert end_of(said) == end


# ---------------------------------------------------------------------------------------------- limits


def test_a_budget_of_calls_is_kept_and_what_was_said_too(tmp_path):
    with ChatServer() as server:
        with Ledger(tmp_path / "calls.jsonl") as ledger, pytest.raises(UserError, match="budget of 25 calls.*15 verd"):
            judge(server, ledger, call_budget=25).compare(prepared(20))
        assert server.requests == 25
        with Ledger(tmp_path / "calls.jsonl") as ledger:
            found = judge(server, ledger, call_budget=40).compare(prepared(20))
        assert server.requests == 40 and [verdict.outcome for verdict in found] == expected(prepared(20))


def test_a_budget_of_tokens_counts_what_the_server_counts():
    with ChatServer() as server, pytest.raises(UserError, match="budget of 70 tokens"):
        judge(server, token_budget=70, calls_at_once=1).compare(prepared(20))
    assert server.requests == 10
    with ChatServer(lambda number, text: (200, {}, b'{"choices": [{"message": {"content": "A"}}]}')) as server:
        with pytest.raises(UserError, match="does not say how many tokens"):
            judge(server, token_budget=70).compare(prepared(2))


@pytest.mark.parametrize(("status", "match"), [(401, "key_variable"), (404, "/v1"), (400, "body"), (307, "leads to")])
def test_a_refusal_is_not_repeated(status, match):
    with ChatServer(lambda number, text: (status, {}, b'{"error": "no\x1b[2J such"}')) as server:
        with pytest.raises(UserError, match=match) as caught:
            judge(server, calls_at_once=1).compare(prepared(5))
    assert server.requests == 1 and str(caught.value).isprintable()


def test_a_server_that_always_fails_is_given_up_by_name():
    with ChatServer(lambda number, text: (500, {}, b"out of memory")) as server:
        with pytest.raises(UserError, match="failed 3 times.*status 500 out of memory"):
            judge(server, attempts=3, calls_at_once=2).compare(prepared(2))


def test_a_server_that_is_not_there_is_named_before_anything_is_asked():
    with ChatServer() as server:
        judge(server).reach()
        gone = judge(server)
    with pytest.raises(UserError, match="nothing answers there.*start the server"):
        gone.reach()


def test_a_wait_that_is_asked_for_is_of_all_calls(monkeypatch):
    from dpo_jax.evaluation.judges import endpoint

    slept, clock = [], [100.0]

    async def sleep(seconds):
        slept.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(endpoint.anyio, "sleep", sleep)
    monkeypatch.setattr(endpoint.anyio, "current_time", lambda: clock[0])
    busy = (429, {"retry-after": "7"}, b"{}")
    with ChatServer(lambda number, text: busy if number == 1 else None) as server:
        judge(server, calls_at_once=1).compare(prepared(1))
    assert [seconds for seconds in slept if seconds] == [7.0]
    with ChatServer(lambda number, text: (429, {"retry-after": "86400"}, b"{}")) as server:
        with pytest.raises(UserError, match="asks to wait 86,400 s"):
            judge(server, calls_at_once=1).compare(prepared(1))


def test_a_date_to_wait_for_is_understood():
    from datetime import UTC, datetime

    now = datetime(2026, 1, 1, 12, tzinfo=UTC)
    assert waiting("Thu, 01 Jan 2026 12:00:30 GMT", now) == 30.0
    assert [waiting(text, now) for text in ("-3", "nan", "soon", "inf", None)] == [0.0, None, None, 1e9, None]


def test_the_key_is_sent_and_stands_nowhere(tmp_path, capsys):
    """Also of a server that sends back what it got."""
    echo = [(200, {}, completion(f'{{"reason": "{KEY}", "better": "A"}}')), (403, {}, KEY.encode())]
    path = tmp_path / "calls.jsonl"
    with ChatServer(lambda number, text: echo[number > 1]) as server, Ledger(path) as ledger:
        with pytest.raises(UserError) as caught:
            judge(server, ledger, key=KEY, calls_at_once=1).compare(prepared(1))
        assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    written = path.read_text() + str(caught.value) + "".join(capsys.readouterr())
    assert "secret0" not in written and "***" in path.read_text()


def test_what_is_sent_can_be_changed():
    with ChatServer() as server:
        judge(server, body={"max_tokens": None, "max_completion_tokens": 9}).compare(prepared(1))
    assert server.bodies[0]["max_completion_tokens"] == 9 and "max_tokens" not in server.bodies[0]


# ---------------------------------------------------------------------------------------------- kills

ASK = """
import sys
from pathlib import Path
from dpo_jax.evaluation.judges.asking import Template
from dpo_jax.evaluation.judges.endpoint import EndpointJudge
from dpo_jax.evaluation.judges.settings import JudgeSettings
from dpo_jax.evaluation.ledger import Ledger
from tests.support.chat_server import prepared
settings = JudgeSettings(name=sys.argv[1], model="big", attempts=60, timeout=2.0, calls_at_once=8)
print("begun", flush=True)
with Ledger(Path(sys.argv[2])) as ledger:
    found = EndpointJudge(settings, Template(), ledger, pause=0.001).compare(prepared(1000))
print([verdict.outcome for verdict in found])
"""


@pytest.mark.nightly
def test_2000_calls_and_20_kills_lose_no_verdict_and_count_none_twice(tmp_path):
    path, draw = tmp_path / "calls.jsonl", random.Random(2)
    with ChatServer(trouble(0.2)) as server:
        command = [sys.executable, "-c", ASK, server.url, str(path)]
        kills = 0
        while kills < 20:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert process.stdout.readline() == "begun\n"
            before = server.requests
            target = before + draw.randrange(5, 110)
            while server.requests < target and process.poll() is None:
                time.sleep(0.002)
            assert process.poll() is None, "it ended before it was killed; kill earlier"
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
            kills += 1
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        repeated = sum(count - 1 for count in server.judged.values())
    assert json.loads(done.stdout.splitlines()[1]) == expected(prepared(1000))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    understood = Counter(row["key"] for row in rows if row.get("said") and end_of(row["said"]) is not None)
    assert len(understood) == 2000 and set(understood.values()) == {1}
    assert len(server.judged) == 2000 and repeated <= 20 * 8 + 200  # in flight at a kill, or slower than the limit
