"""PPO on a reward model (Ziegler et al. 2019, arXiv:1909.08593; Schulman et al. 2017, arXiv:1707.06347), as small as it
is: the baseline that DPO is held against in its paper. One device, short answers, everything in float32.

The reward of an answer is the reward model's score at its last token, less `kl` times log pi(token) / pi_ref(token) at
each token. Advantages by GAE (arXiv:1506.02438), whitened over the batch.

Letters: B rows, T slots, D width.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax.model.attention import causal
from dpo_jax.model.decoder import Model, head_logits, hidden
from tools.fronts import measure
from tools.fronts.measure import Language, Texts

CLIP = 0.2
LAMBDA = 0.95
VALUE_WEIGHT = 0.1
PASSES, PARTS = 2, 2
"""How often each batch of answers is gone through, and in how many parts."""


class Rollout(NamedTuple):
    """Answers and what was known of them when they were written; arrays [B, T - 1], of the token after each place."""

    texts: Texts
    logps: jax.Array
    advantages: jax.Array
    returns: jax.Array


class State(NamedTuple):
    """What PPO changes: the policy and a value head that reads the same states."""

    weights: Any
    optimizer: Any


def start(policy: Model, rate: float) -> tuple[State, optax.GradientTransformation]:
    """The policy that is given, a value of 0, and Adam."""
    weights = {"policy": policy.params, "value": jnp.zeros((policy.spec.head_width,), jnp.float32)}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    return State(weights, optimizer.init(weights)), optimizer


def _outputs(spec: Any, weights: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of each next token, and values before it, both [B, T - 1]."""
    states = hidden(spec, weights["policy"], tokens, causal(*tokens.shape))
    scores = head_logits(spec, weights["policy"], states.reshape(-1, spec.head_width))
    scores = jax.nn.log_softmax(scores.reshape(*tokens.shape, -1))[:, :-1]
    logps = jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
    return logps, (states @ weights["value"])[:, :-1]


@functools.partial(jax.jit, static_argnums=0)
def roll(spec: Any, weights: Any, reference: Any, texts: Texts, scores: jax.Array, kl: jax.Array) -> Rollout:
    """What the answers were worth, token by token."""
    real = texts.answered[:, 1:]
    logps, values = _outputs(spec, weights, texts.tokens)
    before, _ = _outputs(spec, {"policy": reference, "value": weights["value"]}, texts.tokens)
    last = real & ~jnp.pad(real, ((0, 0), (0, 1)))[:, 1:]
    rewards = jnp.where(real, -kl * (logps - before), 0.0) + jnp.where(last, scores[:, None], 0.0)
    values = jnp.where(real, values, 0.0)
    after = jnp.pad(values, ((0, 0), (0, 1)))[:, 1:]
    errors = jnp.where(real, rewards + after - values, 0.0)

    def back(carry, error):
        carry = error + LAMBDA * carry
        return carry, carry

    _, sums = jax.lax.scan(back, jnp.zeros(errors.shape[0]), errors.T[::-1])
    advantages = jnp.where(real, sums[::-1].T, 0.0)
    count = real.sum().astype(jnp.float32)
    mean = advantages.sum() / count
    spread = jnp.sqrt(jnp.where(real, jnp.square(advantages - mean), 0.0).sum() / count)
    return Rollout(texts, logps, (advantages - mean) / (spread + 1e-6), advantages + values)


def _loss(spec: Any, weights: Any, rollout: Rollout) -> jax.Array:
    real = rollout.texts.answered[:, 1:]
    logps, values = _outputs(spec, weights, rollout.texts.tokens)
    ratio = jnp.exp(jnp.where(real, logps - rollout.logps, 0.0))
    gain = jnp.minimum(ratio * rollout.advantages, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * rollout.advantages)
    off = VALUE_WEIGHT * 0.5 * jnp.square(values - rollout.returns)
    return jnp.where(real, off - gain, 0.0).sum() / real.sum().astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def update(spec: Any, optimizer: optax.GradientTransformation, state: State, rollout: Rollout) -> State:
    """One step of Adam on the clipped objective."""
    slopes = jax.grad(lambda weights: _loss(spec, weights, rollout))(state.weights)
    changes, kept = optimizer.update(slopes, state.optimizer, state.weights)
    return State(optax.apply_updates(state.weights, changes), kept)


class Plan(NamedTuple):
    """The weight of the divergence, Adam's rate, after which rounds the policy is looked at, and the seed."""

    kl: float
    rate: float
    keep: Sequence[int]
    seed: int


def train(
    policy: Model, judge: Model, language: Language, prompts: Sequence[str], plan: Plan
) -> Iterator[tuple[int, Model]]:
    """The policy after each number of rounds in `plan.keep`; a round is `measure.ROWS` prompts."""
    spec, (state, optimizer) = policy.spec, start(policy, plan.rate)
    rng = np.random.default_rng(plan.seed)
    for number in range(1, plan.keep[-1] + 1):
        asked = [prompts[int(index)] for index in rng.choice(len(prompts), measure.ROWS, replace=False)]
        now = Model(spec, state.weights["policy"])
        found = measure.samples(now, language, asked, seed=plan.seed * 100_003 + number)
        worth = jnp.asarray(measure.scores(judge, found), jnp.float32)
        rollout = roll(spec, state.weights, policy.params, Texts.of(found), worth, jnp.float32(plan.kl))
        for _ in range(PASSES):
            for part in np.split(rng.permutation(measure.ROWS), PARTS):
                some = jax.tree.map(lambda array, part=part: jnp.asarray(array)[part], rollout)
                state = update(spec, optimizer, state, some)
        if number in plan.keep:
            yield number, Model(spec, state.weights["policy"])
