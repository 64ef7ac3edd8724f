"""The mesh, one table of partition rules, and placing arrays by them.

Axes of the mesh: `data` replicates the weights, `fsdp` shares one copy of them, `expert` shares the experts of a
mixture, `tensor` each matrix product, `context` each row. A batch is split over `data`, `fsdp` and `expert` together,
and one copy of the weights is shared by `fsdp`, `expert` and `context` together.
"""

import collections
import math
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax import trees
from dpo_jax.errors import UserError
from dpo_jax.logprobs.fused import HeadSplit, dividing
from dpo_jax.processes.here import here
from dpo_jax.trees import Params, Tree

B = TypeVar("B")
Signature = tuple[Hashable, tuple[tuple[tuple[int, ...], np.dtype], ...]]
"""Of a function's arguments: their structure, and shape and dtype of each leaf."""

AXES = ("data", "fsdp", "expert", "tensor", "context")
BATCH = ("data", "fsdp", "expert")
SLOTS = ("context", "tensor")
"""Between layers, of the slots of a row (see `model.placement`)."""
SHARED = ("fsdp", "expert", "context")
"""Of the weights, but for those of experts, which `expert` splits by expert."""
OF_EXPERT = ("fsdp", "context")

_IN, _OUT = P(None, SHARED, "tensor"), P(None, "tensor", SHARED)
"""Of a stack's matrices: those whose outputs are shared out, and those whose inputs are."""

