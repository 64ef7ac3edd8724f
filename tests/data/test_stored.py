"""Rows as files store them: conversations and calls as JSON text, and objects that were filled up with nulls."""

import json
import re

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from dpo_jax.data.encode import collect
from dpo_jax.errors import UserError
from dpo_jax.evaluation.winrate import prompt_codec, prompt_tokens, read_prompts
from tests.support.chat_templates import THINKING, TOOL, call, result, tokenizer_with
from tests.support.encoding import assert_equal, encoded_rows, settings
from tests.support.tiny_rows import (
    CHAT,
    COMPLETION,
    GOOD,
    HI,
    MESSAGES,
    NO,
    OPENAI,
    RANKED,
    SHAREGPT,
    UNPAIRED,
    YO,
    assistant,
    byte_tokenizer,
    user,
    write,
)


def tool(name: str, **properties) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}


CALLS = [
    {
        "prompt": [user("Rain?")],
        "chosen": [call("rain", {"city": "Bern"})],
        "rejected": NO,
        "tools": [tool("rain", city={"type": "string"})],
    },
    {
        "prompt": [user("Price?"), call("price", {"day": 3}), result("5")],
        "chosen": [call("price", {"ticker": "A", "day": 4})],
        "rejected": [call("none", {"times": 1})],
        "tools": [tool("price", ticker={"type": "string"}, day={"type": "integer", "minimum": 0}), tool("none")],
    },
]
"""Rows with calls that share no argument, so that Parquet fills each up with the arguments of the other."""


def through(kind: str, tmp_path, rows) -> str:
    table = pyarrow.Table.from_pylist(rows)
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        parquet.write_table(table, path)
    elif kind == "arrow":
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    else:
        datasets.Dataset(table).save_to_disk(str(path))
    return str(path)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved"])
def test_calls_and_tools_give_the_same_ids_from_arrow_as_from_json(tmp_path, kind):
    tokenizer = tokenizer_with(THINKING)
    plain, _ = encoded_rows(tmp_path, tokenizer, *CALLS)
    found, report = collect(through(kind, tmp_path, CALLS), tokenizer, settings())
    assert found.tokens.tolist() == plain.tokens.tolist()
    assert found.unscored_end.tolist() == plain.unscored_end.tolist()
    assert found.unscored_start.tolist() == plain.unscored_start.tolist()
    assert report.counts["null left out"] == 2
    assert "null" not in tokenizer.decode(found.tokens.tolist())
    assert '"arguments": {"city": "Bern"}}' in tokenizer.decode(found.tokens.tolist())


def test_nulls_in_json_text_were_written_by_somebody_and_stay(tmp_path):
    tokenizer = tokenizer_with(THINKING)
    row = {**CHAT, "chosen": [call("rain", '{"city": null}')], "tools": json.dumps([{"function": {"default": None}}])}
    encoded, report = encoded_rows(tmp_path, tokenizer, row)
    text = tokenizer.decode(encoded.tokens.tolist())
    assert '"arguments": {"city": null}' in text and '{"default": null}' in text and report.counts == {}


STORED = [  # a row, and the columns that are JSON text in another one that means the same
    (CHAT, ["prompt"]),
    (CHAT, ["chosen", "rejected"]),
    (CHAT, ["prompt", "chosen", "rejected"]),
    ({"chosen": HI + YO, "rejected": HI + NO}, ["chosen", "rejected"]),
    (OPENAI, ["input", "preferred_output", "non_preferred_output"]),
    (SHAREGPT, ["conversations", "chosen", "rejected"]),
    ({**RANKED, "prompt": HI, "completions": [YO, NO]}, ["prompt", "completions"]),
    ({**UNPAIRED, "prompt": HI, "completion": YO}, ["prompt", "completion"]),
    ({**COMPLETION, "prompt": HI, "completion": YO}, ["completion"]),
    (MESSAGES, ["messages"]),
    ({**CHAT, "tools": [TOOL]}, ["tools"]),
    ({**CHAT, "chosen": {"role": "assistant", "content": "Yo"}}, ["chosen"]),
]


def as_text(row: dict, columns: list[str]) -> dict:
    """The row with columns as JSON text; of a list of answers, each of them."""
    texts = {name: json.dumps(row[name]) for name in columns}
    if "completions" in texts:
        texts["completions"] = [json.dumps(answer) for answer in row["completions"]]
    return {**row, **texts}


@pytest.mark.parametrize(("row", "columns"), STORED)
def test_conversations_as_json_text_are_conversations(tmp_path, row, columns):
    tokenizer = tokenizer_with(THINKING)
    plain, report = encoded_rows(tmp_path, tokenizer, row)
    found, other = encoded_rows(tmp_path, tokenizer, as_text(row, columns))
    said = other.counts.pop("conversation as JSON text", 0)
    other.examples.pop("conversation as JSON text", None)
    assert said == (columns not in (["tools"],)) and report.bad == 0
    assert_equal((plain, report), (found, other))


