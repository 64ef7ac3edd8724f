"""Conversations as their template writes them: which control tokens are tokens, what is left out, whose words count."""

import re

import numpy as np
import pytest

from dpo_jax.data.batches import Batches
from dpo_jax.data.encode import encode
from dpo_jax.data.templates import codec
from dpo_jax.errors import UserError
from dpo_jax.evaluation.winrate import prompt_codec, prompt_tokens
from tests.support.chat_templates import (
    CUTTING,
    ENDLESS,
    HEADERS,
    TAGS,
    TEXT_CALLS,
    THINKING,
    TOOL,
    call,
    result,
    tokenizer_with,
)
from tests.support.encoding import encoded_rows, settings
from tests.support.tiny_rows import CHAT, CHATML, HI, NO, SPECIAL, YO, assistant, byte_tokenizer, user, write


def texts(encoded, tokenizer) -> list[str]:
    parts = [encoded.prompt(0), *map(encoded.completion, range(encoded.num_completions))]
    return [tokenizer.decode(part.tolist()) for part in parts]


def scored(encoded, tokenizer, completion: int = 0) -> str:
    return tokenizer.decode(encoded.completion(completion)[encoded.scored_of(completion)].tolist())


def whole(encoded, completion: int = 0) -> list[int]:
    return [*encoded.prompt(completion).tolist(), *encoded.completion(completion).tolist()]


def theirs(tokenizer, messages, **how) -> list[int]:
    return tokenizer.apply_chat_template(messages, return_dict=False, **how)


# ------------------------------------------------------------------------------------------------ turn marks


@pytest.mark.parametrize(
    ("template", "marks", "words", "ends", "header"),
    [
        (CHATML, {"<|im_start|>", "<|im_end|>"}, set(), {"<|im_end|>"}, "<|im_end|>\n<|im_start|>assistant"),
        (
            THINKING,
            {"<|im_start|>", "<|im_end|>"},
            set(TAGS),
            {"<|im_end|>"},
            "<|im_end|>\n<|im_start|>assistant",
        ),
        (CUTTING, {*HEADERS, "<bos>", "<eos>"}, {"<think>", "</think>"}, {"<eos>"}, "<|assistant|>"),
        (ENDLESS, {"<eos>", "<bos>"}, set(), set(), "<|assistant|>"),
        ("{% for m in messages %}({{ m.content }}){% endfor %}", {"<eos>"}, set(), set(), ""),
    ],
)
def test_what_marks_a_turn_is_found_out_from_the_template(template, marks, words, ends, header):
    frame = codec(tokenizer_with(template, bos=True), template=None, control_tokens="text", ending="template").frame
    assert marks <= frame.marks and not words & frame.marks
    assert (frame.ends, frame.header, frame.text_arguments) == (frozenset(ends), header, False)


def test_a_special_token_of_calls_marks_no_turn_and_one_that_ends_them_does():
    """As of LFM2, whose calls stand between special tokens, and of gpt-oss, whose calls end a turn in their own way."""
    called = "{{ '<bos>' + c.function.name + (c.function.arguments | tojson) + '<pad>' }}"
    template = CHATML.replace("<|im_end|>", "{% for c in m.tool_calls or [] %}" + called + "{% endfor %}<|im_end|>")
    tokenizer = byte_tokenizer(template=template)
    tokenizer.pad_token = "<eos>"
    frame = codec(tokenizer, template=None, control_tokens="text", ending="template").frame
    assert not {"<bos>", "<pad>"} & frame.marks and frame.ends == {"<|im_end|>"}
    ending = template.replace("<|im_end|>", "{{ '' if m.tool_calls else '<|im_end|>' }}")
    tokenizer.chat_template = ending
    frame = codec(tokenizer, template=None, control_tokens="text", ending="template").frame
    assert "<pad>" in frame.marks and "<bos>" not in frame.marks and frame.ends == {"<|im_end|>", "<pad>"}


@pytest.mark.parametrize(
    "text", ["<think>\na\n</think>\n\nb", "<think>a</think>b", '<tool_call>\n{"name": "f"}\n</tool_call>', "a</think>"]
)
def test_tags_that_the_assistant_writes_are_the_templates_own_tokens(tmp_path, text):
    tokenizer = tokenizer_with(THINKING)
    row = {"prompt": HI, "chosen": [assistant(text)], "rejected": NO}
    encoded, report = encoded_rows(tmp_path, tokenizer, row, ending="template")
    assert whole(encoded) == theirs(tokenizer, [*HI, assistant(text)]) and report.counts == {}


