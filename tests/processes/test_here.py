"""What processes agree on, each of them a thread here: decisions, values that must be the same, turns, folders."""

import json
from types import SimpleNamespace

import pytest

from dpo_jax.errors import UserError
from dpo_jax.processes import here as module
from dpo_jax.processes import watch
from dpo_jax.processes.here import Failure, Here
from dpo_jax.processes.watch import RETRY, Watch
from dpo_jax.reporting.hosts import SAID_AFTER, SlowHost, host_metrics
from tests.support.threads import MANY, Store, everywhere


def test_a_decision_is_made_once_and_known_to_all():
    asked = []

    def decides(place):
        return [place.decide("step", lambda: asked.append(place.process) or len(asked)) for _ in range(3)]

    assert everywhere(decides) == [[1, 2, 3]] * MANY
    assert asked == [0, 0, 0]


def test_what_process_0_refuses_all_refuse():
    def refuses(place):
        def no():
            raise UserError("output: is in use")

        return place.decide("output", no)

    found = everywhere(refuses)
    assert [str(error) for error in found] == ["output: is in use"] * MANY


def test_everyone_hears_what_everyone_says():
    assert everywhere(lambda place: place.everyone("squares", place.process**2)) == [[n**2 for n in range(MANY)]] * MANY
    assert everywhere(lambda place: place.all_of("all", place.process != 5), 8) == [False] * 8
    assert everywhere(lambda place: place.all_of("all", True), 8) == [True] * 8


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("items", [0, 1, 7, 16])
def test_what_is_done_by_turns_is_done_once_and_known_to_all_in_order(count, items):
    done = []

    def works(place):
        return place.by_turns("squares", range(items), lambda share: [done.append(n) or n**2 for n in share])

    assert everywhere(works, count) == [[n**2 for n in range(items)]] * count
    assert sorted(done) == [*range(items)]


def test_a_difference_names_key_values_and_processes():
    def compares(place):
        place.same("settings differ", {"seed": 7 if place.process == 3 else 0, "steps": 5})

    for error in everywhere(compares, 4):
        assert "seed is 0 on process 0" in str(error) and "7 on process 3" in str(error) and "steps" not in str(error)
    assert everywhere(lambda place: place.same("settings differ", {"seed": 0}), 4) == [None] * 4


def test_process_0_goes_first_where_its_work_is_seen_by_the_others(tmp_path):
    def works(place):
        def work():
            made = not (tmp_path / "cache").exists()
            (tmp_path / "cache").write_text("made")
            return made

        return place.in_turn("data", work)

    assert everywhere(works, 8) == [True] + [False] * 7


