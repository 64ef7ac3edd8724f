"""An objective of a user's own has a digest of what it computes, and those of the package have none."""

import dataclasses
import functools
import os
import subprocess
import sys

import pytest

from dpo_jax.objectives.own import own_digests
from dpo_jax.objectives.rows import NamedSum, Setting
from dpo_jax.objectives.table import OBJECTIVES, RECIPES, Objective
from tests.conftest import ROOT

SCALE = 2.0


def helper(gap):
    return SCALE * gap


def mine(pairs, *, beta=0.1):
    return helper(beta * pairs)


def row(value, **more):
    return Objective(**({"value": value, "equation": "", "paper": "", "settings": {"beta": Setting(0.1)}} | more))


def digest(given, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "mine", given)
    return own_digests(["mine"])["mine"]


def scaled(by):
    return lambda pairs, **_: by * pairs


def compiled(text):
    space = {}
    exec(text, space)
    return space["mine"]


class Called:
    def __init__(self, by):
        self.by = by

    def __call__(self, pairs):
        return self.by * pairs


def test_the_packages_own_have_none():
    assert own_digests([*OBJECTIVES, *RECIPES, "nobody's"]) == {}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (row(mine), row(helper)),
        (row(scaled(1)), row(scaled(2))),
        (row(Called(1)), row(Called(2))),
        (row(functools.partial(mine, beta=1)), row(functools.partial(mine, beta=2))),
        (row(functools.lru_cache(scaled(1))), row(functools.lru_cache(scaled(2)))),
        (row(compiled("def mine(x): return x + 1")), row(compiled("def mine(x): return x + 2"))),
        (
            row(compiled("def mine(x):\n def f(): return 1\n return f")),
            row(compiled("def mine(x):\n def f(): return 2\n return f")),
        ),
        (
            row(compiled("def f(x): return x\ndef mine(x): return f(x)")),
            row(compiled("def f(x): return -x\ndef mine(x): return f(x)")),
        ),
        (row(compiled("A = 1\ndef mine(x): return A * x")), row(compiled("A = 2\ndef mine(x): return A * x"))),
        (row(mine), row(mine, reference="unused")),
        (row(mine), row(mine, at_start=lambda **_: 1.0)),
        (row(mine), row(mine, settings={"beta": Setting(0.2)})),
        (row(mine), row("pairwise.sigmoid")),
    ],
)
def test_another_function_has_another_digest(monkeypatch, one, other):
    assert digest(one, monkeypatch) != digest(other, monkeypatch)
    assert digest(one, monkeypatch) == digest(dataclasses.replace(one), monkeypatch)


def test_what_a_function_takes_from_its_module_counts(monkeypatch):
    before = digest(row(mine), monkeypatch)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert digest(row(mine), monkeypatch) != before


def test_texts_comments_and_layout_do_not_count(monkeypatch, tmp_path):
    before = digest(row(mine), monkeypatch)
    assert digest(row(mine, paper="mine, 2026", equation="b x", when="now"), monkeypatch) == before
    digests = set()
    for number, text in enumerate(
        ("def mine(x):\n    return x + 1\n", "def mine(x):  # one more\n    return (x +  1)\n")
    ):
        path = tmp_path / f"{number}.py"
        path.write_text(text)
        space = {}
        exec(compile(text, str(path), "exec"), space)
        digests.add(digest(row(space["mine"]), monkeypatch))
    assert len(digests) == 1


def test_one_in_the_place_of_the_packages_and_a_sum_of_ones_own_have_one(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "sigmoid", row(mine))
    monkeypatch.setitem(RECIPES, "ours", NamedSum((("sigmoid", 1.0, {}),), "", "", ""))
    assert [*own_digests(["sigmoid", "ours", "ipo"])] == ["sigmoid", "ours"]


def test_processes_agree():
    script = (
        "from tests.objectives.test_own import *\n"
        "OBJECTIVES['mine'] = row(functools.partial(mine, beta={*'abcdef', SCALE, Called}))\n"
        "print(own_digests(['mine']))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed}, check=True,
            capture_output=True,
        ).stdout
        for seed in "12"
    }  # fmt: skip
    assert len(said) == 1
