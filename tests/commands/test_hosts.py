"""A training run of several processes: the numbers of one, one owner of the output folder, and ends that all share."""

import json
import shutil
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file

from dpo_jax.files import digest_of, file_digest
from dpo_jax.processes.watch import RETRY
from dpo_jax.reporting.journal import read_records
from tests.support.hosts import Hosts
from tests.support.worlds import settings_in, write_world

SECONDS = 20
"""Of `distributed.timeout`; far more than a step takes, as a test machine may be busy."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model folder, and files of pairs and questions."""
    return write_world(tmp_path_factory.mktemp("world"), 14, 6, shards=2)  # each of two processes exports one


def words(world, output, *more):
    given = settings_in(world) | {
        "log.report": False,
        "distributed.timeout": SECONDS,
        "distributed.start_timeout": 300,
        "output": output,
    }
    return [*(f"{key}={value}" for key, value in given.items()), *more]


def trained(world, output, *more, processes=2, devices=1):
    hosts = Hosts(
        ["-m", "dpo_jax.train", *words(world, output, *more)],
        output.with_suffix(".logs"),
        processes=processes,
        devices=devices,
    )
    return hosts.ends(), hosts


def weights(output, kind="model"):
    return {path.name: file_digest(path) for path in sorted((output / kind).glob("*.safetensors"))}


def tensors(output):
    """Digest of every tensor of the model, whose files are as many as the hosts that wrote them."""
    found = [load_file(path) for path in sorted((output / "model").glob("*.safetensors"))]
    return {name: digest_of(array.tobytes()) for part in found for name, array in part.items()}


def steps_of(output):
    path = output / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def test_two_processes_give_the_bytes_and_the_losses_of_one(world, tmp_path):
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert trained(world, alone, processes=1, devices=2)[0] == [0]
    codes, hosts = trained(world, both)
    assert codes == [0, 0], hosts.said(0)
    assert weights(both) == weights(alone) and len(weights(alone)) == 2
    assert losses(both) == losses(alone)
    assert json.loads((both / "run.json").read_text())["machine"]["processes"] == "2"
    assert "done" in hosts.said(0) and "step" not in hosts.said(1)


def losses(output):
    return {record["step"]: record["loss"] for record in read_records(output / "metrics.jsonl") if "loss" in record}


@pytest.mark.nightly
def test_one_sigterm_stops_all_and_the_same_command_goes_on(world, tmp_path):
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert trained(world, alone, "steps=40", processes=1, devices=2)[0] == [0]
    again = ["-m", "dpo_jax.train", *words(world, both, "steps=40")]
    hosts = Hosts(again, tmp_path / "logs")
    assert hosts.until(lambda: steps_of(both) > 5), hosts.said(0)
    second = Hosts(again, tmp_path / "second")  # another job of the same output
    assert second.ends() == [2, 2]
    assert all("is in use by another run" in second.said(process) for process in (0, 1))
    hosts.send(1, signal.SIGTERM)
    assert hosts.ends() == [75, 75], hosts.said(0)
    assert "stopped and saved after step" in hosts.said(0)
    codes, hosts = trained(world, both, "steps=40")
    assert codes == [0, 0], hosts.said(0)
    assert weights(both) == weights(alone)
    assert losses(both) == losses(alone)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "more",
    [
        ("adapter.rank=4",),
        ("adapter.rank=4", "export.kind=both"),
        ("adapter.rank=4", "adapter.modules_to_save=[.*norm/scale, embed/embedding]"),
        ("reference.mode=live",),
        ("reference.update_every=2",),
        ("mesh.tensor=2",),
        ("mesh.context=2",),
        ("checkpoint.best=eval_loss", "evaluation.patience=1"),
        ("evaluation.judge=rule",),
        ("model.freeze=[layers/0/.*]",),
        ("optimizer.name=adafactor",),
    ],
)
def test_each_way_of_training_gives_the_bytes_of_one_process(world, tmp_path, more):
    assert trained(world, tmp_path / "alone", *more, processes=1, devices=2)[0] == [0]
    codes, hosts = trained(world, tmp_path / "both", *more)
    assert codes == [0, 0], hosts.said(0)
    for kind in ("model", "adapter"):
        assert weights(tmp_path / "both", kind) == weights(tmp_path / "alone", kind)


