"""Rows as token ids: TRL's own tokens, one terminator, truncation, and the cache."""

import itertools
import json
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_jax.data.encode import collect, encode
from dpo_jax.data.encoded import Encoded
from dpo_jax.data.truncation import TRUNCATIONS
from dpo_jax.errors import UserError
from tests.support.encoding import encoded_rows, settings
from tests.support.tiny_rows import CHAT, CHATML, GOOD, HI, IDS, NO, SPECIAL, YO, assistant, byte_tokenizer, user, write

END = SPECIAL.index("<|im_end|>")
EOS = SPECIAL.index("<eos>")


def texts(encoded: Encoded, tokenizer, pair: int = 0) -> tuple[str, str, str]:
    chosen, rejected = int(encoded.chosen[pair]), int(encoded.rejected[pair])
    parts = (encoded.prompt(chosen), encoded.completion(chosen), encoded.completion(rejected))
    return tuple(tokenizer.decode(part.tolist()) for part in parts)


# ------------------------------------------------------------------------------------------------ TRL


@pytest.fixture(scope="module")
def trl(shared):
    from transformers import AutoTokenizer

    cases = json.loads((shared / "trl_parity" / "tokenization.json").read_text("utf-8"))
    return AutoTokenizer.from_pretrained(str(shared / "trl_parity" / "tok")), cases


# TRL's implicit prompt ends inside a word there (ours never does), and it trains an empty prompt.
OURS_DIFFER = ("standard_implicit_midword", "empty_prompt")


def test_trl_tokens_of_every_layout(trl, tmp_path):
    tokenizer, cases = trl
    compared = 0
    for name, case in cases.items():
        if "row" not in case or name in OURS_DIFFER:
            continue
        (tmp_path / name).mkdir()
        encoded, _ = encoded_rows(tmp_path / name, tokenizer, case["row"], truncation="keep_start")
        found = [encoded.prompt(0), encoded.completion(0), encoded.completion(1)]
        assert [ids.tolist() for ids in found] == [case[f"{part}_ids"] for part in ("prompt", "chosen", "rejected")], (
            name
        )
        compared += 1
    assert compared == 6


def test_one_terminator_where_trl_trains_the_newline_after_it(trl, tmp_path):
    tokenizer, cases = trl
    case = cases["conv_explicit"]
    encoded, _ = encoded_rows(tmp_path, tokenizer, case["row"])
    assert [*encoded.completion(0).tolist(), tokenizer.encode("\n")[0]] == case["chosen_ids"]


def test_the_templates_own_end_can_be_asked_for(tmp_path):
    """A reward model's score is read where the text ends that `apply_chat_template` writes."""
    tokenizer = byte_tokenizer()
    encoded, _ = encoded_rows(tmp_path, tokenizer, CHAT, ending="template")
    text = [*encoded.prompt(0).tolist(), *encoded.completion(0).tolist()]
    assert text == tokenizer.apply_chat_template(CHAT["prompt"] + CHAT["chosen"], return_dict=False)


@pytest.mark.parametrize(("rule", "length"), [("keep_start", 8), ("keep_end", 8), ("keep_start", 14)])
def test_trl_truncation_row_by_row(trl, shared, tmp_path, rule, length):
    tokenizer, cases = trl
    rows = golden_rows(shared)
    encoded, _ = encoded_rows(tmp_path, tokenizer, *rows, truncation=rule, max_length=length)
    golden = cases[f"collate_{rule}_{length}"]
    assert encoded.num_pairs == golden["n_rows_left"]
    for row, completion in enumerate([*encoded.chosen.tolist(), *encoded.rejected.tolist()]):
        prompt, answer = encoded.prompt(completion).tolist(), encoded.completion(completion).tolist()
        kept = sum(golden["attention_mask"][row])
        # TRL never scores a sequence's first token; we list it as what the rest is read after.
        scored = [bool(mask) and at > 0 for at, mask in enumerate(golden["completion_mask"][row][:kept])]
        assert prompt + answer == golden["input_ids"][row][:kept]
        assert [False] * len(prompt) + [True] * len(answer) == scored


def golden_rows(shared) -> list[dict]:
    """Rows of the script that wrote the golden numbers."""
    source = (shared / "trl_parity" / "make_golden.py").read_text("utf-8")
    listed = re.search(r"^rows = \[.*?\n(.*?)^\]", source, re.S | re.M)
    return [json.loads(line.strip().rstrip(",")) for line in listed[1].splitlines() if line.strip().startswith("{")]


