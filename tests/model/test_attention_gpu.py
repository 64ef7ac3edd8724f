"""Backends for GPUs, without a GPU: what they hand to a kernel, with the kernel's contract computed plainly in its
place, is the plain formula; the real kernel is lowered for CUDA; and what cannot run is refused."""

import functools
import importlib
import json
import re
import sys
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import sharding
from dpo_jax.data.batches import Batches
from dpo_jax.errors import UserError
from dpo_jax.model.attention import Bounds, VisibilityRules
from dpo_jax.model.backends import cudnn, table, texts, tokamax
from dpo_jax.model.backends.dispatch import PackedRows, attend
from dpo_jax.model.decoder import Execution, init_params
from dpo_jax.preference.micro_batches import micro_batch
from dpo_jax.preference.scoring import score
from dpo_jax.run import models
from tests.support.attention import (
    FOREST,
    as_rules,
    assert_close,
    forest,
    inputs,
    measured,
    plain_backward,
    plain_forward,
    plainly,
    wanted,
)
from tests.support.forests import SPEC, random_encoded
from tests.support.specs import plain_spec
from tests.support.tiers import by_day

BOUNDS = Bounds(texts=6, branches=3)
"""What the forest has; looser ones are `LOOSE`."""
LOOSE = Bounds(texts=11, branches=4)
BACKENDS = ("cudnn", "tokamax")
PAIRS = forest([[(70, 30, 45), (20, 5), (3, 9, 2)], [(1, 64, 100)], [(150, 40)]], 200)
"""Trees of one and two branches."""
HOPPER = table.Device("gpu", 9.0)


def segments_of(start, size, places):
    """Number of the segment of each place, -1 outside of all."""
    place = jnp.arange(places)[None, :, None]
    inside = (place >= start[:, None, :]) & (place < (start + size)[:, None, :]) & (start >= 0)[:, None, :]
    return jnp.where(inside.any(-1), inside.argmax(-1), -1)


def by_segments(query, key, value, segments, how):
    """The contract of cuDNN's packed rows: causal within segments, and the log-sum-exps of one segment after the other;
    what lies outside is undefined, so it is NaN."""
    seen, number = _of_segments(segments, query.shape[1], how.window)
    query, key, value = (_or(x, number, 0) for x in (query, key, value))
    out, lse = plain_forward(query, key, value, seen, VisibilityRules(how.scale))
    return _or(out, number, jnp.nan), _one_by_one(lse, segments)


def by_segments_back(query, key, value, segments, how, stats, out, slope):
    """Their gradient, from what the forward pass left."""
    seen, number = _of_segments(segments, query.shape[1], how.window)
    lse = jnp.where((number >= 0)[:, None], _taken(stats, segments), 0)
    arrays = (_or(x, number, 0) for x in (query, key, value, out, slope))
    return tuple(_or(x, number, jnp.nan) for x in plain_backward(*arrays, lse, seen, VisibilityRules(how.scale)))


def _of_segments(segments, places, window):
    """Who sees whom, and the number of each place's segment, -1 for none."""
    size, start = segments
    number, order = segments_of(start[:, :-1], size, places), jnp.arange(places)
    seen = (number[:, :, None] == number[:, None, :]) & (order[:, None] >= order[None, :])[None]
    return seen if window is None else seen & (order[:, None] - order[None, :] < window)[None], number


def _in_order(segments):
    """Row, begin and size of every segment of all rows, those that are real first; size -1 for none."""
    size, start = segments[0], segments[1][:, :-1]
    order = jnp.argsort((start < 0).reshape(-1), stable=True)
    return [x.reshape(-1)[order] for x in (jnp.broadcast_to(jnp.arange(len(size))[:, None], size.shape), start, size)]


def _one_by_one(lse, segments):
    """[N, H, L]: those of the first segment, from its begin; NaN where nothing is."""
    inside = jnp.arange(lse.shape[2])

    def one(row, start, size):
        return jnp.where(inside < size, lse[row][:, jnp.minimum(start + inside, lse.shape[2] - 1)], jnp.nan)

    return jax.vmap(one)(*_in_order(segments))


