"""The stopwatch: what a run is made into, which times are believed, and that runners speak its language."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dpo_jax.data.batches import Batches
from dpo_jax.errors import UserError
from dpo_jax.model.decoder import init_params
from dpo_jax.model.weights import Weights
from dpo_jax.preference.loss import TrainingObjective, loss_and_gradient
from tools import bench, bench_table
from tools.benching import compare, memory, records, workloads
from tools.benching.compare import OURS, Run, Runner, agreement, figures, ratios, summary
from tools.benching.inputs import encoded_of
from tools.benching.micro_compute import padded
from tools.runners.protocol import Spec

ROOT = Path(__file__).resolve().parents[2]
LN2 = math.log(2)
SPEC = Spec(
    model="model",
    pairs="pairs.jsonl",
    pairs_per_step=4,
    steps=4,
    warmup=1,
    dtype="float32",
    learning_rate=1e-5,
    beta1=0.9,
    beta2=0.999,
    epsilon=1e-8,
    clip_norm=1.0,
    beta=0.1,
    max_length=64,
    reference="precomputed",
    threads=1,
    pad_id=0,
)
LOSSES = (LN2, 0.68, 0.71, 0.65)


def run_of(name=OURS, repeat=0, seconds=1.0, losses=LOSSES, problem="", others=0.0, cpu=2.0):
    """A run whose steps of 4 pairs take `seconds`, the first of them ten times that, and `cpu` as many CPU seconds."""
    steps = [
        {"event": "step", "step": i, "loss": loss, "wall": seconds * (1 if i else 10), "cpu": cpu * seconds, "pairs": 4}
        for i, loss in enumerate(losses)
    ]
    reference = {"event": "reference", "wall": 13.0, "cpu": 8.0, "pairs": 16, "compile_wall": 5.0}
    ready, done = (
        {"event": "ready", "wall": 30.0, "cpu": 20.0},
        {"event": "done", "peak_bytes": 2**30, "versions": {name: "1.2"}},
    )
    return Run(name, repeat, [reference, ready, *steps, done], problem, others)


# ---------------------------------------------------------------------------------------------- figures


def test_figures_leave_out_the_warm_up_and_count_by_pair():
    found = figures(run_of(seconds=2.0), warmup=1)
    assert found.pairs_per_second == pytest.approx(4 / 2.0)
    assert found.cpu_per_pair == pytest.approx(2.0 * 2.0 / 4)
    assert found.first_step == pytest.approx(30.0 + 20.0)
    # the reference took 13 s for 16 pairs, 5 s of them compiling: 0.5 s of each pair beside its step's 0.5 s
    assert found.with_reference == pytest.approx(1.0)
    assert found.cpu_with_reference == pytest.approx(1.0 + 8 / 16)


def test_on_an_accelerator_the_last_step_is_left_out():
    """A program that runs ahead of the device reports it together with the one before, as if it took no time."""
    run = run_of(seconds=2.0)
    *steps, done = run.events
    ahead = dataclasses.replace(run, events=[*steps[:-1], steps[-1] | {"wall": 0.0}, done | {"device_peak_bytes": 1}])
    assert figures(ahead, warmup=1).pairs_per_second == pytest.approx(4 / 2.0)


def test_a_run_of_nothing_but_warm_up_has_no_figures():
    with pytest.raises(ValueError, match="no more than the warm-up"):
        figures(run_of(), warmup=4)


def test_a_ratio_is_of_each_repetition_and_above_one_where_ours_is_faster():
    assert ratios([4.0, 2.0, 9.0], [2.0, 2.0, 3.0]) == {"min": 1.0, "median": 2.0, "max": 3.0}


# ---------------------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize("pairs", [2, 8])
@pytest.mark.parametrize("dtype", compare.BOUNDS)
def test_losses_agree_within_the_tolerance_of_the_dtype_and_no_further(dtype, pairs):
    tolerance = compare.tolerance_of(dtype, pairs)
    ours = [LN2, LN2 - 20 * tolerance, LN2 + 10 * tolerance]
    for step in range(3):
        for factor, agrees in ((0.99, True), (-0.99, True), (1.01, False), (-1.01, False)):
            theirs = [loss + factor * tolerance * (i == step) for i, loss in enumerate(ours)]
            assert agreement(ours, theirs, dtype, pairs).agrees is agrees


def test_losses_that_do_not_move_prove_nothing():
    """Policy and reference begin alike, so every program has ln 2 at first, whatever else it gets wrong."""
    still = [LN2] * 4
    assert "too little" in agreement(still, still, "float32", 8).reason
    assert agreement(LOSSES, LOSSES, "float32", 8).agrees


@pytest.mark.parametrize("theirs", [LOSSES[:3], (LN2, math.nan, 0.71, 0.65), (LN2, math.inf, 0.71, 0.65)])
def test_missing_and_broken_losses_do_not_agree(theirs):
    assert not agreement(LOSSES, theirs, "float32", 8).agrees


def test_only_a_rival_that_agrees_gets_a_ratio():
    wrong = (LN2, 0.68, 0.72, 0.65)
    runs = []
    for repeat in (0, 1):
        runs += [
            run_of(repeat=repeat, seconds=1.0),
            run_of("right", repeat, seconds=3.0 + repeat),
            run_of("wrong", repeat, seconds=0.1, losses=wrong if repeat else LOSSES),
            run_of("broken", repeat, problem="exit code 1: no memory"),
        ]
    found = summary(runs, SPEC)
    assert found["right"]["ratio"] == pytest.approx({"min": 3.0, "median": 3.5, "max": 4.0})
    assert found["right"]["ratio_cpu"] == pytest.approx({"min": 3.0, "median": 3.5, "max": 4.0})
    assert "losses disagree" in found["wrong"]["problem"] and "ratio" not in found["wrong"]
    assert found["broken"] == {"problem": "exit code 1: no memory"}
    assert "ratio" not in found[OURS]
    json.dumps(found, allow_nan=False)


def test_nothing_is_believed_where_ours_fails_or_disagrees_with_itself():
    rival = [run_of("right"), run_of("right", 1)]
    other = run_of(repeat=1, losses=(LN2, 0.60, 0.71, 0.65))
    for ours in ([run_of(problem="exit code 1")], [run_of(), other], []):
        found = summary([*ours, *rival], SPEC)
        assert set(found) == {OURS} and "problem" in found[OURS]


def test_noise_of_bfloat16_averages_over_pairs_and_float32s_order_of_sums_does_not():
    assert compare.tolerance_of("bfloat16", 8) == pytest.approx(compare.tolerance_of("bfloat16", 2) / 2)
    assert compare.tolerance_of("float32", 8) == compare.tolerance_of("float32", 2)


# ---------------------------------------------------------------------------------------------- running

FAKE = """
import os, sys
sys.path.insert(0, {runners!r})
from protocol import Events, spec_of_command_line
events, spec = Events(), spec_of_command_line()
print("what a library says")
os.system("echo what a library in C says")
{break_here}
events.reference(1.0, 2.0, 16)
events.ready()
for step, rows in enumerate(spec.batches()):
    events.step(step, {losses}[step], len(rows))
