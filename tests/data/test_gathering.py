"""Ranked rows made of rows that hold one answer or one message: none is lost, and what is left out says why."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_jax.data import gathering
from dpo_jax.data.encode import collect, encode
from dpo_jax.data.gathering import scored, tree
from dpo_jax.data.messages import BadRow
from dpo_jax.data.readers import Row
from dpo_jax.data.report import KINDS, UNRANKED, Report
from dpo_jax.errors import UserError
from tests.support.encoding import records, settings
from tests.support.tiny_rows import SCORED, TREE, byte_tokenizer, write


def rows_of(values) -> list[Row]:
    return [Row("f", line, value) for line, value in enumerate(values, 1)]


def same(value):
    return value


def outcomes(made) -> tuple[list[dict], dict[str, int]]:
    """The ranked rows, and how many of each kind were left out."""
    ranked, kinds = [], {}
    for row in made:
        if isinstance(row.value, BadRow):
            assert row.value.kind in KINDS
            kinds[row.value.kind] = kinds.get(row.value.kind, 0) + row.count
        else:
            ranked.append(row.value)
    return ranked, kinds


# ------------------------------------------------------------------------------------------------ scored


@given(st.lists(st.tuples(st.sampled_from("pqr"), st.integers(0, 2))))
def test_rows_with_the_same_prompt_one_after_the_other_are_one_row(given):
    values = [{"prompt": p, "completion": str(n), "score": s, "other": n} for n, (p, s) in enumerate(given)]
    made = list(scored(rows_of(values), same))
    groups = [list(group) for _, group in itertools.groupby(values, key=lambda value: value["prompt"])]
    assert [row.count for row in made] == [len(group) for group in groups]
    wanted = [
        {
            "prompt": group[0]["prompt"],
            "completions": [one["completion"] for one in group],
            "scores": [one["score"] for one in group],
        }
        for group in groups
        if len(group) > 1
    ]
    ranked, kinds = outcomes(made)
    assert ranked == wanted and kinds.get("only answer to its prompt", 0) == sum(len(group) == 1 for group in groups)


@pytest.mark.parametrize(
    ("change", "kind"),
    [({"score": None}, "no rank or score"), ({"completion": None}, "null value"), ({"prompt": None}, "null value")],
)
def test_a_scored_row_that_cannot_be_used_leaves_its_group_together(change, kind):
    values = [SCORED, {**SCORED, **change}, {**SCORED, "completion": "b", "score": 2}]
    ranked, kinds = outcomes(scored(rows_of(values), same))
    assert ranked == [{"prompt": "p", "completions": ["a", "b"], "scores": [1, 2]}] and kinds == {kind: 1}


def test_another_system_message_is_another_prompt():
    values = [{**SCORED, "system": s, "score": n} for n, s in enumerate("aab")]
    ranked, kinds = outcomes(scored(rows_of(values), same))
    assert ranked == [{"prompt": "p", "system": "a", "completions": ["a", "a"], "scores": [0, 1]}]
    assert kinds == {"only answer to its prompt": 1}


def test_a_tie_and_a_lone_answer_stop_nothing_and_too_few_preferences_are_refused(tmp_path):
    rows = [{**SCORED, "completion": c, "prompt": p, "score": s} for p, c, s in ["pa1", "pb1", "qa1", "ra1", "rb2"]]
    rows = [{**row, "score": int(row["score"])} for row in rows]
    encoded, report = encode(str(write(tmp_path / "rows.jsonl", *rows)), byte_tokenizer(bos=True), settings())
    assert (encoded.num_pairs, report.rows, report.kept, report.bad, report.joined) == (1, 5, 1, 0, 2)
    assert report.counts == {"no preference": 1, "only answer to its prompt": 1} and report.unranked == 2
    assert encoded.line.tolist() == [4]
    for kept in (rows[:2], rows[2:3]):
        with pytest.raises(UserError, match="0 rows left of .*; give answers to one prompt in rows that follow each"):
            encode(str(write(tmp_path / "rows.jsonl", *kept)), byte_tokenizer(bos=True), settings())


def test_what_is_said_of_all_rows_is_said_of_those_that_prefer_something(tmp_path):
    tie = [{**SCORED, "completion": c} for c in "ab"]
    ranked = {"prompt": "q", "completions": ["a", "b"], "scores": [1, 2], "weight": 0}
    files = [str(write(tmp_path / "tie.jsonl", *tie)), str(write(tmp_path / "weightless.jsonl", ranked))]
    with pytest.raises(UserError, match="all rows, as .*weightless.jsonl:1: weight is 0"):
        encode(files, byte_tokenizer(bos=True), settings())


def test_first_counts_the_rows_of_the_file(tmp_path):
    path = write(tmp_path / "rows.jsonl", *[{**SCORED, "completion": str(n), "score": n} for n in range(4)])
    for first, completions in ((1, 0), (2, 2), (3, 3), (4, 4), (5, 4), (6, 6), (9, 8)):
        report = Report()
        found = records(path, path, first=first, report=report)
        assert (report.rows, sum(len(one.completions) for one in found)) == (min(first, 8), completions)


# ------------------------------------------------------------------------------------------------ trees


def forest(generator: random.Random, trees: int) -> list[dict]:
    """Trees of messages of which some are gone, unranked, of parents that are not there, or ill."""
    made = []
    for number in range(trees):
        messages = []
        for index in range(generator.randrange(1, 12)):
            parent = generator.choice(messages) if messages else None
            asks = not (parent and parent["role"] == "prompter")
            messages.append(
                {
                    "message_id": f"{number}.{index}",
                    "parent_id": parent and parent["message_id"],
                    "message_tree_id": f"{number}",
                    "role": "prompter" if asks else "assistant",
                    "text": f"text {number}.{index}",
                    "rank": None if asks or generator.random() < 0.2 else generator.randrange(3),
                    "deleted": generator.random() < 0.1,
                    "review_result": generator.choice([True, True, True, None, False]),
                }
            )
        for message in messages[1:]:
            if generator.random() < 0.05:
                message["parent_id"] = "nowhere"
        made.append(messages)
    return [message for messages in made for message in messages]


def brute(messages: list[dict]) -> list[tuple[tuple[str, ...], frozenset]]:
    """What is to come of a forest, found by looking at every message's whole path."""
    by_id = {message["message_id"]: message for message in messages}

    def path(message) -> list[dict] | None:
        found = []
        while True:
            found.insert(0, message)
            if message["deleted"] or message["review_result"] is False:
                return None
            if message["parent_id"] is None:
                return found
            if message["parent_id"] not in by_id:
                return None
            message = by_id[message["parent_id"]]

    groups: dict[tuple[str, ...], set] = {}
    for message in messages:
        if message["role"] == "assistant" and message["rank"] is not None and (found := path(message)):
            groups.setdefault(tuple(one["text"] for one in found[:-1]), set()).add((message["text"], message["rank"]))
    return sorted((prompt, frozenset(answers)) for prompt, answers in groups.items() if len(answers) > 1)


