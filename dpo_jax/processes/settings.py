"""Settings of a run on several hosts."""

from pydantic import Field, model_validator

from dpo_jax.settings import Section

PARTS = ("coordinator", "processes", "process")


class DistributedSettings(Section):
    """How the processes of one run find each other, and how long they wait for one another."""

    coordinator: str | None = Field(
        default=None,
        description="HOST:PORT of process 0, for launchers that do not say it (default: found out on Slurm, Cloud TPU, "
        "GKE, Open MPI, Kubernetes and SkyPilot, or from the environment)",
    )
    processes: int | None = Field(default=None, gt=0, description="how many processes the run has")
    process: int | None = Field(default=None, ge=0, description="which of them this is, from 0")
    timeout: int = Field(
        default=300,
        ge=5,
        description="seconds that a step, or a process that is not heard of, may take before all processes end",
    )
    start_timeout: int = Field(
        default=1800,
        ge=5,
        description="seconds that anything beside a step may take without progress: finding each other, downloading, "
        "tokenising, compiling, evaluating, saving, exporting",
    )

    @model_validator(mode="after")
    def _whole(self) -> "DistributedSettings":
        given = [name for name in PARTS if getattr(self, name) is not None]
        if given and len(given) < len(PARTS):
            missing = ", ".join(f"distributed.{name}" for name in PARTS if name not in given)
            raise ValueError(f"distributed.{given[0]}: is given without {missing}; give all three, or none of them")
        if self.process is not None and self.processes is not None and self.process >= self.processes:
            raise ValueError(
                f"distributed.process: {self.process} is none of {self.processes} processes, which are counted from 0"
            )
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdecimal():
            raise ValueError(
                f"distributed.coordinator: {self.coordinator} has no port; write HOST:PORT, such as node1:29500"
            )
        return self
