"""What every command shares: its faults in one line each, the signals that end it, its arguments, quiet libraries."""

import argparse
import contextlib
import functools
import logging
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from dpo_jax.config import completion
from dpo_jax.config.console import COMMANDS, program
from dpo_jax.errors import COMMAND_LINE, UserError, printable, redacted
from dpo_jax.files import refusal
from dpo_jax.processes.here import here
from dpo_jax.processes.joining import leave
from dpo_jax.processes.places import check_alone
from dpo_jax.processes.watch import RETRY

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that ask a process to end. The last one is of a terminal that is closed, and no signal of Windows."""


Main = Callable[[Sequence[str]], int | None]


def command_of_hosts(main: Main) -> Callable[..., int]:
    """As `command`, of one that several processes run together."""
    return command(main, alone=False)


def command(main: Main, *, alone: bool = True) -> Callable[..., int]:
    """Make `main(argv)` a command: `sys.exit(main())`.

    What a user did wrong, and what the machine refuses to do with a file, is printed on stderr, one line `error: ...`
    for each problem, and gives exit code 2; Ctrl-C gives 130, SIGTERM and SIGHUP 75 (try again), a reader of our output
    that went away 141. Anything else is our fault and keeps its traceback. Where the process is one of several of a
    run, the others end with it, and a fault gives 76: try again.
    """

    @functools.wraps(main, assigned=("__module__", "__name__", "__qualname__", "__doc__"))  # its types are its own
    def wrapped(argv: Sequence[str] | None = None) -> int:
        _open_standard_streams()
        try:
            if alone:
                check_alone(os.environ)
            with _told_to_end():
                code = main(sys.argv[1:] if argv is None else argv) or 0
                _part()
            sys.stdout.flush()
            return code
        except BaseException as error:
            code = _said(error)
            _part(error, RETRY if code is None else code)
            if code is None:
                raise
            return code

    return wrapped


def _part(error: BaseException | None = None, code: int = 0) -> None:
    """Part from the other processes of a run, if there are any: at its end, or with an error that ends them too."""
    if here().count == 1:
        return None if error is None else leave(error, code)
    from dpo_jax.processes import starting

    starting.end() if error is None else starting.end_early(error, code)


def _said(error: BaseException) -> int | None:
    """Say what ended a command, and give its exit code; None, and nothing is said, where that is our fault."""
    match error:
        case _Ended():
            print(f"stopped by {signal.Signals(error.number).name}; run the same command again", file=sys.stderr)
            return 75
        case UserError():
            for line in str(error).splitlines():
                print(f"error: {printable(redacted(line))}", file=sys.stderr)
            return error.code
        case KeyboardInterrupt():
            print("stopped from the keyboard; run the same command again", file=sys.stderr)
            return 130
        case BrokenPipeError() if _reader_left():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails again
            return 141
        case OSError() if not isinstance(error, BrokenPipeError) and (line := refusal(error)) is not None:
            print(f"error: {printable(redacted(line))}", file=sys.stderr)
            return 2
    return None


def _open_standard_streams() -> None:
    """Nothing in place of streams that were closed (`>&-`), so that no file of ours gets their number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))


class _Ended(BaseException):
    """A signal asks this process to end."""

    def __init__(self, number: int):
        """The signal's number."""
        self.number = number


@contextlib.contextmanager
def _told_to_end() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `_Ended`, where they would have ended the process without a word."""

    def end(number: int, _: object) -> None:
        raise _Ended(number)

    here = threading.current_thread() is threading.main_thread()
    numbers = [number for number in ENDING if here and signal.getsignal(number) == signal.SIG_DFL]
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reader_left() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


class Parser(argparse.ArgumentParser):
    """Arguments of a command that takes no `Run`; what is wrong with them is one line, as for settings."""

    def __init__(self, command: str, description: str | None = None, *, settings: bool = False):
        """Of a command; `description` is of a part of one, and `settings` says that it also takes those of a run."""
        description = COMMANDS[command].says if description is None else description
        super().__init__(prog=program(command), description=description, allow_abbrev=False)
        self._settings, self._answers = settings, False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Read the arguments; or, where a shell asks for it, say how they may go on."""
        if completion.ASKED in os.environ and not self._answers:
            self._answers = True  # argcomplete reads the line with this very parser
            completion.answer(self, settings=self._settings)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments."""
        raise UserError(f"{COMMAND_LINE}: {message}; see {self.prog} --help")


CHATTY = ("absl", "orbax", "jax", "datasets", "httpx", "httpx2", "filelock")
"""Loggers of libraries of which warnings and errors are wanted only."""


def quiet_libraries() -> None:
    """Keep the chatter of libraries out of a command's output; their errors and warnings about the run stay."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")  # a log wants no bars
    for name, kept in FILTERS:
        logging.getLogger(name).addFilter(kept)
    logging.getLogger("huggingface_hub").propagate = False  # it prints its own, which need not be printed twice


def _no_cache_misses(record: logging.LogRecord) -> bool:
    """tokamax tells of every shape that its tables of kernel settings do not have, in lines of 900 characters."""
    return not record.getMessage().startswith("Autotuning cache miss")


def _no_word_on_pytorch(record: logging.LogRecord) -> bool:
    """It is not needed here. transformers resets its own level when it is imported, but keeps filters."""
    return "PyTorch was not found" not in record.getMessage()


def _nothing_raised(record: logging.LogRecord) -> bool:
    """gcsfs logs the traceback of what it raises."""
    return record.exc_info is None


def _said_once(record: logging.LogRecord) -> bool:
    """The hub's client tells of each of six attempts at the same file, in two lines that differ by a number."""
    text = re.sub(r"\d+", "", record.getMessage())
    new, _ = text not in _SAID, _SAID.add(text)
    return new


_SAID: set[str] = set()
FILTERS = (
    ("absl", _no_cache_misses),
    ("transformers", _no_word_on_pytorch),
    ("gcsfs", _nothing_raised),
    ("huggingface_hub.utils._http", _said_once),
)
"""What else of libraries' logs is left out, by logger."""
