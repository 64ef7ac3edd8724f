"""What a device's own compiler made of a step: kernels, launches, cycles, and how its time is put together.

Nothing here was measured on a device. A GPU's program is counted, and seconds come from its counts and from what is
assumed of the chip; of a TPU's program the compiler itself estimates the cycles, except of kernels and of exchanges.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Sequence

from dpo_jax.planning import exchanges, hlo
from dpo_jax.planning.chips import REACHED_ATTENTION, REACHED_BANDWIDTH, REACHED_FLOPS, Chip, Gpu, Tpu
from dpo_jax.planning.kernels import CompiledKernel, kernel_of

LAUNCH_SECONDS, WAIT_SECONDS = 2.5e-6, 10e-6
NO_KERNEL = frozenset(
    "parameter get-tuple-element tuple constant bitcast while conditional call after-all partition-id replica-id "
    "async-start async-update async-done call-start call-done fusion-done copy-done opt-barrier iota".split()
)
"""Operations of an optimized GPU program that launch nothing; `-done` waits for a launch."""
NO_ESTIMATE = 2**63 - 1
"""What the TPU compiler writes where it has no estimate."""
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
HELPERS = re.compile(
    r"__cublas|AllocateBuffer|Assume|Prepare|GatherScatter|Sharding|Layout|ConsumeInstr|MoveTo|annotate"
)
"""Custom calls that are marks for a TPU's compiler, or products by a GPU's library, and no kernels of ours."""

ASSUMED = (
    f"{100 * REACHED_FLOPS:.0f} % of the peak of matrix products, {100 * REACHED_ATTENTION:.0f} % in kernels of "
    f"attention, {100 * REACHED_BANDWIDTH:.0f} % of bandwidths are reached",
    f"GPU: a kernel takes as long as its products, its bytes or {1e6 * LAUNCH_SECONDS:g} us, whichever is longest, and "
    f"the host is waited for in {1e6 * WAIT_SECONDS:g} us",
    "TPU: the compiler's own estimate of cycles, which has no exchanges in it, and products of hand-written kernels",
    "exchanges that the schedule puts work beside are hidden, the others are waited for",
)


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A step as a device's compiler leaves it; numbers are of one device and one step.

    Attributes:
      kernels: hand-written kernels, and how often each runs.
      launches: of kernels; of a GPU.
      waits: times that the host is waited for, because a loop's length is a value; of a GPU.
      cycles: as the compiler estimates them, kernels and exchanges left out; of a TPU.
      work: what each kernel multiplies and moves. Of hand-written ones only grouped products are counted, and these
        alone of a TPU's program.
      exchanged: what devices send each other.
    """

    kernels: dict[str, float]
    launches: float
    waits: float
    cycles: float
    work: list[CompiledKernel]
    exchanged: list[exchanges.Collective]

    @property
    def products(self) -> dict[str, float]:
        """Operations of matrix products by dtype of what is multiplied."""
        found: dict[str, float] = {}
        for one in self.work:
            for dtype, flops in one.flops.items():
                found[dtype] = found.get(dtype, 0.0) + one.times * flops
        return found

    @property
    def moved(self) -> float:
        """Bytes that kernels read and write."""
        return sum((one.times * one.moved for one in self.work), 0.0)


def read(text: str, devices: int, micro_batches: float) -> CompiledStep:
    """What an optimized program's text says; loops of unknown length run as often as a step has micro-batches."""
    program = hlo.parse(text, unknown=micro_batches)
    by_hand, cycles, work = defaultdict[str, float](float), 0.0, []
    for one, inside, times in program.launched():
        found = _CYCLES.search(one.rest)
        cycles += times * int(found[1]) if found and int(found[1]) != NO_ESTIMATE else 0.0
        if one.opcode not in NO_KERNEL and not one.opcode.endswith("-done") and not _is_exchange(one):
            work.append(kernel_of(one, inside, times, program))
    for one, _, times in program.instructions("custom-call"):  # some stand in a fusion with a slice of what they write
        target = _TARGET.search(one.rest)
        if target and not HELPERS.search(target[1]):
            by_hand[target[1]] += times
    found = exchanges.collectives(program, devices)
    launches = sum(one.times for one in (*work, *found))
    return CompiledStep(dict(by_hand), launches, program.waits, cycles, work, found)


def _is_exchange(one: hlo.Instruction) -> bool:
    return one.opcode.removesuffix("-start") in exchanges.KINDS


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Of a step: kernels by what bounds each (products, memory, or being launched), kernels of attention, waits for the
    host, exchanges that nothing hides; `hidden` are the seconds of exchanges beside which work goes on.

    Of a TPU all that is no hand-written kernel stands under `products`.
    """

    products: float
    memory: float
    launches: float
    attention: float
    waits: float
    exposed: float
    hidden: float

    @property
    def step(self) -> float:
        """All of it; what is hidden counts where it is longer than what it hides behind."""
        busy = self.products + self.memory + self.launches + self.attention + self.waits
        return max(busy, self.hidden) + self.exposed


def seconds_of(step: CompiledStep, chip: Chip, per_host: int, *, attention_flops: float) -> Seconds:
    """Where a step's time goes on a chip.

    Args:
      step: as compiled.
      chip: what it runs on.
      per_host: devices that fast links join.
      attention_flops: operations of one device's kernels of attention, which are in no text.
    """
    attention = attention_flops / (REACHED_ATTENTION * chip.flops) if step.kernels else 0.0
    exposed, hidden = (
        _sending([one for one in step.exchanged if one.hides is hides], chip, per_host) for hides in (False, True)
    )
    if isinstance(chip.compiler, Tpu):
        grouped = sum(step.products.values()) / (REACHED_FLOPS * chip.flops)
        return Seconds(step.cycles / chip.compiler.clock + grouped, 0.0, 0.0, attention, 0.0, exposed, hidden)
    bound = {"products": 0.0, "memory": 0.0, "launches": 0.0}
    for one in step.work:
        flops = sum(count / rate(dtype, chip.compiler, chip.flops) for dtype, count in one.flops.items())
        parts = {"products": flops, "memory": one.moved / (REACHED_BANDWIDTH * chip.memory_bandwidth)}
        parts["launches"] = LAUNCH_SECONDS
        longest = max(parts, key=lambda name: parts[name])
        bound[longest] += one.times * parts[longest]
    return Seconds(**bound, attention=attention, waits=WAIT_SECONDS * step.waits, exposed=exposed, hidden=hidden)


def rate(dtype: str, gpu: Gpu, flops: float) -> float:
    """Operations per second of products of a dtype: 16 bits go through matrix units, float32 does not."""
    return REACHED_FLOPS * (flops if dtype in ("bf16", "f16") else gpu.float32)


def _sending(found: Sequence[exchanges.Collective], chip: Chip, per_host: int) -> float:
    inside = sum(one.sent for one in found)
    across = sum(one.across(per_host) for one in found)
    return (inside / chip.inside + across / chip.across) / REACHED_BANDWIDTH
