"""A backend of attention that is wrong, in any one way, is found on the device that it is to run on, and never used."""

import contextlib
import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from dpo_jax import sharding
from dpo_jax.errors import UserError
from dpo_jax.model import spec as specs
from dpo_jax.model.attention import attend_seen, visible
from dpo_jax.model.backends import table
from dpo_jax.model.settings import ModelSettings
from dpo_jax.run import attention_check, attention_choice
from dpo_jax.run.attention_check import BackendVerdict, Case, best, by_backend, cases_of, judged, plain
from tests.support.specs import plain_spec
from tests.support.tiers import by_pairs

LENGTH = 96
CASE = Case(4, 2, 8, 8, 8**-0.5, window=6, softcap=4.0, sinks=True)
PLAIN = CASE._replace(window=None, softcap=None, sinks=False)
MESH = sharding.make_mesh(devices=jax.devices()[:1])


def masked(change, case, layout, bounds):
    """The plain formula under another mask: `change` of (layout, who sees whom, window)."""
    seen = change(layout, visible(layout, case.window), case.window)

    def attend(query, key, value, sinks):
        return attend_seen(query, key, value, seen, case.rules(sinks))

    return attend


def sees_the_other_branch(layout, seen, window):
    """Second branches see first ones."""
    group, branch = layout.group, layout.branch
    slots = jnp.arange(group.shape[1])
    later = (slots[:, None] > slots[None, :])[None] & (group[:, :, None] == group[:, None, :])
    return seen | (later & (branch[:, :, None] == 2) & (branch[:, None, :] == 1))


def window_off_by_one(layout, seen, window):
    return visible(layout, window + 1)


def sees_padding(layout, seen, window):
    return seen | (layout.group[:, None, :] == 0)


def sees_the_tree_before(layout, seen, window):
    """First tokens of a tree see the last of the one before."""
    before = layout.group[:, :, None] == layout.group[:, None, :] + 1
    first, last = layout.position == 0, jnp.roll(layout.group, -1, 1) != layout.group
    return seen | (before & first[:, :, None] & last[:, None, :])


def forgets_itself(layout, seen, window):
    """All but the first token of a text; they still see those before."""
    there = jnp.eye(seen.shape[1], dtype=bool)[None] & (layout.position > 0)[:, :, None]
    return seen & ~there


def other_values(case, layout, bounds):
    return lambda query, key, value, sinks: 1.1 * plain(case, layout, bounds)(query, key, value, sinks)


def one_head(case, layout, bounds):
    """Heads of the queries that share keys in another order."""
    right = plain(case, layout, bounds)
    return lambda query, key, value, sinks: right(query, jnp.roll(key, 1, 2), jnp.roll(value, 1, 2), sinks)


def other_gradient(which, case, layout, bounds):
    """Right values, and the gradient of one argument a tenth too large."""
    right = plain(case, layout, bounds)

    @jax.custom_vjp
    def attend(*arrays):
        return right(*arrays)

    def forward(*arrays):
        return jax.vjp(right, *arrays)

    def backward(back, slope):
        return tuple(1.1 * x if i == which else x for i, x in enumerate(back(slope)))

    attend.defvjp(forward, backward)
    return attend


def no_number_in_padding(case, layout, bounds):
    right = plain(case, layout, bounds)
    there = (layout.group > 0)[:, :, None, None]
    return lambda *arrays: jnp.where(there, right(*arrays), jnp.nan)


def breaks(case, layout, bounds):
    raise NotImplementedError("no such kernel\nhere")


MASKS = [sees_the_other_branch, window_off_by_one, sees_padding, sees_the_tree_before, forgets_itself]
WRONG = {
    "values": other_values,
    "heads": one_head,
    **{f"gradient of {name}": functools.partial(other_gradient, i) for i, name in enumerate(("q", "k", "v", "sinks"))},
    **{change.__name__: functools.partial(masked, change) for change in MASKS},
    "padding": no_number_in_padding,
    "breaks": breaks,
}
RIGHT = {"plain": plain, "xla": functools.partial(by_backend, "xla")}


