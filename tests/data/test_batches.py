"""A step is exactly N pairs, whatever the packing; nothing is lost, moved or mixed on the way into the arrays."""

import dataclasses
import itertools
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.data import batches as batches_module
from dpo_jax.data.batches import Batches, pair_tokens, prefetch
from dpo_jax.data.examples import as_examples
from dpo_jax.data.packing import Lengths, RowGroups, RowShape, balance, choose_shapes, fits, pack, plan
from tests.support.first_fit import balanced, first_fit
from tests.support.forests import random_encoded


def completions_of(batch, encoded):
    """What a reader of the arrays finds: (tokens before and of each scored completion, by completion id)."""
    found = {}
    for micro in range(int(batch.micro_batches)):
        for shard in range(batch.tokens.shape[1]):
            part = [
                getattr(batch, name)[micro, shard].reshape(-1) for name in ("tokens", "group", "branch", "position")
            ]
            tokens, group, branch, position = part
            row = np.repeat(np.arange(batch.tokens.shape[2]), batch.tokens.shape[3])
            for line in batch.group[micro, shard]:
                assert np.unique(line[line > 0]).tolist() == list(range(1, line.max() + 1))
            ids = batch.ids[micro, shard]
            for local in np.flatnonzero(ids >= 0):
                mine = np.flatnonzero(batch.completion[micro, shard] == local)
                sources, targets = batch.source[micro, shard, mine], batch.target[micro, shard, mine]
                order = np.argsort(position[sources])
                last = sources[order[-1]]
                seen = [
                    s
                    for s in range(last + 1)
                    if group[s] == group[last] and row[s] == row[last] and (branch[s] == 0 or branch[s] == branch[last])
                ]
                assert [position[s] for s in seen] == list(range(len(seen)))  # the text's own positions, unbroken
                text = [int(tokens[s]) for s in seen] + [int(targets[order[-1]])]
                assert batch.lengths[micro, shard, local] == len(mine)
                found[int(ids[local])] = (text, [int(t) for t in targets[order]])
    return found


def arrays_of(batch):
    return tuple(vars(batch).values())


def shapes_of(batch):
    return tuple(array.shape for array in arrays_of(batch))


def pairs_in(batch):
    real = batch.real
    micro, shard, _ = np.nonzero(real)
    chosen, rejected = batch.ids[micro, shard, batch.chosen[real]], batch.ids[micro, shard, batch.rejected[real]]
    return sorted(
        zip(chosen.tolist(), rejected.tolist(), batch.weight[real].tolist(), batch.margin[real].tolist(), strict=True)
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 4]), st.booleans(), st.sampled_from([None, 32, 64]), st.booleans())
def test_arrays_hold_exactly_the_steps_pairs_and_their_texts(seed, shards, share, micro_tokens, skips):
    encoded = random_encoded(seed=seed, completions=(2, 4), skips=skips)
    batches = Batches(encoded, 5, shards, 4, seed=seed % 7, share_prompts=share, micro_tokens=micro_tokens)
    for step in range(4):
        batch = batches.at(step)
        wanted = batches.pairs_of(step)
        assert int(batch.micro_batches) == 1 + np.nonzero(batch.real)[0].max()  # those in use hold all that is real
        assert pairs_in(batch) == sorted(
            (int(encoded.chosen[p]), int(encoded.rejected[p]), float(encoded.weight[p]), float(encoded.margin[p]))
            for p in wanted
        )
        for completion, (text, scored) in completions_of(batch, encoded).items():
            assert text == [*encoded.prompt(completion), *encoded.completion(completion)]
            assert scored == encoded.completion(completion).tolist()


@pytest.mark.parametrize("kind", ["pairs", "rankings", "sweep"])
@pytest.mark.parametrize("own", [(0, 1, 2, 3), (0, 1), (1, 3), (2,)])
def test_a_process_makes_exactly_its_own_shards_of_the_whole_batch(kind, own):
    encoded = random_encoded(units=17, completions=(2, 4), seed=5)
    reference = np.random.default_rng(0).normal(size=encoded.num_scored).astype(np.float32)
    batches = Batches(encoded, 6, 4, 5, micro_tokens=64, reference=reference, rankings=kind == "rankings")
    if kind == "sweep":
        batches = batches.sweep()
    mine = dataclasses.replace(batches, own=own)
    for step in range(batches.steps):
        whole, part = batches.at(step), mine.at(step)
        for field in dataclasses.fields(whole):
            wanted, found = (np.asarray(getattr(batch, field.name)) for batch in (whole, part))
            np.testing.assert_array_equal(found, wanted[:, own] if wanted.ndim else wanted, field.name)


