"""How long a step takes at least, and what it waits for, from what it does and what a chip can do."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from dpo_jax.planning.chips import REACHED_BANDWIDTH, REACHED_FLOPS, Chip
from dpo_jax.planning.exchanges import Collective

ASSUMED = (
    f"{100 * REACHED_FLOPS:.0f} % of the peak of matrix products and {100 * REACHED_BANDWIDTH:.0f} % of bandwidths are "
    "reached",
    "each device waits for the fullest one: a micro-batch costs its padding too",
    "exchanges go in rings, and what leaves a host is split over the cards of its members of the group",
    "between `all overlapped` (the longest alone) and `nothing overlapped` (the sum) lies what will be measured",
)


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device does in a step: operations as compiled, bytes to and from its memory, and to other devices.

    `useful` are the operations of the whole step that the model asks for, all devices together.
    """

    flops: float
    memory_bytes: float
    inside_bytes: float
    across_bytes: float
    useful: float


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds that each part of the machine is busy in a step."""

    compute: float
    memory: float
    inside: float
    across: float

    @property
    def parts(self) -> dict[str, float]:
        """By name."""
        return dataclasses.asdict(self)

    @property
    def bottleneck(self) -> str:
        """The part that is busy longest."""
        return max(self.parts, key=lambda name: self.parts[name])

    @property
    def overlapped(self) -> float:
        """Seconds of a step in which everything else hides behind the longest part."""
        return max(self.parts.values())

    @property
    def serial(self) -> float:
        """Seconds of a step in which nothing overlaps."""
        return sum(self.parts.values())


def estimate(work: Work, chip: Chip) -> Estimate:
    """Busy seconds of a step's work on a chip."""
    return Estimate(
        compute=work.flops / (REACHED_FLOPS * chip.flops),
        memory=work.memory_bytes / (REACHED_BANDWIDTH * chip.memory_bandwidth),
        inside=work.inside_bytes / (REACHED_BANDWIDTH * chip.inside),
        across=work.across_bytes / (REACHED_BANDWIDTH * chip.across),
    )


def utilisation(useful: float, chip: Chip, devices: int, seconds: float) -> float:
    """MFU: the useful share of what the chips could have computed in that time."""
    return useful / (devices * chip.flops * seconds)


def traffic(found: Sequence[Collective], per_host: int) -> tuple[float, float]:
    """Bytes that leave a device in a step: over links inside a host, and its share of what leaves the host.

    A group on several hosts counts on both: its ring passes through the devices of each host, too.
    """
    across = sum((one.across(per_host) for one in found), 0.0)
    inside = sum((one.sent for one in found if _has_neighbours(one, per_host)), 0.0)
    return inside, across


def _has_neighbours(one: Collective, per_host: int) -> bool:
    hosts = [len(set((group // per_host).tolist())) for group in one.groups]
    return max(hosts) < one.size


class Moved(NamedTuple):
    """Bytes of one device that a step reads and writes again and again.

    Attributes:
      weights: all weights in the dtype of computation as the device uses them, whole over fsdp.
      shard: the device's own part of these.
      state_shard: of its own float32 weights.
      kept: what a micro-batch's forward pass would keep for its backward pass without recomputation.
    """

    weights: int
    shard: int
    state_shard: int
    kept: int


def memory_traffic(moved: Moved, micro_batches: float) -> float:
    """Bytes to and from one device's memory in a step, roughly.

    For each micro-batch weights are written and read forwards and backwards, and so is their gradient; the device's
    part is read twice, and its gradient read and added to a sum of twice its size; activations are written once and
    read twice. Once in a step weights and both moments are read and written, and the gradient and its norm read.
    """
    each = 6 * moved.weights + 8 * moved.shard + 3 * moved.kept
    return micro_batches * each + 8 * moved.state_shard


def theory(shard: int, gradient: int, *, data: int, fsdp: int, micro_batches: float) -> float:
    """Bytes that must leave a device in a step where weights are split over `fsdp` and copied over `data`.

    For each micro-batch every weight is gathered forwards and again backwards, in the dtype of computation, and its
    gradient is scattered in float32: 8 bytes for each weight in bfloat16, times `(fsdp - 1) / fsdp`. Over `data` a
    device's part of the gradient is all-reduced.

    Args:
      shard: bytes of a device's own part of the weights in the dtype of computation.
      gradient: bytes of the same part of the gradient in float32.
      data: size of the mesh's data axis.
      fsdp: size of its fsdp axis.
      micro_batches: of a step.
    """
    return micro_batches * ((2 * shard + gradient) * (fsdp - 1) + gradient * 2 * (data - 1) / data)
