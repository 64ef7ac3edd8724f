"""Batches as a pure function of (seed, step): which pairs a step sees, and the arrays (`batch.py`) that hold them.

Letters of the arrays: M micro-batches, C completions, P pairs, W completions of a ranking.
"""

import dataclasses
import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from dpo_jax.data.batch import Batch
from dpo_jax.data.encode import Encoded
from dpo_jax.data.encoded import firsts, narrowest
from dpo_jax.data.examples import first_completions
from dpo_jax.data.filling import fill, lengths_of, ranges, trees_of
from dpo_jax.data.packing import Lengths, PackingPlan, RowGroups, RowShape, choose_shapes, part, plan

T = TypeVar("T")
SAMPLED_STEPS = 32
"""Steps that are packed for trial when the shapes of a run are chosen."""
PLANNED_STEPS = 64
"""Steps that are planned together."""
CHECKED_STEPS = 10_000
"""Runs of at most this steps are looked through: for shapes that no step has, and for the most micro-batches."""
COMPILE_STEPS = 3
"""Steps that a further shape must save in a run, as it has to be compiled too."""


def _spread(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, value)


@dataclasses.dataclass
class Batches:
    """All steps of a run over one data set.

    Attributes:
      encoded: the data.
      pairs: pairs per step.
      shards: devices that split the batch.
      steps: how many steps there are.
      order: "shuffled" in each epoch; "file", the data's own in each epoch; or "length", every pair once, units of like
        length together, where the last step may hold fewer pairs.
      seed: of the shuffled order.
      attention_length: row length at which attention costs as much per slot as everything else.
      max_shapes: row shapes that the steps may come in.
      share_prompts: lay a prompt out once for all its completions, where they see the same tokens of it.
      micro_tokens: slots of a micro-batch; None chooses.
      reference: log-probability of every scored token (see `Encoded.scored_start`), or None while there is none.
      rankings: whether a pair stands for all ranked completions of its prompt.
      own: numbers of the shards whose arrays are made, ascending; None: all. A process of several makes its own.
    """

    encoded: Encoded
    pairs: int
    shards: int
    steps: int
    order: Literal["shuffled", "file", "length"] = "shuffled"
    seed: int = 0
    share_prompts: bool = True
    micro_tokens: int | None = None
    attention_length: int = 8192
    max_shapes: int = 8
    reference: np.ndarray | None = None
    rankings: bool = False
    own: tuple[int, ...] | None = None
    _orders: dict[int, np.ndarray] = dataclasses.field(default_factory=dict, init=False, repr=False)
    _plans: dict[int, list[PackingPlan]] = dataclasses.field(default_factory=dict, init=False, repr=False)
    # The loop asks for the pairs of a step while a thread makes the batches of later ones.
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock, init=False, repr=False)

    def pairs_of(self, step: int) -> np.ndarray:
        """Numbers of the pairs of a step, int64 [pairs]: the next ones of the endless stream of shuffled epochs."""
        total = len(self.encoded.chosen)
        first, last = step * self.pairs, (step + 1) * self.pairs
        places = np.arange(first, last if self.order != "length" else min(last, total))
        epochs = places // total
        parts = [self._epoch(e)[places[epochs == e] % total] for e in np.unique(epochs).tolist()]
        return np.concatenate(parts, dtype=np.int64)

    def total_before(self, step: int, values: np.ndarray) -> int:
        """What a whole number of each pair [P] comes to over all steps before one; not for the order "length"."""
        epochs, rest = divmod(step * self.pairs, len(self.encoded.chosen))
        return int(epochs * values.sum() + values[self._epoch(epochs)[:rest]].sum())

    def at(self, step: int) -> Batch:
        """The batch of a step, or what `own` has of it.

        It is the same for the same seed, data, and number of shards, whenever it is asked for.
        """
        pairs, planned = self.pairs_of(step), self._plan(step)
        used = int(planned.micro.max(initial=-1)) + 1
        depth = self.depth
        while depth < used:
            depth *= 2
        shards = self.shards
        if self.own is not None:
            shards, planned = len(self.own), part(planned, self.own)
        batch = self._dummy((depth, shards), planned.shape, used)
        noise = self._noise(step)[: len(pairs)]
        trees = trees_of(self.encoded, self._first, planned.bundle, share_prompts=self.share_prompts)
        fill(batch, planned, trees, self.encoded, pairs, noise, reference=self.reference, first=self._first)
        return batch

    def _noise(self, step: int) -> np.ndarray:
        """A number in (0, 1) for each pair of a step, whichever device and micro-batch it will lie in."""
        number = np.random.Generator(np.random.Philox(key=[self.seed, step], counter=[0, 0, 0, 1])).random(self.pairs)
        return np.clip(number, 1e-6, 1 - 1e-6).astype(np.float32)

    def sweep(self) -> "Batches":
        """Batches that hold every pair of the same data once."""
        steps = -(-len(self.encoded.chosen) // self.pairs)
        return dataclasses.replace(self, order="length", steps=steps, max_shapes=2)

    def dummies(self) -> list[Batch]:
        """An empty batch of each shape that the run's steps come in, of all shards, to compile for before training
        begins. It takes no memory, and nothing can be written into it."""
        shapes = self.shapes
        if self.steps <= CHECKED_STEPS:
            used = {self._plan(step).shape for step in range(self.steps)}
            shapes = tuple(shape for shape in shapes if shape in used)
        return [self._dummy((self.depth, self.shards), shape, 0, np.broadcast_to) for shape in shapes]

    @functools.cached_property
    def shapes(self) -> tuple[RowShape, ...]:
        """Shapes that the run's batches come in."""
        lengths, trees = self._lengths, np.diff(self._lengths.first)
        picked = np.unique(np.linspace(0, self.steps - 1, SAMPLED_STEPS).astype(int))
        largest = RowGroups((int(lengths.trees.max()),) * int(trees.max()), int(lengths.scored.max()))
        return choose_shapes(
            lengths,
            self._units(picked.tolist()),
            largest,
            self.shards,
            micro_tokens=self.micro_tokens,
            attention_length=self.attention_length,
            most=self.max_shapes,
            worth=min(max(COMPILE_STEPS / self.steps, 0.005), 0.03),
        )

    @functools.cached_property
    def depth(self) -> int:
        """M of the arrays: the most micro-batches that a step of a short run needs.

        In a long run it is more than any can need, first fit leaving at most half of a row empty.
        """
        if self.steps <= CHECKED_STEPS:
            return max(int(self._plan(step).micro.max(initial=0)) + 1 for step in range(self.steps))
        lengths = self._lengths
        units = [self._units([step])[0] for step in range(0, self.steps, max(1, self.steps // 1000))]
        slots, scored = (max(int(sizes[u].sum()) for u in units) for sizes in (lengths.slots, lengths.scored))
        smallest = min(s.rows * s.length for s in self.shapes)
        return 2 + (2 * slots // smallest + 2 * scored // min(s.scored for s in self.shapes)) // self.shards

    # ------------------------------------------------------------------------------------------ order

    def _epoch(self, epoch: int) -> np.ndarray:
        """Pairs in the order of one epoch: a permutation of units from (seed, epoch) alone, a unit's pairs together."""
        with self._lock:
            if epoch not in self._orders:
                while len(self._orders) > 1:
                    self._orders.pop(next(iter(self._orders)))
                self._orders[epoch] = self._pairs_of_units(self._order_of_units(epoch))
            return self._orders[epoch]

    def _order_of_units(self, epoch: int) -> np.ndarray:
        units = len(self.encoded.prompt_length)
        numbers = np.arange(units, dtype=narrowest(units))
        match self.order:
            case "file":
                return numbers
            case "length":
                return np.argsort(-self._lengths.slots, kind="stable")
            case "shuffled":
                place = numbers.copy()  # of each unit in the order
                np.random.Generator(np.random.Philox(key=[self.seed, epoch])).shuffle(place)
                order = np.empty_like(place)
                order[place] = numbers
                return order

    def _pairs_of_units(self, units: np.ndarray) -> np.ndarray:
        """Numbers of all pairs of these units, in their order."""
        first = self._first_pairs
        if first is None:
            return units
        return ranges(first[units], first[units + 1] - first[units])

    @functools.cached_property
    def _first_pairs(self) -> np.ndarray | None:
        """Number of each unit's first pair, and at the end of how many there are; None: unit u has the pair u alone."""
        first = firsts(self.encoded.pair_unit, self.encoded.num_units)
        return None if np.array_equal(first, np.arange(len(first), dtype=first.dtype)) else first

    def _units(self, steps: Sequence[int]) -> np.ndarray:
        """Units that the pairs of steps belong to, each once, in their order: int64 [S, N], filled up with -1."""
        pairs = [self.pairs_of(step) for step in steps]
        units = np.full((len(pairs), max(map(len, pairs))), -1, np.int64)
        for row, mine in zip(units, pairs, strict=True):
            row[: len(mine)] = self.encoded.pair_unit[mine]
        order = np.argsort(units, axis=1, kind="stable")
        inner = np.take_along_axis(units, order, axis=1)
        again = np.zeros(units.shape, bool)
        np.put_along_axis(again, order[:, 1:], inner[:, 1:] == inner[:, :-1], axis=1)
        kept = ~again & (units >= 0)
        step, place = np.nonzero(kept)
        found = np.full((len(pairs), int(kept.sum(axis=1).max())), -1, np.int64)
        found[step, np.cumsum(kept, axis=1)[step, place] - 1] = units[step, place]
        return found

    # ------------------------------------------------------------------------------------------ layout

    def _plan(self, step: int) -> PackingPlan:
        """Where the trees of a step lie. Successive steps are planned together, which is faster, and the last kept."""
        block, inside = divmod(step, PLANNED_STEPS)
        plans = self._plans.get(block)
        if plans is None or inside >= len(plans):
            steps = range(step - inside, max(step + 1, min(step - inside + PLANNED_STEPS, self.steps)))
            units = self._units(steps)
            plans = plan(self._lengths, units, self.shards, self.shapes, self.attention_length)
            self._plans = {block: plans}
        return plans[inside]

    @functools.cached_property
    def _lengths(self) -> Lengths:
        return lengths_of(self.encoded, self._first, share_prompts=self.share_prompts)

    @functools.cached_property
    def _room(self) -> tuple[int, int]:
        """C and P: completions and pairs that fit the fullest micro-batch of any step."""
        per_unit = int(np.diff(self._first).max())
        return self.pairs * per_unit, self.pairs

    @functools.cached_property
    def width(self) -> int:
        """W: completions of the fullest prompt where these are compared as a ranking, else 0."""
        return int(np.diff(self._first).max()) if self.rankings else 0

    def completions_of(self, unit: int) -> range:
        """Numbers of a unit's completions."""
        return range(int(self._first[unit]), int(self._first[unit + 1]))

    @functools.cached_property
    def _first(self) -> np.ndarray:
        return first_completions(self.encoded)

    def _dummy(
        self, lead: tuple[int, int], shape: RowShape, used: int, spread: Callable[..., np.ndarray] = _spread
    ) -> Batch:
        """An empty batch of `lead` micro-batches and shards; `spread` makes an array of a value and a shape."""
        completions, pairs = self._room

        def filled(*shape: int, value: int | float = 0, dtype: DTypeLike = np.int32) -> np.ndarray:
            return spread(np.asarray(value, dtype), lead + shape)

        slots = [filled(shape.rows, shape.length) for _ in range(4)]
        return Batch(
            *slots,
            source=filled(shape.scored),
            target=filled(shape.scored),
            completion=filled(shape.scored, value=completions),
            chosen=filled(pairs),
            rejected=filled(pairs),
            weight=filled(pairs, dtype=np.float32),
            margin=filled(pairs, dtype=np.float32),
            label=filled(pairs, dtype=np.float32),
            real=filled(pairs, value=False, dtype=bool),
            noise=filled(pairs, value=0.5, dtype=np.float32),
            ranked=filled(pairs, self.width),
            rank=filled(pairs, self.width, value=-1),
            reference=filled(shape.scored, dtype=np.float32),
            lengths=filled(completions, dtype=np.float32),
            last=filled(completions),
            ids=filled(completions, value=-1),
            prompts=filled(completions, value=-1),
            micro_batches=np.int32(used),
        )


def pair_tokens(encoded: Encoded) -> np.ndarray:
    """Tokens of each pair, int64 [P], as TRL counts them: the prompt once for each completion."""
    prompts = np.maximum(encoded.prompt_length[encoded.completion_unit] - encoded.completion_skip, 1)
    whole = (prompts + encoded.completion_length).astype(np.int64)
    return whole[encoded.chosen] + np.where(encoded.single, 0, whole[encoded.rejected])


class Made(NamedTuple, Generic[T]):
    """What was made for a step, and for how many seconds it had to be waited for."""

    step: int
    value: T
    waited: float


def prefetch(
    make: Callable[[int], T], steps: range, depth: int = 2, *, clock: Callable[[], float] = time.perf_counter
) -> Iterator[Made[T]]:
    """`make(step)` for each step, made by a thread that stays up to `depth` steps ahead.

    `waited` is exactly 0 where the value was there already. What `make` raises is raised here, at its step. Leaving the
    loop early ends the thread.
    """
    made: queue.Queue[tuple[int, T] | BaseException] = queue.Queue(depth)
    left = threading.Event()

    def work() -> None:
        for step in steps:
            try:
                item: tuple[int, T] | BaseException = (step, make(step))
            except BaseException as error:  # handed over, whatever it is
                item = error
            while not left.is_set():
                try:
                    made.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if left.is_set() or isinstance(item, BaseException):
                return

    threading.Thread(target=work, name="batches", daemon=True).start()
    try:
        for _ in steps:
            item, waited = _taken(made, clock)
            if isinstance(item, BaseException):
                raise item
            yield Made(*item, waited)
    finally:
        left.set()


def _taken(made: queue.Queue[T], clock: Callable[[], float]) -> tuple[T, float]:
    """The next thing of a queue, and how long the queue was empty."""
    try:
        return made.get_nowait(), 0.0
    except queue.Empty:
        began = clock()
        return made.get(), clock() - began
