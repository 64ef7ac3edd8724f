"""Every objective as its paper prints it, in float64 NumPy and without any care for large numbers.

Written from the papers (and, where TRL is what the project follows, from TRL 1.16's trainer), not from the code.
`FORMULAS[name](pairs, **settings)` is one loss per pair; `pairs` has the fields of `Pairs` as flat float64 arrays, real
entries only. Where a paper takes a number without gradient, it is taken from `fixed` if that is given, so that finite
differences see it as constant.
"""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

PAIR_FIELDS = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
SMALLEST_BETA = 1e-3  # the authors' code of beta-DPO clamps there


def sigmoid_of(x):
    return 1 / (1 + np.exp(-x))


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def bernoulli(h, chance):
    """Cross entropy of a coin that comes up right with `chance` and is predicted to with sigmoid(h)."""
    return -chance * log_sigmoid(h) - (1 - chance) * log_sigmoid(-h)


def swapped_with(label, smoothing):
    """Chance that the chosen one is better: the label is right and not flipped, or wrong and flipped."""
    return label * (1 - smoothing) + (1 - label) * smoothing


def ratios(pairs):
    """Log-ratios of chosen and rejected completions, in nats."""
    return pairs.policy_chosen - pairs.reference_chosen, pairs.policy_rejected - pairs.reference_rejected


def derivative_of_f(log_ratio, divergence, alpha):
    """f-DPO (arXiv:2309.16240): f'(pi / pi_ref), up to the constants that TRL leaves out.

    TRL counts alpha from the other end: its alpha is 1 - alpha of the paper, 0 the forward and 1 the reverse KL.
    """
    ratio = np.exp(log_ratio)
    if divergence == "reverse_kl":  # f = r log r, f' = log r + 1
        return np.log(ratio)
    if divergence == "forward_kl":  # f = -log r, f' = -1 / r
        return 1 - 1 / ratio
    if divergence == "js_divergence":  # f = r log r - (r + 1) log((r + 1) / 2), f' = log(2 r / (1 + r))
        return np.log(2 * ratio / (1 + ratio))
    papers = 1 - alpha  # f' = (1 - r^-alpha) / alpha
    return np.log(ratio) if papers == 0 else (1 - ratio**-papers) / papers


def mapped(pairs, divergence="reverse_kl", divergence_alpha=0.5):
    return tuple(derivative_of_f(u, divergence, divergence_alpha) for u in ratios(pairs))


def dpo(pairs, *, beta, label_smoothing, divergence, divergence_alpha):
    """arXiv:2305.18290 equation 7; margin as in arXiv:2402.10571; smoothing as in conservative DPO."""
    won, lost = mapped(pairs, divergence, divergence_alpha)
    return bernoulli(beta * (won - lost) - pairs.margin, swapped_with(pairs.label, label_smoothing))


def slic(pairs, *, beta, divergence, divergence_alpha):
    """arXiv:2309.06657: SLiC's hinge on the normalised likelihood."""
    won, lost = mapped(pairs, divergence, divergence_alpha)
    h = beta * (won - lost) - pairs.margin
    return np.where(h < 1, 1 - h, 0.0)


def ipo(pairs, *, beta, divergence, divergence_alpha):
    """arXiv:2310.12036 equation 17 on means per token."""
    won, lost = mapped(pairs, divergence, divergence_alpha)
    return (won / pairs.chosen_length - lost / pairs.rejected_length - 1 / (2 * beta)) ** 2


def exo(pairs, *, beta, label_smoothing, divergence, divergence_alpha):
    """arXiv:2402.00856: KL(model's distribution over the two || the smoothed one-hot of the human)."""
    won, lost = mapped(pairs, divergence, divergence_alpha)
    model = np.exp(beta * np.stack([won, lost]))
    model = model / model.sum(0)
    human = np.array([[1 - label_smoothing], [label_smoothing]])
    return (model * np.log(model / human)).sum(0)


