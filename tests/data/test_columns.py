"""Columns under other names: mapped by the run, or missed, and then said with the mapping to write."""

import re

import pytest

from dpo_jax.data.columns import problems_of, renamed
from dpo_jax.data.encode import collect, encode
from dpo_jax.data.messages import BadRow
from dpo_jax.errors import UserError
from tests.support.encoding import settings
from tests.support.tiny_rows import CHAT, GOOD, HI, IMPLICIT, NO, YO, assistant, byte_tokenizer, user, write

ASKED = {"question": "Why?", "good": "yes", "bad": "no"}
MAPPED = {"prompt": "question", "chosen": "good", "rejected": "bad"}


def read(folder, *rows, **changes):
    return encode(str(write(folder / "rows.jsonl", *rows)), byte_tokenizer(bos=True), settings(**changes))


def refused(folder, *rows, **changes) -> str:
    with pytest.raises(UserError) as caught:
        read(folder, *rows, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ the mapping


def test_a_mapping_reads_the_files_columns_under_the_names_of_the_layout(tmp_path):
    plain, _ = read(tmp_path, {"prompt": "Why?", "chosen": "yes", "rejected": "no"})
    mapped, report = read(tmp_path, ASKED, columns=MAPPED)
    assert mapped.tokens.tolist() == plain.tokens.tolist()
    assert report.files[str(tmp_path / "rows.jsonl")] == {
        "layout": "pair",
        "as_text": 0,
        "rows": 1,
        "unused": [],
        "detected": True,
    }


@pytest.mark.parametrize(
    ("row", "columns", "result"),
    [
        (ASKED, {}, ASKED),
        (ASKED, MAPPED, {"prompt": "Why?", "chosen": "yes", "rejected": "no"}),
        (GOOD, {"chosen": "rejected", "rejected": "chosen"}, {"prompt": "Hi", "chosen": "no", "rejected": "yes"}),
        ({**GOOD, "q": "Why?"}, {"prompt": "q"}, {**GOOD, "prompt": "Why?"}),
        ({"a": "x", "b": "y", "c": ""}, {"prompt": ("a", "b", "c")}, {"prompt": "x\ny"}),
        ({"a": "x", "b": None}, {"prompt": ("a", "b", "c")}, {"prompt": "x"}),
        ({"a": "x"}, {"weight": "w"}, {"a": "x"}),
        ({"prompt": "x", "chosen": "y"}, {"prompt": "q"}, {"chosen": "y"}),  # what stands there is not what was named
    ],
)
def test_what_a_mapping_makes_of_a_row(row, columns, result):
    assert renamed(row, columns) == result


def test_only_texts_are_joined():
    with pytest.raises(BadRow, match="b is a list; only texts can be joined"):
        renamed({"a": "x", "b": ["y"]}, {"prompt": ("a", "b")})


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"promt": "q"}, ["'promt' is no column of a layout; did you mean prompt?"]),
        ({"prompt": "q", "chosen": "q"}, ["'q' is given for prompt and for chosen; keep one"]),
        ({"prompt": ("q", "q")}, ["'q' is given for prompt and for prompt; keep one"]),
        ({"prompt": " "}, ["prompt has no name of a column; write one, or leave it out"]),
        (MAPPED, []),
    ],
)
def test_a_mapping_is_checked_without_files(columns, words):
    assert problems_of(columns) == words


def test_columns_of_the_mapping_that_a_file_lacks_are_refused_by_name(tmp_path):
    row = {"questoin": "Why?", "good": "yes", "bad": "no"}
    assert refused(tmp_path, b"{", row, columns=MAPPED) == (
        f"{tmp_path}/rows.jsonl:2: data.columns: no column 'question' here; the columns are bad, good, questoin; "
        "did you mean questoin?"
    )


def test_a_column_whose_name_another_one_takes_is_listed_as_unused(tmp_path):
    _, report = read(tmp_path, {**GOOD, "q": "Why?", "odd": 1}, columns={"prompt": "q"})
    assert report.files[str(tmp_path / "rows.jsonl")]["unused"] == ["odd", "prompt"]


# ------------------------------------------------------------------------------------------------ a prompt elsewhere

ANSWERS = {"chosen": "The Ucayali.", "rejected": "The Thames."}
FULL = {"chosen": "Q? A good one", "rejected": "Q? A bad one"}


@pytest.mark.parametrize(
    ("more", "mapping"),
    [
        ({"question": "Name a river."}, "{prompt: question}"),
        ({"instruction": "Name it.", "input": ""}, "{prompt: instruction}"),
        ({"instruction": "Name it.", "input": "a river"}, "{prompt: [instruction, input]}"),
        ({"query": HI}, "{prompt: query}"),
    ],
)
def test_a_prompt_in_another_column_is_no_implicit_prompt(tmp_path, more, mapping):
    said = refused(tmp_path, {**ANSWERS, **more})
    assert said.startswith(f"{tmp_path}/rows.jsonl:1: ") and f"write 'data.columns={mapping}', or data.layout=" in said
    encoded, _ = read(tmp_path, {**ANSWERS, **more}, layout="implicit")
    assert encoded.num_pairs == 1