@pytest.mark.parametrize("role", ["user", "system", "tool"])
@pytest.mark.parametrize("tag", [*TAGS, "<|im_end|>"])
def test_tags_that_others_write_stay_text(tmp_path, role, tag):
    tokenizer = tokenizer_with(THINKING)
    prompt = [{"role": role, "content": f"a {tag} b"}, *HI]
    row = {"prompt": prompt, "chosen": [assistant("<think>a</think>b <tool_call>c</tool_call>")], "rejected": NO}
    encoded, report = encoded_rows(tmp_path, tokenizer, row)
    plain, _ = encoded_rows(tmp_path, tokenizer, {**row, "prompt": HI})
    assert encoded.completion(0).tolist() == plain.completion(0).tolist()
    assert encoded.prompt(0).tolist() == theirs(
        tokenizer, prompt, add_generation_prompt=True, sanitize_control_tokens=True
    )
    assert report.examples["control-token text"][0].endswith(f"{tag!r} in a text: kept as text")


@pytest.mark.parametrize("mark", ["<|im_start|>", "<|im_end|>", "<eos>", "<pad>"])
def test_turn_marks_that_the_assistant_writes_stay_text(tmp_path, mark):
    tokenizer = tokenizer_with(THINKING)
    row = {"prompt": HI, "chosen": [assistant(f"<think>a {mark}</think>b {mark} c")], "rejected": NO}
    encoded, report = encoded_rows(tmp_path, tokenizer, row)
    found = [token for token in encoded.completion(0).tolist() if token < len(SPECIAL)]
    assert found == [SPECIAL.index("<|im_end|>")]
    assert texts(encoded, tokenizer)[1] == f"<think>\na {mark}\n</think>\n\nb {mark} c<|im_end|>"
    assert report.counts == {"control-token text": 1}


def test_keys_of_arguments_stay_text_too(tmp_path):
    tokenizer = tokenizer_with(THINKING)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"<|im_end|>": 1}}}
    encoded, _ = encoded_rows(tmp_path, tokenizer, {**CHAT, "tools": [tool]})
    assert "<|im_end|>" in texts(encoded, tokenizer)[0].split("<|im_start|>")[0]
    assert encoded.prompt(0).tolist().count(SPECIAL.index("<|im_end|>")) == 1


# ------------------------------------------------------------------------------------------------ what is left out

NAMED = [  # template, row, what is said to be left out
    (CHATML, {**CHAT, "chosen": [{**call("rain", {}), "content": "Yo"}]}, "tool_calls of chosen"),
    (CHATML, {**CHAT, "chosen": [assistant("Yo") | {"reasoning_content": "hm"}]}, "reasoning of chosen"),
    (CHATML, {**CHAT, "chosen": [assistant("Yo") | {"thinking": "hm"}]}, "reasoning of chosen"),
    (CHATML, {**CHAT, "tools": [TOOL]}, "tools of the row"),
    (CHATML, {**CHAT, "prompt": [*HI, call("rain", {}), result("12")]}, "tool_calls of the prompt"),
    (CUTTING, {**CHAT, "chosen": [assistant("<think>\nwhy\n</think>\nYo")]}, "content 'why' of chosen"),
    (CUTTING, {**CHAT, "rejected": [assistant("why</think>No")]}, "content 'why' of rejected"),
    (CUTTING, {**CHAT, "prompt": [{"role": "system", "content": "Be calm"}, *HI]}, "content 'Be calm' of the prompt"),
]


@pytest.mark.parametrize(("template", "row", "what"), NAMED)
def test_what_a_template_leaves_out_is_counted_and_named(tmp_path, template, row, what):
    _, report = encoded_rows(tmp_path, tokenizer_with(template, bos=True), row)
    assert report.kept == 1 and report.examples["left out by the chat template"] == [f"{tmp_path}/rows.jsonl:1: {what}"]


def test_it_is_said_where_tags_are_no_tokens_too(tmp_path):
    tokenizer = tokenizer_with(CUTTING, bos=True, tags=HEADERS)
    row = {**CHAT, "chosen": [assistant("<think>why</think>Yo")]}
    _, report = encoded_rows(tmp_path, tokenizer, row)
    assert report.examples["left out by the chat template"][0].endswith("content 'why' of chosen")


