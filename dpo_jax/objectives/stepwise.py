"""Objectives that look beyond the pair: at all ranked completions of a prompt, or at all the pairs of a step.

Letters and names as in pairwise.py; a step's arrays may have any shape, and hold entries that are not real; N are
all of them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dpo_jax.objectives.pairs import LossOutput, Pairs, Ranking, Scalar
from dpo_jax.objectives.pairwise import cross_entropy, log_ratios, rewards

SMALLEST_BETA = 1e-3
"""Least beta that beta-DPO adapts to (as in its authors' code)."""
SMALLEST_SPREAD = 1e-2
"""Least spread of gaps, in nats, that beta-DPO draws by: a smaller one is rounding, as at the start."""


def plackett_luce(pairs: Pairs, *, beta: Scalar) -> LossOutput:
    """DPO for rankings (arXiv:2305.18290, appendix A.3, equation 20): the best is chosen, then the best of the rest.

        loss = sum over completions k of  log sum_{j: j = k or ranked below k} exp(beta u_j) - beta u_k

    Equals never compete with each other. Of two completions this is DPO.
    """
    ranking = pairs.ranking or Ranking(
        jnp.stack([pairs.policy_chosen, pairs.policy_rejected], axis=-1),
        jnp.stack([pairs.reference_chosen, pairs.reference_rejected], axis=-1),
        jnp.broadcast_to(jnp.arange(2, dtype=jnp.int32), (*pairs.policy_chosen.shape, 2)),
    )
    u, rank = beta * (ranking.policy - jax.lax.stop_gradient(ranking.reference)), ranking.rank
    itself = jnp.eye(rank.shape[-1], dtype=bool).reshape((1,) * (rank.ndim - 1) + (rank.shape[-1],) * 2)
    rivals = itself | (rank[..., None, :] > rank[..., :, None])  # no completion has the least rank, so it rivals none
    field = jax.nn.logsumexp(jnp.where(rivals, u[..., None, :], -jnp.inf), axis=-1)
    losses = jnp.where(rank >= 0, field - u, 0.0).sum(axis=-1)
    chosen, rejected = rewards(pairs, beta)
    return LossOutput(losses, chosen - rejected)


def aot(pairs: Pairs, *, beta: Scalar, label_smoothing: Scalar) -> LossOutput:
    """AOT (Melnyk et al. 2024, arXiv:2406.05882): the policy's sorted log-odds against the reference's, over the step.

    q = sort(log pi(y_w) - log pi(y_l)) - sort(log pi_ref(y_w) - log pi_ref(y_l)),  loss = cross entropy of beta q

    A pair gets the value of the place that its own log-odds take.
    """
    policy = pairs.policy_chosen - pairs.policy_rejected
    reference = pairs.reference_chosen - pairs.reference_rejected
    h = beta * (policy - _at_rank(reference, _order(policy, pairs.real), pairs.real))
    return LossOutput(cross_entropy(h, 1 - label_smoothing), h)


def aot_unpaired(pairs: Pairs, *, beta: Scalar, label_smoothing: Scalar) -> LossOutput:
    """AOT without pairs (arXiv:2406.05882): `q = sort(u_w) - sort(u_l)` over the step, loss as in `aot`."""
    chosen, rejected = log_ratios(pairs)
    h = beta * (chosen - _at_rank(rejected, _order(chosen, pairs.real), pairs.real))
    return LossOutput(cross_entropy(h, 1 - label_smoothing), h)


def _order(values: Float[Array, "*P"], real: Bool[Array | np.ndarray, "*P"]) -> Int[Array, " N"]:
    """Indices that sort all values, flat; what is not real comes last."""
    return jnp.argsort(jnp.where(real, jax.lax.stop_gradient(values), jnp.inf).reshape(-1))


def _at_rank(
    values: Float[Array, "*P"], order: Int[Array, " N"], real: Bool[Array | np.ndarray, "*P"]
) -> Float[Array, "*P"]:
    """For each place, the value whose rank is the rank that `order` gives the place."""
    mine = values.reshape(-1)[_order(values, real)]
    ranks = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
    return mine[ranks].reshape(values.shape)


def kto(pairs: Pairs, *, beta: Scalar, desirable_weight: Scalar, undesirable_weight: Scalar) -> LossOutput:
    """KTO (Ethayarajh et al. 2024, arXiv:2402.01306, equation 8) on single completions that are desirable or not.

        z    = max(0, mean over the step of u of a completion that belongs to another prompt), without gradient
        loss = desirable_weight (1 - S(beta (u - z)))  or  undesirable_weight (1 - S(beta (z - u)))

    The completion is `chosen`, the one of another prompt is `rejected`, and `label` is 1 where it is desirable.
    """
    u, elsewhere = log_ratios(pairs)
    count = jnp.maximum(pairs.real.sum(), 1).astype(jnp.float32)
    z = jax.lax.stop_gradient(jnp.maximum(jnp.where(pairs.real, elsewhere, 0.0).sum() / count, 0.0))
    h = beta * (u - z)
    good = desirable_weight * pairs.label * jax.nn.sigmoid(-h)
    bad = undesirable_weight * (1 - pairs.label) * jax.nn.sigmoid(h)
    return LossOutput(good + bad, (2 * pairs.label - 1) * h)


def beta_dpo(
    pairs: Pairs,
    *,
    beta: Scalar,
    adapt: Scalar,
    keep_fraction: Scalar,
    momentum: Scalar,
    memory: Float[Array, " 2"] | None = None,
) -> LossOutput:
    """beta-DPO (Wu et al. 2024, arXiv:2407.08639, equations 7 to 9): a step's beta follows the gaps that it finds.

        g          = u_w - u_l of each pair, without gradient
        mean, std  = momentum * (those of the steps before) + (1 - momentum) * (those of this step)
        kept       = a share keep_fraction of the pairs, drawn without replacement by exp(-((g - mean) / std)^2 / 2)
        beta_step  = beta (1 + adapt (mean of g over the kept - mean)), at least SMALLEST_BETA
        loss       = -log S(beta_step (u_w - u_l)) of the kept pairs, their mean being the step's

    `memory` is (mean, std), 0 at first. Which pairs are kept follows from `pairs.noise` and from no hidden state;
    without noise those nearest to the mean are.
    """
    chosen, rejected = log_ratios(pairs)
    gaps, real = jax.lax.stop_gradient(chosen - rejected), pairs.real
    count = jnp.maximum(real.sum(), 1).astype(jnp.float32)
    mean = jnp.where(real, gaps, 0.0).sum() / count
    spread = jnp.sqrt(jnp.where(real, jnp.square(gaps - mean), 0.0).sum() / jnp.maximum(count - 1.0, 1.0))
    memory = jnp.zeros(2, jnp.float32) if memory is None else memory
    memory = momentum * memory + (1.0 - momentum) * jnp.stack([mean, spread])
    kept, number = _drawn(gaps, real, pairs.noise, memory, jnp.maximum(jnp.floor(keep_fraction * count + 1e-3), 1.0))
    found = jnp.where(kept, gaps, 0.0).sum() / number
    used = jnp.maximum(beta * (1.0 + adapt * (found - memory[0])), SMALLEST_BETA)
    h = used * (chosen - rejected)
    return LossOutput(jnp.where(kept, cross_entropy(h) * (count / number), 0.0), h, memory)


def _drawn(
    gaps: Float[Array, "*P"],
    real: Bool[Array | np.ndarray, "*P"],
    noise: Float[Array | np.ndarray, "*P"] | None,
    memory: Float[Array, " 2"],
    number: Float[Array, ""],
) -> tuple[Bool[Array, "*P"], Float[Array, ""]]:
    """Which pairs are drawn (weights with Gumbel noise, the `number` largest, is drawing without replacement)."""
    uniform = jnp.full_like(gaps, 0.5) if noise is None else jnp.clip(noise, 1e-6, 1 - 1e-6)
    distance = (gaps - memory[0]) / jnp.maximum(memory[1], SMALLEST_SPREAD)
    scores = -0.5 * jnp.square(distance) - jnp.log(-jnp.log(uniform))
    order = _order(-scores, real)
    ranks = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
    return jnp.logical_and(real, ranks.reshape(gaps.shape).astype(jnp.float32) < number), number
