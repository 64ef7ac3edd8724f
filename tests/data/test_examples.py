"""The same data as pairs, rankings, desirable or not, and chosen alone: what is kept, added and refused."""

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dpo_jax.data.encoded import Encoded
from dpo_jax.data.examples import as_examples, first_completions, ranks
from dpo_jax.errors import UserError
from tests.support.forests import random_encoded

LENGTH = 14
MOST = {"objective": "kto", "max_length": LENGTH}


def entries(encoded: Encoded, kind: str, **changes) -> Encoded:
    return as_examples(encoded, kind, **{**MOST, **changes})


def shuffled(encoded: Encoded, seed: int) -> Encoded:
    """The same units with completions in a random order, so that the best is not the first of them."""
    rng = np.random.default_rng(seed)
    order = np.lexsort((rng.random(encoded.num_completions), encoded.completion_unit))
    place = np.argsort(order).astype(np.int32)
    columns = ("completion_unit", "completion_start", "completion_length", "completion_skip", "truncated", "rank")
    moved = {name: getattr(encoded, name)[order] for name in columns}
    return dataclasses.replace(encoded, chosen=place[encoded.chosen], rejected=place[encoded.rejected], **moved)


def cases(fewest: int = 1) -> st.SearchStrategy:
    """Arguments of `data`: units with so many completions or more, some ranked; some prompts lose their head."""
    counts = st.tuples(st.just(fewest), st.integers(max(fewest, 2), 5))
    flags = {"skips": st.booleans(), "soft": st.booleans()}
    return st.fixed_dictionaries(
        {"units": st.integers(2, 8), "completions": counts, "seed": st.integers(0, 10**6), **flags}
    )


def data(case: dict) -> Encoded:
    return shuffled(random_encoded(**case), case["seed"])


def sound(encoded: Encoded) -> bool:
    """Whether the arrays keep what Encoded promises: all in the order of the units, entries inside their unit."""
    order = np.concatenate([np.diff(encoded.completion_unit), np.diff(encoded.pair_unit)])
    owners = np.stack([encoded.completion_unit[encoded.chosen], encoded.completion_unit[encoded.rejected]])
    spans = [encoded.prompt_span(completion) for completion in range(encoded.num_completions)]
    return (
        (order >= 0).all()
        and (owners == encoded.pair_unit).all()
        and (encoded.completion_length > 0).all()
        and all(length > 0 for _, length in spans)
        and (encoded.completion_start + encoded.completion_length <= len(encoded.tokens)).all()
        and set(encoded.completion_unit.tolist()) == set(range(encoded.num_units))
    )


def texts(encoded: Encoded, completion) -> tuple[list[int], list[int]]:
    return encoded.prompt(int(completion)).tolist(), encoded.completion(int(completion)).tolist()


def same_units(one: Encoded, other: Encoded) -> bool:
    names = ("tokens", "prompt_start", "prompt_length", "file", "line", "files")
    return all(getattr(one, name) is getattr(other, name) for name in names)


# ------------------------------------------------------------------------------------------------ pairs, rankings


@given(cases(fewest=2))
def test_pairs_are_the_data_itself(case):
    encoded = data(case)
    assert entries(encoded, "pairs") is encoded


@given(cases(fewest=2))
def test_a_ranking_is_one_entry_per_unit_and_leaves_the_completions_alone(case):
    encoded = data(case)
    made = entries(encoded, "rankings")
    assert sound(made) and same_units(made, encoded)
    assert made.pair_unit.tolist() == list(range(encoded.num_units))
    for name in ("completion_unit", "completion_start", "completion_length", "completion_skip", "truncated", "rank"):
        assert getattr(made, name) is getattr(encoded, name)
    for unit in range(encoded.num_units):
        mine = np.flatnonzero(encoded.completion_unit == unit)
        pair = int(np.flatnonzero(encoded.pair_unit == unit)[0])
        assert encoded.rank[mine].tolist() == ranks(encoded)[mine].tolist()
        assert sorted(encoded.rank[mine].tolist()) == list(range(len(mine)))
        assert (encoded.rank[made.chosen[unit]], encoded.rank[made.rejected[unit]]) == (0, len(mine) - 1)
        for name in ("weight", "margin", "label"):
            assert getattr(made, name)[unit] == getattr(encoded, name)[pair]


