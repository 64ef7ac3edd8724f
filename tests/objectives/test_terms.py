"""The table of objectives, and the terms that blocks of settings become."""

import inspect
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from dpo_jax.errors import UserError
from dpo_jax.objectives.mixture import objective_loss
from dpo_jax.objectives.pairs import LossOutput, make_pairs
from dpo_jax.objectives.rows import MODIFIERS
from dpo_jax.objectives.settings import SETTINGS, ObjectiveSettings
from dpo_jax.objectives.table import KNOWN_AS, OBJECTIVES, RECIPES, SCHEDULED, Objective, Setting
from dpo_jax.objectives.terms import data_of, make_terms, names, takes, with_defaults
from tests.support.formulas import RECIPE_FORMULAS
from tests.support.steps import PAIRS, by_name, evaluate, exact, numbers, random_step

# ---------------------------------------------------------------------------------------------------------- the table


def test_names_are_used_once():
    assert len(set(names())) == len(names()) == len(OBJECTIVES) + len(RECIPES)


@by_name
def test_a_row_says_where_it_comes_from_and_its_defaults_are_allowed(name):
    row = OBJECTIVES[name]
    assert row.equation and row.when and (re.search(r"arXiv:\d{4}\.\d{5}", row.paper) or name == "sft")
    assert set(row.modifiers) <= set(MODIFIERS) and set(row.uses) <= {"margin", "label", "length"}
    assert row.measured_as is None or (row.measured_as in OBJECTIVES and not OBJECTIVES[row.measured_as].remembers)
    for key, setting in row.takes.items():
        assert setting.accepts(setting.default), key
    for key in ("name", "weight", *SCHEDULED):  # these mean something else in a block of settings
        assert key not in row.takes


@by_name
def test_a_function_takes_exactly_the_settings_of_its_row(name):
    row = OBJECTIVES[name]
    first, *rest = inspect.signature(row.function).parameters.values()
    assert first.name == "pairs" and all(each.kind is each.KEYWORD_ONLY for each in rest)
    assert {each.name for each in rest} == {*row.settings, *(("memory",) if row.remembers else ())}
    for each in rest:
        assert each.default in (inspect.Parameter.empty, None) or each.default == row.settings[each.name].default
    assert (evaluate(name, random_step(name))[0].memory is not None) == bool(row.remembers)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_made_of_rows_and_names_its_weights(name):
    recipe = RECIPES[name]
    assert recipe.equation and recipe.when and "arXiv:" in recipe.paper
    for part, weight, fixed in recipe.parts:
        assert set(fixed) <= set(OBJECTIVES[part].takes)
        assert weight in recipe.settings if isinstance(weight, str) else weight > 0
    for key, setting in takes(name).items():
        assert setting.accepts(setting.default), key


ALLOWED = {
    ("sigmoid", "beta"): ([1e-6, 5, 100.0], [0, -0.1, "0.1", True, math.nan, math.inf]),
    ("sigmoid", "label_smoothing"): ([0, 0.49], [0.5, -0.01]),
    ("sigmoid", "divergence"): (["reverse_kl", "js_divergence"], ["kl", 1]),
    ("sigmoid", "divergence_alpha"): ([0, 1], [-0.1, 1.1]),
    ("sigmoid", "ld_alpha"): ([0, 1], [-0.1, 1.1]),
    ("sigmoid", "weighting"): (["none", "wpo", "wpo_clamped"], ["WPO", True]),
    ("sigmoid", "reference_free"): ([True, False], [1, "yes"]),
    ("exo_pair", "label_smoothing"): ([1e-3, 0.49], [0, 0.5]),
    ("discopop", "tau"): ([0.01, 1], [0, 1.1]),
    ("rdpo", "length_penalty"): ([0, 1], [-0.1]),
    ("cal_dpo", "calibration_weight"): ([0, 2], [-0.1]),
    ("beta_dpo", "adapt"): ([0, 2], [-0.1]),
    ("beta_dpo", "keep_fraction"): ([0.01, 1], [0, 1.1]),
    ("beta_dpo", "momentum"): ([0, 0.99], [1, -0.1]),
    ("simpo", "gamma"): ([0, 2], [-0.1]),
    ("unlikelihood", "unlikelihood_weight"): ([0, 1], [-0.1, 1.1]),
    ("kto", "desirable_weight"): ([0, 2], [-0.1]),
    ("reward", "center"): ([0, 2], [-0.1]),
    ("orpo", "odds_weight"): ([0, 2], [-0.1]),
    ("rpo", "beta_end"): ([0.01], [0]),
}


