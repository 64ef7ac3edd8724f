"""Where a process stands in a run of several: what each launcher says, and what is no place."""

import pytest

from dpo_jax.config import run as config
from dpo_jax.errors import UserError
from dpo_jax.processes import places, starting
from dpo_jax.processes.settings import DistributedSettings

NOTHING = DistributedSettings()
JAX = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SKY = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
TORCH = {"MASTER_ADDR": "a", "MASTER_PORT": "7", "WORLD_SIZE": "2", "RANK": "0"}
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[007-008]",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


@pytest.mark.parametrize(
    "variables, place",
    [
        ({}, None),
        (JAX, ("a:1", 4, 3)),
        ({**JAX, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, None),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": "1"}, ("a:1", 2, 1)),
        (SKY, ("10.0.0.1:8476", 2, 1)),
        ({**SKY, "SKYPILOT_NUM_NODES": "1"}, None),
        (TORCH, ("a:7", 2, 0)),
        ({**TORCH, "WORLD_SIZE": "1"}, None),
        ({**TORCH, **JAX}, ("a:1", 4, 3)),
    ],
)
def test_a_launcher_says_where_a_process_stands(variables, place):
    found = places.place_of(NOTHING, variables)
    assert (None if found is None else tuple(found)[:3]) == place


@pytest.mark.parametrize(
    "variables, words",
    [
        ({**JAX, "JAX_PROCESS_ID": "4"}, "process 4 of 4"),
        ({**JAX, "JAX_PROCESS_ID": "one"}, "process one of 4"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID"),
        ({"MASTER_ADDR": "a", "WORLD_SIZE": "2"}, "RANK"),
    ],
)
def test_half_a_place_is_refused_by_the_name_of_what_is_missing(variables, words):
    with pytest.raises(UserError, match=words):
        places.place_of(NOTHING, variables)


def test_settings_say_it_too_and_must_not_contradict_the_launcher():
    given = DistributedSettings(coordinator="b:2", processes=4, process=3)
    assert places.place_of(given, {})[:3] == ("b:2", 4, 3)
    assert places.place_of(given, JAX)[:3] == ("b:2", 4, 3)
    with pytest.raises(UserError, match=r"distributed\.process: is 2, and JAX_COORDINATOR_ADDRESS says 3"):
        places.place_of(DistributedSettings(coordinator="b:2", processes=4, process=2), JAX)


@pytest.mark.parametrize(
    "words, problem",
    [
        (["distributed.processes=2"], "distributed.coordinator, distributed.process"),
        (["distributed.processes=2", "distributed.process=2", "distributed.coordinator=a:1"], "2 is none of 2"),
        (["distributed.processes=2", "distributed.process=1", "distributed.coordinator=a"], "a has no port"),
    ],
)
def test_half_given_settings_are_one_line(words, problem):
    with pytest.raises(UserError, match=problem) as error:
        config.load(["model.path=m", "data.train=d", "output=o", *words])
    assert len(str(error.value).splitlines()) == 1


def test_jax_finds_slurm_and_open_mpi(monkeypatch):
    for variables, place in ((SLURM, ("node007:61440", 2, 1)), (OPEN_MPI, ("10.96.0.1:", 2, 1))):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            found = starting._found_by_jax(NOTHING, variables)
        assert found is not None
        assert found[1:3] == place[1:]
        assert found.coordinator.startswith(place[0].split(":")[0])


def test_a_slurm_task_alone_on_its_host_takes_all_its_gpus():
    assert places.devices_of_task({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2"}) == (0, 1, 2)
    assert places.devices_of_task({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "8"}) == tuple(range(8))
    assert places.devices_of_task({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_GPUS_ON_NODE": "8"}) is None


@pytest.mark.parametrize("missing", ["SLURM_STEP_NODELIST", "SLURM_LOCALID"])
def test_tasks_of_a_slurm_step_that_cannot_find_each_other_are_refused(missing):
    variables = {name: value for name, value in SLURM.items() if name != missing}
    with pytest.raises(UserError, match=missing):
        places.check_slurm(variables)
    places.check_slurm(SLURM)
    places.check_slurm({**variables, "SLURM_STEP_NUM_TASKS": "1"})


@pytest.mark.parametrize("variables", [JAX, TORCH, SLURM])
def test_a_command_of_one_process_is_not_started_twice(variables):
    places.check_alone({})
    with pytest.raises(UserError, match="were started"):
        places.check_alone(variables)
