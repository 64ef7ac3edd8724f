"""What the first step must say while policy and reference are the same."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from dpo_jax.errors import UserError
from dpo_jax.objectives.terms import make_terms
from dpo_jax.preference.loss import TrainingObjective
from dpo_jax.run.first_step import FirstStep
from tests.support.forests import SPEC, random_encoded

ENCODED = random_encoded()
PLAIN = dataclasses.replace(
    ENCODED,
    margin=np.zeros_like(ENCODED.margin),
    weight=np.ones_like(ENCODED.weight),
    label=np.ones_like(ENCODED.label),
)


def checked(dtype="float32", objective="sigmoid", data=PLAIN, **metrics):
    problem = TrainingObjective(SPEC, make_terms([{"name": objective}]), compute_dtype=dtype)
    FirstStep.of(problem, data, 8, Path("cache"), reference_is_policy=True).check({"loss": math.log(2), **metrics})


def test_in_float32_the_first_loss_is_the_objectives_constant():
    checked(loss=math.log(2) + 5e-5)
    checked(objective="ipo", loss=25.002)
    for loss in (math.log(2) + 2e-4, math.nan):
        with pytest.raises(UserError, match=r"the loss must be 0.693147 and is .*; the cached reference may be"):
            checked(loss=loss)


def test_in_bfloat16_answers_are_as_likely_to_both_but_for_rounding():
    """8 answers of 40 tokens: rounding moves their mean by 0.04 sqrt(2 x 40 / 8) = 0.13 nats, and 6 times that passes.

    The loss tells nothing: rounding moves it as well, and by how much is the objective's business.
    """
    told = {"dtype": "bfloat16", "loss": 0.72, "lengths/chosen": 40.0}
    for drift in (0.7, -0.7, math.nan):
        checked(**told, **{"drift/chosen": drift})
    for drift in (0.8, -20.0):
        with pytest.raises(UserError, match=rf"answers must be as likely to both, and differ by {drift:.3g} nats"):
            checked(**told, **{"drift/chosen": drift})
    checked("bfloat16", "kto", **{"lengths/chosen": 40.0, "drift/chosen": 2.0})  # one answer may be all there is
    checked("bfloat16")  # the first objective has no reference


def test_in_float16_rounding_may_do_an_eighth_of_that():
    told = {"loss": 0.72, "lengths/chosen": 40.0}
    checked("float16", **told, **{"drift/chosen": 0.09})
    checked("bfloat16", **told, **{"drift/chosen": 0.1})
    with pytest.raises(UserError, match="differ by 0.1 nats"):
        checked("float16", **told, **{"drift/chosen": 0.1})


def test_where_the_first_loss_is_not_known_nothing_is_asked():
    checked(objective="simpo", loss=7.0)
    checked(data=ENCODED, loss=7.0)
