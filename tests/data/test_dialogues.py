"""Texts made into turns for a chat model (`data.as_chat`)."""

import pytest

from dpo_jax.data.encode import collect
from dpo_jax.data.layouts import Record, detect, to_record
from dpo_jax.data.messages import BadRow
from tests.support.encoding import encoded_rows, settings
from tests.support.tiny_rows import CHAT, GOOD, HI, IDS, IMPLICIT, NO, YO, assistant, byte_tokenizer, user, write

ASKED = "\n\nHuman: Hi?\n\nAssistant:"
LONG = f"{ASKED} Hey.\n\nHuman: So?\n\nAssistant:"


def one(row) -> Record:
    return to_record(row, detect(row), file="f", line=1, as_chat=True)


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": f"{ASKED} Yo", "rejected": f"{ASKED} No"},
        {"prompt": ASKED, "chosen": " Yo", "rejected": "No\n"},
        {"prompt": "Human: Hi?", "chosen": "Assistant: Yo", "rejected": "\n\nAssistant: No"},
        {"prompt": "Hi?", "chosen": "Yo", "rejected": " No"},
        {"prompt": HI, "chosen": "Yo", "rejected": "No"},
        CHAT,
    ],
)
def test_dialogues_and_plain_texts_become_the_same_turns(row):
    assert one(row).prompt == HI and one(row).completions == (YO, NO)


def test_every_turn_of_a_dialogue_is_one():
    record = one({"chosen": f"{LONG} Yo", "rejected": f"{LONG} No\n\nHuman: Why?\n\nAssistant: Because."})
    assert record.prompt == [*HI, assistant("Hey."), user("So?")]
    assert record.completions == (YO, [*NO, user("Why?"), assistant("Because.")])


def test_tagged_turns_of_a_prompt_are_turns():
    record = one({**GOOD, "prompt": "Hi?\nYou?\n\n<extra_id_1>Assistant\nYo <extra_id_1>.\n<extra_id_1>User\nSo?\n"})
    assert record.prompt == [user("Hi?\nYou?"), assistant("Yo <extra_id_1>."), user("So?\n")]
    assert record.completions == ([assistant("yes")], [assistant("no")])


def test_other_layouts_of_texts_become_turns_too():
    ranked = one({"prompt": ASKED, "completions": ["Yo", "No"], "ranks": [1, 2]})
    assert ranked.prompt == HI and ranked.completions == (YO, NO)
    single = one({"prompt": "Hi?", "completion": "Yo", "label": False})
    assert single.prompt == HI and single.completions == (YO,)
    assert one({**GOOD, "system": "Be"}).prompt == [{"role": "system", "content": "Be"}, user("Hi")]


def test_spaces_and_markers_inside_of_plain_texts_stay():
    record = one({"prompt": " Say\n\nHuman: x", "chosen": "   indented\n", "rejected": "\n\nAssistant: y"})
    assert record.prompt == [user(" Say\n\nHuman: x")]
    assert record.completions == ([assistant("  indented\n")], [assistant("\n\nAssistant: y")])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (IDS, "token ids cannot be made into turns; leave data.as_chat out"),
        (IMPLICIT, "data.as_chat: no dialogue of Human: and Assistant:, so where the prompt ends is not known"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "the prompt's messages are empty"),
        ({"prompt": ASKED, "chosen": " a\n\nHuman: b", "rejected": "c"}, "chosen ends with a user message"),
        ({"prompt": ASKED, "chosen": " ", "rejected": "c"}, "chosen is empty"),
    ],
)
def test_what_cannot_be_turns_is_a_bad_row(row, words):
    with pytest.raises(BadRow, match=words):
        one(row)


def test_the_turns_go_through_the_chat_template(tmp_path):
    tokenizer = byte_tokenizer()
    row = {"chosen": f"{LONG} Yo", "rejected": f"{LONG} No"}
    encoded, report = encoded_rows(tmp_path, tokenizer, row, as_chat=True)
    asked = [*HI, assistant("Hey."), user("So?")]
    assert encoded.prompt(0).tolist() == tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.decode(encoded.completion(0)) == "Yo<|im_end|>" and (report.templated, report.texts) == (1, 0)
    assert not any(line.startswith("warning") for line in report.lines())
    plain, report = encoded_rows(tmp_path, tokenizer, row)
    assert tokenizer.decode(plain.prompt(0)) == LONG and report.texts == 1


def test_without_it_texts_stay_texts(tmp_path):
    path = str(write(tmp_path / "rows.jsonl", GOOD))
    assert collect(path, byte_tokenizer(), settings())[1].templated == 0
