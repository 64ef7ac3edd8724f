"""Random steps for the tests of objectives, and both sides of the comparison.

A step here is a dict of float32 arrays, one entry per pair; `evaluate` gives it to the objective and brings back losses
and gradients, `exact` gives the same numbers to the formula.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.objectives.pairs import Ranking, make_pairs
from dpo_jax.objectives.table import OBJECTIVES
from tests.support.formulas import FORMULAS, PAIR_FIELDS

PAIRS, WIDTH = 12, 5
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
RANKED = ("ranking_policy", "ranking_reference")
UNIT = 2.0**-24  # largest relative error of one rounding to float32

# Two other choices for each number that an objective takes, beside its default.
OTHERS = {
    "beta": (0.5, 0.03),
    "label_smoothing": (0.1, 0.4),
    "divergence_alpha": (0.0, 0.9),
    "tau": (0.5, 1.0),
    "length_penalty": (0.05, 0.0),
    "calibration_weight": (0.5, 0.0),
    "adapt": (0.05, 0.0),
    "keep_fraction": (0.4, 1.0),
    "momentum": (0.5, 0.0),
    "gamma": (0.3, 0.0),
    "desirable_weight": (1.33, 0.7),
    "undesirable_weight": (0.8, 1.5),
    "unlikelihood_weight": (0.5, 1.0),
    "center": (0.01, 0.5),
}
by_name = pytest.mark.parametrize("name", OBJECTIVES)


def divergences(name):
    return DIVERGENCES if "divergence" in OBJECTIVES[name].settings else (None,)


by_divergence = pytest.mark.parametrize(
    ("name", "divergence"), [(name, divergence) for name in OBJECTIVES for divergence in divergences(name)]
)
step_wide = pytest.mark.parametrize("name", [name for name, row in OBJECTIVES.items() if row.scope == "step"])


def numbers(name, choice=0, **given):
    """The objective's numeric settings: the defaults (choice 0), or others (1, 2)."""
    settings = {key: setting.default for key, setting in OBJECTIVES[name].settings.items() if key != "divergence"}
    if choice:
        settings = {key: OTHERS[key][choice - 1] for key in settings}
    return settings | given


def random_step(name="sigmoid", seed=0):
    """Pairs of realistic size: log-probabilities of -5 to -300 nats, log-ratios of a few nats, 1 to 60 tokens."""
    rng = np.random.default_rng(seed)
    policy = -rng.uniform(5, 300, (2, PAIRS))
    if name == "aot":  # log-odds of a few nats, so that policy and reference order the pairs differently
        policy[1] = policy[0] + rng.normal(0, 2, PAIRS)
    reference = policy - np.clip(rng.normal(0.3, 1.5, (2, PAIRS)), -5, 5)
    if OBJECTIVES[name].model == "reward":
        policy = rng.normal(0, 2, (2, PAIRS))
    label = rng.permutation(PAIRS) % 2 if name == "kto" else rng.uniform(0, 1, PAIRS)
    step = dict(zip(PAIR_FIELDS, (*policy, *reference), strict=True))
    step |= dict(zip(("chosen_length", "rejected_length"), rng.integers(1, 61, (2, PAIRS)), strict=True))
    step |= {"margin": rng.uniform(0, 2, PAIRS), "label": label, "noise": rng.uniform(0.01, 0.99, PAIRS)}
    step = {key: np.asarray(value, np.float32) for key, value in step.items()} | {"real": np.ones(PAIRS, bool)}
    return step | random_rankings(rng) if OBJECTIVES[name].data == "rankings" else step


def random_rankings(rng):
    """Up to five completions each, with ties, and with places that are empty."""
    policy = -rng.uniform(5, 300, (PAIRS, WIDTH))
    reference = policy - np.clip(rng.normal(0.3, 1.5, (PAIRS, WIDTH)), -5, 5)
    ranking = {"ranking_policy": policy.astype(np.float32), "ranking_reference": reference.astype(np.float32)}
    return ranking | {"ranking_rank": rng.integers(-1, 4, (PAIRS, WIDTH)).astype(np.int32)}


def as_pairs(step):
    step = dict(step)
    ranking = [step.pop(key, None) for key in (*RANKED, "ranking_rank")]
    return make_pairs(**step, ranking=None if ranking[0] is None else Ranking(*ranking))


def exact(step):
    """The same numbers in float64, real entries alone, as the formulas take them."""
    kept = {key: value[step["real"]] for key, value in step.items() if key != "real"}
    kept = {key: value if key == "ranking_rank" else np.float64(value) for key, value in kept.items()}
    ranking = {key.removeprefix("ranking_"): kept.pop(key) for key in list(kept) if key.startswith("ranking_")}
    return SimpleNamespace(**kept, ranking=SimpleNamespace(**ranking))


def gradient_fields(step):
    return [key for key in (*PAIR_FIELDS, *RANKED) if key in step]


@functools.cache
def compiled(name, divergence):
    """Outcome, and gradient of the summed losses with respect to everything that is a log-probability."""
    static = {} if divergence is None else {"divergence": divergence}

    def total(inputs, others, settings):
        pairs = as_pairs(inputs | others)
        outcome = OBJECTIVES[name].function(pairs, **static, **settings)
        return jnp.where(pairs.real, outcome.losses, 0.0).sum(), outcome

    return jax.jit(jax.grad(total, has_aux=True))


def evaluate(name, step, *, divergence=None, **settings):
    """The objective's outcome and gradients in float32; divergence is the first of its list if not given."""
    inputs = {key: step[key] for key in gradient_fields(step)}
    others = {key: value for key, value in step.items() if key not in inputs}
    divergence = divergence or divergences(name)[0]
    gradients, outcome = compiled(name, divergence)(inputs, others, numbers(name) | settings)
    return jax.tree.map(np.asarray, outcome), {key: np.asarray(value) for key, value in gradients.items()}


def formula(name, step, *, divergence=None, **settings):
    """The formula of a name as a function of (pairs, fixed), and the pairs of a step in float64."""
    divergence = divergence or divergences(name)[0]
    settings = numbers(name) | settings | ({"divergence": divergence} if divergence else {})
    pairs = exact(step)

    def value(changed):
        held = {"fixed": pairs} if name in ("kto", "beta_dpo") else {}
        return FORMULAS[name](changed, **settings, **held)

    return value, pairs


def read(pairs, field):
    return getattr(pairs.ranking, field.removeprefix("ranking_")) if field in RANKED else getattr(pairs, field)


def shifted(pairs, field, by):
    moved = SimpleNamespace(**vars(pairs))
    if field in RANKED:
        key = field.removeprefix("ranking_")
        moved.ranking = SimpleNamespace(**{**vars(pairs.ranking), key: read(pairs, field) + by})
    else:
        setattr(moved, field, read(pairs, field) + by)
    return moved


def jacobian(value, pairs, field, step=1e-5):
    """Central differences of each loss (first axis) by each entry of a field (last axis, flattened)."""
    columns = []
    for place in np.ndindex(read(pairs, field).shape):
        by = np.zeros(read(pairs, field).shape)
        by[place] = step
        columns.append((value(shifted(pairs, field, by)) - value(shifted(pairs, field, -by))) / (2 * step))
    return np.stack(columns, axis=-1)


def rounding(value, pairs, fields):
    """What four roundings of each log-probability to float32 can do to each loss."""
    return sum(np.abs(jacobian(value, pairs, key)) @ np.abs(read(pairs, key)).ravel() for key in fields) * 4 * UNIT


def losses_of(name, step):
    return evaluate(name, step)[0].losses