@pytest.mark.parametrize("text", [" Yo ", "a\n\n\nb", "<think>\n\n</think>\n\nYo", "<think>a\n\nb</think>c", "Hi?"])
def test_nothing_is_said_where_all_is_written(tmp_path, text):
    row = {"prompt": HI, "chosen": [assistant(text), call("rain", {"city": "Bern"})], "rejected": NO, "tools": [TOOL]}
    row["chosen"] = [{**row["chosen"][1], "content": text}]
    _, report = encoded_rows(tmp_path, tokenizer_with(THINKING), row)
    assert report.counts == {}


@pytest.mark.parametrize("template", [CHATML, CUTTING])
def test_an_answer_of_which_nothing_is_written_is_a_bad_row(tmp_path, template):
    """A call alone, under a template that writes no calls, was trained as an answer that ends at once."""
    rows = [{**CHAT, "chosen": [call("rain", {"city": "Bern"})]}, CHAT]
    path = write(tmp_path / "rows.jsonl", *rows)
    words = r"1 empty completion \(first: .*rows.jsonl:1: the chat template writes nothing of chosen \(its tool_calls\)"
    with pytest.raises(UserError, match=words):
        encode(str(path), tokenizer_with(template, bos=True), settings())
    encoded, report = encode(str(path), tokenizer_with(template, bos=True), settings(max_bad_fraction=0.5))
    assert (report.bad, report.kept, encoded.line.tolist()) == (1, 1, [2])


def test_arguments_are_objects_or_text_as_the_template_takes_them(tmp_path):
    for stored in ({"city": "Bern"}, '{"city": "Bern"}'):
        row = {**CHAT, "chosen": [call("rain", stored)]}
        encoded, report = encoded_rows(tmp_path, tokenizer_with(TEXT_CALLS), row)
        assert texts(encoded, tokenizer_with(TEXT_CALLS))[1] == 'rain {"city": "Bern"}<|im_end|>'
        encoded, _ = encoded_rows(tmp_path, tokenizer_with(THINKING), row)
        assert '"arguments": {"city": "Bern"}}' in texts(encoded, tokenizer_with(THINKING))[1]
        assert report.counts == {}


# ------------------------------------------------------------------------------------------------ whose words

LOOP = [call("rain", {"day": 3}, "let me see"), result("12 mm"), assistant("twelve")]
"""An answer with a tool's result in it."""


def test_what_a_tool_answers_is_read_and_not_scored(tmp_path):
    tokenizer = tokenizer_with(THINKING)
    encoded, report = encoded_rows(tmp_path, tokenizer, {"prompt": HI, "chosen": LOOP, "rejected": NO})
    called = 'let me see<tool_call>\n{"name": "rain", "arguments": {"day": 3}}\n</tool_call><|im_end|>'
    others = "\n<|im_start|>user\n<tool_response>\n12 mm\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    last = "<think>\n\n</think>\n\ntwelve<|im_end|>"
    assert texts(encoded, tokenizer)[1] == called + others + last
    assert scored(encoded, tokenizer) == called + last
    assert encoded.scored_of(1).all() and encoded.num_scored == encoded.scored_length.sum() < len(encoded.tokens)
    assert report.counts == {"completion of several turns": 1, "not scored: others' words": 1}


def test_all_of_an_answer_is_scored_if_it_is_wanted(tmp_path):
    tokenizer = tokenizer_with(THINKING)
    row = {"prompt": HI, "chosen": LOOP, "rejected": NO}
    encoded, report = encoded_rows(tmp_path, tokenizer, row, score_tool_results=True)
    assert not len(encoded.unscored_start) and report.counts == {"completion of several turns": 1}


@pytest.mark.parametrize(
    ("template", "answer", "words"),
    [
        (CHATML, [*YO, user("And?"), assistant("so")], "Yo<|im_end|>so<|im_end|>"),
        (CHATML, [*YO, assistant("so")], "Yo<|im_end|>so<|im_end|>"),
        (CHATML, [call("rain", {}), assistant("so")], "so<|im_end|>"),
        (CUTTING, [*YO, result("12 mm"), assistant("so")], "Yo<eos>so<eos>"),
        (ENDLESS, [*YO, user("And?"), *NO, result("3"), assistant("so")], "YoNoso<eos>"),
        ("{% for m in messages %}({{ m.content }}){% endfor %}", [*YO, user("And?"), assistant("so")], "(Yo(so)<eos>"),
    ],
)
def test_only_the_assistants_turns_are_scored_with_their_ends(tmp_path, template, answer, words):
    tokenizer = tokenizer_with(template, bos=True)
    encoded, _ = encoded_rows(tmp_path, tokenizer, {"prompt": HI, "chosen": answer, "rejected": NO})
    assert scored(encoded, tokenizer) == words


