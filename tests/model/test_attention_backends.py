"""Kernels for accelerators against the plain formula, where they can be run at all; and which backend a run takes."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dpo_jax import sharding
from dpo_jax.errors import UserError
from dpo_jax.model import spec as specs
from dpo_jax.model.backends import splash, table
from dpo_jax.model.backends.dispatch import attend
from dpo_jax.model.settings import ModelSettings
from dpo_jax.run import models
from tests.support.attention import as_rules, assert_close, inputs, measured, wanted
from tests.support.specs import plain_spec

PLAIN = dict(width=16, layers=2, heads=2, mlp_width=24)
SPECS = {
    "window": plain_spec(**PLAIN, windows=(None, 4)),
    "softcap": plain_spec(**PLAIN, softcap=30.0),
    "sinks": plain_spec(**PLAIN, sinks=True),
    "alibi": plain_spec(**PLAIN, alibi=1.0),
}
LATENT = specs.MLA(4, None, 8, 8, 4, 8, 0.3, specs.Rope(), specs.Norm())
SPECS["value width"] = dataclasses.replace(
    SPECS["window"], layers=(specs.Layer(LATENT, specs.MLP(24)), *SPECS["window"].layers[:1])
)


@pytest.mark.parametrize(
    ("rules", "window", "shape"),
    [("plain", None, "grouped"), ("softcap", 7, "grouped"), ("sinks", None, "single"), ("plain", 7, "wide values")],
)
@pytest.mark.parametrize("fused", [True, False])
def test_splash_is_the_plain_formula(monkeypatch, rules, window, shape, fused):
    """The kernel itself, interpreted on a CPU, with two blocks in a row. Its gradients too, of sinks where there are
    any."""
    monkeypatch.setattr(splash, "MOST", splash.LANES)
    monkeypatch.setattr(splash, "FUSED", splash.FUSED if fused else 1)
    layout, arrays, slope = inputs(shape)

    def by_kernel(arrays):
        query, key, value, sinks = arrays
        return attend(query, key, value, layout, as_rules(rules, sinks), window=window, backend="splash")

    # float32 sums of 8 to 200 terms in another order
    assert_close(measured(by_kernel, arrays, slope), wanted(shape, rules, window), 2e-5)


def test_a_row_is_filled_up_to_few_large_blocks():
    """Blocks of 128 cost a step of the grid each; what a row is filled up with is computed for nothing."""
    assert [splash.block_of(n) for n in (128, 200, 640, 1280, 1536, 1792, 2304, 4096)] == [
        128, 256, 640, 640, 768, 640, 768, 512,
    ]  # fmt: skip
    assert all(n <= -(-n // splash.block_of(n)) * splash.block_of(n) < 1.15 * n + 128 for n in range(128, 4097, 128))


def test_blocks_that_are_skipped_fetch_nothing():
    """They name the block that is there already."""
    kind, nothing = jnp.array([[[1, 0, 2], [0, 0, 1], [2, 1, 0]]]), jnp.zeros((1, 3, 3, 8, 8), bool)
    blocks = splash.MaskBlocks(kind, nothing, nothing, True)
    by_query, by_key = (splash._mask_info(blocks, 2, turned=turned) for turned in (False, True))
    assert by_query.data_next[1].tolist() == [[0, 0, 2], [0, 0, 2], [0, 1, 1]]
    assert by_key.data_next[1].tolist() == [[0, 0, 0], [0, 0, 1], [2, 2, 1]]
    assert by_query.mask_next[1].tolist() == [[0, 0, 0], [0, 0, 5], [0, 7, 7]]
    assert by_key.mask_next[1].tolist() == [[0, 0, 0], [0, 0, 5], [0, 7, 5]]
    assert by_query.block_mask[0].tolist() == blocks.kind[0].tolist()


def test_a_kernel_that_changed_is_refused(monkeypatch):
    monkeypatch.setitem(splash.WANTED["kernel"], "BlockSizes", {"block_of_nothing"})
    reason = table.why_not("splash", SPECS["window"], "float32", table.Device("tpu"))
    assert reason is not None and reason.endswith("takes no block_of_nothing")


@pytest.mark.parametrize("feature", table.FEATURES)
def test_what_a_model_needs_is_seen(feature):
    assert table.features(SPECS[feature]) == {feature}


@pytest.mark.parametrize("name", table.BACKENDS)
@pytest.mark.parametrize("feature", table.FEATURES)
def test_what_a_backend_lacks_is_the_reason_that_is_given(monkeypatch, name, feature):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # as if every package were there
    backend = table.BACKENDS[name]
    if backend.private:
        monkeypatch.setattr(f"dpo_jax.model.backends.{name}.missing", lambda: None)
    reason = table.why_not(name, SPECS[feature], backend.dtypes[0], table.Device(backend.platforms[0], 9.0))
    assert (reason is None) == (feature in backend.features)
    assert reason is None or table.FEATURES[feature] in reason


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_auto_takes_nothing_that_is_not_proven(platform):
    found = table.automatic(SPECS["window"], "float32", table.Device(platform, 9.0))
    assert found == "xla" or platform in table.BACKENDS[found].proven


MESH = sharding.make_mesh(devices=jax.devices()[:1])


def run_with(attention: str):
    return ModelSettings(path="x", attention=attention)


def test_asking_for_what_cannot_run_here_is_refused():
    with pytest.raises(UserError, match=r"^model.attention: splash runs on tpu and .* platform cpu; give auto, or xla"):
        models.attention_of(run_with("splash"), SPECS["window"], MESH)
    assert models.attention_of(run_with("xla"), SPECS["alibi"], MESH) == "xla"
    assert models.attention_of(run_with("auto"), SPECS["alibi"], MESH) == "xla"


def test_every_backend_can_be_asked_for():
    choices = ModelSettings.model_fields["attention"].annotation.__args__
    assert set(choices) == {"auto", *table.BACKENDS}
