"""Answers of a model: greedy or drawn at random, many prompts at a time, with a cache of keys and values.

An answer depends on its prompt, the decoding, the seed and its place in the list of prompts; not on which other prompts
share its batch (up to float reassociation, where the batch has another shape). Parameters come in the dtype to compute
in: see `decoder.cast`.

Longrope turns a whole text again once it is longer than the original length, so what a cache remembers of it is void
then. An answer that grows past it is written in two legs: up to there, and on from the whole text, read again.

Letters: B rows, T prompt slots, A answer slots, N new tokens, V vocabulary, D width.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, UInt32

from dpo_jax import sharding
from dpo_jax.errors import UserError
from dpo_jax.model.decoder import Cache, Params, apart, empty_cache, extend, head_logits
from dpo_jax.model.spec import DecoderSpec

READ_AT_ONCE = 256
"""Prompt tokens of a row that are read in one piece; bounds the memory that attention takes."""
NOTHING = -1
"""Stands in `written` where a row has no token, as it has ended."""
NEVER = -2
"""Fills up the stop tokens; no token is this."""


class Decoding(NamedTuple):
    """How tokens are chosen.

    Attributes:
      max_new_tokens: an answer that is this long is cut off.
      temperature: logits are divided by it; 0 takes the most probable token (the lowest id among equals).
      top_p: tokens are drawn from the smallest set of most probable ones whose probabilities add up to this.
      top_k: tokens are drawn from this many most probable ones, before top_p; 0 for all.
      stop: tokens that end an answer.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[int, ...] = ()


class Answer(NamedTuple):
    """What a model wrote: its tokens, and the stop token that came after them (None: it was cut off)."""

    tokens: list[int]
    stop: int | None

    @property
    def finished(self) -> bool:
        """Whether the model ended the answer by itself."""
        return self.stop is not None

    @property
    def written(self) -> list[int]:
        """All that the model wrote, the stop token included."""
        return self.tokens if self.stop is None else [*self.tokens, self.stop]


class _Rows(NamedTuple):
    """Prompts of a batch. They start with padding (position -1), so that all end together.

    tokens    = [[0 0 7 8]    positions = [[-1 -1 0 1]
                 [4 5 6 7]]                [ 0  1 2 3]]
    """

    tokens: Int[Array, "B T"] | Int[np.ndarray, "B T"]
    positions: Int[Array, "B T"] | Int[np.ndarray, "B T"]
    index: Int[Array, " B"] | Int[np.ndarray, " B"]
    """Each prompt's place in the list, which its random numbers are made from; -1 for a row that fills up the batch."""
    before: Int[Array, " B"] | Int[np.ndarray, " B"]
    """How many tokens at the end of each text were written in an earlier leg."""
    room: Int[Array, " B"] | Int[np.ndarray, " B"]
    """How many tokens are to be written in this leg."""


class Rule(NamedTuple):
    """A `Decoding` as numbers that a compiled function takes, so that one compilation serves them all."""

    temperature: Float[Array, ""] | np.float32
    top_p: Float[Array, ""] | np.float32
    top_k: Int[Array, ""] | np.int32
    stop: Int[Array, " S"] | Int[np.ndarray, " S"]


class _State(NamedTuple):
    """A batch of answers that are being written; `last` is the hidden state that the next token is chosen from."""

    cache: Cache
    last: Float[Array, "B D"]
    written: Int[Array, "B N"]
    count: Int[Array, ""]
    prompt_length: Int[Array, " B"]
    stopped: Bool[Array, " B"]
    index: Int[Array, " B"]
    before: Int[Array, " B"]
    room: Int[Array, " B"]
    seed: UInt32[Array, ""]


# ---------------------------------------------------------------------------------------------- many prompts


