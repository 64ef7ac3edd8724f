"""A command in several processes of this machine, each with devices of its own, as if they were hosts."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


class Hosts:
    """The processes, and what they say: `N.log` in a folder."""

    def __init__(
        self,
        words: Sequence[str],
        logs: Path,
        *,
        processes: int = 2,
        devices: int = 1,
        environment: Mapping[str, str] | None = None,
        apart: Path | None = None,
    ):
        """Start `python words...` as often as there are `processes`; `{process}` in a word is the process's number.

        Each of those that are `apart` works in a folder of its own there, named by its number, as on hosts that share
        no disk.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        logs.mkdir(parents=True, exist_ok=True)
        self.logs, self.all = logs, list[subprocess.Popen]()
        for process in range(processes):
            own = {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
            if processes > 1:
                own |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes)}
                own |= {"JAX_PROCESS_ID": str(process)}
            command = [sys.executable, *(word.replace("{process}", str(process)) for word in words)]
            where = None if apart is None else apart / str(process)
            if where is not None:
                where.mkdir(parents=True, exist_ok=True)
            with (logs / f"{process}.log").open("wb") as log:
                given = {"env": {**os.environ, **own, **(environment or {})}, "cwd": where}
                self.all.append(subprocess.Popen(command, stdout=log, stderr=log, **given))

    def said(self, process: int = 0) -> str:
        """What a process has said so far."""
        return (self.logs / f"{process}.log").read_text("utf-8", "replace")

    def until(self, holds: Callable[[], bool], seconds: float = 300) -> bool:
        """Wait until something holds; False if all processes ended, or the time was up, before it did."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if holds():
                return True
            if all(one.poll() is not None for one in self.all):
                return False
            time.sleep(0.02)
        return False

    def send(self, process: int, number: signal.Signals) -> None:
        """Send a signal to a process, if it lives."""
        if self.all[process].poll() is None:
            self.all[process].send_signal(number)

    def ends(self, seconds: float = 600) -> list[int | None]:
        """The exit code of each process, once all have ended; None for one that had to be killed when time was up."""
        self.until(lambda: all(one.poll() is not None for one in self.all), seconds)
        codes = [one.poll() for one in self.all]
        self.close()
        return codes

    def close(self) -> None:
        """Kill what still runs."""
        for one in self.all:
            if one.poll() is None:
                one.kill()
            one.wait()