@pytest.mark.parametrize(("name", "key"), ALLOWED)
def test_what_a_setting_may_be(name, key):
    good, bad = ALLOWED[name, key]
    assert all(takes(name)[key].accepts(value) for value in good)
    assert not any(takes(name)[key].accepts(value) for value in bad)


def test_a_setting_says_what_it_may_be():
    assert Setting(0.1, above=0, most=1).allowed() == "a number > 0 and <= 1"
    assert Setting(0.1, least=0, below=0.5).allowed() == "a number >= 0 and < 0.5"
    assert Setting("a", choices=("a", "b")).allowed() == "one of a, b"
    assert Setting(False).allowed() == "true or false"


# ---------------------------------------------------------------------------------------------------- blocks to terms


def refusal(*blocks):
    with pytest.raises(ValueError) as refused:
        make_terms(blocks)
    return str(refused.value)


def test_nothing_given_is_dpo_with_every_default():
    (term,) = make_terms([{"beta": None}])
    assert (term.name, term.weight, term.row) == ("sigmoid", 1.0, OBJECTIVES["sigmoid"])
    assert term.settings == {key: setting.default for key, setting in OBJECTIVES["sigmoid"].takes.items()}
    assert term.uses_reference and not term.desensitizes and term.weighting == "none"


@by_name
def test_defaults_are_filled_in_and_what_is_given_is_kept(name):
    (term,) = make_terms([{"name": name, "weight": 2.0}])
    assert (term.name, term.weight) == (name, 2.0)
    assert term.settings == {key: setting.default for key, setting in OBJECTIVES[name].takes.items()}
    for key, setting in OBJECTIVES[name].settings.items():
        if isinstance(setting.default, float) and key != "divergence_alpha":
            (given,) = make_terms([{"name": name, key: 0.25}])
            assert given.settings == {**term.settings, key: 0.25}
    assert data_of([term]) == OBJECTIVES[name].data


def test_an_unknown_name_is_told_the_near_one():
    assert refusal({"name": "sigmiod"}) == "name: no objective 'sigmiod'; did you mean sigmoid?"
    assert refusal({"name": "plackett-luce"}).endswith("did you mean plackett_luce?")
    assert refusal({"name": "zzz"}).endswith(f"one of {', '.join(names())}")


def test_names_that_others_use_are_told_ours():
    assert refusal({"name": "dpo"}) == "name: no objective 'dpo'; sigmoid is DPO"
    assert refusal({"name": "R-DPO"}).endswith("it is rdpo")
    for name, answer in KNOWN_AS.items():
        assert name not in names() and any(re.search(rf"\b{ours}\b", answer) for ours in names())


@pytest.mark.parametrize("name", names())
def test_filling_in_the_defaults_changes_nothing(name):
    for block in ({"name": name}, {"name": name, "weight": 2.0, "weighting": None}):
        filled = with_defaults(block)
        assert make_terms([filled]) == make_terms([block]) and with_defaults(filled) == filled
        unset = {"divergence_alpha"} | set(SCHEDULED)  # these are refused unless something uses them
        assert set(filled) - {"name", "weight"} == set(takes(name)) - unset
    assert with_defaults({"name": "zzz", "beta": None}) == {"name": "zzz"}