def test_a_dummy_takes_no_memory_and_has_the_shapes_of_the_steps():
    def arrays(batch):
        return [np.asarray(getattr(batch, field.name)) for field in dataclasses.fields(batch)]

    batches = Batches(random_encoded(units=17), 6, 4, 5, micro_tokens=64, own=(1,))
    every = dataclasses.replace(batches, own=None)
    found = {tuple(array.shape for array in arrays(dummy)) for dummy in batches.dummies()}
    assert found == {tuple(array.shape for array in arrays(every.at(step))) for step in range(5)}
    for array in itertools.chain.from_iterable(map(arrays, batches.dummies())):
        assert not any(stride for stride, size in zip(array.strides, array.shape, strict=True) if size > 1)


def test_the_order_is_a_function_of_seed_and_step_and_visits_every_pair_once_an_epoch():
    encoded = random_encoded(units=10)
    one, other, third = (Batches(encoded, 5, 1, 8, seed=seed) for seed in (3, 3, 4))
    assert all((one.pairs_of(s) == other.pairs_of(s)).all() for s in (7, 0, 3))
    assert any((one.pairs_of(s) != third.pairs_of(s)).any() for s in range(2))
    for epoch in range(4):
        assert sorted(np.concatenate([one.pairs_of(2 * epoch), one.pairs_of(2 * epoch + 1)])) == list(range(10))
    assert any((one.pairs_of(s) != one.pairs_of(s + 2)).any() for s in range(2))  # a new order in each epoch


def test_a_sweep_takes_units_of_like_length_together():
    encoded = random_encoded(units=40, completions=(1, 4))
    swept = Batches(encoded, 5, 1, 1).sweep()
    pairs = np.concatenate([swept.pairs_of(step) for step in range(swept.steps)])
    texts = np.add.reduceat(encoded.completion_length, np.unique(encoded.completion_unit, return_index=True)[1])
    slots = (encoded.prompt_length + texts)[encoded.pair_unit[pairs]]
    assert sorted(pairs) == list(range(encoded.num_pairs)) and (np.diff(slots) <= 0).all() and slots[0] > slots[-1]


@pytest.mark.parametrize("skips", [False, True])
def test_tokens_of_a_pair_are_those_of_both_texts_and_of_a_single_one_its_own(skips):
    encoded = random_encoded(units=9, completions=(1, 3), skips=skips)
    sizes = [len(encoded.prompt(c)) + len(encoded.completion(c)) for c in range(encoded.num_completions)]
    wanted = [sizes[c] + sizes[r] * (c != r) for c, r in zip(encoded.chosen, encoded.rejected, strict=True)]
    assert pair_tokens(encoded).tolist() == wanted


@pytest.mark.parametrize("order", ["shuffled", "file"])
def test_a_total_over_the_first_steps_is_the_sum_over_their_pairs(order):
    encoded = random_encoded(units=7)
    batches, values = Batches(encoded, 3, 1, 9, order=order), np.arange(encoded.num_pairs) ** 2
    for step in range(9):
        assert batches.total_before(step, values) == sum(int(values[batches.pairs_of(s)].sum()) for s in range(step))


def test_packing_never_moves_a_pair_to_another_step():
    encoded = random_encoded(units=12, completions=(2, 3))
    packings = [Batches(encoded, 4, d, 5, micro_tokens=m) for d, m in ((1, None), (2, 32), (4, 64))]
    for step in range(5):
        assert len({tuple(batches.pairs_of(step)) for batches in packings}) == 1


def test_a_sweep_holds_every_pair_once_also_in_its_short_last_batch():
    encoded = random_encoded(units=11)
    sweep = Batches(encoded, 4, 2, 1).sweep()
    assert sweep.steps == 3
    seen = [pair for step in range(sweep.steps) for pair in pairs_in(sweep.at(step))]
    assert sorted(pair[:2] for pair in seen) == sorted(
        zip(encoded.chosen.tolist(), encoded.rejected.tolist(), strict=True)
    )