def ranked(*scores: int, drop=()) -> Encoded:
    """One unit whose completions have these scores, with all pairs but those to drop."""
    encoded = random_encoded(units=1, completions=(len(scores), len(scores)))
    better = [(i, j) for i, one in enumerate(scores) for j, other in enumerate(scores) if one > other]
    pairs = np.asarray([pair for pair in better if pair not in drop], np.int32)
    ones = np.ones(len(pairs), np.float32)
    columns = {"pair_unit": np.zeros(len(pairs), np.int32), "weight": ones, "margin": 0 * ones, "label": ones}
    made = dataclasses.replace(encoded, chosen=pairs[:, 0], rejected=pairs[:, 1], **columns)
    return dataclasses.replace(made, rank=ranks(made))


def test_of_equals_the_first_is_the_best_and_the_last_the_worst():
    encoded = ranked(5, 1, 5, 3, 1, 3)
    assert encoded.rank.tolist() == [0, 4, 0, 2, 4, 2]
    made = entries(encoded, "rankings")
    assert (made.chosen.tolist(), made.rejected.tolist()) == ([0], [4])
    made = entries(ranked(1, 5, 3, 5, 1, 3), "rankings")
    assert (made.chosen.tolist(), made.rejected.tolist()) == ([1], [4])


@given(st.lists(st.integers(0, 4), min_size=2, max_size=6).filter(lambda scores: len(set(scores)) > 1))
def test_a_rank_is_the_number_of_better_completions(scores):
    assert ranked(*scores).rank.tolist() == [sum(other > one for other in scores) for one in scores]


@given(st.permutations([0, 1, 2, 3, 4]), st.integers(0, 4), st.integers(0, 4))
def test_a_pair_that_is_left_out_between_others_changes_no_rank(scores, one, other):
    """What lies between two completions still tells which is better; only neighbours become equals."""
    drop = [(one, other), (other, one)]
    whole, partial = ranked(*scores), ranked(*scores, drop=drop)
    assert (partial.rank[partial.chosen] < partial.rank[partial.rejected]).all()
    if abs(scores[one] - scores[other]) != 1:
        assert partial.rank.tolist() == whole.rank.tolist()
    else:
        assert partial.rank[one] == partial.rank[other] == min(whole.rank[one], whole.rank[other])


# ------------------------------------------------------------------------------------------------ unpaired


def whole_prompt(encoded: Encoded, unit: int) -> list[int]:
    start = int(encoded.prompt_start[unit])
    return encoded.tokens[start : start + int(encoded.prompt_length[unit])].tolist()


def lender(encoded: Encoded, unit: int) -> int:
    """The next unit, round in a circle, with another prompt."""
    others = [(unit + step) % encoded.num_units for step in range(1, encoded.num_units)]
    return next(other for other in others if whole_prompt(encoded, other) != whole_prompt(encoded, unit))


@pytest.mark.parametrize(
    ("prompts", "partners"),
    [([0, 0, 1, 1, 1, 2], [2, 2, 5, 5, 5, 0]), ([0, 1, 1, 0], [1, 3, 3, 1]), ([0, 0, 1], [2, 2, 0])],
)
def test_rows_of_one_prompt_borrow_from_the_next_prompt(prompts, partners):
    """KTO's files have a prompt's answers one below the other."""
    encoded = random_encoded(units=len(prompts), completions=(1, 1), seed=1)
    spans = {name: getattr(encoded, name)[prompts] for name in ("prompt_start", "prompt_length")}
    encoded = dataclasses.replace(encoded, **spans)
    made = entries(encoded, "unpaired", max_length=1000)
    mismatched = [
        made.completion(int(made.rejected[made.pair_unit == unit][0])).tolist() for unit in range(len(prompts))
    ]
    assert mismatched == [encoded.completion(unit).tolist() for unit in partners]
    with pytest.raises(UserError, match="all 3 rows have the same; give rows with at least 2 prompts"):
        same = {name: getattr(encoded, name)[[0, 0, 0]] for name in ("prompt_start", "prompt_length")}
        entries(dataclasses.replace(random_encoded(units=3, completions=(1, 1), seed=1), **same), "unpaired")


