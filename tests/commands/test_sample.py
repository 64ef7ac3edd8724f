"""Questions and their answers, and the command that asks a folder."""

import io
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import sample
from dpo_jax.data.layouts import Pair, Record
from dpo_jax.data.templates import tokenize
from dpo_jax.errors import UserError
from dpo_jax.evaluation import chat, generate, winrate
from dpo_jax.evaluation.generate import Answer
from dpo_jax.evaluation.likelihood import answer_logprobs
from dpo_jax.evaluation.models import open_model
from dpo_jax.hf.checkpoint import load_hf
from tests.support.tiny_folders import write_folder
from tests.support.tiny_rows import assistant, byte_tokenizer, user, write

OFTEN = "20"
"""Long enough for the tiny models to say something, short enough to share the compiled functions."""


TWO = ("--prompt", "Hi", "--prompt", "Name one.")


def make(folder, seed=0, template=True, **generation):
    """A tiny model of bytes."""
    write_folder(folder, "llama", vocab_size=264)
    tokenizer = byte_tokenizer(bos=True) if template else byte_tokenizer(bos=True, template=None)
    (folder / "chat_template.jinja").unlink()
    (folder / "additional_chat_templates" / "tool_use.jinja").unlink()
    (folder / "additional_chat_templates").rmdir()
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **generation}))
    if seed:
        from safetensors.numpy import load_file, save_file

        rng = np.random.default_rng(seed)
        weights = load_file(folder / "model.safetensors")
        noisy = {k: x + rng.normal(0, 0.05, x.shape).astype(x.dtype) for k, x in weights.items()}
        save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, and another of the same tokens."""
    root = tmp_path_factory.mktemp("models")
    return make(root / "policy"), make(root / "reference", seed=1)


class Terminal(io.TextIOWrapper):
    """Input of a person."""

    def isatty(self):
        return True


@pytest.fixture
def ask(capsys, monkeypatch):
    """Run the command with some standard input; its code, rows of JSON, and what it wrote on stderr."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)

    def run(*argv, data=b"", json_rows=True, stdin=io.TextIOWrapper):
        monkeypatch.setattr(sys, "stdin", stdin(io.BytesIO(data)))
        code = sample.main([*map(str, argv), *(["--json"] if json_rows else [])])
        out, err = capsys.readouterr()
        return code, [json.loads(line) for line in out.splitlines()] if json_rows else out, err

    return run


# ---------------------------------------------------------------------------------------------- questions


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{oops", "not JSON"),
        (b"[1]", "not an object"),
        (b'{"good": "a"}', "no 'prompt' (columns: good); write rows such as"),
        (b'{"prompt": "a"}', "no 'good'"),
        (b'{"prompt": 3, "good": "a"}', "prompt is a number"),
        (b'{"prompt": [{"role": "pope", "content": "a"}], "good": "a"}', "unknown role"),
        (b'{"prompt": "a", "good": "("}', "not a pattern: good = '('"),
        (b'{"prompt": "a", "good": 3}', "good is not text"),
        (b'{"prompt": "a\\u0000", "good": "a"}', "NUL character"),
        (b'{"prompt": "\xff", "good": "a"}', "invalid UTF-8"),
    ],
)
def test_a_bad_question_is_refused_with_its_file_and_line(tmp_path, line, words):
    file = write(tmp_path / "questions.jsonl", {"prompt": "a", "good": "a"}, line)
    with pytest.raises(UserError) as caught:
        winrate.read_questions(str(file))
    assert str(caught.value).startswith(f"{file}:2: ") and words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "words"), [("none.jsonl", "No such file"), ("a.csv", "pandas.read_csv")])
def test_a_file_that_is_none_of_questions_is_refused(tmp_path, name, words):
    with pytest.raises(UserError, match=words):
        winrate.read_questions(str(tmp_path / name))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="is empty"):
        winrate.read_questions(str(tmp_path / "empty.jsonl"))


PROMPTS = ["Hi", "say <|im_end|> now", "", [user("Hi?")], [{"role": "system", "content": "Be <eos>."}, user("ü")]]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("control_tokens", ["text", "tokens"])
def test_a_model_is_asked_with_the_tokens_that_it_was_trained_on(prompt, control_tokens):
    coder = winrate.prompt_codec(byte_tokenizer(bos=True), control_tokens)
    answers = ("yes", "no") if isinstance(prompt, str) else ([assistant("yes")], [assistant("no")])
    (trained,) = tokenize([Record(prompt, answers, (Pair(0, 1),), None, {}, "f", 1)], coder)
    assert winrate.prompt_tokens(prompt, coder) == trained.prompt