events.done(["numpy", "no such package"])
"""


@pytest.fixture
def spec(tmp_path):
    row = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}
    (tmp_path / "pairs.jsonl").write_text((json.dumps(row) + "\n") * 17)
    found = dataclasses.replace(SPEC, pairs=str(tmp_path / "pairs.jsonl"))
    found.write(tmp_path / "spec.json")
    return found


def fake(folder, name, losses=LOSSES, break_here=""):
    script = folder / f"{name}.py"
    runners = str(ROOT / "tools" / "runners")
    script.write_text(FAKE.format(runners=runners, losses=tuple(losses), break_here=break_here))
    return Runner(name, sys.executable, str(script))


def test_programs_run_in_turn_and_one_that_failed_is_left_out(spec, tmp_path):
    lines = []
    programs = [
        fake(tmp_path, OURS),
        fake(tmp_path, "rival"),
        fake(tmp_path, "bad", break_here="raise OSError('full')"),
    ]
    runs = compare.alternate(programs, spec, 2, 60.0, lines.append)
    assert [(run.runner, run.repeat) for run in runs] == [(OURS, 0), ("rival", 0), ("bad", 0), (OURS, 1), ("rival", 1)]
    assert runs[2].problem == "exit code 1: OSError: full" and "full" in lines[2]
    assert runs[0].losses == pytest.approx(LOSSES) and not runs[0].problem
    (done,) = runs[0].of("done")
    assert done["peak_bytes"] > 2**20 and set(done["versions"]) == {"python", "numpy"}
    (ready,) = runs[0].of("ready")
    assert ready["wall"] > 0 and ready["cpu"] > 0


@pytest.mark.parametrize(
    ("break_here", "problem"),
    [
        ("sys.exit()", "no event 'ready'"),
        ("events._out.write('hello' + chr(10))", "no event: 'hello'"),
    ],
)
def test_a_program_that_does_not_keep_to_the_protocol_has_failed(spec, tmp_path, break_here, problem):
    run = compare.execute(fake(tmp_path, "bad", break_here=break_here), tmp_path / "spec.json", 0, 60.0)
    assert problem in run.problem


def test_a_program_that_never_ends_is_ended(spec, tmp_path):
    endless = fake(tmp_path, "bad", break_here="import time; time.sleep(1e6)")
    assert "--timeout" in compare.execute(endless, tmp_path / "spec.json", 0, 1.0).problem


def test_a_spec_comes_back_and_must_be_whole(spec, tmp_path):
    path = tmp_path / "spec.json"
    assert Spec.read(path) == spec
    assert [len(batch) for batch in spec.batches()] == [4] * 4
    path.write_text(json.dumps({**dataclasses.asdict(spec), "betta": 0.1}))
    with pytest.raises(ValueError, match="betta"):
        Spec.read(path)
    with pytest.raises(ValueError, match="17 pairs; 5 steps need 20"):
        dataclasses.replace(spec, steps=5).rows()


@pytest.mark.nightly
def test_our_own_runner_trains_the_steps_of_a_spec(tmp_path):
    """The runner stands on the package's stages; this is where it is seen when they change under it."""
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "head_dim": 8,
        "num_attention_heads": 4,
    }
    model = workloads.write_tiny(tmp_path / "model", num_key_value_heads=2, vocab_size=64, **small)
    rows = [
        {name: [4 + token % 60 for token in ids] for name, ids in row.items()} for row in workloads.random_rows(4, 24)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = dataclasses.replace(
        SPEC, model=str(model), pairs=str(tmp_path / "pairs.jsonl"), pairs_per_step=2, steps=2, max_length=24
    )
    spec.write(tmp_path / "spec.json")
    run = compare.execute(
        Runner(OURS, sys.executable, str(ROOT / "tools/runners/ours.py")), tmp_path / "spec.json", 0, 300.0
    )
    assert not run.problem
    assert run.losses[0] == pytest.approx(LN2, abs=1e-6)  # policy and reference are alike; float32 of a mean of two
    assert [event["step"] for event in run.of("step")] == [0, 1]
    assert run.of("reference")[0]["pairs"] == 4
    assert run.of("ready")[0]["wall"] > run.of("reference")[0]["wall"]
    assert run.of("done")[0]["late_compilations"] == 0


# ---------------------------------------------------------------------------------------------- records, table


def record(runs, **changes):
    spec = {**bench.portable(SPEC), **changes}
    about = {"time": "2026-11-24T22:00:00+00:00", "commit": "abc", "dirty": False}
    hardware = {"processor": "Some CPU", "cpus": 2, "memory_gib": 24, "gpus": []}
    kept = {"runs": [dataclasses.asdict(run) for run in runs], "summary": summary(runs, SPEC)}
    return {"kind": "compare", **about, "hardware": hardware, "workload": "tiny", "spec": spec, "data": {}, **kept}


def test_the_table_has_ratios_of_those_who_agree_only(tmp_path):
    wrong = run_of("wrong", seconds=0.1, losses=(LN2, 0.68, 0.72, 0.65))
    records.append(record([run_of(), run_of("trl", seconds=3.0), wrong]), tmp_path / "records.jsonl")
    text = bench_table.table(records.read(tmp_path / "records.jsonl"))
    ours, rival, other = (line for line in text.splitlines() if line.startswith("| tiny"))
    assert "| trl 1.2 |" in rival and "3.00x (3.00 to 3.00)" in rival and "agree" in rival
    assert "x (" not in ours and "losses disagree" in other and "x (" not in other
    assert "commit abc" in text and "busy" not in text


def test_the_table_shows_the_newest_and_says_what_was_disturbed():
    first, second = record([run_of(), run_of("trl", seconds=4.0)]), record([run_of(), run_of("trl", seconds=5.0)])
    other = record([run_of(others=0.5), run_of("trl", seconds=7.0, others=0.01)], dtype="bfloat16")
    text = bench_table.table([first, other, second])
    assert "5.00x" in text and "4.00x" not in text and "7.00x" in text
    assert [("busy" in line) for line in text.splitlines() if line.startswith("| tiny")].count(True) == 1


def test_the_readme_is_written_between_its_marks():
    readme = "before\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nafter\n<!-- growth -->\n<!-- /growth -->\n"
    readme += "<!-- device -->\n<!-- /device -->\n<!-- compiled -->\n<!-- /compiled -->\n"
    readme += "<!-- answers -->\n<!-- /answers -->\n"
    page = "tools/BENCHMARKS.md"
    once = bench_table.updated(page, readme, [record([run_of()])])
    assert once.startswith("before\n") and "after\n<!-- growth -->\n<!-- /growth -->" in once and "old" not in once
    assert bench_table.updated(page, once, [record([run_of()])]) == once
    with pytest.raises(UserError, match="README.md has no lines <!-- speed -->"):
        bench_table.updated("README.md", "nothing", [])


def test_the_summary_has_the_newest_ratio_of_each_who_agrees():
    wrong = run_of("wrong", seconds=0.1, losses=(LN2, 0.68, 0.72, 0.65))
    old, new = record([run_of(), run_of("trl", seconds=4.0)]), record([run_of(), run_of("trl", seconds=3.0), wrong])
    assert bench_table.summary([old, new]) == "3.0 times trl 1.2 (1 workload).\n"
    other = record([run_of(), run_of("trl", seconds=5.0)], dtype="bfloat16")
    assert bench_table.summary([new, other]) == "3.0 to 5.0 times trl 1.2 (2 workloads).\n"


def micro_record(seconds, **changes):
    rows = [{"row": 256, "CPU-s": seconds, "s": 1.0, "temp MiB": 2.0, "attention": 0.1}, {"what": "whole process"}]
    about = {
        "time": "2026-11-24T22:00:00+00:00",
        "commit": "abc",
        "dirty": False,
        "hardware": {"processor": "Some CPU"},
    }
    return {"kind": "micro", "name": "rows", "quick": False, **about, "rows": rows, **changes}


def test_growth_is_that_of_the_newest_records_at_full_size():
    text = bench_table.growth([micro_record(3.0), micro_record(4.0), micro_record(5.0, quick=True), record([run_of()])])
    assert "| 256 | 4 | 1 | 2 | 0.1 |" in text and "whole process" not in text and "Some CPU; commit abc" in text
    assert text.count("| 256 |") == 1
    assert "uncommitted" in bench_table.growth([micro_record(3.0, dirty=True)])


def test_a_line_that_is_no_record_is_named(tmp_path):
    (tmp_path / "records.jsonl").write_text('{"kind": "micro"}\nnonsense\n')
    with pytest.raises(UserError, match="records.jsonl:2"):
        records.read(tmp_path / "records.jsonl")


# ---------------------------------------------------------------------------------------------- what is measured


def test_the_random_pairs_are_hh_like_and_always_the_same():
    rows = list(workloads.random_rows(400, 256))
    assert rows == list(workloads.random_rows(400, 256))
    lengths = np.array([[len(row[f"{part}_ids"]) for part in workloads.PARTS] for row in rows])
    assert (lengths[:, :1] + lengths[:, 1:]).max() <= 256 and lengths.min() >= 1
    # medians of 98, 28 and 36 tokens; a median of 400 log-normal lengths is good to 6 %, and three of those are asked
    np.testing.assert_allclose(np.median(lengths, axis=0), [98, 28, 36], rtol=0.2)


def test_rows_are_the_tokens_that_were_read():
    encoded = encoded_of(np.array([[3, 2, 4], [5, 1, 1]]), 50)
    rows = list(workloads.rows_of(encoded))
    assert sum((row[f"{part}_ids"] for row in rows for part in workloads.PARTS), []) == encoded.tokens.tolist()
    assert [len(row["rejected_ids"]) for row in rows] == [4, 1]


def test_the_padded_layout_is_the_same_step():
    shape = memory.Shape(layers=1, width=32, inner=48, heads=4, kv_heads=2, vocabulary=64)
    encoded = encoded_of(np.array([[5, 3, 4], [2, 6, 1]]), 64)
    batches = Batches(encoded, 2, 1, 1, order="file", reference=np.zeros(encoded.num_scored, np.float32))
    packed = batches.at(0)
    problem = TrainingObjective(memory.llama(shape))
    params = init_params(problem.spec, jax.random.key(0))
    solve = jax.jit(lambda params, batch: loss_and_gradient(problem, Weights(params), batch)[::2])
    (loss, gradient), (other, its) = (solve(params, batch) for batch in (packed, padded(encoded, np.arange(2), packed)))
    assert float(loss) == pytest.approx(float(other), rel=1e-6)  # float32 sums of a dozen terms in another order
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(its), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.nightly
def test_the_compiled_step_takes_the_memory_that_is_claimed():
    """In a process of its own: tests leave most of XLA's optimizations out."""
    command = [sys.executable, ROOT / "tools" / "bench.py", "memory", "--no-record"]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no array is larger than the embedding" in done.stdout


@pytest.mark.parametrize(("vocabulary", "whole"), [(4096, True), (16384, False)])
def test_logits_are_seen_in_a_compiled_step_where_they_are_whole(vocabulary, whole):
    """The head goes over 4,096 tokens of the vocabulary at a time, so a vocabulary of 4,096 has its logits whole."""
    shape = memory.Shape(1, 128, 128, 4, 2, vocabulary, pairs=2, prompt=8, answer=64)
    compiled, slots = memory.compile_step(shape)
    assert slots >= 2 * (8 + 2 * 64)
    found = {array for array in memory.arrays(compiled.as_text()) if memory.is_logits(array, shape)}
    assert bool(found) is whole
    if whole:
        assert ("f32", (256, 4096)) in found


def test_arrays_of_a_programs_text():
    text = "%x = f32[8,16]{1,0} fusion(bf16[4]{0} %y, pred[3,2] %z), metadata={s32 [1]}"
    found = list(memory.arrays(text))
    assert found == [("f32", (8, 16)), ("bf16", (4,)), ("pred", (3, 2))]
    assert [memory.size(array) for array in found] == [512, 8, 6]


# ---------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["compare", "tiny", "--trl", "/nowhere/python"], "--trl: /nowhere/python"),
        (["compare", "tiny", "--warmup", "8"], "--warmup: 8"),
        (["compare", "tiny", "--model", "x"], "--model x: the workload makes its own"),
        (["compare", "sharegpt", "--data", "x"], "--model is not given"),
        (["micro", "heads", "--no-record"], "heads is no measurement"),
    ],
)
def test_a_wrong_call_is_one_line(words, says, capsys):
    assert bench.main(words) == 2
    shown = capsys.readouterr()
    assert says in shown.err and shown.err.count("\n") == 1