# ------------------------------------------------------------------------------------------------ terminators


@pytest.mark.parametrize(
    ("template", "ending"),
    [
        (CHATML, "<|im_end|>"),
        (CHATML.replace("<|im_end|>\n", "<eos>"), "<eos>"),
        (CHATML.replace("<|im_end|>\n", "<|im_end|>\n<eos>"), "<|im_end|>"),
        (CHATML.replace("<|im_end|>\n", " <|im_end|>"), " <|im_end|>"),
        (CHATML.replace("<|im_end|>\n", "\n"), "\n<eos>"),
        (CHATML.replace("<|im_end|>\n", ""), "<eos>"),
    ],
)
@pytest.mark.parametrize("control_tokens", ["text", "tokens"])
def test_a_chat_ends_with_exactly_one_terminator(tmp_path, template, ending, control_tokens):
    tokenizer = byte_tokenizer(template=template)
    encoded, _ = encoded_rows(tmp_path, tokenizer, CHAT, control_tokens=control_tokens)
    assert texts(encoded, tokenizer)[1:] == (f"Yo{ending}", f"No{ending}")


def test_a_terminator_that_the_row_wrote_out_is_not_doubled(tmp_path):
    tokenizer = byte_tokenizer()
    row = {"prompt": HI, "chosen": [assistant("Yo<|im_end|>")], "rejected": NO}
    encoded, _ = encoded_rows(tmp_path, tokenizer, row, control_tokens="tokens")
    assert texts(encoded, tokenizer)[1] == "Yo<|im_end|>"


@pytest.mark.parametrize("truncation", ["keep_completion", "keep_start", "keep_end"])
@pytest.mark.parametrize("control_tokens", ["text", "tokens"])
@pytest.mark.parametrize("written", ["", "<eos>", "<eos><eos>"])
def test_a_text_ends_with_exactly_one_eos(tmp_path, written, control_tokens, truncation):
    row = {"prompt": "p", "chosen": f"a{written}", "rejected": "b"}
    changes = {"control_tokens": control_tokens, "truncation": truncation}
    encoded, _ = encoded_rows(tmp_path, byte_tokenizer(), row, **changes)
    assert encoded.completion(0).tolist()[1:] == [EOS] and encoded.completion(0).tolist().count(EOS) == 1


def test_a_text_has_one_bos_and_an_empty_prompt_is_bos(tmp_path):
    tokenizer = byte_tokenizer(bos=True)
    encoded, report = encoded_rows(tmp_path, tokenizer, GOOD, {**GOOD, "prompt": ""})
    assert [texts(encoded, tokenizer, pair)[0] for pair in range(2)] == ["<bos>Hi", "<bos>"]
    assert texts(encoded, tokenizer)[1] == "yes<eos>" and report.bad == 0


def test_given_ids_are_used_as_they_are(tmp_path):
    row = {"prompt_ids": [70, 1, 71], "chosen_ids": [72, END], "rejected_ids": [73]}
    encoded, report = encoded_rows(tmp_path, byte_tokenizer(bos=True), row)
    assert [encoded.prompt(0).tolist(), encoded.completion(0).tolist()] == [[70, 1, 71], [72, END]]
    assert encoded.completion(1).tolist() == [73] and report.counts == {"no end of turn": 1}


# ------------------------------------------------------------------------------------------------ templates


@pytest.mark.parametrize("token", SPECIAL)
def test_control_tokens_in_row_text_stay_text(tmp_path, token):
    tokenizer = byte_tokenizer()
    text = {"prompt": f"a{token}b", "chosen": f"{token}c", "rejected": "d"}
    chat = {"prompt": [user(f"a{token}b")], "chosen": [assistant(f"{token}c")], "rejected": [assistant("d")]}
    for row, controls in ((text, {EOS}), (chat, {END, SPECIAL.index("<|im_start|>")})):
        encoded, report = encoded_rows(tmp_path, tokenizer, row)
        plain, _ = encoded_rows(tmp_path, tokenizer, json.loads(json.dumps(row).replace(token, "zz")))
        found = [ids for ids in encoded.tokens.tolist() if ids < len(SPECIAL)]
        assert found == [ids for ids in plain.tokens.tolist() if ids < len(SPECIAL)] and set(found) <= controls
        assert texts(encoded, tokenizer)[1].startswith(f"{token}c") and report.counts == {"control-token text": 1}
        raw, _ = encoded_rows(tmp_path, tokenizer, row, control_tokens="tokens")
        assert SPECIAL.index(token) in raw.completion(0).tolist()[:1]


