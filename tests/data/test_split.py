"""Held-out prompts: none is on both sides in any layout, and which side one is on depends on nothing but it and the
seed."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.data.encode import collect
from dpo_jax.data.encoded import Encoded, of_units
from dpo_jax.data.split import held_out_units, prompts, shared_line, split
from dpo_jax.errors import UserError
from tests.support.encoding import assert_equal, encoded_rows
from tests.support.encoding import settings as settings_of
from tests.support.forests import random_encoded
from tests.support.tiny_rows import assistant, byte_tokenizer, user, write

MERGED = byte_tokenizer(merges=(("o", "k"), ("a", "b")))  # so that the last letter of a prompt may join the answer


def question(number: int) -> str:
    return f"Say {'ab' * (number % 3)}{number}o"


def messages(number: int) -> list[dict]:
    return [user(question(number))]


def answers(other: int) -> tuple[str, str]:
    return f"{'k' * (other % 2)} yes {other}", f" no {other}"  # a k joins the o that ends the question


def chats(other: int) -> tuple[list, list]:
    return tuple([assistant(text)] for text in answers(other))


def ids(text: str) -> list[int]:
    return [30 + ord(letter) % 90 for letter in text]


LAYOUTS = {  # a row that asks `number`, and whose answers say `other`
    "pair": lambda n, o: {"prompt": question(n), **dict(zip(("chosen", "rejected"), answers(o), strict=True))},
    "pair of messages": lambda n, o: {
        "prompt": messages(n),
        **dict(zip(("chosen", "rejected"), chats(o), strict=True)),
    },
    "implicit": lambda n, o: {
        name: f"\n\nHuman: {question(n)}\n\nAssistant:{text}"
        for name, text in zip(("chosen", "rejected"), answers(o), strict=True)
    },
    "sharegpt": lambda n, o: {
        "conversations": [{"from": "human", "value": question(n)}],
        **{name: {"from": "gpt", "value": text} for name, text in zip(("chosen", "rejected"), answers(o), strict=True)},
    },
    "openai": lambda n, o: {
        "input": {"messages": messages(n)},
        **dict(zip(("preferred_output", "non_preferred_output"), chats(o), strict=True)),
    },
    "tokenized": lambda n, o: {
        "prompt_ids": ids(question(n)),
        **{f"{name}_ids": ids(text) for name, text in zip(("chosen", "rejected"), answers(o), strict=True)},
    },
    "ranked": lambda n, o: {"prompt": question(n), "completions": [*answers(o), f" so {o}"], "ranks": [1, 3, 2]},
    "unpaired": lambda n, o: {"prompt": question(n), "completion": answers(o)[o % 2], "label": o % 2 == 0},
    "completion": lambda n, o: {"prompt": messages(n), "completion": chats(o)[0]},
    "messages": lambda n, o: {"messages": messages(n) + chats(o)[0]},
}


def rows_of(layout: str, count: int = 40, times: int = 2) -> tuple[list[dict], np.ndarray]:
    """Each of `count` prompts several times with other answers, mixed; and which prompt each row asks."""
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(count), times))
    return [LAYOUTS[layout](int(number), place) for place, number in enumerate(order)], order


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_prompt_is_on_both_sides(tmp_path, layout):
    rows, numbers = rows_of(layout)
    encoded, report = encoded_rows(tmp_path, MERGED, *rows)
    assert report.kept == len(rows), report.lines()
    parts = split(encoded, 0.3, seed=1)
    sides = [set(numbers[part.line - 1].tolist()) for part in parts]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == set(range(40))
    assert sum(part.num_pairs for part in parts) == encoded.num_pairs
    assert sum(part.num_units for part in parts) == encoded.num_units
    assert 2 <= len(sides[1]) <= 24  # 12 of 40 are wanted, with a standard deviation of 2.9
    assert [count["prompts"] for count in parts.counts().values()] == [len(side) for side in sides]
    for part in parts:
        for one in (0, part.num_pairs - 1):
            unit = int(part.pair_unit[one])
            (old,) = np.flatnonzero(encoded.line == part.line[unit])
            mine, its = (np.flatnonzero(data.completion_unit == u) for data, u in ((part, unit), (encoded, old)))
            for here, there in zip(mine.tolist(), its.tolist(), strict=True):
                assert (part.prompt(here) == encoded.prompt(there)).all()
                assert (part.completion(here) == encoded.completion(there)).all()
                for cut, whole in zip(part.cut(here), encoded.cut(there), strict=True):
                    assert (cut == whole).all()


def test_the_last_token_of_a_prompt_may_reach_into_an_answer_and_it_is_the_same_prompt(tmp_path):
    rows = [{"prompt": "Say o", "chosen": end, "rejected": "no"} for end in ("k", "x")]
    encoded, _ = encoded_rows(tmp_path, MERGED, *rows)
    assert len(set(encoded.ids_key.tolist())) == 2 and len(set(encoded.content_key.tolist())) == 1
    assert len(set(prompts(encoded).tolist())) == 1


def test_what_is_cut_of_a_prompt_does_not_make_it_another(tmp_path):
    """The longer an answer, the more of the prompt goes; in which order what goes is kept depends on it as well."""
    turns = [user("first " * 9), assistant("ok"), user("second " * 5)]
    rows = [{"prompt": turns, "chosen": [assistant("y" * size)], "rejected": [assistant("n")]} for size in (3, 30, 50)]
    for row in rows:
        row["prompt"] = list(turns)
    encoded, _ = encoded_rows(tmp_path, MERGED, *rows, max_length=100)
    assert len({encoded.prompt(int(first)).tobytes() for first in encoded.chosen}) > 1
    assert len(set(prompts(encoded).tolist())) == 1


def test_the_same_token_ids_are_one_prompt_in_whatever_form_they_came(tmp_path):
    text = encoded_rows(tmp_path, MERGED, {"prompt": "Say a", "chosen": " x", "rejected": " y"})[0]
    raw = {"prompt_ids": text.prompt(0).tolist(), "chosen_ids": [40], "rejected_ids": [41]}
    tokens = encoded_rows(tmp_path, MERGED, raw)[0]
    assert text.content_key != tokens.content_key and text.ids_key == tokens.ids_key
    assert "1 of 1 prompts are also in data.train" in shared_line("data.eval", tokens, text)


def with_keys(content: list[int], tokens: list[int]) -> Encoded:
    """Units whose prompts have these keys and nothing else that matters."""
    encoded = random_encoded(units=len(content))
    keys = (np.asarray(part, np.int64) for part in (content, tokens))
    return dataclasses.replace(encoded, **dict(zip(("content_key", "ids_key"), keys, strict=True)))


KEYS = st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=1, max_size=12)


def linked(pairs: list[tuple[int, int]]) -> list[set[int]]:
    """Units that share a key, or are linked by others that do: the slow way."""
    groups: list[set[int]] = []
    for unit, (content, tokens) in enumerate(pairs):
        near = [g for g in groups if any(pairs[u][0] == content or pairs[u][1] == tokens for u in g)]
        groups = [g for g in groups if g not in near] + [{unit}.union(*near)]
    return groups


@settings(deadline=None, max_examples=40)
@given(KEYS)
def test_prompts_are_what_is_linked_by_content_or_ids(pairs):
    numbers = prompts(with_keys([a for a, _ in pairs], [b for _, b in pairs])).tolist()
    found = {frozenset(u for u, n in enumerate(numbers) if n == number) for number in numbers}
    assert found == set(map(frozenset, linked(pairs)))
    assert all(number == min(pairs[u][0] for u in group) for group in found for number in {numbers[min(group)]})


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.95), st.randoms())
def test_the_side_of_a_prompt_depends_on_it_and_the_seed_alone(seed, fraction, random):
    keys = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 400).tolist()
    whole = held_out_units(with_keys(keys, keys), fraction, seed)
    some = random.sample(range(400), 50)
    assert (
        held_out_units(with_keys([keys[i] for i in some], [keys[i] for i in some]), fraction, seed) == whole[some]
    ).all()
    more = held_out_units(with_keys(keys, keys), fraction / 2, seed)
    assert not (more & ~whole).any()  # a smaller share is a part of the larger one
    # of 400 draws; five standard deviations
    assert abs(whole.mean() - fraction) < 5 * np.sqrt(fraction * (1 - fraction) / 400) + 0.005


def test_another_seed_holds_out_others():
    keys = list(range(300))
    one, other = (held_out_units(with_keys(keys, keys), 0.5, seed) for seed in (0, 1))
    assert 0.3 < (one == other).mean() < 0.7


def test_a_share_that_leaves_one_side_empty_is_refused(tmp_path):
    encoded, _ = encoded_rows(tmp_path, MERGED, *rows_of("pair", 3)[0])
    with pytest.raises(
        UserError, match=r"eval_fraction: 1e-06: holds out none of the 3 prompts of data.train; raise it"
    ):
        split(encoded, 1e-6, 0)
    with pytest.raises(UserError, match="holds out all of the 3 prompts of data.train; lower it"):
        split(encoded, 1 - 1e-6, 0)


def test_single_completions_are_not_called_pairs(tmp_path):
    single = [{"prompt": f"Say {n}", "completion": "c", "label": n % 2} for n in range(20)]
    parts = split(encoded_rows(tmp_path, byte_tokenizer(), *single)[0], 0.3, seed=1)
    (stay, held) = (count["prompts"] for count in parts.counts().values())
    assert parts.counts()["train"] == {"prompts": stay, "pairs": 0, "singles": stay}
    said = [f"{count} prompts ({count} single completions)" for count in (held, stay)]
    assert parts.line() == f"held out by prompt: {said[0]}; for training: {said[1]}"
    several = [*single, *({"prompt": f"Ask {n}", "chosen": "a", "rejected": "b"} for n in range(20))]
    files = [str(write(tmp_path / f"{name}.jsonl", *rows)) for name, rows in (("a", single), ("b", several[20:]))]
    parts = split(collect(files, byte_tokenizer(), settings_of())[0], 0.5, seed=1)
    assert parts.counts()["train"]["pairs"] and f"({parts.counts()['held_out']['pairs']} pairs, " in parts.line()


@pytest.mark.parametrize("layout", ["pair", "ranked", "unpaired"])
def test_the_part_is_as_if_nothing_else_had_been_read(tmp_path, layout):
    rows, _ = rows_of(layout, 8)
    whole, report = encoded_rows(tmp_path, MERGED, *rows, max_length=30)
    kept = whole.line % 3 == 1
    alone, _ = encoded_rows(
        tmp_path, MERGED, *(row for place, row in enumerate(rows, 1) if place % 3 == 1), max_length=30
    )
    part = of_units(whole, kept)
    same = dataclasses.replace(part, line=alone.line)  # which stand elsewhere in their file
    assert_equal((same, report), (alone, report))