def test_results_with_which_all_answers_begin_belong_to_the_prompt(tmp_path):
    tokenizer = tokenizer_with(THINKING)
    asked = [*HI, call("rain", {}), result("12 mm")]
    apart = {"prompt": asked, "chosen": YO, "rejected": NO}
    together = {"prompt": asked[:-1], "chosen": [asked[-1], *YO], "rejected": [asked[-1], *NO]}
    first, second = (encoded_rows(tmp_path, tokenizer, row)[0] for row in (apart, together))
    assert first.tokens.tolist() == second.tokens.tolist() and not len(second.unscored_start)


def test_a_row_that_truncation_leaves_no_word_of_the_assistants_is_too_long(tmp_path):
    """Each answer begins with another result; only what the tool says fits. The prompt's own call is never scored."""
    tokenizer = tokenizer_with(THINKING)
    asked = [*HI, call("rain", {})]
    row = {"prompt": asked, "chosen": [result("x" * 99), *YO], "rejected": [result("y"), *NO]}
    encoded, report = encoded_rows(tmp_path, tokenizer, row)
    assert texts(encoded, tokenizer)[0].endswith('"arguments": {}}\n</tool_call><|im_end|>\n')
    assert scored(encoded, tokenizer) == "<think>\n\n</think>\n\nYo<|im_end|>"
    _, report = encoded_rows(tmp_path, tokenizer, row, max_length=90)
    assert (report.too_long, report.counts.get("nothing scored after truncation")) == (1, 1)


def test_a_batch_reads_all_tokens_and_predicts_those_that_are_scored(tmp_path):
    tokenizer = tokenizer_with(THINKING)
    encoded, _ = encoded_rows(tmp_path, tokenizer, {"prompt": HI, "chosen": LOOP, "rejected": NO})
    reference = -np.arange(encoded.num_scored, dtype=np.float32)
    batch = Batches(encoded, 1, 1, 1, order="file", reference=reference).at(0)
    real = batch.completion < batch.ids.shape[-1]
    slots = batch.tokens[0, 0].reshape(-1)
    assert (slots[batch.position[0, 0].reshape(-1) >= 0] != 0).sum() >= len(encoded.tokens) - 1
    for completion in range(2):
        local = batch.ids[0, 0].tolist().index(completion)
        mine = real[0, 0] & (batch.completion[0, 0] == local)
        own = encoded.completion(completion)[encoded.scored_of(completion)]
        assert batch.target[0, 0][mine].tolist() == own.tolist()
        text = [*encoded.prompt(completion), *encoded.completion(completion)]
        places = len(encoded.prompt(completion)) + np.flatnonzero(encoded.scored_of(completion)) - 1
        assert slots[batch.source[0, 0][mine]].tolist() == [text[place] for place in places]
        assert batch.lengths[0, 0][local] == len(own) == encoded.scored_length[completion]
        first = encoded.scored_start[completion]
        assert batch.reference[0, 0][mine].tolist() == reference[first : first + len(own)].tolist()


# ------------------------------------------------------------------------------------------------ prefilled answers


@pytest.mark.parametrize(
    ("begun", "said"), [("Sure, it is", " Bern."), ("", "Bern"), ("<think>\nhm", " so\n</think>\n\nBern"), ("a: ", "b")]
)
@pytest.mark.parametrize("template", [CHATML, THINKING])
def test_an_answer_goes_on_with_the_turn_that_the_prompt_began(tmp_path, template, begun, said):
    tokenizer = tokenizer_with(template)
    prompt = [*HI, assistant(begun)]
    row = {"prompt": prompt, "chosen": [assistant(said)], "rejected": [assistant(said + "!")]}
    encoded, report = encoded_rows(tmp_path, tokenizer, row, ending="template")
    assert whole(encoded) == theirs(tokenizer, [*HI, assistant(begun + said)])
    before, answer, _ = texts(encoded, tokenizer)
    assert before.endswith(begun) and answer == f"{said}<|im_end|>\n" and report.counts == {}
    asked = prompt_tokens(prompt, prompt_codec(tokenizer))
    assert "</think>" in said or asked == encoded.prompt(0).tolist()


