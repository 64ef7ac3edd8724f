"""Preference objectives: pure functions of log-probabilities to one value per pair. Nothing here knows a model.

`table.py` has the table of them: names, settings, papers. `stepwise.py` has those that look at more than one
pair at a time, `mixture.py` adds objectives up.

Letters: P pairs, C completions, W completions of a ranking. Log-probabilities are sums over a completion's tokens, in
nats. In the docstrings u is a completion's log-ratio `log pi(y | x) - log pi_ref(y | x)`, w the chosen and l the
rejected completion, n a number of tokens, S the sigmoid, and e the label smoothing.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dpo_jax.errors import UserError, short
from dpo_jax.objectives.pairs import LossOutput, Numbers, Pairs, Scalar, as_numbers, make_pairs

LARGEST_EXPONENT = 40.0
"""The f-divergences' phi is at least -exp(40): constant beyond (log-ratios of tens of nats), and its square finite."""
SMALLEST_SURPRISE = 1e-6
"""Least mean surprise per token, in nats, that odds are taken of: a completion that is certain has infinite odds."""


class DPOLoss(NamedTuple):
    """One value per pair, unreduced; the rewards carry no gradient."""

    losses: Float[Array, "*P"]
    chosen_rewards: Float[Array, "*P"]
    rejected_rewards: Float[Array, "*P"]


def dpo_loss(
    policy_chosen_logps: Numbers,
    policy_rejected_logps: Numbers,
    reference_chosen_logps: Numbers,
    reference_rejected_logps: Numbers,
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
) -> DPOLoss:
    """Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290, equation 7), per pair.

        reward(y) = beta * (log pi(y | x) - log pi_ref(y | x))                           (equation 5, up to a constant)
        h         = reward(chosen) - reward(rejected)
        loss      = -(1 - label_smoothing) * log sigmoid(h) - label_smoothing * log sigmoid(-h)

    With label_smoothing = 0 this is the paper's loss, ln 2 where policy and reference agree; otherwise it is
    conservative DPO, for labels that are the wrong way round with that chance. Reference log-probabilities are data:
    no gradient reaches them. Any floating dtype goes in, float32 comes out.

    h = 0.5 * (1.0 - (-1.0)) = 1.0, so the loss is log(1 + exp(-1)):

    >>> found = dpo_loss(*jnp.array([[-1.0], [-3.0], [-2.0], [-2.0]]), beta=0.5)
    >>> [round(float(number[0]), 4) for number in found]  # loss, chosen and rejected reward
    [0.3133, 0.5, -0.5]

    Raises:
      UserError: the numbers are none, or not as many of each; beta or label_smoothing, if it is a number of Python, is
        out of range.
    """
    _check_number("beta", beta, lambda number: 0 < number < math.inf, "must be a number > 0, such as 0.1")
    _check_number("label_smoothing", label_smoothing, lambda number: 0 <= number <= 1, "must be a chance, from 0 to 1")
    first = as_numbers("policy_chosen_logps", policy_chosen_logps)
    others = {
        "policy_rejected_logps": policy_rejected_logps,
        "reference_chosen_logps": reference_chosen_logps,
        "reference_rejected_logps": reference_rejected_logps,
    }
    sums = (first, *(as_numbers(name, value, first.shape) for name, value in others.items()))
    return _dpo_loss(sums, beta, label_smoothing)


@jax.jit
def _dpo_loss(sums: tuple[Array, ...], beta: Scalar, label_smoothing: Scalar) -> DPOLoss:
    pairs = make_pairs(*sums)
    losses = sigmoid(pairs, beta=beta, label_smoothing=label_smoothing).losses
    return DPOLoss(losses, *jax.lax.stop_gradient(rewards(pairs, beta)))


def _check_number(name: str, value: object, allowed: Callable[[Any], bool], remedy: str) -> None:
    """Refuse what is no number, and a number of Python that is out of range; one of JAX may be traced, and is not
    looked at."""
    if not isinstance(value, numbers.Real | jax.Array | np.ndarray | np.generic):
        raise UserError(f"{name}: {short(repr(value))}: {remedy}")
    if isinstance(value, numbers.Real) and not allowed(value):
        raise UserError(f"{name}: {value}: {remedy}")