def test_control_tokens_in_tools_and_template_arguments_stay_text(tmp_path):
    tokenizer = byte_tokenizer(template="{{ tools[0].name }}{{ mood }}" + CHATML)
    row = {**CHAT, "tools": [{"name": "<|im_end|>"}], "chat_template_kwargs": {"mood": "<|im_start|>"}}
    encoded, _ = encoded_rows(tmp_path, tokenizer, row)
    assert texts(encoded, tokenizer)[0].startswith("<|im_end|><|im_start|><|im_start|>user")
    assert [ids for ids in encoded.prompt(0).tolist() if ids < 5] == [2, 3, 2]


def test_tools_and_template_arguments_reach_the_template(tmp_path):
    tokenizer = byte_tokenizer(template="{% for t in tools or [] %}[{{ t.name }}]{% endfor %}{{ mood }}" + CHATML)
    row = {**CHAT, "tools": [{"name": "f"}], "chat_template_kwargs": {"mood": "calm"}}
    encoded, _ = encoded_rows(tmp_path, tokenizer, row)
    assert texts(encoded, tokenizer)[0].startswith("[f]calm<|im_start|>user\nHi?")


def test_a_given_template_replaces_the_tokenizers_own(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}({{ m.content }}){% endfor %}", "utf-8")
    tokenizer = byte_tokenizer()
    encoded, report = encoded_rows(tmp_path, tokenizer, CHAT, template=str(path))
    assert texts(encoded, tokenizer) == ("(Hi?)", "(Yo)<eos>", "(No)<eos>")
    assert report.counts == {"no end of turn": 1}
    with pytest.raises(UserError, match=r"data.template=.*nowhere.jinja: cannot be read"):
        encoded_rows(tmp_path, tokenizer, CHAT, template=str(tmp_path / "nowhere.jinja"))


def test_messages_without_a_template_and_texts_without_eos_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"rows.jsonl:1: .*data.template"):
        encoded_rows(tmp_path, byte_tokenizer(template=None), CHAT)
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"rows.jsonl:1: .*no EOS token"):
        encoded_rows(tmp_path, tokenizer, GOOD)


def test_where_the_prompt_is_no_token_prefix_it_ends_at_the_common_one_of_all(tmp_path):
    tokenizer = byte_tokenizer(merges=(("x", "y"), ("!", "?")))
    rows = [{"prompt": "a!x", "chosen": "y", "rejected": "n"}, {"prompt": "a!", "chosen": "y", "rejected": "n"}]
    rows.append({"prompt": "b!x", "chosen": "n", "rejected": "y"})
    encoded, report = encoded_rows(tmp_path, tokenizer, *rows)
    assert texts(encoded, tokenizer) == ("a!", "xy<eos>", "xn<eos>")
    assert texts(encoded, tokenizer, 1) == ("a!", "y<eos>", "n<eos>")
    assert texts(encoded, tokenizer, 2) == ("b!", "xn<eos>", "xy<eos>")
    assert report.counts == {"prompt tokens not a prefix": 2}


def test_a_thinking_template_whose_prompt_is_no_prefix_is_counted(tmp_path):
    template = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>{% endif %}")
    tokenizer = byte_tokenizer(template=template)
    encoded, report = encoded_rows(tmp_path, tokenizer, CHAT)
    assert texts(encoded, tokenizer) == (
        "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n",
        "Yo<|im_end|>",
        "No<|im_end|>",
    )
    assert report.counts == {"prompt tokens not a prefix": 1}


# ------------------------------------------------------------------------------------------------ truncation

LENGTHS = st.tuples(st.integers(1, 30), st.lists(st.integers(1, 30), min_size=2, max_size=4), st.integers(2, 40))


