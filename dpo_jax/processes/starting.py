"""The beginning and the end of a run of several processes, by JAX's own distributed runtime."""

import os
import sys
import traceback
from collections.abc import Mapping

from dpo_jax.errors import UserError, one_line, printable, redacted
from dpo_jax.files import refusal
from dpo_jax.processes import places
from dpo_jax.processes.here import DIFFER, Here, here, stand
from dpo_jax.processes.joining import join
from dpo_jax.processes.places import Place
from dpo_jax.processes.settings import DistributedSettings
from dpo_jax.processes.watch import LOST_SECONDS, RETRY, Watch, leave_at_once

_watch: list[Watch] = []

MARKS = {
    *("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "PMIX_SERVER_URI2", "OMPI_COMM_WORLD_SIZE", "KUBERNETES_SERVICE_HOST"),
    *("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "TPU_SKIP_MDS_QUERY", "MEGASCALE_COORDINATOR_ADDRESS"),
}
"""Variables without which JAX need not be asked, so that a run of one process begins at once."""


def begin(settings: DistributedSettings, same: Mapping[str, object], variables: Mapping[str, str] = os.environ) -> Here:
    """Find the other processes of this run, if it has any; to be called before JAX looks for devices.

    A process that is not the first says nothing on standard output from then on.

    Args:
      settings: where they are, and how long they wait for each other.
      same: what must be the same on all of them, such as the run's settings.
      variables: the environment.

    Raises:
      UserError: what is said of their places is half of it or contradicts itself, they did not find each other in time,
        or they were not started alike.
    """
    place = places.place_of(settings, variables) or _found_by_jax(settings, variables)
    if place is None:
        places.check_slurm(variables)
        return here()
    _connect(place, settings)
    from jax._src import distributed

    now = Here(
        distributed.global_state.client,
        place.process,
        place.processes,
        timeout=settings.timeout,
        slow=settings.start_timeout,
    )
    stand(now)
    watch = Watch(now)
    watch.start()
    _watch[:] = [watch]
    if not now.owns:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    now.same(DIFFER, same)
    return now


def _connect(place: Place, settings: DistributedSettings) -> None:
    """Start JAX's distributed runtime.

    Raises:
      UserError: not all processes came in time, or the address cannot be used.
    """
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # signals are ours: see run.interrupts
    join(
        place,
        settings.start_timeout,
        lambda seconds: jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process,
            local_device_ids=place.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=seconds,
            # JAX beats twice in this time, and so may miss a process after half of it: the watch is to say so before.
            heartbeat_timeout_seconds=2 * settings.timeout + 20,
            shutdown_timeout_seconds=settings.timeout,
        ),
    )


def _found_by_jax(settings: DistributedSettings, variables: Mapping[str, str]) -> Place | None:
    """The place that JAX finds in a cluster that it knows: Slurm, Open MPI, Cloud TPU, GKE, Kubernetes.

    Raises:
      UserError: it sees a cluster and cannot read what it says.
    """
    if not MARKS & variables.keys():
        return None
    from jax._src import clusters

    kinds = [kind for kind in clusters.ClusterEnv._cluster_types if not kind.opt_in_only_method]
    try:
        kind = next((kind for kind in kinds if kind.is_env_present()), None)
        if kind is None or kind.get_process_count() < 2:
            return None
        port = variables.get("JAX_COORDINATOR_PORT")
        found = (
            kind.get_coordinator_address(timeout_secs=settings.start_timeout, override_coordinator_port=port),
            int(kind.get_process_count()),
            int(kind.get_process_id()),
        )
        devices = _own_devices(kind, variables)
    except Exception as error:
        raise UserError(
            f"distributed: this looks like one of several processes, and its place cannot be read: {one_line(error)}; "
            "give distributed.coordinator, distributed.processes and distributed.process"
        ) from error
    return Place(*found, devices, kind.__name__)


def _own_devices(kind, variables: Mapping[str, str]) -> tuple[int, ...] | None:
    """Which of its host's GPUs are the process's own, as JAX has it; all, where a Slurm task is alone there."""
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    local = kind.get_local_process_id()
    if running_in_cloud_tpu_vm or local is None:
        return None
    alone = places.devices_of_task(variables) if kind.__name__ == "SlurmCluster" else None
    return alone or (int(local),)


# ---------------------------------------------------------------------------------------------- the end


def end() -> None:
    """All processes have come to their end: wait for each other, and part."""
    place = here()
    if place.count == 1:
        return
    place.meet("end")
    _watch.pop().stop()
    import jax

    jax.distributed.shutdown()
    stand(None)


def end_early(error: BaseException, code: int) -> None:
    """This process ends with an error: so do all others, at once. Returns only where there are none."""
    place = here()
    if place.count == 1:
        return
    why = _why(error) if code == RETRY else _said(error)
    if code == RETRY and place.failure() is None and not why.startswith("process"):
        traceback.print_exception(error)  # else it is the other one's fault
    failure = place.failed(code, why)
    if failure.process != place.process:
        print(f"error: {failure.line()}", file=sys.stderr, flush=True)
    leave_at_once(place, failure, code if failure.process == place.process else failure.code)


def _said(error: BaseException) -> str:
    """An error in a line."""
    known = str(error).partition("\n")[0] if isinstance(error, UserError) else None
    line = known or (refusal(error) if isinstance(error, OSError) else None) or one_line(error)
    return printable(redacted(line))[:300]


def _why(error: BaseException) -> str:
    """What ended this process: perhaps another that is dead, with which it was to exchange something."""
    watch, said = _watch[-1], _said(error)
    try:
        gone = [process for process in watch.silent(LOST_SECONDS) if process != here().process]
    except Exception:
        return f"process 0 is gone ({said})"
    return f"process {', '.join(map(str, gone))} is not heard of any more ({said})" if gone else said
