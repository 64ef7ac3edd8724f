"""A packed row is its texts, for every family: completions score as they do in rows of their own.

The plain route is `logits` of one text a row, which other tests hold against PyTorch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.data.batches import Batches
from dpo_jax.data.encoded import Encoded
from dpo_jax.hf.configs import read_spec
from dpo_jax.model.decoder import Execution, Model
from dpo_jax.preference import scoring
from tests.support.family_configs import CONFIGS
from tests.support.family_models import LENGTH, ROWS, allowed, our_logits, ours, own
from tests.support.forests import random_encoded
from tests.support.tiers import MIXERS, by_day

pytest.importorskip("torch")
ENCODED = random_encoded(units=5, completions=(2, 3), vocab=88, seed=37, longest=13)
"""Texts of 6 to 22 tokens: they fit the rows of `family_models`, and stand on both sides of every original length."""
LINEAR, LONGROPE = ("qwen3_5_text", "qwen3_5_one_head"), ("phi3_long", "llama_longrope")
score = jax.jit(scoring.score_batch, static_argnums=0, static_argnames="execution")


def by_token(model: Model, encoded: Encoded, *, share: bool, **layout) -> np.ndarray:
    """Log-probability of every scored token, from packed forests."""
    batch = Batches(encoded, encoded.num_pairs, 1, 1, share_prompts=share, **layout).at(0)
    found = np.asarray(score(model.spec, model.params, batch))
    logps = np.full(int(encoded.completion_length.sum()), np.nan, np.float32)
    for micro in range(int(batch.micro_batches)):
        first = np.cumsum(batch.lengths[micro, 0]) - batch.lengths[micro, 0]
        for place, completion in enumerate(batch.ids[micro, 0]):
            if completion >= 0:
                size, start = encoded.completion_length[completion], encoded.scored_start[completion]
                logps[start : start + size] = found[micro, 0, int(first[place]) :][:size]
    return logps


def alone(model: Model, encoded: Encoded, *, padded: bool) -> np.ndarray:
    """The same, from one text a row; padding behind it is nothing that a causal model sees, but for its length."""
    count = encoded.num_completions
    texts = [np.asarray([*encoded.prompt(c), *encoded.completion(c)], np.int32) for c in range(count)]
    if padded:
        ids = np.zeros((count + count % ROWS, LENGTH), np.int32)
        for row, text in zip(ids, texts, strict=False):
            row[: len(text)] = text
        logits = np.concatenate([our_logits(model, ids[i : i + ROWS]) for i in range(0, len(ids), ROWS)])
    else:
        logits = [our_logits(model, text[None])[0] for text in texts]
    found = []
    for c in range(count):
        places, answer = np.arange(len(texts[c]) - 1)[-len(encoded.completion(c)) :], encoded.completion(c)
        found.append(np.asarray(jax.nn.log_softmax(jnp.asarray(logits[c][places])))[np.arange(len(answer)), answer])
    return np.concatenate(found)


@functools.cache
def plainly(name: str) -> np.ndarray:
    return alone(ours(own(name).path), ENCODED, padded=name not in LONGROPE)


def tolerance(name: str) -> float:
    return allowed(our_logits(ours(own(name).path), own(name).ids))


def longest() -> int:
    return int((ENCODED.prompt_length[ENCODED.completion_unit] + ENCODED.completion_length).max())


def test_the_texts_are_long_enough():
    assert 20 < longest() <= LENGTH


@pytest.mark.parametrize("name", by_day(CONFIGS, {*MIXERS, "mistral", "phi3_long"}))
def test_a_forest_is_its_texts(name):
    """Prompts are shared where the spec says that they may be."""
    model = ours(own(name).path)
    share = model.spec.can_share_prompt(longest())
    assert share != (name in LINEAR + LONGROPE)
    found = by_token(model, ENCODED, share=share, micro_tokens=256)
    np.testing.assert_allclose(found, plainly(name), rtol=0, atol=tolerance(name))


@pytest.mark.parametrize("name", by_day(LINEAR + LONGROPE, {"qwen3_5_text", "phi3_long"}))
def test_a_shared_prompt_would_be_wrong_there(name):
    found = by_token(ours(own(name).path), ENCODED, share=True, micro_tokens=256)
    assert np.abs(found - plainly(name)).max() > 100 * tolerance(name)


@pytest.mark.parametrize("name", by_day(LONGROPE, {"phi3_long"}))
def test_short_texts_may_share_a_prompt_under_longrope(name):
    """Up to the original length all take the short factors; one text beyond it must not change those beside it."""
    spec = read_spec(own(name).path)
    assert spec.can_share_prompt(16) and not spec.can_share_prompt(17)
    encoded = random_encoded(units=5, completions=(2, 3), vocab=88, seed=12, longest=8)
    model = ours(own(name).path)
    found = by_token(model, encoded, share=True, micro_tokens=256)
    np.testing.assert_allclose(found, alone(model, encoded, padded=False), rtol=0, atol=tolerance(name))


@pytest.mark.parametrize("name", by_day(MIXERS, {"gpt_oss", "deepseek_v3", "qwen3_5_text"}))
def test_execution_changes_nothing(name):
    """Neither layers that are not scanned nor layers that are computed again."""
    model = ours(own(name).path)
    batch = Batches(ENCODED, ENCODED.num_pairs, 1, 1, share_prompts=False, micro_tokens=256).at(0)
    whole, *others = (
        score(model.spec, model.params, batch, execution=how)
        for how in (Execution(), Execution(scan_layers=False), Execution(remat="block"))
    )
    for found in others:
        np.testing.assert_allclose(found, whole, rtol=0, atol=tolerance(name))
