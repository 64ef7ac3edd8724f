"""Where devices stand in a mesh: near their neighbours, and slow links between the axes that talk least."""

import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dpo_jax import sharding
from dpo_jax.errors import UserError
from tests.support.exchanges import hops


def torus(*spans: int, kind: str, slices: int = 1) -> list[SimpleNamespace]:
    """Stand-ins for the TPUs of slices, in the order in which JAX lists them: x fastest."""
    places = [tuple(int(i) for i in reversed(place)) for place in np.ndindex(*reversed(spans))]
    return [
        SimpleNamespace(
            id=number,
            platform="tpu",
            device_kind=kind,
            coords=place,
            core_on_chip=0,
            slice_index=part,
            process_index=part,
        )
        for number, (part, place) in enumerate((part, place) for part in range(slices) for place in places)
    ]


@pytest.mark.parametrize(
    "spans, kind, sizes",
    [
        ((4, 4, 4), "TPU v5", (4, 4, 4)),
        ((4, 4, 4), "TPU v5", (4, 16, 1)),
        ((4, 4, 4), "TPU v5", (1, 16, 4)),
        ((8, 8, 1), "TPU v6 lite", (1, 64, 1)),
        ((8, 8, 1), "TPU v6 lite", (2, 8, 4)),
        ((16, 16, 1), "TPU v5 lite", (4, 16, 4)),
        ((16, 16, 1), "TPU v5 lite", (1, 64, 4)),
    ],
)
def test_weights_are_shared_along_lines_of_the_torus(spans, kind, sizes):
    devices = torus(*spans, kind=kind)
    grid = sharding.arranged(devices, (*sizes, 1))
    assert grid.shape == (*sizes, 1) and len({device.id for device in grid.flat}) == math.prod(spans)
    assert hops(grid, 1) <= 1.3


def test_slices_hold_replicas_and_each_is_a_torus():
    grid = sharding.arranged(torus(4, 4, 1, kind="TPU v5 lite", slices=2), (4, 8, 1, 1))
    assert [{device.slice_index for device in row.flat} for row in grid] == [{0}, {0}, {1}, {1}]
    assert {device.coords for device in grid[:2].flat} == {(x, y, 0) for x in range(4) for y in range(4)}


def test_what_replicas_leave_of_slices_goes_to_the_weights():
    grid = sharding.arranged(torus(2, 2, 1, kind="TPU v5 lite", slices=4), (2, 8, 1, 1))
    assert [[device.slice_index for device in row.flat] for row in grid] == [[0] * 4 + [1] * 4, [2] * 4 + [3] * 4]


def test_gpus_of_a_host_stay_together():
    """Of three hosts with four GPUs each two replicas can have no host to themselves: each has a part of every host."""
    gpus = [SimpleNamespace(id=i, platform="gpu", process_index=i // 4) for i in range(12)]
    grid = sharding.arranged(gpus, (2, 6, 1, 1))
    assert [[gpu.process_index for gpu in row.flat] for row in grid] == [[0, 0, 1, 1, 2, 2]] * 2
    assert [gpu.id for gpu in sharding.arranged(gpus[:8], (2, 2, 2, 1)).flat] == list(range(8))


def test_parts_of_a_torus_and_cpus_keep_their_order():
    part = torus(4, 4, 1, kind="TPU v5 lite")[:6]
    assert [device.id for device in sharding.arranged(part, (1, 6, 1, 1)).flat] == list(range(6))
    cpus = jax.devices()[:4]
    assert list(sharding.make_mesh(2, 1, 1, cpus, context=2).devices.flat) == cpus


def test_sizes_must_fit_the_devices():
    with pytest.raises(UserError, match="data=1 fsdp=-1 tensor=3 needs a multiple of 3 devices and there are 4"):
        sharding.make_mesh(tensor=3, devices=jax.devices()[:4])
    with pytest.raises(UserError, match="context=8 needs a multiple of 8 devices and there are 4"):
        sharding.make_mesh(context=8, devices=jax.devices()[:4])