def plain(ranked: list[dict]) -> list[tuple[tuple[str, ...], frozenset]]:
    return sorted(
        (
            tuple(turn["content"] for turn in row["prompt"]),
            frozenset((one[0]["content"], rank) for one, rank in zip(row["completions"], row["ranks"], strict=True)),
        )
        for row in ranked
    )


@given(st.integers(0, 10**6), st.integers(1, 5))
def test_trees_give_the_ranked_answers_of_every_question_and_lose_no_message(seed, trees):
    generator = random.Random(seed)
    messages = forest(generator, trees)
    made = list(tree(rows_of(messages), same))
    assert sum(row.count for row in made) == len(messages)
    ranked, kinds = outcomes(made)
    assert plain(ranked) == brute(messages)
    assert set(kinds) <= {kind for kind, effect in KINDS.items() if effect == UNRANKED}
    for row in ranked:
        assert [turn["role"] for turn in row["prompt"]] == (["user", "assistant"] * len(row["prompt"]))[
            : len(row["prompt"])
        ]
    mixed = sorted(messages, key=lambda message: (int(message["message_tree_id"]), generator.random()))
    again, others = outcomes(tree(rows_of(mixed), same))
    assert plain(again) == plain(ranked) and others == kinds  # the order inside a tree does not matter


