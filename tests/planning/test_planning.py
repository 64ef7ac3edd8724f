"""A plan says what the step does: exchanges and products counted through loops, bytes as the real state has them."""

import json
import os
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from dpo_jax import doctor, plan, sharding, trees
from dpo_jax.config import run as config
from dpo_jax.data.batches import Batches
from dpo_jax.errors import UserError
from dpo_jax.model.decoder import init_params
from dpo_jax.planning import costs, estimate, exchanges, hlo, hosts, machine, report
from dpo_jax.planning.chips import CHIPS
from dpo_jax.planning.lengths import made_up
from dpo_jax.run import models, program, sharing
from tests.conftest import ROOT
from tests.support.tiny_folders import write_config

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "vocab_size": 512,
    "num_hidden_layers": 3,
    "tie_word_embeddings": False,
}


@pytest.fixture
def small(tmp_path):
    """A folder with nothing but a config."""
    return write_config(tmp_path / "small", "llama", **SMALL)


def run_of(folder, *settings):
    names = [f"model.path={folder}", f"output={folder.parent / 'out'}", f"data.train={folder.parent / 'no.jsonl'}"]
    return config.load([*names, "data.max_length=64", "batch.pairs=8", *settings])


def described(run, room=None):
    mesh = models.make_mesh(run.mesh, run.model)
    sources = program.find_config(run, mesh)
    encoded, _, run = program.data_for(run, sources, (12, 6))
    return program.describe(run, sources, encoded, mesh, attention_length=8192, room=room)


# ---------------------------------------------------------------------------------------------- the text