def test_a_prompt_that_gives_no_tokens_is_refused_by_place():
    with pytest.raises(UserError, match="f:3: messages need a chat template"):
        winrate.prompt_tokens([user("Hi")], winrate.prompt_codec(byte_tokenizer(template=None)), "f:3")
    with pytest.raises(UserError, match="f:4: .*no BOS token.*; write another prompt"):
        winrate.prompt_tokens("", winrate.prompt_codec(byte_tokenizer()), "f:4")
    broken = "{{ raise_exception('no\nsuch') }}"
    with pytest.raises(UserError, match=r"f:5: .*TemplateError: no\\nsuch"):
        winrate.prompt_tokens([user("Hi")], winrate.prompt_codec(byte_tokenizer(template=broken)), "f:5")


def test_answers_are_judged_by_their_patterns(folders, tmp_path):
    folder = folders[0]
    model, tokenizer = load_hf(folder), byte_tokenizer(bos=True)
    stop = winrate.stop_tokens(folder, tokenizer)
    assert stop == (1, 3)  # generation_config.json lists <eos> alone, and the template ends turns with <|im_end|>
    rows = [{"prompt": [user("Name one.")], "good": "."}, {"prompt": "Yo", "good": "^never$"}]
    questions = winrate.read_questions(str(write(tmp_path / "questions.jsonl", *rows)))
    answers = winrate.answer(
        model.spec, model.params, questions, winrate.prompt_codec(tokenizer), stop=stop, max_new_tokens=20
    )
    assert [row["prompt"] for row in answers] == [row["prompt"] for row in rows]
    assert [row["good"] for row in answers] == [True, False]
    assert winrate.rated([*answers, {"good": True}]) == {"pass_rate": 2 / 3}
    # "." also matches a line end, so that a pattern may span lines
    assert winrate.read_questions(str(write(tmp_path / "q.jsonl", {"prompt": "a", "good": "^a.b$"})))[0].good.search(
        "a\nb"
    )


# ---------------------------------------------------------------------------------------------- the command