@given(st.integers(0, 10**6))
def test_a_nested_tree_is_the_same_as_its_messages(seed):
    messages: list[dict] = []
    for message in forest(random.Random(seed), 2):  # what hangs on no message cannot be nested
        if message["parent_id"] in (None, *(one["message_id"] for one in messages)):
            messages.append(message)
    flat, kinds = outcomes(tree(rows_of(messages), same))
    inner = {
        m["message_id"]: {k: v for k, v in m.items() if k != "message_tree_id"} | {"replies": []} for m in messages
    }
    for message in messages[::-1]:
        if message["parent_id"] is not None:
            inner[message["parent_id"]]["replies"].insert(0, inner[message["message_id"]])
    roots = [{"prompt": inner[m["message_id"]]} for m in messages if m["parent_id"] is None]
    nested, others = outcomes(tree(rows_of(roots), same))
    assert plain(nested) == plain(flat) and others == kinds


def test_at_most_one_tree_is_held():
    pulled = []
    messages = forest(random.Random(0), 50)

    def rows():
        for row in rows_of(messages):
            pulled.append(row.line)
            yield row

    passed = 0
    for row in tree(rows(), same):
        passed += row.count
        number = messages[row.line - 1]["message_tree_id"]
        later = {messages[line - 1]["message_tree_id"] for line in pulled if line > row.line} - {number}
        assert len(later) <= 1
    assert passed == len(messages)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"role": "narrator"}, "unknown role", "known roles: prompter"),
        ({"role": ["assistant"]}, "unknown role", "known roles: prompter"),
        ({"text": 5}, "wrong type", "text is a number"),
        ({"text": None}, "null value", "text is null"),
        ({"message_id": "n"}, "duplicate key", "another message has message_id 'n'"),
        ({"role": "prompter"}, "wrong type", "a message answers one of the same role"),
        ({"parent_id": "y"}, "missing parent", "a message before it is left out"),
        ({"parent_id": None, "message_tree_id": "q"}, "missing parent", "an answer to no question"),
    ],
)
def test_a_message_that_cannot_be_used_says_why(change, kind, words):
    third = {"message_id": "z", "parent_id": "q", "role": "assistant", "text": "Well", "rank": 2}
    made = list(tree(rows_of([*TREE[:2], {**TREE[2], **change}, third]), same))
    (reason,) = [row.value for row in made if isinstance(row.value, BadRow)]
    assert reason.kind == kind and words in reason.reason
    (ranked,) = outcomes(made)[0]
    assert [one[0]["content"] for one in ranked["completions"]] == ["No", "Well"]


def test_messages_of_a_tree_that_stand_apart_are_bad_rows(tmp_path):
    there = [{**message, "message_tree_id": "t"} for message in TREE]
    other = [{**m, "message_id": f"{m['message_id']}2", "parent_id": m["parent_id"] and "q2"} for m in TREE]
    other = [{**message, "message_tree_id": "o"} for message in other]
    apart = [*there, *other[:2], {**there[2], "message_id": "z", "rank": 3}, other[2]]
    ranked, kinds = outcomes(tree(rows_of(apart), same))
    assert len(ranked) == 2 and kinds == {"duplicate key": 1}
    with pytest.raises(
        UserError, match="1 of 7 rows are bad .*rows.jsonl:6: messages of tree t stand apart; sort the rows"
    ):
        encode(str(write(tmp_path / "rows.jsonl", *apart)), byte_tokenizer(), settings())


def test_without_the_name_of_a_tree_one_begins_at_each_first_question():
    second = [{**m, "message_id": m["message_id"] + "2", "parent_id": m["parent_id"] and "q2"} for m in TREE]
    ranked, kinds = outcomes(tree(rows_of([*TREE, *second]), same))
    assert len(ranked) == 2 and kinds == {}


def test_endless_groups_are_refused(monkeypatch):
    monkeypatch.setattr(gathering, "MOST", 5)
    with pytest.raises(UserError, match="f:6: more than 5 rows one after the other have the same prompt"):
        list(scored(rows_of([SCORED] * 9), same))
    answers = [{**TREE[1], "message_id": str(n)} for n in range(9)]
    with pytest.raises(UserError, match="f:6: a tree of more than 5 messages"):
        list(tree(rows_of([TREE[0], *answers]), same))


def test_trees_are_read_from_a_file_as_the_layout_tree(tmp_path):
    encoded, report = collect(str(write(tmp_path / "rows.jsonl", *TREE)), byte_tokenizer(), settings())
    assert (encoded.num_pairs, report.kept, report.joined, report.rows) == (1, 1, 2, 3)
    assert report.files[str(tmp_path / "rows.jsonl")]["layout"] == "tree"
    assert byte_tokenizer().decode(encoded.completion(int(encoded.chosen[0]))).startswith("Yo")