def test_folders_that_are_not_shared_are_told_from_those_that_are(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SEEN_SECONDS", 0.2)
    assert everywhere(lambda place: place.shares("cache", tmp_path / "one"), 4) == [True] * 4
    assert not list((tmp_path / "one").iterdir())  # nothing is left behind

    def own(place):
        (folder := tmp_path / str(place.process)).mkdir()
        return place.shares("cache", folder)

    assert everywhere(own, 4) == [False] * 4


def test_the_first_failure_is_the_one_that_all_hear_of():
    store = Store()
    places = [Here(store, process, 2) for process in (0, 1)]
    assert places[0].failure() is None
    first = places[1].failed(2, "a file went away")
    assert places[0].failed(1, "an exchange failed") == first == places[0].failure()
    assert first.line() == f"process 1 ({places[1].host}) ended the run: a file went away"


@pytest.fixture
def clock(monkeypatch):
    """The time, which passes when it is told to."""
    now = SimpleNamespace(seconds=0.0)
    for where in (module, watch):
        monkeypatch.setattr(where, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def test_process_0_hears_that_another_is_silent_and_says_what_it_did_last(clock):
    store = Store()
    first, second = (Here(store, process, 2, timeout=20) for process in (0, 1))
    second.doing("step 41", step=True)
    watches = [Watch(first), Watch(second)]
    assert watches[1]._look() is None and watches[0]._look() is None
    clock.seconds = 20.0
    assert watches[0]._look() is None
    clock.seconds = 21.0
    found = watches[0]._look()
    assert found is not None and found.code == RETRY
    assert "process 1 was not heard of" in found.why and "step 41" in found.why
    assert watches[1]._look() == found


def test_process_0_misses_one_that_died_as_soon_as_it_had_joined(clock):
    first = Watch(Here(Store(), 0, 2, timeout=20))
    clock.seconds = 20.0
    assert first._look() is None
    clock.seconds = 21.0
    found = first._look()
    assert found is not None and found.code == RETRY and "process 1 was not heard of" in found.why


@pytest.mark.parametrize(
    ("lives", "stage", "says"),
    [
        (True, "step 11", "; process 1 does: step 11"),
        (False, "step 12", "; process 1 is not heard of any more; it last said: step 12"),
        (True, "step 12", ""),
    ],
)
def test_what_takes_too_long_names_what_the_others_do_and_who_is_silent(clock, monkeypatch, lives, stage, says):
    store = Store()
    first, second = (Here(store, process, 2, timeout=20) for process in (0, 1))
    first.doing("step 12", step=True)
    second.doing(stage, step=True)
    other = Watch(second)
    other._look()
    clock.seconds = 20.0
    assert Watch(first)._too_long() is None
    clock.seconds = 21.0
    watches = Watch(first)
    monkeypatch.setattr(watches._stopped, "wait", lambda seconds: lives and other._look())
    found = watches._too_long()
    assert found is not None and found.why == f"step 12 has taken more than 20 s (distributed.timeout){says}"


def test_a_process_that_waits_for_another_has_no_limit_of_its_own(clock):
    place = Here(Store(), 1, 2, timeout=20, slow=20)
    place.doing("tokenising")
    with place.waiting("process 0"):
        clock.seconds = 1000.0
        assert Watch(place)._too_long() is None
    assert Watch(place)._too_long() is None  # the time that it waited is not its own


def test_processes_that_all_wait_for_each_other_end(clock):
    store = Store()
    first, second = (Here(store, process, 2, slow=20, timeout=1000) for process in (0, 1))
    watches = [Watch(first), Watch(second)]
    with first.waiting("process 1 (a)"), second.waiting("process 0 (b)"):
        watches[1]._look()
        assert watches[0]._look() is None
        clock.seconds = 21.0
        watches[1]._look()
        found = watches[0]._look()
    assert found is not None and "wait for each other" in found.why


def test_processes_that_wait_for_one_that_works_or_for_others_by_turns_go_on(clock):
    store = Store()
    first, second = (Here(store, process, 2, slow=20, timeout=1000) for process in (0, 1))
    watches = [Watch(first), Watch(second)]
    with first.waiting("process 1 (data)"):
        for clock.seconds in (0.0, 21.0, 42.0):  # the second one tokenises, and is late by its own limit alone
            assert watches[1]._look() is None and watches[0]._look() is None
    for turn in range(4):
        with first.waiting("process 1"), second.waiting(f"process 0 (turn {turn})"):
            for _ in range(2):
                clock.seconds += 15.0
                assert watches[1]._look() is None and watches[0]._look() is None


def test_a_failure_survives_the_store():
    failure = Failure(3, "node", 2, 'a "quoted" line')
    assert Failure(*json.loads(json.dumps(failure))) == failure


def test_the_slow_process_is_named_once_it_has_been_slow_for_a_while():
    heard = {0: {"own": 0.1, "waited": 0.0, "memory": 5.0}, 1: {"own": 2.0, "waited": 1.9, "memory": 3.0}}
    assert host_metrics(heard) == {
        "hosts/slowest": 1.0,
        "hosts/own_seconds": 2.0,
        "hosts/input_wait": 1.9,
        "hosts/memory_bytes": 5.0,
    }
    assert host_metrics({0: heard[0]}) == {} == host_metrics({})
    slow = SlowHost()
    said = [slow.line(heard, 2.1) for _ in range(3 * SAID_AFTER)]
    assert [line is not None for line in said].index(True) == SAID_AFTER - 1 and sum(map(bool, said)) == 1
    assert "process 1" in said[SAID_AFTER - 1] and "waiting for its batch" in said[SAID_AFTER - 1]
    assert not any(SlowHost().line(heard, 10.0) for _ in range(3 * SAID_AFTER))


def test_a_process_alone_agrees_with_itself(tmp_path):
    place = Here()
    assert place.decide("x", lambda: object) is object
    assert place.everyone("x", 3) == [3] and place.all_of("x", True) and place.shares("x", tmp_path)
    assert place.in_turn("x", lambda: 4) == 4
    place.same("x", {"a": 1})
    place.meet("x")
