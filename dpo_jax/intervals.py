"""How often something is done in a run: every so many steps, or passes over the data."""

import re
from fractions import Fraction

EPOCHS = re.compile(r"([0-9]{1,6}|[0-9]{0,6}\.[0-9]{1,6}) epochs?")
"""Passes over the data in words: `1 epoch`, `0.5 epochs`, `2 epochs`."""


def epochs_of(text: str) -> Fraction:
    """How many passes over the data that is.

    >>> epochs_of("0.1 epochs")
    Fraction(1, 10)
    """
    found = EPOCHS.fullmatch(text)
    assert found is not None, text
    return Fraction(found[1])


def check_interval(key: str, value: object, *, never: bool) -> int | str | None:
    """The value of a setting, if it is an interval, or (`never`) null.

    Raises:
      ValueError: it is not.
    """
    if isinstance(value, str) and EPOCHS.fullmatch(value) and epochs_of(value) > 0:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if never and value is None:
        return None
    raise ValueError(
        f"{key}: must be a whole number of steps > 0, or of passes over the data in words, as in '0.5 epochs' or "
        f"'1 epoch'{', or null' if never else ''}"
    )


def steps_between(every: int | str, examples: int, pairs_per_step: int) -> Fraction:
    """Steps from one time to the next, which need not be a whole number where passes over the data are counted."""
    return Fraction(every) if isinstance(every, int) else epochs_of(every) * examples / pairs_per_step


def is_at(step: int, every: Fraction) -> bool:
    """Whether this step is the first after which another `every` steps are made."""
    return step // every > (step - 1) // every
