"""The examples in docstrings are true."""

import doctest
import importlib
import inspect

import pytest

import dpo_jax
from tests.conftest import ROOT

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "dpo_jax").rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_true(name):
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.FAIL_FAST)
    assert found.attempted > 0 and found.failed == 0


@pytest.mark.parametrize("name", dpo_jax.__all__)
def test_what_is_public_is_documented(name):
    """And its pure functions of small arrays show an example, which the test above runs."""
    text = inspect.getdoc(getattr(dpo_jax, name)) or ""
    assert text
    shown = ("logprobs", "dpo_loss", "objective_loss")
    assert ">>> " in text or not any(part in name for part in shown)