def wrong_ones(dtype, seed, cases=(CASE,)):
    found = judged({**RIGHT, **WRONG}, dict.fromkeys(cases, 1), dtype, LENGTH, seed=seed, repeats=0)
    return {name for name, verdict in found.items() if verdict.wrong is not None}


@pytest.mark.parametrize(
    ("dtype", "times"), by_pairs([("bfloat16", 10), ("float32", 100), ("bfloat16", 100)], [("bfloat16", 10)])
)
def test_every_wrong_backend_is_found_and_no_right_one(dtype, times):
    """Every time, in the run's dtype, whose rounding is allowed."""
    for seed in range(times):
        assert wrong_ones(dtype, seed) == set(WRONG), seed


def test_what_is_wrong_is_said():
    found = judged(WRONG, {CASE: 1}, "float32", LENGTH, repeats=0)
    assert str(found["gradient of k"].wrong).startswith("gradient of keys ")
    assert found["breaks"].wrong == "fails (NotImplementedError: no such kernel here)"
    assert str(found["padding"].wrong).startswith("values inf % off")
    assert all("\n" not in str(verdict.wrong) for verdict in found.values())


def test_a_fault_of_one_kind_of_layer_is_enough():
    only = {"one": lambda case, layout, bounds: (other_values if case.window else plain)(case, layout, bounds)}
    assert judged(only, {PLAIN: 3}, "float32", LENGTH, repeats=0)["one"].wrong is None
    assert judged(only, {PLAIN: 3, CASE: 1}, "float32", LENGTH, repeats=0)["one"].wrong is not None


def test_time_is_that_of_all_layers():
    once, often = (judged(RIGHT, {PLAIN: n}, "float32", LENGTH, repeats=3)["xla"].milliseconds for n in (1, 1000))
    assert once is not None and often is not None and often > 50 * once


def test_the_fastest_that_agrees_is_taken():
    slow, fast, same = BackendVerdict(None, 2.0), BackendVerdict(None, 1.0), BackendVerdict(None, 0.99)
    assert best({"a": slow, "b": fast}) == "b"
    assert best({"a": fast, "b": same}) == "a"  # within what clocks differ by, the table's order
    assert best({"a": BackendVerdict("off", 0.1), "b": slow}) == "b"
    assert best({"a": BackendVerdict("off", None)}) is None


def test_kinds_of_attention_are_those_of_the_model():
    spec = plain_spec(width=16, layers=3, heads=4, mlp_width=8, windows=(None, 4096, 4096), softcap=50.0)
    found = cases_of(spec, 512)
    assert list(found.values()) == [1, 2]
    assert [(case.window, case.softcap, case.kv_heads) for case in found] == [(None, 4.0, 2), (64, 4.0, 2)]
    latent = specs.MLA(4, None, 8, 8, 4, 6, 0.3, specs.Rope(), specs.Norm(1e-6))
    spec = plain_spec(width=16, layers=1, heads=4, mlp_width=8)
    layers = (specs.Layer(latent, specs.MLP(8)),)
    (case,) = cases_of(specs.dataclasses.replace(spec, layers=layers), 512)
    assert case == Case(4, 4, 12, 6, 0.3)


# ---------------------------------------------------------------------------------------------- what a run takes

SPEC = plain_spec(width=32, layers=2, heads=4, mlp_width=8)
TPU = SimpleNamespace(platform="tpu", device_kind="TPU v9", client=SimpleNamespace(platform_version="libtpu 9"))