def _picks(name: str, value: Numbers, count: int, shape: tuple[int, ...] | None = None) -> Array:
    """Indices that a caller gave, int32; those of a list or of NumPy are looked at, and what is of no completion is
    `count`.

    Raises:
      UserError: they are no whole numbers, one of them is not of a completion, or there are not as many as in `shape`.
    """
    found = as_numbers(name, value, shape)
    if found.size and not jnp.issubdtype(found.dtype, jnp.integer):
        raise UserError(f"{name}: is of {found.dtype}; give the numbers of completions, as whole numbers")
    if not isinstance(value, jax.Array) and found.size and not 0 <= np.min(value) <= np.max(value) < count:
        wrong = next(one for one in np.ravel(np.asarray(value)) if not 0 <= one < count)
        raise UserError(f"{name}: {wrong}: there are {count} completions, 0 to {count - 1}")
    found = found.astype(jnp.int32)
    return jnp.where(found < 0, count, found)


def dpo_loss_from_indices(
    pi_logps: Numbers,
    ref_logps: Numbers,
    yw_idxs: Numbers,
    yl_idxs: Numbers,
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
) -> DPOLoss:
    """`dpo_loss` in the paper's index form (its appendix B): pair p prefers completion yw_idxs[p] to yl_idxs[p].

    A completion may take part in any number of pairs, so one prompt with four ranked answers is four log-probabilities
    and six pairs.

    >>> ranked, reference = jnp.array([-1.0, -2.0, -3.0]), jnp.array([-2.0, -2.0, -2.0])
    >>> found = dpo_loss_from_indices(ranked, reference, jnp.array([0, 0, 1]), jnp.array([1, 2, 2]), beta=1.0)
    >>> [round(float(loss), 4) for loss in found.losses]
    [0.3133, 0.1269, 0.3133]

    An index of an array of JAX, which may be traced, is not looked at: of a completion that is not there, as of -1, it
    gives nan.

    Raises:
      UserError: as `dpo_loss`; or an index of a list, or of NumPy, is of no completion.
    """
    pi = as_numbers("pi_logps", pi_logps)
    ref = as_numbers("ref_logps", ref_logps, pi.shape)
    better = _picks("yw_idxs", yw_idxs, pi.size)
    worse = _picks("yl_idxs", yl_idxs, pi.size, better.shape)
    sums = [part.at[index].get(mode="fill", fill_value=jnp.nan) for part in (pi, ref) for index in (better, worse)]
    return dpo_loss(*sums, beta=beta, label_smoothing=label_smoothing)


def rewards(pairs: Pairs, beta: Scalar, *, average: bool = False) -> tuple[Float[Array, "*P"], Float[Array, "*P"]]:
    """Implicit rewards of the chosen and of the rejected completions, `beta * u`, in nats; `average`: per token."""
    chosen, rejected = log_ratios(pairs)
    if average:
        chosen, rejected = per_token(chosen, pairs.chosen_length), per_token(rejected, pairs.rejected_length)
    return beta * chosen, beta * rejected


# ---------------------------------------------------------------------------------------------- parts of objectives


def log_ratios(
    pairs: Pairs, divergence: str = "reverse_kl", divergence_alpha: Scalar = 0.5
) -> tuple[Float[Array, "*P"], Float[Array, "*P"]]:
    """`phi(u)` of chosen and rejected completions; phi is the identity unless another divergence is asked for."""
    phi = DIVERGENCES[divergence]
    return (
        phi(pairs.policy_chosen - pairs.reference_chosen, divergence_alpha),
        phi(pairs.policy_rejected - pairs.reference_rejected, divergence_alpha),
    )


def per_token(sums: Float[Array, "*P"], length: Float[Array, "*P"]) -> Float[Array, "*P"]:
    """Sums divided by the number of scored tokens (at least 1)."""
    return sums / jnp.maximum(length, 1.0)


def cross_entropy(h: Float[Array, "*P"], chance: Scalar | Float[Array, "*P"] = 1.0) -> Float[Array, "*P"]:
    """`-chance * log S(h) - (1 - chance) * log S(-h)`: cost of the logit h where `chance` is that of being right."""
    return -chance * jax.nn.log_sigmoid(h) - (1 - chance) * jax.nn.log_sigmoid(-h)


def _power(u: Float[Array, "*P"], alpha: Scalar) -> Float[Array, "*P"]:
    gap = jnp.asarray(alpha, jnp.float32) - 1.0
    near = jnp.abs(gap) < 1e-6  # the limit at 1 is the reverse KL
    safe = jnp.where(near, 1.0, gap)
    most = LARGEST_EXPONENT + jnp.log(jnp.abs(safe))
    return jnp.where(near, u, jnp.expm1(jnp.minimum(safe * u, most)) / safe)


