"""What a cache remembers is what the whole text says, for every kind of layer; padding before a text is not seen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.evaluation import generate as generating
from dpo_jax.evaluation.generate import Decoding, generate, stream
from dpo_jax.model import decoder
from dpo_jax.model.decoder import Model, empty_cache
from tests.support.family_models import KINDS, LENGTH, our_logits, ours, own
from tests.support.tiers import LIGHT_MIXERS, by_day

pytest.importorskip("torch")
LOGIT = 5e-5
"""Largest difference allowed of a logit: float32 sums in another order, where logits reach 17."""
PADDING = (0, 3)
"""Tokens of padding before each row's text."""
PIECES = (10, 1, 1, 1, 10, 1)


@functools.partial(jax.jit, static_argnums=0)
def extended(spec, params, tokens, positions, cache):
    states, cache = decoder.extend(spec, params, tokens, positions, cache)
    return decoder.head_logits(spec, params, states.reshape(-1, spec.head_width)), cache


def in_pieces(model: Model, ids: np.ndarray) -> np.ndarray:
    """Logits of rows that are read piece by piece, each behind its padding of other tokens."""
    spec, total = model.spec, sum(PIECES)
    rows, places = np.full((2, total), 7, np.int32), np.full((2, total), -1, np.int32)
    for row, pad in enumerate(PADDING):
        rows[row, pad:], places[row, pad:] = ids[row, : total - pad], np.arange(total - pad)
    cache, found, start = empty_cache(spec, 2, total + 2, jnp.float32), [], 0
    for size in PIECES:
        part = (slice(None), slice(start, start + size))
        logits, cache = extended(spec, model.params, jnp.asarray(rows[part]), jnp.asarray(places[part]), cache)
        found.append(np.asarray(logits).reshape(2, size, -1))
        start += size
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("name", by_day([*KINDS, "ministral3", "gemma4_keys"], LIGHT_MIXERS))
def test_pieces_are_the_whole(name):
    assert sum(PIECES) == LENGTH
    folder = own(name)
    model = ours(folder.path)
    found, wanted = in_pieces(model, folder.ids), our_logits(model, folder.ids)
    for row, pad in enumerate(PADDING):
        np.testing.assert_allclose(found[row, pad:], wanted[row, : LENGTH - pad], rtol=0, atol=LOGIT)


LONGROPE = ["llama_longrope", "phi3_long"]
"""Their original length is 16."""


@pytest.mark.parametrize("name", by_day(LONGROPE, {"phi3_long"}))
def test_longrope_reads_a_short_text_in_pieces(name):
    """Up to the original length; what is beyond it turns all that came before, which a cache cannot."""
    folder = own(name)
    model, ids = ours(folder.path), folder.ids[:, :16]
    positions = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), ids.shape)
    cache, found = empty_cache(model.spec, 2, 16, jnp.float32), []
    for start in (0, 8):
        part = (slice(None), slice(start, start + 8))
        logits, cache = extended(model.spec, model.params, jnp.asarray(ids[part]), positions[part], cache)
        found.append(np.asarray(logits).reshape(2, 8, -1))
    np.testing.assert_allclose(np.concatenate(found, axis=1), our_logits(model, ids), rtol=0, atol=LOGIT)


def likeliest(model: Model, text: list[int], first: int, *, padded: bool) -> list[bool]:
    """Whether each token of a text from `first` on is the likeliest one behind those before it."""
    found = []
    for place in range(first, len(text)):
        row = [*text[:place], *[0] * (LENGTH - place if padded else 0)]
        logits = our_logits(model, np.asarray([row] * (2 if padded else 1), np.int32))[0, place - 1]
        found.append(bool(logits[text[place]] >= logits.max() - LOGIT))
    return found


def greedy(name: str, *, padded: bool, places=((0, 12), (1, 9))) -> list[bool]:
    model, ids = ours(own(name).path), own(name).ids
    prompts = [ids[row, :size].tolist() for row, size in places]
    answers = generate(model.spec, model.params, prompts, Decoding(max_new_tokens=8))
    pairs = list(zip(prompts, answers, strict=True))
    assert all(len(answer.tokens) == 8 for answer in answers)
    return [
        right
        for prompt, answer in pairs
        for right in likeliest(model, [*prompt, *answer.tokens], len(prompt), padded=padded)
    ]


@pytest.mark.parametrize(
    "name",
    by_day(["qwen3_5_text", "gemma4_text", "bloom", "opt_narrow", "deepseek_v3"], {"qwen3_5_text", "gemma4_text"}),
)
def test_greedy_answers_are_the_likeliest_tokens(name):
    assert all(greedy(name, padded=True))


@pytest.mark.nightly
@pytest.mark.parametrize("name", LONGROPE)
def test_greedy_answers_go_on_beyond_longropes_original_length(name):
    """A text that grows past it is turned anew as a whole, as transformers reads it anew then."""
    assert all(greedy(name, padded=False, places=[(row, size) for row in (0, 1) for size in range(11, 17)]))


@pytest.mark.parametrize("name", by_day(LONGROPE, {"phi3_long"}))
def test_longrope_reads_a_long_prompt_in_pieces(name, monkeypatch):
    """Every piece of a prompt beyond the original length is turned by the long factors, the first ones too."""
    monkeypatch.setattr(generating, "READ_AT_ONCE", 8)
    model, prompt = ours(own(name).path), own(name).ids[0, :22].tolist()
    (answer,) = generate(model.spec, model.params, [prompt], Decoding(max_new_tokens=2))
    assert all(likeliest(model, [*prompt, *answer.tokens], 22, padded=False))


@pytest.mark.nightly
@pytest.mark.parametrize("name", LONGROPE)
@pytest.mark.parametrize("stop", [(), (50, 51, 52, 53)])
def test_an_answer_in_two_legs_is_one_answer(name, stop):
    """Drawn tokens do not depend on the company, and a stream says the same, also where it passes the length."""
    model, ids = ours(own(name).path), own(name).ids
    prompts = [ids[row, :size].tolist() for row, size in ((0, 9), (1, 14), (0, 16), (1, 20))]
    decoding = Decoding(max_new_tokens=10, temperature=1.5, stop=stop)
    together = generate(model.spec, model.params, prompts, decoding, seed=3, batch_size=3)
    for number, answer in enumerate(together):
        others = [prompts[number] if place == number else [5] for place in range(number + 1)]
        assert generate(model.spec, model.params, others, decoding, seed=3)[number] == answer
    *_, streamed = stream(model.spec, model.params, prompts[0], decoding, seed=3, every=3)
    assert streamed == together[0]
    assert all(len(answer.tokens) == 10 or answer.finished for answer in together)