@pytest.mark.nightly
def test_checkpoints_go_on_in_other_layouts(world, tmp_path):
    """Restored equal: the first loss after it is that of the layout that made the checkpoint. Reductions over other
    groups of devices are in another order, so it is equal to float32's precision, and not in its bits."""
    layouts = [(1, 4), (2, 2), (4, 1), (2, 1), (1, 1)]
    output, how = tmp_path / "run", ("steps=20", "optimizer.schedule=constant", "checkpoint.every=4")
    assert trained(world, tmp_path / "whole", *how, processes=1, devices=4)[0] == [0]
    for number, (processes, devices) in enumerate(layouts, 1):
        hosts = Hosts(
            ["-m", "tests.support.faulty", "refuse", "0", str(4 * number + 2), *words(world, output, *how)],
            tmp_path / str(number),
            processes=processes,
            devices=devices,
        )
        codes = hosts.ends()
        assert codes == [2 if number < len(layouts) else 0] * processes, hosts.said(0)
        assert number == 1 or f"resumed after step {4 * (number - 1)}" in hosts.said(0)
    lost = losses(tmp_path / "whole"), losses(output)
    assert lost[0].keys() == lost[1].keys()
    np.testing.assert_allclose([*lost[1].values()], [*lost[0].values()], rtol=2e-4, atol=1e-6)


LAYOUTS = (
    (1, 4, ()),
    (2, 2, ()),
    (4, 1, ()),
    (2, 4, ()),
    (1, 1, ()),
    (1, 4, ("mesh.tensor=2",)),
    (2, 2, ("mesh.data=2", "mesh.fsdp=2")),
)


@pytest.mark.nightly
def test_a_checkpoint_is_restored_to_the_byte_in_seven_layouts(world, tmp_path):
    """A finished run whose model was lost exports it again, from the checkpoint, on whatever devices there are."""
    output = tmp_path / "run"
    assert trained(world, output)[0] == [0, 0]
    whole = tensors(output)
    for processes, devices, more in LAYOUTS:
        shutil.rmtree(output / "model")
        codes, hosts = trained(world, output, *more, processes=processes, devices=devices)
        assert codes == [0] * processes, hosts.said(0)
        assert tensors(output) == whole, (processes, devices, more)


@pytest.mark.nightly
def test_twenty_steps_of_the_quickstart_are_the_same_on_four_devices_however_they_are_shared_out(tmp_path):
    """Two processes of two devices and four of one reduce in the same order, one of four in another: its losses are
    within float32's precision of sums over some hundred numbers."""
    how = ("steps=20", "epochs=null", "log.report=false", "evaluation.answers=null", "distributed.start_timeout=1800")
    found = {}
    for processes, devices in ((1, 4), (2, 2), (4, 1)):
        output = tmp_path / f"{processes}x{devices}"
        command = ["-m", "dpo_jax.train", "configs/quickstart.yaml", *how, f"output={output}"]
        hosts = Hosts(command, output.with_suffix(".logs"), processes=processes, devices=devices)
        assert hosts.ends(1800) == [0] * processes, hosts.said(0)
        found[processes] = (losses(output), tensors(output))
    assert found[2] == found[4]
    assert found[1][0].keys() == found[2][0].keys() and len(found[1][0]) == 20
    np.testing.assert_allclose([*found[1][0].values()], [*found[2][0].values()], rtol=0, atol=1e-6)


def faulty(world, tmp_path, kind, process, step=20):
    output = tmp_path / "run"
    more = ("steps=400", "checkpoint.every=10", "evaluation.every=1000", "log.every=1")
    hosts = Hosts(
        ["-m", "tests.support.faulty", kind, str(process), str(step), *words(world, output, *more)], tmp_path / "logs"
    )
    return output, hosts


def failed(output):
    return json.loads((output / "run.json").read_text()).get("ends", [{}])[-1]


