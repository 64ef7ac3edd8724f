"""What a process holds. `python -m tests.support.held FOLDER SECONDS MODULE WORDS...` runs a module as a command while
a thread writes it down again and again, a line of JSON each time, into a file that has the process's number."""

import contextlib
import ctypes
import gc
import json
import os
import runpy
import sys
import threading
from pathlib import Path


class Used(ctypes.Structure):
    """The C library's `mallinfo2`: bytes and counts of its heap."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def allocated() -> int:
    """Bytes that the C library has given away and not got back; 0 where it does not say (another than glibc 2.33)."""
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return 0
    ask.restype = Used
    used = ask()
    return used.uordblks + used.hblkhd


def held() -> dict[str, int]:
    """What this process holds: resident bytes, mapped regions, open files, threads; not what its allocator keeps free,
    which is a quarter of what is resident right after a fit. Of the resident bytes some are holes between what is in
    use, more of them on a busy machine; `allocated` bytes and Python's `objects` have none."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    with open("/proc/self/maps") as file:
        regions = sum(1 for _ in file)
    files = len(os.listdir("/proc/self/fd"))
    return {
        "rss": pages * os.sysconf("SC_PAGE_SIZE"),
        "allocated": allocated(),
        "objects": sys.getallocatedblocks(),
        "regions": regions,
        "files": files,
        "threads": threading.active_count(),
    }


def keep(folder: Path, seconds: float) -> None:
    """Write it down for as long as the process lives."""
    folder.mkdir(parents=True, exist_ok=True)
    never = threading.Event()
    with (folder / f"{os.getpid()}.jsonl").open("w") as file:
        while not never.wait(seconds):
            print(json.dumps(held()), file=file, flush=True)


if __name__ == "__main__":
    where, every, module, *words = sys.argv[1:]
    threading.Thread(target=keep, args=(Path(where), float(every)), name="held", daemon=True).start()
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