def nca(pairs, *, beta):
    """arXiv:2402.05369 with two responses, the first with reward 1: the softmax target is one-hot."""
    won, lost = ratios(pairs)
    return -log_sigmoid(beta * won) - 0.5 * sum(log_sigmoid(-beta * u) for u in (won, lost))


def robust(pairs, *, beta, label_smoothing, divergence, divergence_alpha):
    """arXiv:2403.00409: the flip's bias is taken out by subtracting the loss of the other order."""
    won, lost = mapped(pairs, divergence, divergence_alpha)
    as_labelled, flipped = -log_sigmoid(beta * (won - lost)), -log_sigmoid(beta * (lost - won))
    return ((1 - label_smoothing) * as_labelled - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def bco(pairs, *, beta):
    """arXiv:2404.04656 with the reward shift delta = 0: two binary classifications."""
    won, lost = ratios(pairs)
    return bernoulli(beta * won, 1.0) + bernoulli(beta * lost, 0.0)


def sppo(pairs, *, beta):
    """arXiv:2405.00675, hard labels: chances of winning 1 and 0, so targets +-1/2 times eta = 1 / beta."""
    won, lost = ratios(pairs)
    eta = 1 / beta
    return (won - eta * (1 - 0.5)) ** 2 + (lost - eta * (0 - 0.5)) ** 2


def aot(pairs, *, beta, label_smoothing):
    """arXiv:2406.05882, paired; one value per place of the sorted step, not per pair."""
    policy, reference = pairs.policy_chosen - pairs.policy_rejected, pairs.reference_chosen - pairs.reference_rejected
    return bernoulli(beta * (np.sort(policy) - np.sort(reference)), 1 - label_smoothing)


def aot_unpaired(pairs, *, beta, label_smoothing):
    """arXiv:2406.05882, unpaired; one value per place of the sorted step, not per pair."""
    won, lost = ratios(pairs)
    return bernoulli(beta * (np.sort(won) - np.sort(lost)), 1 - label_smoothing)


def apo_zero(pairs, *, beta):
    """arXiv:2408.06266, plus 1 as in TRL."""
    won, lost = ratios(pairs)
    return -sigmoid_of(beta * won) + sigmoid_of(beta * lost) + 1


def apo_down(pairs, *, beta):
    """arXiv:2408.06266 equation 8, plus 1 as in TRL."""
    won, lost = ratios(pairs)
    return sigmoid_of(beta * won) - sigmoid_of(beta * won - beta * lost) + 1


def discopop(pairs, *, beta, tau, divergence, divergence_alpha):
    """arXiv:2406.08414: log-ratio modulated loss, `(1 - s) logistic + s exponential`, s = S(h / tau)."""
    won, lost = mapped(pairs, divergence, divergence_alpha)
    h = beta * (won - lost)
    s = sigmoid_of(h / tau)
    return (1 - s) * np.log(1 + np.exp(-h)) + s * np.exp(-h)


def sft(pairs):
    return -pairs.policy_chosen


def sigmoid_norm(pairs, *, beta, divergence, divergence_alpha):
    """arXiv:2411.15124: DPO, each log-ratio divided by its length."""
    won, lost = mapped(pairs, divergence, divergence_alpha)
    h = beta / pairs.chosen_length * won - beta / pairs.rejected_length * lost
    return bernoulli(h - pairs.margin, pairs.label)


def rdpo(pairs, *, beta, length_penalty, label_smoothing):
    """arXiv:2403.19159 equation 9: the margin grows by the penalty for each token that the chosen one is longer."""
    won, lost = ratios(pairs)
    h = beta * won - beta * lost + (length_penalty * pairs.chosen_length - length_penalty * pairs.rejected_length)
    return bernoulli(h - pairs.margin, swapped_with(pairs.label, label_smoothing))


def cal_dpo(pairs, *, beta, calibration_weight):
    """arXiv:2412.14516: no beta in the logistic term; log-ratios are held to +-1 / (2 beta)."""
    won, lost = ratios(pairs)
    calibration = (won - 1 / (2 * beta)) ** 2 + (lost + 1 / (2 * beta)) ** 2
    return -log_sigmoid(won - lost) + calibration_weight * calibration


def beta_dpo_state(pairs, *, momentum, memory=(0.0, 0.0)):
    """The running mean and (sample) standard deviation of the raw gaps, this step's included."""
    won, lost = ratios(pairs)
    gap = won - lost
    mean = momentum * memory[0] + (1 - momentum) * gap.mean()
    return mean, momentum * memory[1] + (1 - momentum) * (gap.std(ddof=1) if len(gap) > 1 else 0.0)


def beta_dpo_keys(gap, mean, std, noise):
    """Log of the Gaussian weight exp(-((g - mean) / std)^2 / 2) plus standard Gumbel noise."""
    return -0.5 * ((gap - mean) / std) ** 2 - np.log(-np.log(noise))


def beta_dpo(pairs, *, beta, adapt, keep_fraction, momentum, memory=(0.0, 0.0), fixed=None):
    """arXiv:2407.08639 equations 7 to 9, in the order of the authors' code; 0 for a pair that is not drawn.

    Drawing without replacement by weight is taking the largest of log weight + Gumbel noise. The authors divide the sum
    by the number drawn; divided by the number of pairs it is the same if a drawn pair counts pairs / drawn times.
    """
    won, lost = ratios(fixed or pairs)
    gap, count = won - lost, len(won)
    mean, std = beta_dpo_state(fixed or pairs, momentum=momentum, memory=memory)
    drawn = max(1, int(np.floor(keep_fraction * count + 1e-9)))
    kept = np.zeros(count)
    kept[np.argsort(-beta_dpo_keys(gap, mean, std, pairs.noise))[:drawn]] = 1
    step_beta = max(SMALLEST_BETA, beta * (1 + adapt * (gap[kept == 1].mean() - mean)))
    won, lost = ratios(pairs)
    return kept * count / drawn * -log_sigmoid(step_beta * (won - lost))


def simpo(pairs, *, beta, gamma, label_smoothing):
    """arXiv:2405.14734 equation 6."""
    h = beta / pairs.chosen_length * pairs.policy_chosen - beta / pairs.rejected_length * pairs.policy_rejected - gamma
    return bernoulli(h - pairs.margin, swapped_with(pairs.label, label_smoothing))


def odds_ratio(pairs):
    """arXiv:2403.07691 equations 4, 5 and 7, P the geometric mean over the tokens."""
    chosen = np.exp(pairs.policy_chosen / pairs.chosen_length)
    rejected = np.exp(pairs.policy_rejected / pairs.rejected_length)
    return -log_sigmoid(np.log((chosen / (1 - chosen)) / (rejected / (1 - rejected))))


def unlikelihood(pairs, *, unlikelihood_weight):
    """arXiv:2305.18290 section 6: maximize log pi(y_w), minimize log pi(y_l), the latter with a coefficient."""
    return -(pairs.policy_chosen - unlikelihood_weight * pairs.policy_rejected)


def plackett_luce(pairs, *, beta):
    """arXiv:2305.18290 equation 20: the chance of the ranking is a product of softmaxes over who is still in the field.

    The field of a completion is itself and all that is ranked strictly below, so that equals never compete.
    """
    losses = []
    for policy, reference, rank in zip(pairs.ranking.policy, pairs.ranking.reference, pairs.ranking.rank, strict=True):
        chance = 1.0
        for k in np.flatnonzero(rank >= 0):
            field = [k, *np.flatnonzero(rank > rank[k])]
            strength = {j: np.exp(beta * (policy[j] - reference[j])) for j in field}
            chance *= strength[k] / sum(strength.values())
        losses.append(-np.log(chance))
    return np.array(losses)


def kto(pairs, *, beta, desirable_weight, undesirable_weight, fixed=None):
    """arXiv:2402.01306 equations 7 and 8: lambda_y - v(x, y), with the KL estimate of section 4.1."""
    _, mismatched = ratios(fixed or pairs)
    z0 = max(0.0, mismatched.mean())
    losses = []
    for reward, desirable in zip(ratios(pairs)[0], pairs.label, strict=True):
        if desirable:
            losses.append(desirable_weight - desirable_weight * sigmoid_of(beta * (reward - z0)))
        else:
            losses.append(undesirable_weight - undesirable_weight * sigmoid_of(beta * (z0 - reward)))
    return np.array(losses)


def bradley_terry(pairs, *, center, label_smoothing):
    """arXiv:2203.02155 equation 1; margin of arXiv:2307.09288; centring of arXiv:2312.09244."""
    won, lost = pairs.policy_chosen, pairs.policy_rejected
    fit = bernoulli(won - lost - pairs.margin, swapped_with(pairs.label, label_smoothing))
    return fit + center * (won + lost) ** 2


FORMULAS: dict[str, Callable] = {
    "sigmoid": dpo,
    "hinge": slic,
    "ipo": ipo,
    "exo_pair": exo,
    "nca_pair": nca,
    "robust": robust,
    "bco_pair": bco,
    "sppo_hard": sppo,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sft": sft,
    "unlikelihood": unlikelihood,
    "sigmoid_norm": sigmoid_norm,
    "rdpo": rdpo,
    "cal_dpo": cal_dpo,
    "beta_dpo": beta_dpo,
    "simpo": simpo,
    "odds_ratio": odds_ratio,
    "plackett_luce": plackett_luce,
    "kto": kto,
    "reward": bradley_terry,
}


def token_mean_nll(pairs):
    """Negative log-likelihood of the chosen completions per token of the step."""
    return -pairs.policy_chosen.sum() / pairs.chosen_length.sum()


def logistic(pairs, beta, reference=True):
    """Mean DPO loss of the step, with or without its reference."""
    gap = pairs.policy_chosen - pairs.policy_rejected
    if reference:
        gap = gap - (pairs.reference_chosen - pairs.reference_rejected)
    return np.mean(np.log1p(np.exp(-beta * gap)))


RECIPE_FORMULAS: dict[str, Callable] = {
    # arXiv:2404.19733
    "rpo": lambda pairs, *, beta, sft_weight: logistic(pairs, beta) + sft_weight * token_mean_nll(pairs),
    # arXiv:2411.10442
    "mpo": lambda pairs, *, beta: (
        0.8 * logistic(pairs, beta) + 0.2 * np.mean(bco(pairs, beta=beta)) + 1.0 * token_mean_nll(pairs)
    ),
    # arXiv:2401.08417
    "cpo": lambda pairs, *, beta, sft_weight: (
        logistic(pairs, beta, reference=False) + sft_weight * token_mean_nll(pairs)
    ),
    # arXiv:2403.07691 equation 6
    "orpo": lambda pairs, *, odds_weight: token_mean_nll(pairs) + odds_weight * np.mean(odds_ratio(pairs)),
}
"""One number for a whole step each."""


def desensitized(policy_tokens, reference_tokens, alpha):
    """LD-DPO (arXiv:2409.06411) for one pair, from the log-probability of each token of (chosen, rejected).

    The likelihood beyond the length that both have is raised to alpha.
    """
    public = min(len(tokens) for tokens in policy_tokens)

    def score(tokens):
        return sum(logp if position < public else alpha * logp for position, logp in enumerate(tokens))

    values = [score(tokens) for tokens in (*policy_tokens, *reference_tokens)]
    return SimpleNamespace(**dict(zip(PAIR_FIELDS, values, strict=True)))


def wpo_weight(chosen, rejected):
    """WPO (arXiv:2406.11827 equation 4) for one pair, from (distributions T V, tokens T) of both completions.

    The geometric mean over the tokens of p(token) / sum_v p(v)^2, of both completions multiplied.
    """
    weight = 1.0
    for distributions, tokens in (chosen, rejected):
        aligned = [p[token] / np.sum(p * p) for p, token in zip(distributions, tokens, strict=True)]
        weight *= np.prod(aligned) ** (1 / len(tokens))
    return weight