def test_an_unread_prompt_of_a_later_row_is_a_bad_row(tmp_path):
    path = write(tmp_path / "rows.jsonl", IMPLICIT, {**ANSWERS, "question": "Name a river."})
    _, report = collect(str(path), byte_tokenizer(bos=True), settings())
    assert report.counts == {"prompt not read": 1} and "{prompt: question}" in report.examples["prompt not read"][0]


def test_the_input_beside_a_mapped_instruction_is_not_lost(tmp_path):
    rows = [{**ANSWERS, "instruction": f"Name {n}.", "input": "a river" * (n == 1)} for n in range(2)]
    said = refused(tmp_path, *rows, columns={"prompt": "instruction"})
    assert "rows.jsonl:2: input seems to be part of the prompt" in said and "{prompt: [instruction, input]}" in said
    encoded, _ = read(tmp_path, *rows, columns={"prompt": ("instruction", "input")})
    assert byte_tokenizer().decode(encoded.prompt(2)).endswith("Name 1.\na river")


@pytest.mark.parametrize(
    "row",
    [
        {**FULL, "question": "Q?"},
        {"chosen": HI + YO, "rejected": HI + NO, "instruction": "Hi?"},
        {**IMPLICIT, "question": " "},
        {**IMPLICIT, "input": 5},
        {**GOOD, "question": "Why?"},
    ],
)
def test_columns_that_only_repeat_the_prompt_are_left_alone(tmp_path, row):
    assert read(tmp_path, row)[0].num_pairs == 1


def test_mostly_empty_prompts_are_refused_unless_the_layout_is_given(tmp_path):
    rows = [{"chosen": "Yes", "rejected": "No"}, {"chosen": "Ja", "rejected": "Nein"}, IMPLICIT]
    said = refused(tmp_path, *rows)
    assert (
        said.startswith(f"2 of 3 prompts are empty (first: {tmp_path}/rows.jsonl:1: ")
        and "data.columns={prompt:" in said
    )
    encoded, report = read(tmp_path, *rows, layout="implicit")
    assert encoded.num_pairs == 3 and report.counts == {"no prompt": 2}
    assert read(tmp_path, *rows[1:])[1].counts == {"no prompt": 1}  # half of them is not most
    with pytest.raises(UserError, match="2 of 3 prompts are empty"):  # also without BOS, where they are bad rows
        encode(str(write(tmp_path / "rows.jsonl", *rows)), byte_tokenizer(), settings())


# ------------------------------------------------------------------------------------------------ no layout


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"instruction": "a", "input": "", "output": ["b", "c"]},
            "columns input, instruction, output fit no layout; the nearest is ranked, with prompt, completions or "
            "responses, and with ranks, scores, best or strength: write 'data.columns={prompt: [instruction, input], "
            "completions: output, ranks: COLUMN}', where COLUMN stands for a name of yours",
        ),
        (
            {"prompt": "a", "answers": [{"answer": "b", "rank": 1}], "turns": 1},
            "the nearest is ranked, with prompt, completions or responses, and with ranks, scores, best or strength: "
            "write 'data.columns={completions: answers.answer, ranks: answers.rank}'",
        ),
        (
            {"prompt": "a", "response": "b", "helpfulness": 3},
            "is scored, with prompt, completion, score: "
            "write 'data.columns={completion: response, score: helpfulness}'",
        ),
        (
            ASKED,
            "the nearest is pair, with prompt, chosen, rejected: write 'data.columns={prompt: question, chosen: good, "
            "rejected: bad}'",
        ),
        (
            {"conversations": HI + YO},
            "the nearest is messages, with messages: write 'data.columns={messages: conversations}'",
        ),
        (
            {"prompt": "a", "chosen": "b", "reject": "c"},
            "the nearest is pair, with prompt, chosen, rejected: write 'data.columns={rejected: reject}'",
        ),
        (
            {"version": 1, "data": [{"prompt": "a", "chosen": "b", "rejected": "c"}]},
            "the rows seem to be in the list 'data' of this object; write that list alone into a file",
        ),
        (
            {"promt": "a", "chosen": "b", "rejected": "c"},
            "promt seems to be the prompt and is not read; "
            "write 'data.columns={prompt: promt}', or data.layout=implicit",
        ),
        (
            {"odd one": 1, "x": 2},
            "columns odd one, x fit no layout; the nearest is pair, with prompt, chosen, rejected: write 'data.columns="
            "{prompt: COLUMN, chosen: COLUMN, rejected: COLUMN}', where COLUMN stands for a name of yours",
        ),
    ],
)
def test_rows_of_no_layout_are_refused_once_with_the_mapping_to_write(tmp_path, row, words):
    said = refused(tmp_path, b"{", *[row] * 9)
    assert said.startswith(f"{tmp_path}/rows.jsonl:2: ") and words in said and len(said) < len(str(tmp_path)) + 400


