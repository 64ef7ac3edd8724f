"""The share of good answers: a model is asked, answers greedily, and each answer is held against a pattern.

A file of questions is JSON Lines, one object a line: `prompt` (a text, taken as it stands, or a list of messages) and
`good`, a regular expression that is found (`re.search`, `.` matches line ends) in a good answer and in no bad one.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from dpo_jax.data.messages import BadRow, Messages, is_chat, messages_of, need, texts_of
from dpo_jax.data.records import READERS, text_notes
from dpo_jax.data.report import clean
from dpo_jax.data.templates import Codec, template_source
from dpo_jax.evaluation.generate import Answer, Decoding, generate
from dpo_jax.model.decoder import Params
from dpo_jax.model.spec import DecoderSpec
from dpo_jax.settings import UserError

Prompt = str | Messages


class Asked(NamedTuple):
    """A prompt, and where it stands: `file:line`."""

    prompt: Prompt
    where: str


class Question(NamedTuple):
    """A prompt, where it stands (`file:line`), and what a good answer to it matches."""

    prompt: Prompt
    where: str
    good: re.Pattern[str]


class Result(NamedTuple):
    """The share of good answers, and a row for each question: prompt, answer, good, finished."""

    share: float
    rows: list[dict[str, Any]]


# ---------------------------------------------------------------------------------------------- files


def read_prompts(path: str) -> list[Asked]:
    """The `prompt` of each row of a JSONL file (or of another kind of file that preference data may come in).

    Raises:
      UserError: the file, or one of its rows, is not as it must be.
    """
    return [Asked(_prompt(row), where) for where, row in _rows(path)]


def read_questions(path: str) -> list[Question]:
    """The questions of a file.

    Raises:
      UserError: the file, or one of its rows, is not as it must be.
    """
    return [Question(_prompt(row), where, _pattern(row, where)) for where, row in _rows(path)]


def _rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with their place; what is wrong with one, found here or by who takes it, is an error that names the place."""
    file = Path(path).expanduser()
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise UserError(f"{clean(path)}: prompts are read from {', '.join(READERS)}; name the file so")
    where = ""
    try:
        for row in reader(file, path):
            where = f"{clean(path)}:{row.line}"
            if isinstance(row.value, BadRow):
                raise row.value
            if not isinstance(row.value, dict):
                raise BadRow("not an object", 'a row is an object: {"prompt": ...}')
            yield where, row.value
    except OSError as error:
        raise UserError(f"{clean(path)}: {error.strerror or error}") from error
    if not where:
        raise UserError(f'{clean(path)}: is empty; write a row {{"prompt": ...}} a line')
