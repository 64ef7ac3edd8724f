"""Layouts of rows: each is read as the same preference, and implicit prompts end where a reader would end them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_jax.data.answers import answer_start, split_texts
from dpo_jax.data.gathering import GATHERERS
from dpo_jax.data.layouts import LAYOUTS, Pair, Record, detect, to_record, unused_columns
from dpo_jax.data.messages import BadRow, shared_length
from dpo_jax.data.settings import LAYOUTS as NAMES
from tests.support.tiny_rows import HI, NO, YO, assistant, user


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
    assert detect(row).name == layout and unused_columns(row, detect(row)) == []
    (pair,) = record.pairs
    assert record.prompt == HI
    assert (record.completions[pair.chosen], record.completions[pair.rejected]) == (YO, NO)
    assert (pair.weight, pair.margin) == (1.0, 0.0)


SAME_ANSWER = {  # rows of every layout that say: to "Hi?" the answer "Yo" is good
    "unpaired": [
        {"prompt": HI, "completion": YO, "label": True},
        {"prompt": HI, "completion": YO[0], "label": 1},
        {"prompt": HI, "completion": "Yo", "label": 1.0},
        {"prompt": HI, "completion": HI + YO, "label": True},
        {"prompt": "Hi?", "completion": HI + YO, "label": True},
        {"prompt": "Hi?", "completion": YO, "label": True},
        {"prompt": "Hi?", "completion": "Yo", "label": True, "system": None},
    ],
    "completion": [{"prompt": HI, "completion": YO}, {"prompt": "Hi?", "completion": YO}],
    "messages": [{"messages": HI + YO}],
}


@pytest.mark.parametrize(("layout", "row"), [(name, row) for name, rows in SAME_ANSWER.items() for row in rows])
def test_every_layout_of_single_completions_reads_the_same_answer(layout, row):
    record = one(row)
    assert detect(row).name == layout and unused_columns(row, detect(row)) == []
    assert (record.prompt, record.completions) == (HI, (YO,))
    assert record.pairs == (Pair(0, 0, 1.0, 0.0, 1.0),) and record.pairs[0].single


@pytest.mark.parametrize("label", [False, 0, 0.0])
def test_an_undesirable_completion_has_label_0(label):
    (pair,) = one({"prompt": "p", "completion": "c", "label": label, "weight": 3, "margin": 1}).pairs
    assert pair == Pair(0, 0, 3.0, 0.0, 0.0)


def test_a_label_that_is_a_text_is_refused_with_what_it_may_be():
    with pytest.raises(BadRow, match=r"label is the text 'good'; give true or 1 \(desirable\), false or 0"):
        one({"prompt": "p", "completion": "c", "label": "good"})


DETECTED = [  # columns, and what they were read as before there were single completions: that stays
    ("prompt chosen rejected completion label messages", "pair"),
    ("chosen rejected messages label", "implicit"),
    ("prompt completions ranks completion label", "ranked"),
    ("prompt responses scores messages", "ranked"),
    ("prompt_ids chosen_ids rejected_ids prompt completion label", "tokenized"),
    ("conversations chosen rejected messages", "sharegpt"),
    ("input preferred_output prompt completion", "openai"),
    ("prompt completion label", "unpaired"),
    ("prompt completion label messages", "unpaired"),
    ("prompt completion label score", "unpaired"),  # a label says more of one answer than a score
    ("prompt completion score", "scored"),
    ("prompt completion messages", "completion"),
    ("prompt prompt_id messages", "messages"),
]


@pytest.mark.parametrize(("columns", "layout"), DETECTED)
def test_the_first_layout_that_fits_is_the_one(columns, layout):
    assert detect(dict.fromkeys(columns.split())).name == layout


@given(
    st.sets(
        st.sampled_from(sorted({name for layout in LAYOUTS.values() for names in layout.columns for name in names}))
    )
)
def test_no_row_of_pairs_is_read_as_a_single_completion(columns):
    row = dict.fromkeys(columns)
    single = {*SAME_ANSWER, *GATHERERS}
    pairs = [layout for layout in LAYOUTS.values() if layout.name not in single and layout.fits(row)]
    if pairs:
        found = detect(row)
        assert found is pairs[0] or found.name == "tree"  # whose columns are many, and its own


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
        "label": 0.75,
        "chat_template_kwargs": {"thinking": False, "gone": None},
    }
    for value in (tools, json.dumps(tools)):
        record = one({"prompt": HI, "chosen": YO, "rejected": NO, "tools": value, **extra})
        assert record.prompt == [{"role": "system", "content": "Be brief."}, *HI]
        assert record.pairs == (Pair(0, 1, 2.0, 0.5, 0.75),)
        assert unused_columns(extra, LAYOUTS["pair"]) == []
        single = one({"prompt": HI, "completion": "Yo", "tools": value, **extra}, "completion")
        assert (single.prompt, single.tools) == (record.prompt, record.tools)
        assert single.chat_template_kwargs == record.chat_template_kwargs and single.pairs == (Pair(0, 0, 2.0),)
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


def test_a_ranked_row_has_its_label_on_every_pair():
    record = one({"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 2, 3], "label": 0.5})
    assert [pair.label for pair in record.pairs] == [0.5, 0.5, 0.5]


TOOL = {"role": "tool", "content": "5"}


@pytest.mark.parametrize(
    ("roles", "start"),
    [
        ("user assistant", 1),
        ("system user assistant", 2),
        ("user assistant user assistant", 3),
        ("user assistant user assistant tool assistant", 3),
        ("user assistant assistant", 1),
        ("user tool assistant", 2),
        ("user assistant system assistant", 3),
        ("assistant", 0),
        ("assistant user assistant assistant", 2),
        ("user", 1),
    ],
)
def test_the_last_answer_is_all_that_the_assistant_says_after_it_was_asked(roles, start):
    conversation = [{"role": role, "content": role} for role in roles.split()]
    assert answer_start(conversation) == start


def test_a_conversation_of_several_turns_is_learned_from_its_last_answer():
    asked = [*HI, *YO, user("And?")]
    record = one({"messages": [*asked, assistant("let me see"), TOOL, assistant("five")]})
    assert record.prompt == asked
    assert record.completions == ([assistant("let me see"), TOOL, assistant("five")],)
    assert dict(record.notes) == {"completion of several turns": "all turns of the assistant's are scored"}
    record = one({"prompt": "And?", "completion": [*asked, *NO], "label": 0})
    assert (record.prompt, record.completions) == (asked, (NO,))


@pytest.mark.parametrize("row", [{"prompt": "p", "completion": "c"}, {"messages": HI + YO}])
def test_what_says_desirable_or_not_is_not_learned_whatever_it_says(row):
    layout = detect(row).name
    for label in (True, False, 1, 0):
        with pytest.raises(BadRow, match="data.layout=unpaired"):
            one({**row, "label": label}, layout)
    for label in (None, "maths", 7):
        assert one({**row, "label": label}, layout).pairs == (Pair(0, 0),)
    assert unused_columns({**row, "label": "maths", "margin": 1}, LAYOUTS[layout]) == ["label", "margin"]
