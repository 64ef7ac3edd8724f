"""Reading an optimized program: kernels, launches, waits, cycles and what the schedule hides, of a text by hand."""

import pytest

from dpo_jax.errors import UserError
from dpo_jax.model.experts import RARE
from dpo_jax.planning import compiled, compilers, exchanges, hlo
from dpo_jax.planning.chips import CHIPS
from dpo_jax.planning.kernels import CompiledKernel, kernel_of

TEXT = """HloModule step, is_scheduled=true

%fused (p0: bf16[8,16], p1: bf16[16,4]) -> bf16[8,4] {
  %p0 = bf16[8,16]{1,0} parameter(0)
  %p1 = bf16[16,4]{1,0} parameter(1)
  %inner = bf16[8,4]{1,0} custom-call(%p0), custom_call_target="fused_kernel"
  ROOT %dot.1 = bf16[8,4]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (arg: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %arg = (s32[], bf16[8,16]{1,0}) parameter(0)
  %x = bf16[8,16]{1,0} get-tuple-element(%arg), index=1
  %i = s32[] get-tuple-element(%arg), index=0
  %own = bf16[2,4]{1,0} bitcast(%x)
  %ag.1 = (bf16[2,4]{1,0}, bf16[16,4]{1,0}) all-gather-start(%own), replica_groups=[1,8]<=[8], dimensions={0}
  %y = bf16[8,16]{1,0} custom-call(%x), custom_call_target="__cudnn$fmhaSoftmax"
  %all-gather-done.1 = bf16[16,4]{1,0} all-gather-done(%ag.1)
  %z = bf16[8,4]{1,0} fusion(%y, %all-gather-done.1), kind=kOutput, calls=%fused
  %all-reduce-start.2 = f32[64]{0} all-reduce-start(%sum), replica_groups=[1,8]<=[8]
  %view = bf16[8,16]{1,0} bitcast(%x)
  %all-reduce-done.2 = f32[64]{0} all-reduce-done(%all-reduce-start.2)
  %one = s32[] constant(1)
  ROOT %out = (s32[], bf16[8,16]{1,0}) tuple(%i, %y)
}

%condition (arg: (s32[], bf16[8,16])) -> pred[] {
  %arg.1 = (s32[], bf16[8,16]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %limit = s32[] get-tuple-element(%arg.1), index=0
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p = (s32[], bf16[8,16]{1,0}) parameter(0)
  %copy.1 = f32[4]{0} copy(%q), backend_config={"estimated_cycles":"1000"}
  %bad = f32[4]{0} fusion(%q), kind=kCustom, calls=%fused, backend_config={"estimated_cycles":"9223372036854775807"}
  %mark = f32[4]{0} custom-call(%q), custom_call_target="AllocateBuffer"
  %loop = (s32[], bf16[8,16]{1,0}) while(%p), condition=%condition, body=%body, backend_config={KNOWN}
  ROOT %done = (s32[], bf16[8,16]{1,0}) tuple(%p)
}
"""


def read(known: str) -> compiled.CompiledStep:
    return compiled.read(TEXT.replace("{KNOWN}", known), 8, 3.0)


def test_a_known_loop_is_counted_and_nobody_waits():
    found = read('{"known_trip_count":{"n":"5"}}')
    assert found.kernels == {"__cudnn$fmhaSoftmax": 5.0, "fused_kernel": 6.0}
    # copy, fusion and mark outside; inside a kernel, a fusion and two starts, five times
    assert (found.launches, found.waits) == (3 + 5 * 4, 0.0)
    assert found.products == {"bf16": 6 * 2.0 * 8 * 16 * 4}
    assert found.cycles == 1000.0


def test_a_loop_of_unknown_length_has_the_host_wait():
    """As often as its condition is asked for: once more than it turns."""
    found = read("{}")
    assert found.kernels["__cudnn$fmhaSoftmax"] == 3.0 and found.waits == 4.0


def test_an_exchange_hides_behind_what_stands_between_its_start_and_its_end():
    gathered, reduced = read('{"known_trip_count":{"n":"5"}}').exchanged
    assert (gathered.kind, gathered.num_bytes, gathered.hides) == ("all-gather", 16 * 4 * 2, True)
    assert (reduced.kind, reduced.num_bytes, reduced.hides) == ("all-reduce", 64 * 4, False)
    sync = TEXT.replace("dimensions={0}", 'dimensions={0}, backend_config={"is_sync":true}')
    assert [one.hides for one in compiled.read(sync, 8, 1.0).exchanged] == [False, False]