def generate(
    spec: DecoderSpec,
    params: Params,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    seed: int = 0,
    first: int = 0,
    batch_size: int = 16,
    mesh: Mesh | None = None,
) -> list[Answer]:
    """An answer to each prompt, in the order of the prompts.

    Prompts of like length share a batch, and lengths are rounded up to a few sizes, so that little is compiled.

    Args:
      spec: what the model is.
      params: its weights, in the dtype to compute in.
      prompts: token ids.
      decoding: how tokens are chosen.
      seed: decides what is drawn; greedy decoding does not use it.
      first: place of the first prompt, where these are part of a longer list.
      batch_size: most prompts that are answered at a time.
      mesh: devices that the weights lie on, if there are several; rows are split over them. Every process calls.

    Raises:
      UserError: a prompt is empty or has a token that the model does not know, or the decoding makes no sense.
    """
    _check_sampled(spec, prompts, decoding)
    params = _laid_out(params) if prompts else params
    legs = {index: _Leg.first(spec, prompt, decoding) for index, prompt in enumerate(prompts)}
    answers: dict[int, Answer] = {}
    while legs:
        order = sorted(legs, key=lambda index: len(legs[index].text))
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            shards = 1 if mesh is None else sharding.batch_shards(mesh)
            rows = _rows([legs[index] for index in indices], [first + i for i in indices], batch_size, shards)
            capacity = rounded(max(legs[index].room for index in indices))
            split = None if mesh is None else sharding.rows(mesh)
            state = _read(spec, params, _placed(rows, split), np.uint32(seed), capacity=capacity, split=split)
            state = _write(spec, params, state, np.int32(decoding.max_new_tokens), rule_of(decoding), split=split)
            found = zip(indices, _answers(state, decoding), strict=False)
            answers |= {index: legs[index].joined(answer) for index, answer in found}
        legs = {i: leg.after(answers[i], decoding) for i, leg in legs.items() if leg.goes_on(answers[i], decoding)}
    return [answers[index] for index in range(len(prompts))]


def stream(
    spec: DecoderSpec, params: Params, prompt: Sequence[int], decoding: Decoding, *, seed: int = 0, every: int = 8
) -> Iterator[Answer]:
    """The answer that `generate` gives to this one prompt, so far, each time that it is `every` tokens longer."""
    _check_sampled(spec, [prompt], decoding)
    params, leg, rule = _laid_out(params), _Leg.first(spec, prompt, decoding), rule_of(decoding)
    while True:
        state = _read(spec, params, _rows([leg], [0], 1, 1), np.uint32(seed), capacity=rounded(leg.room))
        for until in range(every, leg.room + every, every):
            state = _write(spec, params, state, np.int32(min(until, leg.room)), rule)
            answer = leg.joined(_answers(state, decoding)[0])
            yield answer
            if answer.finished:
                return
        if not leg.goes_on(answer, decoding):
            return
        leg = leg.after(answer, decoding)


def _laid_out(params: Params) -> Params:
    """Weights as their devices read them fastest, layer by layer: on a CPU a second copy of them, for the while."""
    (platform,) = {device.platform for device in params["embed"]["embedding"].sharding.device_set}
    return apart(params) if platform == "cpu" else params


def check(decoding: Decoding) -> None:
    """Refuse what is out of range.

    Raises:
      UserError: names the setting, its value, and what it must be.
    """
    limits = (
        ("max_new_tokens", decoding.max_new_tokens, decoding.max_new_tokens >= 1, "at least 1"),
        ("temperature", decoding.temperature, 0 <= decoding.temperature < float("inf"), "0 or more"),
        ("top_p", decoding.top_p, 0 < decoding.top_p <= 1, "above 0 and at most 1"),
        ("top_k", decoding.top_k, decoding.top_k >= 0, "0 (for all tokens) or more"),
    )
    for name, value, sound, wanted in limits:
        if not sound:
            raise UserError(f"{name} = {value}: must be {wanted}")


def _check_sampled(spec: DecoderSpec, prompts: Sequence[Sequence[int]], decoding: Decoding) -> None:
    check(decoding)
    check_prompts(spec, prompts)
    check_room(prompts, decoding.max_new_tokens, spec.positions)


