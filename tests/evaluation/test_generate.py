"""Laws of generation: the cache, batches, pieces and devices change how an answer is computed, never the answer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import sequence_logprobs, trees
from dpo_jax.errors import UserError
from dpo_jax.evaluation import generate as module
from dpo_jax.evaluation.generate import Decoding, choose, generate, ranked, rule_of, stream
from dpo_jax.evaluation.likelihood import answer_logprobs
from dpo_jax.hf.checkpoint import load_hf
from dpo_jax.model.decoder import abstract_params, logits
from dpo_jax.model.spec import HeadNorm, Norm, Rope
from dpo_jax.sharding import make_mesh, param_shardings
from tests.support.specs import plain_spec
from tests.support.tiny_folders import write_folder

SPEC = plain_spec(
    width=32,
    layers=2,
    heads=4,
    mlp_width=48,
    windows=(4, None),
    head_norm=HeadNorm(Norm(1e-6)),
    logit_softcap=20.0,
)
RNG = np.random.default_rng(0)
PROMPTS = [[int(token) for token in RNG.integers(0, 50, size)] for size in (40, 1, 16, 11, 3)]
NEW = 12
GREEDY = Decoding(NEW)
DRAWN = Decoding(NEW, temperature=1.3, top_p=0.9)


@pytest.fixture(scope="module", autouse=True)
def _small_pieces():
    """The long prompt is read in three pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "READ_AT_ONCE", 16)
        yield


@pytest.fixture(scope="module")
def weights():
    """Random weights, large enough that the most probable tokens stand out."""
    leaves = trees.paths(abstract_params(SPEC)).items()
    rng = np.random.default_rng(1)
    return trees.from_paths({path: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32) for path, x in leaves})