def test_messages_with_the_content_first_are_read_too(tmp_path):
    turns = [{"content": turn["content"], "role": turn["role"]} for turn in HI]
    encoded, report = encoded_rows(tmp_path, byte_tokenizer(), {**CHAT, "prompt": f" {json.dumps(turns)}\n"})
    plain, _ = encoded_rows(tmp_path, byte_tokenizer(), CHAT)
    assert encoded.tokens.tolist() == plain.tokens.tolist() and "conversation as JSON text" in report.counts


@pytest.mark.parametrize(
    "text",
    ["[1, 2]", '{"content": "x"}', '[{"name": "x"}]', "[{", '{"role', "role: user", '[{"content": "x"}', "[]"]
    + ['[{"role": "admin"}, {"name": "x"}]', '[{"role": "admin"}, 5]'],
)
def test_other_text_that_looks_like_json_stays_text(tmp_path, text):
    encoded, report = encoded_rows(tmp_path, byte_tokenizer(), {**GOOD, "chosen": text})
    assert byte_tokenizer().decode(encoded.completion(0).tolist()) == f"{text}<eos>" and report.counts == {}


BAD = [
    ({**CHAT, "prompt": json.dumps(HI)[:-1]}, "prompt is text that is not JSON: .*, though it begins like a convers"),
    ({**CHAT, "prompt": str(HI)}, "prompt is text that is not JSON"),
    ({**GOOD, "chosen": '[{"role": "assistant", "content": "x}'}, "chosen is text that is not JSON"),
    (
        {**CHAT, "chosen": [assistant("a") | {"tool_calls": "f()"}]},
        r"tool_calls of chosen\[0\] is text that is not JSON",
    ),
    ({**CHAT, "chosen": [assistant("a") | {"tool_calls": 5}]}, r"tool_calls of chosen\[0\] is a number, not a list"),
    (
        {**CHAT, "chosen": [assistant("a") | {"tool_calls": ["f"]}]},
        r"tool_calls of chosen\[0\]\[0\] is text that is not",
    ),
    ({**CHAT, "chosen": [assistant("a") | {"tool_calls": [{"function": {}}]}]}, "is no call of a function"),
    (
        {**CHAT, "chosen": [call("rain", '{"city": "Bern"')]},
        r"arguments of tool_calls of chosen\[0\]\[0\] is text that",
    ),
    ({**CHAT, "chosen": [call("rain", '["Bern"]')]}, "is a list, not an object"),
    ({**CHAT, "chosen": [call("rain", 5)]}, "is a number, not an object"),
    ({**CHAT, "tools": ["{"]}, r"tools\[0\] is text that is not JSON"),
]


@pytest.mark.parametrize(("row", "words"), BAD)
@pytest.mark.filterwarnings("error")
def test_what_cannot_be_parsed_is_a_bad_row(tmp_path, row, words):
    _, report = encoded_rows(tmp_path, tokenizer_with(THINKING), CHAT, row)
    assert (report.bad, report.kept, report.counts) == (1, 1, {"wrong type": 1})
    (example,) = report.examples["wrong type"]
    assert example.startswith(f"{tmp_path}/rows.jsonl:2: ")
    assert re.search(words, example)


@pytest.mark.parametrize("stored", ['{"city": "Bern"}', ' {"city":"Bern"} ', {"city": "Bern"}])
def test_arguments_as_json_text_are_written_as_the_object(tmp_path, stored):
    tokenizer = tokenizer_with(THINKING)
    calls = call("rain", stored)["tool_calls"]
    for given in (calls, json.dumps(calls), [json.dumps(calls[0])], calls[0]):
        row = {**CHAT, "chosen": [{"role": "assistant", "content": "", "tool_calls": given}]}
        encoded, report = encoded_rows(tmp_path, tokenizer, row)
        plain, _ = encoded_rows(tmp_path, tokenizer, {**CHAT, "chosen": [call("rain", {"city": "Bern"})]})
        assert encoded.tokens.tolist() == plain.tokens.tolist() and report.counts == {}


def test_no_arguments_are_an_empty_object(tmp_path):
    for stored in ("", None, {}, "{}"):
        encoded, _ = encoded_rows(tmp_path, tokenizer_with(THINKING), {**CHAT, "chosen": [call("rain", stored)]})
        assert '"arguments": {}}' in tokenizer_with(THINKING).decode(encoded.completion(0).tolist())


def test_questions_may_be_json_text_too(tmp_path):
    path = write(tmp_path / "asked.jsonl", {"prompt": json.dumps(HI)}, {"prompt": "Hi?"})
    assert [asked.prompt for asked in read_prompts(str(path))] == [HI, "Hi?"]
    with pytest.raises(UserError, match=r"asked.jsonl:1: wrong type: prompt is text that is not JSON"):
        read_prompts(str(write(path, {"prompt": json.dumps(HI)[:-1]})))


def test_a_prompt_that_is_asked_is_read_as_one_that_is_trained_on(tmp_path):
    tokenizer = tokenizer_with(THINKING)
    prompt = [*HI, call("rain", '{"city": "Bern"}'), result("12")]
    encoded, _ = encoded_rows(tmp_path, tokenizer, {**CHAT, "prompt": prompt})
    assert prompt_tokens(prompt, prompt_codec(tokenizer)) == encoded.prompt(0).tolist()
