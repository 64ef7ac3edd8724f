"""What a run changes of its process, put back as it was: a function must leave a notebook as it found it."""

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

from dpo_jax.config.command import CHATTY, FILTERS, quiet_libraries

_inside = threading.Lock(), contextlib.ExitStack(), [0]
"""What is restored when the last of those leaves that are inside at a time, and how many these are."""
CACHE = ("jax_enable_compilation_cache", "jax_compilation_cache_dir")


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """For the while libraries are quiet, and jax has 32 bits as in a command; afterwards all is as it was: settings of
    jax and its cache of programs, the environment, handlers, filters and levels of logs, the hook for errors that
    nobody can raise.

    Threads may be inside at a time, and calls inside each other: the last that leaves restores what the first found.
    """
    lock, stack, count = _inside
    with lock:
        count[0] += 1
        if count[0] == 1:
            stack.enter_context(_restored())
    try:
        yield
    finally:
        with lock:
            count[0] -= 1
            if count[0] == 0:
                stack.close()


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    settings, environment = dict(jax.config.values), dict(os.environ)
    logs = {name: _state(logging.getLogger(name)) for name in {*CHATTY, "asyncio", *(name for name, _ in FILTERS)}}
    hook, handlers = sys.unraisablehook, list(logging.root.handlers)
    try:
        quiet_libraries()
        jax.config.update("jax_enable_x64", False)
        yield
    finally:
        sys.unraisablehook = hook
        logging.root.handlers[:] = handlers  # absl gives the root one with its first line, where it has none
        for name, (level, filters) in logs.items():
            logger = logging.getLogger(name)
            logger.filters[:] = filters
            if name in CHATTY and logger.level == logging.WARNING:  # its library may have set another since
                logger.setLevel(level)
        _restore(environment)
        now = jax.config.values
        moved = any(now[name] != settings[name] for name in CACHE)
        for name in [name for name, value in settings.items() if now[name] is not value and now[name] != value]:
            jax.config.update(name, settings[name])
        if moved:  # or what is compiled next would still go to the run's folder
            compilation_cache.reset_cache()


def _state(logger: logging.Logger) -> tuple[int, list[Any]]:
    return logger.level, list(logger.filters)


def _restore(environment: dict[str, str]) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
