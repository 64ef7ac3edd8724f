"""The four log-probabilities of pairs are those of the plain formula, and answers those of the command."""

import datetime
import inspect
import re

import numpy as np
import pytest

from dpo_jax import dpo_loss, generate, load_hf, load_tokenizer, sample, score_pairs
from dpo_jax.errors import UserError
from dpo_jax.model.decoder import check_model
from tests.support.tiny_rows import GOOD, write, yes_or_no
from tests.support.worlds import write_model

ROWS = yes_or_no(5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, layers in (("policy", 2), ("reference", 1)):
        write_model(root / name, num_hidden_layers=layers)
    return root


def by_hand(model, tokenizer, prompt, answer):
    """Sum of the log-probabilities of an answer's tokens, from all logits, in float64."""
    before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template([*prompt, *answer], return_dict=False)
    whole = whole[: len(whole) - whole[::-1].index(tokenizer.convert_tokens_to_ids("<|im_end|>"))]  # its end is scored
    logits = np.asarray(model.logits(np.array([whole], np.int32))[0], np.float64)
    logps = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    return sum(logps[place - 1, whole[place]] for place in range(len(before), len(whole)))


def test_each_number_is_the_sum_over_its_answers_tokens(folders):
    tokenizer = load_tokenizer(folders / "policy")
    found = score_pairs(folders / "policy", folders / "reference", iter(ROWS), max_length=64)
    models = [load_hf(folders / name) for name in ("policy", "reference")]
    wanted = [
        [by_hand(model, tokenizer, row["prompt"], row[side]) for row in ROWS]
        for model in models
        for side in ("chosen", "rejected")
    ]
    # float32 of about a hundred nats
    np.testing.assert_allclose(np.stack(found), wanted, rtol=1e-5)
    assert all(part.dtype == np.float32 for part in found)
    in_memory = score_pairs(*models, ROWS, tokenizer=tokenizer)
    np.testing.assert_allclose(np.stack(in_memory), wanted, rtol=1e-5)
    assert dpo_loss(*found, beta=0.1).losses.shape == (len(ROWS),)


def test_a_model_is_its_own_reference(folders):
    found = score_pairs(folders / "policy", folders / "policy", ROWS, max_length=64)
    assert (found[0] == found[2]).all() and (found[1] == found[3]).all()


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        ([*ROWS, {"prompt": "a", "chosen": "b"}], {}, r"first: row 6: no 'rejected'"),
        (
            [{"question": "Why?", "good": "yes", "bad": "no"}],
            {},
            r'^row 1: .*write columns=\{"prompt": "question", "chosen": "good", "rejected": "bad"\}',
        ),
        (
            [{"prompt": "Hi", "completion": "yes", "label": True}],
            {},
            "score_pairs: row 1: has one answer; a pair has a",
        ),
        (
            [GOOD, {"prompt": "Hi" * 40, "chosen": "a" * 40, "rejected": "a" * 39 + "b"}],
            {"max_length": 24},
            "leaves nothing",
        ),
        (ROWS, {"max_lenght": 64}, "score_pairs: data.max_lenght: no such setting; did you mean data.max_length"),
        (
            [{**GOOD, "rejected": datetime.date(2024, 1, 1)}],
            {},
            r"fit no layout.*; left out .*: rejected \(first in row 1, of type date",
        ),
        ([], {}, "holds no row"),
    ],
)
def test_rows_whose_numbers_would_not_go_with_them_are_refused(folders, rows, more, said):
    with pytest.raises(UserError, match=said):
        score_pairs(folders / "policy", folders / "reference", rows, **more)


