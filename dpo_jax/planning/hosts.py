"""Bytes that each host reads, holds and writes of a run, from shapes and shardings."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from dpo_jax import trees
from dpo_jax.trees import Tree


class HostShare(NamedTuple):
    """Bytes of the host that has most of them, and an equal part of all, each counted once."""

    most: int
    share: float

    @classmethod
    def of(cls, by_host: Sequence[int], whole: int) -> "HostShare":
        """From the bytes of each host, and of what they share."""
        return cls(max(by_host), whole / len(by_host))


def host_of(mesh: jax.sharding.Mesh, hosts: int) -> dict[int, int]:
    """The host of each device of a mesh, by its id: host after host in the mesh's order, as exchanges count them."""
    per_host = mesh.size // hosts
    return {device.id: place // per_host for place, device in enumerate(mesh.devices.flat)}


def size_of(tree: Tree) -> int:
    """Bytes of a tree's leaves, each once."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bytes_of(tree: Tree, shardings: Tree, host_of: Mapping[int, int], *, once: bool = False) -> list[int]:
    """Bytes of a tree's leaves on each host, a part that several of its devices have counted once.

    With `once` a part that several hosts have is counted on the first of them alone: as a checkpoint is written.
    """
    found = [0] * (max(host_of.values()) + 1)
    places = trees.paths(shardings)
    for path, leaf in trees.paths(tree).items():
        seen: set[tuple[int, tuple]] = set()
        for device, index in places[path].devices_indices_map(leaf.shape).items():
            part = tuple(axis.indices(size)[:2] for axis, size in zip(index, leaf.shape, strict=True))
            key = (0 if once else host_of[device.id], part)
            if key not in seen:
                seen.add(key)
                found[host_of[device.id]] += int(np.prod([stop - start for start, stop in part])) * leaf.dtype.itemsize
    return found
