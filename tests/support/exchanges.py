"""Exchanges between devices, read from the text of a compiled program."""

import math
import re

import numpy as np

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def collectives(text: str) -> list[tuple[str, int]]:
    """Kind and size, in elements, of each collective of a compiled program."""
    found = re.findall(rf"= \(?\w+\[([\d,]*)\]\S* ({KINDS})(?:-start)?\(", text)
    return [(kind, math.prod(int(size) for size in dims.split(",") if size)) for dims, kind in found]


def hops(grid: np.ndarray, axis: int) -> float:
    """Mean links between neighbours of an axis, whose last is its first's neighbour; devices are on a torus."""
    places = np.asarray(
        [[device.coords for device in line] for line in np.moveaxis(grid, axis, -1).reshape(-1, grid.shape[axis])]
    )
    spans = places.reshape(-1, 3).max(axis=0) + 1
    apart = np.abs(places - np.roll(places, 1, axis=1))
    return float(np.minimum(apart, spans - apart).sum(axis=-1).mean())
