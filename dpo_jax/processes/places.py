"""Which of how many processes this one is, as settings, variables of the environment or a launcher say it."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from dpo_jax.errors import UserError

if TYPE_CHECKING:
    from dpo_jax.processes.settings import DistributedSettings

TOGETHER = "start all processes with what they need to find each other (srun passes it on), or one process alone"


class Place(NamedTuple):
    """Where a process stands in a run of several."""

    coordinator: str
    """HOST:PORT of process 0."""
    processes: int
    process: int
    devices: tuple[int, ...] | None = None
    """Numbers of the host's GPUs that are this process's own; None takes all that it sees."""
    told_by: str = "settings"


class Launcher(NamedTuple):
    """Variables by which a launcher tells a process its place: each a name, or several of which the first counts."""

    name: str
    coordinator: tuple[str, ...]
    processes: tuple[str, ...]
    process: tuple[str, ...]
    address: Callable[[Mapping[str, str]], str]


def _jax(variables: Mapping[str, str]) -> str:
    return variables["JAX_COORDINATOR_ADDRESS"]


def _master(variables: Mapping[str, str]) -> str:
    return f"{variables['MASTER_ADDR']}:{variables.get('MASTER_PORT', '29500')}"


def _sky(variables: Mapping[str, str]) -> str:
    return f"{variables['SKYPILOT_NODE_IPS'].split()[0]}:8476"


LAUNCHERS = (
    Launcher(
        "JAX_COORDINATOR_ADDRESS",
        ("JAX_COORDINATOR_ADDRESS",),
        ("JAX_NUM_PROCESSES", "JAX_PROCESS_COUNT"),
        ("JAX_PROCESS_ID", "JAX_PROCESS_INDEX", "JOB_COMPLETION_INDEX"),
        _jax,
    ),
    Launcher("SkyPilot", ("SKYPILOT_NODE_IPS",), ("SKYPILOT_NUM_NODES",), ("SKYPILOT_NODE_RANK",), _sky),
    Launcher("WORLD_SIZE and RANK", ("MASTER_ADDR",), ("WORLD_SIZE",), ("RANK",), _master),
)
"""Launchers that JAX itself does not know; the first that says something counts."""

SLURM = {
    "SLURM_JOB_ID": "the job",
    "SLURM_STEP_NODELIST": "its hosts",
    "SLURM_NTASKS": "how many tasks there are",
    "SLURM_PROCID": "which of them this is",
    "SLURM_LOCALID": "which of its host's",
}
"""What JAX needs to know of a Slurm job."""


def place_of(settings: "DistributedSettings", variables: Mapping[str, str]) -> Place | None:
    """The place that settings or variables of the environment give; None where neither do: then it is JAX's to say.

    Raises:
      UserError: they say one half of it, or two different things.
    """
    found = _told(variables)
    if settings.coordinator is None or settings.processes is None or settings.process is None:
        return found
    given = Place(settings.coordinator, settings.processes, settings.process)
    for name in ("processes", "process"):
        if found is not None and getattr(found, name) != getattr(given, name):
            raise UserError(
                f"distributed.{name}: is {getattr(given, name)}, and {found.told_by} says {getattr(found, name)}; "
                "leave the settings out, or unset the variables"
            )
    return given


def _told_by(launcher: Launcher, variables: Mapping[str, str]) -> Place | None:
    """What one launcher says; None if nothing, or that there is one process.

    Raises:
      UserError: it says one half of it, or no place at all.
    """
    said = {part: _first(getattr(launcher, part), variables) for part in ("coordinator", "processes", "process")}
    missing = [part for part, value in said.items() if value is None]
    if said["coordinator"] is None or said["processes"] == "1" or len(missing) == 2:
        return None  # JAX takes an address alone where a cluster says the rest
    if missing:
        names = [" or ".join(getattr(launcher, part)) for part in ("coordinator", missing[0])]
        raise UserError(f"{names[0]} is set, and {names[1]} is not; set it too, or unset {names[0]}")
    count, number = said["processes"] or "", said["process"] or ""
    if not (count.isdecimal() and number.isdecimal()) or int(number) >= int(count):
        raise UserError(f"{launcher.name}: process {number} of {count} is no place; processes are counted from 0")
    return Place(launcher.address(variables), int(count), int(number), told_by=launcher.name)


def _first(names: tuple[str, ...], variables: Mapping[str, str]) -> str | None:
    """The value of the first variable that has one."""
    return next((variables[name] for name in names if variables.get(name)), None)


def check_alone(
    variables: Mapping[str, str],
    what: str = "this command",
    remedy: str = "start one of them (of the commands, only dpo_jax.train runs on several hosts)",
) -> None:
    """Whether what knows nothing of other processes is the only one that was started.

    Raises:
      UserError: it is one of several.
    """
    place = _told(variables)
    count = variables.get("SLURM_STEP_NUM_TASKS", "1") if place is None else str(place.processes)
    if count != "1":
        raise UserError(f"{what} is one process, and {count} were started; {remedy}")


def _told(variables: Mapping[str, str]) -> Place | None:
    """What the first launcher says that says something."""
    return next(filter(None, (_told_by(launcher, variables) for launcher in LAUNCHERS)), None)


def check_slurm(variables: Mapping[str, str]) -> None:
    """Whether this is one of several tasks of a Slurm step that cannot find each other.

    Raises:
      UserError: it is, so that each would be a run of its own.
    """
    tasks = variables.get("SLURM_STEP_NUM_TASKS", "1")
    missing = [name for name in SLURM if not variables.get(name)]
    if tasks.isdecimal() and int(tasks) > 1 and missing:
        raise UserError(
            f"this is one of {tasks} tasks of a Slurm step, and without {missing[0]} ({SLURM[missing[0]]}) they cannot "
            f"find each other; {TOGETHER}"
        )


def devices_of_task(variables: Mapping[str, str]) -> tuple[int, ...] | None:
    """GPUs of a Slurm task that is alone on its host: all of them, where JAX would take the first."""
    each = variables.get("SLURM_STEP_TASKS_PER_NODE", variables.get("SLURM_TASKS_PER_NODE", ""))
    if each.split("(")[0] != "1":
        return None
    seen = [name for name in variables.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    number = len(seen) or int(variables.get("SLURM_GPUS_ON_NODE", "0") or 0)
    return tuple(range(number)) or None