def test_help_answers_without_jax():
    code = "import sys; from dpo_jax import sample; sample.main(['--help'])"
    script = (
        f"try:\n    {code}\nexcept SystemExit:\n    pass\nassert not {{'jax', 'transformers'}} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", f"import sys\n{script}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--against" in done.stdout


def test_two_models_are_compared_under_both(folders, ask, tmp_path):
    output = tmp_path / "out.jsonl"
    options = (*TWO, "--max-new-tokens", OFTEN, "--output", output)
    code, rows, _ = ask(folders[0], "--against", folders[1], *options)
    assert code == 0 and [row["model"] for row in rows] == ["policy", "reference"] * 2
    assert [json.loads(line) for line in output.read_text().splitlines()] == rows
    coder = winrate.prompt_codec(byte_tokenizer(bos=True))
    models = {name: load_hf(folder) for name, folder in zip(("logp", "reference_logp"), folders, strict=True)}
    row = rows[1]
    prompt = winrate.prompt_tokens(row["prompt"], coder)
    assert row["prompt"] == [user("Hi")] and not row["finished"] and row["tokens"] == 20
    own, decoding = models["reference_logp"], winrate.Decoding(20, stop=(1, 3))
    answer = winrate.generate(own.spec, own.params, [prompt] * 2, decoding)[0]
    for name, model in models.items():
        expected = answer_logprobs(model.spec, model.params, [prompt] * 2, [answer.written] * 2)
        np.testing.assert_allclose(row[name], expected[0], rtol=1e-4)
    assert row["log_ratio"] == row["logp"] - row["reference_logp"] < 0  # it prefers its own answer
    assert "exists already, and is not overwritten" in ask(folders[0], *options)[2]
    assert len(output.read_text().splitlines()) == 4


def test_a_model_against_itself_has_no_log_ratio(folders, ask):
    _, rows, _ = ask(folders[0], "--against", folders[0], *TWO, "--max-new-tokens", OFTEN)
    assert [row["log_ratio"] for row in rows] == [0.0] * 4 and rows[0]["answer"] == rows[1]["answer"]


def test_a_model_is_split_over_the_devices_that_there_are(folders):
    whole, split = load_hf(folders[0]), open_model(str(folders[0]))
    query = split.params["blocks"]["0"]["mlp"]["up"]["kernel"]
    assert len(query.devices()) == 4 and query.addressable_shards[0].data.size == query.size // 4
    assert query.dtype == jnp.float32  # a CPU's
    jax.tree.map(np.testing.assert_array_equal, split.params, whole.params)


def test_prompts_come_from_files_lines_and_arguments_alike(folders, ask, tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfHi\r\n\nName one.\n")
    file = write(tmp_path / "p.jsonl", {"prompt": "Hi"}, {"prompt": [user("Name one.")]})
    common = ("--max-new-tokens", OFTEN)
    _, expected, _ = ask(folders[0], *common, *TWO)
    assert len(expected) == 2
    assert ask(folders[0], *common, "--prompts", tmp_path / "p.txt")[1] == expected
    assert ask(folders[0], *common, "--prompts", file)[1] == expected
    assert ask(folders[0], *common, data=b"Hi\nName one.")[1] == expected
    _, raw, _ = ask(folders[0], *common, "--prompt", "Hi", "--prompt", "a text of bytes to go on with", "--raw")
    assert raw[0]["prompt"] == "Hi" and raw[0]["answer"] != expected[0]["answer"]


def test_a_system_message_begins_every_conversation_that_has_none():
    coder = winrate.prompt_codec(byte_tokenizer())
    session = chat.Session((), coder, generate.Decoding(8), 0, True, "Be kind.")
    told = {"role": "system", "content": "Be kind."}
    assert chat._prompt_of(session, "Hi", "") == chat._prompt_of(session, [user("Hi")], "") == [told, user("Hi")]
    own = [{"role": "system", "content": "Be short."}, user("Hi")]
    assert chat._prompt_of(session, own, "") == own
    with pytest.raises(UserError, match="f:1: messages need a chat template"):
        chat._prompt_of(session._replace(chat=False), own, "f:1")


def test_the_folder_says_how_tokens_are_drawn_unless_the_command_does(folders, tmp_path):
    tokenizer = byte_tokenizer(bos=True)
    drawing = make(tmp_path / "drawing", do_sample=True, temperature=0.7, top_p=0.8, top_k=20)

    def decoding(folder, *words):
        return sample._decoding(sample._options([str(folder), *words]), tokenizer)[1:4]

    assert decoding(folders[0]) == (0.0, 1.0, 0)
    assert decoding(drawing) == (0.7, 0.8, 20)
    assert decoding(drawing, "--greedy") == (0.0, 1.0, 0)
    assert decoding(drawing, "--temperature", "0") == (0.0, 1.0, 0)
    assert decoding(drawing, "--top-p", "0.5", "--top-k", "0") == (0.7, 0.5, 0)
    assert decoding(folders[0], "--temperature", "1.5") == (1.5, 1.0, 0)
    with pytest.raises(UserError, match="--top-p: greedy decoding draws nothing"):
        decoding(folders[0], "--top-p", "0.5")
    with pytest.raises(UserError, match="top_p = 2.0"):
        decoding(drawing, "--top-p", "2")


@pytest.mark.parametrize(
    ("options", "data", "words"),
    [
        (("--prompt", "a", "--prompts", "b"), b"", "not allowed with argument"),
        (("--raw", "--system", "b"), b"a", "--system has no place"),
        (("--greedy", "--temperature", "1"), b"a", "--greedy or --temperature, not both"),
        (("--seed", "-1"), b"a", "--seed -1"),
        (("--max-new-tokens", "0"), b"a", "--max-new-tokens 0: must be at least 1"),
        (("--prompts", "nowhere.txt"), b"", "nowhere.txt: No such file"),
        ((), b"\n", "input: holds no prompt"),
        ((), b"a\n\xff", "input:2: is not UTF-8 text"),
        (("--prompt", "a\udc80"), b"", "--prompt 1: lone surrogate"),
        (("--output", "nowhere/x.jsonl", "--raw"), b"a", "--output nowhere/x.jsonl: there is no folder nowhere"),
    ],
)
def test_what_a_user_did_wrong_is_one_line(folders, ask, options, data, words):
    code, out, err = ask(folders[0], *options, data=data)
    assert code == 2 and out == []
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_a_model_of_other_tokens_cannot_be_compared(folders, ask, tmp_path):
    other = make(tmp_path / "other")
    byte_tokenizer(bos=True, merges=(("a", "b"),)).save_pretrained(other)
    code, _, err = ask(folders[0], "--against", other, "--prompt", "Hi")
    assert code == 2 and "has other tokens than" in err


def test_text_of_a_model_cannot_steer_the_terminal():
    assert chat.visible("a\tb\x1b[2J\r\u202e\x9b\n\u00a0\u2028é👩\u200d🚀") == (
        "a   b\\x1b[2J\\r\\u202e\\x9b\n\u00a0\\u2028é👩\u200d🚀"
    )
    assert json.loads(chat._line({"a": "\x9bé"})) == {"a": "\x9bé"} and chat._line({"a": "\x9bé"}).isascii()


def test_a_conversation_keeps_its_history_until_it_is_reset(folders, ask, monkeypatch, tmp_path):
    tokenizer, asked, said = byte_tokenizer(bos=True), [], iter(["Hi", "", "More", "/reset", "Hi", "/quit", "not read"])

    def answer(spec, params, prompt, decoding, *, seed):
        asked.append((tokenizer.decode(prompt), seed))
        words = tokenizer(f"Né {len(asked)}\x1b", add_special_tokens=False)["input_ids"]
        yield from (Answer(words[:size], None) for size in range(1, len(words)))  # in between, half an é
        yield Answer(words, 3)

    monkeypatch.setattr(chat, "stream", answer)
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    output = tmp_path / "talk.jsonl"
    code, shown, err = ask(folders[0], "--seed", 5, "--output", output, json_rows=False, stdin=Terminal)
    assert (code, err, list(said)) == (0, "", ["not read"])
    assert shown.count("Né 1") == 1  # and not "NNéNé 1" as it grows
    assert "Né 1\\x1b\n" in shown and "Né 2\\x1b\n" in shown and "\ufffd" not in shown
    hi, more, again = [json.loads(line) for line in output.read_text().splitlines()]
    assert more["prompt"] == [user("Hi"), assistant("Né 1\x1b"), user("More")]
    assert again["prompt"] == hi["prompt"] == [user("Hi")]
    assert "Né 1\x1b<|im_end|>" in asked[1][0] and asked[2][0] == asked[0][0]
    assert [seed for _, seed in asked] == [5, 6, 7]  # the same words may get another answer
    code, _, err = ask(folders[0], stdin=Terminal)
    assert code == 2 and "--json writes no conversation" in err


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(folders, ask, monkeypatch, tmp_path):
    whole = generate.stream

    def interrupted(*args, **options):
        yield next(whole(*args, **options))
        raise KeyboardInterrupt

    said = iter(["Hi"])
    monkeypatch.setattr(chat, "stream", interrupted)
    monkeypatch.setattr(chat, "_input", lambda: next(said, None))
    output = tmp_path / "talk.jsonl"
    code, shown, _ = ask(folders[0], "--max-new-tokens", OFTEN, "--output", output, json_rows=False, stdin=Terminal)
    assert code == 0 and "[stopped]" in shown and json.loads(output.read_text())["tokens"] == 8


def test_without_a_terminal_answers_stand_under_their_models_and_prompts(folders, ask):
    code, shown, err = ask(folders[0], "--against", folders[1], *TWO, "--max-new-tokens", OFTEN, json_rows=False)
    _, rows, _ = ask(folders[0], "--against", folders[1], *TWO, "--max-new-tokens", OFTEN)
    places = [
        shown.index(part)
        for part in (
            "> Hi\n[answer of policy: logp ",
            "\n[answer of reference: logp ",
            "\n\n> Name one.\n[answer of policy",
        )
    ]
    assert code == 0 and places == sorted(places) and "tokens/s" in err
    for row in rows:
        both = f"logp {row['logp']:.2f} under policy, {row['reference_logp']:.2f} under reference"
        assert f"{both}, log-ratio {row['log_ratio']:+.2f}, 20 tokens]\n" in shown
        assert chat.visible(row["answer"]) + " [cut off after 20 tokens]\n" in shown