DIVERGENCES: dict[str, Callable[[Array, Scalar], Array]] = {
    "reverse_kl": lambda u, alpha: u,
    "forward_kl": lambda u, alpha: -jnp.expm1(jnp.minimum(-u, LARGEST_EXPONENT)),
    "js_divergence": lambda u, alpha: jnp.log(2.0) + jax.nn.log_sigmoid(u),
    "alpha_divergence": _power,
}
"""f-DPO (Wang et al. 2023, arXiv:2309.16240): `phi(u) = f'(exp(u))` up to a constant, for each divergence f.

Alpha is TRL's, 1 less the paper's: 0 is the forward KL and 1 the reverse KL."""


def desensitized(pairs: Pairs, ld_alpha: Scalar) -> Pairs:
    """LD-DPO (Liu et al. 2024, arXiv:2409.06411): tokens beyond the length that both completions have weigh ld_alpha.

        s(y) = sum of the first min(n_w, n_l) tokens + ld_alpha * sum of the others        (policy and reference alike)

    ld_alpha = 1 changes nothing, 0 leaves only what both have.
    """
    assert pairs.shared is not None
    parts = {
        name: shared + ld_alpha * (getattr(pairs, name) - shared) for name, shared in pairs.shared._asdict().items()
    }
    return pairs._replace(**parts)


def policy_weights(pairs: Pairs, *, clamped: bool) -> Float[Array, "*P"]:
    """WPO (Zhou et al. 2024, arXiv:2406.11827, equation 4): how likely the policy is to say what it learns from.

        w = exp(mean_t(log p_t - log sum_v p_t(v)^2)) of the chosen completion * that of the rejected one

    No gradient. `clamped` bounds w by 1, as the authors do; TRL 1.16 does not.
    """
    assert pairs.alignment is not None
    exponent = jax.lax.stop_gradient(pairs.alignment[0] + pairs.alignment[1])
    return jnp.exp(jnp.minimum(exponent, 0.0) if clamped else exponent)


# ---------------------------------------------------------------------------------------------- objectives of pairs


def sigmoid(
    pairs: Pairs,
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
    divergence: str = "reverse_kl",
    divergence_alpha: Scalar = 0.5,
) -> LossOutput:
    """DPO as in `dpo_loss`, with margin m (arXiv:2402.10571) and label p: `h = beta * (phi(u_w) - phi(u_l)) - m`.

    loss = -q log S(h) - (1 - q) log S(-h),  q = p (1 - e) + (1 - p) e
    """
    chosen, rejected = log_ratios(pairs, divergence, divergence_alpha)
    h = beta * (chosen - rejected) - pairs.margin
    return LossOutput(cross_entropy(h, _smoothed(pairs.label, label_smoothing)), h)


def _smoothed(label: Float[Array, "*P"], label_smoothing: Scalar) -> Float[Array, "*P"]:
    return label * (1 - label_smoothing) + (1 - label) * label_smoothing


def hinge(pairs: Pairs, *, beta: Scalar, divergence: str, divergence_alpha: Scalar) -> LossOutput:
    """SLiC's hinge on DPO's logit (Zhao et al. 2023, arXiv:2305.10425): `max(0, 1 - h)`, h with the pair's margin."""
    chosen, rejected = log_ratios(pairs, divergence, divergence_alpha)
    h = beta * (chosen - rejected) - pairs.margin
    return LossOutput(jax.nn.relu(1.0 - h), h)


def ipo(pairs: Pairs, *, beta: Scalar, divergence: str, divergence_alpha: Scalar) -> LossOutput:
    """IPO (Azar et al. 2023, arXiv:2310.12036, equation 17), on log-ratios per token as TRL does.

    d = phi(u_w) / n_w - phi(u_l) / n_l,  loss = (d - 1 / (2 beta))^2
    """
    chosen, rejected = log_ratios(pairs, divergence, divergence_alpha)
    gap = per_token(chosen, pairs.chosen_length) - per_token(rejected, pairs.rejected_length)
    return LossOutput(jnp.square(gap - 1.0 / (2.0 * beta)), gap)


def exo_pair(
    pairs: Pairs, *, beta: Scalar, label_smoothing: Scalar, divergence: str, divergence_alpha: Scalar
) -> LossOutput:
    """EXO for pairs (Ji et al. 2024, arXiv:2402.00856, equation 16): KL from the model's choice to the smoothed label.

    loss = S(h) (log S(h) - log(1 - e)) + S(-h) (log S(-h) - log e)
    """
    chosen, rejected = log_ratios(pairs, divergence, divergence_alpha)
    h = beta * (chosen - rejected)
    right = jax.nn.sigmoid(h) * (jax.nn.log_sigmoid(h) - jnp.log1p(-label_smoothing))
    wrong = jax.nn.sigmoid(-h) * (jax.nn.log_sigmoid(-h) - jnp.log(label_smoothing))
    return LossOutput(right + wrong, h)


