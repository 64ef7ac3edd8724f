"""What keep_completion takes of a prompt (BOS and system stay, whole turns go first), and texts of megabytes."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_jax.data.report import TOO_LONG
from dpo_jax.data.truncation import _part, keep_completion
from tests.support.encoding import encoded_rows
from tests.support.tiny_rows import CHATML, NO, YO, assistant, byte_tokenizer, user

SYSTEM = {"role": "system", "content": "Be kind."}
TURNS = [user("First?"), assistant("One."), user("Second?"), assistant("Two."), user("Third question?")]
# The system's words stand inside the first question, as Gemma's template has them.
INSIDE = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content + ' ' %}{% set m = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set m = messages %}{% endif %}<bos>{% for t in m %}<|im_start|>{{ t.role }}\n"
    "{{ s if loop.first else '' }}{{ t.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"outside": "<bos>" + CHATML, "inside": INSIDE}


def asked(tokenizer, chat) -> list[int]:
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("turns", [[SYSTEM, *TURNS], TURNS, [SYSTEM, assistant("Hello."), *TURNS]])
def test_whole_turns_go_first_and_the_oldest_of_them(tmp_path, template, turns):
    tokenizer = byte_tokenizer(template=TEMPLATES[template])
    head, rest = (turns[:1], turns[1:]) if turns[0] is SYSTEM else ([], turns)
    starts = [at for at, turn in enumerate(rest) if at == 0 or turn["role"] == "user"]
    row = {"prompt": turns, "chosen": YO, "rejected": NO}
    for number, start in enumerate(starts):
        prompt = asked(tokenizer, head + rest[start:])
        for spare in (0, 3):
            encoded, report = encoded_rows(tmp_path, tokenizer, row, max_length=len(prompt) + 3 + spare)
            assert encoded.prompt(0).tolist() == prompt
            assert [tokenizer.decode(encoded.completion(index)) for index in (0, 1)] == ["Yo<|im_end|>", "No<|im_end|>"]
            assert report.counts.get("prompt truncated", 0) == (number > 0)
            if number:
                assert f", {start} whole messages among them" in report.examples["prompt truncated"][0]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("lost", [1, 5, 14])
def test_then_the_last_question_loses_its_beginning(tmp_path, template, lost):
    tokenizer = byte_tokenizer(template=TEMPLATES[template])
    row = {"prompt": [SYSTEM, *TURNS], "chosen": YO, "rejected": NO}
    prompt = asked(tokenizer, [SYSTEM, user("Third question?"[lost:])])
    encoded, report = encoded_rows(tmp_path, tokenizer, row, max_length=len(prompt) + 3)
    assert encoded.prompt(0).tolist() == prompt and encoded.truncated.all()
    whole = asked(tokenizer, [SYSTEM, *TURNS])
    gone, _ = encoded.cut(0)
    assert Counter(gone.tolist() + prompt) == Counter(whole)
    assert f"{len(gone)} of {len(whole)} tokens cut, 4 whole messages" in report.examples["prompt truncated"][0]


def test_the_answers_lose_their_tails_when_nothing_more_of_the_prompt_may_go(tmp_path):
    tokenizer = byte_tokenizer(template=TEMPLATES["outside"])
    row = {"prompt": [SYSTEM, user("Who?")], "chosen": [assistant("y" * 90)], "rejected": NO}
    least = asked(tokenizer, [SYSTEM, user("?")])
    encoded, report = encoded_rows(tmp_path, tokenizer, row, max_length=len(least) + 10)
    assert encoded.prompt(0).tolist() == encoded.prompt(1).tolist() == least
    assert tokenizer.decode(encoded.completion(0)) == "y" * 10 and report.counts["completion truncated"] == 1
    encoded, report = encoded_rows(tmp_path, tokenizer, row, max_length=len(least))
    assert (report.kept, report.bad, report.too_long) == (0, 0, 1) and report.counts == {"overlong prompt": 1}


def test_a_turn_of_several_messages_loses_the_oldest_first(tmp_path):
    tokenizer = byte_tokenizer(template=TEMPLATES["outside"])
    last = [user("Look it up"), assistant("looking"), {"role": "tool", "content": "found 12"}]
    cut = [user(""), assistant("king"), last[2]]
    prompt = asked(tokenizer, cut)
    row = {"prompt": [*TURNS, *last], "chosen": YO, "rejected": NO}
    encoded, _ = encoded_rows(tmp_path, tokenizer, row, max_length=len(prompt) + 3)
    assert encoded.prompt(0).tolist() == prompt


@pytest.mark.parametrize("rule", ["keep_start", "keep_end"])
def test_trls_rules_know_no_turns(tmp_path, rule):
    tokenizer = byte_tokenizer(template=TEMPLATES["outside"])
    row = {"prompt": [SYSTEM, *TURNS], "chosen": YO, "rejected": NO}
    whole = asked(tokenizer, row["prompt"])
    encoded, report = encoded_rows(tmp_path, tokenizer, row, truncation=rule, max_length=60)
    assert rule == "keep_start" or encoded.prompt(0).tolist() == whole[len(whole) - 60 + 4 :]
    assert rule == "keep_end" or report.counts == {"overlong prompt": 1}


@pytest.mark.parametrize("kind", ["text", "ids"])
def test_bos_stays_before_texts_and_ids(tmp_path, kind):
    tokenizer = byte_tokenizer(bos=True)
    row = {"prompt": "abcdefghij", "chosen": "yes", "rejected": "no"}
    if kind == "ids":
        row = {f"{name}_ids": tokenizer.encode(text)[name != "prompt" :] for name, text in row.items()}
    encoded, report = encoded_rows(tmp_path, tokenizer, row, max_length=9)
    size = len(encoded.completion(0))
    assert tokenizer.decode(encoded.prompt(0)) == "<bos>" + "abcdefghij"[10 - (9 - size - 1) :]
    gone, _ = encoded.cut(0)
    assert tokenizer.decode(gone) == "abcdefghij"[: 10 - (9 - size - 1)] and report.counts["prompt truncated"] == 1


@given(st.integers(1, 30), st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(2, 40), st.integers(0, 3))
def test_the_head_stays_where_there_is_room(prompt, completions, limit, head):
    head = min(head, prompt)
    cut = keep_completion(prompt, completions, limit, head)
    kept = prompt - cut.skip[0]
    assert kept >= (min(prompt, head + 1) if head + 1 < limit else 1) and kept + max(cut.length) <= limit
    assert min(cut.length) >= 1 and (kept == prompt or kept + max(cut.length) == limit)


# ------------------------------------------------------------------------------------------------ characters


@pytest.mark.parametrize("rule", ["keep_completion", "keep_start", "keep_end"])
@pytest.mark.parametrize("chat", [False, True])
def test_a_text_of_too_many_characters_is_too_long_and_not_bad(tmp_path, rule, chat):
    """What truncation keeps is the same as if all of it had been tokenised."""
    tokenizer = byte_tokenizer(template=TEMPLATES["outside"])
    long = "".join(map(str, range(2000)))
    shapes = [(long, "Yo", "No"), ("Hi?", long, "No"), (long, f"Yo{long}", long[::-1]), ("Hi?", "Yo", "No")]
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in shapes]
    if chat:
        rows = [
            {
                "prompt": [SYSTEM, *TURNS, user(row["prompt"])],
                "chosen": [assistant(row["chosen"])],
                "rejected": [assistant(row["rejected"])],
            }
            for row in rows
        ]
    changes = {"truncation": rule, "max_length": 300}
    short, report = encoded_rows(tmp_path, tokenizer, *rows, **changes, max_characters=900)
    whole, other = encoded_rows(tmp_path, tokenizer, *rows, **changes, max_characters=10**6)
    assert report.bad == other.bad == 0 and report.kept == other.kept and report.rows == 4
    assert short.line.tolist() == whole.line.tolist()
    for index in range(short.num_completions):
        assert short.prompt(index).tolist() == whole.prompt(index).tolist()
        assert short.completion(index).tolist() == whole.completion(index).tolist()
    assert "too many characters" not in other.counts
    assert report.counts["too many characters"] == (2 if rule == "keep_start" else 3)
    report.check(0.0)
    if rule != "keep_start":
        assert len(short.tokens) < len(whole.tokens) / 4


def test_an_overlong_prompt_of_trls_rule_never_stops_a_run(tmp_path):
    row = {"prompt": "p" * 9999, "chosen": "c", "rejected": "r"}
    _, report = encoded_rows(
        tmp_path, byte_tokenizer(), row, {**row, "prompt": "p"}, truncation="keep_start", max_length=9
    )
    assert report._of(TOO_LONG) == ["overlong prompt"] and report.too_long == 1
    report.check(0.0)


TALK = [SYSTEM, user("aaaa"), assistant("bbbb"), user("cccc"), assistant("dddd")]


@pytest.mark.parametrize(
    ("limit", "ends", "left"),
    [
        (16, True, TALK),
        (11, True, [SYSTEM, user("a"[:0]), assistant("bbb"), *TALK[3:]]),
        (13, True, [SYSTEM, user("a"), *TALK[2:]]),
        (8, True, [SYSTEM, *TALK[3:]]),
        (7, True, [SYSTEM, user("ccc"), TALK[4]]),
        (3, True, [SYSTEM, user(""), assistant("ddd")]),
        (14, False, [*TALK[:4], assistant("dd")]),
        (11, False, TALK[:3]),
        (6, False, [*TALK[:2], assistant("bb")]),
    ],
)
def test_messages_of_which_no_character_is_left_go(limit, ends, left):
    assert _part(TALK, limit, ends=ends) == left
