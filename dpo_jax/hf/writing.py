"""Files of tensors that all processes of a run write at the same time, each its own ones."""

import contextlib
import itertools
import queue
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from dpo_jax.hf.tensors import TensorInfo, num_bytes
from dpo_jax.processes.here import here

T = TypeVar("T")
Files = Mapping[str, Mapping[str, TensorInfo]]
Fetch = Callable[[str], np.ndarray]


class _Given(Exception):  # noqa: N818 -- no fault of its own: it ends the writing thread when the other one has failed
    """No more tensors come."""


def size_of_file(part: Mapping[str, TensorInfo]) -> int:
    """Bytes of a file's tensors."""
    return sum(num_bytes(info.dtype, info.shape) for info in part.values())


def writers(files: Files, count: int) -> dict[str, int]:
    """Which of so many processes writes each file: the largest first, each by who has the fewest bytes so far."""
    sizes = {file: size_of_file(part) for file, part in files.items()}
    load, found = [0] * count, {}
    for file in sorted(sizes, key=lambda file: -sizes[file]):
        found[file] = load.index(min(load))
        load[found[file]] += sizes[file]
    return found


def gathered(files: Files, by: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """File and name of every tensor in the order in which they are gathered: one of each process in turn, so that all
    of them have something to write; those of one process as its files have them."""
    rows = [
        [(file, name) for file, part in files.items() if by[file] == process for name in part]
        for process in sorted(set(by.values()))
    ]
    return (one for turn in itertools.zip_longest(*rows) for one in turn if one is not None)


def write_all(files: Files, by: Mapping[str, int], write: Callable[[str, Fetch], T], fetch: Fetch) -> dict[str, T]:
    """Each file written by its process; what all of them said of their files, on every process.

    Args:
      files: the tensors of each file.
      by: which process writes each, from `writers`.
      write: `write(file, fetch)` writes a file, whose tensors it fetches in their order; what it gives can be said in
        JSON. Of several processes it runs in a thread, while the next tensor is gathered: two are in memory then.
      fetch: gives a tensor by its name; all processes call it together, of every tensor and in the same order.
    """
    place = here()
    mine = [file for file in files if by[file] == place.process]
    if place.count == 1:
        return {file: write(file, fetch) for file in mine}
    feed: queue.Queue[np.ndarray | None] = queue.Queue(1)

    def fed(name: str) -> np.ndarray:
        if (array := feed.get()) is None:
            raise _Given(name)
        return array

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(lambda: [write(file, fed) for file in mine])
        try:
            for file, name in gathered(files, by):
                array = fetch(name)
                place.moved()
                if by[file] == place.process:
                    _put(feed, array, writing)
                del array  # before the next tensor is gathered
        except BaseException:
            with contextlib.suppress(Exception):
                _put(feed, None, writing)
            raise
        done = dict(zip(mine, writing.result(), strict=True))
    return {file: one for part in place.everyone("files of tensors written", done) for file, one in part.items()}


def _put(feed: queue.Queue[np.ndarray | None], array: np.ndarray | None, writing: Future) -> None:
    """Hand over a tensor, once the one before is taken; raises what ended the writing, if anything did."""
    while True:
        if writing.done():
            writing.result()
        with contextlib.suppress(queue.Full):
            return feed.put(array, timeout=1.0)
