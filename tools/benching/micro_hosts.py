"""What one host of many does with the data: plans the packing of all of it, and makes the rows of its own devices."""

import contextlib
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dpo_jax.data.batches import PLANNED_STEPS, Batches
from dpo_jax.data.encoded import Encoded
from dpo_jax.data.units import COLUMNS
from tools.benching.micro import Options, Row, once
from tools.benching.workloads import hh_lengths

HOSTS, DEVICES, PAIRS_PER_DEVICE = 64, 8, 8
WRITTEN = 1_000_000
"""Pairs that are written at a time."""


def hosts(options: Options) -> list[Row]:
    """A hundred million pairs of hh-rlhf's lengths on 64 hosts of 8 devices, 4,096 pairs a step, as one host sees them.

    The data lies in files, as `data.cache` keeps it, but for the tokens, all of which are the same one: what a disk
    takes to read a step's is not in these numbers. Memory is what the process has of its own (anonymous pages), at
    most, less what it had before; pages of the files are the system's.
    """
    pairs = 1_000_000 if options.quick else 100_000_000
    with tempfile.TemporaryDirectory() as name:
        encoded = _mapped(Path(name), pairs)
        return _as_one_host(encoded)


def _as_one_host(encoded: Encoded) -> list[Row]:
    shards = HOSTS * DEVICES
    step_pairs = shards * PAIRS_PER_DEVICE
    steps = encoded.num_pairs // step_pairs
    batches = Batches(encoded, step_pairs, shards, steps, own=tuple(range(DEVICES)))
    with _own_memory() as grew:
        _, plan = once(lambda: (batches.shapes, batches.depth, batches.pairs_of(0)))
    rows = [{"what": "plan", "pairs": encoded.num_pairs, **plan, "grew MiB": grew[0]}]
    batches.at(0)
    with _own_memory() as grew:
        _, block = once(lambda: [batches.at(step) for step in range(PLANNED_STEPS, 2 * PLANNED_STEPS)])
    each = {name: value / PLANNED_STEPS for name, value in block.items()}
    return [*rows, {"what": "a step", "pairs": step_pairs, **each, "grew MiB": grew[0]}]


@contextlib.contextmanager
def _own_memory() -> Iterator[list[float]]:
    """By how many MiB this process's anonymous pages have grown at most, once the block is left."""
    before, most, ended = _anonymous(), [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            most[0] = max(most[0], _anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        ended.set()
        watcher.join()


def _anonymous() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith("RssAnon"))


def _mapped(folder: Path, pairs: int) -> Encoded:
    """So many pairs in files, one prompt each; what planning does not read is zero and takes no room."""
    sizes = {"prompt": pairs, "pair": pairs, "completion": 2 * pairs}
    owners = {"chosen": "pair", "rejected": "pair", "weight": "pair", "margin": "pair", "label": "pair"}
    owners |= {"file": "prompt", "line": "prompt", "content_key": "prompt", "ids_key": "prompt"}
    owners |= {"truncated": "completion", "rank": "completion"}
    rng = np.random.default_rng(0)

    def made(name: str) -> np.ndarray:
        size = sizes[owners.get(name) or name.partition("_")[0]]
        return np.lib.format.open_memmap(folder / f"{name}.npy", "w+", COLUMNS[name], (size,))

    unscored = {name: np.zeros(0, COLUMNS[name]) for name in ("unscored_start", "unscored_end")}
    columns = unscored | {name: made(name) for name in COLUMNS if name not in (*unscored, "tokens")}
    total = 0
    for begin in range(0, pairs, WRITTEN):
        end = min(begin + WRITTEN, pairs)
        lengths = np.minimum(hh_lengths(end - begin, rng), 1000)
        starts = total + np.cumsum(lengths.reshape(-1)).reshape(lengths.shape) - lengths
        total += int(lengths.sum())
        units, both = np.arange(begin, end), slice(2 * begin, 2 * end)
        one = slice(begin, end)
        columns["prompt_start"][one], columns["prompt_length"][one] = starts[:, 0], lengths[:, 0]
        columns["completion_start"][both] = starts[:, 1:].reshape(-1)
        columns["completion_length"][both] = lengths[:, 1:].reshape(-1)
        columns["completion_unit"][both] = np.repeat(units, 2)
        columns["pair_unit"][one], columns["chosen"][one], columns["rejected"][one] = units, 2 * units, 2 * units + 1
    columns["tokens"] = np.broadcast_to(COLUMNS["tokens"].type(1), total)
    return Encoded(files=("measured",), **{name: np.asarray(array) for name, array in columns.items()})