def test_elements_of_tuples_have_their_own_shapes():
    """As jax 0.12 writes them."""
    text = """ENTRY %main (p: (f32[3], bf16[8,16])) -> bf16[8,4] {
  %p = (f32[3]{0}, bf16[8,16]{1,0}) parameter(0)
  %w = bf16[16,4]{1,0} parameter(1)
  ROOT %dot = bf16[8,4]{1,0} dot(%p#1, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}"""
    assert hlo.product_flops(hlo.parse(text)) == 2.0 * 8 * 16 * 4


def test_seconds_are_those_of_the_parts():
    """Each kernel is bound by one thing: float32 products go without matrix units."""
    chip = CHIPS["h100"]
    work = [
        CompiledKernel(2.0, {"bf16": 7e14}, 1),
        CompiledKernel(1.0, {"f32": chip.compiler.float32 * 0.7}, 1),
        CompiledKernel(3.0, {}, round(0.8 * chip.memory_bandwidth)),
        CompiledKernel(1000.0, {"bf16": 1.0}, 1),
    ]
    step = compiled.CompiledStep({"k": 1.0}, 1006.0, 10.0, 0.0, work, [])
    found = compiled.seconds_of(step, chip, 8, attention_flops=compiled.REACHED_ATTENTION * chip.flops)
    assert found.products == pytest.approx(2 * 7e14 / (0.7 * 989e12) + 1)
    assert (found.memory, found.launches) == (pytest.approx(3), pytest.approx(2.5e-3))
    assert (found.attention, found.waits) == (pytest.approx(1), pytest.approx(1e-4))
    assert found.step == pytest.approx(found.products + 3 + 2.5e-3 + 1 + 1e-4)
    tpu = compiled.CompiledStep({}, 5.0, 5.0, 1.75e9, [], [])
    assert compiled.seconds_of(tpu, CHIPS["v5p"], 8, attention_flops=1e20).step == 1.0


FUSIONS = """
%sliced (a: f32[8,4], i: s32[]) -> f32[4] {
  %a = f32[8,4]{1,0} parameter(0)
  %view = f32[32]{0} bitcast(%a)
  %i = s32[] parameter(1)
  ROOT %row = f32[4]{0} dynamic-slice(%view, %i), dynamic_slice_sizes={4}
}

%changed (b: f32[8,4], new: f32[1,4], j: s32[]) -> (f32[8,4], f32[4]) {
  %b = f32[8,4]{1,0} parameter(0)
  %new = f32[1,4]{1,0} parameter(1)
  %j = s32[] parameter(2)
  %put = f32[8,4]{1,0} dynamic-update-slice(%b, %new, %j, %j)
  %also = f32[4]{0} bitcast(%new)
  ROOT %two = (f32[8,4]{1,0}, f32[4]{0}) tuple(%put, %also)
}

ENTRY %main (x: f32[8,4], n: f32[1,4], k: s32[]) -> f32[4] {
  %x = f32[8,4]{1,0} parameter(0)
  %n = f32[1,4]{1,0} parameter(1)
  %k = s32[] parameter(2)
  %one = f32[4]{0} fusion(%x, %k), kind=kLoop, calls=%sliced
  %other = (f32[8,4]{1,0}, f32[4]{0}) fusion(%x, %n, %k), kind=kLoop, calls=%changed
  ROOT %plain = f32[4]{0} add(%one, %one)
}
"""


def test_of_a_sliced_array_the_slice_is_moved_and_of_a_changed_one_the_change():
    program = hlo.parse(FUSIONS)
    main = program.computations["main"]
    moved = {name: kernel_of(main[name], main, 1.0, program).moved for name in ("one", "other", "plain")}
    # a slice is read and written with its index; a change is read, written and given on, with its index; twice in, out
    assert moved == {"one": 16 + 4 + 16, "other": 16 + 4 + 16 + 16, "plain": 3 * 16}