def test_every_step_has_one_of_the_announced_shapes():
    encoded = random_encoded(units=60, longest=40)
    batches = Batches(encoded, 6, 2, 30)
    announced = {shapes_of(dummy) for dummy in batches.dummies()}
    assert {shapes_of(batches.at(step)) for step in range(30)} <= announced
    assert len(announced) <= 4


def test_no_more_than_two_orders_are_in_memory_however_many_epochs_there_are():
    """With 10^8 pairs each takes hundreds of megabytes; a step may lie in two epochs."""
    batches = Batches(random_encoded(units=7), 5, 1, 30)
    orders = [batches.pairs_of(step) for step in range(30)]
    assert len(batches._orders) <= 2
    assert [batches.pairs_of(step).tolist() for step in range(30)] == [order.tolist() for order in orders]


def test_no_shape_is_announced_in_which_no_step_of_a_short_run_comes():
    batches = Batches(random_encoded(units=40, longest=40, seed=1), 2, 2, 4)
    announced = [shapes_of(dummy) for dummy in batches.dummies()]
    assert sorted(announced) == sorted({shapes_of(batches.at(step)) for step in range(4)})
    assert len(announced) < len(batches.shapes)


def test_reference_log_probabilities_go_where_their_token_is():
    encoded = random_encoded(completions=(2, 3))
    reference = -np.arange(encoded.num_scored, dtype=np.float32)
    batch = Batches(encoded, 5, 2, 1, reference=reference).at(0)
    for micro, shard, local in zip(*np.nonzero(batch.ids >= 0), strict=True):
        mine = batch.completion[micro, shard] == local
        first = encoded.scored_start[batch.ids[micro, shard, local]]
        np.testing.assert_array_equal(batch.reference[micro, shard, mine], -np.arange(first, first + mine.sum()))


def test_the_last_slot_of_a_completion_holds_its_last_token():
    encoded = random_encoded(completions=(2, 3))
    for share in (True, False):
        batch = Batches(encoded, 5, 2, 1, share_prompts=share).at(0)
        for micro, shard, local in zip(*np.nonzero(batch.ids >= 0), strict=True):
            tokens = batch.tokens[micro, shard].reshape(-1)
            assert (
                tokens[batch.last[micro, shard, local]] == encoded.completion(int(batch.ids[micro, shard, local]))[-1]
            )


def test_rankings_hold_all_completions_of_their_prompt_with_their_ranks():
    encoded = random_encoded(units=12, completions=(2, 4))
    whole = as_examples(encoded, "rankings", objective="plackett_luce", max_length=64)
    batches = Batches(whole, 5, 2, 1, rankings=True)
    batch = batches.at(0)
    found = []
    for micro, shard, pair in zip(*np.nonzero(batch.real), strict=True):
        there = batch.rank[micro, shard, pair] >= 0
        ids = batch.ids[micro, shard, batch.ranked[micro, shard, pair, there]]
        (unit,) = set(whole.completion_unit[ids].tolist())
        assert ids.tolist() == list(batches.completions_of(unit))
        np.testing.assert_array_equal(batch.rank[micro, shard, pair, there], whole.rank[ids])
        found.append(unit)
    assert sorted(found) == sorted(whole.pair_unit[batches.pairs_of(0)].tolist())


def test_noise_belongs_to_the_pair_and_not_to_its_place():
    encoded = random_encoded(units=12, completions=(2, 3))
    tables = []
    for shards, tokens in ((1, None), (2, 32), (4, 64)):
        batch = Batches(encoded, 8, shards, 3, micro_tokens=tokens).at(2)
        micro, shard, _ = np.nonzero(batch.real)
        chosen, rejected = (batch.ids[micro, shard, ids[batch.real]].tolist() for ids in (batch.chosen, batch.rejected))
        keys = zip(chosen, rejected, strict=True)
        tables.append(dict(zip(keys, batch.noise[batch.real].tolist(), strict=True)))
    assert tables[0] == tables[1] == tables[2] and len(set(tables[0].values())) == 8
    other = Batches(encoded, 8, 1, 3).at(1)
    assert not set(other.noise[other.real].tolist()) & set(tables[0].values())


def lengths_of(bundles):
    """Bundles, as (trees, scored tokens), in arrays."""
    first = np.cumsum([0, *(len(trees) for trees, _ in bundles)])
    trees = np.asarray([tree for trees, _ in bundles for tree in trees], np.int32)
    return Lengths(trees, first, np.asarray([scored for _, scored in bundles], np.int64))


