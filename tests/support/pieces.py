"""Work for processes of their own, which import this module and not the tests."""

import os
import signal
import sys
import tempfile
import time

from dpo_jax.data.encode import EncodingRules, encode_rows
from dpo_jax.data.records import Stretch
from dpo_jax.errors import UserError


def numbered(context: str, piece: int) -> tuple[str, int]:
    """The piece, from whichever process; refuses 13."""
    if piece == 13:
        raise UserError(f"piece {piece}: unlucky")
    if piece == 17:
        raise KeyError(piece)
    return context, piece


def process_of(_context: None, _piece: int) -> int:
    return os.getpid()


def dies_at(context: int, piece: int) -> int:
    if piece == context:
        os.kill(os.getpid(), signal.SIGKILL)
    return piece


def interrupts(_context: None, piece: int) -> int:
    """Ctrl-C at the piece 1, whose result never comes; else the process."""
    if piece == 1:
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(3600)
    return os.getpid()


def modules_after(context: EncodingRules, stretch: Stretch) -> list[str]:
    """What is heavy and was imported to tokenise."""
    encode_rows(context, stretch)
    return [name for name in ("jax", "flax", "torch", "tests.conftest") if name in sys.modules]


def doubled(value):
    return value * 2


def ending(how):
    """Ends in a way that its process may not survive."""
    match how:
        case "raise":
            raise ValueError("unlucky\nand more")
        case "exit":
            os._exit(3)
        case "abort":
            os.abort()
        case "loop":
            while True:
                pass
        case "memory":
            return len([bytes(1 << 20) for _ in range(1 << 20)])
        case "write":
            with tempfile.TemporaryFile() as file:
                file.write(b"x")
