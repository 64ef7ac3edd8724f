"""What is annotated is checked while tests run, with arrays and without."""

from typing import Any

import jax.numpy as jnp
import pytest
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

from dpo_jax.files import size_text
from dpo_jax.logprobs.fused import HeadShape, ScanPlan, scored
from tests.support.checked import modules


def test_no_module_is_looked_at_twice_and_few_by_nobody():
    found = [*modules(arrays=True), *modules(arrays=False)]
    assert len(found) == len({*found}) > 200


def test_a_wrong_argument_is_found():
    wrong: Any = "5"
    with pytest.raises(BeartypeCallHintViolation):
        size_text(wrong)
    plan = ScanPlan(HeadShape(1.0, None), 4, False, False, False, None)
    with pytest.raises(TypeCheckError, match="rows"):
        scored(jnp.zeros((3, 2)), jnp.zeros((5, 7)), jnp.zeros(3, int), None, plan)  # of widths 2 and 7