def test_a_setting_that_would_be_ignored_is_refused_with_what_is_taken():
    assert refusal({"name": "bco_pair", "label_smoothing": 0.1}) == (
        "label_smoothing: objective bco_pair does not use it; "
        "it takes beta, ld_alpha, weighting, beta_end, beta_schedule"
    )
    assert "reference_free: objective cpo does not use it" in refusal({"name": "cpo", "reference_free": False})
    assert "reference_free: objective kto does not use it" in refusal({"name": "kto", "reference_free": True})
    assert "beta_end: objective sft does not use it; it takes weighting" in refusal({"name": "sft", "beta_end": 0.2})
    assert refusal({"divergence_alpha": 0.3}).startswith("divergence_alpha: only divergence alpha_divergence uses it")
    assert refusal({"beta_schedule": "cosine"}).startswith("beta_schedule: nothing is scheduled without beta_end")


def test_a_value_out_of_range_is_refused_with_the_range():
    assert refusal({"beta": 0}) == "beta: must be a number > 0 for objective sigmoid"
    assert refusal({"weight": -1}) == "weight: must be a number >= 0"
    assert refusal({"label_smoothing": 0.5}).startswith("label_smoothing: must be a number >= 0 and < 0.5")
    assert refusal({"weighting": "WPO"}).startswith("weighting: must be one of none, wpo, wpo_clamped")
    assert refusal({"reference_free": "no"}).startswith("reference_free: must be true or false")


def test_everything_that_is_wrong_is_said_and_where():
    found = refusal({"beta": -1, "tau": 1}, {"name": "sft"}, {"name": "ipo", "divergence": "none"}).splitlines()
    assert [line.split(":")[0] for line in found] == ["0.beta", "0.tau", "2.divergence"]


@pytest.mark.parametrize(
    ("blocks", "why"),
    [
        (["sigmoid", "kto"], "kto and sigmoid want different data"),
        (["plackett_luce", "simpo"], "want different data"),
        (["plackett_luce", "kto"], "want different data"),
        (["sft", "kto"], "sft looks at chosen answers"),
        (["plackett_luce", "sft"], "sft looks at chosen answers"),
        (["reward", "sigmoid"], "reward trains a scalar head"),
        (["reward", "sft"], "reward trains a scalar head"),
        (["beta_dpo", "beta_dpo"], "only one objective of a mixture may remember"),
    ],
)
def test_what_cannot_be_added_up_is_refused(blocks, why):
    assert why in refusal(*({"name": name} for name in blocks))


def test_what_can_be_added_up_is():
    terms = make_terms([{"name": "beta_dpo"}, {"name": "rpo", "weight": 0.5}, {"name": "sft", "weight": 0}])
    assert [(term.name, term.weight) for term in terms] == [
        ("beta_dpo", 1.0), ("sigmoid", 0.5), ("sft", 0.5), ("sft", 0),
    ]  # fmt: skip
    assert data_of(terms) == "pairs" and data_of(make_terms([{"name": "sft"}])) == "chosen"


def test_a_term_knows_its_start():
    def start(**block):
        (term,) = make_terms([block])
        return term.at_start()

    assert start() == start(beta=0.7) == pytest.approx(math.log(2))
    assert start(name="ipo", beta=0.5, weight=3) == pytest.approx(3.0)
    assert start(name="kto") == 0.5 and start(name="kto", desirable_weight=1.5) is None
    assert start(name="rdpo") is start(reference_free=True) is start(weighting="wpo") is start(name="sft") is None


