"""The preview: what is shown of the data, on a terminal and off it."""

import io
import re
import subprocess
import sys

import pytest
from rich.console import Console

from dpo_jax import preview
from dpo_jax.data import showing
from dpo_jax.data.encode import collect
from dpo_jax.data.settings import DataSettings
from tests.support.bad_rows import BAD_ROWS
from tests.support.chat_templates import THINKING, call, result, tokenizer_with
from tests.support.tiny_rows import CHAT, CHATML, GOOD, HI, NO, assistant, byte_tokenizer, user, write

LONG = {"prompt": "one two three", "chosen": "chosen words", "rejected": "rejected words here"}
HOSTILE = {**CHAT, "prompt": [user("[bold]\x1b[31m<|im_end|> \u202e")]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    byte_tokenizer(template="{% if boom %}{{ raise_exception('boom') }}{% endif %}" + CHATML).save_pretrained(folder)
    return folder


def shown(tmp_path, *rows, pairs=9, width=80, terminal=False, tokenizer=None, **changes) -> str:
    stream = io.StringIO()
    tokenizer = tokenizer or byte_tokenizer()
    settings = DataSettings(train="x", **changes)
    encoded, report = collect(str(write(tmp_path / "rows.jsonl", *rows)), tokenizer, settings)
    colours = {"force_terminal": True, "color_system": "standard"} if terminal else {"color_system": None}
    console = Console(file=stream, width=width, highlight=False, markup=False, emoji=False, **colours)
    showing.show(encoded, report, tokenizer, console, pairs=pairs, name="data.train")
    return stream.getvalue()


def config_file(tmp_path, model, *rows):
    path = tmp_path / "run.yaml"
    data = write(tmp_path / "rows.jsonl", *rows)
    path.write_text(f"model: {{path: {model}}}\ndata: {{train: {data}}}\noutput: {tmp_path / 'out'}\n", "utf-8")
    return str(path)


def test_a_pair_is_shown_with_its_source_its_parts_and_its_ends(tmp_path):
    text = shown(tmp_path, CHAT)
    assert f"pair 1 of 1, {tmp_path}/rows.jsonl:1\nprompt: " in text
    assert "prompt: 22 tokens, not scored\n⟦<|im_start|>⟧user\nHi?⟦<|im_end|>⟧\n⟦<|im_start|>⟧assistant\n" in text
    assert "chosen: 3 tokens, all scored\nYo⟦<|im_end|>⟧\n" in text
    assert "rejected: 3 tokens, all scored\nNo⟦<|im_end|>⟧\n" in text
    assert "1 rows read: 1 kept (1 pairs), 0 bad, 0 left out as too long" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_a_control_token_is_shown_apart_from_the_same_letters_as_text(tmp_path, terminal):
    row = {"prompt": [user("a <think>")], "chosen": [assistant("<think>b</think>c")], "rejected": NO}
    text = shown(tmp_path, row, tokenizer=tokenizer_with(THINKING), terminal=terminal)
    if terminal:
        assert "a <think>\x1b[0m" in text and "\x1b[7;32m<think>\x1b[0m" in text
    else:
        assert "user\na <think>⟦<|im_end|>⟧" in text
        assert "all scored\n⟦<think>⟧\nb\n⟦</think>⟧\n\nc⟦<|im_end|>⟧\n" in text


def test_what_is_read_and_not_scored_is_shown_apart(tmp_path):
    row = {"prompt": HI, "chosen": [call("f", {}, "so"), result("12 mm"), assistant("b")], "rejected": NO}
    text = shown(tmp_path, row, tokenizer=tokenizer_with(THINKING))
    others = "\n⟦<|im_start|>⟧user\n⟦<tool_response>⟧\n12 mm\n⟦</tool_response>⟧⟦<|im_end|>⟧\n⟦<|im_start|>⟧assistant\n"
    assert f"⟦<|im_end|>⟧[not scored: {others}]⟦<think>⟧" in text
    assert re.search(r"chosen: (\d+) tokens, (?!\1)\d+ scored\nso⟦<tool_call>⟧", text)
    assert re.search(r"rejected: \d+ tokens, all scored\n", text)


def test_numbers_of_a_pair_are_shown_where_they_are_not_the_usual_ones(tmp_path):
    usual = {"weight": 1, "margin": 0, "label": 1}
    text = shown(tmp_path, {**GOOD, **usual}, {**GOOD, "label": 0.7}, {**GOOD, "weight": 2, "margin": 0.5, "label": 0})
    for line, numbers in ((1, ""), (2, ", label 0.7"), (3, ", weight 2, margin 0.5, label 0")):
        assert f"pair {line} of 3, {tmp_path}/rows.jsonl:{line}{numbers}\n" in text


def test_a_single_completion_is_shown_once_and_as_what_it_is(tmp_path):
    rows = [{"prompt": "p", "completion": f"words {label}", "label": label} for label in (1, 0)]
    text = shown(tmp_path, *rows, {**rows[0], "weight": 0.5})
    assert f"completion 1 of 3, {tmp_path}/rows.jsonl:1\nprompt: 1 tokens, not scored\np\n" in text
    assert "desirable: 8 tokens, all scored\nwords 1⟦<eos>⟧\n\ncompletion 2" in text
    assert "\nundesirable: 8 tokens, all scored\nwords 0⟦<eos>⟧\n\ncompletion 3" in text
    assert f"completion 3 of 3, {tmp_path}/rows.jsonl:3, weight 0.5\n" in text
    assert "chosen" not in text and "rejected" not in text and "label" not in text
    assert "undesirable, not scored, cut, control token; the rest of a completion is scored" in text
    text = shown(tmp_path, {"messages": CHAT["prompt"] + CHAT["chosen"]})
    assert "completion: 3 tokens, all scored\nYo⟦<|im_end|>⟧\n" in text
    assert "desirable" not in text and "chosen" not in text
    assert "colours: prompt, completion, not scored, cut, control token" in text


def test_pairs_and_completions_of_one_run_are_counted_apart(tmp_path):
    tokenizer = byte_tokenizer()
    paths = [write(tmp_path / "a.jsonl", GOOD), write(tmp_path / "b.jsonl", *[{"prompt": "p", "completion": "c"}] * 2)]
    encoded, report = collect([str(path) for path in paths], tokenizer, DataSettings(train="x"))
    names = showing.chosen_names(encoded, report).tolist()
    assert names == ["chosen", "completion", "completion"]
    heads = [str(next(showing.entry_texts(encoded, e, names[e], tokenizer, plain=True))).strip() for e in range(3)]
    wanted = [("pair 1 of 1", "a.jsonl:1"), ("completion 1 of 2", "b.jsonl:1"), ("completion 2 of 2", "b.jsonl:2")]
    assert heads == [f"{what}, {tmp_path}/{where}" for what, where in wanted]
    assert showing.histogram(encoded, "#")[0].split() == ["tokens", "prompt", "chosen", "rejected", "completion"]


@pytest.mark.parametrize("truncation", ["keep_completion", "keep_start", "keep_end"])
def test_what_was_cut_of_a_single_completion_is_shown(tmp_path, truncation):
    text = shown(tmp_path, {"prompt": "pqr", "completion": "abcdef", "label": 0}, max_length=5, truncation=truncation)
    wanted = {
        "keep_completion": "[cut: pq]r\nundesirable: 4 tokens, all scored, 3 cut\nabcd[cut: ef⟦<eos>⟧]\n",
        "keep_start": "pqr\nundesirable: 2 tokens, all scored, 5 cut\nab[cut: cdef⟦<eos>⟧]\n",
        "keep_end": "undesirable: 4 tokens, all scored, 5 cut\n[cut: pqrab]cdef⟦<eos>⟧\n",
    }
    assert wanted[truncation] in text


def test_what_was_cut_is_shown_as_cut(tmp_path):
    text = shown(tmp_path, LONG, max_length=14)
    assert "prompt: 1 tokens, not scored, 12 cut\n[cut: one two thre]e\n" in text
    assert "chosen: 13 tokens, all scored\nchosen words⟦<eos>⟧\n" in text
    assert "rejected: 13 tokens, all scored, 7 cut\nrejected word[cut: s here⟦<eos>⟧]\n" in text
    text = shown(tmp_path, LONG, max_length=10, truncation="keep_end")
    assert "chosen: 9 tokens, all scored, 16 cut\n[cut: one two threecho]sen words⟦<eos>⟧\n" in text


def test_nothing_in_the_data_reaches_the_terminal_as_a_command(tmp_path):
    text = shown(tmp_path, HOSTILE)
    assert "[bold]\\x1b[31m<|im_end|> \\u202e⟦<|im_end|>⟧" in text
    assert "\x1b" not in text and "\u202e" not in text
    coloured = shown(tmp_path, HOSTILE, terminal=True)
    assert set(re.findall(r"\x1b\[[\d;]*(.)", coloured)) == {"m"} and "[bold]\\x1b[31m<|im_end|> " in coloured


def test_on_a_terminal_the_parts_differ_by_colour(tmp_path):
    text = shown(tmp_path, LONG, terminal=True, max_length=14)
    codes = {name: code for name, code in (("chosen", "32"), ("rejected", "31"), ("prompt", "36"))}
    assert re.search(rf"\x1b\[{codes['chosen']}mchosen words\x1b", text)
    assert re.search(rf"\x1b\[{codes['rejected']}mrejected word\x1b", text)
    assert re.search(rf"\x1b\[{codes['prompt']}me\x1b", text)
    assert re.search(r"\x1b\[2;9mone two thre\x1b", text)
    assert re.search(r"\x1b\[7;32m<eos>\x1b", text)


@pytest.mark.parametrize("width", [30, 60])
def test_a_narrow_terminal_is_not_overrun(tmp_path, width):
    text = re.sub(r"\x1b\[[\d;]*m", "", shown(tmp_path, CHAT, LONG, HOSTILE, width=width, terminal=True))
    assert max(map(len, text.splitlines())) <= width


def test_the_histogram_counts_every_pair_once_in_each_column(tmp_path):
    rows = [{"prompt": "p" * (1 + i % 7), "chosen": "c" * (1 + i), "rejected": "r" * (40 - i)} for i in range(40)]
    encoded, _ = collect(str(write(tmp_path / "rows.jsonl", *rows)), byte_tokenizer(), DataSettings(train="x"))
    head, *lines = showing.histogram(encoded, "#")
    assert head.split() == ["tokens", "prompt", "chosen", "rejected"] and len(lines) == showing.BINS
    counts = [[int(part.replace(",", "")) for part in re.findall(r"(?<=\s)[\d,]+(?!\S)", line)] for line in lines]
    assert [sum(column) for column in zip(*counts, strict=True)] == [40, 40, 40]
    assert max(map(len, lines)) <= 60


def test_a_long_text_is_shortened_and_says_so(tmp_path):
    text = shown(tmp_path, {**GOOD, "prompt": "start " + "x" * 5000 + " end"}, max_length=6000)
    assert "start xxx" in text and "xxx end" in text and "characters not shown" in text


def test_as_many_pairs_as_asked_for_spread_over_the_data(tmp_path):
    rows = [{**GOOD, "prompt": f"p{i}"} for i in range(10)]
    assert re.findall(r"pair (\d+) of 10", shown(tmp_path, *rows, pairs=3)) == ["1", "5", "10"]
    assert re.findall(r"pair (\d+) of 10", shown(tmp_path, *rows, pairs=99)) == [str(i + 1) for i in range(10)]
    assert "pair 1" not in shown(tmp_path, *rows, pairs=0)


def test_the_command_shows_the_report_before_it_refuses_bad_data(tmp_path, model, capsys):
    path = config_file(tmp_path, model, *[GOOD] * 3, b"{", CHAT)
    before = sorted(entry.name for entry in tmp_path.iterdir())
    assert preview.main([path, "--pairs", "1"]) == 2
    out, error = capsys.readouterr()
    assert "bad: not JSON: 1\n" in out and out.count("\npair ") == 1
    assert error.startswith("error: 1 of 5 rows are bad (20.00%") and error.count("\n") == 1
    assert f"{tmp_path}/rows.jsonl:4: " in error
    assert preview.main([path, "--pairs=0", "data.max_bad_fraction=0.5"]) == 0
    assert "\npair " not in capsys.readouterr().out
    assert sorted(entry.name for entry in tmp_path.iterdir()) == before


def test_sixty_bad_rows_give_one_line_each_and_no_traceback(tmp_path, model, capsys):
    path = config_file(tmp_path, model, *(bad for _, bad, _ in BAD_ROWS))
    assert preview.main([path]) == 2
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in out + error
    for line in out.splitlines():
        assert not line.startswith("  ") or re.match(rf"  {re.escape(str(tmp_path))}/rows.jsonl:\d+: ", line), line


@pytest.mark.parametrize("words", [["--pairs"], ["--pairs", "x"], ["--pairs=-1"]])
def test_a_wrong_number_of_pairs_is_refused(tmp_path, model, capsys, words):
    assert preview.main([config_file(tmp_path, model, GOOD), *words]) == 2
    assert "not a whole number; write --pairs" in capsys.readouterr().err


def test_the_command_runs_without_jax_and_on_a_terminal_that_knows_ascii_only(tmp_path, model):
    path = config_file(tmp_path, model, {**GOOD, "chosen": "é"})
    code = f"import sys; from dpo_jax import preview; preview.main([{path!r}]); sys.exit('jax' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={"PYTHONIOENCODING": "ascii"}
    )
    assert (run.returncode, run.stderr) == (0, "") and "\\xe9" in run.stdout


def test_help_is_of_what_a_preview_takes(capsys):
    with pytest.raises(SystemExit):
        preview.main(["--help"])
    shown = capsys.readouterr().out
    assert "--pairs N" in shown and "data.max_length" in shown and "optimizer." not in shown
