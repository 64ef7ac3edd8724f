"""Batches as a pure function of (seed, step): which pairs a step sees, and the arrays that hold them.

Letters of the arrays: M micro-batches, D shards (devices that split the batch), R rows, T slots of a row, K scored
tokens, C completions and P pairs that a shard's micro-batch may hold, W completions of a ranking (0 where none is
compared as one).
"""

import dataclasses
import functools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from dpo_jax.data.encode import Encoded
from dpo_jax.data.entries import first_completions
from dpo_jax.data.packing import Bundle, Shape, balance, cheapest, choose_shapes, pack

SAMPLED_STEPS = 32
"""Steps that are packed for trial when the shapes of a run are chosen."""
CHECKED_STEPS = 512
"""Runs of at most so many steps are looked through for shapes that no step has."""


class Batch(NamedTuple):
    """One step's pairs as packed forests; every array but the last is split over D, and M is walked in turn.

    Padding: group 0; completion C (one past the end); ids -1; `real` false.
    """

    tokens: Any  # int32 [M, D, R, T]
    group: Any  # int32 [M, D, R, T]  tree of each slot, from 1 in each row
    branch: Any  # int32 [M, D, R, T]  0 prompt, then 1, 2, ... by completion
    position: Any  # int32 [M, D, R, T]  place in the text
    source: Any  # int32 [M, D, K]  slot (row * T + column) whose hidden state predicts
    target: Any  # int32 [M, D, K]  the token predicted
    completion: Any  # int32 [M, D, K]  which of the shard's completions it belongs to
    chosen: Any  # int32 [M, D, P]  completion preferred (the paper's yw_idxs)
    rejected: Any  # int32 [M, D, P]  completion not preferred (yl_idxs)
    weight: Any  # float32 [M, D, P]
    margin: Any  # float32 [M, D, P]  nats
    label: Any  # float32 [M, D, P]  chance that chosen is the better one
    real: Any  # bool [M, D, P]
    noise: Any  # float32 [M, D, P]  uniform in (0, 1), from (seed, step) and the pair's place in its step
    ranked: Any  # int32 [M, D, P, W]  completions of the pair's prompt
    rank: Any  # int32 [M, D, P, W]  their ranks, 0 is best, -1 for none
    reference: Any  # float32 [M, D, K]  reference log-probability of each scored token, nats
    lengths: Any  # float32 [M, D, C]  scored tokens of each completion
    last: Any  # int32 [M, D, C]  slot of each completion's last token
    ids: Any  # int32 [M, D, C]  number of each completion in the data set, -1 for none
    micro_batches: Any  # int32 scalar: how many of the M are in use


@dataclasses.dataclass(frozen=True)
class Trees:
    """How one unit of data is laid out: for each tree, start and length of its prompt, and its completions."""

    prompts: tuple[tuple[int, int], ...]
    completions: tuple[tuple[int, ...], ...]