@given(LENGTHS)
def test_keep_completion_keeps_answers_before_prompts_and_treats_all_alike(case):
    prompt, completions, limit = case
    cut = TRUNCATIONS["keep_completion"](prompt, completions, limit)
    kept = prompt - cut.skip[0]
    assert len(set(cut.skip)) == 1 and 1 <= kept and max(cut.length) + kept <= limit and not any(cut.start)
    for whole, length in zip(completions, cut.length, strict=True):
        assert length == min(whole, max(cut.length))
        assert length == whole or kept == 1
    assert kept == prompt or max(cut.length) + kept == limit


@given(LENGTHS)
def test_keep_start_and_keep_end_are_slices_of_the_whole(case):
    prompt, completions, limit = case
    wholes = [[("p", i) for i in range(prompt)] + [("c", i) for i in range(length)] for length in completions]
    start = TRUNCATIONS["keep_start"](prompt, completions, limit)
    assert (start is None) == (prompt >= limit)
    for name, side in (("keep_start", slice(None, limit)), ("keep_end", slice(-limit, None))):
        cut = TRUNCATIONS[name](prompt, completions, limit)
        for index, whole in enumerate(wholes if cut else []):
            read = whole[prompt + cut.start[index] :][: cut.length[index]]
            before = whole[cut.skip[index] : prompt] or [whole[prompt + cut.start[index] - 1]]
            assert before + read == whole[side]


@pytest.mark.parametrize("rule", sorted(TRUNCATIONS))
def test_arrays_hold_what_is_read_and_what_is_cut(tmp_path, rule):
    tokenizer = byte_tokenizer()
    sizes = [(3, 2, 4), (9, 5, 2), (4, 11, 3), (14, 9, 12), (2, 12, 15), (9, 8, 3)]
    rows = [{"prompt": "p" * p, "chosen": "c" * c, "rejected": "r" * r} for p, c, r in sizes]
    rows.append({"prompt": "prompts", "completions": ["a" * 12, "bb", "c" * 5], "scores": [3, 2, 1]})
    for limit in (5, 10, 13):
        (tmp_path / f"{rule}{limit}").mkdir()
        encoded, report = encoded_rows(
            tmp_path / f"{rule}{limit}", tokenizer, *rows[:6], truncation=rule, max_length=limit
        )
        assert report.kept + report.too_long == 6
        assert encoded.sequence_lengths().max() <= limit
        for pair, part in itertools.product(range(encoded.num_pairs), ("chosen", "rejected")):
            index = int(getattr(encoded, part)[pair])
            row = rows[int(encoded.line[encoded.pair_unit[pair]]) - 1]
            head, tail = (tokenizer.decode(ids.tolist()) for ids in encoded.cut(index))
            read = tokenizer.decode(encoded.prompt(index).tolist()) + tokenizer.decode(
                encoded.completion(index).tolist()
            )
            assert head + read + tail == row["prompt"] + row[part] + "<eos>"
            assert encoded.truncated[index] == bool(head or tail)
            assert len(encoded.prompt(index)) + len(encoded.completion(index)) == encoded.sequence_lengths()[index]
            if rule != "keep_end":
                assert encoded.completion_skip[index] < encoded.prompt_length[encoded.completion_unit[index]]


def test_a_pair_that_truncation_makes_equal_is_dropped_and_counted_but_trl_keeps_it(tmp_path):
    tokenizer = byte_tokenizer()
    row = {"prompt": "p", "chosen": "same start, one", "rejected": "same start, two"}
    encoded, report = encoded_rows(tmp_path, tokenizer, row, GOOD, max_length=8)
    assert (report.too_long, report.kept, report.bad) == (1, 1, 0) and encoded.line.tolist() == [2]
    report.check(0.0)
    encoded, report = encoded_rows(tmp_path, tokenizer, row, truncation="keep_start", max_length=8)
    assert report.counts["identical after truncation, kept"] == 1 == encoded.num_pairs


def test_a_ranked_row_keeps_the_pairs_that_still_differ(tmp_path):
    tokenizer = byte_tokenizer()
    row = {"prompt": "p", "completions": ["same start, one", "same start, two", "no"], "ranks": [1, 2, 3]}
    encoded, report = encoded_rows(tmp_path, tokenizer, row, max_length=8)
    assert (encoded.num_units, encoded.num_completions, encoded.num_pairs) == (1, 3, 2)
    assert (report.kept, report.pairs, report.counts["pair left out of a ranked row"]) == (1, 2, 1)
    assert encoded.rank.tolist() == [0, 0, 2]