def read(params, text):
    """Logits of a text, from the whole model and without a cache; always of one length, so that it compiles once."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(text)] = text
    return logits(SPEC, params, jnp.asarray(padded))[0]


def slowly(params, prompt):
    """Greedy decoding by reading the whole text again for every token."""
    text = list(prompt)
    for _ in range(NEW):
        text.append(int(np.argmax(np.asarray(read(params, text))[len(text) - 1])))
    return text[len(prompt) :]


def test_greedy_answers_are_those_of_the_whole_model_read_again_and_again(weights):
    answers = generate(SPEC, weights, PROMPTS, GREEDY)
    assert [answer.tokens for answer in answers] == [slowly(weights, prompt) for prompt in PROMPTS]
    assert len({token for answer in answers for token in answer.tokens}) > 5  # it does not say one thing only
    assert not any(answer.finished for answer in answers)


def test_an_answer_does_not_depend_on_its_neighbours_but_on_seed_and_place(weights):
    first = generate(SPEC, weights, PROMPTS, DRAWN, seed=3)
    assert generate(SPEC, weights, PROMPTS[:1], DRAWN, seed=3) == first[:1]
    others = [[9] * 33, [8], PROMPTS[2], [7] * 12, [6]]
    assert generate(SPEC, weights, others, DRAWN, seed=3)[2] == first[2]
    assert generate(SPEC, weights, PROMPTS, DRAWN, seed=4) != first
    twice = generate(SPEC, weights, [PROMPTS[0]] * 5, DRAWN, seed=3)
    assert twice[0] == first[0] and twice[1] != twice[0]


@pytest.mark.parametrize("decoding", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_stop_token_ends_an_answer_and_nothing_else(decoding, weights):
    free = generate(SPEC, weights, PROMPTS, decoding)
    stops = (free[0].tokens[4], free[3].tokens[0])
    ended = generate(SPEC, weights, PROMPTS, decoding._replace(stop=stops))
    for answer, whole in zip(ended, free, strict=True):
        end = next((at for at, token in enumerate(whole.tokens) if token in stops), None)
        assert answer.tokens == whole.tokens[:end]
        assert answer.stop == (None if end is None else whole.tokens[end])
    assert ended[0].finished and ended[3].tokens == []


@pytest.mark.parametrize("decoding", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_legs_change_nothing(decoding, weights):
    """Where the long factors are the short ones nothing is turned anew: two legs write what one writes."""
    same = tuple([1.0] * (SPEC.layers[0].mixer.head_dim // 2))
    rope = Rope(kind="longrope", original_positions=18, short=same, long=same)
    layers = [dataclasses.replace(x, mixer=dataclasses.replace(x.mixer, rope=rope)) for x in SPEC.layers]
    longrope = dataclasses.replace(SPEC, layers=tuple(layers))
    assert longrope.short_texts == 18
    plain = generate(SPEC, weights, PROMPTS, decoding, seed=5)
    assert generate(longrope, weights, PROMPTS, decoding, seed=5) == plain
    assert [*stream(longrope, weights, PROMPTS[0], decoding, seed=5)][-1] == plain[0]


def test_decoding_stops_working_when_every_row_has_stopped(weights):
    first = generate(SPEC, weights, PROMPTS, GREEDY)[0].tokens[0]
    rule = rule_of(Decoding(NEW, stop=(first,)))
    rows = module._rows([module._Leg(PROMPTS[0], 0, NEW)] * 5, [0, 1, 2, 3, 4], 16, 1)
    state = module._read(SPEC, weights, rows, np.uint32(0), capacity=16)
    assert int(module._write(SPEC, weights, state, np.int32(NEW), rule).count) == 1


@pytest.mark.parametrize(
    "narrow",
    [{"temperature": 1e-6}, {"temperature": 2.0, "top_p": 1e-6}, {"temperature": 2.0, "top_k": 1}],
    ids=["cold", "top_p", "top_k"],
)
def test_drawing_from_one_token_is_greedy(narrow, weights):
    greedy = generate(SPEC, weights, PROMPTS, GREEDY)
    assert generate(SPEC, weights, PROMPTS, Decoding(NEW, **narrow), seed=5) == greedy


def test_the_stream_grows_into_the_answer(weights):
    decoding = DRAWN._replace(stop=(1, 2, 3, 4, 5))
    (whole,) = generate(SPEC, weights, PROMPTS[:1], decoding, seed=9)
    parts = list(stream(SPEC, weights, PROMPTS[0], decoding, seed=9, every=5))
    assert parts[-1] == whole
    assert all(whole.tokens[: len(part.tokens)] == part.tokens for part in parts)
    assert [len(part.tokens) for part in parts[:-1]] == [5 * (at + 1) for at in range(len(parts) - 1)]


def test_answers_on_a_mesh_are_those_of_one_device(weights):
    mesh = make_mesh(data=1, fsdp=2, tensor=2)
    placed = jax.device_put(weights, param_shardings(abstract_params(SPEC), mesh))
    assert generate(SPEC, placed, PROMPTS, GREEDY, mesh=mesh) == generate(SPEC, weights, PROMPTS, GREEDY)


# ---------------------------------------------------------------------------------------------- what is drawn


def nucleus(probabilities, top_p):
    """The smallest set of most probable tokens that reaches top_p, by the definition."""
    order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    size = next((n for n in range(1, len(order)) if sum(probabilities[t] for t in order[:n]) >= top_p), len(order))
    return set(order[:size])


@pytest.mark.parametrize("top_p", [0.05, 0.37, 0.5, 0.83, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p):
    scores = np.random.default_rng(7).normal(0, 2, (20, 30)).astype(np.float32)
    tokens, kept = ranked(jnp.asarray(scores), rule_of(Decoding(1, temperature=0.6, top_p=top_p)))
    for row, token, keep in zip(scores / 0.6, np.asarray(tokens), np.asarray(kept), strict=True):
        exact = np.exp(row.astype(np.float64) - row.max())
        assert set(token[keep > -np.inf].tolist()) == nucleus((exact / exact.sum()).tolist(), top_p)


@pytest.mark.parametrize(("top_p", "kinds"), [(0.9, 3), (1.0, 5)])
def test_tokens_are_drawn_as_often_as_their_probability_says(top_p, kinds):
    probabilities = np.asarray([0.05, 0.4, 0.2, 0.3, 0.05])
    decoding = Decoding(1, temperature=0.5, top_p=top_p)
    hot = probabilities**2 / (probabilities**2).sum()  # temperature 1/2
    expected = np.where([token in nucleus(hot.tolist(), top_p) for token in range(5)], hot, 0)
    draws = 4000
    rows = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities, jnp.float32)), (draws, 5))
    places = jnp.arange(draws, dtype=jnp.int32)
    drawn = jax.jit(lambda count: choose(rows, rule_of(decoding), jnp.uint32(11), places, count))
    one, other = (np.asarray(drawn(jnp.full(draws, count, jnp.int32))) for count in (0, 1))
    assert (one != other).mean() > 0.3  # each position draws anew
    wanted = draws * expected / expected.sum()
    counts = np.bincount(one, minlength=5)
    assert (counts[wanted == 0] == 0).all() and (wanted > 0).sum() == kinds
    chi_square = ((counts - wanted)[wanted > 0] ** 2 / wanted[wanted > 0]).sum()
    assert chi_square < {3: 13.8, 5: 18.5}[kinds]  # 2 and 4 degrees: 1 in 1000 by chance, and the seed is fixed


@pytest.mark.parametrize("logits", [[0.5, 2.0, 2.0, -1.0], [7.0, 7.0, 7.0, 7.0], [-1e30, -1e30, 0.0, -np.inf]])
def test_greedy_takes_the_lowest_of_equals(logits):
    rows = jnp.asarray([logits], jnp.float32)
    place = jnp.zeros(1, jnp.int32)
    assert choose(rows, rule_of(GREEDY), jnp.uint32(0), place, place).tolist() == [int(np.argmax(logits))]


def test_a_part_of_a_list_is_answered_as_in_the_list(weights):
    """Also where layers lie apart and where they do not."""
    whole = generate(SPEC, weights, PROMPTS, DRAWN, seed=3)
    assert generate(SPEC, weights, PROMPTS[2:], DRAWN, seed=3, first=2) == whole[2:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_laid_out", lambda params: params)
        assert generate(SPEC, weights, PROMPTS, DRAWN, seed=3) == whole


# ---------------------------------------------------------------------------------------------- log-probabilities


def test_log_probabilities_of_answers_are_those_of_the_whole_logits(weights):
    answers = [[3, 4, 5], [], [7] * 5, [1], [2, 3]]
    found = answer_logprobs(SPEC, weights, PROMPTS, answers, batch_size=8)
    for prompt, answer, value in zip(PROMPTS, answers, found, strict=True):
        text = np.zeros((1, 64), np.int32)
        text[0, : len(prompt) + len(answer)] = [*prompt, *answer]
        mask = (np.arange(64) >= len(prompt)) & (np.arange(64) < len(prompt) + len(answer))
        expected = sequence_logprobs(
            read(weights, [*prompt, *answer])[None], jnp.asarray(text), jnp.asarray(mask[None])
        )
        np.testing.assert_allclose(value, float(expected[0]), rtol=1e-4, atol=1e-4)  # float32 sums in another order


# ---------------------------------------------------------------------------------------------- outside, and errors


def test_greedy_and_top_p_are_those_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM
    from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

    folder = write_folder(tmp_path / "tiny", "llama")
    ours, theirs = load_hf(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stops = (5, 11, 40)
    answers = generate(ours.spec, ours.params, PROMPTS, Decoding(NEW, stop=stops))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        given = torch.tensor([prompt])
        options = {"do_sample": False, "temperature": None, "top_p": None, "eos_token_id": list(stops)}
        with torch.no_grad():
            text = theirs.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=NEW, pad_token_id=0, **options
            )
        assert answer.written == text[0, len(prompt) :].tolist()
    scores = np.random.default_rng(3).normal(0, 2, (8, 40)).astype(np.float32)
    warped = TopPLogitsWarper(0.7)(None, TopKLogitsWarper(6)(None, torch.tensor(scores) / 0.8)).numpy()
    tokens, kept = (
        np.asarray(x) for x in ranked(jnp.asarray(scores), rule_of(Decoding(1, temperature=0.8, top_p=0.7, top_k=6)))
    )
    np.testing.assert_array_equal(np.take_along_axis(warped, tokens, 1) > -np.inf, kept > -np.inf)


@pytest.mark.parametrize(
    ("prompts", "changes", "words"),
    [
        ([[1], []], {}, "prompt 2 has no tokens"),
        ([[1, 50]], {}, "prompt 1 has token 50, and the model knows 0..49"),
        ([[1]], {"temperature": -1.0}, "temperature = -1.0: must be 0 or more"),
        ([[1]], {"temperature": float("nan")}, "temperature = nan"),
        ([[1]], {"top_p": 0.0}, "top_p = 0.0: must be above 0"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens = 0: must be at least 1"),
    ],
)
def test_what_cannot_be_answered_is_refused(prompts, changes, words, weights):
    with pytest.raises(UserError, match=words) as caught:
        generate(SPEC, weights, prompts, GREEDY._replace(**changes))
    assert "\n" not in str(caught.value)


def test_no_prompts_no_answers(weights):
    assert generate(SPEC, weights, [], GREEDY) == []


def test_texts_longer_than_the_learned_positions_are_refused():
    """Before anything is computed: there are no weights to compute with."""
    short = dataclasses.replace(SPEC, positions=16)
    message = "prompt 2 has 9 tokens, and 8 more pass the 16 positions that the model knows; ask for fewer"
    with pytest.raises(UserError, match=message):
        generate(short, {}, [[1], [2] * 9], Decoding(8))
    with pytest.raises(UserError, match=message.replace("prompt 2", "prompt 1")):
        next(stream(short, {}, [2] * 9, Decoding(8)))
    with pytest.raises(UserError, match=message):
        answer_logprobs(short, {}, [[1], [2] * 9], [[3], [4] * 8])
