"""The table of objectives: what `objective.name` may be, the settings each takes, and the paper behind it.

A row is an objective; a recipe is a sum of rows with a name of its own. To add one, write a function of `Pairs` (see
pairwise.py) and a row, here or in a script of your own that then calls `dpo_jax.train.main`:

    def mine(pairs, *, beta, slack):
        gap = beta * (pairs.policy_chosen - pairs.policy_rejected)
        return LossOutput(losses=jax.nn.relu(slack - gap), margins=gap)

    OBJECTIVES["mine"] = Objective(
        value=mine,
        equation="max(0, slack - beta (log pi(y_w) - log pi(y_l)))",
        paper="mine, 2026",
        settings={"beta": Setting(0.1, above=0), "slack": Setting(1.0, least=0)},
        reference="unused",
    )

A setting whose name no other objective has needs the form of a list: `objective: [{name: mine, slack: 2}]`.
Nothing here imports jax, so that settings are checked at once.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType

from dpo_jax.objectives.rows import NamedSum, Objective, Setting

LN2 = math.log(2.0)
BETA = Setting(0.1, above=0)
SMOOTHING = Setting(0.0, least=0, below=0.5)
DIVERGENCE = {
    "divergence": Setting("reverse_kl", choices=("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")),
    "divergence_alpha": Setting(0.5, least=0, most=1),
}
WEIGHT = Setting(1.0, least=0)


def _ln2(**_: object) -> float:
    return LN2


def _exo(label_smoothing: float, **_: object) -> float:
    return -LN2 - 0.5 * (math.log1p(-label_smoothing) + math.log(label_smoothing))


OBJECTIVES: dict[str, Objective] = {
    "sigmoid": Objective(
        value="pairwise.sigmoid",
        equation="-log S(beta (u_w - u_l))",
        paper="DPO, arXiv:2305.18290; label_smoothing: conservative DPO",
        when="first, and as the baseline; label_smoothing where labels are noisy",
        settings={"beta": BETA, "label_smoothing": SMOOTHING, **DIVERGENCE},
        reference="optional",
        uses=("margin", "label"),
        at_start=_ln2,
    ),
    "hinge": Objective(
        value="pairwise.hinge",
        equation="max(0, 1 - beta (u_w - u_l))",
        paper="SLiC, arXiv:2305.10425; RSO, arXiv:2309.06657",
        when="pairs that are already told apart should stop pushing",
        settings={"beta": BETA, **DIVERGENCE},
        reference="optional",
        uses=("margin",),
        at_start=lambda **_: 1.0,
    ),
    "ipo": Objective(
        value="pairwise.ipo",
        equation="(u_w/n_w - u_l/n_l - 1/(2 beta))^2",
        paper="IPO, arXiv:2310.12036",
        when="few or deterministic preferences, where DPO overfits",
        settings={"beta": BETA, **DIVERGENCE},
        reference="optional",
        uses=("length",),
        at_start=lambda beta, **_: 0.25 / beta**2,
    ),
    "exo_pair": Objective(
        value="pairwise.exo_pair",
        equation="KL(S(h) || 1-e), h = beta (u_w - u_l)",
        paper="EXO, arXiv:2402.00856",
        when="the reverse KL to soft labels is wanted in place of the forward one",
        settings={"beta": BETA, "label_smoothing": Setting(1e-3, above=0, below=0.5), **DIVERGENCE},
        at_start=_exo,
    ),
    "nca_pair": Objective(
        value="pairwise.nca_pair",
        equation="-log S(beta u_w) - (log S(-beta u_w) + log S(-beta u_l))/2",
        paper="NCA, arXiv:2402.05369",
        when="the chosen answers' likelihood falls under DPO",
        settings={"beta": BETA},
        at_start=lambda **_: 2 * LN2,
    ),
    "robust": Objective(
        value="pairwise.robust",
        equation="(-(1-e) log S(h) + e log S(-h)) / (1-2e)",
        paper="Robust DPO, arXiv:2403.00409",
        when="a known share of labels is the wrong way round",
        settings={"beta": BETA, "label_smoothing": SMOOTHING, **DIVERGENCE},
        at_start=_ln2,
    ),
    "bco_pair": Objective(
        value="pairwise.bco_pair",
        equation="-log S(beta u_w) - log S(-beta u_l)",
        paper="BCO, arXiv:2404.04656",
        when="answers should be good or bad by themselves; part of MPO",
        settings={"beta": BETA},
        at_start=lambda **_: 2 * LN2,
    ),
    "sppo_hard": Objective(
        value="pairwise.sppo_hard",
        equation="(u_w - 1/(2 beta))^2 + (u_l + 1/(2 beta))^2",
        paper="SPPO, arXiv:2405.00675",
        when="self-play: each iteration aims at a fixed gain",
        settings={"beta": BETA},
        at_start=lambda beta, **_: 0.5 / beta**2,
    ),
    "aot": Objective(
        value="stepwise.aot",
        equation="-(1-e) log S(beta q) - e log S(-beta q), q of sorted log-odds",
        paper="AOT, arXiv:2406.05882",
        when="the whole distribution of margins should rise, not only their mean",
        settings={"beta": BETA, "label_smoothing": SMOOTHING},
        scope="step",
        modifiers=("ld_alpha",),
        at_start=_ln2,
    ),
    "aot_unpaired": Objective(
        value="stepwise.aot_unpaired",
        equation="as aot, q = sort(u_w) - sort(u_l)",
        paper="AOT, arXiv:2406.05882",
        when="the same for good and bad answers that do not belong together",
        settings={"beta": BETA, "label_smoothing": SMOOTHING},
        scope="step",
        modifiers=("ld_alpha",),
        at_start=_ln2,
    ),
    "apo_zero": Objective(
        value="pairwise.apo_zero",
        equation="1 - S(beta u_w) + S(beta u_l)",
        paper="APO, arXiv:2408.06266",
        when="chosen answers are better than what the model says now",
        settings={"beta": BETA},
        at_start=lambda **_: 1.0,
    ),
    "apo_down": Objective(
        value="pairwise.apo_down",
        equation="S(beta u_w) + 1 - S(beta (u_w - u_l))",
        paper="APO, arXiv:2408.06266",
        when="chosen answers are worse than what the model says now",
        settings={"beta": BETA},
        at_start=lambda **_: 1.0,
    ),
    "discopop": Objective(
        value="pairwise.discopop",
        equation="-(1-g) log S(h) + g exp(-h), g = S(h/tau)",
        paper="DiscoPOP, arXiv:2406.08414",
        when="a loss found by search, between logistic and exponential",
        settings={"beta": BETA, "tau": Setting(0.05, above=0, most=1), **DIVERGENCE},
        at_start=lambda **_: 0.5 * LN2 + 0.5,
    ),
    "sft": Objective(
        value="pairwise.sft",
        equation="-log pi(y_w), per token of the step",
        paper="maximum likelihood on the chosen answers",
        when="a first stage before DPO (the paper's way to a reference), or a term that holds the chosen answers",
        data="chosen",
        per="chosen_tokens",
        reference="unused",
        modifiers=("weighting",),
    ),
    "unlikelihood": Objective(
        value="pairwise.unlikelihood",
        equation="-log pi(y_w) + unlikelihood_weight log pi(y_l)",
        paper="the baseline of DPO, arXiv:2305.18290; after arXiv:1908.04319",
        when="as the baseline that shows why DPO weighs its pairs; it has no lower bound",
        settings={"unlikelihood_weight": Setting(0.1, least=0, most=1)},
        reference="unused",
        modifiers=("weighting",),
    ),
    "sigmoid_norm": Objective(
        value="pairwise.sigmoid_norm",
        equation="-log S(beta (u_w/n_w - u_l/n_l))",
        paper="Tulu 3, arXiv:2411.15124",
        when="lengths differ much; beta is then 1 to 10, and 5 if not given",
        settings={"beta": Setting(5.0, above=0), **DIVERGENCE},
        reference="optional",
        uses=("margin", "label", "length"),
        at_start=_ln2,
    ),
    "rdpo": Objective(
        value="pairwise.rdpo",
        equation="-log S(beta (u_w - u_l) + length_penalty (n_w - n_l))",
        paper="R-DPO, arXiv:2403.19159",
        when="answers grow longer in training",
        settings={"beta": BETA, "length_penalty": Setting(0.01, least=0), "label_smoothing": SMOOTHING},
        uses=("margin", "label", "length"),
    ),
    "cal_dpo": Objective(
        value="pairwise.cal_dpo",
        equation="-log S(u_w - u_l) + calibration_weight ((u_w - 1/(2 beta))^2 + (u_l + 1/(2 beta))^2)",
        paper="Cal-DPO, arXiv:2412.14516",
        when="rewards should keep their scale, and chosen answers their likelihood",
        settings={"beta": BETA, "calibration_weight": WEIGHT},
        at_start=lambda beta, calibration_weight, **_: LN2 + calibration_weight * 0.5 / beta**2,
    ),
    "beta_dpo": Objective(
        value="stepwise.beta_dpo",
        equation="-log S(beta_step (u_w - u_l)), beta_step from the step's gaps",
        paper="beta-DPO, arXiv:2407.08639",
        when="pairs differ much in how hard they are, and some are outliers",
        settings={
            "beta": BETA,
            "adapt": Setting(0.6, least=0),
            "keep_fraction": Setting(0.8, above=0, most=1),
            "momentum": Setting(0.9, least=0, below=1),
        },
        scope="step",
        modifiers=("ld_alpha",),
        at_start=_ln2,
        measured_as="sigmoid",
        remembers=2,
    ),
    "simpo": Objective(
        value="pairwise.simpo",
        equation="-log S(beta (log pi(y_w)/n_w - log pi(y_l)/n_l) - gamma)",
        paper="SimPO, arXiv:2405.14734",
        when="no reference is wanted and lengths should not matter",
        settings={"beta": Setting(2.0, above=0), "gamma": Setting(1.0, least=0), "label_smoothing": SMOOTHING},
        reference="unused",
        uses=("margin", "label", "length"),
        reward="average",
    ),
    "odds_ratio": Objective(
        value="pairwise.odds_ratio",
        equation="-log S(log odds(y_w) - log odds(y_l))",
        paper="ORPO's preference term, arXiv:2403.07691",
        when="as a term beside sft (see orpo)",
        reference="unused",
        uses=("length",),
        reward="average",
    ),
    "plackett_luce": Objective(
        value="stepwise.plackett_luce",
        equation="sum_k log sum_{j = k or ranked below} exp(beta u_j) - beta u_k",
        paper="DPO, arXiv:2305.18290, appendix A.3",
        when="prompts have three or more ranked answers",
        settings={"beta": BETA},
        data="rankings",
        reference="optional",
        modifiers=(),
    ),
    "kto": Objective(
        value="stepwise.kto",
        equation="1 - S(beta (u - z)) if desirable, 1 - S(beta (z - u)) if not",
        paper="KTO, arXiv:2402.01306",
        when="single answers are marked good or bad; no pairs needed",
        settings={"beta": BETA, "desirable_weight": WEIGHT, "undesirable_weight": WEIGHT},
        data="unpaired",
        scope="step",
        modifiers=(),
        uses=("label",),
        at_start=lambda desirable_weight, undesirable_weight, **_: (
            0.5 * desirable_weight if desirable_weight == undesirable_weight else math.nan
        ),
    ),
    "reward": Objective(
        value="pairwise.reward",
        equation="-log S(r_w - r_l) + center (r_w + r_l)^2",
        paper="Bradley-Terry reward model, arXiv:2203.02155",
        when="a reward model is wanted, or the classic pipeline to compare with",
        settings={"center": Setting(0.0, least=0), "label_smoothing": SMOOTHING},
        reference="unused",
        modifiers=(),
        uses=("margin", "label"),
        model="reward",
    ),
}
"""Every objective by name."""

RECIPES: dict[str, NamedSum] = {
    "rpo": NamedSum(
        parts=(("sigmoid", 1.0, {}), ("sft", "sft_weight", {})),
        equation="sigmoid + sft_weight * sft",
        paper="RPO, arXiv:2404.19733",
        when="chosen log-probabilities fall, reasoning suffers",
        settings={"sft_weight": WEIGHT},
    ),
    "mpo": NamedSum(
        parts=(("sigmoid", 0.8, {}), ("bco_pair", 0.2, {}), ("sft", 1.0, {})),
        equation="0.8 sigmoid + 0.2 bco_pair + sft",
        paper="MPO, arXiv:2411.10442",
        when="preference, quality and likelihood at once",
    ),
    "cpo": NamedSum(
        parts=(("sigmoid", 1.0, {"reference_free": True}), ("sft", "sft_weight", {})),
        equation="-log S(beta (log pi(y_w) - log pi(y_l))) + sft_weight * sft",
        paper="CPO, arXiv:2401.08417",
        when="no reference fits into memory; translation",
        settings={"sft_weight": WEIGHT},
    ),
    "orpo": NamedSum(
        parts=(("sft", 1.0, {}), ("odds_ratio", "odds_weight", {})),
        equation="sft + odds_weight * odds_ratio",
        paper="ORPO, arXiv:2403.07691",
        when="from a base model in one stage, without reference",
        settings={"odds_weight": Setting(0.1, least=0)},
    ),
}
"""Sums of rows that have a name of their own."""

BETA_SCHEDULES = ("linear", "cosine")
SHIPPED: Mapping[str, Objective | NamedSum] = MappingProxyType({**OBJECTIVES, **RECIPES})
"""The tables as the package has them, whatever a script adds to them."""
SCHEDULED: dict[str, Setting] = {
    "beta_end": Setting(0.1, above=0),
    "beta_schedule": Setting("linear", choices=BETA_SCHEDULES),
}
"""What any objective with a beta takes beside it: beta goes from `beta` to `beta_end` over the run."""

KNOWN_AS = {
    name: answer
    for names, answer in (
        ("dpo", "sigmoid is DPO"),
        ("cdpo conservative", "it is sigmoid with label_smoothing"),
        ("slic rso", "it is hinge"),
        ("bradley_terry bt reward_model rm", "it is reward"),
        ("kto_pair", "it is kto, which takes pairs too"),
        ("exo nca bco sppo", "it is exo_pair, nca_pair, bco_pair or sppo_hard"),
        ("apo", "it is apo_zero or apo_down"),
        ("wpo", "it is sigmoid with weighting: wpo"),
        ("ld_dpo lddpo", "it is sigmoid with ld_alpha"),
        ("f_dpo fdpo", "it is sigmoid with divergence"),
        ("tr_dpo trdpo", "it is sigmoid with reference.update_every"),
        ("dpo_norm lndpo", "it is sigmoid_norm"),
        ("r_dpo", "it is rdpo"),
        *(("nll ce cross_entropy", "it is sft"), ("pl listwise", "it is plackett_luce")),
        ("ppo grpo rloo", "there is no online RL here; sigmoid, in dpo_jax.rounds, comes nearest"),
    )
    for name in names.split()
}
"""What objectives are called elsewhere, and what they are here."""