def test_only_the_cut_rows_are_too_long(tmp_path):
    row = {"prompt": "p" * 9, "chosen": "c", "rejected": "r"}
    _, report = encoded_rows(tmp_path, byte_tokenizer(), row, GOOD, truncation="keep_start", max_length=9)
    assert report.counts == {"overlong prompt": 1} and (report.kept, report.too_long) == (1, 1)


# ------------------------------------------------------------------------------------------------ arrays


def test_the_arrays_follow_the_layout_that_the_batches_rely_on(tmp_path):
    ranked = {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [3, 1, 2], "weight": 0.5, "margin": 2}
    paths = [write(tmp_path / "a.jsonl", GOOD), write(tmp_path / "b.jsonl", ranked, {"prompt": "q", **RANKED})]
    encoded, _ = collect([str(path) for path in paths], byte_tokenizer(), settings())
    assert (encoded.num_units, encoded.num_completions, encoded.num_pairs) == (3, 7, 5)
    assert encoded.completion_unit.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert encoded.pair_unit.tolist() == [0, 1, 1, 1, 2]
    assert encoded.chosen.tolist() == [0, 3, 3, 4, 5] and encoded.rejected.tolist() == [1, 2, 4, 2, 6]
    assert encoded.weight.tolist() == [1, 0.5, 0.5, 0.5, 1] and encoded.margin.tolist() == [0, 2, 2, 2, 1]
    assert (encoded.line.tolist(), encoded.file.tolist()) == ([1, 1, 2], [0, 1, 1])
    assert encoded.files == tuple(map(str, paths))
    assert encoded.pair_lengths().tolist()[0] == [2 + 4, 2 + 3]
    assert not encoded.truncated.any() and not encoded.completion_skip.any()


RANKED = {"responses": ["a", "b"], "scores": [2, 1], "margin": 1}


def test_a_batch_of_rows_gives_what_each_row_gives_alone(tmp_path):
    tokenizer = byte_tokenizer()
    rows = [
        GOOD,
        CHAT,
        {"prompt": "say <eos>", "chosen": "a", "rejected": "b"},
        {**CHAT, "prompt": [user("<|im_end|>")]},
    ]
    together, _ = encoded_rows(tmp_path, tokenizer, *rows)
    for index, row in enumerate(rows):
        alone, _ = encoded_rows(tmp_path, tokenizer, row)
        assert texts(together, tokenizer, index) == texts(alone, tokenizer)


# ------------------------------------------------------------------------------------------------ notes


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({**GOOD, "chosen": "bell \a"}, "control characters"),
        ({**GOOD, "chosen": "\u202egnp.exe"}, "bidirectional controls"),
        ({**GOOD, "prompt": "say <|im_end|>"}, "control-token text"),
        ({**CHAT, "prompt": [user("say <|im_end|>")]}, "control-token text"),
        ({**CHAT, "chosen": [*YO, assistant("so")]}, "completion of several turns"),
        (IDS, "no end of turn"),
    ],
)
def test_what_is_odd_about_a_row_is_noted_and_the_row_kept(tmp_path, row, kind):
    _, report = encoded_rows(tmp_path, byte_tokenizer(), row)
    counts = dict(report.counts)
    counts.pop("not scored: others' words", None)  # headers between turns of a completion
    assert (counts, report.kept) == ({kind: 1}, 1)


def test_repeated_and_contradicting_pairs_are_counted(tmp_path):
    swapped = {**GOOD, "chosen": "no", "rejected": "yes"}
    _, report = encoded_rows(tmp_path, byte_tokenizer(), GOOD, GOOD, swapped)
    assert report.counts == {"duplicate pair": 1, "conflicting pair": 1} and report.kept == 3
    assert report.examples["conflicting pair"] == [
        f"{tmp_path}/rows.jsonl:3: the other way round at {tmp_path}/rows.jsonl:1"
    ]


# ------------------------------------------------------------------------------------------------ real data