def _taken(stats, segments):
    """What `_one_by_one` made, [B, H, L]."""
    place = jnp.arange(stats.shape[2])

    def one(stat, row, start, size):
        there = (place >= start) & (place < start + size) & (size >= 0)
        found = jnp.where(there, stat[:, jnp.clip(place - start, 0, place.size - 1)], 0)
        return jax.nn.one_hot(row, len(segments[0]))[:, None, None] * found[None]

    return jax.vmap(one)(stats, *_in_order(segments)).sum(axis=0)


def _or(x, number, nothing):
    return jnp.where((number < 0)[:, :, None, None], nothing, x)


def _seen_of(about):
    begin, end = about
    order = jnp.arange(begin.shape[1])[None, None, :]
    return (order >= begin[:, :, None]) & (order < end[:, :, None])


def by_ranges(how, query, key, value, about):
    """The contract of a range of keys for each query. No place is outside of all: each sees itself at least."""
    out, lse = plain_forward(query, key, value, _seen_of(about), VisibilityRules(how.scale, softcap=how.softcap))
    highest = 0.5 * lse  # any two numbers that come to the log-sum-exp
    return out, (highest.transpose(0, 2, 1), jnp.exp(lse - highest).transpose(0, 2, 1))


def by_ranges_back(how, query, key, value, out, kept, about, slope):
    """Their gradient, from what the forward pass left."""
    highest, total = (x.transpose(0, 2, 1) for x in kept)
    rules = VisibilityRules(how.scale, softcap=how.softcap)
    return plain_backward(query, key, value, out, slope, highest + jnp.log(total), _seen_of(about), rules)


@pytest.fixture
def plain_kernel(monkeypatch):
    monkeypatch.setattr(cudnn, "_kernel", by_segments)
    monkeypatch.setattr(cudnn, "_kernel_back", by_segments_back)
    monkeypatch.setattr(tokamax, "_kernel", by_ranges)
    monkeypatch.setattr(tokamax, "_kernel_back", by_ranges_back)


@pytest.mark.parametrize("bounds", by_day([BOUNDS, LOOSE], [BOUNDS]))
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("shape", by_day(["grouped", "single"], ["grouped"]))
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_kernel_is_given_is_the_plain_formula(plain_kernel, backend, shape, window, bounds):
    """Also the gradients; of what the kernel leaves undefined nothing comes through."""
    layout, arrays, slope = inputs(shape)

    def by_kernel(arrays):
        query, key, value, _ = arrays
        return attend(query, key, value, layout, VisibilityRules(0.25), window=window, backend=backend, bounds=bounds)

    # sums of 8 to 200 terms of size 1 in another order; a wrong place or segment is off by 1e-2 at least
    assert_close(measured(by_kernel, arrays, slope), wanted(shape, "plain", window), 2e-5)


@pytest.mark.parametrize("rules", ["plain", "softcap"])
def test_turned_pairs_are_the_plain_formula(plain_kernel, rules):
    """Trees of up to two branches stay in rows of their own length, in another order."""
    layout, arrays, slope = inputs("grouped", layout=PAIRS)
    bounds = Bounds(texts=5, branches=2)
    assert tokamax.prepare(layout, None, bounds).begin.shape == layout.group.shape

    def by_kernel(arrays):
        return attend(*arrays[:3], layout, as_rules(rules, arrays[3]), backend="tokamax", bounds=bounds)

    # float32 sums of 8 to 200 terms in another order; the soft cap's own slope is in them
    plain = measured(lambda arrays: plainly(arrays, layout, rules, None), arrays, slope)
    assert_close(measured(by_kernel, arrays, slope), plain, 2e-5)


def test_a_range_is_no_longer_than_it_must_be():
    """A kernel computes the blocks of a range, so a wide one would be right and slow."""
    turned = tokamax.prepare(forest([[(3, 2, 2), (1, 1)]], 11), None, Bounds(3, 2))
    assert turned.places.source[0].tolist() == [4, 3, 0, 1, 2, 5, 6, 8, 7, 9, 10]
    assert turned.begin[0].tolist() == [0, 1, 2, 2, 2, 2, 2, 7, 8, 9, 10]
    assert turned.end[0].tolist() == [5, 5, 3, 4, 5, 6, 7, 9, 9, 10, 11]
    texts = tokamax.prepare(forest([[(3, 2, 2)]], 8), 2, Bounds(2, 2))
    assert texts.begin[0].tolist() == [0, 0, 1, 2, 3, 5, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15]
    assert texts.end[0].tolist() == list(range(1, 17))


