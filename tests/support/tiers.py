"""Which parameters of a test wait for the night: the rule is said here once.

A law of kinds holds for every config if it holds for one model of each kind of structure, as all are computed by the
same decoder from a spec. So by day it is asked of one model of each kind, and of all configs by night.
"""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

from tests.support.family_models import KINDS

MIXERS = ("gemma4_everything", "gpt_oss", "deepseek_v3", "qwen3_5_text", "bloom", "opt_narrow")
"""One model of each way to mix tokens and to know places, where a law costs seconds for each model."""
LIGHT_MIXERS = tuple("gemma4_text" if name == "gemma4_everything" else name for name in MIXERS)
"""The same with a smaller model of Gemma's, where a law compiles several programs for each."""


def by_day(values: Iterable[Any], day: Collection[Any]) -> list[Any]:
    """All values as parameters; those that are not among `day` are `nightly`, whether or not they are there."""
    return [value if value in day else night(value) for value in values]


def by_pairs(values: Iterable[tuple[Any, ...]], day: Collection[tuple[Any, ...]]) -> list[Any]:
    """The same of several parameters at once."""
    return [value if value in day else night(*value) for value in values]


def night(*values: Any) -> Any:
    """A set of parameters that waits for the night."""
    return pytest.param(*values, marks=pytest.mark.nightly)


def one_of_each_kind(names: Iterable[str], also: Collection[str] = ()) -> list[Any]:
    """All names of models as parameters; by day one of each kind, and `also`."""
    return by_day(names, {*KINDS, *also})