@dataclasses.dataclass
class Batches:
    """All steps of a run over one data set.

    Attributes:
      encoded: the data.
      pairs: pairs per step.
      shards: devices that split the batch.
      steps: how many steps there are.
      order: "shuffled" anew in each epoch; "file", the data's own in each epoch; or "length", every pair once, units of
        like length together, where the last step may hold fewer pairs.
      seed: of the shuffled order.
      attention_length: row length at which attention costs as much per slot as everything else.
      max_shapes: row shapes that the steps may come in.
      share_prompts: lay a prompt out once for all its completions, where they see the same tokens of it.
      micro_tokens: slots of a micro-batch; None chooses.
      reference: log-probability of every scored token (see `Encoded.scored_start`), or None while there is none.
      rankings: whether a pair stands for all ranked completions of its prompt.
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
    max_shapes: int = 4
    reference: np.ndarray | None = None
    rankings: bool = False
    _orders: dict[int, np.ndarray] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def pairs_of(self, step: int) -> np.ndarray:
        """Numbers of the pairs of a step, int64 [pairs]: the next ones of the endless stream of shuffled epochs."""
        total = len(self.encoded.chosen)
        first, last = step * self.pairs, (step + 1) * self.pairs
        places = np.arange(first, last if self.order != "length" else min(last, total))
        epochs = places // total
        return np.concatenate([self._epoch(e)[places[epochs == e] % total] for e in np.unique(epochs).tolist()])

    def at(self, step: int) -> Batch:
        """The batch of a step; the same for the same seed, data, and number of shards, whenever it is asked for."""
        return self._assemble(self.pairs_of(step), self._noise(step))

    def _noise(self, step: int) -> np.ndarray:
        """A number in (0, 1) for each pair of a step, whichever device and micro-batch it will lie in."""
        number = np.random.Generator(np.random.Philox(key=[self.seed, step], counter=[0, 0, 0, 1])).random(self.pairs)
        return np.clip(number, 1e-6, 1 - 1e-6).astype(np.float32)

    def sweep(self) -> "Batches":
        """Batches that hold every pair of the same data once."""
        steps = -(-len(self.encoded.chosen) // self.pairs)
        return dataclasses.replace(self, order="length", steps=steps, max_shapes=2)

    def blanks(self) -> list[Batch]:
        """An empty batch of each shape that the run's steps come in, to compile for before training begins."""
        shapes = self.shapes
        if self.steps <= CHECKED_STEPS:
            used = {self._shape(self._units(self.pairs_of(step))) for step in range(self.steps)}
            shapes = tuple(shape for shape in shapes if shape in used)
        return [self._blank(self.depth, shape, 0) for shape in shapes]

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Shapes that the run's batches come in."""
        picked = np.unique(np.linspace(0, self.steps - 1, SAMPLED_STEPS).astype(int))
        samples = [[self._bundles[u] for u in self._units(self.pairs_of(int(s)))] for s in picked]
        most = max(len(b.trees) for b in self._bundles)
        longest = max(max(b.trees) for b in self._bundles)
        largest = Bundle((longest,) * most, max(b.scored for b in self._bundles))
        return choose_shapes(
            samples,
            largest,
            self.shards,
            micro_tokens=self.micro_tokens,
            attention_length=self.attention_length,
            most=self.max_shapes,
        )

    @functools.cached_property
    def depth(self) -> int:
        """M of the arrays: more micro-batches than any step can need, first fit leaving at most half of a row empty."""
        slots = max(sum(sum(self._bundles[u].trees) for u in self._units(self.pairs_of(s))) for s in self._some_steps())
        scored = max(sum(self._bundles[u].scored for u in self._units(self.pairs_of(s))) for s in self._some_steps())
        smallest = min(s.rows * s.length for s in self.shapes)
        return 2 + (2 * slots // smallest + 2 * scored // min(s.scored for s in self.shapes)) // self.shards

    # ------------------------------------------------------------------------------------------ order

    def _epoch(self, epoch: int) -> np.ndarray:
        """Pairs in the order of one epoch: a permutation of units from (seed, epoch) alone, a unit's pairs together."""
        if epoch not in self._orders:
            while len(self._orders) > 1:
                self._orders.pop(next(iter(self._orders)))
            self._orders[epoch] = np.argsort(self._rank(epoch)[self.encoded.pair_unit], kind="stable")
        return self._orders[epoch]

    def _rank(self, epoch: int) -> np.ndarray:
        """Place of each unit in the order."""
        units = len(self.encoded.prompt_length)
        match self.order:
            case "file":
                return np.arange(units)
            case "length":
                return np.asarray([-sum(bundle.trees) for bundle in self._bundles])
            case "shuffled":
                return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(units)

    def _some_steps(self) -> range:
        return range(0, self.steps, max(1, self.steps // 1000))

    def _units(self, pairs: np.ndarray) -> list[int]:
        """Units that the pairs belong to, each once, in their order."""
        return list(dict.fromkeys(self.encoded.pair_unit[pairs].tolist()))

    def _shape(self, units: Sequence[int]) -> Shape:
        return self._cheapest([self._bundles[u] for u in units])

    def _cheapest(self, bundles: Sequence[Bundle]) -> Shape:
        return cheapest(bundles, self.shards, self.shapes, self.attention_length)

    # ------------------------------------------------------------------------------------------ layout

    @functools.cached_property
    def _trees(self) -> list[Trees]:
        """Trees of each unit."""
        return [self._unit_trees(self.completions_of(unit)) for unit in range(self.encoded.num_units)]

    def _unit_trees(self, completions: Sequence[int]) -> Trees:
        prompts = tuple(self.encoded.prompt_span(completion) for completion in completions)
        if self.share_prompts and len(set(prompts)) == 1:
            return Trees(prompts[:1], (tuple(completions),))
        return Trees(prompts, tuple((completion,) for completion in completions))

    @functools.cached_property
    def _bundles(self) -> list[Bundle]:
        """Lengths of each unit's trees."""
        lengths = self.encoded.completion_length
        return [
            Bundle(
                tuple(
                    int(prompt[1] + lengths[list(completions)].sum())
                    for prompt, completions in zip(trees.prompts, trees.completions, strict=True)
                ),
                int(sum(lengths[c] for completions in trees.completions for c in completions)),
            )
            for trees in self._trees
        ]

    def _assemble(self, pairs: np.ndarray, noise: np.ndarray) -> Batch:
        """Arrays of the given pairs, with a number of noise for each."""
        units = self._units(pairs)
        bundles = [self._bundles[u] for u in units]
        shape = self._cheapest(bundles)
        parts = [pack(bundles, part, shape) for part in balance(bundles, self.shards)]
        used = max((place.micro for part in parts for place in part), default=-1) + 1
        depth = self.depth
        while depth < used:
            depth *= 2
        batch = self._blank(depth, shape, used)
        by_unit: dict[int, list[tuple[int, float]]] = {}
        for pair, number in zip(pairs.tolist(), noise.tolist(), strict=False):
            by_unit.setdefault(int(self.encoded.pair_unit[pair]), []).append((pair, number))
        for shard, places in enumerate(parts):
            _Filler(self, batch, shard).fill(places, units, by_unit)
        return batch

    @functools.cached_property
    def _room(self) -> tuple[int, int]:
        """C and P: completions and pairs that fit the fullest micro-batch of any step."""
        per_unit = max(sum(len(c) for c in trees.completions) for trees in self._trees)
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

    def _blank(self, depth: int, shape: Shape, used: int) -> Batch:
        completions, pairs = self._room
        lead = (depth, self.shards)

        def filled(*shape: int, value: Any = 0, dtype: Any = np.int32) -> np.ndarray:
            return np.full(lead + shape, value, dtype)

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
            micro_batches=np.int32(used),
        )


class _Filler:
    """Writes one shard's trees and pairs into a blank batch."""

    def __init__(self, batches: Batches, batch: Batch, shard: int):
        self.batches, self.encoded, self.batch, self.shard = batches, batches.encoded, batch, shard
        depth = batch.tokens.shape[0]
        self.scored = [0] * depth
        self.local: list[dict[int, int]] = [{} for _ in range(depth)]
        self.pairs = [0] * depth
        self.groups: dict[tuple[int, int], int] = {}

    def fill(self, places, units: Sequence[int], by_unit: dict[int, list[tuple[int, float]]]) -> None:
        """Write all trees, then the pairs, whose completions then have numbers."""
        for place in places:
            self._tree(units[place.bundle], place)
        for bundle, micro in dict.fromkeys((place.bundle, place.micro) for place in places):
            for pair, noise in by_unit[units[bundle]]:
                self._pair(pair, noise, micro)

    def _tree(self, unit: int, place) -> None:
        trees, data = self.batches._trees[unit], self.encoded
        prompt = trees.prompts[place.tree]
        group = self.groups[place.micro, place.row] = self.groups.get((place.micro, place.row), 0) + 1
        self._slots(place, place.start, prompt, group, 0, 0)
        start = place.start + prompt[1]
        for branch, completion in enumerate(trees.completions[place.tree], 1):
            text = int(data.completion_start[completion]), int(data.completion_length[completion])
            self._slots(place, start, text, group, branch, prompt[1])
            self._score(place, start, text, place.start + prompt[1] - 1, completion)
            start += text[1]

    def _slots(self, place, start: int, text: tuple[int, int], group: int, branch: int, position: int) -> None:
        """Write one run of tokens."""
        where = (place.micro, self.shard, place.row, slice(start, start + text[1]))
        self.batch.tokens[where] = self.encoded.tokens[text[0] : text[0] + text[1]]
        self.batch.group[where] = group
        self.batch.branch[where] = branch
        self.batch.position[where] = np.arange(position, position + text[1])

    def _score(self, place, start: int, text: tuple[int, int], root: int, completion: int) -> None:
        """List a completion's tokens: the first is predicted from the prompt's last slot, each other from its left."""
        micro = place.micro
        number = self.local[micro].setdefault(completion, len(self.local[micro]))
        where = (micro, self.shard, slice(self.scored[micro], self.scored[micro] + text[1]))
        slots = np.arange(start - 1, start - 1 + text[1])
        slots[0] = root
        self.batch.source[where] = place.row * self.batch.tokens.shape[3] + slots
        self.batch.target[where] = self.encoded.tokens[text[0] : text[0] + text[1]]
        self.batch.completion[where] = number
        self.batch.ids[micro, self.shard, number] = completion
        self.batch.lengths[micro, self.shard, number] = text[1]
        self.batch.last[micro, self.shard, number] = place.row * self.batch.tokens.shape[3] + start + text[1] - 1
        if self.batches.reference is not None:
            first = int(self.encoded.scored_start[completion])
            self.batch.reference[where] = self.batches.reference[first : first + text[1]]
        self.scored[micro] += text[1]

    def _pair(self, pair: int, noise: float, micro: int) -> None:
        where = (micro, self.shard, self.pairs[micro])
        self.batch.chosen[where] = self.local[micro][int(self.encoded.chosen[pair])]
        self.batch.rejected[where] = self.local[micro][int(self.encoded.rejected[pair])]
        self.batch.weight[where] = self.encoded.weight[pair]
        self.batch.margin[where] = self.encoded.margin[pair]
        self.batch.label[where] = self.encoded.label[pair]
        self.batch.noise[where] = noise
        self.batch.real[where] = True
        if self.batches.rankings:
            ranked = self.batches.completions_of(int(self.encoded.pair_unit[pair]))
            self.batch.ranked[where][: len(ranked)] = [self.local[micro][int(c)] for c in ranked]
            self.batch.rank[where][: len(ranked)] = self.encoded.rank[ranked]
        self.pairs[micro] += 1


def pair_tokens(encoded: Encoded) -> np.ndarray:
    """Tokens of each pair, int64 [P], as TRL counts them: the prompt once for each completion."""
    prompts = np.maximum(encoded.prompt_length[encoded.completion_unit] - encoded.completion_skip, 1)
    whole = (prompts + encoded.completion_length).astype(np.int64)
    return whole[encoded.chosen] + np.where(encoded.single, 0, whole[encoded.rejected])


def prefetch(make: Callable[[int], Any], steps: range, depth: int = 2) -> Iterator[tuple[int, Any]]:
    """`(step, make(step))` for each step, made by a thread that stays up to `depth` steps ahead.

    What `make` raises is raised here, at its step. Leaving the loop early ends the thread.
    """
    made: queue.Queue = queue.Queue(depth)
    left = threading.Event()

    def work() -> None:
        for step in steps:
            try:
                item = (step, make(step), None)
            except BaseException as error:  # handed over, whatever it is
                item = (step, None, error)
            while not left.is_set():
                try:
                    made.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if left.is_set() or item[2] is not None:
                return

    threading.Thread(target=work, name="batches", daemon=True).start()
    try:
        for _ in steps:
            step, value, error = made.get()
            if error is not None:
                raise error
            yield step, value
    finally:
        left.set()