def check_prompts(spec: DecoderSpec, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse an empty prompt, and tokens that the model does not know."""
    for number, prompt in enumerate(prompts, 1):
        if not len(prompt):
            raise UserError(f"prompt {number} has no tokens, and an answer needs something to follow; write something")
        if strange := [token for token in prompt if not 0 <= token < spec.vocab_size]:
            raise UserError(
                f"prompt {number} has token {strange[0]}, and the model knows 0..{spec.vocab_size - 1}; "
                "use the tokenizer of the model's own folder"
            )


def check_room(prompts: Sequence[Sequence[int]], new: int, limit: int | None) -> None:
    """Refuse a prompt behind which so many new tokens pass the limit."""
    for number, prompt in enumerate(prompts, 1):
        if limit is not None and len(prompt) + new > limit:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens, and {new} more pass the {limit} positions that the model "
                "knows; ask for fewer"
            )


class _Leg(NamedTuple):
    """A stretch of an answer for which the cache stays true: the text so far, and how many tokens to write behind it.

    The last `before` tokens of the text were written in the leg before.
    """

    text: Sequence[int]
    before: int
    room: int

    @classmethod
    def first(cls, spec: DecoderSpec, prompt: Sequence[int], decoding: Decoding) -> "_Leg":
        """All of the answer; or, under longrope, what is chosen while the text is of its original length at most."""
        new, limit = decoding.max_new_tokens, spec.short_texts
        return cls(prompt, 0, new if limit is None or len(prompt) > limit else min(new, limit + 1 - len(prompt)))

    def joined(self, answer: Answer) -> Answer:
        """The whole answer up to the end of this leg."""
        return Answer([*self.text[len(self.text) - self.before :], *answer.tokens], answer.stop)

    def goes_on(self, answer: Answer, decoding: Decoding) -> bool:
        """Whether the answer, as it is after this leg, needs another."""
        return not answer.finished and len(answer.tokens) < decoding.max_new_tokens

    def after(self, answer: Answer, decoding: Decoding) -> "_Leg":
        """The rest of it."""
        prompt, written = self.text[: len(self.text) - self.before], len(answer.tokens)
        return _Leg([*prompt, *answer.tokens], written, decoding.max_new_tokens - written)


def rule_of(decoding: Decoding) -> Rule:
    """The decoding as numbers."""
    size = max(8, 1 << (max(len(decoding.stop), 1) - 1).bit_length())
    stop = [*decoding.stop, *[NEVER] * (size - len(decoding.stop))]
    top_k = decoding.top_k or np.iinfo(np.int32).max
    return Rule(
        np.float32(decoding.temperature), np.float32(decoding.top_p), np.int32(top_k), np.asarray(stop, np.int32)
    )


def rounded(size: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, 128, 192, ..."""
    size = max(size, 16)
    power = 1 << (size - 1).bit_length()
    return power * 3 // 4 if size <= power * 3 // 4 else power


def _rows(legs: Sequence[_Leg], indices: Sequence[int], batch_size: int, shards: int) -> _Rows:
    """The legs, of the answers with these indices, as one batch; rows up to a power of two (at most `batch_size`)."""
    rows = min(batch_size, 1 << (len(indices) - 1).bit_length())
    rows = -(-rows // shards) * shards
    slots = rounded(max(len(leg.text) for leg in legs))
    tokens, positions = np.zeros((rows, slots), np.int32), np.full((rows, slots), -1, np.int32)
    index, before, room = np.full(rows, -1, np.int32), np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    for row, leg in enumerate(legs):
        length = len(leg.text)
        tokens[row, slots - length :] = leg.text
        positions[row, slots - length :] = np.arange(length)
        index[row], before[row], room[row] = indices[row], leg.before, leg.room
    return _Rows(tokens, positions, index, before, room)


def _placed(rows: _Rows, split: NamedSharding | None) -> _Rows:
    if split is None:
        return rows
    return _Rows(*(jax.make_array_from_callback(part.shape, split, part.__getitem__) for part in rows))


def _answers(state: _State, decoding: Decoding) -> list[Answer]:
    """The answers so far, one for each row that is not there to fill up the batch."""
    written, index = (sharding.on_host(part) for part in (state.written, state.index))
    answers = []
    for row in written[index >= 0]:
        tokens = [int(token) for token in row if token != NOTHING]
        ended = bool(tokens) and tokens[-1] in decoding.stop
        answers.append(Answer(tokens[:-1], tokens[-1]) if ended else Answer(tokens, None))
    return answers


# ---------------------------------------------------------------------------------------------- on the devices


@functools.partial(jax.jit, static_argnames=("spec", "capacity", "split"))
def _read(
    spec: DecoderSpec,
    params: Params,
    rows: _Rows,
    seed: UInt32[Array, ""],
    *,
    capacity: int,
    split: NamedSharding | None = None,
) -> _State:
    """Read the prompts, and make room for answers of `capacity` tokens."""
    tokens, positions, index, before, room = (jnp.asarray(part) for part in rows)
    batch, slots = tokens.shape
    piece = slots if slots <= READ_AT_ONCE else math.gcd(slots, READ_AT_ONCE)
    dtype = params["embed"]["embedding"].dtype
    lie_apart = any(isinstance(stack, tuple) for stack in params["blocks"].values())
    cache = empty_cache(spec, batch, slots + capacity, dtype, lie_apart=lie_apart)
    lengths = positions[:, -1] + 1

    def read(number, carry):
        some, where = (lax.dynamic_slice_in_dim(x, number * piece, piece, axis=1) for x in (tokens, positions))
        states, cache = extend(spec, params, some, where, carry[1], lengths, rows=split)
        return states[:, -1], cache

    last, cache = lax.fori_loop(0, slots // piece, read, (jnp.zeros((batch, spec.head_width), dtype), cache))
    return _State(
        cache=cache,
        last=last,
        written=jnp.full((batch, capacity), NOTHING, jnp.int32),
        count=jnp.int32(0),
        prompt_length=lengths,
        stopped=index < 0,
        index=index,
        before=before,
        room=room,
        seed=jnp.asarray(seed),
    )


@functools.partial(jax.jit, static_argnames=("spec", "split"), donate_argnames="state")
def _write(
    spec: DecoderSpec,
    params: Params,
    state: _State,
    until: Int[Array, ""],
    rule: Rule,
    *,
    split: NamedSharding | None = None,
) -> _State:
    """Go on until `until` tokens are written, or every row has stopped."""

    def wanted(state: _State):
        return (state.count < until) & ~state.stopped.all()

    def step(state: _State) -> _State:
        place = state.before + state.count
        chosen = choose(head_logits(spec, params, state.last), rule, state.seed, state.index, place)
        token = jnp.where(state.stopped, NOTHING, chosen)[:, None]
        position = state.prompt_length[:, None] + state.count
        states, cache = extend(spec, params, jnp.maximum(token, 0), position, state.cache, rows=split)
        return state._replace(
            cache=cache,
            last=states[:, 0],
            written=lax.dynamic_update_slice_in_dim(state.written, token, state.count, axis=1),
            count=state.count + 1,
            stopped=state.stopped | (token == rule.stop[None, :]).any(axis=1) | (state.count + 1 >= state.room),
        )

    # The last token of all is read for nothing: one step in many, and the sampler is compiled here only.
    return lax.while_loop(wanted, step, state)


def choose(
    logits: Float[Array, "B V"],
    rule: Rule,
    seed: UInt32[Array, ""],
    index: Int[Array, " B"],
    count: Int[Array, " B"],
) -> Int[Array, " B"]:
    """The next token of each row. What row b draws depends on (seed, index[b], count[b]) and on its own logits."""

    def draw(index, count, scores):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), count)
        return jax.random.categorical(key, scores)

    def from_some():
        tokens, scores = ranked(logits, rule)
        rank = jax.vmap(draw)(index, count, scores)
        return jnp.take_along_axis(tokens, rank[:, None], axis=1)[:, 0].astype(jnp.int32)

    def from_all():
        # less the largest first: no temperature, however small, makes infinities of two that are equal
        scores = (logits - logits.max(axis=-1, keepdims=True)) / rule.temperature
        return jax.vmap(draw)(index, count, scores).astype(jnp.int32)

    def likeliest():
        # in two steps that XLA's CPU compiler computes sixteen at a time, and argmax one by one
        place = jnp.arange(logits.shape[1], dtype=jnp.int32)[None, :]
        best = jnp.where(logits == logits.max(axis=-1, keepdims=True), place, logits.shape[1] - 1)
        return best.min(axis=-1)

    every = (rule.top_p == 1) & (rule.top_k >= logits.shape[1])
    way = jnp.where(rule.temperature == 0, 0, jnp.where(every, 1, 2))
    return lax.switch(way, (likeliest, from_all, from_some))


def ranked(logits: Float[Array, "B V"], rule: Rule) -> tuple[Int[Array, "B V"], Float[Array, "B V"]]:
    """Tokens from the most probable down, and the logits that they are drawn by (-inf: dropped by top_k or top_p).

    A token is kept while those before it add up to less than top_p, so the first one always is.

        probabilities = [.1 .5 .4],  top_p = .8   ->   tokens = [1 2 0],  logits = [log .5  log .4  -inf]
    """
    tokens = jnp.argsort(logits, axis=-1, descending=True)
    scores = jnp.take_along_axis(logits, tokens, axis=-1)
    # less the largest first: no temperature, however small, makes infinities of two that are equal
    scores = (scores - scores[:, :1]) / rule.temperature
    scores = jnp.where(jnp.arange(scores.shape[1], dtype=jnp.int32)[None, :] < rule.top_k, scores, -jnp.inf)
    share = jax.nn.softmax(scores, axis=-1)
    before = jnp.pad(jnp.cumsum(share, axis=-1)[:, :-1], ((0, 0), (1, 0)))
    # with top_p = 1 nothing is dropped, though rounding may bring the sum to 1 before the last token
    return tokens, jnp.where((before < rule.top_p) | (rule.top_p == 1), scores, -jnp.inf)
