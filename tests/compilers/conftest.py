"""What every test here stands on: a compiler of an accelerator, which is asked as a run asks it."""

import jax
import pytest


@pytest.fixture(autouse=True)
def optimised():
    """The compilers do here what they do for a run, which the rest of the tests has no time for."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
