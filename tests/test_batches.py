"""A step is exactly N pairs, whatever the packing; nothing is lost, moved or mixed on the way into the arrays."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.data.batches import Batches, pair_tokens, prefetch
from dpo_jax.data.entries import as_entries
from dpo_jax.data.packing import Bundle, Shape, balance, pack
from tests.forests import random_encoded


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
        assert pairs_in(batch) == sorted(
            (int(encoded.chosen[p]), int(encoded.rejected[p]), float(encoded.weight[p]), float(encoded.margin[p]))
            for p in wanted
        )
        for completion, (text, scored) in completions_of(batch, encoded).items():
            assert text == [*encoded.prompt(completion), *encoded.completion(completion)]
            assert scored == encoded.completion(completion).tolist()


def test_the_order_is_a_function_of_seed_and_step_and_visits_every_pair_once_an_epoch():
    encoded = random_encoded(units=10)
    one, other, third = (Batches(encoded, 5, 1, 8, seed=seed) for seed in (3, 3, 4))
    assert all((one.pairs_of(s) == other.pairs_of(s)).all() for s in (7, 0, 3))
    assert any((one.pairs_of(s) != third.pairs_of(s)).any() for s in range(2))
    for epoch in range(4):
        assert sorted(np.concatenate([one.pairs_of(2 * epoch), one.pairs_of(2 * epoch + 1)])) == list(range(10))
    assert any((one.pairs_of(s) != one.pairs_of(s + 2)).any() for s in range(2))  # a new order in each epoch


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
    announced = {tuple(leaf.shape for leaf in blank) for blank in batches.blanks()}
    assert {tuple(leaf.shape for leaf in batches.at(step)) for step in range(30)} <= announced
    assert len(announced) <= 4


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
    whole = as_entries(encoded, "rankings", objective="plackett_luce", max_length=64)
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


def test_shards_carry_equal_loads():
    rng = np.random.default_rng(0)
    bundles = [Bundle((int(n),), 1) for n in rng.integers(20, 200, 64)]
    loads = [sum(sum(bundles[i].trees) for i in part) for part in balance(bundles, 4)]
    assert max(loads) < 1.05 * np.mean(loads)


def test_a_bundle_that_does_not_fit_is_an_error_not_a_loss():
    with pytest.raises(ValueError, match="does not fit"):
        pack([Bundle((70,), 3)], [0], Shape(1, 64, 64))


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
        for step, value in prefetch(make, range(5)):
            seen.append((step, value))
    assert seen == [(0, 0), (1, 10)]
