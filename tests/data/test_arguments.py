"""Arguments of a run for its chat template, and the one day that a template may write."""

import datetime

import pytest

from dpo_jax.data import arguments, encode
from dpo_jax.data.arguments import dated
from dpo_jax.data.encode import collect
from dpo_jax.errors import UserError
from tests.support.encoding import encoded_rows, settings
from tests.support.tiny_rows import CHAT, CHATML, GOOD, byte_tokenizer, user, write

DATED = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }} " + CHATML
MOODY = "{% if mood is defined %}[{{ mood }}]{% endif %}" + CHATML


def prompt(encoded, tokenizer, completion=0) -> str:
    return tokenizer.decode(encoded.prompt(completion))


def test_every_template_of_a_run_gets_its_arguments_and_a_rows_own_go_first(tmp_path):
    tokenizer = byte_tokenizer(template=MOODY)
    rows = [CHAT, {**CHAT, "chat_template_kwargs": {"mood": "wild"}}, {**CHAT, "prompt": [user("<|im_end|>")]}]
    encoded, report = encoded_rows(tmp_path, tokenizer, *rows, chat_template_kwargs={"mood": "calm"})
    assert [prompt(encoded, tokenizer, 2 * row)[:6] for row in range(3)] == ["[calm]", "[wild]", "[calm]"]
    assert report.arguments == {"mood": "calm"}
    assert "chat template arguments: mood='calm'; give the same wherever the model is asked" in report.lines()
    plain, report = encoded_rows(tmp_path, tokenizer, CHAT)
    assert prompt(plain, tokenizer).startswith("<|im_start|>") and report.arguments == {}


def test_an_argument_that_moves_the_end_of_a_turn_is_seen_there(tmp_path):
    tokenizer = byte_tokenizer(template=CHATML.replace("<|im_end|>\n", "{{ end }}"))
    encoded, report = encoded_rows(tmp_path, tokenizer, CHAT, chat_template_kwargs={"end": "<eos>\n"})
    assert tokenizer.decode(encoded.completion(0)) == "Yo<eos>" and report.counts == {}


@pytest.mark.parametrize(
    ("given", "template", "words"),
    [
        ({"moood": 1}, MOODY, "the chat template uses no 'moood'; did you mean mood?"),
        ({"enable_thinking": False}, MOODY, "the chat template uses no 'enable_thinking'; leave it out"),
        ({"messages": []}, MOODY, "'messages' is not for a run to set; leave it out"),
        ({"add_generation_prompt": False}, MOODY, "'add_generation_prompt' is not for a run to set"),
        ({"mood": 1}, None, "the tokenizer has no chat template; leave it out"),
    ],
)
def test_an_argument_that_nothing_would_read_is_refused(tmp_path, given, template, words):
    path = str(write(tmp_path / "rows.jsonl", GOOD))
    with pytest.raises(UserError) as caught:
        collect(path, byte_tokenizer(template=template), settings(chat_template_kwargs=given))
    assert str(caught.value).startswith("data.chat_template_kwargs: ") and words in str(caught.value)


# ------------------------------------------------------------------------------------------------ the day


def test_a_template_that_writes_the_day_writes_one_day(tmp_path, monkeypatch):
    tokenizer, path = byte_tokenizer(template=DATED), str(write(tmp_path / "rows.jsonl", CHAT))
    monkeypatch.setattr(arguments, "today", lambda: "2021-03-04")
    for date, shown in ((None, "04 Mar 2021 "), ("2020-02-29", "29 Feb 2020 ")):
        encoded, report = collect(path, tokenizer, settings(), tmp_path / "cache", date=date)
        assert prompt(encoded, tokenizer).startswith(shown) and report.date == (date or "2021-03-04")
        assert f"chat template date: where it writes the day, it writes {report.date}" in report.lines()
        assert report.cache.startswith("made")
    assert collect(path, tokenizer, settings(), tmp_path / "cache", date="2020-02-29")[1].cache.startswith("read from")
    encoded, _ = collect(path, tokenizer, settings(chat_template_kwargs={"date_string": "today"}))
    assert prompt(encoded, tokenizer).startswith("today ")


def test_a_template_without_a_day_has_none(tmp_path):
    path = str(write(tmp_path / "rows.jsonl", CHAT))
    assert collect(path, byte_tokenizer(), settings(), date="2020-02-29")[1].date == ""
    tokenizer = byte_tokenizer()
    assert dated(tokenizer, date="2020-02-29") == (tokenizer, None, "")


DAY = datetime.datetime(2020, 2, 9)


@pytest.mark.parametrize("form", ["%d %b %Y", "%B %-d, %Y", "%Y-%m-%dT%H:%M:%S", "%A %j %p", "100%", "day"])
def test_the_clock_stands_at_the_beginning_of_its_day(form):
    tokenizer = byte_tokenizer(template=f"{{{{ strftime_now('{form}') }}}}")
    pinned = dated(tokenizer, date="2020-02-09").tokenizer
    assert pinned.apply_chat_template([user("Hi?")], tokenize=False) == DAY.strftime(form)
    assert dated(tokenizer).date == datetime.date.today().isoformat()


@pytest.mark.parametrize(
    "start", ["", "\n", "\n\n", "  ", "  {% if true %}x{% endif %}\n", "{#- c -#} ", "{%- set a = 1 %}\ny"]
)
def test_nothing_but_the_day_changes_in_a_template(start):
    """Also where templates are several by name, and where macros and loops ask for it."""
    asks = "{% macro day() %}{{ strftime_now('%Y') }}{% endmacro %}{% for m in messages %}{{ day() }}{% endfor %}"
    one, several = byte_tokenizer(template=start + asks), byte_tokenizer(template=None)
    several.chat_template = {"default": start + asks, "tool_use": "t" + asks}
    chat, year = [user("Hi?")], str(datetime.date.today().year)
    expected = one.apply_chat_template(chat, tokenize=False)
    assert expected.endswith(year)
    for tokenizer in (one, several):
        pinned = dated(tokenizer, date="2020-02-29").tokenizer
        assert pinned.apply_chat_template(chat, tokenize=False) == expected.replace(year, "2020")
    assert pinned.apply_chat_template(chat, tools=[{"type": "function"}], tokenize=False) == "t2020"
    given = dated(several, start + asks, "2020-02-29")
    assert given.tokenizer is several and several.chat_template["tool_use"] == "t" + asks  # the folder's own stay
    shown = several.apply_chat_template(chat, chat_template=given.template, tokenize=False)
    assert shown == expected.replace(year, "2020")


def test_the_day_reaches_processes_of_their_own(tmp_path, monkeypatch):
    """Every row is tokenised by others than this process."""
    monkeypatch.setattr(encode, "ALONE", 0)
    rows = [{**CHAT, "prompt": [user(f"Hi {number}?")]} for number in range(600)]
    path = str(write(tmp_path / "rows.jsonl", *rows))
    tokenizer = byte_tokenizer(template=DATED)
    encoded, _ = collect(path, tokenizer, settings(workers=2), date="2020-02-29")
    assert prompt(encoded, tokenizer, encoded.num_completions - 1).startswith("29 Feb 2020 ")