@pytest.mark.parametrize(
    ("name", "rows", "bad"),
    [("hh_harmless_test.jsonl", 200, 0), ("orca_openai_format.jsonl", 160, 0), ("sharegpt_en.json", 180, 0)],
)
def test_real_files_are_read_whole(shared, tmp_path, name, rows, bad):
    tokenizer = byte_tokenizer()
    started = time.perf_counter()
    encoded, report = encode(str(shared / "data" / name), tokenizer, settings(max_length=4096))
    assert time.perf_counter() - started < 20
    assert (report.rows, report.bad) == (rows, bad) and report.kept + report.too_long == rows
    ends = encoded.completion_start + encoded.completion_length - 1
    assert set(encoded.tokens[ends[~encoded.truncated]].tolist()) <= {EOS, END}
    inside = [encoded.completion(index)[:-1] for index in range(encoded.num_completions)]
    assert all((ids >= len(SPECIAL)).all() for ids in inside)


# ------------------------------------------------------------------------------------------------ numbers of rows


def numbered(**columns):
    return {"prompt": "p", "chosen": " a", "rejected": " b", **columns}


@pytest.mark.parametrize("value", [1e39, -1e39, 10**300])
@pytest.mark.parametrize("column", ["weight", "margin"])
def test_a_number_that_float32_does_not_hold_is_a_bad_row(tmp_path, column, value):
    """It would be infinite there, and every step with that row would be left out."""
    path = write(tmp_path / "rows.jsonl", numbered(**{column: value}), numbered())
    with pytest.raises(UserError, match=rf"1 not finite \(first: .*rows.jsonl:1: {column} is "):
        encode(str(path), byte_tokenizer(), settings(), tmp_path / "cache")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"weight": 0}, "all rows, as .*:1: weight is 0, .*: nothing would be learned; correct the column weight"),
        (
            {"label": 0},
            "all rows, as .*:1: label is 0, .*: the answers in rejected would be learned; remove the column",
        ),
    ],
)
def test_what_cannot_be_meant_of_every_row_is_refused_and_of_some_counted(tmp_path, columns, words):
    """A column that was left over from other work changes everything that is learned."""
    odd = [numbered(**columns), numbered(chosen=" c", **columns)]
    path = write(tmp_path / "odd.jsonl", *odd)
    with pytest.raises(UserError, match=words):
        encode(str(path), byte_tokenizer(), settings(), tmp_path / "cache")
    path = write(tmp_path / "some.jsonl", *odd, numbered(chosen=" d"))
    _, report = encode(str(path), byte_tokenizer(), settings(), tmp_path / "cache")
    assert [report.counts[kind] for kind in ("weight of 0", "reversed pair") if kind in report.counts] == [2]


def test_a_single_completion_that_is_undesirable_is_no_reversed_pair(tmp_path):
    path = write(tmp_path / "single.jsonl", {"prompt": "p", "completion": " a", "label": False})
    _, report = encode(str(path), byte_tokenizer(), settings(), tmp_path / "cache")
    assert report.counts == {} and report.undesirable == 1


TURNS = {"prompt": [user("p")], "chosen": [assistant("a")], "rejected": [assistant("b")]}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([TURNS], ["used for all rows"]),
        ([TURNS, IDS], ["used for 1 of 2 rows"]),
        ([IDS], ["used for no row"]),
        ([numbered()], ["used for no row", "warning: 1 of 1 rows are texts without the turns that this model knows"]),
        ([TURNS, numbered()], ["used for 1 of 2 rows", "1 of 2 rows are texts without the turns"]),
    ],
)
def test_which_rows_go_through_the_chat_template_is_said(tmp_path, rows, words):
    """Texts do not, also where the model is one for chats; then what would make turns of them is said as well."""
    files = [str(write(tmp_path / f"{number}.jsonl", row)) for number, row in enumerate(rows)]
    _, report = encode(files, byte_tokenizer(), settings(), tmp_path / "cache")
    lines = [line for line in report.lines() if line.startswith(("chat template", "warning"))]
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines, strict=True))
    assert all("data.as_chat=true" in line for line in lines[1:]) and report.templated == rows.count(TURNS)
    assert encode(files, byte_tokenizer(), settings(), tmp_path / "cache")[1].templated == rows.count(TURNS)  # kept


def test_without_a_template_nothing_is_said_of_one(tmp_path):
    file = write(tmp_path / "rows.jsonl", numbered())
    _, report = encode(str(file), byte_tokenizer(template=None), settings(), tmp_path / "cache")
    assert not [line for line in report.lines() if line.startswith("chat template")]
