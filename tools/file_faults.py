"""Kills a training run before each of its first file operations, and fills its disk at each; then runs it again.

python tools/file_faults.py CONFIG [key=value ...] [--kill 1-150] [--full 1-40] [--work FOLDER]

After a kill the same command must end with exit code 0 and the bits of a run that nothing happened to. On a full disk
(every operation that needs room fails, from the given one on) the run must end with exit code 2 and one line, no
traceback; and the same command, with room again, with the same bits. An operation is one that changes something below
the output folder: open to write, write, rename, unlink, mkdir, fsync, ... They are counted in the process by a small
library (tools/faults/file_faults.c), for which a C compiler must be there. Each run is a fork of one process that has
imported everything, and all use one cache of compiled programs. Prints one line a case; exit code 1 if any is not as it
must be.
"""

import argparse
import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from kill_resume import differences

KILL, FULL = 1, 2
LIBRARY = Path(__file__).parent / "faults" / "file_faults.c"
SIGKILL = 9


def main(argv: Sequence[str] | None = None) -> int:
    """Start again under the counting library if it is not there yet, then make all runs."""
    arguments = parsed(argv)
    work = (arguments.work or Path(tempfile.mkdtemp(prefix="file_faults_"))).absolute()
    if "FAULT_ROOT" not in os.environ:
        work.mkdir(parents=True, exist_ok=True)
        library = work / "file_faults.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-w", "-o", library, LIBRARY, "-ldl"], check=True)
        given = {"FAULT_ROOT": str(work / "run"), "LD_PRELOAD": str(library)}
        command = [sys.executable, *(sys.argv if argv is None else [__file__, *argv]), "--work", str(work)]
        return subprocess.run(command, env={**os.environ, **given}).returncode
    return checked(work, [arguments.config, *arguments.overrides], arguments.kill, arguments.full)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--kill", type=numbers, default=numbers("1-150"), help="operations, such as 1-150, or none")
    parser.add_argument("--full", type=numbers, default=numbers("1-40"), help="operations, such as 1-40, or none")
    parser.add_argument("--work", type=Path, help="an empty folder for the runs (default: a temporary one)")
    return parser.parse_intermixed_args(argv)


def numbers(text: str) -> range:
    """`1-40`, `1-200:40` (every fortieth), `7`, or `none`."""
    if text == "none":
        return range(0)
    given, _, each = text.partition(":")
    first, _, last = given.partition("-")
    return range(int(first), int(last or first) + 1, int(each or 1))


def checked(work: Path, words: list[str], kills: range, fulls: range) -> int:
    """Make the run that nothing happens to, then every case; the exit code."""
    import_all()
    output, whole = work / "run", work / "whole"
    words = [*words, f"output={output}", f"data.cache={output / 'cache'}", f"model.compile_cache={work / 'programs'}"]
    code, text, operations = run_in_fork(words, work / "log.txt", 0, KILL)
    if code != 0:
        print(f"the run fails by itself with exit code {code}:\n{text}")
        return 1
    output.rename(whole)
    print(f"a whole run makes {operations} file operations", flush=True)
    problems = 0
    cases = [(KILL, number) for number in kills] + [(FULL, number) for number in fulls]
    for mode, number in cases:
        shutil.rmtree(output, ignore_errors=True)
        found = list(problems_of(work, words, whole, mode, number))
        problems += bool(found)
        print(f"{'kill' if mode == KILL else 'full'} {number:4d}  {'; '.join(found) or 'equal'}", flush=True)
        if found:
            shutil.rmtree(work / f"bad-{mode}-{number}", ignore_errors=True)
            shutil.copytree(output, work / f"bad-{mode}-{number}") if output.exists() else None
    print(f"{len(cases) - problems} of {len(cases)} cases as they must be")
    return int(problems > 0)


def problems_of(work: Path, words: list[str], whole: Path, mode: int, number: int) -> Iterator[str]:
    """What is not as it must be in one case."""
    code, text, _ = run_in_fork(words, work / "log.txt", number, mode)
    if code == 0:
        yield from differences(whole, work / "run")
        return
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    (work / f"log-{mode}-{number}.txt").write_text(text)
    if mode == KILL and code != -SIGKILL:
        yield f"ended with {code}"
    if mode == FULL and (code != 2 or len(errors) != 1 or "Traceback" in text or re.search(r"^\s+File ", text, re.M)):
        yield f"full disk: exit code {code}, {len(errors)} error lines, {len(text.splitlines())} lines: {text[-400:]!r}"
    code, text, _ = run_in_fork(words, work / "log.txt", 0, 0)
    if code != 0:
        yield f"again: exit code {code}: {text[-400:]!r}"
    else:
        yield from differences(whole, work / "run")


def import_all() -> None:
    """What a run imports, so that each fork has it; no device is touched."""
    import datasets  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import tensorboardX  # noqa: F401
    import transformers  # noqa: F401

    import dpo_jax.run.prepare  # noqa: F401
    import dpo_jax.train  # noqa: F401


def run_in_fork(words: list[str], log: Path, number: int, mode: int) -> tuple[int, str, int]:
    """Exit code (negative: of a signal), what was printed, and file operations counted, of one run in a fork."""
    counter = log.with_name("operations.txt")
    counter.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        sys.exit(in_child(words, log, number, mode, counter))  # with all that a process does at its end
    _, status = os.waitpid(child, 0)
    counted = int(counter.read_text()) if counter.exists() else 0
    return os.waitstatus_to_exitcode(status), log.read_text(errors="replace"), counted


def in_child(words: list[str], log: Path, number: int, mode: int, counter: Path) -> int:
    """Run with its output in the log; the exit code."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    library = ctypes.CDLL(None)
    library.fault_count.restype = ctypes.c_long
    library.fault_arm.argtypes = [ctypes.c_long, ctypes.c_int]
    from dpo_jax import train

    # a whole run only counts: its number is never reached
    library.fault_arm(number or 2**40, mode)
    code = train.main(words)
    library.fault_arm(0, 0) if not mode else None
    counter.write_text(str(library.fault_count()))
    return code


if __name__ == "__main__":
    sys.exit(main())