@pytest.mark.parametrize(
    ("row", "layout", "mapping"),
    [
        ({"prompt": "a", "messages": HI + YO, "rejected": "b"}, "messages", "{chosen: COLUMN}"),
        ({"prompt": "a", "completion": "b", "rejected": "c"}, "completion", "{chosen: COLUMN}"),
        ({"prompt": "a", "messages": HI + YO, "good": "b", "bad": "c"}, "messages", "{chosen: good, rejected: bad}"),
        ({"prompt": "a", "completion": "b", "liked": True}, "completion", "{label: liked}"),
        (
            {"messages": HI, "output_a": "b", "output_b": "c", "winner": 1},
            "messages",
            "{prompt: messages, completions: [output_a, output_b], best: winner}",
        ),
    ],
)
def test_half_a_preference_is_not_learned_as_one_answer(tmp_path, row, layout, mapping):
    said = refused(tmp_path, row)
    assert said.startswith(f"{tmp_path}/rows.jsonl:1: columns ") and "seem to hold a preference" in said
    means = ", where COLUMN stands for a name of yours" if "COLUMN" in mapping else ""
    assert said.endswith(f"write 'data.columns={mapping}'{means}, or data.layout={layout}")
    if row.get("messages") != HI:
        assert read(tmp_path, row, layout=layout)[0].num_pairs == 1


def test_a_mapping_that_fits_some_of_the_files_alone_is_said_to_be_for_all_of_them(tmp_path):
    """A held-out file with the names of the layout, beside training rows of other names: no mapping fits both."""
    said = refused(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"}, columns={"prompt": "question"})
    assert "no column 'question' here" in said and "for every file of data.train and data.eval" in said


def test_the_mapping_that_is_advised_works(tmp_path):
    assert read(tmp_path, ASKED, columns=MAPPED)[0].num_pairs == 1
    turns = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yo"}]
    encoded, _ = read(tmp_path, {"conversations": turns}, columns={"messages": "conversations"})
    assert encoded.num_pairs == 1
    assert read(tmp_path, {"prompt": "a", "response": "b"}, columns={"completion": "response"})[0].num_pairs == 1


TOLD = [
    {"question": "Why?", "answer_good": "yes", "answer_bad": "no"},
    {"user_question": "Why?", "winningResponse": "yes", "losingResponse": "no", "source": "web"},
    {"question": "Why?", "answer": "yes", "wrong_answer": "no"},
    {"query": "Why?", "preferred_output": "yes", "non_preferred_output": "no"},
    {"prompt": "Why?", "y_w": "yes", "y_l": "no"},
]


@pytest.mark.parametrize("row", TOLD, ids=lambda row: "-".join(row))
def test_a_word_in_a_name_tells_the_better_answer_and_the_advice_works(tmp_path, row):
    said = re.search(r"data\.columns=\{(.*?)\}", refused(tmp_path, row))[1]
    columns = dict(part.split(": ") for part in said.split(", "))
    encoded, _ = read(tmp_path, row, columns=columns)
    plain, _ = read(tmp_path, {"prompt": "Why?", "chosen": "yes", "rejected": "no"})
    assert encoded.num_pairs == 1 and encoded.tokens.tolist() == plain.tokens.tolist()


def test_a_prompt_and_two_unknown_texts_are_no_single_answer(tmp_path):
    assert "nearest is pair" in refused(tmp_path, {"question": "Why?", "one": "yes", "two": "no"})
    assert "completion: answer}" in refused(tmp_path, {"question": "Why?", "answer": "yes", "source": "web"})


def test_a_file_whose_first_rows_are_odd_is_read_all_the_same(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"odd": 1}, GOOD)
    _, report = collect(str(path), byte_tokenizer(), settings())
    assert report.counts == {"missing column": 1} and report.kept == 1


# ------------------------------------------------------------------------------------------------ ShareGPT


def test_turns_of_sharegpt_are_read_in_every_column(tmp_path):
    def turns(*messages):
        names = {"user": "human", "assistant": "gpt"}
        return [{"from": names[message["role"]], "value": message["content"]} for message in messages]

    plain, _ = read(tmp_path, CHAT)
    rows = [
        {"chosen": turns(*HI, *YO), "rejected": turns(*HI, *NO)},
        {"prompt": turns(*HI), "chosen": turns(*YO), "rejected": turns(*NO)[0]},
        {"prompt": "Hi?", "chosen": turns(*HI, *YO), "rejected": HI + NO},
    ]
    for row in rows:
        assert read(tmp_path, row)[0].tokens.tolist() == plain.tokens.tolist()
    mixed = [{"role": None, "from": "user", "value": "Hi?"}, assistant("Yo")]
    encoded, _ = read(tmp_path, {"messages": mixed})
    assert byte_tokenizer().decode(encoded.prompt(0)).count("Hi?") == 1
    named = [{**message, "from": "the web"} for message in HI + YO]  # a role goes before it
    assert read(tmp_path, {"messages": named})[0].num_pairs == 1
    assert "unknown role" in refused(tmp_path, {"chosen": [{"from": "bing", "value": "x"}], "rejected": [user("y")]})