BRANCHES = """
%product (p: (f32[8,16], f32[16,4])) -> f32[8,4] {
  %p = (f32[8,16]{1,0}, f32[16,4]{1,0}) parameter(0)
  %l = f32[8,16]{1,0} get-tuple-element(%p), index=0
  %r = f32[16,4]{1,0} get-tuple-element(%p), index=1
  ROOT %d = f32[8,4]{1,0} dot(%l, %r), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%nothing (q: (f32[8,16], f32[16,4])) -> f32[8,4] {
  %q = (f32[8,16]{1,0}, f32[16,4]{1,0}) parameter(0)
  %zero = f32[] constant(0)
  ROOT %z = f32[8,4]{1,0} broadcast(%zero), dimensions={}
}

ENTRY %main (x: (f32[8,16], f32[16,4]), n: s32[]) -> f32[8,4] {
  %x = (f32[8,16]{1,0}, f32[16,4]{1,0}) parameter(0)
  %n = s32[] parameter(1)
  ROOT %c = f32[8,4]{1,0} conditional(%n, %x, %x), branch_computations={%nothing, %product}, metadata={op_name="NAME"}
}
"""


@pytest.mark.parametrize(("name", "times"), [("jit(step)/cond", 1), (f"jit(step)/transpose(jvp({RARE}))/cond", 0)])
def test_what_is_rarely_done_at_all_is_counted_as_never(name, times):
    assert hlo.product_flops(hlo.parse(BRANCHES.replace("NAME", name))) == times * 2.0 * 8 * 16 * 4


GROUPED = """
ENTRY %main (x: bf16[100,8], w: bf16[4,8,16], n: s32[4]) -> bf16[100,16] {
  %x = bf16[100,8]{1,0} parameter(0)
  %w = bf16[4,8,16]{2,1,0} parameter(1)
  %n = s32[4]{0} parameter(2)
  %y = bf16[100,16]{1,0} custom-call(%n, %x, %w), custom_call_target="grouped"
  %dw = f32[4,8,16]{2,1,0} custom-call(%n, %x, %y), custom_call_target="grouped"
  %u = f32[16,8]{1,0} parameter(3)
  %b = (f32[100,8]{1,0}, s8[9]{0}) custom-call(%y, %u), custom_call_target="__cublas$gemm", CONFIG
  %q = bf16[1,2,100,8]{3,2,1,0} bitcast(%x)
  ROOT %z = bf16[1,2,100,8]{3,2,1,0} custom-call(%q, %q, %q), custom_call_target="attention"
}
""".replace("CONFIG", 'backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"x":["0"]}}')


def test_products_of_kernels_are_counted_by_what_they_take_and_give():
    """Two grouped ones, and one of a library."""
    found = compiled.read(GROUPED, 1, 1.0)
    assert found.products == {"bf16": 3 * 2.0 * 100 * 8 * 16}
    assert found.kernels == {"grouped": 2.0, "attention": 1.0}
    tpu = compiled.seconds_of(found, CHIPS["v5p"], 1, attention_flops=0.0)
    assert tpu.products == pytest.approx(3 * 2.0 * 100 * 8 * 16 / (0.7 * 459e12))


@pytest.mark.parametrize(
    ("chip", "devices", "sides"),
    [("v5e", 4, "2x2"), ("v5e", 8, "2x4"), ("v6e", 64, "8x8"), ("v5p", 4, "2x2x1"), ("v5p", 16, "2x2x4"),
     ("v5p", 64, "4x4x4"), ("v5p", 512, "8x8x8"), ("tpu7x", 8, "2x2x1")],
)  # fmt: skip
def test_a_slice_is_named_by_its_sides(chip, devices, sides):
    assert compilers.torus(CHIPS[chip].compiler, devices) == sides


@pytest.mark.parametrize("devices", [1, 2, 12, 24])
def test_a_slice_that_no_cloud_has_is_refused(devices):
    with pytest.raises(UserError, match=rf"^--devices: {devices}: a slice of v5e has a power of two of chips"):
        compilers.torus(CHIPS["v5e"].compiler, devices)


def test_a_compiler_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: None)
    assert not compilers.chosen("auto", CHIPS["h100"]) and not compilers.chosen("cpu", CHIPS["v5p"])
    with pytest.raises(UserError, match=r"^--compiler: real: the compiler for TPU v5p .*dpo_jax\[compile-tpu\]"):
        compilers.chosen("real", CHIPS["v5p"])


def test_kinds_of_exchanges_are_those_of_xla():
    assert {f"{kind}-start" for kind in exchanges.KINDS}.isdisjoint(compiled.NO_KERNEL)