@pytest.mark.nightly
@pytest.mark.parametrize(
    "kind, process, code, cause",
    [
        ("raise", 1, RETRY, "ValueError: the wheel came off"),
        ("raise", 0, RETRY, "ValueError: the wheel came off"),
        ("refuse", 1, 2, "a file went away"),
        ("refuse", 0, 2, "a file went away"),
        ("full", 1, 2, "No space left on device"),
        ("full", 0, 2, "No space left on device"),
        ("hang", 1, RETRY, "has taken more than 20 s (distributed.timeout)"),
        ("hang", 0, RETRY, "has taken more than 20 s (distributed.timeout)"),
    ],
)
def test_what_ends_one_process_ends_all_with_its_cause(world, tmp_path, kind, process, code, cause):
    output, hosts = faulty(world, tmp_path, kind, process)
    assert hosts.ends() == [code, code], hosts.said(0)
    assert cause in failed(output)["why"] and failed(output)["process"] == process
    assert all(cause in hosts.said(number) for number in (0, 1))
    if kind == "hang":  # with the stack of the thread that hangs
        assert "misbehave" in hosts.said(process)


@pytest.mark.nightly
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_gone_or_stopped_ends_the_others(world, tmp_path, number):
    output = tmp_path / "run"
    hosts = Hosts(
        ["-m", "dpo_jax.train", *words(world, output, "steps=400", "evaluation.every=1000")], tmp_path / "logs"
    )
    assert hosts.until(lambda: steps_of(output) > 5), hosts.said(0)
    hosts.send(1, number)
    assert hosts.until(lambda: hosts.all[0].poll() is not None)
    hosts.send(1, signal.SIGCONT)
    assert hosts.ends()[0] == RETRY, hosts.said(0)
    assert "process 1" in failed(output)["why"]
    codes, hosts = trained(world, output, "steps=12", "checkpoint.allow_change=[steps]")
    assert codes == [0, 0], hosts.said(0)


@pytest.mark.nightly
def test_that_the_first_was_killed_is_told_by_the_next_start(world, tmp_path):
    """Nobody is left to write it down: the others end at once, with the words of JAX's own runtime."""
    output = tmp_path / "run"
    hosts = Hosts(
        ["-m", "dpo_jax.train", *words(world, output, "steps=400", "evaluation.every=1000")], tmp_path / "logs"
    )
    assert hosts.until(lambda: steps_of(output) > 5), hosts.said(0)
    hosts.send(0, signal.SIGKILL)
    assert hosts.ends()[1] not in (0, None)
    codes, hosts = trained(world, output, "steps=12", "checkpoint.allow_change=[steps]")
    assert codes == [0, 0], hosts.said(0)
    assert "ended without a word" in hosts.said(0)
    assert "ended without a word" in failed(output)["why"]


@pytest.mark.nightly
@pytest.mark.parametrize("who", [(0,), (0, 1)])
def test_sigterm_to_the_first_or_to_all_saves_one_step_and_ends_all(world, tmp_path, who):
    output = tmp_path / "run"
    hosts = Hosts(
        ["-m", "dpo_jax.train", *words(world, output, "steps=400", "evaluation.every=1000")], tmp_path / "logs"
    )
    assert hosts.until(lambda: steps_of(output) > 5), hosts.said(0)
    for process in who:
        hosts.send(process, signal.SIGTERM)
    assert hosts.ends() == [75, 75], hosts.said(0)
    assert "stopped and saved after step" in hosts.said(0)


@pytest.mark.nightly
def test_a_slow_process_is_named(world, tmp_path):
    output, hosts = faulty(world, tmp_path, "slow", 1, step=5)
    assert hosts.until(lambda: "process 1 keeps the others waiting" in hosts.said(0)), hosts.said(0)
    hosts.close()


@pytest.mark.nightly
def test_processes_that_were_not_started_alike_are_refused(world, tmp_path):
    again = words(world, tmp_path / "run", "seed={process}")
    hosts = Hosts(["-m", "dpo_jax.train", *again], tmp_path / "logs")
    assert hosts.ends() == [2, 2]
    assert all("seed is 0 on process 0" in hosts.said(process) for process in (0, 1))
    assert not (tmp_path / "run").exists()