def nca_pair(pairs: Pairs, *, beta: Scalar) -> LossOutput:
    """NCA for pairs (Chen et al. 2024, arXiv:2402.05369): absolute rewards, so the chosen one is not let fall.

    loss = -log S(beta u_w) - (log S(-beta u_w) + log S(-beta u_l)) / 2
    """
    chosen, rejected = rewards(pairs, beta)
    losses = cross_entropy(chosen) + 0.5 * cross_entropy(-chosen) + 0.5 * cross_entropy(-rejected)
    return LossOutput(losses, chosen - rejected)


def robust(
    pairs: Pairs, *, beta: Scalar, label_smoothing: Scalar, divergence: str, divergence_alpha: Scalar
) -> LossOutput:
    """Robust DPO (Chowdhury et al. 2024, arXiv:2403.00409): unbiased where labels are flipped with chance e < 1/2.

    loss = (-(1 - e) log S(h) + e log S(-h)) / (1 - 2 e)                                     (it may be negative)
    """
    chosen, rejected = log_ratios(pairs, divergence, divergence_alpha)
    h = beta * (chosen - rejected)
    losses = (1 - label_smoothing) * cross_entropy(h) - label_smoothing * cross_entropy(-h)
    return LossOutput(losses / (1 - 2 * label_smoothing), h)


def bco_pair(pairs: Pairs, *, beta: Scalar) -> LossOutput:
    """BCO (Jung et al. 2024, arXiv:2404.04656) without its reward shift, as in TRL.

    loss = -log S(beta u_w) - log S(-beta u_l)
    """
    chosen, rejected = rewards(pairs, beta)
    return LossOutput(cross_entropy(chosen) + cross_entropy(-rejected), chosen - rejected)


def sppo_hard(pairs: Pairs, *, beta: Scalar) -> LossOutput:
    """SPPO with hard labels (Wu et al. 2024, arXiv:2405.00675): (u_w - 1 / (2 beta))^2 + (u_l + 1 / (2 beta))^2."""
    chosen, rejected = log_ratios(pairs)
    target = 0.5 / beta
    return LossOutput(jnp.square(chosen - target) + jnp.square(rejected + target), chosen - rejected)


def apo_zero(pairs: Pairs, *, beta: Scalar) -> LossOutput:
    """APO-zero (D'Oosterlinck et al. 2024, arXiv:2408.06266): 1 - S(beta u_w) + S(beta u_l)."""
    chosen, rejected = rewards(pairs, beta)
    return LossOutput(jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected), chosen - rejected)


def apo_down(pairs: Pairs, *, beta: Scalar) -> LossOutput:
    """APO-down (arXiv:2408.06266, equation 8, plus 1): S(beta u_w) + 1 - S(beta (u_w - u_l))."""
    chosen, rejected = rewards(pairs, beta)
    return LossOutput(jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen), chosen - rejected)


def discopop(pairs: Pairs, *, beta: Scalar, tau: Scalar, divergence: str, divergence_alpha: Scalar) -> LossOutput:
    """DiscoPOP's modulated loss (Lu et al. 2024, arXiv:2406.08414): logistic and exponential, mixed by a gate.

    g = S(h / tau),  loss = -(1 - g) log S(h) + g exp(-h)                        (g exp(-h) as one exponent: finite)
    """
    chosen, rejected = log_ratios(pairs, divergence, divergence_alpha)
    h = beta * (chosen - rejected)
    exponent = -jnp.logaddexp(h, h - h / tau)  # log g - h, without the difference of two large numbers
    return LossOutput(jax.nn.sigmoid(-h / tau) * cross_entropy(h) + jnp.exp(exponent), h)


def sigmoid_norm(pairs: Pairs, *, beta: Scalar, divergence: str, divergence_alpha: Scalar) -> LossOutput:
    """Length-normalised DPO (Tulu 3, arXiv:2411.15124): -log S(beta (phi(u_w) / n_w - phi(u_l) / n_l) - m)."""
    chosen, rejected = log_ratios(pairs, divergence, divergence_alpha)
    gap = per_token(chosen, pairs.chosen_length) - per_token(rejected, pairs.rejected_length)
    h = beta * gap - pairs.margin
    return LossOutput(cross_entropy(h, pairs.label), h)


def rdpo(pairs: Pairs, *, beta: Scalar, length_penalty: Scalar, label_smoothing: Scalar) -> LossOutput:
    """R-DPO (Park et al. 2024, arXiv:2403.19159, equation 9): DPO for a reward less `length_penalty` per token.

    h = beta (u_w - u_l) + length_penalty (n_w - n_l) - m,  loss as in `sigmoid`
    """
    chosen, rejected = rewards(pairs, beta)
    h = chosen - rejected + length_penalty * (pairs.chosen_length - pairs.rejected_length) - pairs.margin
    return LossOutput(cross_entropy(h, _smoothed(pairs.label, label_smoothing)), h)