def test_exchanges_are_counted_through_loops():
    """A loop of unknown length around a scan of three, each kind of exchange in it once, written by hand."""
    mesh = sharding.make_mesh(devices=jax.devices())

    def exchange(x):
        def body(carry, _):
            whole = lax.all_gather(carry, "fsdp", tiled=True)  # f32[4 x 8]
            own = lax.psum_scatter(whole, "fsdp", tiled=True)
            mixed = lax.all_to_all(own.reshape(4, 2), "fsdp", 0, 0).reshape(8)
            shifted = lax.ppermute(mixed, "fsdp", [(i, (i + 1) % 4) for i in range(4)])
            return shifted + lax.psum(shifted, "fsdp"), None

        return lax.scan(body, x, None, length=3)[0]

    exchange = jax.shard_map(exchange, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"))
    looped = jax.jit(lambda x, n: lax.fori_loop(0, n, lambda _, x: exchange(x), x))
    shapes = jax.ShapeDtypeStruct((32,), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    _, text = program.compile_with_text(looped.lower(*shapes), 4)
    found = {one.kind: one for one in exchanges.collectives(hlo.parse(text, unknown=5.0), 4)}
    assert set(found) == set(exchanges.KINDS)
    assert {one.times for one in found.values()} == {15.0}
    assert {one.dtype for one in found.values()} == {"f32"}
    # A ring of four, by hand: 128 bytes are gathered and scattered, 32 reduced, exchanged and shifted.
    sent = {kind: one.sent / 15 for kind, one in found.items()}
    ring = {"all-gather": 96, "reduce-scatter": 96, "all-reduce": 48, "all-to-all": 24, "collective-permute": 32}
    assert sent == ring


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4], dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, x", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_groups_of_devices_are_read_in_every_form(text, groups):
    assert sorted(map(sorted, exchanges.groups_of(text, 4).tolist())) == sorted(map(sorted, groups))


def test_groups_that_are_not_understood_are_an_error():
    with pytest.raises(ValueError, match="unknown devices"):
        exchanges.groups_of("channel_id=3", 4)


def test_what_leaves_a_host_is_shared_by_its_members():
    def of(groups):
        return exchanges.Collective("all-gather", "bf16", (64,), 128, np.asarray(groups), 1.0, "")

    assert of([[0, 1], [2, 3]]).across(2) == 0
    # Each host lacks half of the 128 bytes; both of its devices bring in half of that, or one of them all of it.
    assert of([[0, 1, 2, 3]]).across(2) == pytest.approx(32)
    assert of([[0, 2], [1, 3]]).across(2) == pytest.approx(64)
    assert estimate.traffic([of([[0, 2], [1, 3]])], 2) == (0, pytest.approx(64))
    assert estimate.traffic([of([[0, 1, 2, 3]])], 2) == (pytest.approx(96), pytest.approx(32))


# ---------------------------------------------------------------------------------------------- products


@pytest.fixture(scope="module")
def products(tmp_path_factory):
    """Of the scanned and the unrolled step of one device: products, products if each loop ran once, XLA's count."""
    folder = write_config(tmp_path_factory.mktemp("products") / "small", "llama", **SMALL)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    found = {}
    for name, scan in (("scanned", "true"), ("unrolled", "false")):
        run = run_of(folder, f"model.scan_layers={scan}", "model.remat=none", "log.token_statistics=false")
        sources = program.find_config(run, mesh)
        encoded, _, run = program.data_for(run, sources, (12, 6))
        step = program.describe(run, sources, encoded, mesh, attention_length=8192)
        compiled, text = program.compile_step(step)
        counted = hlo.product_flops(hlo.parse(text, unknown=1.0))
        with mock.patch.object(hlo, "_trips", return_value=None):
            once = hlo.product_flops(hlo.parse(text, unknown=1.0))
        found[name] = step, counted, once, compiled.cost_analysis()["flops"]
    return found


def test_a_scan_is_counted_as_often_as_it_runs(products):
    assert products["scanned"][1] == pytest.approx(products["unrolled"][1], rel=1e-6)


@pytest.mark.parametrize("name", ["scanned", "unrolled"])
def test_products_are_those_that_xla_counts_once_a_loop(products, name):
    """XLA's count has everything that is no product as well: norms, softmax, the optimizer. It has less in one place:
    the vocabulary is a single chunk here, so the head's logits, asked for again backwards, are computed once."""
    step, _, once, flops = products[name]
    once -= step.dummy.source.shape[-1] * costs.head_flops(step.objective.spec)
    assert once <= flops <= 1.25 * once


def test_the_spec_asks_for_what_is_compiled(products):
    """With every slot and every place for a scored token taken as used, the head once more (its logits are computed
    again backwards), and every query seeing its block's keys, the spec's count is the program's."""
    step, counted, _, _ = products["scanned"]
    rows, length = step.shapes[0]
    scored = step.dummy.source.shape[-1]
    spec = step.objective.spec
    seen = {None: float(rows * length * length)}
    full = costs.Load(float(rows * length), float(scored), seen, float(rows * length))
    wanted = costs.step_flops(spec, full) + scored * costs.head_flops(spec)
    assert counted == pytest.approx(wanted, rel=0.02)  # biases of norms, sums by completion: nothing else multiplies


def test_load_counts_tokens_and_what_they_see():
    """Two pairs with prompts of about 20 tokens and completions of about 9; a token at position p sees p + 1."""
    encoded = made_up(2, prompt_tokens=20, completion_tokens=9, max_length=64, steps=1)
    batch = Batches(encoded, 2, 1, 1).at(0)
    load = costs.load_of(batch, {None, 2})
    prompts, answers = encoded.prompt_length, encoded.completion_length.reshape(2, 2)
    seen = sum(
        p * (p + 1) / 2 + sum(p * c + c * (c + 1) / 2 for c in cs) for p, cs in zip(prompts, answers, strict=True)
    )
    assert load.tokens == prompts.sum() + answers.sum() and load.scored == answers.sum()
    assert load.seen[None] == seen
    firsts = len(prompts)  # a window of two: only the first token of a text sees one
    assert load.seen[2] == 2 * load.tokens - firsts


def test_made_up_lengths_are_those_that_are_asked_for():
    encoded = made_up(2000, prompt_tokens=125, completion_tokens=46, max_length=1024)
    # 12,000 log-normal lengths: the standard error of their mean is under 1 %.
    assert encoded.prompt_length.mean() == pytest.approx(125, rel=0.03)
    assert encoded.completion_length.mean() == pytest.approx(46, rel=0.03)
    assert encoded.sequence_lengths().max() <= 1024
    assert np.median(encoded.prompt_length) == pytest.approx(98, abs=3)


@pytest.mark.parametrize(("name", "examples"), [("sigmoid", 48), ("sft", 48), ("reward", 48), ("kto", 96)])
def test_made_up_pairs_are_for_every_objective_that_pairs_can_be_for(small, name, examples):
    run = run_of(small, f"objective.name={name}")
    encoded, what, planned = program.data_for(run, program.find_config(run, models.make_mesh(run.mesh, run.model)))
    assert what.startswith("made up") and planned.steps == 6
    assert encoded.num_pairs == examples  # 8 of each of 6 steps; kto takes a pair as two answers


def test_rankings_are_not_made_up(small):
    run = run_of(small, "objective.name=plackett_luce")
    sources = program.find_config(run, models.make_mesh(run.mesh, run.model))
    with pytest.raises(UserError, match="plackett_luce takes rankings, .*give data.train files"):
        program.data_for(run, sources)


# ---------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("mesh", ["mesh.fsdp=4", "mesh.data=2", "mesh.tensor=2"])
def test_bytes_of_the_state_are_those_of_the_real_one(small, mesh):
    run = run_of(small, mesh)
    step = described(run)
    params = jax.device_put(init_params(step.objective.spec, jax.random.key(0)), step.trainer.shardings["trained"])
    state = step.trainer.fresh(params)

    def own(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    found = program.predicted(step)
    assert found["parameters"] == own(state["trained"])
    assert found["optimizer"] == own(state["optimizer"])
    batch = sharding.place(step.dummy, step.mesh)
    assert found["batch"] == own(batch)


@pytest.mark.parametrize("mesh", ["mesh.fsdp=4", "mesh.data=4", "mesh={data: 2, fsdp: 2}", "mesh={data: 2, tensor: 2}"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_hosts_part_is_that_of_its_devices_real_arrays(small, mesh, count):
    step = described(run_of(small, mesh))
    params = jax.device_put(init_params(step.objective.spec, jax.random.key(0)), step.trainer.shardings["trained"])
    at = hosts.host_of(step.mesh, count)
    held, saved = ([0] * count for _ in range(2))
    for leaf in jax.tree.leaves(params):
        parts = {(at[shard.device.id], str(shard.index)): shard.data.nbytes for shard in leaf.addressable_shards}
        for (host, _), size in parts.items():
            held[host] += size
        for shard in leaf.addressable_shards:
            saved[at[shard.device.id]] += shard.data.nbytes * (shard.replica_id == 0)
    places = step.trainer.shardings["trained"]
    assert hosts.bytes_of(params, places, at) == held
    assert hosts.bytes_of(params, places, at, once=True) == saved and sum(saved) == hosts.size_of(params)


def test_files_of_an_export_are_shared_out_between_hosts(small):
    """With the config alone there are no files yet; they are then counted as one, which one host writes."""
    step = described(run_of(small, "mesh.fsdp=4"))
    found = sharing.shares(step, small, 2, adapter=False)
    weights = hosts.size_of(step.trainer.abstract["trained"])
    assert found["written of the model"] == (weights, weights / 2)
    assert found["read of the weights"].most <= 1.01 * weights / 2  # all but the norms are divided
    assert "written of the model" not in sharing.shares(step, small, 2, adapter=True)


FROZEN = 'model.freeze=["layers/0/.*"]'


@pytest.mark.parametrize("setting", ["model.remat=none", "model.remat=block", FROZEN])
def test_predicted_bytes_are_about_what_the_compiler_plans(small, setting):
    """In float32, where a CPU's compiler widens nothing. Arguments are exact; temporaries are within a factor of two:
    the compiler reuses what is dead, and keeps copies that no one asked for."""
    step = described(run_of(small, setting))
    compiled = step.trainer.lower(step.dummy).compile()
    found, planned = program.predicted(step), program.reported(compiled)
    state = sum(found.get(name, 0) for name in ("parameters", "frozen parameters", "optimizer", "counters", "batch"))
    assert planned["argument"] == pytest.approx(state, rel=0.01)  # the learning rate's step is an argument, too
    assert 0.5 < (sum(found.values()) - state) / planned["temp"] < 2.0


def test_what_is_frozen_or_narrow_takes_less(small):
    plain, frozen, narrow = (
        program.predicted(described(run_of(small, *more)))
        for more in ((), (FROZEN,), ("optimizer.param_dtype=bfloat16",))
    )
    assert frozen["parameters"] + frozen["frozen parameters"] == plain["parameters"]
    assert frozen["optimizer"] - frozen["parameters"] * 2 == plain["optimizer"] - plain["parameters"] * 2  # counts
    assert narrow["parameters"] == pytest.approx(plain["parameters"] / 2, rel=0.01)  # norms stay
    assert narrow["optimizer"] == plain["optimizer"]


def test_recomputing_keeps_less(small):
    kept = [program.predicted(described(run_of(small, f"model.remat={remat}")))["activations"] for remat in REMATS]
    assert kept == sorted(kept, reverse=True) and kept[0] > 2 * kept[-1]


@pytest.mark.parametrize(("asked", "dtype"), [("float32", "f32"), ("compute", "bf16")])
def test_parts_of_a_gradient_are_added_in_the_dtype_that_is_asked_for(small, asked, dtype):
    step = described(run_of(small, "model.compute_dtype=bfloat16", f"model.gradient_dtype={asked}", "mesh.fsdp=4"))
    _, text = program.compile_step(step)
    found = exchanges.collectives(program.program_of(step, text), 4)
    layers = [one for one in found if one.kind in ("reduce-scatter", "all-reduce") and {128, 256} & {*one.shape}]
    matrices = {one.dtype for one in layers if len(one.shape) > 1 and 512 not in one.shape}  # the head's stay wide
    assert matrices == {dtype}, [(one.kind, one.dtype, one.shape, one.source) for one in layers]


REMATS = ("none", "attention", "block")


def test_as_much_is_kept_as_there_is_room_for(small):
    """By `auto`; a policy that is asked for is taken whatever it needs."""
    wide = run_of(small, "model.remat=auto")
    takes = {
        policy: sum(program.predicted(described(run_of(small, f"model.remat={policy}"))).values())
        for policy in ("attention", "dots", "names", "block")
    }
    assert list(takes.values()) == sorted(takes.values(), reverse=True)
    for policy, bytes_taken in takes.items():
        step = described(wide, bytes_taken)
        assert step.objective.execution.remat == step.trainer.objective.execution.remat == policy
        assert sum(program.predicted(step).values()) == bytes_taken
    assert described(wide, 0).objective.execution.remat == "block"
    assert described(wide).objective.execution.remat == "attention"
    assert described(run_of(small, "model.remat=none"), 0).objective.execution.remat == "none"


def test_a_live_reference_has_its_bytes(small):
    live = program.predicted(described(run_of(small, "reference.mode=live")))
    moving = program.predicted(described(run_of(small, "reference.mode=live", "reference.update_every=2")))
    assert live["reference"] == moving["reference"] == live["parameters"]  # all float32 here
    assert "reference" not in program.predicted(described(run_of(small)))


@pytest.mark.parametrize(("sizes", "billions"), [(LLAMA_8B, 8.030), (LLAMA_70B, 70.554)])
def test_a_state_of_llama_is_twelve_bytes_a_parameter(tmp_path, sizes, billions):
    """Shapes alone: no array of it is ever made. The published counts, and float32 weights with two moments."""
    folder = write_config(tmp_path / "llama", "llama", **LLAMA, **sizes)
    step = described(run_of(folder))
    assert trees.num_parameters(step.trainer.abstract["trained"]) / 1e9 == pytest.approx(billions, abs=1e-3)
    found = program.predicted(step)
    # A hundred thousandth is norms, which every device holds whole.
    assert found["parameters"] * 4 == pytest.approx(4 * billions * 1e9, rel=1e-3)
    assert found["optimizer"] == pytest.approx(2 * found["parameters"], rel=1e-6)


# ---------------------------------------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The command's JSON for a small model on eight devices of two hosts."""
    folder = write_config(tmp_path_factory.mktemp("plan") / "small", "llama", **SMALL)
    file = folder.parent / "run.yaml"
    file.write_text(
        f"output: {folder.parent / 'out'}\nmodel: {{path: {folder}, remat: block}}\ndata: {{train: no.jsonl}}\n"
    )
    eight = ("--devices", "8", "--hosts", "2", "--compiler", "cpu")
    done = command("plan", file, *eight, "--json", "batch.pairs=16", "data.max_length=128")
    assert done.returncode == 0, done.stderr
    assert not (folder.parent / "out").exists()
    return json.loads(done.stdout)


def command(name, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", f"dpo_jax.{name}", *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.nightly
def test_a_step_moves_what_theory_asks_for_in_bfloat16(planned):
    """Weights are gathered twice in the dtype of computation, although this machine's compiler widens it, and gradients
    scattered once in float32: no sum over devices is rounded on the way. A tenth: of the embedding only the rows that
    are looked up move, and norms and sums by pair come on top."""
    total = sum(row["bytes"] for row in planned["collectives"])
    matrices = [row for row in planned["collectives"] if len(row["shape"]) == 2]
    assert {row["kind"] for row in matrices if row["dtype"] == "bf16"} == {"all-gather"}
    assert {row["kind"] for row in matrices if row["dtype"] == "f32"} >= {"reduce-scatter"}
    sums = {row["dtype"] for row in planned["collectives"] if row["kind"] in ("reduce-scatter", "all-reduce")}
    assert "bf16" not in sums
    assert total == pytest.approx(planned["theory"], rel=0.1)
    assert planned["traffic"]["across"] < planned["traffic"]["inside"]


def test_a_plan_is_told_in_tables(planned):
    text = "\n".join(report.plan_lines(planned))
    assert "8 devices on 2 hosts: mesh data=1 fsdp=8 tensor=1" in text
    for words in (
        "memory of a device",
        "of one host, at most",
        "1.00 of an equal part",
        "optimizer",
        "matrix products",
        "reduce-scatter f32",
        "theory asks",
        "MFU",
    ):
        assert words in text
    assert "fits: " in text and "H100 SXM" in text
    assert all(len(line) <= 400 for line in text.splitlines())


def test_time_is_bounded_by_its_parts(planned):
    time = planned["time"]
    parts = [time[name] for name in ("compute", "memory", "inside", "across")]
    assert time["overlapped"] == max(parts) and time["serial"] == pytest.approx(sum(parts))
    assert 0 < planned["mfu"]["serial"] < planned["mfu"]["overlapped"] < 1
    work = estimate.Work(flops=7e14, memory_bytes=0.0, inside_bytes=0.0, across_bytes=0.0, useful=8 * 7e14)
    found = estimate.estimate(work, CHIPS["h100"])
    assert found.compute == pytest.approx(7e14 / (0.7 * 989e12)) and found.bottleneck == "compute"
    # All that is compiled is useful and nothing else takes time: MFU is the share of the peak that is reached.
    assert estimate.utilisation(work.useful, CHIPS["h100"], 8, found.overlapped) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--devices", "0"], "--devices: 0: must be > 0"),
        (["--devices", "8", "--hosts", "3"], "--hosts: 3: does not divide 8 devices"),
        (["--devices", "16", "--hosts", "1"], "16 devices a host; H100 SXM joins at most 8"),
        (["--devices", "8", "--chip", "abacus"], "abacus"),
        ([], "--devices"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, what, capsys):
    assert plan.main(["x.yaml", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: command line: ") and what in error and error.count("\n") == 1


@pytest.mark.nightly
def test_the_doctor_says_whether_a_run_fits(small, capsys, monkeypatch):
    monkeypatch.setitem(machine.MATMUL_SIZE, "cpu", 64)
    file = small.parent / "run.yaml"
    file.write_text(
        f"output: {small.parent / 'out'}\nmodel: {{path: {small}}}\ndata: {{train: no.jsonl, max_length: 64}}\n"
    )
    assert doctor.main([str(file), "batch.pairs=8"]) == 0
    text = capsys.readouterr().out
    assert "  fits: " in text and "parameters" in text and "the training step on 4 devices in float32" in text
    monkeypatch.setattr(doctor, "memory_of_a_device", lambda: 1 << 20)
    assert doctor.main(["--json", str(file), "batch.pairs=8"]) == 1
    found = json.loads(capsys.readouterr().out)["fit"]
    assert found["capacity"] == 1 << 20 < found["compiler"]["peak"]
    assert doctor.main([str(small), "batch.pairs=8"]) == 2
    assert "belongs to a CONFIG.yaml" in capsys.readouterr().err