@pytest.mark.nightly
@pytest.mark.parametrize("gone, said", [(1, "0 of 1 have called"), (0, "nothing answers at 127.0.0.1")])
def test_a_process_that_never_came_is_missed_in_a_line(world, tmp_path, gone, said):
    again = words(world, tmp_path / "run", "distributed.start_timeout=15")
    hosts = Hosts(["-m", "dpo_jax.train", *again], tmp_path / "logs")
    hosts.send(gone, signal.SIGKILL)  # before it has even begun to look for the other
    assert hosts.ends()[1 - gone] == RETRY
    waiting, ended = hosts.said(1 - gone).splitlines()
    assert "waiting for the other processes" in waiting
    assert ended.startswith("error: distributed: process") and "within 15 s" in ended and said in ended


def apart(world, folder, logs, *more, processes=2, devices=1):
    """A run whose processes have no folder in common: each writes into FOLDER/NUMBER/run."""
    again = words(world, "run", "optimizer.schedule=constant", "checkpoint.every=2", *more)
    return Hosts(["-m", "dpo_jax.train", *again], logs, processes=processes, devices=devices, apart=folder)


@pytest.mark.nightly
@pytest.mark.parametrize("more", [(), ("mesh.data=2",), ("adapter.rank=4", "checkpoint.best=eval_loss")])
def test_hosts_with_folders_of_their_own_go_on_from_them_to_the_bytes_of_one(world, tmp_path, more):
    how = ("steps=12", "evaluation.every=4", *more)
    alone = apart(world, tmp_path / "alone", tmp_path / "alone.logs", *how, processes=1, devices=2)
    assert alone.ends() == [0], alone.said()
    output = tmp_path / "apart" / "0" / "run"
    first = apart(world, tmp_path / "apart", tmp_path / "first", *how)
    assert first.until(lambda: steps_of(output) > 6), first.said(0)
    first.send(1, signal.SIGKILL)
    assert first.ends()[0] == RETRY, first.said(0)
    again = apart(world, tmp_path / "apart", tmp_path / "again", *how)
    assert again.ends() == [0, 0], again.said(0)
    assert "checkpoints on each what its devices hold" in again.said(0) and "resumed after step" in again.said(0)
    kind = "adapter" if "adapter.rank=4" in more else "model"
    assert weights(output, kind) == weights(tmp_path / "alone" / "0" / "run", kind) != {}
    assert losses(output) == losses(tmp_path / "alone" / "0" / "run")
    assert not (tmp_path / "apart" / "1" / "run" / kind).exists()


@pytest.mark.nightly
def test_of_folders_of_their_own_what_one_host_has_lost_is_missed(world, tmp_path):
    folder, how = tmp_path / "apart", ("steps=400", "evaluation.every=1000", "checkpoint.keep=2")
    first = apart(world, folder, tmp_path / "first", *how)
    assert first.until(lambda: steps_of(folder / "0" / "run") > 8), first.said(0)
    first.send(0, signal.SIGTERM)
    assert first.ends() == [75, 75], first.said(0)
    kept = [folder / str(process) / "run" / "checkpoints" for process in (0, 1)]
    older, newest = sorted(int(path.name) for path in kept[1].iterdir() if path.name.isdigit())
    shutil.move(kept[1] / str(newest), tmp_path / "lost")

    shared = apart(world, folder, tmp_path / "one", *how, "checkpoint.allow_change=[steps]", processes=1)
    assert shared.ends() == [2] and "the same hosts in the same order" in shared.said(), shared.said()

    more = (*how[1:], f"steps={older + 2}", "checkpoint.allow_change=[steps]")
    again = apart(world, folder, tmp_path / "again", *more)
    assert again.ends() == [0, 0], again.said(0)
    assert f"{newest} is damaged (process 1 does not have it)" in again.said(0)
    assert f"resumed after step {older}" in again.said(0)
    assert [*kept[0].glob(f"{newest}.bad-*")] and not [*kept[1].glob("*.bad-*")]

    shutil.rmtree(kept[1])
    empty = apart(world, folder, tmp_path / "empty", *how[1:], f"steps={older + 4}", "checkpoint.allow_change=[steps]")
    assert empty.ends() == [2, 2] and "can be used, though the run had saved some" in empty.said(0), empty.said(0)
