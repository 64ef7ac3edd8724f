"""What the processes of a run say of themselves, as process 0 writes it down: who keeps the others waiting, memory."""

from collections.abc import Mapping

SAID_AFTER, SAID_EVERY = 5, 100
"""Records in a row in which a process is slow before it is said, and between two lines on the same one."""
MUCH = 0.5
"""Share of a step that a process spends by itself, while the devices could go on, from which on it is said."""

Numbers = Mapping[int, Mapping[str, float]]
"""By process: seconds of its `own` between two steps, and of these how long it `waited` for its batch; bytes of
`memory`."""


def host_metrics(heard: Numbers) -> dict[str, float]:
    """Metrics of a step by the processes of a run, as they last told them; none of one process.

    `hosts/slowest` is the process with the most seconds of its own (`hosts/own_seconds`), `hosts/input_wait` the
    longest wait for a batch in seconds, `hosts/memory_bytes` the most memory of a process.
    """
    known = {process: numbers for process, numbers in heard.items() if numbers}
    if len(heard) < 2 or not known:
        return {}
    slowest = max(known, key=lambda process: known[process]["own"])
    return {
        "hosts/slowest": float(slowest),
        "hosts/own_seconds": known[slowest]["own"],
        "hosts/input_wait": max(numbers["waited"] for numbers in known.values()),
        "hosts/memory_bytes": max(numbers["memory"] for numbers in known.values()),
    }


class SlowHost:
    """Says which process keeps the others waiting, once it has done so for a while, and now and then from there on."""

    def __init__(self):
        """Nothing has been said."""
        self._process, self._records = -1, 0

    def line(self, heard: Numbers, seconds: float) -> str | None:
        """A line on the process that spends most of a step of so many seconds by itself, or None; to be called at each
        record."""
        found = host_metrics(heard)
        if not found or found["hosts/own_seconds"] < MUCH * seconds:
            self._process = -1
            return None
        slowest = int(found["hosts/slowest"])
        self._records = self._records + 1 if slowest == self._process else 1
        self._process = slowest
        if self._records % SAID_EVERY != SAID_AFTER:
            return None
        waited = heard[slowest]["waited"]
        why = f", {waited:.2f} s of them waiting for its batch" if waited > MUCH * found["hosts/own_seconds"] else ""
        return (
            f"process {slowest} keeps the others waiting: {found['hosts/own_seconds']:.2f} s of a step of "
            f"{seconds:.2f} s are its own{why}"
        )