@pytest.fixture
def on_tpu(monkeypatch):
    """As if this CPU were a TPU; returns what is computed there, by name, which a test may change."""
    candidates = {"splash": RIGHT["plain"], "xla": RIGHT["xla"]}
    ran = []

    def run(given, cases, dtype, length, *, platform):
        ran.append(platform)
        found = judged({name: candidates[name] for name in given}, cases, dtype, LENGTH, repeats=0)
        return {name: verdict._replace(milliseconds=1.0) for name, verdict in found.items()}

    monkeypatch.setattr(attention_choice, "judged", run)
    monkeypatch.setattr(jax, "default_device", lambda device: contextlib.nullcontext())
    return SimpleNamespace(candidates=candidates, ran=ran)


def test_what_agrees_is_taken_and_said(on_tpu):
    found = attention_choice.choose("auto", SPEC, "bfloat16", TPU, 700, None)
    assert found.name == "splash"
    assert found.lines == (
        "attention: splash (held against the plain formula on this device now: splash 1 ms, xla 1 ms)",
    )


def test_what_is_wrong_is_named_and_not_used(on_tpu):
    on_tpu.candidates["splash"] = WRONG["gradient of k"]
    found = attention_choice.choose("auto", SPEC, "bfloat16", TPU, 700, None)
    assert found.name == "xla" and found.lines[0].startswith("attention: splash is not used: gradient of keys ")
    with pytest.raises(
        UserError, match=r"^model.attention: splash is not .* this TPU v9: gradient of keys .*give auto$"
    ):
        attention_choice.choose("splash", SPEC, "bfloat16", TPU, 700, None)


def test_where_nothing_agrees_nothing_is_trained(on_tpu):
    on_tpu.candidates |= dict.fromkeys(on_tpu.candidates, other_values)
    with pytest.raises(UserError, match="run on another device"):
        attention_choice.choose("auto", SPEC, "bfloat16", TPU, 700, None)


def test_a_verdict_is_kept_with_the_compiled_programs(on_tpu, tmp_path):
    on_tpu.candidates["splash"] = other_values
    first, second = (attention_choice.choose("auto", SPEC, "bfloat16", TPU, 700, tmp_path) for _ in range(2))
    assert first.name == second.name == "xla" and len(on_tpu.ran) == 1
    assert (
        first.lines[0] == second.lines[0] and "by what was computed on this device an earlier run" not in first.lines[1]
    )
    (kept,) = (tmp_path / "attention").iterdir()
    assert json.loads(kept.read_text())["about"]["device"] == ["tpu", "TPU v9", "libtpu 9"]
    kept.write_text("{")  # torn
    attention_choice.choose("auto", SPEC, "bfloat16", TPU, 700, tmp_path)
    attention_choice.choose("auto", SPEC, "float32", TPU, 700, tmp_path)
    other = plain_spec(width=32, layers=2, heads=2, mlp_width=8)
    attention_choice.choose("auto", other, "bfloat16", TPU, 700, tmp_path)
    assert len(on_tpu.ran) == 4


def test_nothing_is_computed_where_there_is_no_choice(monkeypatch):
    monkeypatch.setattr(attention_choice, "judged", lambda *_, **__: pytest.fail("computed"))
    for asked in ("auto", "xla"):
        model = ModelSettings(path="x", attention=asked)
        assert attention_choice.attention_for(model, SPEC, MESH, 700, lambda line: pytest.fail(line)) == "xla"
    alibi = plain_spec(width=32, layers=2, heads=4, mlp_width=8, alibi=1.0)
    assert attention_choice.choose("auto", alibi, "bfloat16", TPU, 700, None).name == "xla"
    assert table.candidates(alibi, "bfloat16", table.Device("tpu")) == ["xla"]


def test_rows_are_as_long_as_their_scores_allow():
    assert attention_choice.length_for(SPEC, 100) == 512
    assert attention_choice.length_for(SPEC, 1280) == 1536
    wide = plain_spec(width=32, layers=1, heads=32, mlp_width=8, head_dim=64)
    assert attention_choice.length_for(wide, 4096) == 1024
    assert attention_check.ROWS * 32 * 1024**2 * 4 <= attention_choice.SCORES