EXPANDED = {
    "rpo": [("sigmoid", 1.0), ("sft", 1.0)],
    "mpo": [("sigmoid", 0.8), ("bco_pair", 0.2), ("sft", 1.0)],
    "cpo": [("sigmoid", 1.0), ("sft", 1.0)],
    "orpo": [("sft", 1.0), ("odds_ratio", 0.1)],
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_expands_to_its_sum(name):
    assert [(term.name, term.weight) for term in make_terms([{"name": name}])] == EXPANDED[name]
    doubled = make_terms([{"name": name, "weight": 2, "weighting": "wpo"}])
    assert [(term.name, term.weight) for term in doubled] == [(part, 2 * weight) for part, weight in EXPANDED[name]]
    assert all(term.weighting == "wpo" for term in doubled)


RECIPE_SETTINGS = {
    "rpo": {"beta": 0.3, "sft_weight": 0.25},
    "mpo": {"beta": 0.3},
    "cpo": {"beta": 0.3, "sft_weight": 0.25},
    "orpo": {"odds_weight": 0.4},
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("given", [True, False])
def test_a_recipe_is_its_papers_sum(name, given):
    """Each term is divided by what the table takes it per: pairs, or the chosen completions' tokens."""
    settings = RECIPE_SETTINGS[name] if given else {}
    step = random_step() | {"label": np.ones(PAIRS, np.float32), "margin": np.zeros(PAIRS, np.float32)}
    alone = step | dict.fromkeys(("reference_chosen", "reference_rejected"), np.zeros(PAIRS, np.float32))
    counts = {"pairs": PAIRS, "chosen_tokens": step["chosen_length"].sum()}
    total = 0.0
    for term in make_terms([{"name": name, **settings}]):
        own = {key: term.settings[key] for key in numbers(term.name)}
        outcome: LossOutput = evaluate(term.name, step if term.uses_reference else alone, **own)[0]
        total += term.weight * outcome.losses.sum() / counts[term.row.per]
    defaults = {key: takes(name)[key].default for key in RECIPE_SETTINGS[name]}
    np.testing.assert_allclose(total, RECIPE_FORMULAS[name](exact(step), **(defaults | settings)), rtol=1e-5)


def test_every_setting_of_the_table_is_one_of_the_command():
    """By name, and with what any objective that has it takes; `0 <` of one and `0 <=` of another is `0 <=`."""
    taken = {name: setting for objective in names() for name, setting in takes(objective).items()}
    assert taken.keys() == SETTINGS.keys() == ObjectiveSettings.model_fields.keys() - {"name", "weight", "mixture"}
    for objective in names():
        for name, setting in takes(objective).items():
            for value in filter(setting.accepts, (*setting.choices, *BOUNDS)):
                assert ObjectiveSettings.model_validate({"name": objective, name: value}).blocks[0][name] == value
    for wrong in ({"label_smoothing": 0.5}, {"label_smoothing": -0.1}, {"tau": 0}, {"tau": 1.1}, {"weighting": "x"}):
        with pytest.raises(ValidationError):
            ObjectiveSettings.model_validate(wrong)


BOUNDS = (0.0, 1e-9, 0.4999, 0.5, 0.9999, 1.0, 7.0)


@pytest.mark.parametrize(
    ("gives", "words"),
    [
        (lambda pairs: pairs.policy_chosen, "gives .*, not dpo_jax.objectives.pairs.LossOutput"),
        (
            lambda pairs: LossOutput(pairs.policy_chosen.sum(), pairs.policy_chosen),
            r"gives losses of shape \(\); one for each",
        ),
        (
            lambda pairs: LossOutput(pairs.policy_chosen, pairs.policy_chosen[:1]),
            r"gives margins of shape \(1,\); .* \(3,\)",
        ),
    ],
)
def test_a_function_of_ones_own_that_gives_no_loss_of_each_pair_is_refused(monkeypatch, gives, words):
    """A sum over the step would have been taken for the loss of each of its pairs."""
    monkeypatch.setitem(OBJECTIVES, "mine", Objective(value=gives, equation="", paper="", reference="unused"))
    with pytest.raises(UserError, match=f"objective 'mine': its function {words}"):
        objective_loss("mine", make_pairs(jnp.zeros(3), jnp.zeros(3)))
