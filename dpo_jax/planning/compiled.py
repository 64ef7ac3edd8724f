"""What a device's own compiler made of a step: kernels, launches, cycles, and how its time is put together.

Nothing here was measured on a device. A GPU's program is counted, and seconds come from its counts and from what is
assumed of the chip; of a TPU's program the compiler itself estimates the cycles, except of kernels and of exchanges.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Sequence

from dpo_jax.planning import exchanges, hlo
from dpo_jax.planning.chips import REACHED_ATTENTION, REACHED_BANDWIDTH, REACHED_FLOPS, Chip, Tpu

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
HELPERS = re.compile(r"AllocateBuffer|Assume|Prepare|GatherScatter|Sharding|Layout|ConsumeInstr|MoveTo|annotate")
"""Custom calls of a TPU program that are marks for its compiler and no kernels."""

ASSUMED = (
    f"{100 * REACHED_FLOPS:.0f} % of the peak of matrix products, {100 * REACHED_ATTENTION:.0f} % in kernels of "
    f"attention, {100 * REACHED_BANDWIDTH:.0f} % of bandwidths are reached",
    f"GPU: {1e6 * LAUNCH_SECONDS:g} us a launch and {1e6 * WAIT_SECONDS:g} us each time that the host is waited for; "
    "TPU: the compiler's own estimate of cycles",
    "exchanges that the schedule puts work beside are hidden, the others are waited for",
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step as a device's compiler leaves it; numbers are of one device and one step.

    Attributes:
      kernels: hand-written kernels, and how often each runs.
      launches: of kernels; of a GPU.
      waits: times that the host is waited for, because a loop's length is a value; of a GPU.
      cycles: as the compiler estimates them, kernels and exchanges left out; of a TPU.
      products: operations of matrix products by dtype of what is multiplied, those in kernels left out; of a GPU.
      exchanged: what devices send each other.
    """

    kernels: dict[str, float]
    launches: float
    waits: float
    cycles: float
    products: dict[str, float]
    exchanged: list[exchanges.Collective]


def read(text: str, devices: int, micro_batches: float) -> Compiled:
    """What an optimized program's text says; loops of unknown length run as often as a step has micro-batches."""
    program = hlo.parse(text, unknown=micro_batches)
    kernels, products = defaultdict[str, float](float), defaultdict[str, float](float)
    launches = cycles = 0.0
    for one, times in program.launched():
        launches += times * (one.opcode not in NO_KERNEL and not one.opcode.endswith("-done"))
        found = _CYCLES.search(one.rest)
        cycles += times * int(found[1]) if found and int(found[1]) != NO_ESTIMATE else 0.0
        target = _TARGET.search(one.rest) if one.opcode == "custom-call" else None
        if target and not HELPERS.search(target[1]):
            kernels[target[1]] += times
    for one, inside, times in program.instructions(*hlo.PRODUCTS):
        products[hlo.shape_of(one.operands[0], inside)[0]] += times * hlo.flops_of(one, inside)
    found = exchanges.collectives(program, devices)
    return Compiled(dict(kernels), launches, program.waits, cycles, dict(products), found)


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Of a step: what is computed, in kernels of attention, by launching and waiting, and exchanges that nothing hides;
    `hidden` are the seconds of exchanges beside which work goes on."""

    products: float
    attention: float
    launches: float
    exposed: float
    hidden: float

    @property
    def step(self) -> float:
        """All of it; what is hidden counts where it is longer than what it hides behind."""
        busy = self.products + self.attention + self.launches
        return max(busy, self.hidden) + self.exposed


def seconds_of(step: Compiled, chip: Chip, per_host: int, *, attention_flops: float) -> Seconds:
    """Where a step's time goes on a chip.

    Args:
      step: as compiled.
      chip: what it runs on.
      per_host: devices that fast links join.
      attention_flops: operations of one device's kernels of attention, which are in no text.
    """
    attention = attention_flops / (REACHED_ATTENTION * chip.flops) if step.kernels else 0.0
    if isinstance(chip.compiler, Tpu):
        products, launches = step.cycles / chip.compiler.clock, 0.0
    else:
        wide = chip.compiler.float32
        rates = {dtype: chip.flops if dtype in ("bf16", "f16") else wide for dtype in step.products}
        products = sum(flops / (REACHED_FLOPS * rates[dtype]) for dtype, flops in step.products.items())
        launches = LAUNCH_SECONDS * step.launches + WAIT_SECONDS * step.waits
    exposed, hidden = (
        _sending([one for one in step.exchanged if one.hides is hides], chip, per_host) for hides in (False, True)
    )
    return Seconds(products, attention, launches, exposed, hidden)


def _sending(found: Sequence[exchanges.Collective], chip: Chip, per_host: int) -> float:
    inside = sum(one.sent for one in found)
    across = sum(one.across(per_host) for one in found)
    return (inside / chip.inside + across / chip.across) / REACHED_BANDWIDTH