@settings(max_examples=200)
@given(cases(), st.integers(2, 20))
def test_unpaired_entries_keep_their_completion_and_get_one_of_the_next_prompt(case, most):
    encoded = data(case)
    made = entries(encoded, "unpaired", max_length=most)
    assert sound(made) and same_units(made, encoded)
    assert made.num_completions == encoded.num_completions + encoded.num_units
    assert (made.num_units, made.num_pairs) == (encoded.num_units, 2 * encoded.num_pairs - encoded.single.sum())
    wanted = []
    for pair in range(encoded.num_pairs):
        label, rest = encoded.label[pair], (encoded.weight[pair], encoded.margin[pair], encoded.pair_unit[pair])
        wanted.append((texts(encoded, encoded.chosen[pair]), label, *rest))
        if not encoded.single[pair]:
            wanted.append((texts(encoded, encoded.rejected[pair]), 1 - label, *rest))
    columns = (made.label, made.weight, made.margin, made.pair_unit)
    assert [(texts(made, made.chosen[e]), *(c[e] for c in columns)) for e in range(made.num_pairs)] == wanted
    first = first_completions(encoded)
    for unit in range(encoded.num_units):
        foreign = int(np.flatnonzero(made.completion_unit == unit)[-1])
        assert set(made.rejected[made.pair_unit == unit].tolist()) == {foreign}
        assert foreign not in made.chosen
        prompt, completion = texts(made, foreign)
        whole = encoded.completion(int(first[lender(encoded, unit)])).tolist()
        assert prompt == encoded.prompt(int(first[unit])).tolist()
        assert completion == whole[: max(1, most - len(prompt))]
        assert made.truncated[foreign] >= (len(completion) < len(whole) or made.completion_skip[foreign] > 0)
        assert made.rank[foreign] == 0


@given(cases())
def test_the_completions_that_were_there_stay_as_they_are_in_their_order(case):
    encoded = data(case)
    prompts = {tuple(encoded.prompt(number).tolist()) for number in first_completions(encoded)[:-1].tolist()}
    assume(len(prompts) > 1)  # or there is none to take a completion of
    made = entries(encoded, "unpaired")
    foreign = np.zeros(made.num_completions, bool)
    foreign[made.rejected] = True
    for name in ("completion_unit", "completion_start", "completion_length", "completion_skip", "truncated", "rank"):
        np.testing.assert_array_equal(getattr(made, name)[~foreign], getattr(encoded, name))
        assert getattr(made, name).dtype == getattr(encoded, name).dtype


def test_where_nothing_is_left_of_a_prompt_the_foreign_completion_is_read_after_its_last_token():
    encoded = random_encoded(units=2, seed=4)
    gone = encoded.prompt_length[encoded.completion_unit]
    length = encoded.completion_length - 1 + (encoded.completion_length == 1)
    encoded = dataclasses.replace(
        encoded, completion_skip=gone, completion_start=encoded.completion_start + 1, completion_length=length
    )
    made = entries(encoded, "unpaired")
    for unit, foreign in enumerate(np.unique(made.rejected).tolist()):
        whole = encoded.tokens[encoded.prompt_start[unit] :][: encoded.prompt_length[unit]]
        assert made.prompt(foreign).tolist() == whole[-1:].tolist()


def test_a_foreign_completion_is_truncated_where_it_is_so_at_home():
    encoded = random_encoded(units=3)
    cut = np.asarray([False, False, True, False, False, False])
    made = entries(dataclasses.replace(encoded, truncated=cut), "unpaired", max_length=1000)
    assert made.truncated[np.unique(made.rejected)].tolist() == [True, False, False]


def test_labels_of_one_sort_are_enough_but_one_prompt_is_not():
    encoded = random_encoded(units=3, completions=(1, 1))
    for label in (0, 1):
        made = entries(dataclasses.replace(encoded, label=np.full(3, label, np.float32)), "unpaired")
        assert made.label.tolist() == [label] * 3
    with pytest.raises(
        UserError, match=r"^objective.name=kto .* all 1 rows have the same; give rows with at least 2 prompts$"
    ):
        entries(random_encoded(units=1), "unpaired")


def test_a_hundred_thousand_units_are_no_trouble():
    encoded = random_encoded(units=2000, completions=(1, 4))
    many = repeated(encoded, 50)
    assert many.num_units == 100_000 and sound(encoded)
    assert ranks(many).tolist() == many.rank.tolist()
    assert entries(many, "unpaired").num_completions == many.num_completions + 100_000