def test_tokens_that_are_cut_are_counted_in_a_warning(folders):
    rows = [GOOD, {"prompt": "Hi" * 20, "chosen": "yes", "rejected": "a" * 39}]
    ids = [[len(load_tokenizer(folders / "policy")(row[side]).input_ids) for side in row] for row in rows]
    policy, length = folders / "policy", 24
    with pytest.warns(UserWarning, match="^score_pairs: max_length=24: ") as caught:
        inspect.unwrap(score_pairs)(policy, policy, rows, max_length=length)
    assert [line.filename for line in caught] == [__file__]
    prompts, answers = re.findall(r"1 of 2 rows lose (\d+) tokens of their (?:prompts|answers)", str(caught[0].message))
    # all but one token of the prompt, and of the answer, with its end, what does not fit beside that
    assert (int(prompts), int(answers)) == (ids[1][0] - 1, ids[1][2] + 1 - (length - 1))
    score_pairs(policy, policy, rows, max_length=1024)  # where a warning would be an error


def test_no_row_is_left_out_whatever_is_set(folders):
    bad = [*ROWS, {"prompt": "a", "chosen": "b"}]
    with pytest.raises(UserError, match="^score_pairs: max_bad_fraction: 0.5: no row may be left out"):
        score_pairs(folders / "policy", folders / "policy", bad, max_bad_fraction=0.5)
    with pytest.raises(UserError, match="1 of 6 rows are bad: .*; correct the rows, or leave them out$"):
        score_pairs(folders / "policy", folders / "policy", bad)
    tied = {"prompt": "a", "completions": ["b", "c"], "scores": [1.0, 1.0]}
    with pytest.raises(UserError, match="score_pairs: 1 rows prefer no answer .first: row 2"):
        score_pairs(folders / "policy", folders / "policy", [{**tied, "scores": [1.0, 2.0]}, tied])


def test_answers_are_those_of_the_command(folders, tmp_path, capsys):
    texts = ["Say 3", "Say 44"]
    found = generate(folders / "policy", texts, max_new_tokens=6)
    asked = write(tmp_path / "asked.jsonl", *({"prompt": [{"role": "user", "content": text}]} for text in texts))
    assert sample.main([str(folders / "policy"), "--prompts", str(asked), "--max-new-tokens", "6", "--json"]) == 0
    assert [line.split('"answer": "')[1].split('", "finished"')[0] for line in capsys.readouterr().out.splitlines()]
    model, tokenizer = load_hf(folders / "policy"), load_tokenizer(folders / "policy")
    assert found == generate(model, texts, tokenizer=tokenizer, max_new_tokens=6)
    assert found[0] == generate(model, texts[0], tokenizer=tokenizer, max_new_tokens=6)
    assert found[0] == generate(model, [{"role": "user", "content": texts[0]}], tokenizer=tokenizer, max_new_tokens=6)
    assert found[0] == generate(model, {"role": "user", "content": texts[0]}, tokenizer=tokenizer, max_new_tokens=6)
    assert found == generate(model, iter(texts), tokenizer=tokenizer, max_new_tokens=6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_tokens": 5}, "max_tokens: no such argument; give max_new_tokens"),
        ({"max_length": 5}, "max_length: no such argument; give max_new_tokens"),
        ({"zzz": 5}, "zzz: no such argument; give temperature, top_p, top_k, max_new_tokens, seed"),
        ({"prompts": {"content": "Say 3"}}, "prompt 1: .*messages with role and content"),
        ({"prompts": None}, "prompts: is of type NoneType; give a text, messages"),
        ({"temperatur": 1.0}, "temperatur: no such argument; give temperature"),
        ({"temperature": 0.0, "top_p": 0.5}, "top_p: greedy decoding draws nothing; give a temperature too"),
        ({"prompts": [3]}, "prompt 1: wrong type"),
        ({"prompts": [""], "chat": False}, "prompt 1"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0: must be at least 1"),
    ],
)
def test_what_cannot_be_asked_is_refused(folders, given, said):
    with pytest.raises(UserError, match=said):
        generate(folders / "policy", **({"prompts": "Say 3"} | given))


def test_parameters_alone_are_no_model():
    with pytest.raises(UserError, match="save_hf: model: is of type dict; give a Model: .*Model[(]spec, params[)]"):
        check_model("save_hf: model", {"embed": 1})
    with pytest.raises(UserError, match="generate: model: is of type int; .* or hub id"):
        check_model("generate: model", 3, folder=True)
    check_model("generate: model", "base", folder=True)