def test_padding_is_zeros(plain_kernel):
    layout, (query, key, value, _), _ = inputs("grouped")
    found = attend(query, key, value, layout, VisibilityRules(0.25), backend="cudnn", bounds=BOUNDS)
    assert not np.asarray(found)[np.asarray(layout.group) == 0].any()


def test_every_text_is_laid_out_once_in_order():
    layout = forest([[(2, 1, 2), (3,), (1, 1)]], 11)
    found = texts.lay_out(layout, Bounds(texts=5, branches=2))
    assert found.start[0].tolist() == [0, 3, 7, 10, -1]
    assert found.size[0].tolist() == [3, 4, 3, 2, -1]
    assert found.places.source[0].tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9] + [11] * 10
    assert found.places.first[0].tolist() == [0, 1, 2, 11, 11, 3, 4, 5, 6, 7, 8, 9] + [11] * 10


@pytest.mark.parametrize("share", by_day([True, False], [True]))
@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_keep_within_their_bounds(plain_kernel, backend, share):
    """Real micro-batches, with one to four completions of a prompt, score the same as by blocks of slots."""
    encoded = random_encoded(completions=(1, 4), seed=3)
    batch = Batches(encoded, 5, 2, 1, share_prompts=share, micro_tokens=64).at(0)
    params = init_params(SPEC, jax.random.key(0))
    run = jax.jit(
        lambda params, forest, which: score(SPEC, params, forest, execution=Execution(attention=which)).tokens,
        static_argnums=2,
    )
    for micro in range(int(batch.micro_batches)):
        forest = micro_batch(batch, micro)
        inside = forest.completion < forest.ids.shape[-1]
        ours, theirs = (np.asarray(run(params, forest, which))[inside] for which in (backend, "xla"))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)  # float32 sums in another order


def on_devices(backend, where):
    """What is measured of rows that are placed so."""
    layout, arrays, slope = inputs("grouped")
    layout, arrays, slope = jax.tree.map(
        lambda x: x if x.ndim == 1 else jnp.concatenate([x, x[:1]]), (layout, arrays, slope)
    )

    def attended(arrays):
        query, key, value, sinks = arrays
        ready = PackedRows.of(layout, [7], backend, bounds=BOUNDS, activations=where, remat=True)
        return ready.attend(query, key, value, 7, as_rules("plain", sinks))

    return measured(attended, arrays, slope)


@functools.cache
def on_one_device(backend):
    return on_devices(backend, None)


@pytest.mark.parametrize("sizes", by_day([{"fsdp": 2, "tensor": 2}, {"data": 4}], [{"fsdp": 2, "tensor": 2}]))
@pytest.mark.parametrize("backend", BACKENDS)
def test_devices_change_nothing(plain_kernel, backend, sizes):
    rows = sharding.rows(sharding.make_mesh(**{"fsdp": 1, **sizes}))
    # each device's sums are those of a single one
    assert_close(on_devices(backend, rows), on_one_device(backend), 1e-6)


# ---------------------------------------------------------------------------------------------- the real kernel