def cal_dpo(pairs: Pairs, *, beta: Scalar, calibration_weight: Scalar) -> LossOutput:
    """Cal-DPO (Xiao et al. 2024, arXiv:2412.14516): rewards are also held to their scale, +-1/2 in units of beta u.

    loss = -log S(u_w - u_l) + calibration_weight ((u_w - 1 / (2 beta))^2 + (u_l + 1 / (2 beta))^2)

    The paper has calibration_weight = 1, its authors' code 1/2.
    """
    chosen, rejected = log_ratios(pairs)
    target = 0.5 / beta
    calibration = jnp.square(chosen - target) + jnp.square(rejected + target)
    return LossOutput(cross_entropy(chosen - rejected) + calibration_weight * calibration, chosen - rejected)


def simpo(pairs: Pairs, *, beta: Scalar, gamma: Scalar, label_smoothing: Scalar) -> LossOutput:
    """SimPO (Meng et al. 2024, arXiv:2405.14734, equation 6): mean log-probabilities, a target margin, no reference.

    h = beta (log pi(y_w) / n_w - log pi(y_l) / n_l) - gamma - m,  loss as in `sigmoid`
    """
    chosen = per_token(pairs.policy_chosen, pairs.chosen_length)
    rejected = per_token(pairs.policy_rejected, pairs.rejected_length)
    h = beta * (chosen - rejected) - gamma - pairs.margin
    return LossOutput(cross_entropy(h, _smoothed(pairs.label, label_smoothing)), h)


def odds_ratio(pairs: Pairs) -> LossOutput:
    """The preference term of ORPO (Hong et al. 2024, arXiv:2403.07691, equation 7): -log S(log odds_w - log odds_l).

    log odds(y) = a - log(1 - exp(a)),  a = log pi(y) / n                   (a at most -SMALLEST_SURPRISE: finite odds)
    """
    chosen, rejected = (
        _log_odds(per_token(sums, length))
        for sums, length in (
            (pairs.policy_chosen, pairs.chosen_length),
            (pairs.policy_rejected, pairs.rejected_length),
        )
    )
    return LossOutput(cross_entropy(chosen - rejected), chosen - rejected)


def _log_odds(mean_logp: Float[Array, "*P"]) -> Float[Array, "*P"]:
    a = jnp.minimum(mean_logp, -SMALLEST_SURPRISE)
    # log(1 - exp(a)) by whichever form keeps its digits; the other one is given a harmless argument
    near, far = jnp.maximum(a, -0.7), jnp.minimum(a, -0.7)
    return a - jnp.where(a > -0.7, jnp.log(-jnp.expm1(near)), jnp.log1p(-jnp.exp(far)))


def sft(pairs: Pairs) -> LossOutput:
    """Negative log-likelihood of the chosen completion, summed over its tokens; the rejected one is not looked at."""
    return LossOutput(-pairs.policy_chosen, per_token(pairs.policy_chosen, pairs.chosen_length))


def unlikelihood(pairs: Pairs, *, unlikelihood_weight: Scalar) -> LossOutput:
    """The DPO paper's unlikelihood baseline (arXiv:2305.18290, section 6): y_w more probable, y_l less so.

    loss = -log pi(y_w) + unlikelihood_weight log pi(y_l)

    After Welleck et al. 2020 (arXiv:1908.04319), over whole completions. It has no lower bound: nothing holds the
    policy once the rejected completions are improbable, which is what the paper shows with it.
    """
    value = pairs.policy_chosen - unlikelihood_weight * pairs.policy_rejected
    return LossOutput(-value, value)


def reward(pairs: Pairs, *, center: Scalar, label_smoothing: Scalar) -> LossOutput:
    """Bradley-Terry loss of a reward model whose scores stand where log-probabilities stand otherwise.

    loss = -log S(r_w - r_l - m) + center (r_w + r_l)^2         (labels and smoothing as in `sigmoid`)

    Ouyang et al. 2022, arXiv:2203.02155, equation 1; margins from arXiv:2307.09288; centring from arXiv:2312.09244.
    """
    h = pairs.policy_chosen - pairs.policy_rejected - pairs.margin
    losses = cross_entropy(h, _smoothed(pairs.label, label_smoothing))
    return LossOutput(losses + center * jnp.square(pairs.policy_chosen + pairs.policy_rejected), h)
