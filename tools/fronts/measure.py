"""What a policy writes, what that is worth, and how far the policy is from the one that it came from.

Letters: B rows, T slots, V vocabulary.
"""

import functools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.data.templates import Codec
from dpo_jax.evaluation import winrate
from dpo_jax.evaluation.generate import Decoding, generate
from dpo_jax.hf.checkpoint import load_hf
from dpo_jax.hf.tokenizer import load_tokenizer
from dpo_jax.model.attention import causal
from dpo_jax.model.decoder import Model, hidden, logits, scalar_scores
from tools.fronts import world

LONGEST = 48
"""Most tokens of an answer; reviews have at most 40, and a policy may write longer ones."""
SLOTS = 80
"""Tokens of a prompt and an answer."""
ROWS = 128
"""Texts that are looked at at a time."""


class Language(NamedTuple):
    """How texts become tokens and back, and what ends them."""

    coder: Codec
    stop: tuple[int, ...]

    @classmethod
    def of(cls, folder: Path) -> "Language":
        """That of a model folder."""
        tokenizer = load_tokenizer(folder, None)
        return cls(winrate.prompt_codec(tokenizer), winrate.stop_tokens(folder, tokenizer))

    def ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids that ask for an answer."""
        return [winrate.prompt_tokens(prompt, self.coder) for prompt in prompts]

    def text(self, tokens: Sequence[int]) -> str:
        """An answer as text."""
        return winrate.text_of(self.coder.tokenizer, tokens)


class Sample(NamedTuple):
    """A prompt, and the answer to it as the model wrote it, the end included."""

    prompt: list[int]
    written: list[int]
    text: str


def load(folder: Path) -> Model:
    """A model in float32."""
    return load_hf(folder)


def samples(model: Model, language: Language, prompts: Sequence[str], seed: int) -> list[Sample]:
    """An answer to each prompt, drawn at temperature 1."""
    ids = language.ids(prompts)
    decoding = Decoding(max_new_tokens=LONGEST, temperature=1.0, stop=language.stop)
    answers = generate(model.spec, model.params, ids, decoding, seed=seed, batch_size=256)
    return [Sample(one, answer.written, language.text(answer.tokens)) for one, answer in zip(ids, answers, strict=True)]


class Texts(NamedTuple):
    """Samples as arrays, padded on the right: tokens [B, T], and which of them are of an answer."""

    tokens: Any
    answered: Any

    @classmethod
    def of(cls, found: Sequence[Sample], rows: int = ROWS) -> "Texts":
        """Up to `rows` samples, and rows of nothing behind them."""
        tokens, answered = np.zeros((rows, SLOTS), np.int32), np.zeros((rows, SLOTS), bool)
        for row, sample in enumerate(found):
            start, end = len(sample.prompt), len(sample.prompt) + len(sample.written)
            tokens[row, :end] = [*sample.prompt, *sample.written]
            answered[row, start:end] = True
        return cls(tokens, answered)


@functools.partial(jax.jit, static_argnums=0)
def _divergence(spec: Any, policy: Any, reference: Any, texts: Texts) -> jax.Array:
    """For each row, the sum over the places of its answer of KL(policy || reference) of the next token, in nats."""
    ours, theirs = (jax.nn.log_softmax(logits(spec, params, texts.tokens)) for params in (policy, reference))
    each = (jnp.exp(ours) * (ours - theirs)).sum(-1)[:, :-1]
    return jnp.where(texts.answered[:, 1:], each, 0.0).sum(-1)


def divergences(policy: Model, reference: Model, found: Sequence[Sample]) -> list[float]:
    """For each sample of the policy, an estimate of KL(policy || reference) over whole answers, in nats.

    By the chain rule this is the sum over places of the divergence of the next token, given what is before it.
    """
    parts = [found[start : start + ROWS] for start in range(0, len(found), ROWS)]
    sums = [_divergence(policy.spec, policy.params, reference.params, Texts.of(part)) for part in parts]
    return [float(value) for part, row in zip(parts, sums, strict=True) for value in np.asarray(row)[: len(part)]]


@functools.partial(jax.jit, static_argnums=0)
def _scores(spec: Any, params: Any, texts: Texts) -> jax.Array:
    states = hidden(spec, params, texts.tokens, causal(*texts.tokens.shape))
    last = texts.tokens.shape[1] - 1 - jnp.argmax(texts.answered[:, ::-1], axis=1)
    return scalar_scores(spec, params, states[jnp.arange(states.shape[0]), last])


def scores(judge: Model, found: Sequence[Sample]) -> list[float]:
    """What a reward model says of each sample: its score at the answer's last token."""
    parts = [found[start : start + ROWS] for start in range(0, len(found), ROWS)]
    rows = [_scores(judge.spec, judge.params, Texts.of(part)) for part in parts]
    return [float(value) for part, row in zip(parts, rows, strict=True) for value in np.asarray(row)[: len(part)]]


def measured(
    policy: Model, reference: Model, language: Language, prompts: Sequence[str], seed: int
) -> dict[str, float]:
    """Expected reward of a policy's answers, its divergence from the reference, and their length, with errors."""
    found = samples(policy, language, prompts, seed)
    rewards, apart = [world.reward(sample.text) for sample in found], divergences(policy, reference, found)
    return {
        "reward": statistics.fmean(rewards),
        "reward_error": statistics.stdev(rewards) / len(rewards) ** 0.5,
        "kl": statistics.fmean(apart),
        "kl_error": statistics.stdev(apart) / len(apart) ** 0.5,
        "tokens": statistics.fmean(len(sample.written) for sample in found),
    }