RULES: tuple[tuple[str, P], ...] = (
    (r"(embed|head)/embedding", P("tensor", SHARED)),
    (r"(positions|inputs)/embedding", P(None, SHARED)),
    (r"head/bias", P("tensor")),
    (r"score/kernel", P(SHARED, None)),
    (r"(project_in|inputs_projection)/kernel", P(SHARED, "tensor")),
    (r"project_out/kernel", P("tensor", SHARED)),
    (r"blocks/\d+/attention/(query|key|value|gate|key_value)/kernel", _IN),
    (r"blocks/\d+/attention/(query|key|value|gate)/bias", P(None, "tensor")),
    (r"blocks/\d+/attention/(query_down|latent)/kernel", P(None, SHARED, None)),
    (r"blocks/\d+/attention/(query_down|latent)/bias", P()),
    (r"blocks/\d+/attention/sinks", P()),
    (r"blocks/\d+/delta/(mixed|gate|strength|decay)/kernel", _IN),
    (r"blocks/\d+/delta/conv/kernel", P(None, "tensor", None)),
    (r"blocks/\d+/delta/(decay_rate|decay_bias)", P()),
    (r"blocks/\d+/(attention|delta)/output/kernel", _OUT),
    (r"blocks/\d+/(mlp|experts/shared)/(gate|up)/kernel", _IN),
    (r"blocks/\d+/(mlp|experts/shared)/down/kernel", _OUT),
    (r"blocks/\d+/mlp/(gate|up)/bias", P(None, "tensor")),
    (r"blocks/\d+/(attention/output|mlp/down)/bias", P()),
    (r"blocks/\d+/mlp/act/(positive|negative|beta|eps)", P()),
    (r"blocks/\d+/experts/(gate|up)/kernel", P(None, "expert", OF_EXPERT, "tensor")),
    (r"blocks/\d+/experts/down/kernel", P(None, "expert", "tensor", OF_EXPERT)),
    (r"blocks/\d+/experts/(gate|up)/bias", P(None, "expert", "tensor")),
    (r"blocks/\d+/experts/down/bias", P(None, "expert")),
    (r"blocks/\d+/experts/(router|shared_gate)/kernel", P(None, SHARED, None)),
    (r"blocks/\d+/experts/router/(bias|correction|channel_scale|expert_scale)", P()),
    (r"blocks/\d+/inputs_gate/kernel", P(None, SHARED, None)),
    (r"blocks/\d+/inputs_projection/kernel", P(None, None, SHARED)),
    (r"blocks/\d+/scalar", P()),
    (r"(blocks/\d+/.*|final_|embed_|inputs_)norm/(scale|bias)", P()),
)
"""How each leaf of the parameters is split. A leaf that no rule claims is an error."""
BESIDE = re.compile(r"(?P<module>.*)/(lora/(?P<lora>\w+)|kernel/(?P<codes>\w+))")
"""Leaves that are split as a kernel is: the factors of its adapter, or what it is quantised to."""


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
    *,
    expert: int = 1,
    context: int = 1,
) -> Mesh:
    """A mesh over all devices; one of the sizes may be -1 and takes what the others leave.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, expert, tensor, context]
    said = " ".join(
        f"{axis}={size}"
        for axis, size in zip(AXES, sizes, strict=True)
        if axis not in ("expert", "context") or size != 1
    )
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh: {said}: give positive sizes, and -1 for one at most")
    rest = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // rest if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh: {said} needs a multiple of {rest} devices and there are "
            f"{len(devices)}; choose sizes whose product is {len(devices)}"
        )
    return Mesh(arranged(devices, sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arranged(devices: Sequence[Any], sizes: Sequence[int]) -> np.ndarray:
    """The devices as an array of these sizes, in which neighbours of an axis are near each other.

    Axes that talk least are the first ones, and these go over slices of TPUs, or hosts of GPUs, as far as sizes divide;
    within a slice each axis runs along the lines of its torus. Devices of a CPU, and TPUs that are no whole box, keep
    their order. An axis over several lines of a torus goes through them in their order, and not to and fro: so XLA uses
    the links of all three directions at once, and with neighbours side by side it uses those of one.
    """
    parts = collections.defaultdict(list)
    for device in devices:
        parts[_island(device)].append(device)
    islands = [parts[island] for island in sorted(parts)]
    if len({len(island) for island in islands}) > 1:
        return np.asarray(devices).reshape(sizes)
    outer, inner, left = [], [], len(islands)
    for size in sizes:
        outer.append(math.gcd(size, left))
        inner.append(size // outer[-1])
        left //= outer[-1]
    grid = np.empty(outer, dtype=object)
    for place, island in zip(np.ndindex(*outer), islands, strict=True):
        grid[place] = _in_torus(island, inner)
    return np.block(grid.tolist())


def _island(device: Any) -> int:
    """Which devices have fast links between all of them: those of a slice of TPUs, or of a host with GPUs."""
    match device.platform:
        case "tpu":
            return getattr(device, "slice_index", 0)
        case "gpu":
            return device.process_index
    return 0


def _in_torus(devices: Sequence[Any], sizes: Sequence[int]) -> np.ndarray:
    """The devices of a slice with each axis along lines of its torus; others, and parts of a slice, in their order."""
    places = {(*device.coords, device.core_on_chip) for device in devices if device.platform == "tpu"}
    spans = [len(set(line)) for line in zip(*places, strict=True)]
    if not places or math.prod(spans) != len(devices):
        return np.asarray(devices).reshape(sizes)
    return mesh_utils.create_device_mesh(sizes, devices=devices, allow_split_physical_axes=True)


def platform(mesh: Mesh) -> str:
    """Of the mesh's devices: cpu, gpu or tpu."""
    return mesh.devices.flat[0].platform


def gathered_over(path: str) -> tuple[str, ...]:
    """The axes over which a layer brings a leaf together before it multiplies with it."""
    return OF_EXPERT if re.search(r"/experts/(gate|up|down)/", path) else SHARED


def batch_shards(mesh: Mesh) -> int:
    """Parts that a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def own_shards(mesh: Mesh) -> tuple[int, ...] | None:
    """Numbers of the parts of a batch that this process's devices have; None if there is no other process."""
    if jax.process_count() == 1:
        return None
    places = NamedSharding(mesh, P(BATCH)).addressable_devices_indices_map((batch_shards(mesh),))
    return tuple(sorted({index[0].start or 0 for index in places.values() if index is not None}))