def random_steps(seed, most_trees):
    """Bundles, and steps that each hold some of them."""
    rng = np.random.default_rng(seed)
    bundles = []
    for _ in range(60):
        trees = rng.integers(1, 40, rng.integers(1, most_trees + 1)).tolist()
        bundles.append((trees, int(rng.integers(1, sum(trees) + 1))))
    steps = np.full((5, 12), -1)
    for step in steps:
        count = rng.integers(1, 13)
        step[:count] = rng.permutation(60)[:count]
    return bundles, steps


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([32, 48, 96]),
    st.booleans(),
)
def test_steps_packed_together_lie_as_each_does_by_itself(seed, most_trees, shards, rows, length, tight):
    bundles, steps = random_steps(seed, most_trees)
    shape = RowShape(rows, length, 48 if tight else rows * length)
    split = balance(lengths_of(bundles), steps, shards)
    packed = pack(split, shape)
    for number, step in enumerate(steps):
        mine = step[step >= 0].tolist()
        parts = balanced([sum(bundles[bundle][0]) for bundle in mine], shards)
        wanted = [first_fit([bundles[b] for b in mine], part, rows, length, shape.scored) for part in parts]
        assert packed.fits[number] == (None not in wanted)
        assert packed.fits[number] == all(fits(RowGroups(tuple(bundles[b][0]), bundles[b][1]), shape) for b in mine)
        for device, (part, places) in enumerate(zip(parts, wanted, strict=True)):
            there = split.bundles[number, device]
            assert there[there >= 0].tolist() == [mine[bundle] for bundle in part]
            if packed.fits[number]:
                for at, (bundle, micro, row, start) in enumerate(places):
                    size = len(bundles[mine[bundle]][0])
                    assert packed.micro[number, device, at] == micro
                    assert packed.row[number, device, at, :size].tolist() == row
                    assert packed.start[number, device, at, :size].tolist() == start
        if packed.fits[number]:
            most = max(micro for places in wanted for _, micro, _, _ in places)
            assert packed.micro_batches[number] == most + 1


def test_a_step_takes_the_shape_that_costs_least():
    bundles = [([30], 10), ([30], 10), ([90], 10)]
    lengths, shapes = lengths_of(bundles), (RowShape(1, 96, 96), RowShape(1, 64, 64), RowShape(2, 32, 64))
    plans = plan(lengths, np.asarray([[0, 1, -1], [0, 1, 2]]), 1, shapes, 8192)
    assert [found.shape for found in plans] == [shapes[2], shapes[0]]
    assert [found.bundle.tolist() for found in plans] == [[0, 1], [2, 0, 1]]


def test_shapes_leave_room_for_the_scored_tokens_of_their_fullest_micro_batch():
    """With less, the sample steps would not lie as they did when the shape's cost was found."""
    bundles, steps = random_steps(3, 2)
    lengths, largest = lengths_of(bundles), RowGroups((40, 40), 80)
    chosen = choose_shapes(lengths, steps, largest, 2, micro_tokens=None, attention_length=8192, most=4)
    assert fits(largest, chosen[0])
    for shape in chosen:
        packed, roomy = (
            pack(balance(lengths, steps, 2), s)
            for s in (shape, RowShape(shape.rows, shape.length, shape.rows * shape.length))
        )
        assert (packed.fits == roomy.fits).all() and (packed.micro == roomy.micro)[packed.fits].all()


def test_the_first_shape_holds_a_bundle_that_no_sample_step_has():
    lengths, largest = lengths_of([([96], 5)] * 8), RowGroups((96,), 90)
    for micro_tokens in (None, 128):
        found = choose_shapes(
            lengths, np.arange(8).reshape(4, 2), largest, 2, micro_tokens=micro_tokens, attention_length=8192, most=4
        )
        assert fits(largest, found[0])


def test_the_longest_trees_of_a_bundle_are_placed_first():
    """44 + 20 and 40 + 24 share two rows of 64; as they come, 44 would find none of them free."""
    bundle = RowGroups((20, 40, 44, 24), 1)
    assert fits(bundle, RowShape(2, 64, 128)) and not fits(bundle, RowShape(1, 64, 128))


