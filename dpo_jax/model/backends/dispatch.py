"""One way to attend within packed rows, whichever backend computes it and however rows and heads are shared out.

A backend is a module of this folder with three functions. `prepare(layout, window, bounds)` makes what is the same for
every layer: arrays with the rows on their first axis. `attend(query, key, value, prepared, window, rules)` computes.
`keeps_scores(prepared)` says whether its gradient would keep much more of these rows than what goes in and comes out.
What comes out, and whatever else its gradient wants of the forward pass, a backend gives the name `context` (see
`model.remat`), once: policies keep that, and then nothing of the forward pass is computed again.

Letters: B rows, T slots, H heads, K key-value heads, C channels of a key, E channels of a value.
"""

import dataclasses
import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from dpo_jax.model.attention import Bounds, Layout, VisibilityRules
from dpo_jax.model.placement import by_heads, by_slots, head_axes, repeated, row_axes, settled, slot_axes
from dpo_jax.trees import Tree


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Packed rows, ready to be attended within. `prepared` is by window."""

    backend: str
    prepared: Mapping[int | None, Tree]
    activations: NamedSharding | None
    remat: bool

    @classmethod
    def of(
        cls,
        layout: Layout,
        windows: Iterable[int | None],
        backend: str = "xla",
        *,
        bounds: Bounds | None = None,
        activations: NamedSharding | None = None,
        remat: bool = False,
    ) -> "PackedRows":
        """These rows for layers with these windows; with `remat` the backward pass computes scores again.

        `bounds` are wanted by backends that lay texts out again; xla takes its tiles from them.

        `activations` says how rows are split: each device then attends within its own, whole, and with its own heads
        (see `placement.head_axes`).
        """
        made = {window: _module(backend).prepare(layout, window, bounds) for window in windows}
        return cls(backend, made, activations, remat)

    def attend(
        self,
        query: Float[Array, "B T H C"],
        key: Float[Array, "B T K C"],
        value: Float[Array, "B T K E"],
        window: int | None,
        rules: VisibilityRules,
    ) -> Float[Array, "B T H E"]:
        """`softmax(scale query . key)` over what each slot sees of its own tree, times the values."""
        module = _module(self.backend)

        def mix(query, key, value, prepared, sinks, slopes):
            return module.attend(query, key, value, prepared, window, rules._replace(sinks=sinks, slopes=slopes))

        if self.remat and module.keeps_scores(self.prepared[window]):
            mix = jax.checkpoint(mix)
        attend = _per_device(mix, query.shape, key.shape[2], self.activations)
        query, key, value = (by_slots(self.activations, x) for x in (query, key, value))
        mixed = attend(query, key, value, self.prepared[window], rules.sinks, rules.slopes)
        return by_slots(self.activations, mixed)


def attend(
    query: Float[Array, "B T H C"],
    key: Float[Array, "B T K C"],
    value: Float[Array, "B T K E"],
    layout: Layout,
    rules: VisibilityRules,
    *,
    window: int | None = None,
    backend: str = "xla",
    bounds: Bounds | None = None,
) -> Float[Array, "B T H E"]:
    """Attention within the trees of each row, for a single layer."""
    return PackedRows.of(layout, [window], backend, bounds=bounds).attend(query, key, value, window, rules)


def _module(backend: str) -> ModuleType:
    return importlib.import_module(f"dpo_jax.model.backends.{backend}")


def _per_device(
    function: Callable, shape: tuple[int, ...], kv_heads: int, activations: NamedSharding | None
) -> Callable:
    """The function on each device's own rows and heads, or on all of them where these cannot be split.

    Loops whose length depends on the data, and kernels, are nothing that the compiler could split by itself.
    """
    if activations is None or activations.mesh.size == 1:
        return function
    mesh, rows = activations.mesh, row_axes(activations)
    if shape[0] % math.prod(mesh.shape[axis] for axis in rows):
        activations, rows = NamedSharding(mesh, P()), ()
    heads = head_axes(activations, shape[2], kv_heads)
    whole_rows, by_head = by_heads(activations, heads.axes), P(heads.axes or None)
    on_device = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(whole_rows, whole_rows, whole_rows, P(rows or None), by_head, by_head),
        out_specs=whole_rows,
        check_vma=False,
    )
    held = NamedSharding(mesh, whole_rows) if slot_axes(activations) else None

    def with_own_heads(query, key, value, *rest):
        # What the backward pass keeps is then split like this too, and is not exchanged again.
        key, value = (repeated(x, heads.repeats) for x in (key, value))
        return on_device(*(settled(x, held) for x in (query, key, value)), *rest)

    return with_own_heads