def token_shards(mesh: Mesh) -> int:
    """Parts that the slots of a batch are split into, tensor left aside."""
    return batch_shards(mesh) * mesh.shape["context"]


def weight_shards(mesh: Mesh) -> int:
    """Parts that one copy of the weights is split into, tensor left aside."""
    return math.prod(mesh.shape[axis] for axis in SHARED)


def param_shardings(params: Params, mesh: Mesh) -> Params:
    """A sharding for each leaf of a tree of parameters (arrays or shapes)."""
    table = trees.paths(params)
    return trees.from_paths(
        {path: _fitted(leaf.shape, _rule(path, len(leaf.shape)), mesh) for path, leaf in table.items()}
    )


def _rule(path: str, ndim: int) -> P:
    """How a leaf is split: by its own rule, or, of what belongs to a kernel, by the kernel's."""
    inner = BESIDE.fullmatch(path)
    if inner is None:
        return trees.match(path, RULES, table="sharding")
    rule = tuple(trees.match(f"{inner['module']}/kernel", RULES, table="sharding"))
    *lead, into, out = (*rule, *(None,) * (2 - len(rule)))
    match inner["lora"] or inner["codes"]:
        case "a":
            return P(*lead, *(None,) * (ndim - len(lead) - 2), into, None)
        case "b":
            return P(*lead, *(None,) * (ndim - len(lead) - 2), None, out)
        case "magnitude":
            return P(*lead, out)
        case "nf4" | "fp4" | "int8" | "absmax" if ndim == len(rule):
            return P(*lead, out, into)
    return P(*lead[:ndim])


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on each device."""
    return NamedSharding(mesh, P())


def rows(mesh: Mesh) -> NamedSharding:
    """Leading axis split like the batch."""
    return NamedSharding(mesh, P(BATCH))


def activations(mesh: Mesh) -> NamedSharding:
    """Activations [B, T, D] between layers: rows split like the batch, slots over `SLOTS`."""
    slots = tuple(axis for axis in SLOTS if mesh.shape[axis] > 1)
    return NamedSharding(mesh, P(BATCH, slots) if slots else P(BATCH))


def head_split(mesh: Mesh) -> HeadSplit | None:
    """How scored tokens and the rows of a head are split, as `RULES` say it; None on one device."""
    tokens = (*BATCH, *(axis for axis in SHARED if axis not in BATCH and mesh.shape[axis] > 1))
    return None if mesh.size == 1 else HeadSplit(mesh, tokens, "tensor", SHARED)


def batch_shardings(batch: B, mesh: Mesh) -> B:
    """Shardings of a packed batch: arrays [M, D, ...] split over D, scalars on each device."""
    split = NamedSharding(mesh, P(None, BATCH))
    return jax.tree.map(lambda leaf: split if np.ndim(leaf) else replicated(mesh), batch)


def place(batch: B, mesh: Mesh) -> B:
    """A batch of host arrays on its devices. Each process holds what its `own_shards` have of it."""
    own = own_shards(mesh) or range(batch_shards(mesh))

    def put(leaf, sharding):
        leaf = np.asarray(leaf)
        if not leaf.ndim:
            return jax.make_array_from_callback((), sharding, lambda _: leaf)
        each = leaf.shape[1] // len(own)  # of a shard

        def of_device(index):
            at = each * own.index((index[1].start or 0) // each)
            return leaf[:, at : at + each]

        return jax.make_array_from_callback(
            (leaf.shape[0], each * batch_shards(mesh), *leaf.shape[2:]), sharding, of_device
        )

    return jax.tree.map(put, batch, batch_shardings(batch, mesh))


def on_host(array: jax.Array) -> np.ndarray:
    """All of an array, also of one whose parts lie with several processes; every one of them calls."""
    return np.asarray(array if _is_here(array) else multihost_utils.process_allgather(array, tiled=True))


def fetched(tree: Tree) -> Tree:
    """All arrays of a tree on the host (`on_host`); those of one process in one go."""
    alone = all(map(_is_here, jax.tree.leaves(tree)))
    return jax.device_get(tree) if alone else jax.tree.map(on_host, tree)


def _is_here(array: jax.Array | np.ndarray) -> bool:
    """Whether this process holds all of an array."""
    return not isinstance(array, jax.Array) or array.is_fully_addressable


OPTIONS: dict[str, dict[str, bool]] = {"gpu": {"xla_gpu_enable_latency_hiding_scheduler": True}}
"""What XLA is told where several devices of a platform share a step. It hides exchanges behind products by itself from
Hopper on; on an A100, or a card below, all of them were waited for: of an 8B step on 8 L4 they were 45 %."""


def compiler_options(mesh: Mesh) -> dict[str, bool] | None:
    """Options for what is compiled for this mesh."""
    return OPTIONS.get(platform(mesh)) if mesh.size > 1 else None


class Compiled:
    """A jitted function that is compiled ahead for the shapes it will meet, and counts what it compiles later.

    Attributes:
      recompilations: compilations since `prepare` was last called; 0 is what a run wants.
    """

    def __init__(self, function: Callable, mesh: Mesh, *, out_shardings: Tree = None, donate: tuple[int, ...] = ()):
        """Wrap `function(*args)` for the devices of a mesh; the arguments at `donate` are consumed by each call."""
        options = compiler_options(mesh)
        self._jitted = jax.jit(function, out_shardings=out_shardings, donate_argnums=donate, compiler_options=options)
        self._ready: dict[Signature, jax.stages.Compiled] = {}
        self.recompilations = 0

    def prepare(self, signatures: Sequence[tuple], *, workers: int = 1) -> Iterator[int]:
        """Compile for arguments of each signature: their shapes, dtypes and shardings (arrays or jax.ShapeDtypeStruct).

        So many are compiled at a time, each in a thread, while the next ones are lowered in this one. Yields how many
        are done as they are; it is this that has them made. What XLA raises is raised here, and the others are dropped.
        """
        pool = ThreadPoolExecutor(workers)
        try:
            made = {pool.submit(self.lower(*args).compile): _signature(args) for args in signatures}
            for done, future in enumerate(as_completed(made), 1):
                self._ready[made[future]] = future.result()
                yield done
        finally:
            pool.shutdown(cancel_futures=True)
        self.recompilations = 0

    def lower(self, *args: Tree) -> jax.stages.Lowered:
        """The function for such arguments, lowered but not compiled, and not kept."""
        return self._jitted.lower(*args)

    def __call__(self, *args: Tree) -> Tree:
        """The function's result."""
        here().moved()
        key = _signature(args)
        if key not in self._ready:
            self._ready[key] = self.lower(*args).compile()
            self.recompilations += 1
        return self._ready[key](*args)


def _signature(args: Tree) -> Signature:
    leaves, structure = jax.tree.flatten(args)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def shape_of(tree: Tree, shardings: Tree) -> Tree:
    """Shapes and dtypes of a tree, on the given shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding), tree, shardings
    )


def _fitted(shape: tuple[int, ...], spec: P, mesh: Mesh) -> NamedSharding:
    """The rule on this mesh; of each dimension's axes those from the first on that divide it are kept."""
    axes = tuple(spec) + (None,) * (len(shape) - len(tuple(spec)))
    return NamedSharding(mesh, P(*(_kept(axis, size, mesh) for axis, size in zip(axes, shape, strict=True))))


def _kept(axes: str | tuple[str, ...] | None, size: int, mesh: Mesh) -> str | tuple[str, ...] | None:
    """Those axes of a dimension that are kept; one by itself is no tuple."""
    kept = dividing(mesh, (axes,) if isinstance(axes, str) else axes or (), size)
    kept = tuple(axis for axis in kept if axis == kept[0] or mesh.shape[axis] > 1)
    return kept if len(kept) > 1 else kept[0] if kept else None