def repeated(encoded: Encoded, times: int) -> Encoded:
    """The units so many times over, all of them of the same tokens."""
    steps = {"completion_unit": encoded.num_units, "pair_unit": encoded.num_units}
    steps |= {"chosen": encoded.num_completions, "rejected": encoded.num_completions}
    columns = {}
    for field in dataclasses.fields(Encoded):
        if field.name not in ("tokens", "files"):
            column = getattr(encoded, field.name)
            copies = [column + number * steps.get(field.name, 0) for number in range(times)]
            columns[field.name] = np.concatenate(copies).astype(column.dtype)
    return dataclasses.replace(encoded, **columns)


# ------------------------------------------------------------------------------------------------ chosen


@given(cases())
def test_chosen_keeps_what_an_entry_prefers_and_nothing_else(case):
    encoded = data(case)
    label = np.where(encoded.single, 1, encoded.label * (encoded.label > 0.5))  # 0 refuses completions, never pairs
    encoded = dataclasses.replace(encoded, label=label.astype(np.float32))
    made = entries(encoded, "chosen", objective="sft")
    assert sound(made) and same_units(made, encoded)
    for name in ("pair_unit", "weight", "margin", "label"):
        assert getattr(made, name) is getattr(encoded, name)
    assert made.single.all() and made.num_completions == len(set(encoded.chosen.tolist()))
    for entry in range(encoded.num_pairs):
        before, after = int(encoded.chosen[entry]), int(made.chosen[entry])
        assert texts(made, after) == texts(encoded, before)
        assert made.rank[after] == encoded.rank[before] and made.truncated[after] == encoded.truncated[before]
    assert sorted(set(made.chosen.tolist())) == list(range(made.num_completions))


# ------------------------------------------------------------------------------------------------ refusals


def mixed() -> Encoded:
    """Pairs, and in rows 3 and 4 single completions, the second one undesirable."""
    encoded = random_encoded(units=4, completions=(2, 2))
    alone = encoded.pair_unit >= 2
    rejected = np.where(alone, encoded.chosen, encoded.rejected)
    label = np.where(encoded.pair_unit == 3, 0, 1).astype(np.float32)
    kept = np.isin(np.arange(encoded.num_completions), [encoded.chosen, rejected])
    number = (np.cumsum(kept) - 1).astype(np.int32)
    names = ("completion_unit", "completion_start", "completion_length", "completion_skip", "truncated", "rank")
    columns = {name: getattr(encoded, name)[kept] for name in names}
    return dataclasses.replace(
        encoded, chosen=number[encoded.chosen], rejected=number[rejected], label=label, files=("a\nb.jsonl",), **columns
    )


@pytest.mark.parametrize(
    ("kind", "objective", "line", "remedy"),
    [
        ("pairs", "sigmoid", 3, "use objective.name=kto"),
        ("rankings", "plackett_luce", 3, "use objective.name=kto"),
        ("chosen", "sft", 4, "use objective.name=kto, or leave such rows out"),
    ],
)
def test_rows_that_an_objective_cannot_use_are_refused_by_name(kind, objective, line, remedy):
    with pytest.raises(UserError) as caught:
        entries(mixed(), kind, objective=objective)
    message = str(caught.value)
    assert message.startswith(f"objective.name={objective} ") and message.endswith(remedy)
    assert rf" a\nb.jsonl:{line} " in message and "\n" not in message


def test_the_row_that_is_named_is_the_first_of_the_file_whatever_the_order():
    encoded = mixed()
    turned = dataclasses.replace(encoded, line=encoded.line[::-1].copy(), label=np.ones_like(encoded.label))
    with pytest.raises(UserError) as caught:
        entries(turned, "pairs", objective="sigmoid")
    assert rf" a\nb.jsonl:{turned.line[2:].min()} " in str(caught.value)
    assert str(caught.value).endswith("use objective.name=sft")  # nothing says that a row has a label
    assert turned.first_origin(np.arange(encoded.num_pairs)) == r"a\nb.jsonl:1"


def test_a_kind_that_there_is_not_is_an_error():
    with pytest.raises(ValueError, match="kind='ranking'; one of pairs, rankings, unpaired, chosen"):
        entries(random_encoded(), "ranking")


def test_every_kind_of_entry_that_an_objective_wants_is_known():
    from dpo_jax.objectives.table import OBJECTIVES

    for kind in {row.data for row in OBJECTIVES.values()}:
        assert sound(entries(random_encoded(completions=(2, 3)), kind))