@pytest.mark.parametrize("size", range(1, 40))
def test_there_is_a_shape_however_short_all_trees_are(size):
    lengths, steps = lengths_of([([size], 1)] * 4), np.asarray([[0, 1], [2, 3]])
    largest = RowGroups((size,), 1)
    chosen = choose_shapes(lengths, steps, largest, 1, micro_tokens=None, attention_length=8192, most=4)
    assert all(fits(largest, shape) for shape in chosen)
    assert len(plan(lengths, steps, 1, chosen, 8192)) == 2


def test_steps_that_are_planned_together_are_the_same_as_one_by_one(monkeypatch):
    encoded = random_encoded(units=40, completions=(2, 3))
    together = Batches(encoded, 6, 2, 12)
    wanted = [together.at(step) for step in range(12)]
    monkeypatch.setattr(batches_module, "PLANNED_STEPS", 1)
    alone = Batches(encoded, 6, 2, 12)
    for step in (11, 0, 5):
        for one, other in zip(arrays_of(wanted[step]), arrays_of(alone.at(step)), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_pair_that_two_epochs_put_into_one_step_is_there_twice():
    encoded = random_encoded(units=5)
    batches = Batches(encoded, 8, 2, 4)
    for step in range(4):
        wanted = batches.pairs_of(step)
        assert len(set(wanted.tolist())) < 8
        assert [pair[0] for pair in pairs_in(batches.at(step))] == sorted(encoded.chosen[wanted].tolist())


def test_shards_carry_equal_loads():
    rng = np.random.default_rng(0)
    bundles = [([int(n)], 1) for n in rng.integers(20, 200, 64)]
    split = balance(lengths_of(bundles), np.arange(64)[None], 4)
    loads = split.trees.sum(axis=(0, 2, 3))
    assert loads.max() < 1.05 * loads.mean()


def test_a_bundle_that_does_not_fit_is_an_error_not_a_loss():
    with pytest.raises(ValueError, match="does not fit"):
        plan(lengths_of([([70], 3)]), np.zeros((1, 1), np.int64), 1, [RowShape(1, 64, 64)], 8192)


def test_tokens_are_counted_as_trl_does():
    encoded = random_encoded(units=3)
    first = [
        len(encoded.prompt(c)) + len(encoded.completion(c)) for c in (int(encoded.chosen[0]), int(encoded.rejected[0]))
    ]
    assert pair_tokens(encoded)[0] == sum(first)


def test_prefetch_hands_over_what_was_raised_at_its_step():
    def make(step):
        if step == 2:
            raise RuntimeError("broken")
        return 10 * step

    seen = []
    with pytest.raises(RuntimeError, match="broken"):
        for made in prefetch(make, range(5)):
            seen.append((made.step, made.value))
    assert seen == [(0, 0), (1, 10)]


class Clock:
    """A clock that stands still but when it is moved; whoever waits for its first look can go on then."""

    def __init__(self):
        self.now, self.looks, self.looked_at = 0.0, 0, threading.Semaphore(0)

    def __call__(self):
        self.looks += 1
        if self.looks % 2:  # the look at the beginning of a wait
            self.looked_at.release()
        return self.now


def test_a_slow_host_is_waited_for_as_long_as_it_takes():
    clock = Clock()

    def make(step):
        assert clock.looked_at.acquire(timeout=60)  # not before somebody waits
        clock.now += 10.0 + step
        return step

    assert [made.waited for made in prefetch(make, range(4), clock=clock)] == [10.0, 11.0, 12.0, 13.0]


def test_nobody_waits_for_a_fast_host_whatever_the_clock_says():
    ticking = itertools.count()
    found = prefetch(lambda step: step, range(3), depth=2, clock=lambda: float(next(ticking)))
    next(found)
    for thread in threading.enumerate():
        if thread.name == "batches":
            thread.join()  # all is made
    assert [(made.step, made.waited) for made in found] == [(1, 0.0), (2, 0.0)]


def test_two_batches_are_kept_ready_while_the_next_is_made():
    made = [threading.Event() for _ in range(9)]
    found = prefetch(lambda step: made[step].set(), range(9))
    next(found)
    assert made[3].wait(timeout=60)  # 1 and 2 are ready
    assert not made[4].wait(timeout=0.2)  # which is not begun before 1 is taken
    found.close()