@pytest.fixture
def hopper(monkeypatch):
    """JAX's private module, told that there is an H100 with cuDNN 9.14: it asks while it lowers."""
    private = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(private, "check_cudnn_version", lambda: 91400)
    monkeypatch.setattr(private, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(private, "is_cuda_compute_capability_equal", lambda capability: capability == "9.0")


def lowered_for_cuda(backend: str, window: int | None, shape: str = "grouped") -> str:
    layout, arrays, _ = inputs(shape, 2, jnp.bfloat16)

    def total(query, key, value, layout):
        out = attend(query, key, value, layout, VisibilityRules(0.25), window=window, backend=backend, bounds=BOUNDS)
        return (out.astype(jnp.float32) ** 2).sum()

    run = jax.jit(jax.value_and_grad(total, (0, 1, 2)))
    return run.trace(*arrays[:3], layout).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("shape", ["grouped", "single"])
def test_cudnn_lowers_for_cuda(hopper, shape, window):
    """One call of the kernel forward and one backward, for packed segments, with nothing square in the row."""
    text = lowered_for_cuda("cudnn", window, shape)
    assert re.findall(r"custom_call @(__cudnn\S*?)\(", text) == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    found = [json.loads(one.replace("\\22", '"')) for one in re.findall(r'backend_config = "(\{\S.*?\})"', text)]
    settings = [one["cudnn_fmha_backend_config"] for one in found]
    assert [one["mask_type"] for one in settings] == ["PADDING_CAUSAL"] * 2
    assert {one["max_seg_per_batch"] for one in settings} == {BOUNDS.texts}
    assert {one["sliding_window_length"] for one in settings} == {window or 0}
    assert {one["fmha_scale"] for one in settings} == {0.25}
    assert not re.search(r"tensor<[0-9x]*200x200x", text)


@pytest.mark.parametrize("counts", [True, False])
def test_offsets_of_keys_count_their_own_heads(hopper, monkeypatch, counts):
    """Where JAX would count them in heads of the queries, each query's head gets a key of its own."""
    monkeypatch.setattr(cudnn, "_counts_key_heads", lambda private: counts)
    text = lowered_for_cuda("cudnn", None)
    keys = re.search(r"custom_call @__cudnn\$fmhaSoftmax\(.*?:\s*\(tensor<\S+>, tensor<(\S+?)xbf16>", text)
    assert keys is not None and keys[1] == ("3x600x2x16" if counts else "3x600x4x16")


def test_a_single_text_is_still_a_packed_row(hopper):
    layout = forest([[(3, 4)]], 8)
    arrays = [jnp.ones((1, 8, 2, 8), jnp.bfloat16)] * 3
    run = jax.jit(lambda *x: attend(*x, layout, VisibilityRules(1.0), backend="cudnn", bounds=Bounds(1, 1)))
    text = run.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "max_seg_per_batch\\22: 2" in text


@pytest.fixture
def tokamax_for_hopper(monkeypatch):
    """The package, told that it compiles for an H100: it asks for the device while it lowers."""
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages below it
        pytest.importorskip("tokamax", reason="the package tokamax is not installed")
        utils, settings, gpu = (
            importlib.import_module(f"tokamax._src.{name}") for name in ("gpu_utils", "config", "mosaic_gpu")
        )
    device = SimpleNamespace(platform="gpu", compute_capability="9.0", core_count=132, device_kind="NVIDIA H100")
    monkeypatch.setattr(utils, "_compute_capability", lambda device=None: 9.0)
    monkeypatch.setattr(gpu, "backend", SimpleNamespace(get_default_device=lambda: device))
    with settings.cross_compile(True):
        yield


@pytest.mark.parametrize("window", [None, 7])
def test_tokamax_lowers_for_cuda(tokamax_for_hopper, window):
    """Three calls: forward, and backward for queries and for keys with values. Nothing is square in the row."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages below it
        text = lowered_for_cuda("tokamax", window)
    assert re.findall(r"custom_call @(mosaic_gpu\w*)\(", text) == ["mosaic_gpu_v2"] * 3
    assert not re.search(r"tensor<[0-9x]*(200x200|600x600)x", text)


@pytest.mark.parametrize("window", [None, 7])
def test_tokamax_is_the_plain_formula(monkeypatch, window):
    """By the package's own plain formula of the same masks, which is not as strict as our tests, for its kernel."""
    with warnings.catch_warnings(), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("ignore")  # of the packages below it
        pytest.importorskip("tokamax", reason="the package tokamax is not installed")
        assert tokamax.missing() is None
        base = importlib.import_module(tokamax.BASE)
        package = base.DotProductAttention(vjp=base.DotProductAttentionVjp())
        monkeypatch.setattr(tokamax, "_package", lambda: package)
        layout, arrays, slope = inputs("grouped", layout=PAIRS)

        def by_package(arrays):
            bounds = Bounds(5, 2)
            return attend(*arrays[:3], layout, VisibilityRules(0.25), window=window, backend="tokamax", bounds=bounds)

        # float32 sums of 8 to 200 terms in another order
        assert_close(measured(by_package, arrays, slope), wanted("grouped", "plain", window), 2e-5)


# ---------------------------------------------------------------------------------------------- refusals


def small(head: int = 8, **fields):
    return plain_spec(width=4 * head, layers=1, heads=4, mlp_width=16, **fields)


@pytest.mark.parametrize(
    ("spec", "dtype", "device", "words"),
    [
        (small(), "float32", HOPPER, "computes in bfloat16 and model.compute_dtype is float32"),
        (small(12), "bfloat16", HOPPER, "takes heads of multiples of 8 channels, and the model's have 12"),
        (small(264), "bfloat16", HOPPER, "takes heads of up to 256 channels, and the model's have 264"),
        (small(softcap=30.0), "bfloat16", HOPPER, "has no soft cap of its scores, and the model does"),
        (small(), "bfloat16", table.Device("gpu", 8.0), "compute capability 9.0 or more, and this device is of 8.0"),
        (small(), "bfloat16", table.Device("gpu"), "compute capability 9.0 or more, and this device is no NVIDIA GPU"),
        (small(), "bfloat16", table.Device("cpu"), "runs on gpu and the devices are of platform cpu"),
    ],
)
def test_cudnn_says_why_it_cannot(spec, dtype, device, words):
    with pytest.raises(UserError, match=f"^model.attention: cudnn .*{words}; give auto, or xla"):
        models.attention_backend("cudnn", spec, dtype, device)


def test_cudnn_can_where_nothing_is_in_the_way():
    assert table.why_not("cudnn", small(windows=(4,)), "bfloat16", HOPPER) is None


@pytest.mark.parametrize(("found", "words"), [("9.0", None), ("8.6", "is of 8.6"), ("gfx90a", "is no NVIDIA GPU")])
def test_the_device_is_asked_what_it_can(found, words):
    device = models.device_of(SimpleNamespace(platform="gpu", compute_capability=found))
    reason = table.why_not("cudnn", small(), "bfloat16", device)
    assert reason is None if words is None else reason.startswith("takes NVIDIA GPUs") and reason.endswith(words)


def test_a_package_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reason = table.why_not("tokamax", small(), "bfloat16", HOPPER)
    assert reason == "needs the package tokamax, which is not installed (pip install 'dpo_jax[cuda]', Python 3.12)"


@pytest.mark.parametrize(
    ("spec", "dtype", "device", "there", "taken"),
    [
        (small(64), "bfloat16", HOPPER, True, "tokamax"),
        (small(64), "bfloat16", HOPPER, False, "cudnn"),  # tokamax is a package of its own
        (small(96), "bfloat16", HOPPER, True, "cudnn"),  # no head of 96 channels was run by tokamax
        (small(64), "bfloat16", table.Device("gpu", 10.0), True, "cudnn"),
        (small(64, softcap=30.0), "bfloat16", HOPPER, True, "tokamax"),
        (small(64, softcap=30.0), "bfloat16", HOPPER, False, "xla"),
        (small(64), "float32", HOPPER, True, "xla"),
        (small(64), "bfloat16", table.Device("gpu", 8.0), True, "xla"),
        (small(64), "float16", HOPPER, True, "xla"),  # no kernel was run in float16
        (small(64), "bfloat16", table.Device("tpu"), True, "splash"),
        (small(64, softcap=30.0, sinks=True), "float32", table.Device("tpu"), True, "splash"),
        (small(64, alibi=1.0), "bfloat16", table.Device("tpu"), True, "xla"),
    ],
)
def test_auto_takes_the_fastest_that_is_proven(monkeypatch, spec, dtype, device, there, taken):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if there else None)
    monkeypatch.setattr(tokamax, "missing", lambda: None)
    assert table.automatic(spec, dtype, device) == taken
    assert table.candidates(spec, dtype, device)[-1] == "xla"


def test_a_private_function_that_changed_is_refused(monkeypatch):
    private = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(private, "dot_product_attention", lambda query, key, value, *, scale: query)
    reason = table.why_not("cudnn", small(), "bfloat16", HOPPER)
    assert reason is not None and re.search("private cuDNN attention, .* takes no q_seqlen", reason)


@pytest.mark.parametrize("backend", ["cudnn", "tokamax"])
def test_texts_without_bounds_are_refused(backend):
    with pytest.raises(ValueError, match="give bounds"):
        PackedRows.of(FOREST, [None], backend)


def test_a_package_whose_inside_changed_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(tokamax, "BASE", "types")  # a module without masks
    monkeypatch.setattr(tokamax, "API", "types")
    assert "masks of k_start and k_end" in (table.why_not("tokamax", small(), "bfloat16", HOPPER) or "")


def test_a_gpu_that_a_kernel_was_not_written_for_is_refused():
    reason = table.why_not("tokamax", small(), "bfloat16", table.Device("gpu", 12.0))
    assert reason is not None and "compute capability 9.0 to below 10.0, and this device is of 12.0" in reason