def test_a_turn_that_cannot_go_on_alike_in_all_answers_is_a_bad_row(tmp_path):
    """The template would write the thoughts that were begun as thoughts before one answer only."""
    row = {"prompt": [*HI, assistant("<think>hm")], "chosen": [assistant(" so</think>Yo")], "rejected": NO}
    _, report = encoded_rows(tmp_path, tokenizer_with(THINKING), row)
    assert report.counts == {"template error": 1} and report.bad == 1
    row = {"prompt": [*HI, *YO], "chosen": [assistant("a") | {"reasoning_content": "hm"}], "rejected": NO}
    _, report = encoded_rows(tmp_path, tokenizer_with(THINKING), row)
    assert report.counts == {"wrong type": 1}


# ------------------------------------------------------------------------------------------------ rendered texts


def rendered(tokenizer, prompt=HI, answers=(YO, NO), asking=True) -> dict:
    texts = [tokenizer.apply_chat_template([*prompt, *answer], tokenize=False) for answer in answers]
    asked = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=asking)
    return {"prompt": asked, "chosen": texts[0][len(asked) :], "rejected": texts[1][len(asked) :]}


BEGUN = "{{ bos_token }}" + CHATML


ENDED = CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
"""Phi-3.5's way: a turn has an end, and the conversation another one."""


@pytest.mark.parametrize("template", [CHATML, BEGUN, ENDED])
@pytest.mark.parametrize("end", ["", "<|im_end|>", "<|im_end|>\n", "<|im_end|>\n<eos>", "<|im_end|>\n<|im_end|>\n"])
@pytest.mark.parametrize("begin", ["", "<bos>", "<bos><bos>"])
def test_rendered_text_has_one_beginning_and_one_end(tmp_path, template, begin, end):
    """As messages would have given it, whatever the one who rendered it put there twice."""
    tokenizer = byte_tokenizer(bos=True, template=template)
    row = rendered(tokenizer)
    row["prompt"] = begin + row["prompt"].removeprefix("<bos>")
    row |= {"chosen": f"Yo{end}", "rejected": f"No{end}"}
    encoded, report = encoded_rows(tmp_path, tokenizer, row, control_tokens="tokens")
    plain, _ = encoded_rows(tmp_path, tokenizer, CHAT)
    assert encoded.tokens.tolist() == plain.tokens.tolist() and report.counts == {"rendered text": 1}


def test_a_file_of_rendered_text_is_refused_unless_its_marks_are_tokens(tmp_path):
    tokenizer = byte_tokenizer()
    row = rendered(tokenizer)
    path = write(
        tmp_path / "rows.jsonl", row, {**row, "chosen": "so<|im_end|>"}, {"prompt": "p", "chosen": "a", "rejected": "b"}
    )
    with pytest.raises(UserError, match=r"rows.jsonl: 2 of 3 rows hold texts .*set data.control_tokens=tokens"):
        encode(str(path), tokenizer, settings())
    few = write(tmp_path / "few.jsonl", row, CHAT, {**CHAT, "prompt": [user("And?")]})
    _, report = encode(str(few), tokenizer, settings())
    assert report.counts == {"rendered text, kept as text": 1}
    with pytest.raises(UserError, match=r"rows.jsonl: 2 of 3 rows hold texts"):  # also beside a larger file
        encode([str(few), str(few), str(path)], tokenizer, settings())


def test_messages_that_end_as_rendered_text_does_are_recognised(tmp_path):
    tokenizer = byte_tokenizer()
    row = {"prompt": HI, "chosen": [assistant("Yo<|im_end|>\n")], "rejected": [assistant("No<|im_end|>\n")]}
    _, report = encoded_rows(tmp_path, tokenizer, row)
    with pytest.raises(UserError, match=re.escape("set data.control_tokens=tokens")):
        report.check(1.0)
    encoded, report = encoded_rows(tmp_path, tokenizer, row, control_tokens="tokens")
    assert texts(encoded, tokenizer)[1:] == ["Yo<|im_end|>", "No<|im_end|>"] and "rendered text" in report.counts


def test_a_rendered_answer_of_its_end_alone_is_a_bad_row(tmp_path):
    tokenizer = byte_tokenizer()
    row = {**rendered(tokenizer), "chosen": "<|im_end|>\n"}
    _, report = encoded_rows(tmp_path, tokenizer, row, control_tokens="tokens")
    assert report.counts == {"empty completion": 1}
