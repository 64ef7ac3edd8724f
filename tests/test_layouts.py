"""Layouts of rows: each is read as the same preference, and implicit prompts end where a reader would end them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_jax.data.layouts import LAYOUTS, Pair, Record, detect, split_texts, to_record
from dpo_jax.data.messages import shared_length
from dpo_jax.data.settings import LAYOUTS as NAMES
from tests.tiny_rows import HI, NO, YO, assistant, user


def one(row, layout="auto") -> Record:
    found = detect(row) if layout == "auto" else LAYOUTS[layout]
    return to_record(row, found, file="f", line=1)


SAME_MEANING = {  # rows of every layout that say: to "Hi?" the answer "Yo" is better than "No"
    "pair": [
        {"prompt": HI, "chosen": YO, "rejected": NO},
        {"prompt": HI, "chosen": YO[0], "rejected": NO[0]},
        {"prompt": HI, "chosen": "Yo", "rejected": "No"},
        {"prompt": HI, "chosen": HI + YO, "rejected": HI + NO},
        {"prompt": "Hi?", "chosen": HI + YO, "rejected": HI + NO},
        {"prompt": "Hi?", "chosen": YO, "rejected": NO},
        {"prompt": "Hi?", "chosen": "Yo", "rejected": "No", "system": None},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi?"}]}], "chosen": YO, "rejected": NO},
        {"prompt": [{**HI[0], "tool_calls": None, "name": None}], "chosen": YO, "rejected": NO},
    ],
    "implicit": [{"chosen": HI + YO, "rejected": HI + NO}],
    "sharegpt": [
        {
            "conversations": [{"from": "human", "value": "Hi?"}],
            "chosen": {"from": "gpt", "value": "Yo"},
            "rejected": [{"from": "gpt", "value": "No"}],
        },
        {"conversations": HI, "chosen": "Yo", "rejected": NO},
    ],
    "openai": [{"input": {"messages": HI}, "preferred_output": YO, "non_preferred_output": NO}],
    "ranked": [
        {"prompt": HI, "completions": [NO, YO], "ranks": [2, 1]},
        {"prompt": HI, "responses": ["No", "Yo"], "scores": [-1, 0.5]},
    ],
}


@pytest.mark.parametrize(("layout", "row"), [(name, row) for name, rows in SAME_MEANING.items() for row in rows])
def test_every_layout_reads_the_same_preference(layout, row):
    record = one(row)
    assert detect(row).name == layout
    (pair,) = record.pairs
    assert record.prompt == HI
    assert (record.completions[pair.chosen], record.completions[pair.rejected]) == (YO, NO)
    assert (pair.weight, pair.margin) == (1.0, 0.0)


def test_the_layout_names_of_the_settings_are_those_of_the_table():
    assert sorted(NAMES) == sorted(LAYOUTS)


def test_texts_stay_texts_and_ids_stay_ids():
    assert one({"prompt": "a", "chosen": "b", "rejected": "c"}).completions == ("b", "c")
    ids = one({"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]})
    assert (ids.prompt, ids.completions) == ([1, 2], ([3], [4, 5]))


def test_columns_that_every_layout_takes():
    tools = [{"type": "function", "function": {"name": "f"}}]
    extra = {
        "system": "Be brief.",
        "weight": 2,
        "margin": 0.5,
        "chat_template_kwargs": {"thinking": False, "gone": None},
    }
    for value in (tools, json.dumps(tools)):
        record = one({"prompt": HI, "chosen": YO, "rejected": NO, "tools": value, **extra})
        assert record.prompt == [{"role": "system", "content": "Be brief."}, *HI]
        assert record.pairs == (Pair(0, 1, 2.0, 0.5),)
        assert (record.tools, record.chat_template_kwargs) == (tools, {"thinking": False})
    in_input = {"input": {"messages": HI, "tools": tools}, "preferred_output": YO, "non_preferred_output": NO}
    assert one(in_input).tools == tools


def test_a_ranked_row_is_one_group_with_all_its_strict_pairs():
    record = one({"prompt": "p", "completions": ["a", "b", "c", "d"], "ranks": [1, 2, 2, 3]})
    assert record.completions == ("a", "b", "c", "d")
    assert [(pair.chosen, pair.rejected) for pair in record.pairs] == [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
    assert [kind for kind, _ in record.notes] == ["tie in a ranked row"]
    scored = one({"prompt": "p", "completions": ["a", "b", "c", "d"], "scores": [9, 5, 5, 1]})
    assert scored.pairs == record.pairs


def test_a_completion_in_no_pair_is_left_out():
    record = one({"prompt": "p", "completions": ["a", "same", "same"], "ranks": [1, 2, 3]})
    assert record.completions == ("a", "same", "same") and len(record.pairs) == 2
    assert "pair left out of a ranked row" in dict(record.notes)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("It is blue", "It is black", "It is"),
        ("2+2=4", "2+2=5", "2+2="),
        ("Yes", "Yes, sir", ""),
        ("say it", "say it now", "say"),
        ("don't", "don", ""),
        ("a cafe\u0301", "a cafe", "a"),
        ("a cafe\u0301 x", "a cafes", "a"),
        ("hi \U0001f44d\U0001f3fd", "hi \U0001f44d\U0001f3fb", "hi"),
        ("hi \U0001f469\u200d\U0001f680", "hi \U0001f469\u200d\U0001f33e", "hi"),
        ("Q\nyes", "Q\nno", "Q\n"),
        ("\n\nHuman: a\n\nAssistant: x", "\n\nHuman: a\n\nAssistant: y", "\n\nHuman: a\n\nAssistant:"),
        ("\n\nHuman: a\n\nAssistant: the x", "\n\nHuman: a\n\nAssistant: the y", "\n\nHuman: a\n\nAssistant:"),
        (
            "H: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "H: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e",
            "H: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
        ),
        ("H: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d", "H: a\n\nAssistant: x", "H: a\n\nAssistant:"),
    ],
)
def test_implicit_prompts_of_texts(chosen, rejected, prompt):
    assert split_texts(chosen, rejected) == (prompt, chosen[len(prompt) :], rejected[len(prompt) :])


WORDS = st.lists(
    st.sampled_from(["it", "is", "blue", "black", "a-b", "don't", " ", "\n", ",", "é", "z\u0301"]), max_size=8
)


@given(WORDS, WORDS, WORDS)
def test_an_implicit_prompt_never_splits_a_word_and_loses_nothing(common, one_end, other_end):
    chosen, rejected = "".join(common + one_end), "".join(common + other_end)
    prompt, *answers = split_texts(chosen, rejected)
    assert [prompt + answer for answer in answers] == [chosen, rejected]
    for answer in answers:
        assert not prompt or answer.strip()
        assert not (prompt[-1:].isalnum() and answer[:1].isalnum())


@given(st.text("ab", max_size=9), st.text("ab", max_size=9))
def test_shared_length_is_the_longest_common_prefix(one_text, other):
    length = shared_length(one_text, other)
    assert one_text[:length] == other[:length]
    assert length == min(len(one_text), len(other)) or one_text[length] != other[length]


def test_implicit_conversations_leave_both_answers_to_the_assistant():
    longer = [*HI, *YO, user("And?"), assistant("so")]
    record = one({"chosen": HI + YO, "rejected": longer})
    assert record.prompt == HI and record.completions == (YO, longer[1:])
    assert "completion of several turns" in dict(record.notes)


def test_a_prompt_that_a_completion_repeats_is_taken_off_and_noted():
    record = one({"prompt": HI, "chosen": HI + YO, "rejected": NO})
    assert record.completions == (YO, NO)
    assert "prompt repeated in a completion" in dict(record.notes)
